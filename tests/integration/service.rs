//! The daemon as a NATS service: who finds it, what it says of itself and of its jobs.

use std::collections::BTreeSet;

use async_nats::Client;
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};

use crate::support::daemon::Daemon;
use crate::support::engine::Engine;
use crate::support::nats::{NatsOptions, NatsVersion};
use crate::support::process::Signal;
use crate::support::specification;
use crate::support::wait::{PATIENCE, within};
use crate::support::world::World;

/// What `count` instances answer.
async fn ask_all(client: &Client, subject: &str, count: usize) -> Vec<Value> {
    let inbox = client.new_inbox();
    let answers = client.subscribe(inbox.clone()).await.unwrap();
    client.publish_with_reply(subject.to_owned(), inbox, "".into()).await.unwrap();
    let answers = answers.take(count).collect::<Vec<_>>();
    let answers = within(&format!("{count} answers to {subject}"), PATIENCE, answers).await;
    answers.iter().map(|answer| serde_json::from_slice(&answer.payload).unwrap()).collect()
}

async fn ask(client: &Client, subject: &str) -> Value {
    ask_all(client, subject, 1).await.remove(0)
}

fn endpoint<'a>(answer: &'a Value, name: &str) -> &'a Value {
    let endpoints = answer["endpoints"].as_array().unwrap();
    endpoints.iter().find(|endpoint| endpoint["name"] == name).unwrap()
}

