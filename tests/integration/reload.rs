//! Settings that change while the daemon runs.

use std::path::PathBuf;

use serde_json::json;
use tempfile::TempDir;

use crate::support::daemon::{Daemon, Settings, message_of};
use crate::support::process::Signal;
use crate::support::wait::eventually;
use crate::support::world::World;

struct Configured {
    world: World,
    dir: TempDir,
}

impl Configured {
    /// A world whose daemon reads a file with these lines.
    async fn start(lines: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("worker-spawner.env");
        std::fs::write(&file, lines).unwrap();
        let world = World::start(&[("CONFIG_FILE", file.to_str().unwrap())]).await;
        Self { world, dir }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("worker-spawner.env")
    }

    /// Has the daemon read these lines, and waits until it says `what`. Returns all of what it says.
    async fn reload(&self, lines: &str, what: &str) -> String {
        std::fs::write(self.file(), lines).unwrap();
        let before = self.world.daemon.log().events().len();
        self.world.daemon.signal(Signal::HUP);
        eventually("the daemon speaks of its settings", || async {
            let events = self.world.daemon.log().events();
            events[before..].iter().any(|event| message_of(event).contains(what))
        })
        .await;
        // The first words are followed by the others at once: the next order comes behind them.
        self.world.daemon.signal(Signal::USR2);
        eventually("the daemon follows the next order", || async {
            let events = self.world.daemon.log().events();
            events[before..].iter().any(|event| message_of(event).contains("logging as RUST_LOG"))
        })
        .await;
        let events = self.world.daemon.log().events();
        events[before..].iter().map(|event| format!("{event}\n")).collect()
    }

    /// The error code of a job with these fields.
    async fn refusal(&self, fields: serde_json::Value) -> String {
        let ended = self.world.execute(fields).await;
        ended.outcome["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

const READ: &str = "the settings were read again";

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn limits_and_the_allow_list_are_taken_up() {
    let file = Configured::start("PIDS_LIMIT=64\nIMAGE_ALLOWLIST=worker-spawner-test/*").await;
    let job = json!({"parameter": "true", "pids": 100});
    assert_eq!(file.refusal(job.clone()).await, "request.invalid_field");
    let lines = "PIDS_LIMIT=100\nIMAGE_ALLOWLIST=worker-spawner-test/*\nOUTPUT_LIMIT=4";
    let told = file.reload(lines, READ).await;
    assert!(told.contains("OUTPUT_LIMIT, PIDS_LIMIT"), "{told}");
    assert!(!told.contains("IMAGE_ALLOWLIST"), "it has not changed: {told}");
    assert_eq!(file.refusal(job.clone()).await, "");
    let ended = file.world.execute(json!({"parameter": "echo 123456"})).await;
    assert_eq!((ended.text().as_str(), &ended.outcome["stdout_truncated"]), ("1234", &json!(true)));
    file.reload("IMAGE_ALLOWLIST=nothing/*", READ).await;
    assert_eq!(file.refusal(json!({"parameter": "true"})).await, "image.not_allowed");
    // What is gone from the file has its default again.
    file.reload("", READ).await;
    let ended = file.world.execute(json!({"parameter": "echo 123456"})).await;
    assert_eq!(ended.text(), "123456\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn slots_become_more_and_fewer_while_functions_run() {
    let file = Configured::start("MAX_CONTAINERS=1").await;
    let world = &file.world;
    let first = world.hold().await;
    let waits = world.submit(json!({"parameter": "sleep 60"})).await;
    // One by one, or who waits would have been there first.
    file.reload("MAX_CONTAINERS=2", READ).await;
    world.engine.running(&waits).await;
    file.reload("MAX_CONTAINERS=1", READ).await;
    // Both run on, and the next one has to wait for both.
    let last = world.submit(json!({"parameter": "true"})).await;
    world.client.publish("functions.cancel", waits.clone().into()).await.unwrap();
    world.results.wait_for(&waits).await;
    world.engine.gone(&waits).await;
    let answer = world.run(json!({"parameter": "true"})).await;
    assert_eq!(answer["error"]["code"], "busy", "{answer}");
    assert!(world.results.of(&last).is_empty());
    world.release(&first).await;
    world.results.wait_for(&last).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_mistake_changes_nothing_and_is_named() {
    let file = Configured::start("PIDS_LIMIT=64").await;
    for (lines, wanted) in [
        ("PIDS_LIMIT=100\nCPU_LIMIT=fast", "CPU_LIMIT: expected"),
        ("PIDS_LIMIT=100\nCPU_LIMITS=1", "line 2: \\\"CPU_LIMITS\\\" is no setting"),
        ("PIDS_LIMIT=100\nPIDS_LIMIT=100", "line 2: PIDS_LIMIT is set twice"),
    ] {
        let told = file.reload(lines, "the settings stay as they are").await;
        assert!(told.contains(wanted), "{told}");
    }
    std::fs::remove_file(file.file()).unwrap();
    file.world.daemon.signal(Signal::HUP);
    let log = file.world.daemon.log();
    log.wait_for("the file is missed", |event| message_of(event).contains("cannot read")).await;
    let job = json!({"parameter": "true", "pids": 100});
    assert_eq!(file.refusal(job).await, "request.invalid_field");
    file.world.works(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_takes_effect_later_is_named_and_no_secret_is() {
    let file = Configured::start("").await;
    let lines = "NATS_TOKEN=s3cret\nSUBJECT_PREFIX=other\nPIDS_LIMIT=99";
    let told = file.reload(lines, READ).await;
    assert!(told.contains("NATS_TOKEN, SUBJECT_PREFIX"), "{told}");
    assert!(told.contains("take effect at the next start"), "{told}");
    assert!(!told.contains("s3cret"), "{told}");
    // They are named for as long as the daemon runs without them.
    let told = file.reload(lines, READ).await;
    assert!(told.contains("NATS_TOKEN, SUBJECT_PREFIX"), "{told}");
    file.world.works(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_log_says_more_and_less_when_it_is_told_to() {
    let world = World::start(&[("RUST_LOG", "info")]).await;
    let begins = |world: &World| {
        let events = world.daemon.log().events();
        events.iter().filter(|event| message_of(event) == "job begins").count()
    };
    world.works(1).await;
    assert_eq!(begins(&world), 0);
    world.daemon.signal(Signal::USR1);
    let log = world.daemon.log();
    log.wait_for("verbose", |event| message_of(event).contains("logging verbosely")).await;
    world.works(1).await;
    assert_eq!(begins(&world), 1);
    world.daemon.signal(Signal::USR2);
    log.wait_for("not verbose", |event| message_of(event).contains("logging as RUST_LOG")).await;
    world.works(1).await;
    assert_eq!(begins(&world), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_file_that_cannot_be_read_is_a_refusal_to_start() {
    let settings = Settings::new().set("CONFIG_FILE", "/no/such/file");
    let mut daemon = Daemon::spawn(&settings);
    assert_eq!(daemon.exit().await.code(), Some(78));
    let told = daemon.log().text();
    assert!(told.contains("CONFIG_FILE: cannot read /no/such/file"), "{told}");
}
