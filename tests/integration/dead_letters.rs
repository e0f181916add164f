//! Requests that could not be run, kept as they came.

use std::collections::BTreeSet;

use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::support::daemon::Daemon;
use crate::support::engine::Engine;
use crate::support::nats::{NatsOptions, NatsVersion, round_trip};
use crate::support::process::{Signal, free_port};
use crate::support::results::{Results, header};
use crate::support::wait::PATIENCE;
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

fn is_durable(world: &World) -> bool {
    world.settings.get("DELIVERY") == Some("jetstream")
}

/// Dead letters from now on, as they are published; in a durable world the stream has them too.
async fn letters(world: &World) -> Results {
    Results::subscribe(&world.client, "functions.dead_letters").await
}

/// Sends what may be no request at all.
async fn send(world: &World, subject: &str, payload: Bytes, headers: HeaderMap) {
    if is_durable(world) {
        world.ledger.offer(subject, payload, headers).await.unwrap();
    } else {
        world.client.publish_with_headers(subject.to_string(), headers, payload).await.unwrap();
        round_trip(&world.client).await;
    }
}

/// The next dead letter that nobody has looked at yet.
async fn next(letters: &Results, seen: &mut usize) -> Message {
    *seen += 1;
    letters.wait_for_count(*seen, PATIENCE).await;
    letters.all()[*seen - 1].clone()
}

fn time(message: &Message, name: &str) -> jiff::Timestamp {
    header(message, name).unwrap_or_else(|| panic!("no {name}: {message:?}")).parse().unwrap()
}

/// The headers, each value with its name.
fn lines(message: &Message) -> BTreeSet<(String, String)> {
    let headers = message.headers.iter().flat_map(HeaderMap::iter);
    headers
        .flat_map(|(name, values)| {
            values.iter().map(|value| (name.to_string(), value.as_str().trim().to_string()))
        })
        .collect()
}

