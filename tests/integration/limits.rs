//! Time, memory and processes: what a function may have, and what becomes of one that takes more.

use std::time::Duration;

use serde_json::json;

use crate::support::wait::within;
use crate::support::world::World;

/// A job that may take so long for everything before and after its own deadline on a slow machine.
const SLOW_MACHINE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_past_its_deadline_is_asked_and_then_made_to_stop() {
    let world = World::start(&[("STOP_GRACE", "1s")]).await;
    let polite = "trap 'echo bye; exit 7' TERM; echo hello; while :; do sleep 0.1; done";
    let stubborn = "trap '' TERM INT HUP; echo hello; while :; do sleep 1; done";
    let (polite, stubborn, plain, early) = tokio::join!(
        world.execute(json!({"parameter": ["sh", "-c", polite], "timeout_ms": 5000})),
        within(
            "the stubborn job ends",
            SLOW_MACHINE,
            world.execute(json!({"parameter": ["sh", "-c", stubborn], "timeout_ms": 5000}))
        ),
        world.execute(json!({"parameter": "sleep 1000", "timeout_ms": 3000})),
        world.execute(json!({"parameter": "sh -c 'echo in time'", "timeout_ms": 60_000})),
    );
    for ended in [&polite, &stubborn, &plain] {
        assert_eq!(ended.status(), "timed_out", "{}", ended.outcome);
    }
    assert_eq!(polite.text(), "hello\nbye\n", "what it printed is kept: {}", polite.outcome);
    assert_eq!(stubborn.text(), "hello\n", "{}", stubborn.outcome);
    assert_eq!(early.status(), "succeeded", "{}", early.outcome);
    let took = stubborn.outcome["timings_ms"]["run"].as_f64().unwrap();
    assert!(took >= 4000.0, "it had its time: {}", stubborn.outcome);
    world.clean().await;
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn endless_output_does_not_put_the_deadline_off() {
    let world = World::start(&[("STOP_GRACE", "500ms")]).await;
    let (chatter, both) = tokio::join!(
        world.execute(json!({"parameter": "yes", "timeout_ms": 3000})),
        world.execute(json!({"parameter": ["sh", "-c", "trap '' TERM; yes & yes >&2"],
            "timeout_ms": 3000})),
    );
    for ended in [chatter, both] {
        assert_eq!(ended.status(), "timed_out", "{}", ended.outcome["error"]);
        assert_eq!(ended.outcome["stdout_truncated"], true);
        assert!(ended.stdout().starts_with(b"y\ny\n"), "what came before is kept");
    }
    world.clean().await;
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_without_a_deadline_has_the_operators() {
    let world =
        World::start(&[("DEFAULT_TIMEOUT", "2s"), ("MAX_TIMEOUT", "20s"), ("STOP_GRACE", "100ms")])
            .await;
    let (silent, own) = tokio::join!(
        world.execute(json!({"parameter": "sleep 1000"})),
        world.execute(json!({"parameter": "sleep 4", "timeout_ms": 20_000})),
    );
    assert_eq!(silent.status(), "timed_out", "{}", silent.outcome);
    assert_eq!(
        own.status(),
        "succeeded",
        "a longer one of its own within the maximum: {}",
        own.outcome
    );
    let beyond = world.execute(json!({"parameter": "true", "timeout_ms": 20_001})).await;
    assert_eq!(beyond.code(), "request.invalid_field", "{}", beyond.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_process_a_function_leaves_behind_ends_with_it() {
    let world = World::start(&[]).await;
    let script = "(trap '' TERM; while :; do sleep 1; done) & echo left it";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
    assert_eq!(
        (ended.status(), ended.text().as_str()),
        ("succeeded", "left it\n"),
        "{}",
        ended.outcome
    );
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn running_out_of_memory_is_told_from_being_killed() {
    let world = World::start(&[]).await;
    let memory = 32 * 1024 * 1024;
    // The engine begins to listen for the kernel's notice a moment after the start: a function
    // that takes all its memory before that looks like one that was killed by anybody.
    let greed = "dd if=/dev/zero of=/dev/null bs=128M count=1";
    let eater = format!("sleep 1; exec {greed}");
    let eater = json!({"parameter": ["sh", "-c", eater], "memory_bytes": memory});
    let parent = format!("sleep 1; {greed}; echo went on; exit 0");
    let parent = json!({"parameter": ["sh", "-c", parent], "memory_bytes": memory});
    let killed = json!({"parameter": "sh -c 'kill -9 $$'"});
    let pretender = json!({"parameter": "sh -c 'exit 137'"});
    let enough =
        json!({"parameter": "dd if=/dev/zero of=/dev/null bs=8M count=1", "memory_bytes": memory});
    let (eater, parent, killed, pretender, enough) = tokio::join!(
        world.execute(eater),
        world.execute(parent),
        world.execute(killed),
        world.execute(pretender),
        world.execute(enough)
    );
    assert_eq!(eater.status(), "out_of_memory", "{}", eater.outcome);
    assert_eq!(eater.outcome["oom_killed"], true);
    assert_eq!(
        (eater.exit_code(), eater.outcome["signal"].as_i64()),
        (Some(137), Some(9)),
        "{}",
        eater.outcome
    );

    assert_eq!(parent.status(), "succeeded", "the function itself ended well: {}", parent.outcome);
    assert_eq!(
        parent.outcome["oom_killed"], true,
        "and it is said that a part of it did not: {}",
        parent.outcome
    );
    assert_eq!(parent.text(), "went on\n");

    for ended in [&killed, &pretender] {
        assert_eq!((ended.status(), ended.exit_code()), ("failed", Some(137)), "{}", ended.outcome);
        assert_ne!(ended.outcome["oom_killed"], true, "{}", ended.outcome);
    }
    assert_eq!(killed.outcome["signal"], 9, "{}", killed.outcome);
    assert_eq!(enough.status(), "succeeded", "{}", enough.outcome);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_signal_is_reported_as_one() {
    let world = World::start(&[]).await;
    for (name, number) in [("TERM", 15), ("SEGV", 11), ("USR1", 10)] {
        let ended = world.execute(json!({"parameter": format!("sh -c 'kill -{name} $$'")})).await;
        assert_eq!(ended.status(), "failed", "{}", ended.outcome);
        assert_eq!(ended.exit_code(), Some(128 + number), "{}", ended.outcome);
        assert_eq!(ended.outcome["signal"], json!(number), "{}", ended.outcome);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_fork_bomb_hurts_nobody_but_itself() {
    let world =
        World::start(&[("MAX_CONTAINERS", "2"), ("PIDS_LIMIT", "48"), ("STOP_GRACE", "500ms")])
            .await;
    // awk goes on when it cannot start another process; a shell gives up.
    let bomb = json!({"parameter": ["awk", "BEGIN { while (1) system(\"sleep 1000 &\") }"],
        "timeout_ms": 5000});
    let mut burst = Box::pin(world.execute(bomb));
    let mut others = 0;
    let ended = loop {
        tokio::select! {
            ended = &mut burst => break ended,
            other = world.execute(json!({"parameter": "echo unharmed", "timeout_ms": 60_000})) => {
                assert_eq!(other.text(), "unharmed\n", "{}", other.outcome);
                others += 1;
            }
        }
    };
    assert!(others > 0, "others ran meanwhile");
    assert_eq!(ended.status(), "timed_out", "{}", ended.outcome);
    let script = "bomb() { bomb | bomb & }; bomb; while :; do bomb; done";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script], "timeout_ms": 5000})).await;
    assert!(["timed_out", "failed"].contains(&ended.status()), "{}", ended.outcome);
    world.clean().await;
    world.works(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_can_have_less_than_the_operator_gives_and_sees_it() {
    let world =
        World::start(&[("MEMORY_LIMIT", "256MiB"), ("PIDS_LIMIT", "100"), ("CPU_LIMIT", "1")])
            .await;
    let show = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/pids/pids.max \
                /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || \
                { cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max; cut -d' ' -f1 /sys/fs/cgroup/cpu.max; }";
    let ended = world.execute(json!({"parameter": ["sh", "-c", show]})).await;
    assert_eq!(ended.text(), format!("{}\n100\n100000\n", 256 << 20), "{}", ended.outcome);
    let less =
        json!({"parameter": ["sh", "-c", show], "memory_bytes": 64 << 20, "pids": 10, "cpus": 0.5});
    let ended = world.execute(less).await;
    assert_eq!(ended.text(), format!("{}\n10\n50000\n", 64 << 20), "{}", ended.outcome);
}
