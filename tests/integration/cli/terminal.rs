//! What is drawn, and what keys do, on a terminal.

use futures::StreamExt;
use serde_json::{Value, json};

use super::{Client, HELD, Running, script, worlds};
use crate::support::nats::{NatsServer, round_trip};
use crate::support::wait::{PATIENCE, within};
use crate::support::world::World;

/// Hides the line, as whatever draws on a terminal does.
const CLEARS: &str = "\u{1b}[2K";

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_is_drawn_until_it_prints_and_ctrl_c_cancels_it() {
    for world in worlds(&[]).await {
        let id = world.id();
        let silent = "while [ ! -e /tmp/go ]; do sleep 0.1; done; echo first; \
                      while [ ! -e /tmp/end ]; do sleep 0.1; done; echo second; exit 5";
        let running = Client::of(&world, &script(&world, &id, silent)).on_a_terminal().spawn();
        running.prints("running on ").await;
        let container = world.engine.running(&id).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        running.prints("first\r\n").await;
        world.engine.exec(&container, &["touch", "/tmp/end"]).await;
        let ran = running.end().await;
        assert_eq!(ran.code, 5, "{ran:?}");
        let text = ran.text();
        assert!(text.contains(CLEARS), "it draws: {text:?}");
        // Once the function prints, the terminal is its own.
        let own = text.split_once("first\r\n").unwrap().1;
        assert_eq!(own, "second\r\n");

        let id = world.id();
        let mut running = Client::of(&world, &script(&world, &id, HELD)).on_a_terminal().spawn();
        running.prints("begun\r\n").await;
        running.types(b"\x03");
        let ran = running.end().await;
        assert_eq!(ran.code, 130, "{ran:?}");
        assert!(ran.text().contains("is being stopped"), "{ran:?}");
        world.clean().await;
    }
}

/// What a daemon tells of a job, told without one: so it comes when the test says.
struct Teller {
    client: async_nats::Client,
    id: String,
    reply: async_nats::Subject,
}

impl Teller {
    /// Takes the one request that `running` hands in.
    async fn of(server: &NatsServer, client: Client) -> (Self, Running) {
        let nats = server.client().await;
        let mut requests = nats.subscribe("functions.execute").await.unwrap();
        round_trip(&nats).await;
        let running = client.set("NATS_URL", &server.url()).spawn();
        let request = within("a request", PATIENCE, requests.next()).await.unwrap();
        let fields: Value = serde_json::from_slice(&request.payload).unwrap();
        let id = fields["id"].as_str().unwrap().to_string();
        (Self { client: nats, id, reply: request.reply.unwrap() }, running)
    }

    async fn event(&self, mut record: Value) {
        record["id"] = json!(self.id);
        record["updated_at"] = json!("2030-01-01T00:00:00Z");
        let subject = format!("functions.events.{}", self.id);
        self.client.publish(subject, record.to_string().into()).await.unwrap();
    }

    async fn prints(&self, stream: &str, seq: u64, offset: u64, text: &'static str) {
        let mut headers = async_nats::HeaderMap::new();
        for (name, value) in [("Job-Attempt", 1), ("Seq", seq), ("Offset", offset)] {
            headers.insert(name, value.to_string());
        }
        let subject = format!("functions.logs.{}.{stream}", self.id);
        self.client.publish_with_headers(subject, headers, text.into()).await.unwrap();
    }

    async fn ends(&self, mut outcome: Value) {
        outcome["id"] = json!(self.id);
        self.client.publish(self.reply.clone(), outcome.to_string().into()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_pull_is_a_bar_on_a_terminal_and_lines_elsewhere() {
    let server = NatsServer::start().await;
    let pull = json!({"layers": 3, "layers_done": 1, "bytes": 4 << 20, "bytes_done": 1 << 20});
    let client = || Client::new(&["run", "some/image"]);
    let (teller, running) = Teller::of(&server, client().on_a_terminal()).await;
    teller.event(json!({"state": "pulling", "pull": pull})).await;
    running.prints("pulling some/image (1/3 layers) [=======>").await;
    running.prints("1.00 MiB/4.00 MiB").await;
    teller.ends(json!({"status": "succeeded", "exit_code": 0})).await;
    assert_eq!(running.end().await.code, 0);

    let (teller, running) = Teller::of(&server, client()).await;
    teller.event(json!({"state": "pulling", "pull": pull})).await;
    running.says("pulling some/image: 1 of 3 layers, 1.00 MiB of 4.00 MiB\n").await;
    teller.event(json!({"state": "running", "worker": "w-1"})).await;
    running.says("running on w-1\n").await;
    teller.ends(json!({"status": "succeeded", "exit_code": 0})).await;
    let ran = running.end().await;
    assert_eq!((ran.code, ran.stderr.contains('\u{1b}')), (0, false), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn each_byte_is_printed_once_whatever_comes_live() {
    let server = NatsServer::start().await;
    let line = ["run", "some/image", "--quiet"];
    let (teller, running) = Teller::of(&server, Client::new(&line)).await;
    teller.prints("stdout", 1, 0, "ab").await;
    teller.prints("stderr", 2, 4, "no beginning").await;
    teller.prints("stdout", 1, 0, "ab").await;
    running.prints("ab").await;
    // From here on something is missing, and the outcome has it.
    teller.prints("stdout", 3, 4, "ef").await;
    running.says("live stdout is incomplete").await;
    teller.prints("stdout", 4, 6, "gh").await;
    let outcome = json!({"status": "failed", "exit_code": 2, "attempt": 1, "stdout": "abcdefgh",
        "stderr": "all of it", "stdout_encoding": "utf8", "stderr_encoding": "utf8"});
    teller.ends(outcome).await;
    let ran = running.end().await;
    assert_eq!((ran.code, ran.text().as_str()), (2, "abcdefgh"), "{ran:?}");
    assert!(ran.stderr.ends_with("all of it") && !ran.stderr.contains("no beginning"), "{ran:?}");

    // What was printed is of an attempt that does not count.
    let (teller, running) = Teller::of(&server, Client::new(&line)).await;
    teller.prints("stdout", 1, 0, "ab").await;
    running.prints("ab").await;
    let outcome = json!({"status": "succeeded", "exit_code": 0, "attempt": 2, "stdout": "cd"});
    teller.ends(outcome).await;
    let ran = running.end().await;
    assert_eq!((ran.code, ran.text().as_str()), (0, "abcd"), "{ran:?}");
    assert!(ran.stderr.contains("not of attempt 2"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn many_jobs_have_a_bar() {
    let world = World::durable(&[]).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let lines: String = (0..6)
        .map(|_| {
            let request = json!({"image_reference": world.image, "parameter": "true"});
            format!("{request}\n")
        })
        .collect();
    std::fs::write(file.path(), lines).unwrap();
    let path = file.path().to_str().unwrap();
    let ran = Client::of(&world, &["submit", "--wait", path]).on_a_terminal().spawn().end().await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let text = ran.text();
    assert!(text.contains("/6"), "{text:?}");
    assert_eq!(text.matches(" succeeded\r\n").count(), 6, "{text:?}");
    assert!(text.contains("6 accepted, 6 succeeded, 0 did not, 0 not accepted"), "{text:?}");
    let quiet = Client::of(&world, &["submit", "--wait", "--quiet", path]);
    let text = quiet.on_a_terminal().spawn().end().await.text();
    assert!(!text.contains('\u{1b}'), "{text:?}");
    world.clean().await;
}
