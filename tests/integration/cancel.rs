//! Jobs that are cancelled: while they run, before they do, and when it is too late.

use std::time::{Duration, Instant};

use async_nats::Client;
use bytes::Bytes;
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, message_of};
use crate::support::engine::Engine;
use crate::support::jetstream::Events;
use crate::support::nats::{NatsOptions, NatsVersion, round_trip};
use crate::support::process::{Signal, free_port};
use crate::support::proxy::{Flow, Proxy};
use crate::support::registry::{Access, Registry};
use crate::support::results::{Results, header};
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::world::World;

/// What is answered to a request to cancel.
async fn cancel(client: &Client, body: impl Into<Bytes>) -> Value {
    let asked = client.request("functions.cancel", body.into());
    let answer = within("an answer to a cancellation", PATIENCE, asked).await.unwrap();
    serde_json::from_slice(&answer.payload).unwrap()
}

/// What is answered of the job `id`.
async fn result_of(world: &World, id: &str) -> String {
    let answer = cancel(&world.client, id.to_string()).await;
    assert_eq!(answer["id"], id, "{answer}");
    answer["result"].as_str().unwrap_or_default().to_string()
}

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

/// The outcome of a cancelled job, of which there is one.
async fn cancelled(world: &World, id: &str, events: &Events) -> Value {
    let last = cancelled_but_not_settled(world, id, events).await;
    if is_durable(world) {
        world.ledger.settled().await;
        assert!(world.ledger.dead_letters().await.is_empty(), "nobody failed");
    }
    last
}

/// The same while other jobs are under way.
async fn cancelled_but_not_settled(world: &World, id: &str, events: &Events) -> Value {
    let last = events.wait_for("ended").await;
    assert_eq!(
        (&last["status"], &last["error"]["code"]),
        (&json!("cancelled"), &json!("job.cancelled")),
        "{last}"
    );
    world.engine.gone(id).await;
    if is_durable(world) {
        assert_eq!(world.ended(id).await.status(), "cancelled");
        assert_eq!(world.ledger.tally().await[id], 1);
        assert_eq!(world.ledger.record(id).await.unwrap(), last);
    } else {
        world.results.wait_for(id).await;
    }
    round_trip(&world.client).await;
    assert_eq!(world.results.of(id).len(), 1);
    assert_eq!(events.states().iter().filter(|state| *state == "ended").count(), 1);
    last
}

