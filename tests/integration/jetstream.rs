//! Requests from a stream: where they come from, what is made for them, who gets how many.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::{Client, HeaderMap};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, Settings, message_of};
use crate::support::engine::Engine;
use crate::support::images::Image;
use crate::support::jetstream::{DEAD_LETTERS, JOBS, Ledger, QUEUE, RESULTS};
use crate::support::nats::{Auth, NatsOptions, NatsServer, NatsVersion, round_trip};
use crate::support::process::{Signal, free_port};
use crate::support::results::{Results, header};
use crate::support::unique;
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::world::{World, held};

/// What JetStream answers to a request of its API.
async fn api(client: &Client, request: &str, body: Value) -> Value {
    let asked = client.request(format!("$JS.API.{request}"), body.to_string().into());
    let answer = within("an answer of JetStream", PATIENCE, asked).await.unwrap();
    serde_json::from_slice(&answer.payload).unwrap()
}

async fn config_of_stream(client: &Client, stream: &str) -> Value {
    api(client, &format!("STREAM.INFO.{stream}"), json!({})).await["config"].clone()
}

/// The configuration of every stream and, as `stream/consumer`, of every consumer.
async fn layout(client: &Client) -> BTreeMap<String, Value> {
    let mut layout = BTreeMap::new();
    let names = api(client, "STREAM.NAMES", json!({})).await;
    for stream in names["streams"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        layout.insert(stream.to_string(), config_of_stream(client, stream).await);
        let consumers = api(client, &format!("CONSUMER.LIST.{stream}"), json!({})).await;
        for consumer in consumers["consumers"].as_array().into_iter().flatten() {
            let name = consumer["name"].as_str().unwrap();
            layout.insert(format!("{stream}/{name}"), consumer["config"].clone());
        }
    }
    layout
}

/// The `delivery` that a daemon says it has when it is ready.
async fn delivery_of(daemon: &Daemon) -> String {
    let ready =
        daemon.log().wait_for("the daemon is ready", |line| message_of(line) == "ready").await;
    ready["fields"]["delivery"].as_str().unwrap_or_default().to_string()
}

