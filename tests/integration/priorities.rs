//! Which requests come first, and which come too late.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::HeaderMap;
use serde_json::{Value, json};

use crate::support::engine::Engine;
use crate::support::jetstream::Events;
use crate::support::nats::{NatsOptions, NatsVersion, round_trip};
use crate::support::results::header;
use crate::support::world::{Held, World, held};

/// A world with streams on each kind of server, and one without.
async fn worlds(settings: &[(&str, &str)]) -> Vec<World> {
    let mut worlds = vec![World::start(settings).await];
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        worlds.push(World::durable_with(options, Engine::shared().await, settings).await);
    }
    worlds
}

fn is_durable(world: &World) -> bool {
    world.settings.get("DELIVERY") == Some("jetstream")
}

/// Publishes a request on a subject of its own and returns once the server, or the stream, has it.
async fn submit_to(world: &World, subject: &str, request: Value, headers: HeaderMap) -> String {
    let (id, request) = world.complete(request);
    if is_durable(world) {
        world.ledger.publish_acked(subject, &request, headers).await;
    } else {
        let payload = request.to_string().into();
        world.client.publish_with_headers(subject.to_string(), headers, payload).await.unwrap();
        round_trip(&world.client).await;
    }
    id
}

fn subject(level: &str) -> String {
    match level {
        "normal" => "functions.execute".to_string(),
        other => format!("functions.execute.{other}"),
    }
}

/// Queues so many jobs of each level behind one that runs, the lowest first, and returns the
/// levels in the order in which the jobs were started.
async fn order_of(world: &World, counts: &[(&str, usize)]) -> Vec<String> {
    let held = world.hold().await;
    let mut levels = HashMap::new();
    for (level, count) in counts {
        for _ in 0..*count {
            let request = json!({"parameter": "true"});
            let id = submit_to(world, &subject(level), request, HeaderMap::new()).await;
            levels.insert(id, level.to_string());
        }
    }
    world.release(&held).await;
    let all = Duration::from_secs(300);
    world.results.wait_for_count(levels.len() + 1, all).await;
    let results = world.results.all();
    let ids = results.iter().filter_map(|result| header(result, "Job-Id"));
    ids.filter_map(|id| levels.get(&id).cloned()).collect()
}

