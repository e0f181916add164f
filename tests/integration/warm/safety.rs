//! What a function tries on the program that waited in its container.

use serde_json::json;

use super::{cold_world, run_warm, shell, warm_world};
use crate::support::wait::eventually;
use crate::support::world::{Ended, World};

/// The users a function is.
const USERS: [Option<&str>; 2] = [None, Some("1000")];

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_first_process_cannot_be_looked_into() {
    let world = warm_world(4, &[]).await;
    // Each prints "in" when it succeeds.
    let attempts = [
        ("list its descriptors", "ls /proc/1/fd/0 /proc/1/fd/1 && echo in"),
        ("open its descriptors", "for f in /proc/1/fd/*; do (: >>\"$f\") && echo in; done"),
        (
            "write to its standard streams",
            "for n in 0 1 2 3 4 5 6; do (echo x >/proc/1/fd/$n) && echo in; done",
        ),
        ("read its standard input", "timeout 1 head -c 1 /proc/1/fd/0 && echo in"),
        ("read its memory", "dd if=/proc/1/mem of=/dev/null bs=1 count=1 skip=4194304 && echo in"),
        ("see its memory's places", "grep . /proc/1/maps && echo in"),
        ("write its memory", "(: >>/proc/1/mem) && echo in"),
        ("its environment", "grep . /proc/1/environ && echo in"),
        ("its root", "ls /proc/1/root/ && echo in"),
        ("its directory", "ls /proc/1/cwd/ && echo in"),
        ("its stack", "grep . /proc/1/stack && echo in"),
        ("where it waits", "grep . /proc/1/syscall && echo in"),
        ("its descriptors' places", "grep . /proc/1/fdinfo/0 && echo in"),
        ("its auxiliary vector", "grep . /proc/1/auxv && echo in"),
        ("its threads", "ls /proc/1/task/1/fd/0 && echo in"),
        ("what is mapped", "ls /proc/1/map_files/* && echo in"),
        (
            "replace it",
            "(echo x >/.worker-spawner/agent) && echo in; rm /.worker-spawner/agent && echo in",
        ),
        (
            "its volume",
            "(echo x >/.worker-spawner/x) && echo in; mv /.worker-spawner /y && echo in",
        ),
        ("run it again", "timeout 5 /.worker-spawner/agent </dev/null && echo in"),
    ];
    for user in USERS {
        let script: String = attempts
            .iter()
            .enumerate()
            .map(|(n, (_, attempt))| {
                format!("{{ {attempt}; }} 2>/dev/null | sed -n 's/^in$/in {n}/p'\n")
            })
            .collect();
        let mut request = shell(&script);
        if let Some(user) = user {
            request["user"] = json!(user);
        }
        let ended = run_warm(&world, &request).await;
        assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
        let text = ended.text();
        let got_in: Vec<&str> = text
            .lines()
            .filter_map(|line| Some(attempts[line.strip_prefix("in ")?.parse::<usize>().ok()?].0))
            .collect();
        assert!(got_in.is_empty(), "as {user:?}: {got_in:?}");
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_function_that_signals_everybody_fares_as_beside_any_first_process() {
    let (cold, warm) = tokio::join!(cold_world(&[]), warm_world(4, &[]));
    for user in USERS {
        for script in [
            "kill -9 1; kill -STOP 1; kill -SEGV 1; kill -ABRT 1; sleep 0.2; echo went on",
            "kill -STOP 1; sleep 0.2; kill -CONT 1; echo went on; exit 4",
            "kill -TERM 1; sleep 2; echo not reached",
            "trap 'echo told' USR1 HUP; kill -USR1 1; sleep 0.5; kill -HUP 1; sleep 0.5; exit 3",
            "(sleep 1000 &); kill -9 -1; echo went on",
            "echo to the end; kill -9 -$$",
            "kill -9 $(ls /proc | grep '^[0-9]'); echo not reached",
            "for n in $(seq 1 64); do case $n in 9|19) ;; *) trap '' $n 2>/dev/null; kill -$n 1;; esac; done 2>/dev/null; sleep 0.5; echo went on",
        ] {
            let mut request = shell(script);
            if let Some(user) = user {
                request["user"] = json!(user);
            }
            let (a, b) = tokio::join!(cold.execute(request.clone()), run_warm(&warm, &request));
            let said =
                |ended: &Ended| (ended.status().to_string(), ended.exit_code(), ended.text());
            assert_eq!(said(&a), said(&b), "{script} as {user:?}: {} {}", a.outcome, b.outcome);
            assert_eq!(b.outcome["attempt"], 1, "{script}: {}", b.outcome);
            assert_ne!(b.outcome["oom_killed"], true, "{script}: {}", b.outcome);
        }
    }
    warm.clean().await;
}

/// Frames as the first process sends them to the daemon: that the function has begun, that it has
/// ended well, and some output that nobody printed.
fn frames() -> Vec<u8> {
    let mut frames = vec![17, 0, 0, 0, 0];
    frames.extend([21, 0, 0, 0, 29]);
    frames.extend([0; 29]);
    frames.extend([19, 0, 0, 0, 6]);
    frames.extend(b"forged");
    frames
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn forged_words_reach_nobody_and_its_own_output_is_output() {
    let world = warm_world(4, &[]).await;
    let wanted = frames();
    let words: String = wanted.iter().map(|byte| format!("\\{byte:03o}")).collect();
    for user in USERS {
        // Its own two streams first; then whatever can be opened of anybody's, itself again included.
        let script = format!(
            "printf '{words}'; printf '{words}' >&2; \
             for f in /proc/[0-9]*/fd/* /proc/1/fd/[0-9] /proc/1/task/1/fd/[0-9]; do \
             (printf '{words}' >>\"$f\") 2>/dev/null; done; exit 6"
        );
        let mut request = shell(&script);
        if let Some(user) = user {
            request["user"] = json!(user);
        }
        let ended = run_warm(&world, &request).await;
        assert_eq!((ended.status(), ended.exit_code()), ("failed", Some(6)), "{}", ended.outcome);
        for said in [ended.stdout(), ended.stderr()] {
            assert!(!said.is_empty(), "as {user:?}: {}", ended.outcome);
            let whole = said.chunks(wanted.len()).all(|words| words == wanted);
            assert!(whole, "as {user:?}: {}", ended.outcome);
        }
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_function_that_leaves_everything_behind_leaves_nothing() {
    let world = warm_world(4, &[("OUTPUT_LIMIT", "100KiB")]).await;
    let cases = [
        // A daemon of its own: its output open, in a session of its own, deaf.
        (
            "(trap '' TERM HUP; setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 1; done' &); echo left",
            "left\n",
            0,
        ),
        ("exec 0<&- 1>&- 2>&-; exit 8", "", 8),
        ("(exec 1>&- 2>&-; setsid sleep 1000 &) ; exec 1>&- 2>&-; exit 9", "", 9),
        ("for i in 1 2 3 4 5 6 7 8; do (setsid yes &) ; done >/dev/null; echo left", "left\n", 0),
    ];
    for (script, printed, code) in cases {
        let ended = run_warm(&world, &shell(script)).await;
        assert_eq!((ended.text().as_str(), ended.exit_code()), (printed, Some(code)), "{script}");
        let took = ended.outcome["timings_ms"]["run"].as_f64().unwrap();
        assert!(took < 20_000.0, "nobody waits for what it left: {}", ended.outcome);
        gone(&world, &ended.outcome["id"]).await;
    }
    // A flood, from the function and from what it leaves.
    let flood = "yes >&2 & yes & yes | head -c 30000000; exit 5";
    let ended = run_warm(&world, &shell(flood)).await;
    assert_eq!(ended.exit_code(), Some(5), "{:.300}", ended.outcome.to_string());
    assert_eq!(ended.outcome["stdout_truncated"], true);
    assert!(ended.stdout().len() <= 100 << 10 && ended.stderr().len() <= 100 << 10);
    assert!(world.daemon.peak_memory() < 128 << 20, "{}", world.daemon.peak_memory());
    gone(&world, &ended.outcome["id"]).await;
    world.clean().await;
}

async fn gone(world: &World, id: &serde_json::Value) {
    world.engine.gone(id.as_str().unwrap()).await;
    eventually("no more wait than may", || async { world.idle().await.len() <= 4 }).await;
}