/// The log of a daemon that refuses to start with these settings.
async fn refusal(settings: &Settings) -> String {
    let mut daemon = Daemon::spawn(settings);
    let status = daemon.exit().await;
    let told = daemon.log().text();
    assert_eq!(status.code(), Some(78), "{told}");
    assert!(!told.contains("panicked"), "{told}");
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_without_streams_is_used_as_it_is_or_not_at_all() {
    let mut without = Vec::new();
    for version in NatsVersion::all() {
        without.push(NatsOptions { version, ..NatsOptions::default() });
        // The server has them, and the account has none.
        without.push(NatsOptions { auth: Auth::NoStreamsAccount, ..NatsOptions::durable(version) });
    }
    for options in without {
        let world = World::with(options, Engine::shared().await, &[("DELIVERY", "auto")]).await;
        assert_eq!(delivery_of(&world.daemon).await, "core");
        let warned = world
            .daemon
            .log()
            .wait_for("a warning", |line| message_of(line).contains("no JetStream"))
            .await;
        assert_eq!(warned["level"], "WARN", "{warned}");
        let ended = world.execute(json!({"parameter": "echo all the same"})).await;
        assert_eq!(ended.text(), "all the same\n");

        let told = refusal(&world.settings.clone().set("DELIVERY", "jetstream")).await;
        assert!(told.contains("no JetStream"), "it says why: {told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_user_without_rights_to_streams_is_served_without_or_told() {
    for version in NatsVersion::all() {
        let options = NatsOptions { auth: Auth::NoStreams, ..NatsOptions::durable(version) };
        let world = World::with(options, Engine::shared().await, &[("DELIVERY", "auto")]).await;
        assert_eq!(delivery_of(&world.daemon).await, "core");
        let warned =
            |line: &Value| line["level"] == "WARN" && message_of(line).contains("no JetStream");
        world.daemon.log().wait_for("a warning", warned).await;
        let ended = world.execute(json!({"parameter": "echo all the same"})).await;
        assert_eq!(ended.text(), "all the same\n");
        assert!(layout(&world.client).await.is_empty());

        let told = refusal(&world.settings.clone().set("DELIVERY", "jetstream")).await;
        let last = told.lines().rfind(|line| line.contains("ERROR")).unwrap_or_default();
        assert!(
            last.to_lowercase().contains("permission") || last.contains("may not"),
            "the last word names the reason: {told}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn streams_are_used_where_they_are_to_be_had_and_nobody_forbids_it() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world = World::with(options, Engine::shared().await, &[]).await;
        let traffic = Results::subscribe(&world.client, "$JS.>").await;
        assert_eq!(delivery_of(&world.daemon).await, "core");
        let mut other = Daemon::spawn(&world.settings);
        other.wait_ready().await;
        let ended = world.execute(json!({"parameter": "echo no stream"})).await;
        assert_eq!(ended.text(), "no stream\n");
        world.run(json!({"parameter": "echo no stream"})).await;
        drop(other);
        round_trip(&world.client).await;
        let asked: Vec<_> = traffic.all().into_iter().map(|message| message.subject).collect();
        assert!(asked.is_empty(), "core asks JetStream for nothing: {asked:?}");
        assert!(layout(&world.client).await.is_empty());

        let mut auto = Daemon::spawn(&world.settings.clone().set("DELIVERY", "auto"));
        auto.wait_ready().await;
        assert_eq!(delivery_of(&auto).await, "jetstream");
        assert!(!traffic.all().is_empty(), "what JetStream is asked for can be seen");
        assert!(layout(&world.client).await.contains_key(QUEUE));
    }
}

/// Whether all of `wanted` is in `config`.
fn assert_has(what: &str, config: &Value, wanted: &Value) {
    for (field, value) in wanted.as_object().unwrap() {
        let mut is = config[field].clone();
        if let Some(list) = is.as_array_mut() {
            list.sort_by_key(Value::to_string);
        }
        assert_eq!(&is, value, "{field} of {what}: {config}");
    }
}

/// A delivery is not always an attempt: as many more are asked for.
const SPARE_DELIVERIES: u64 = 10;

const SECOND: u64 = 1_000_000_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_made_is_as_the_settings_say() {
    for version in NatsVersion::all() {
        let server = NatsServer::with(NatsOptions::durable(version)).await;
        let client = server.client().await;
        let engine = Engine::shared().await;
        let settings = Settings::jetstream().nats(&server).engine(&engine);
        // Names come from the prefix and the group, and a stream's name cannot hold a dot.
        let own = settings.clone().set_all(&[
            ("SUBJECT_PREFIX", "team.fn"),
            ("QUEUE_GROUP", "my.group"),
            ("STREAM_STORAGE", "memory"),
            ("QUEUE_MAX_MESSAGES", "77"),
            ("QUEUE_MAX_BYTES", "3MiB"),
            ("QUEUE_MAX_AGE", "2h"),
            ("DUPLICATE_WINDOW", "90s"),
            ("RESULTS_MAX_AGE", "5h"),
            ("RESULTS_MAX_BYTES", "4MiB"),
            ("DEAD_LETTERS_MAX_AGE", "6h"),
            ("DEAD_LETTERS_MAX_BYTES", "5MiB"),
            ("RECORD_TTL", "3h"),
            ("ACK_WAIT", "7s"),
            ("MAX_DELIVER", "4"),
        ]);
        let mut daemon = Daemon::spawn(&own);
        daemon.wait_ready().await;
        let found = layout(&client).await;
        let memory = json!({"storage": "memory", "num_replicas": 1});
        let advisory = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.team_fn_queue.>";
        for (name, wanted) in [
            (
                "team_fn_queue",
                json!({"subjects": ["team.fn.execute", "team.fn.execute.high", "team.fn.execute.low"],
                    "retention": "workqueue", "discard": "new", "max_msgs": 77, "max_bytes": 3 << 20,
                    "max_age": 0, "duplicate_window": 90 * SECOND}),
            ),
            (
                "team_fn_results",
                json!({"subjects": ["team.fn.results"], "retention": "limits", "discard": "old",
                    "max_age": 5 * 3600 * SECOND, "max_bytes": 4 << 20, "max_msgs": -1,
                    "duplicate_window": 90 * SECOND}),
            ),
            (
                "team_fn_dead_letters",
                json!({"subjects": ["team.fn.dead_letters"], "retention": "limits",
                    "max_age": 6 * 3600 * SECOND, "max_bytes": 5 << 20, "max_msgs": -1}),
            ),
            ("team_fn_advisories", json!({"subjects": [advisory], "retention": "workqueue"})),
            (
                "KV_team_fn_jobs",
                json!({"subjects": ["$KV.team_fn_jobs.>"], "max_msgs_per_subject": 1,
                    "max_age": 3 * 3600 * SECOND, "allow_rollup_hdrs": true, "deny_delete": true}),
            ),
            (
                "OBJ_team_fn_objects",
                json!({"subjects": ["$O.team_fn_objects.C.>", "$O.team_fn_objects.M.>"],
                    "max_age": 5 * 3600 * SECOND, "allow_rollup_hdrs": true}),
            ),
        ] {
            let config = found.get(name).unwrap_or_else(|| panic!("no {name} in {found:?}"));
            assert_has(name, config, &wanted);
            assert_has(name, config, &memory);
        }
        for (name, subject) in [
            ("my_group", "team.fn.execute"),
            ("my_group_high", "team.fn.execute.high"),
            ("my_group_low", "team.fn.execute.low"),
        ] {
            let name = format!("team_fn_queue/{name}");
            let wanted = json!({"filter_subject": subject, "ack_policy": "explicit",
                "ack_wait": 7 * SECOND, "deliver_policy": "all", "max_ack_pending": -1,
                "max_deliver": 4 + SPARE_DELIVERIES});
            assert_has(&name, &found[&name], &wanted);
        }
        assert!(found.contains_key("team_fn_advisories/my_group"), "{found:?}");
        assert_eq!(found.len(), 10, "and nothing else: {:?}", found.keys());

        // They serve, under the prefix.
        let image = engine.image(Image::Busybox).await;
        let (id, inbox) = (format!("t{}", unique()), client.new_inbox());
        let mut answers = client.subscribe(inbox.clone()).await.unwrap();
        let request = json!({"id": id, "image_reference": image, "parameter": "echo dots",
            "reply_to": inbox});
        let ack = Ledger::new(&client)
            .publish_acked("team.fn.execute.low", &request, HeaderMap::new())
            .await;
        assert_eq!(ack.stream, "team_fn_queue");
        let answer = within("an outcome", PATIENCE, answers.next()).await.unwrap();
        let outcome: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(outcome["stdout"], "dots\n", "{outcome}");
        eventually("the record is written and the request settled", || async {
            let queue = api(&client, "STREAM.INFO.team_fn_queue", json!({})).await;
            queue["state"]["messages"] == 0
        })
        .await;

        // Without objects there is no place for them.
        let without = settings.set("SUBJECT_PREFIX", "bare").set("OBJECT_LIMIT", "0");
        let mut bare = Daemon::spawn(&without);
        bare.wait_ready().await;
        let found = layout(&client).await;
        assert!(found.contains_key("bare_queue") && !found.contains_key("OBJ_bare_objects"));
        assert_has("bare_queue", &found["bare_queue"], &json!({"storage": "file"}));
        engine.gone(&id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_there_and_otherwise_is_named_and_left_as_it_is() {
    for version in NatsVersion::all() {
        let server = NatsServer::with(NatsOptions::durable(version)).await;
        let client = server.client().await;
        let settings = Settings::jetstream().nats(&server).engine(&Engine::shared().await);
        let mut daemon = Daemon::spawn(&settings);
        daemon.wait_ready().await;
        daemon.signal(Signal::TERM);
        assert!(daemon.exit().await.success());
        let before = layout(&client).await;

        // The thing, the field, what it is, what it should be; the setting is named as well.
        for (setting, value, thing, field, is, should) in [
            ("QUEUE_MAX_MESSAGES", "10", QUEUE, "max_msgs", "1000000", "10"),
            ("QUEUE_MAX_BYTES", "1MiB", QUEUE, "max_bytes", "1073741824", "1048576"),
            ("DUPLICATE_WINDOW", "1m", QUEUE, "duplicate_window", "5m", "1m"),
            ("STREAM_STORAGE", "memory", QUEUE, "storage", "file", "memory"),
            ("RESULTS_MAX_AGE", "1h", RESULTS, "max_age", "168h", "1h"),
            ("RESULTS_MAX_BYTES", "1MiB", RESULTS, "max_bytes", "1073741824", "1048576"),
            ("DEAD_LETTERS_MAX_BYTES", "1MiB", DEAD_LETTERS, "max_bytes", "268435456", "1048576"),
            ("DEAD_LETTERS_MAX_AGE", "1h", DEAD_LETTERS, "max_age", "720h", "1h"),
            ("RECORD_TTL", "8d", "KV_functions_jobs", "max_age", "168h", "192h"),
            ("MAX_DELIVER", "3", "worker-spawners", "max_deliver", "15", "13"),
            ("ACK_WAIT", "5s", "worker-spawners", "ack_wait", "30s", "5s"),
        ] {
            let told = refusal(&settings.clone().set(setting, value)).await;
            for wanted in [setting, thing, field, is, should] {
                assert!(told.contains(wanted), "{setting}={value}: no {wanted} in {told}");
            }
        }
        let told = refusal(&settings.clone().set("QUEUE_GROUP", "others")).await;
        for wanted in ["QUEUE_GROUP", QUEUE, "others"] {
            assert!(told.contains(wanted), "no {wanted} in {told}");
        }
        // More than one at once.
        let two = [("QUEUE_MAX_MESSAGES", "10"), ("RESULTS_MAX_AGE", "1h")];
        let told = refusal(&settings.clone().set_all(&two)).await;
        assert!(two.iter().all(|(name, _)| told.contains(name)), "{told}");
        // What cannot be used is no reason to do without.
        let auto = settings.clone().set("DELIVERY", "auto").set("QUEUE_MAX_MESSAGES", "10");
        refusal(&auto).await;
        assert_eq!(layout(&client).await, before, "nothing was changed");

        let mut daemon = Daemon::spawn(&settings);
        daemon.wait_ready().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_others_made_otherwise_is_named_and_left_as_it_is() {
    let stream = |name: &str, subject: &str| json!({"name": name, "subjects": [subject], "storage": "file", "num_replicas": 1});
    let with = |mut config: Value, fields: Value| {
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        config
    };
    let queue = || {
        with(
            stream(QUEUE, "functions.execute"),
            json!({"subjects": ["functions.execute", "functions.execute.high", "functions.execute.low"],
                "retention": "workqueue", "discard": "new", "max_msgs": 1_000_000,
                "max_bytes": 1 << 30, "duplicate_window": 300 * SECOND}),
        )
    };
    let cases = [
        ("retention", with(queue(), json!({"retention": "limits"})), None),
        ("discard", with(queue(), json!({"discard": "old"})), None),
        ("subjects", with(queue(), json!({"subjects": ["functions.execute"]})), None),
        ("max_age", with(queue(), json!({"max_age": 3600 * SECOND})), None),
        (
            "max_msgs_per_subject",
            with(
                stream("KV_functions_jobs", "$KV.functions_jobs.>"),
                json!({"max_msgs_per_subject": 5, "max_age": 7 * 86400 * SECOND,
                    "allow_rollup_hdrs": true, "deny_delete": true, "discard": "new"}),
            ),
            None,
        ),
        // The outcomes would be forgotten, or never be confirmed.
        (
            "max_msgs",
            with(
                stream(RESULTS, "functions.results"),
                json!({"max_msgs": 3, "max_age": 7 * 86400 * SECOND, "max_bytes": 1 << 30,
                    "duplicate_window": 300 * SECOND}),
            ),
            None,
        ),
        (
            "no_ack",
            with(
                stream(RESULTS, "functions.results"),
                json!({"no_ack": true, "max_age": 7 * 86400 * SECOND, "max_bytes": 1 << 30,
                    "duplicate_window": 300 * SECOND}),
            ),
            None,
        ),
        // All instances together would hold one request.
        ("max_ack_pending", queue(), Some(json!({"max_ack_pending": 1}))),
        ("max_deliver", queue(), Some(json!({"max_deliver": 2}))),
    ];
    let mut wrong = Vec::new();
    for version in NatsVersion::all() {
        for (field, config, consumer) in &cases {
            let server = NatsServer::with(NatsOptions::durable(version)).await;
            let client = server.client().await;
            let name = config["name"].as_str().unwrap();
            let made = api(&client, &format!("STREAM.CREATE.{name}"), config.clone()).await;
            assert!(made.get("error").is_none(), "{made}");
            if let Some(fields) = consumer {
                let durable = "worker-spawners";
                let plain = json!({"durable_name": durable, "ack_policy": "explicit",
                    "ack_wait": 30 * SECOND, "max_deliver": 15, "max_ack_pending": -1,
                    "max_waiting": 8192, "filter_subject": "functions.execute"});
                let body = json!({"stream_name": name, "config": with(plain, fields.clone())});
                let made =
                    api(&client, &format!("CONSUMER.DURABLE.CREATE.{name}.{durable}"), body).await;
                assert!(made.get("error").is_none(), "{made}");
            }
            let before = layout(&client).await;
            let settings = Settings::jetstream().nats(&server).engine(&Engine::shared().await);
            let mut daemon = Daemon::spawn(&settings);
            let ended = tokio::time::timeout(Duration::from_secs(10), daemon.exit()).await;
            let told = daemon.log().text();
            if !ended.is_ok_and(|status| status.code() == Some(78)) {
                wrong.push(format!("{version:?}, {field}: taken as it is"));
            } else if !told.contains(field) || !told.contains(name) {
                wrong.push(format!("{version:?}, {field}: not named: {told}"));
            }
            let mut after = layout(&client).await;
            after.retain(|name, _| before.contains_key(name));
            assert_eq!(after, before, "{field}: nothing was changed");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_prefix_or_a_group_that_makes_no_name_is_refused() {
    let mut wrong = Vec::new();
    for version in NatsVersion::all() {
        let server = NatsServer::with(NatsOptions::durable(version)).await;
        let settings = Settings::jetstream().nats(&server).engine(&Engine::shared().await);
        for (setting, value) in [
            ("SUBJECT_PREFIX", "a+b"),
            ("SUBJECT_PREFIX", "fonctions-é"),
            ("SUBJECT_PREFIX", "a/b"),
            ("QUEUE_GROUP", "a/b"),
            ("QUEUE_GROUP", "a\\b"),
        ] {
            let mut daemon = Daemon::spawn(&settings.clone().set(setting, value));
            let ended = tokio::time::timeout(Duration::from_secs(15), daemon.exit()).await;
            let told = daemon.log().text();
            let refused = ended.is_ok_and(|status| status.code() == Some(78));
            if !(refused && told.contains(setting)) {
                wrong.push(format!("{version:?}, {setting}={value}: {told}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_queue_is_an_error_at_the_publisher_and_loses_nothing() {
    for version in NatsVersion::all() {
        let settings = [("QUEUE_MAX_MESSAGES", "3"), ("MAX_CONTAINERS", "1")];
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        let first = world.hold().await;
        let mut accepted = vec![first.id.clone()];
        let mut refused = Vec::new();
        for number in 0..5 {
            let (id, request) = world.complete(json!({"parameter": format!("echo {number}")}));
            let subject = ["functions.execute", "functions.execute.high", "functions.execute.low"];
            let offered = world
                .ledger
                .offer(subject[number % 3], request.to_string().into(), HeaderMap::new())
                .await;
            match offered {
                Ok(_) => accepted.push(id),
                Err(error) => {
                    let told = format!("{error:?}");
                    assert!(told.contains("maximum messages exceeded"), "{told}");
                    refused.push(id);
                }
            }
        }
        assert_eq!((accepted.len(), refused.len()), (3, 3));
        world.release(&first).await;
        for id in &accepted {
            assert_eq!(world.ended(id).await.status(), "succeeded");
        }
        world.ledger.settled().await;
        let tally = world.ledger.tally().await;
        assert!(accepted.iter().all(|id| tally[id] == 1), "{tally:?}");
        assert!(refused.iter().all(|id| !tally.contains_key(id)), "{tally:?}");
        // There is room again.
        world.works(2).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn instances_that_start_together_on_an_empty_server_all_get_ready() {
    for version in NatsVersion::all() {
        for _ in 0..3 {
            let server = NatsServer::with(NatsOptions::durable(version)).await;
            let settings = Settings::jetstream().nats(&server).engine(&Engine::shared().await);
            let mut daemons: Vec<Daemon> = (0..3).map(|_| Daemon::spawn(&settings)).collect();
            for daemon in &mut daemons {
                daemon.wait_ready().await;
            }
            let warned: Vec<_> = daemons
                .iter()
                .map(|daemon| daemon.log().text())
                .filter(|log| log.contains("ERROR"))
                .collect();
            assert!(warned.is_empty(), "{warned:?}");
            assert_eq!(layout(&server.client().await).await.len(), 10);
        }
    }
}

/// What all consumers of the requests say together: held by workers, and delivered so far.
async fn held_and_delivered(ledger: &Ledger) -> (usize, u64) {
    let mut sums = (0, 0);
    for name in ["worker-spawners", "worker-spawners_high", "worker-spawners_low"] {
        let info = ledger.consumer_info(name).await;
        sums.0 += info.num_ack_pending;
        sums.1 += info.delivered.consumer_sequence;
    }
    sums
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_instance_holds_no_more_requests_than_it_has_slots() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world =
            World::durable_with(options, Engine::shared().await, &[("MAX_CONTAINERS", "1")]).await;
        let first = world.hold().await;
        let mut ids = Vec::new();
        for number in 0..20 {
            let (id, request) = world.complete(json!({"parameter": "echo quick"}));
            let subject = ["functions.execute", "functions.execute.high", "functions.execute.low"];
            world.ledger.publish_acked(subject[number % 3], &request, HeaderMap::new()).await;
            ids.push(id);
        }
        // One that came to each of the pulls that waited at other levels went back; nothing is asked
        // for any more.
        for _ in 0..20 {
            let (_, delivered) = held_and_delivered(&world.ledger).await;
            assert!(delivered <= 3, "{delivered} deliveries for one slot");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // Another instance gets all the others, while the first is still busy.
        let mut other = Daemon::spawn(&world.settings.clone().set("MAX_CONTAINERS", "2"));
        other.wait_ready().await;
        for id in &ids {
            let ended = world.ended(id).await;
            assert_eq!((ended.status(), ended.outcome["attempt"].as_u64()), ("succeeded", Some(1)));
        }
        assert!(world.results.of(&first.id).is_empty());
        world.release(&first).await;
        world.ended(&first.id).await;
        world.ledger.settled().await;
        let (_, delivered) = held_and_delivered(&world.ledger).await;
        assert!(delivered <= 31, "{delivered} deliveries of 21 requests");
        drop(other);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_request_is_given_up_that_nobody_has_tried() {
    for version in NatsVersion::all() {
        // One attempt each: a delivery that was for nothing would be the last. And one that was
        // lost would come back only after a while.
        let settings = [("MAX_CONTAINERS", "1"), ("MAX_DELIVER", "1"), ("ACK_WAIT", "20s")];
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        let mut ids = Vec::new();
        for round in 0..10 {
            // All levels at once, and at moments when the worker is idle or just about to be.
            for level in ["", ".high", ".low"] {
                let (id, request) = world.complete(json!({"parameter": "true"}));
                let subject = format!("functions.execute{level}");
                world.client.publish(subject, request.to_string().into()).await.unwrap();
                ids.push(id);
            }
            world.client.flush().await.unwrap();
            if round % 2 == 0 {
                world.ledger.settled().await;
            } else {
                tokio::time::sleep(Duration::from_millis(37 * round)).await;
            }
        }
        let begun = std::time::Instant::now();
        for id in &ids {
            let ended = world.ended(id).await;
            assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(30), "{took:?}: some were lost for a while");

        // The same among several, some of which are busy for longer than anybody keeps what came at
        // the wrong moment.
        let mut others = [Daemon::spawn(&world.settings), Daemon::spawn(&world.settings)];
        for other in &mut others {
            other.wait_ready().await;
        }
        let mut ids = Vec::new();
        for round in 0..10 {
            for level in [".low", "", ".high"] {
                let command = if round % 6 == 3 { "sleep 4" } else { "true" };
                let (id, request) = world.complete(json!({"parameter": command}));
                let subject = format!("functions.execute{level}");
                world.client.publish(subject, request.to_string().into()).await.unwrap();
                ids.push(id);
            }
            world.client.flush().await.unwrap();
            tokio::time::sleep(Duration::from_millis(100 * (round % 5))).await;
        }
        for id in &ids {
            let ended = world.ended(id).await;
            assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
            assert_eq!(ended.outcome["attempt"], 1, "{}", ended.outcome);
        }
        assert!(world.ledger.dead_letters().await.is_empty());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_takes_long_is_delivered_once() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world =
            World::durable_with(options, Engine::shared().await, &[("ACK_WAIT", "1s")]).await;
        let id = world.id();
        let events = world.events(&id).await;
        let ended = world.execute(json!({"id": id, "parameter": "sleep 5"})).await;
        assert_eq!((ended.status(), &ended.outcome["attempt"]), ("succeeded", &json!(1)));
        events.wait_for("ended").await;
        assert_eq!(events.states(), ["running", "ended"]);
        world.ledger.settled().await;
        assert_eq!(held_and_delivered(&world.ledger).await.1, 1);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_wait_for_a_daemon_across_the_servers_restart() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let mut world = World::durable_with(options, Engine::shared().await, &[]).await;
        world.daemon.signal(Signal::TERM);
        assert!(world.daemon.exit().await.success());
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(world.submit(json!({"parameter": "echo at last"})).await);
        }
        world.nats.terminate().await;
        world.nats.restart().await;
        world.daemon = Daemon::spawn(&world.settings);
        world.daemon.wait_ready().await;
        for id in &ids {
            let ended = world.ended(id).await;
            assert_eq!((ended.status(), ended.text().as_str()), ("succeeded", "at last\n"));
        }
        world.ledger.settled().await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_without_an_id_has_the_same_at_each_delivery() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world =
            World::durable_with(options, Engine::shared().await, &[("MAX_DELIVER", "3")]).await;
        // Nobody answers there: it is delivered three times.
        let image = format!("127.0.0.1:{}/any:1", free_port());
        let request = json!({"image_reference": image, "parameter": "true"});
        let ack = world.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
        let id = world.ledger.job_of(ack.sequence).await;
        let events = world.events(&id).await;
        let ended = world.ended(&id).await;
        assert_eq!((ended.code(), &ended.outcome["attempt"]), ("image.pull_failed", &json!(3)));
        events.wait_for("ended").await;
        world.ledger.settled().await;
        let records = world.ledger.messages(&format!("KV_{JOBS}")).await;
        assert_eq!(records.len(), 1, "one job: {records:?}");

        // The header's, or one that is made of it.
        for (given, kept) in [("given-by-header", true), ("what no id: may/be like", false)] {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Msg-Id", given);
            let (_, mut request) = world.complete(json!({"parameter": "true"}));
            request.as_object_mut().unwrap().remove("id");
            let ack = world.ledger.publish_acked("functions.execute", &request, headers).await;
            let id = world.ledger.job_of(ack.sequence).await;
            assert_eq!(world.ended(&id).await.status(), "succeeded");
            assert_eq!(id == given, kept, "{id}");
            world.engine.gone(&id).await;
        }
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stream_that_is_made_anew_does_not_repeat_ids() {
    let world = World::durable(&[]).await;
    let request = json!({"image_reference": world.image, "parameter": "echo once more"});
    let mut ids = Vec::new();
    for _ in 0..2 {
        let ack = world.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
        assert_eq!(ack.sequence, 1);
        let found = async {
            loop {
                let tally = world.ledger.tally().await;
                if let Some(new) = tally.keys().find(|id| !ids.contains(*id)) {
                    return new.clone();
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let id = within("a result of a job that is not known yet", PATIENCE, found).await;
        assert_eq!(world.ended(&id).await.text(), "once more\n");
        ids.push(id);
        world.ledger.settled().await;
        api(&world.client, &format!("STREAM.DELETE.{QUEUE}"), json!({})).await;
        let again = async || {
            let info = api(&world.client, &format!("STREAM.INFO.{QUEUE}"), json!({})).await;
            info.get("error").is_none()
        };
        eventually("the daemon makes the queue again", again).await;
    }
    for id in &ids {
        world.engine.gone(id).await;
    }
}

/// A subject for answers, and what comes there.
async fn inbox(client: &Client) -> (String, Results) {
    let inbox = client.new_inbox();
    let answers = Results::subscribe(client, &inbox).await;
    (inbox, answers)
}

async fn only_answer(answers: &Results) -> Value {
    answers.wait_for_count(1, PATIENCE).await;
    serde_json::from_slice(&answers.all()[0].payload).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_of_one_id_one_after_the_other_are_one_job() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &[]).await;
        let id = world.id();
        let events = world.events(&id).await;
        let first = world.execute(json!({"id": id, "parameter": "echo first"})).await;
        world.ledger.settled().await;
        // Another body, another priority, and where the answer goes: it is the same job.
        for priority in ["normal", "low", "low"] {
            let (reply_to, answers) = inbox(&world.client).await;
            let (_, request) = world.complete(json!({"id": id, "parameter": "echo second",
                "reply_to": reply_to, "priority": priority}));
            world.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
            let told = only_answer(&answers).await;
            assert_eq!(told, first.outcome, "what is recorded, at priority {priority}");
        }
        world.ledger.settled().await;
        assert_eq!(world.ledger.tally().await[&id], 1);
        let running = events.states().iter().filter(|state| *state == "running").count();
        assert_eq!(running, 1, "{:?}", events.all());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_of_one_id_at_once_are_one_job() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &[]).await;
        let mut other = Daemon::spawn(&world.settings);
        other.wait_ready().await;
        let id = world.id();
        let events = world.events(&id).await;
        let (first_reply, first) = inbox(&world.client).await;
        let job = world.hold_with(json!({"id": id, "reply_to": first_reply})).await;
        let mut others = Vec::new();
        for _ in 0..3 {
            let (reply_to, answers) = inbox(&world.client).await;
            let (_, request) = world.complete(held(json!({"id": id, "reply_to": reply_to})));
            world.ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
            others.push(answers);
        }
        assert_eq!(world.engine.containers_of(&id).await.len(), 1);
        world.release(&job).await;
        let outcome = only_answer(&first).await;
        assert_eq!(outcome["stdout"], "released\n", "{outcome}");
        world.ledger.settled().await;
        let running = events.states().iter().filter(|state| *state == "running").count();
        assert_eq!(running, 1, "{:?}", events.all());
        assert_eq!(world.ledger.tally().await[&id], 1);
        for answers in &others {
            assert_eq!(only_answer(answers).await, outcome, "each requester hears of it");
        }
        drop(other);
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_stream_answers_and_the_daemon_does_not() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &[]).await;
        let (reply, answers) = inbox(&world.client).await;
        let (id, request) = world.complete(json!({"parameter": "echo done"}));
        let publish =
            world.client.publish_with_reply("functions.execute", reply, request.to_string().into());
        publish.await.unwrap();
        let ack = only_answer(&answers).await;
        assert_eq!((&ack["stream"], &ack["seq"]), (&json!(QUEUE), &json!(1)), "{ack}");
        // The same message again is the same request.
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", "once");
        let offer = || async {
            let payload = request.to_string().into();
            world.ledger.offer("functions.execute", payload, headers.clone()).await.unwrap()
        };
        assert!(!offer().await.duplicate);
        assert!(offer().await.duplicate);
        world.ended(&id).await;
        world.ledger.settled().await;
        round_trip(&world.client).await;
        assert_eq!(answers.all().len(), 1, "{:?}", answers.all());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_for_an_answer_at_once_are_served_beside_a_queue() {
    for version in NatsVersion::all() {
        let settings = [("MAX_CONTAINERS", "1"), ("RUN_SLOT_TIMEOUT", "100ms")];
        let options = NatsOptions::durable(version);
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        let id = world.id();
        let events = world.events(&id).await;
        let outcome = world.run(json!({"id": id, "parameter": "echo at once"})).await;
        assert_eq!(outcome["stdout"], "at once\n", "{outcome}");
        events.wait_for("ended").await;
        assert_eq!(events.states(), ["running", "ended"]);
        assert_eq!(world.ledger.record(&id).await, None, "no request is kept, and no record");
        assert_eq!(header(&world.ledger.result(&id).await, "Job-Status").unwrap(), "succeeded");
        let job = world.hold().await;
        let outcome = world.run(json!({"parameter": "true"})).await;
        assert_eq!(outcome["error"]["code"], "busy", "{outcome}");
        world.release(&job).await;
        world.ended(&job.id).await;
        world.clean().await;
        let outcome = world.run(json!({"parameter": "true"})).await;
        assert_eq!(outcome["status"], "succeeded", "{outcome}");
        assert!(world.ledger.dead_letters().await.is_empty());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_insists_on_streams_waits_for_its_server() {
    for version in NatsVersion::all() {
        let engine = Engine::shared().await;
        let mut server = NatsServer::absent(NatsOptions::durable(version));
        let settings = Settings::jetstream().nats(&server).engine(&engine);
        let mut daemon = Daemon::spawn(&settings);
        server.hang_up(2).await;
        server.restart().await;
        daemon.wait_ready().await;
        assert_eq!(delivery_of(&daemon).await, "jetstream");
        let (id, ledger) = (format!("t{}", unique()), Ledger::new(&server.client().await));
        let image = engine.image(Image::Busybox).await;
        let request = json!({"id": id, "image_reference": image, "parameter": "echo patient"});
        ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
        assert_eq!(ledger.outcome(&id).await["stdout"], "patient\n");
        engine.gone(&id).await;

        // One that is told to end while it waits does.
        server.stop();
        let mut daemon = Daemon::spawn(&settings);
        daemon
            .log()
            .wait_for("it cannot connect", |line| message_of(line).contains("cannot connect"))
            .await;
        daemon.signal(Signal::TERM);
        assert!(daemon.exit().await.success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_takes_only_small_messages_is_served() {
    for version in NatsVersion::all() {
        let options = NatsOptions { max_payload: Some(4096), ..NatsOptions::durable(version) };
        let world = World::durable_with(options, Engine::shared().await, &[]).await;
        let ended = world.execute(json!({"parameter": "echo small"})).await;
        assert_eq!(ended.text(), "small\n");
        let ended = world.execute(json!({"parameter": "seq 1 5000"})).await;
        assert_eq!(ended.status(), "succeeded", "{}", ended.outcome);
        assert_eq!(ended.outcome["stdout_truncated"], true, "{}", ended.outcome);
        world.ledger.settled().await;
        assert!(!world.daemon.log().text().contains("panicked"), "{}", world.daemon.log().text());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_server_cannot_give_is_refused_by_name() {
    for version in NatsVersion::all() {
        let server = NatsServer::with(NatsOptions::durable(version)).await;
        let settings = Settings::jetstream().nats(&server).engine(&Engine::shared().await);
        for (setting, value) in [
            ("STREAM_REPLICAS", "3"),
            ("QUEUE_MAX_BYTES", "100GiB"),
            ("RESULTS_MAX_BYTES", "100GiB"),
        ] {
            let told = refusal(&settings.clone().set(setting, value)).await;
            assert!(told.contains(setting), "{version:?}, {setting}={value}: {told}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_does_not_wait_while_a_slot_is_free() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        // A busy machine may take long for each: there is a slot for all of them.
        let settings = [("MAX_CONTAINERS", "50")];
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        // For longer than a pull waits at the server, at all moments of its life and at all levels.
        let mut ids = Vec::new();
        for number in 0..50 {
            let (id, request) = world.complete(json!({"parameter": "true"}));
            let subject = ["functions.execute", "functions.execute.high", "functions.execute.low"];
            let subject = subject[if number % 7 < 5 { 0 } else { number % 3 }];
            world.ledger.publish_acked(subject, &request, HeaderMap::new()).await;
            ids.push(id);
            tokio::time::sleep(Duration::from_millis(530)).await;
        }
        let mut slow = Vec::new();
        for id in &ids {
            let outcome = world.ended(id).await.outcome;
            let waited = outcome["timings_ms"]["queue"].as_f64().unwrap();
            // A request that was missed waits for the next pull, five seconds, or for ACK_WAIT.
            if waited > 4500.0 {
                slow.push(format!("{id}: {waited} ms"));
            }
        }
        assert!(slow.is_empty(), "{version:?}: {slow:?}");
        world.ledger.settled().await;
        let (_, delivered) = held_and_delivered(&world.ledger).await;
        assert_eq!(delivered, 50, "each was delivered once");
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_queue_that_is_emptied_by_hand_does_no_harm() {
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        let settings = [("MAX_CONTAINERS", "1"), ("ACK_WAIT", "3s")];
        let world = World::durable_with(options, Engine::shared().await, &settings).await;
        let held = world.hold().await;
        let waits = world.submit(json!({"parameter": "true"})).await;
        let purged = api(&world.client, &format!("STREAM.PURGE.{QUEUE}"), json!({})).await;
        assert_eq!(purged["purged"], 2, "{purged}");
        tokio::time::sleep(Duration::from_secs(4)).await;
        world.release(&held).await;
        assert_eq!(world.ended(&held.id).await.text(), "released\n", "who runs is not stopped");
        let begun = std::time::Instant::now();
        world.works(2).await;
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(30), "{took:?}");
        assert_eq!(world.ledger.record(&waits).await, None, "who waited is gone");
        assert!(world.ledger.dead_letters().await.is_empty());
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_level_that_is_none_takes_no_requests() {
    let world = World::durable(&[]).await;
    let (_, request) = world.complete(json!({"parameter": "true"}));
    for subject in
        ["functions.execute.urgent", "functions.execute.HIGH", "functions.execute.high.er"]
    {
        let offered =
            world.ledger.offer(subject, request.to_string().into(), HeaderMap::new()).await;
        assert!(offered.is_err(), "{subject}: {offered:?}");
    }
}