/// The outcome tells the same as the dead letter.
async fn agree(world: &World, letter: &Message) -> Message {
    let id = header(letter, "Job-Id").unwrap();
    let result = world.results.wait_for(&id).await;
    assert_eq!(header(letter, "Dead-Letter-Reason"), header(&result, "Job-Error"));
    assert_eq!(header(letter, "Nats-Msg-Id").unwrap(), format!("{id}-dead"));
    assert!(time(letter, "Dead-Letter-Queued-At") <= time(letter, "Dead-Letter-At"));
    if is_durable(world) {
        let kept = world.ledger.dead_letter(&id).await;
        assert_eq!(kept.payload, letter.payload);
        // The library shows one value of each name that is stored.
        assert!(lines(&kept).is_subset(&lines(letter)), "{kept:?} and {letter:?}");
        world.ended(&id).await;
    }
    result
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_no_request_is_kept_as_it_came() {
    for world in worlds(&[]).await {
        let (letters, mut seen) = (letters(&world).await, 0);
        let mut headers = HeaderMap::new();
        headers.insert("X-Trace", "abc, def");
        headers.append("X-Many", "one");
        headers.append("X-Many", "two");
        headers.insert("x-lower", "");
        headers.insert("Job-Id", "not-the-jobs");
        headers.insert("Dead-Letter-Reason", "none of ours");
        let bodies: [(&[u8], &str); 6] = [
            (b"no request", "request.invalid_json"),
            (b"", "request.invalid_json"),
            (b"\xff\xfe\x00{}", "request.invalid_json"),
            (b"[1, 2]", "request.invalid_json"),
            (b"{\"image_reference\": \"\xff\"}", "request.invalid_json"),
            (b"  {\"image_reference\": 7 }\n", "request.invalid_field"),
        ];
        for (number, (body, reason)) in bodies.into_iter().enumerate() {
            let mut headers = headers.clone();
            let message_id = format!("{}-{number}", world.id());
            headers.insert("Nats-Msg-Id", message_id.as_str());
            send(&world, "functions.execute", Bytes::from_static(body), headers).await;
            let letter = next(&letters, &mut seen).await;
            assert_eq!(letter.payload, body, "byte for byte");
            let said = |name: &str| header(&letter, name);
            assert_eq!(said("Dead-Letter-Reason").as_deref(), Some(reason));
            assert_eq!(said("Job-Id"), Some(message_id.clone()));
            assert_eq!(said("Dead-Letter-Subject").as_deref(), Some("functions.execute"));
            assert_eq!(said("Dead-Letter-Attempts").as_deref(), Some("1"));
            assert!(said("Job-Image").is_none());
            assert!(!said("Dead-Letter-Message").unwrap().is_empty());
            // The sender's own, but for the names that mean something here.
            assert_eq!(said("Original-Nats-Msg-Id"), Some(message_id));
            assert_eq!(said("Original-Job-Id").as_deref(), Some("not-the-jobs"));
            assert_eq!(said("Original-Dead-Letter-Reason").as_deref(), Some("none of ours"));
            assert_eq!(
                (said("X-Trace"), said("x-lower")),
                (Some("abc, def".into()), Some("".into()))
            );
            let many: Vec<_> = letter.headers.as_ref().unwrap().get_all("X-Many").collect();
            assert_eq!(many.iter().map(|value| value.as_str()).collect::<Vec<_>>(), ["one", "two"]);
            assert!(said("Dead-Letter-Headers-Dropped").is_none());
            agree(&world, &letter).await;
        }
        // A request for an answer at once, too.
        let outcome = world.client.request("functions.run", "neither".into()).await.unwrap();
        let outcome: Value = serde_json::from_slice(&outcome.payload).unwrap();
        let letter = next(&letters, &mut seen).await;
        assert_eq!(letter.payload, "neither");
        assert_eq!(header(&letter, "Dead-Letter-Subject").as_deref(), Some("functions.run"));
        assert_eq!(header(&letter, "Job-Id").as_deref(), outcome["id"].as_str());
        world.works(1).await;
        assert_eq!(letters.all().len(), seen, "one each");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_as_large_as_a_message_can_be_is_kept_as_far_as_it_fits() {
    const MOST: usize = 64 << 10;
    let options = |options| NatsOptions { max_payload: Some(MOST), ..options };
    let mut worlds =
        vec![World::with(options(NatsOptions::default()), Engine::shared().await, &[]).await];
    for version in NatsVersion::all() {
        let options = options(NatsOptions::durable(version));
        worlds.push(World::durable_with(options, Engine::shared().await, &[]).await);
    }
    for world in worlds {
        let (letters, mut seen) = (letters(&world).await, 0);
        for spare in [0, 1, 100, 300, 1000] {
            let body: Bytes = format!("{{{}", "x".repeat(MOST - spare - 1)).into();
            send(&world, "functions.execute", body.clone(), HeaderMap::new()).await;
            let letter = next(&letters, &mut seen).await;
            let cut = header(&letter, "Dead-Letter-Truncated").is_some();
            if cut {
                assert!(body.starts_with(&letter.payload) && letter.payload.len() < body.len());
                assert!(letter.payload.len() > MOST - 1000, "{}", letter.payload.len());
                assert!(spare < 400, "there was room: {spare}");
            } else {
                assert_eq!(letter.payload, body, "{spare} to spare");
            }
            assert_eq!(
                header(&letter, "Dead-Letter-Reason").as_deref(),
                Some("request.invalid_json")
            );
            agree(&world, &letter).await;
        }
        // Headers take room, too.
        let mut headers = HeaderMap::new();
        headers.insert("X-Large", "y".repeat(MOST / 2));
        let body: Bytes = "x".repeat(MOST / 2 - 100).into();
        send(&world, "functions.execute", body.clone(), headers).await;
        let letter = next(&letters, &mut seen).await;
        assert_eq!(letter.payload, body);
        assert_eq!(header(&letter, "Dead-Letter-Headers-Dropped").as_deref(), Some("true"));
        agree(&world, &letter).await;
        let log = world.daemon.log().text();
        assert!(!log.contains("lost the connection"), "{log}");
        world.works(2).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_cannot_be_run_is_kept_with_the_reason() {
    let settings = [
        ("MAX_DELIVER", "2"),
        ("IMAGE_ALLOWLIST", "docker.io/worker-spawner-test/*,127.0.0.1:*/*"),
    ];
    for world in worlds(&settings).await {
        let (letters, mut seen) = (letters(&world).await, 0);
        let nobody = format!("127.0.0.1:{}/any:1", free_port());
        for (request, status, reason, attempts) in [
            (json!({"image_reference": nobody}), "error", "image.pull_failed", "2"),
            (
                json!({"image_reference": "quay.io/not/allowed"}),
                "rejected",
                "image.not_allowed",
                "1",
            ),
            (json!({"parameter": "no-such-command"}), "rejected", "command.not_found", "1"),
            (
                json!({"parameter": "true", "network": "host"}),
                "rejected",
                "request.invalid_field",
                "1",
            ),
        ] {
            let (id, request) = world.complete(request);
            let body: Bytes = request.to_string().into();
            send(&world, "functions.execute.low", body.clone(), HeaderMap::new()).await;
            let letter = next(&letters, &mut seen).await;
            let said = |name: &str| header(&letter, name);
            assert_eq!(letter.payload, body);
            assert_eq!(said("Job-Id"), Some(id));
            assert_eq!(said("Job-Image").as_deref(), request["image_reference"].as_str());
            assert_eq!(said("Dead-Letter-Reason").as_deref(), Some(reason));
            assert_eq!(said("Dead-Letter-Attempts").as_deref(), Some(attempts), "{reason}");
            assert_eq!(said("Dead-Letter-Subject").as_deref(), Some("functions.execute.low"));
            let result = agree(&world, &letter).await;
            assert_eq!(header(&result, "Job-Status").as_deref(), Some(status));
            assert_eq!(header(&result, "Job-Attempt").as_deref(), Some(attempts));
        }
        // What ended, however badly, is no dead letter; neither is who has to come again.
        for request in [
            json!({"parameter": "false"}),
            json!({"parameter": "sleep 60", "timeout_ms": 200}),
            json!({"parameter": "true", "expires_at": "2001-01-01T00:00:00Z"}),
        ] {
            world.execute(request).await;
        }
        world.works(1).await;
        round_trip(&world.client).await;
        assert_eq!(letters.all().len(), seen, "{:?}", letters.all());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_is_told_to_come_again_is_no_dead_letter() {
    let settings = [
        ("MAX_CONTAINERS", "1"),
        ("RUN_SLOT_TIMEOUT", "50ms"),
        ("BUFFER_MESSAGES", "1"),
        ("SHUTDOWN_GRACE", "0s"),
    ];
    for mut world in worlds(&settings).await {
        let letters = letters(&world).await;
        let held = world.hold().await;
        let outcome = world.run(json!({"parameter": "true"})).await;
        assert_eq!(outcome["error"]["code"], "busy", "{outcome}");
        if !is_durable(&world) {
            // One waits, one is refused, and who runs is stopped with the daemon.
            let ids = [
                world.submit(json!({"parameter": "true"})).await,
                world.submit(json!({"parameter": "true"})).await,
            ];
            world.results.wait_for(&ids[1]).await;
            world.daemon.signal(Signal::TERM);
            world.daemon.exit().await;
            for (id, code) in [
                (&ids[0], "worker.shutting_down"),
                (&ids[1], "buffer.full"),
                (&held.id, "job.stopped"),
            ] {
                let result = world.results.wait_for(id).await;
                assert_eq!(header(&result, "Job-Error").as_deref(), Some(code));
            }
        } else {
            world.daemon.signal(Signal::TERM);
            world.daemon.exit().await;
            // It is left to the next one.
            world.daemon = Daemon::spawn(&world.settings);
            let container = world.engine.running(&held.id).await;
            world.engine.exec(&container, &["touch", "/tmp/go"]).await;
            assert_eq!(world.ended(&held.id).await.text(), "released\n");
            assert!(world.ledger.dead_letters().await.is_empty());
        }
        round_trip(&world.client).await;
        assert!(letters.all().is_empty(), "{:?}", letters.all());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_that_was_moved_is_kept_as_it_was_sent() {
    for world in worlds(&[]).await {
        let (letters, mut seen) = (letters(&world).await, 0);
        let mut headers = HeaderMap::new();
        headers.insert("X-Mine", "yes");
        let (id, request) =
            world.complete(json!({"parameter": "no-such-command", "priority": "low"}));
        let body: Bytes = request.to_string().into();
        send(&world, "functions.execute.high", body.clone(), headers).await;
        let letter = next(&letters, &mut seen).await;
        assert_eq!((letter.payload.clone(), header(&letter, "Job-Id")), (body, Some(id)));
        assert_eq!(
            header(&letter, "Dead-Letter-Subject").as_deref(),
            Some("functions.execute.high")
        );
        let names: Vec<String> =
            letter.headers.as_ref().unwrap().iter().map(|(name, _)| name.to_string()).collect();
        let strange: Vec<_> = names
            .iter()
            .filter(|name| {
                !name.starts_with("Dead-Letter-")
                    && !["Job-Id", "Job-Image", "Nats-Msg-Id", "X-Mine"].contains(&name.as_str())
            })
            .collect();
        assert!(strange.is_empty(), "none of the sender's: {strange:?}");
        agree(&world, &letter).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_same_bad_request_again_is_the_same_dead_letter() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &[]).await;
        let (_, request) = world.complete(json!({"parameter": 7}));
        for _ in 0..3 {
            world.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
        }
        let letter = world.ledger.dead_letter(request["id"].as_str().unwrap()).await;
        assert_eq!(letter.payload, request.to_string());
        world.ledger.settled().await;
        assert_eq!(world.ledger.dead_letters().await.len(), 1);
        assert_eq!(world.ledger.results().await.len(), 1);
    }
}