/// What is answered to a question about a job, and the code in its headers where it is a refusal.
async fn status(world: &World, request: String) -> (Value, Option<String>) {
    let asked = world.client.request("functions.status", request.into());
    let answer = within("an answer about a job", PATIENCE, asked).await.unwrap();
    let code = answer.headers.as_ref().and_then(|headers| headers.get("Nats-Service-Error-Code"));
    (serde_json::from_slice(&answer.payload).unwrap(), code.map(ToString::to_string))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn whoever_asks_finds_the_service_and_what_it_offers() {
    let world = World::start(&[]).await;
    for subject in ["$SRV.PING", "$SRV.PING.worker-spawner"] {
        let ping = ask(&world.client, subject).await;
        assert_eq!(ping["type"], "io.nats.micro.v1.ping_response");
        assert_eq!(ping["name"], "worker-spawner");
        assert_eq!(ping["version"], env!("CARGO_PKG_VERSION"));
    }
    let ping = ask(&world.client, "$SRV.PING").await;
    let id = ping["id"].as_str().unwrap();
    let info = ask(&world.client, &format!("$SRV.INFO.worker-spawner.{id}")).await;
    assert_eq!(
        (&info["type"], &info["id"]),
        (&json!("io.nats.micro.v1.info_response"), &json!(id))
    );
    assert_eq!(info["metadata"]["delivery"], "core");
    for (name, group) in [("run", "worker-spawners"), ("cancel", ""), ("status", "worker-spawners")]
    {
        let endpoint = endpoint(&info, name);
        assert_eq!(endpoint["subject"], format!("functions.{name}"));
        assert_eq!(endpoint["queue_group"], group);
        // The schemas are schemas, and what is asked for and answered fits them.
        for schema in ["request_schema", "response_schema"] {
            let schema = endpoint["metadata"][schema].as_str().unwrap();
            let schema: Value = serde_json::from_str(schema).unwrap();
            jsonschema::validator_for(&schema).unwrap();
        }
    }
    let response = endpoint(&info, "run")["metadata"]["response_schema"].as_str().unwrap();
    let response = jsonschema::validator_for(&serde_json::from_str(response).unwrap()).unwrap();
    let outcome = world.run(json!({"parameter": "echo 1"})).await;
    assert!(response.is_valid(&outcome), "{outcome}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn each_instance_answers_for_itself() {
    let world = World::start(&[]).await;
    let mut other = Daemon::spawn(&world.settings);
    other.wait_ready().await;
    let answers = ask_all(&world.client, "$SRV.PING.worker-spawner", 2).await;
    let ids: BTreeSet<&str> = answers.iter().map(|answer| answer["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 2);
    other.signal(Signal::TERM);
    assert_eq!(other.exit().await.code(), Some(0));
    let inbox = world.client.new_inbox();
    let mut answers = world.client.subscribe(inbox.clone()).await.unwrap();
    world.client.publish_with_reply("$SRV.PING", inbox.clone(), "".into()).await.unwrap();
    within("the answer of the one that is left", PATIENCE, answers.next()).await.unwrap();
    // Another's answer would be here before that to a later question.
    ask(&world.client, "$SRV.STATS").await;
    assert!(answers.next().now_or_never().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn statistics_are_of_what_was_asked() {
    let world = World::start(&[]).await;
    let before = ask(&world.client, "$SRV.STATS").await;
    assert_eq!(before["type"], "io.nats.micro.v1.stats_response");
    assert_eq!(endpoint(&before, "run")["num_requests"], 0);
    assert!(before["started"].as_str().is_some_and(|time| time.ends_with('Z')));
    world.run(json!({"parameter": "true"})).await;
    // A function's own failure is none of the service's.
    world.run(json!({"parameter": "false"})).await;
    world.run(json!({"parameter": "true", "cpus": -1})).await;
    status(&world, "nosuch".to_owned()).await;
    let after = ask(&world.client, "$SRV.STATS").await;
    let run = endpoint(&after, "run");
    assert_eq!((&run["num_requests"], &run["num_errors"]), (&json!(3), &json!(1)), "{run}");
    assert!(
        run["last_error"].as_str().unwrap().starts_with("request.invalid_field: cpus"),
        "{run}"
    );
    let (all, average) = (run["processing_time"].as_u64(), run["average_processing_time"].as_u64());
    assert_eq!(all.unwrap() / 3, average.unwrap());
    assert_eq!(run["data"]["max_containers"], 5);
    let status = endpoint(&after, "status");
    assert_eq!((&status["num_requests"], &status["num_errors"]), (&json!(1), &json!(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_becomes_of_a_job_is_told_to_whoever_asks() {
    let mut worlds = vec![World::start(&[]).await];
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        worlds.push(World::durable_with(options, Engine::shared().await, &[]).await);
    }
    for world in worlds {
        let durable = world.settings.get("DELIVERY") == Some("jetstream");
        let held = world.hold().await;
        let (answer, _) = status(&world, held.id.clone()).await;
        assert_eq!((&answer["id"], &answer["state"]), (&json!(held.id), &json!("running")));
        world.release(&held).await;
        let (answer, code) = status(&world, json!({"id": "nosuch"}).to_string()).await;
        assert_eq!(answer["error"]["code"], "job.unknown", "{answer}");
        assert_eq!(code.as_deref(), Some("404"));
        let (answer, code) = status(&world, "no such".to_owned()).await;
        assert_eq!(answer["error"]["code"], "request.invalid_field", "{answer}");
        assert_eq!(code.as_deref(), Some("400"));
        if durable {
            let ended = world.execute(json!({"parameter": "echo told"})).await;
            let id = ended.outcome["id"].as_str().unwrap().to_owned();
            world.ledger.settled().await;
            let (answer, _) = status(&world, id.clone()).await;
            assert_eq!(answer["stdout"], "told\n");
            assert_eq!(answer, world.ledger.record(&id).await.unwrap());
            specification::assert_event(&answer);
        }
        // A request that nothing keeps is known where it runs.
        let (id, request) = world.complete(json!({"parameter": "sleep 60"}));
        let client = world.client.clone();
        let asked = tokio::spawn(async move {
            client.request("functions.run", request.to_string().into()).await
        });
        world.engine.running(&id).await;
        let (answer, _) = status(&world, id.clone()).await;
        assert_eq!((&answer["id"], &answer["state"]), (&json!(id), &json!("running")));
        world.client.publish("functions.cancel", id.into()).await.unwrap();
        asked.await.unwrap().unwrap();
    }
}