fn count(order: &[String], level: &str) -> usize {
    order.iter().filter(|found| *found == level).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_highest_come_first_and_the_lowest_come_too() {
    for world in worlds(&[("MAX_CONTAINERS", "1")]).await {
        let order = order_of(&world, &[("low", 8), ("normal", 12), ("high", 40)]).await;
        assert_eq!(order.len(), 60);
        let first = &order[..32];
        assert!(count(first, "high") >= 20, "{order:?}");
        // Constant load from above does not keep the others waiting for ever.
        assert!((1..=4).contains(&count(first, "low")), "{order:?}");
        assert!((3..=8).contains(&count(first, "normal")), "{order:?}");
        assert!(count(&order[..20], "low") >= 1, "{order:?}");
        world.clean().await;
    }
}

/// Where and how often requests of a level were delivered.
async fn delivered(world: &World, level: &str) -> u64 {
    let name = match level {
        "normal" => "worker-spawners".to_string(),
        other => format!("worker-spawners_{other}"),
    };
    world.ledger.consumer_info(&name).await.delivered.consumer_sequence
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_can_go_behind_where_it_was_sent_and_not_before() {
    for world in worlds(&[("MAX_CONTAINERS", "1")]).await {
        // Each is sent first, and is to come after the two that are sent on its own subject. Together
        // that is fifteen picks, of which the fourth, the eighth and the twelfth look at the normal
        // level first, and do not get in the way here; the sixteenth would, being the lowest level's.
        for (sent, asked) in [("normal", "low"), ("high", "low"), ("high", "normal")] {
            let before = if is_durable(&world) { delivered(&world, asked).await } else { 0 };
            // On the same level: what came to another one, and was not looked at, stays there.
            let id = submit_to(&world, &subject(sent), held(json!({})), HeaderMap::new()).await;
            let container = world.engine.running(&id).await;
            let holding = Held { id, container };
            let request = json!({"parameter": "echo moved", "priority": asked});
            let moved = submit_to(&world, &subject(sent), request, HeaderMap::new()).await;
            let events = world.events(&moved).await;
            let mut others = Vec::new();
            for _ in 0..2 {
                let request = json!({"parameter": "true"});
                others.push(submit_to(&world, &subject(sent), request, HeaderMap::new()).await);
            }
            world.release(&holding).await;
            let last = events.wait_for("ended").await;
            assert_eq!((&last["stdout"], &last["attempt"]), (&json!("moved\n"), &json!(1)));
            // From when it was first sent on.
            let queue = last["timings_ms"]["queue"].as_f64().unwrap();
            assert!(queue > 100.0, "{last}");
            let ids = world.results.all();
            let ids: Vec<_> = ids.iter().filter_map(|result| header(result, "Job-Id")).collect();
            let place = |id: &String| ids.iter().position(|found| found == id).unwrap();
            for other in &others {
                world.results.wait_for(other).await;
            }
            let later =
                others.iter().filter(|other| ids.contains(other) && place(other) < place(&moved));
            assert_eq!(later.count(), 2, "{sent} to {asked}: {ids:?}");
            if is_durable(&world) {
                world.ledger.settled().await;
                assert!(delivered(&world, asked).await > before);
                assert_eq!(world.ledger.tally().await[&moved], 1);
            }
            world.clean().await;
        }
        // What asks for more than its queue has runs when its turn comes there.
        for (sent, asked) in [("low", "high"), ("normal", "high"), ("low", "low")] {
            let request = json!({"parameter": "echo here", "priority": asked});
            let id = submit_to(&world, &subject(sent), request, HeaderMap::new()).await;
            assert_eq!(world.results.wait_for(&id).await.payload, "here\n");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_priority_that_is_none_is_refused() {
    for world in worlds(&[]).await {
        for bad in [json!("urgent"), json!("HIGH"), json!(""), json!(1), json!(["high"])] {
            let ended = world.execute(json!({"parameter": "true", "priority": bad})).await;
            assert_eq!((ended.status(), ended.code()), ("rejected", "request.invalid_field"));
            let message = ended.outcome["error"]["message"].as_str().unwrap();
            assert!(message.contains("priority"), "{message}");
        }
        let ended = world.execute(json!({"parameter": "true", "priority": null})).await;
        assert_eq!(ended.status(), "succeeded");
        let outcome = world.run(json!({"parameter": "true", "priority": "low"})).await;
        assert_eq!(outcome["status"], "succeeded", "{outcome}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_that_cannot_be_moved_runs_where_it_is() {
    for version in NatsVersion::all() {
        // There is room for one request in the queue, and none for its copy.
        let options = NatsOptions::durable(version);
        let settings = [("QUEUE_MAX_MESSAGES", "1")];
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        let ended = world.execute(json!({"parameter": "echo here", "priority": "low"})).await;
        assert_eq!(ended.text(), "here\n");
        assert_eq!(delivered(&world, "low").await, 0);
        world.clean().await;

        // Or it is as large as a message can be.
        let options = NatsOptions { max_payload: Some(65536), ..NatsOptions::durable(version) };
        let world = World::durable_with(options, Engine::shared().await, &[]).await;
        for spare in [0, 20, 100, 200, 400] {
            let id = world.id();
            let (_, mut request) = world
                .complete(json!({"id": id, "parameter": "true", "priority": "low", "stdin": ""}));
            let padding = 65536 - spare - request.to_string().len();
            request["stdin"] = json!("x".repeat(padding));
            let mut headers = HeaderMap::new();
            if spare > 100 {
                headers.insert("X-Mine", "y");
            }
            world.ledger.publish_acked("functions.execute", &request, headers).await;
            assert_eq!(world.ended(&id).await.status(), "succeeded");
        }
        let log = world.daemon.log().text();
        assert!(!log.contains("lost the connection"), "{log}");
        world.clean().await;
    }
}

/// The end of a job that was not started in time.
async fn expired(events: &Events) -> Value {
    let last = events.wait_for("ended").await;
    assert_eq!(
        (&last["status"], &last["error"]["code"]),
        (&json!("cancelled"), &json!("job.expired")),
        "{last}"
    );
    assert!(last.get("started_at").is_none() && last.get("exit_code").is_none(), "{last}");
    assert_eq!(events.states(), ["ended"]);
    last
}

fn ttl(value: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("Job-TTL", value);
    headers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_comes_too_late_does_not_start() {
    for world in worlds(&[("MAX_CONTAINERS", "1")]).await {
        let until = |seconds: i64| {
            let time = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
            json!(time.to_string())
        };
        // At once.
        for (expires_at, headers) in [
            (until(-3600), HeaderMap::new()),
            (json!("1999-12-31T23:59:59+01:00"), HeaderMap::new()),
            (until(-1), ttl("1h")),
            (Value::Null, ttl("0s")),
            (until(3600), ttl("0s")),
        ] {
            let id = world.id();
            let events = world.events(&id).await;
            let request = json!({"id": id, "parameter": "echo late", "expires_at": expires_at});
            submit_to(&world, "functions.execute", request, headers).await;
            expired(&events).await;
            let result = world.results.wait_for(&id).await;
            assert_eq!(header(&result, "Job-Error").as_deref(), Some("job.expired"));
        }
        // In time.
        for (expires_at, headers) in [
            (until(3600), ttl("1h")),
            (Value::Null, ttl(" 1h 30m ")),
            (until(60), HeaderMap::new()),
        ] {
            let request = json!({"parameter": "echo in time", "expires_at": expires_at});
            let id = submit_to(&world, "functions.execute", request, headers).await;
            assert_eq!(world.results.wait_for(&id).await.payload, "in time\n");
        }
        // Not any more when its turn comes.
        let held = world.hold().await;
        let mut late = Vec::new();
        for (expires_at, headers, priority) in [
            (until(2), HeaderMap::new(), "normal"),
            (Value::Null, ttl("2s"), "normal"),
            (Value::Null, ttl("2s"), "low"),
        ] {
            let id = world.id();
            late.push(world.events(&id).await);
            let request = json!({"id": id, "parameter": "true", "expires_at": expires_at, "priority": priority});
            submit_to(&world, "functions.execute", request, headers).await;
        }
        tokio::time::sleep(Duration::from_millis(2500)).await;
        world.release(&held).await;
        for events in &late {
            expired(events).await;
        }
        if is_durable(&world) {
            world.ledger.settled().await;
            assert!(world.ledger.dead_letters().await.is_empty(), "nobody failed");
        }
        // The same where an answer is waited for.
        let outcome = world.run(json!({"parameter": "true", "expires_at": until(-5)})).await;
        assert_eq!(outcome["error"]["code"], "job.expired", "{outcome}");
        world.works(2).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_time_that_is_none_is_refused_and_not_passed_over() {
    for world in worlds(&[]).await {
        let bad = [json!("tomorrow"), json!("2030-01-01"), json!(1_900_000_000), json!("")];
        for expires_at in bad {
            let ended = world.execute(json!({"parameter": "true", "expires_at": expires_at})).await;
            assert_eq!(ended.code(), "request.invalid_field", "{}", ended.outcome);
            let message = ended.outcome["error"]["message"].as_str().unwrap();
            assert!(message.contains("expires_at"), "{message}");
        }
        // One that nobody reads would let the job run late.
        for value in ["soon", "30", "-5s", "1:00", ""] {
            let id = world.id();
            let events = world.events(&id).await;
            let request = json!({"id": id, "parameter": "true"});
            submit_to(&world, "functions.execute", request, ttl(value)).await;
            let last = events.wait_for("ended").await;
            assert_eq!(last["error"]["code"], "request.invalid_field", "{value:?}: {last}");
            let message = last["error"]["message"].as_str().unwrap();
            assert!(message.contains("Job-TTL"), "{message}");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_queue_has_an_age_nobody_gets_beyond() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let settings = [("QUEUE_MAX_AGE", "10s"), ("MAX_CONTAINERS", "1")];
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        let held = world.hold().await;
        let (id, late) = (world.id(), world.id());
        let events = world.events(&late).await;
        let request =
            json!({"id": late, "parameter": "true", "expires_at": "2099-01-01T00:00:00Z"});
        submit_to(&world, "functions.execute.low", request, ttl("1h")).await;
        tokio::time::sleep(Duration::from_secs(11)).await;
        submit_to(
            &world,
            "functions.execute.low",
            json!({"id": id, "parameter": "true"}),
            HeaderMap::new(),
        )
        .await;
        world.release(&held).await;
        expired(&events).await;
        assert_eq!(world.ended(&late).await.status(), "cancelled");
        assert_eq!(world.ended(&id).await.status(), "succeeded", "it had not waited as long");
        // The one that ran had been started in time.
        assert_eq!(world.ended(&held.id).await.status(), "succeeded");
        world.ledger.settled().await;
        assert!(world.ledger.dead_letters().await.is_empty());
        world.clean().await;
    }
}