/// Starts a job that says what signals it gets, and waits until it listens.
async fn listener(world: &World, trap: &str) -> (String, Events) {
    let id = world.id();
    let events = world.events(&id).await;
    let script =
        format!("trap {trap} TERM; echo begun; touch /tmp/ready; while :; do sleep 0.05; done");
    world.submit(json!({"id": id, "parameter": ["sh", "-c", script]})).await;
    let container = world.engine.running(&id).await;
    eventually("the function listens", || async {
        world.engine.exec(&container, &["ls", "/tmp"]).await.contains("ready")
    })
    .await;
    (id, events)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_running_function_is_asked_to_end_and_then_made_to() {
    for world in worlds(&[("STOP_GRACE", "2s")]).await {
        // One that ends when it is asked to.
        let (id, events) = listener(&world, "'echo asked; exit 7'").await;
        assert_eq!(result_of(&world, &id).await, "stopping");
        let last = cancelled(&world, &id, &events).await;
        assert_eq!((&last["stdout"], &last["exit_code"]), (&json!("begun\nasked\n"), &json!(7)));
        assert!(last["started_at"].is_string(), "{last}");
        // One that succeeds when it is asked to end was cancelled as well.
        let (id, events) = listener(&world, "'echo asked; exit 0'").await;
        assert_eq!(result_of(&world, &id).await, "stopping");
        let last = cancelled(&world, &id, &events).await;
        assert_eq!(last["exit_code"], 0, "{last}");
        // One that does not listen, and who asks again.
        let (id, events) = listener(&world, "''").await;
        let begun = Instant::now();
        assert_eq!(result_of(&world, &id).await, "stopping");
        assert_eq!(result_of(&world, &id).await, "stopping");
        let last = cancelled(&world, &id, &events).await;
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(2), "{took:?}");
        assert!(took < Duration::from_secs(20), "{took:?}");
        assert_eq!((&last["stdout"], &last["signal"]), (&json!("begun\n"), &json!(9)), "{last}");
        // What has ended has ended.
        let answer = cancel(&world.client, json!({"id": id}).to_string()).await;
        if is_durable(&world) {
            assert_eq!(answer, json!({"id": id, "result": "already_ended", "status": "cancelled"}));
        }
        world.works(5).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_pull_is_not_waited_for() {
    let registry = Registry::start(Access::Anyone).await;
    registry.put("slow", "1", "too late");
    for world in worlds(&[]).await {
        let proxy = Proxy::to(registry.port, Flow::Shut).await;
        let image = format!("127.0.0.1:{}/slow:1", proxy.port);
        let _guard = world.engine.remove_later(&image);
        let id = world.id();
        let events = world.events(&id).await;
        world.submit(json!({"id": id, "image_reference": image})).await;
        events.wait_for("pulling").await;
        // Whichever is told first: that it is stopped, or that it did not come to its start.
        let result = result_of(&world, &id).await;
        assert!(["stopping", "will_not_start"].contains(&result.as_str()), "{result}");
        let last = cancelled(&world, &id, &events).await;
        assert!(last.get("started_at").is_none() && last.get("exit_code").is_none(), "{last}");
        proxy.set(Flow::Open);
        world.works(5).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_waits_never_starts() {
    for world in worlds(&[("MAX_CONTAINERS", "1")]).await {
        let held = world.hold().await;
        let mut waiting = Vec::new();
        for _ in 0..3 {
            let id = world.id();
            let events = world.events(&id).await;
            world.submit(json!({"id": id, "parameter": "echo never"})).await;
            waiting.push((id, events));
        }
        for (id, _) in &waiting[..2] {
            assert_eq!(result_of(&world, id).await, "will_not_start");
            assert_eq!(result_of(&world, id).await, "will_not_start", "once more");
        }
        world.release(&held).await;
        for (id, events) in &waiting[..2] {
            let last = cancelled(&world, id, events).await;
            assert!(last.get("started_at").is_none(), "{last}");
            assert_eq!(events.states(), ["ended"]);
        }
        let (_, events) = &waiting[2];
        assert_eq!(events.wait_for("ended").await["stdout"], "never\n", "the third was not meant");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_can_be_cancelled_before_it_is_sent() {
    for world in worlds(&[]).await {
        let id = world.id();
        let events = world.events(&id).await;
        let answer = cancel(&world.client, json!({"id": id}).to_string()).await;
        assert_eq!(answer, json!({"id": id, "result": "will_not_start"}));
        world.submit(json!({"id": id, "parameter": "echo never"})).await;
        let last = cancelled(&world, &id, &events).await;
        assert!(last.get("started_at").is_none(), "{last}");
        // A request that is wrong is refused all the same, and another job runs.
        let id = world.id();
        let events = world.events(&id).await;
        assert_eq!(result_of(&world, &id).await, "will_not_start");
        world.submit(json!({"id": id, "parameter": 7})).await;
        assert_eq!(events.wait_for("ended").await["status"], "rejected");
        world.works(2).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_waits_for_another_attempt_gets_none() {
    for world in worlds(&[("MAX_DELIVER", "8")]).await {
        let id = world.id();
        let events = world.events(&id).await;
        let image = format!("127.0.0.1:{}/any:1", free_port());
        world.submit(json!({"id": id, "image_reference": image})).await;
        // By then it waits for two seconds at least.
        eventually("it waits for its fifth attempt", || async {
            events.all().iter().any(|event| event["state"] == "queued" && event["attempt"] == 4)
        })
        .await;
        assert_eq!(result_of(&world, &id).await, "will_not_start");
        let last = events.wait_for("ended").await;
        assert_eq!(last["error"]["code"], "job.cancelled", "{last}");
        let begun = events.all().iter().filter(|event| event["state"] == "running").count();
        assert_eq!(begun, 4, "{:?}", events.all());
        cancelled(&world, &id, &events).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_names_no_job_is_refused_and_harms_nobody() {
    for world in worlds(&[]).await {
        let long = format!("{{\"id\": \"{}\"}}", "x".repeat(500_000));
        for (body, code) in [
            ("", "request.invalid_field"),
            ("a b", "request.invalid_field"),
            ("*", "request.invalid_field"),
            ("a.b", "request.invalid_field"),
            (">", "request.invalid_field"),
            ("{}", "request.invalid_field"),
            ("{\"id\": 7}", "request.invalid_field"),
            ("{\"id\": null}", "request.invalid_field"),
            ("{\"id\": \"a\", \"ids\": \"b\"}", "request.invalid_field"),
            ("{\"id\": \"a\", \"id\": \"b\"}", "request.invalid_field"),
            ("[\"a\"]", "request.invalid_field"),
            ("{\"id\"", "request.invalid_json"),
            (&long, "request.invalid_field"),
        ] {
            let answer = cancel(&world.client, body.to_string()).await;
            assert_eq!(answer["error"]["code"], code, "{body:.60}: {answer}");
            assert!(answer["error"]["message"].is_string(), "{answer}");
        }
        let answer = cancel(&world.client, Bytes::from_static(b"\xff\xfe")).await;
        assert_eq!(answer["error"]["code"], "request.invalid_field");
        // One that nobody waits for the answer of.
        let (id, events) = listener(&world, "'exit 7'").await;
        world.client.publish("functions.cancel", id.clone().into()).await.unwrap();
        cancelled(&world, &id, &events).await;
        // What the daemon may do is not lent to those who cancel.
        let overheard = Results::subscribe(&world.client, "functions.results").await;
        for reply in ["functions.results", "$JS.API.STREAM.PURGE.functions_results"] {
            let publish = world.client.publish_with_reply("functions.cancel", reply, "x".into());
            publish.await.unwrap();
        }
        world.works(1).await;
        let answers = overheard.all();
        assert!(answers.iter().all(|message| message.headers.is_some()), "{answers:?}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_ends_while_it_is_cancelled_has_one_outcome() {
    for world in worlds(&[("MAX_CONTAINERS", "3")]).await {
        let world = &world;
        let (mut succeeded, mut stopped, mut wrong) = (0, 0, Vec::new());
        // A hundred times where most can go wrong.
        let step = if is_durable(world) { 1 } else { 4 };
        for round in (0..34).step_by(step) {
            let trials = (0..3u64).map(|lane| async move {
                let id = world.id();
                let events = world.events(&id).await;
                world.submit(json!({"id": id, "parameter": "sleep 0.2"})).await;
                // From before it starts until after its end.
                tokio::time::sleep(Duration::from_millis(round * 30 + lane * 7)).await;
                let answer = cancel(&world.client, id.clone()).await;
                let last = events.wait_for("ended").await;
                (id, events, answer, last)
            });
            for (id, events, answer, last) in futures::future::join_all(trials).await {
                let started = last.get("started_at").is_some();
                let sound = match (answer["result"].as_str(), last["status"].as_str()) {
                    (Some("already_ended"), Some(status)) => answer["status"] == status,
                    (Some("will_not_start"), Some("cancelled")) => !started,
                    // Nobody keeps a record of what has ended.
                    (Some("will_not_start"), Some("succeeded")) => !is_durable(world),
                    (Some("stopping"), Some("cancelled" | "succeeded")) => true,
                    _ => false,
                };
                if !sound {
                    wrong.push(format!("round {round}: {answer} and {last}"));
                }
                match last["status"].as_str() {
                    Some("succeeded") => succeeded += 1,
                    _ => stopped += 1,
                }
                if is_durable(world) {
                    assert_eq!(world.ended(&id).await.status(), last["status"].as_str().unwrap());
                }
                let ends = events.states().iter().filter(|state| *state == "ended").count();
                let results = world.results.of(&id).len();
                if (ends, results) != (1, 1) {
                    wrong.push(format!("round {round}: {ends} ends, {results} results of {id}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        // On a machine that is busy elsewhere a job may take longer than any of the delays.
        if succeeded == 0 || stopped == 0 {
            eprintln!("no race was run: {succeeded} succeeded, {stopped} were stopped");
        }
        if is_durable(world) {
            world.ledger.settled().await;
            let tally = world.ledger.tally().await;
            assert!(tally.values().all(|count| *count == 1), "{tally:?}");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn any_instance_takes_a_cancellation() {
    for world in worlds(&[("MAX_CONTAINERS", "1"), ("ACK_WAIT", "30s")]).await {
        let mut other = Daemon::spawn(&world.settings);
        other.wait_ready().await;
        let first = world.hold().await;
        let first_events = world.events(&first.id).await;
        // With streams both are busy now. Without, nobody knows where the next one goes.
        let second = if is_durable(&world) { Some(world.hold().await) } else { None };
        let id = world.id();
        let events = world.events(&id).await;
        world.submit(json!({"id": id, "parameter": "sleep 100"})).await;
        let result = result_of(&world, &id).await;
        assert!(
            result == "will_not_start" || (second.is_none() && result == "stopping"),
            "{result}"
        );
        assert_eq!(result_of(&world, &first.id).await, "stopping");
        cancelled_but_not_settled(&world, &first.id, &first_events).await;
        if let Some(second) = &second {
            assert_eq!(world.engine.containers_of(&second.id).await.len(), 1, "nobody meant it");
            world.release(second).await;
            world.results.wait_for(&second.id).await;
        }
        cancelled(&world, &id, &events).await;
        drop(other);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_holder_hears_of_a_cancellation_it_missed() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let settings = [("MAX_CONTAINERS", "1"), ("ACK_WAIT", "6s")];
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        let held = world.hold().await;
        let events = world.events(&held.id).await;
        // Only the record says so.
        let bucket = async_nats::jetstream::new(world.client.clone());
        let bucket = bucket.get_key_value("functions_jobs").await.unwrap();
        let mut record = world.ledger.record(&held.id).await.unwrap();
        record["cancel_requested_at"] = record["updated_at"].clone();
        bucket.put(&held.id, record.to_string().into()).await.unwrap();
        let last = cancelled(&world, &held.id, &events).await;
        assert_eq!(last["attempt"], 1, "{last}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_for_an_answer_at_once_is_cancelled_as_well() {
    for world in worlds(&[("MAX_CONTAINERS", "1"), ("RUN_SLOT_TIMEOUT", "60s")]).await {
        let (running, waiting) = (world.id(), world.id());
        let running_job = world.run(json!({"id": running, "parameter": "sleep 100"}));
        let waiting_job = async {
            world.engine.running(&running).await;
            world.run(json!({"id": waiting, "parameter": "echo never"})).await
        };
        let cancels = async {
            world.engine.running(&running).await;
            // The other one has come to the daemon as well.
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert_eq!(result_of(&world, &waiting).await, "will_not_start");
            assert_eq!(result_of(&world, &running).await, "stopping");
        };
        let (ran, waited, ()) = tokio::join!(running_job, waiting_job, cancels);
        for outcome in [&ran, &waited] {
            assert_eq!(outcome["error"]["code"], "job.cancelled", "{outcome}");
            assert_eq!(outcome["status"], "cancelled", "{outcome}");
        }
        assert!(waited.get("started_at").is_none(), "{waited}");
        if is_durable(&world) {
            assert_eq!(world.ledger.record(&running).await, None, "no record is kept of it");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_cancellation_outlives_the_daemon() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let settings = [("ACK_WAIT", "3s"), ("STOP_GRACE", "60s"), ("MAX_CONTAINERS", "1")];
        let mut world = World::durable_with(options, Engine::shared().await, &settings).await;
        let (id, events) = listener(&world, "''").await;
        let waiting = world.id();
        let waits = world.events(&waiting).await;
        world.submit(json!({"id": waiting, "parameter": "echo never"})).await;
        assert_eq!(result_of(&world, &id).await, "stopping");
        assert_eq!(result_of(&world, &waiting).await, "will_not_start");
        world.crash_and_restart().await;
        let last = cancelled(&world, &id, &events).await;
        assert!(last.get("started_at").is_none(), "it was not begun again: {last}");
        cancelled(&world, &waiting, &waits).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flood_of_cancellations_does_not_hold_up_the_one_that_counts() {
    for world in worlds(&[]).await {
        let (id, events) = listener(&world, "'exit 7'").await;
        for number in 0..3000 {
            let unknown = format!("{}-{number}", world.id());
            world.client.publish("functions.cancel", unknown.into()).await.unwrap();
        }
        let begun = Instant::now();
        assert_eq!(result_of(&world, &id).await, "stopping");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "{took:?}");
        cancelled(&world, &id, &events).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_is_sent_again_under_its_id_runs_where_nobody_keeps_records() {
    let world = World::start(&[("MAX_CONTAINERS", "1")]).await;
    // Such as the nightly one, which was cancelled once, before it came.
    let id = world.id();
    assert_eq!(result_of(&world, &id).await, "will_not_start");
    let request = json!({"id": id, "parameter": "echo nightly"});
    let (_, request) = world.complete(request);
    for (night, wanted) in ["", "nightly\n", "nightly\n"].into_iter().enumerate() {
        let asked = world.client.request("functions.execute", request.to_string().into());
        let answer = within("an outcome", PATIENCE, asked).await.unwrap();
        let outcome: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(outcome["stdout"], wanted, "night {night}: {outcome}");
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn many_jobs_can_be_cancelled_at_once() {
    const MANY: usize = 300;
    for world in worlds(&[("MAX_CONTAINERS", "1")]).await {
        let held = world.hold().await;
        let mut ids = Vec::new();
        for _ in 0..MANY {
            ids.push(world.submit(json!({"parameter": "echo never"})).await);
        }
        let answers =
            futures::future::join_all(ids.iter().map(|id| cancel(&world.client, id.clone())));
        for answer in answers.await {
            assert_eq!(answer["result"], "will_not_start", "{answer}");
        }
        world.release(&held).await;
        world.results.wait_for_count(MANY + 1, PATIENCE).await;
        for id in &ids {
            let result = world.results.wait_for(id).await;
            assert_eq!(header(&result, "Job-Error").as_deref(), Some("job.cancelled"));
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_is_cancelled_at_the_daemons_end_is_not_handed_over() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let settings = [("STOP_GRACE", "3s"), ("SHUTDOWN_GRACE", "0s"), ("ACK_WAIT", "3s")];
        let mut world = World::durable_with(options, Engine::shared().await, &settings).await;
        for first in ["cancellation", "end"] {
            let (id, events) = listener(&world, "''").await;
            if first == "cancellation" {
                assert_eq!(result_of(&world, &id).await, "stopping");
                world.daemon.signal(Signal::TERM);
            } else {
                world.daemon.signal(Signal::TERM);
                let stopping = |line: &Value| message_of(line).contains("SHUTDOWN_GRACE is over");
                world.daemon.log().wait_for("the functions are stopped", stopping).await;
                assert_eq!(result_of(&world, &id).await, "stopping");
            }
            world.daemon.exit().await;
            world.daemon = Daemon::spawn(&world.settings);
            world.daemon.wait_ready().await;
            cancelled(&world, &id, &events).await;
            let begun = events.states().iter().filter(|state| *state == "running").count();
            assert_eq!(begun, 1, "it was not begun again: {:?}", events.all());
        }
        world.clean().await;
    }
}
