//! Functions that are tried again because their requests ask for it.

use serde_json::{Value, json};

use crate::support::daemon::Daemon;
use crate::support::engine::Engine;
use crate::support::nats::{NatsOptions, NatsVersion};
use crate::support::process::free_port;
use crate::support::world::World;

/// A world with streams on each kind of server, and one without.
async fn worlds(settings: &[(&str, &str)]) -> Vec<World> {
    let mut worlds = vec![World::start(settings).await];
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        worlds.push(World::durable_with(options, Engine::shared().await, settings).await);
    }
    worlds
}

/// Runs a job to its end, and returns its last event and how often it was begun.
async fn end_of(world: &World, mut request: Value) -> (Value, usize) {
    let id = world.id();
    request["id"] = json!(id);
    let events = world.events(&id).await;
    world.submit(request).await;
    let last = events.wait_for("ended").await;
    let begun = events.states().iter().filter(|state| *state == "running").count();
    assert_eq!(events.states().last().unwrap(), "ended");
    world.results.wait_for(&id).await;
    world.engine.gone(&id).await;
    assert_eq!(world.results.of(&id).len(), 1, "one outcome, however many attempts");
    (last, begun)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_function_that_fails_is_tried_again_if_that_is_asked_for() {
    for world in worlds(&[]).await {
        // It fails until the clock is past a point: attempts share nothing else.
        let soon = jiff::Timestamp::now().as_second() + 3;
        let script =
            format!("echo attempt; now=$(date +%s); [ $now -ge {soon} ] || exit 3; echo done");
        let retry = json!({"max_attempts": 5, "on": ["failed"]});
        let request = json!({"parameter": ["sh", "-c", script], "retry": retry});
        let (last, begun) = end_of(&world, request).await;
        assert_eq!(last["status"], "succeeded", "{last}");
        let attempt = last["attempt"].as_u64().unwrap();
        assert!((2..=5).contains(&attempt) && begun == usize::try_from(attempt).unwrap(), "{last}");
        assert_eq!(last["stdout"], "attempt\ndone\n", "of the attempt that counts");

        // As often as is asked for, and no more.
        let retry = json!({"max_attempts": 3, "on": ["failed", "out_of_memory"]});
        let request = json!({"parameter": ["sh", "-c", "echo no; exit 3"], "retry": retry});
        let (last, begun) = end_of(&world, request).await;
        assert_eq!((&last["status"], &last["exit_code"]), (&json!("failed"), &json!(3)));
        assert_eq!((&last["attempt"], begun), (&json!(3), 3), "{last}");

        let retry = json!({"max_attempts": 2, "on": ["timed_out"]});
        let request = json!({"parameter": "sleep 60", "timeout_ms": 300, "retry": retry});
        let (last, begun) = end_of(&world, request).await;
        assert_eq!((&last["status"], begun), (&json!("timed_out"), 2), "{last}");

        // A moment before it takes the memory: see the note in the other tests on that.
        let eat = ["sh", "-c", "sleep 1; x=x; while :; do x=$x$x$x$x; done"];
        let retry = json!({"max_attempts": 2, "on": ["out_of_memory"]});
        let request = json!({"parameter": eat, "memory_bytes": 16 << 20, "retry": retry});
        let (last, begun) = end_of(&world, request).await;
        assert_eq!((&last["status"], begun), (&json!("out_of_memory"), 2), "{last}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_not_asked_for_is_not_tried_again() {
    for world in worlds(&[]).await {
        for (parameter, retry, status) in [
            ("exit 3", json!(null), "failed"),
            ("exit 3", json!({"max_attempts": 3, "on": ["timed_out"]}), "failed"),
            ("exit 3", json!({"max_attempts": 1, "on": ["failed"]}), "failed"),
            ("true", json!({"max_attempts": 3, "on": ["failed"]}), "succeeded"),
        ] {
            let request = json!({"parameter": ["sh", "-c", parameter], "retry": retry});
            let (last, begun) = end_of(&world, request).await;
            assert_eq!((&last["status"], begun), (&json!(status), 1), "{last}");
        }
        // Refused is refused.
        let retry = json!({"max_attempts": 3, "on": ["failed"]});
        let (last, begun) =
            end_of(&world, json!({"parameter": "no-such-command", "retry": retry})).await;
        assert_eq!((&last["status"], begun), (&json!("rejected"), 1), "{last}");
        // Who waits for an answer at once gets it at once.
        let retry = json!({"max_attempts": 3, "on": ["failed"]});
        let outcome = world.run(json!({"parameter": ["sh", "-c", "exit 3"], "retry": retry})).await;
        assert_eq!((&outcome["status"], &outcome["attempt"]), (&json!("failed"), &json!(1)));
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_infrastructures_failures_are_not_the_requests_to_count() {
    for world in worlds(&[("MAX_DELIVER", "3")]).await {
        let image = format!("127.0.0.1:{}/any:1", free_port());
        let retry = json!({"max_attempts": 2, "on": ["failed"]});
        let (last, begun) = end_of(&world, json!({"image_reference": image, "retry": retry})).await;
        assert_eq!(last["error"]["code"], "image.pull_failed", "{last}");
        assert_eq!((&last["attempt"], begun), (&json!(3), 3), "{last}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_asks_for_too_much_or_for_nothing_is_refused() {
    for world in worlds(&[("MAX_DELIVER", "3")]).await {
        for retry in [
            json!({"max_attempts": 4, "on": ["failed"]}),
            json!({"max_attempts": 0, "on": ["failed"]}),
            json!({"max_attempts": -1, "on": ["failed"]}),
            json!({"max_attempts": 1.5, "on": ["failed"]}),
            json!({"max_attempts": "2", "on": ["failed"]}),
            json!({"max_attempts": 2, "on": []}),
            json!({"max_attempts": 2, "on": ["cancelled"]}),
            json!({"max_attempts": 2, "on": ["error"]}),
            json!({"max_attempts": 2, "on": "failed"}),
            json!({"max_attempts": 2}),
            json!({"on": ["failed"]}),
            json!({"max_attempts": 2, "on": ["failed"], "delay_ms": 10}),
            json!([]),
            json!(3),
        ] {
            let ended = world.execute(json!({"parameter": "true", "retry": retry})).await;
            assert_eq!((ended.status(), ended.code()), ("rejected", "request.invalid_field"));
            let message = ended.outcome["error"]["message"].as_str().unwrap();
            assert!(message.contains("retry"), "{retry}: {message}");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn attempts_are_counted_over_all_instances() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world =
            World::durable_with(options, Engine::shared().await, &[("MAX_CONTAINERS", "1")]).await;
        let mut other = Daemon::spawn(&world.settings);
        other.wait_ready().await;
        let retry = json!({"max_attempts": 4, "on": ["failed"]});
        let ids: Vec<_> = futures::future::join_all((0..3).map(|_| async {
            let request = json!({"parameter": ["sh", "-c", "exit 3"], "retry": retry});
            let (last, begun) = end_of(&world, request).await;
            assert_eq!((&last["attempt"], begun), (&json!(4), 4), "{last}");
            last["id"].as_str().unwrap().to_string()
        }))
        .await;
        world.ledger.settled().await;
        let tally = world.ledger.tally().await;
        assert!(ids.iter().all(|id| tally[id] == 1), "{tally:?}");
        assert!(world.ledger.dead_letters().await.is_empty(), "a function's failure is a result");
        drop(other);
        world.clean().await;
    }
}
