//! What is known of a job while it is under way: its record, and the same as events.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::{self, kv};
use serde_json::{Value, json};

use crate::support::engine::Engine;
use crate::support::jetstream::JOBS;
use crate::support::nats::{NatsOptions, NatsVersion};
use crate::support::process::free_port;
use crate::support::proxy::{Flow, Proxy};
use crate::support::registry::{Access, Registry};
use crate::support::results::Results;
use crate::support::wait::eventually;
use crate::support::world::World;

/// The bucket of records, to change what is none of our business.
async fn bucket(world: &World) -> kv::Store {
    jetstream::new(world.client.clone()).get_key_value(JOBS).await.unwrap()
}

fn time(value: &Value, field: &str) -> jiff::Timestamp {
    let text = value[field].as_str().unwrap_or_else(|| panic!("no {field} in {value}"));
    text.parse().unwrap()
}

/// Whether these are the fields of the request, and the times in the order in which they happen.
fn assert_sound(record: &Value, id: &str) {
    assert_eq!(record["id"], id, "{record}");
    let nulls = record.as_object().unwrap().values().any(Value::is_null);
    assert!(!nulls, "what is not known is absent: {record}");
    let order = ["queued_at", "pulling_at", "running_at", "updated_at"];
    let times: Vec<_> = order.iter().filter(|field| record.get(**field).is_some()).collect();
    for pair in times.windows(2) {
        assert!(time(record, pair[0]) <= time(record, pair[1]), "{pair:?}: {record}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn each_state_is_recorded_and_told_with_its_time() {
    for version in NatsVersion::all() {
        let registry = Registry::start(Access::Anyone).await;
        registry.put("slow", "1", "here at last");
        let proxy = Proxy::to(registry.port, Flow::Open).await;
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &[]).await;
        let image = format!("127.0.0.1:{}/slow:1", proxy.port);
        let _guard = world.engine.remove_later(&image);
        let id = world.id();
        let events = world.events(&id).await;
        let records = Results::subscribe(&world.client, &format!("$KV.{JOBS}.{id}")).await;

        proxy.set(Flow::Trickle);
        world.submit(json!({"id": id, "image_reference": image})).await;
        let pulling = world.ledger.record_when(&id, |record| record["state"] == "pulling").await;
        assert_sound(&pulling, &id);
        time(&pulling, "pulling_at");
        assert!(pulling.get("running_at").is_none(), "nothing runs yet: {pulling}");
        // Once the registry has said what there is, the layers are counted.
        let busy = world
            .ledger
            .record_when(&id, |record| record["pull"]["layers"].as_u64() > Some(0))
            .await;
        assert_eq!(time(&busy, "pulling_at"), time(&pulling, "pulling_at"));
        proxy.set(Flow::Open);
        let ended = world.ended(&id).await;
        assert_eq!(ended.text(), "here at last\n", "{}", ended.outcome);
        let last = events.wait_for("ended").await;

        let told = events.all();
        let mut states = events.states();
        states.dedup();
        assert_eq!(
            states.iter().rev().take(3).rev().collect::<Vec<_>>(),
            ["pulling", "running", "ended"]
        );
        for event in &told[..told.len() - 1] {
            assert_sound(event, &id);
            assert_eq!((&event["image"], &event["attempt"]), (&json!(image), &json!(1)));
            assert_eq!(event["sequence"], 1, "{event}");
            let worker = &ended.outcome["worker"];
            assert_eq!(&event["worker"], worker, "{event}");
            match event["state"].as_str().unwrap() {
                "running" => drop(time(event, "running_at")),
                "pulling" => {
                    time(event, "pulling_at");
                    let number = |field: &str| event["pull"][field].as_u64().unwrap();
                    assert!(number("layers_done") <= number("layers"), "{event}");
                    assert!(number("bytes_done") <= number("bytes"), "{event}");
                }
                other => panic!("{other}: {event}"),
            }
        }
        // The record is the event, and the last of both holds the outcome.
        assert_eq!(world.ledger.record(&id).await.unwrap(), last);
        for (field, value) in ended.outcome.as_object().unwrap() {
            assert_eq!(&last[field], value, "{field}");
        }
        let recorded: Vec<Value> = records
            .all()
            .iter()
            .map(|record| serde_json::from_slice(&record.payload).unwrap())
            .collect();
        let unrecorded: Vec<_> = told.iter().filter(|event| !recorded.contains(event)).collect();
        assert!(unrecorded.is_empty(), "told and not recorded: {unrecorded:?} of {recorded:?}");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_waits_for_another_attempt_says_until_when() {
    for durable in [true, false] {
        let settings = [("MAX_DELIVER", "3")];
        let world = match durable {
            true => World::durable(&settings).await,
            false => World::start(&settings).await,
        };
        let id = world.id();
        let events = world.events(&id).await;
        let image = format!("127.0.0.1:{}/any:1", free_port());
        world.submit(json!({"id": id, "image_reference": image})).await;
        let last = events.wait_for("ended").await;
        assert_eq!((&last["status"], &last["attempt"]), (&json!("error"), &json!(3)), "{last}");
        let waits: Vec<_> =
            events.all().into_iter().filter(|event| event["state"] == "queued").collect();
        assert_eq!(waits.len(), 2, "{:?}", events.all());
        for (number, waiting) in waits.iter().enumerate() {
            assert_sound(waiting, &id);
            assert_eq!(waiting["attempt"], number + 1, "{waiting}");
            assert!(time(waiting, "retry_at") > time(waiting, "updated_at"), "{waiting}");
            assert!(waiting.get("running_at").is_none() && waiting.get("pull").is_none());
        }
        assert!(last.get("retry_at").is_none(), "{last}");
        if durable {
            assert_eq!(world.ledger.record(&id).await.unwrap(), last);
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_streams_events_tell_the_same() {
    let world = World::start(&[]).await;
    let id = world.id();
    let events = world.events(&id).await;
    let ended = world.execute(json!({"id": id, "parameter": "echo core"})).await;
    let last = events.wait_for("ended").await;
    assert_eq!(events.states(), ["running", "ended"]);
    for (field, value) in ended.outcome.as_object().unwrap() {
        assert_eq!(&last[field], value, "{field}");
    }
    assert_sound(&events.all()[0], &id);
    time(&events.all()[0], "running_at");
    // What is refused has an end as well.
    let id = world.id();
    let events = world.events(&id).await;
    world.submit(json!({"id": id, "parameter": 7})).await;
    assert_eq!(events.wait_for("ended").await["status"], "rejected");
    world.clean().await;
}

/// Lets somebody else claim the job.
async fn usurp(world: &World, id: &str) {
    let mut record = world.ledger.record(id).await.unwrap();
    record["claim"] = json!("another.claim");
    record["worker"] = json!("another");
    bucket(world).await.put(id, record.to_string().into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_has_lost_the_job_lets_go_of_it() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let engine = Engine::shared().await;
        let world = World::durable_with(options, engine, &[("ACK_WAIT", "3s")]).await;
        let held = world.hold().await;
        let events = world.events(&held.id).await;
        usurp(&world, &held.id).await;
        eventually("the container of who has lost the job is removed", || async {
            let containers = world.engine.containers_of(&held.id).await;
            containers.iter().all(|container| container.id.as_ref() != Some(&held.container))
        })
        .await;
        assert!(world.results.of(&held.id).is_empty(), "its outcome counts for nothing");
        assert!(!events.states().contains(&"ended".to_string()), "{:?}", events.all());
        // The other one never comes back: the request is delivered again.
        let container = world.engine.running(&held.id).await;
        world.engine.exec(&container, &["touch", "/tmp/go"]).await;
        let ended = world.ended(&held.id).await;
        assert_eq!((ended.text().as_str(), &ended.outcome["attempt"]), ("released\n", &json!(2)));
        world.ledger.settled().await;
        assert_eq!(world.ledger.tally().await[&held.id], 1);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_finds_out_at_the_end_says_nothing() {
    let world = World::durable(&[("ACK_WAIT", "30s")]).await;
    let held = world.hold().await;
    let events = world.events(&held.id).await;
    usurp(&world, &held.id).await;
    world.release(&held).await;
    world.engine.gone(&held.id).await;
    assert!(world.results.of(&held.id).is_empty());
    assert!(events.all().is_empty(), "{:?}", events.all());
    let record = world.ledger.record(&held.id).await.unwrap();
    assert_eq!((&record["claim"], &record["state"]), (&json!("another.claim"), &json!("running")));
    assert_eq!(world.ledger.queue_messages().await, 1, "it is the other's to settle");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_record_that_is_none_is_written_anew() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let engine = Engine::shared().await;
        let world = World::durable_with(options, engine, &[("ACK_WAIT", "3s")]).await;
        let bucket = bucket(&world).await;
        for garbage in ["", "no record", "{}", "[]", r#"{"id":"other","state":"ended"}"#] {
            let id = world.id();
            bucket.put(&id, garbage.into()).await.unwrap();
            let ended = world.execute(json!({"id": id, "parameter": "echo over it"})).await;
            assert_eq!(ended.text(), "over it\n", "{garbage:?}: {}", ended.outcome);
        }
        // The same while it runs, and when it is taken away.
        for spoil in ["put", "delete", "purge"] {
            let held = world.hold().await;
            match spoil {
                "put" => drop(bucket.put(&held.id, "no record".into()).await.unwrap()),
                "delete" => bucket.delete(&held.id).await.unwrap(),
                _ => bucket.purge(&held.id).await.unwrap(),
            }
            // Long enough for the holder to look at it.
            tokio::time::sleep(Duration::from_secs(2)).await;
            world.release(&held).await;
            let ended = world.ended(&held.id).await;
            assert_eq!(
                (ended.text().as_str(), &ended.outcome["attempt"]),
                ("released\n", &json!(1))
            );
            world.ledger.settled().await;
            assert_eq!(world.ledger.tally().await[&held.id], 1, "{spoil}");
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn records_are_forgotten_after_a_while_and_not_missed() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let settings = [
            ("RECORD_TTL", "2s"),
            ("QUEUE_MAX_AGE", "2s"),
            ("DUPLICATE_WINDOW", "1s"),
            ("ACK_WAIT", "3s"),
        ];
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        // A job outlives its record.
        let held = world.hold().await;
        eventually("the record is forgotten", || async {
            world.ledger.record(&held.id).await.is_none()
        })
        .await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        world.release(&held).await;
        let ended = world.ended(&held.id).await;
        assert_eq!((ended.text().as_str(), &ended.outcome["attempt"]), ("released\n", &json!(1)));
        world.ledger.settled().await;
        // Its id is free again.
        eventually("the record of the end is forgotten", || async {
            world.ledger.record(&held.id).await.is_none()
        })
        .await;
        let again = world.execute(json!({"id": held.id, "parameter": "echo anew"})).await;
        assert_eq!(again.outcome["stdout"], "anew\n", "{}", again.outcome);
        assert_eq!(world.ledger.tally().await[&held.id], 2);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_nobody_has_met_has_no_record() {
    let world = World::durable(&[("MAX_CONTAINERS", "1")]).await;
    let held = world.hold().await;
    let id = world.id();
    let events = world.events(&id).await;
    let (_, request) = world.complete(json!({"id": id, "parameter": "echo met"}));
    world.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(world.ledger.record(&id).await, None);
    world.release(&held).await;
    let ended = world.ended(&id).await;
    assert_eq!(ended.text(), "met\n");
    let queue = ended.outcome["timings_ms"]["queue"].as_f64().unwrap();
    assert!(queue > 400.0, "it waited: {}", ended.outcome);
    events.wait_for("ended").await;
    assert_eq!(events.states(), ["running", "ended"]);
    world.clean().await;
}
