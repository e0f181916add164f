//! What the other tests rely on: the servers and the daemon they are given do what they say.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer, object_store, stream};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::support::daemon::Settings;
use crate::support::engine::Engine;
use crate::support::jetstream::{self as kept, Events, Ledger};
use crate::support::nats::{NatsOptions, NatsServer, NatsVersion, Store};
use crate::support::wait::{PATIENCE, within};
use crate::support::world::World;

const SUBJECT: &str = "kept.here";

/// A stream in files on `server`, and a context that soon gives up.
async fn stream_on(server: &NatsServer) -> jetstream::Context {
    let mut context = jetstream::new(server.client().await);
    context.set_timeout(Duration::from_secs(5));
    let config = stream::Config {
        name: "kept".into(),
        subjects: vec![SUBJECT.into()],
        storage: stream::StorageType::File,
        ..stream::Config::default()
    };
    context.get_or_create_stream(config).await.unwrap();
    context
}

/// Stores one message.
async fn store(context: &jetstream::Context, text: &'static str) -> Result<u64, String> {
    let acknowledged = context.publish(SUBJECT, text.into()).await.unwrap().await;
    acknowledged.map(|ack| ack.sequence).map_err(|error| error.to_string())
}

/// How many messages there are.
async fn stored(server: &NatsServer) -> u64 {
    let context = jetstream::new(server.client().await);
    context.get_stream("kept").await.unwrap().cached_info().state.messages
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn there_is_a_server_of_each_version() {
    let version = |server: &NatsServer| {
        let log = server.log();
        let (_, rest) = log.split_once("Version:").unwrap();
        rest.split_whitespace().next().unwrap().to_string()
    };
    let mut versions = Vec::new();
    for wanted in NatsVersion::all() {
        let server = NatsServer::with(NatsOptions::durable(wanted)).await;
        versions.push(version(&server));
        store(&stream_on(&server).await, "whoever you are").await.unwrap();
    }
    eprintln!("NATS servers: {versions:?}");
    if let Some(current) = versions.get(1) {
        let numbers: Vec<u32> = current.split('.').map_while(|part| part.parse().ok()).collect();
        assert!(numbers >= vec![2, 10, 23], "{current} is not current");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_can_be_told_to_write_at_once() {
    let Some(version) = NatsVersion::current() else { return };
    for sync_always in [false, true] {
        let options = NatsOptions { sync_always, monitor: true, ..NatsOptions::durable(version) };
        let server = NatsServer::with(options).await;
        let told = &server.monitored("varz").await["jetstream"]["config"]["sync_always"];
        assert_eq!(*told == Value::Bool(true), sync_always, "{told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_was_stored_is_there_after_each_kind_of_end() {
    for version in NatsVersion::all() {
        let mut server = NatsServer::with(NatsOptions::durable(version)).await;
        store(&stream_on(&server).await, "before any").await.unwrap();
        server.terminate().await;
        server.restart().await;
        assert_eq!(stored(&server).await, 1, "{version:?}: terminated");
        server.stop();
        server.restart().await;
        assert_eq!(stored(&server).await, 1, "{version:?}: killed");
        server.lame_duck();
        server.ended().await;
        assert!(server.log().contains("lame duck mode"), "{}", server.log());
        server.restart().await;
        assert_eq!(stored(&server).await, 1, "{version:?}: lame duck");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_paused_server_goes_on_where_it_was() {
    let server = NatsServer::with(NatsOptions::durable(NatsVersion::Installed)).await;
    let context = stream_on(&server).await;
    server.pause();
    let mut late = tokio::spawn(async move { store(&context, "late").await });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut late).await;
    assert!(early.is_err(), "a paused server answered: {early:?}");
    server.resume();
    assert_eq!(within("the acknowledgement", PATIENCE, late).await.unwrap(), Ok(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_disk_takes_nothing_and_loses_nothing() {
    for version in NatsVersion::all() {
        let options =
            NatsOptions { store: Store::Tmpfs(16 << 20), ..NatsOptions::durable(version) };
        let mut server = NatsServer::with(options).await;
        let context = stream_on(&server).await;
        assert_eq!(store(&context, "in time").await, Ok(1));
        server.fill_disk();
        // What is left of the last block takes a few.
        let mut taken = 1;
        while store(&context, "too late").await.is_ok() {
            taken += 1;
            assert!(taken < 10_000, "{version:?}: there is always room for more");
        }
        server.free_disk();
        server.restart().await;
        assert_eq!(stored(&server).await, taken, "{version:?}: {}", server.log());
        store(&stream_on(&server).await, "again").await.unwrap();
    }
}

/// What the daemon would have made.
async fn kept_on(context: &jetstream::Context) {
    let keep = async |name: &str, subject: &str, config: stream::Config| {
        let subjects = vec![subject.to_string()];
        let config = stream::Config { name: name.into(), subjects, ..config };
        context.create_stream(config).await.unwrap();
    };
    let until_settled = stream::Config {
        retention: stream::RetentionPolicy::WorkQueue,
        ..stream::Config::default()
    };
    keep(kept::QUEUE, "functions.execute", until_settled).await;
    keep(kept::RESULTS, "functions.results", stream::Config::default()).await;
    keep(kept::DEAD_LETTERS, "functions.dead_letters", stream::Config::default()).await;
    // The library's own way to make a bucket fails on 2.9.
    let last_of_each = stream::Config { max_messages_per_subject: 1, ..stream::Config::default() };
    keep(&format!("KV_{}", kept::JOBS), &format!("$KV.{}.>", kept::JOBS), last_of_each).await;
    let objects =
        object_store::Config { bucket: kept::OBJECTS.into(), ..object_store::Config::default() };
    context.create_object_store(objects).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_ledger_shows_what_the_streams_hold() {
    for version in NatsVersion::all() {
        let server = NatsServer::with(NatsOptions::durable(version)).await;
        let client = server.client().await;
        let (context, ledger) = (jetstream::new(client.clone()), Ledger::new(&client));
        kept_on(&context).await;

        // Requests: one taken, one left.
        for number in 1..=2 {
            let request = json!({"number": number});
            let ack = ledger.publish_acked("functions.execute", &request, HeaderMap::new()).await;
            assert_eq!((ack.stream.as_str(), ack.sequence), (kept::QUEUE, number));
        }
        let stream = context.get_stream(kept::QUEUE).await.unwrap();
        let durable = consumer::pull::Config {
            durable_name: Some("workers".into()),
            ..consumer::pull::Config::default()
        };
        let consumer = stream.create_consumer(durable).await.unwrap();
        let mut taken = consumer.fetch().max_messages(1).messages().await.unwrap();
        taken.next().await.unwrap().unwrap().double_ack().await.unwrap();
        assert_eq!(ledger.queue_messages().await, 1);
        assert_eq!(ledger.messages(kept::QUEUE).await[0].payload, r#"{"number":2}"#);
        let info = ledger.consumer_info("workers").await;
        assert_eq!((info.num_pending, info.delivered.consumer_sequence), (1, 1));
        stream.purge().await.unwrap();
        ledger.settled().await;

        // Results and dead letters: of several jobs, in the order in which they came.
        for (subject, id) in
            [("results", "a"), ("results", "b"), ("results", "a"), ("dead_letters", "b")]
        {
            let mut headers = HeaderMap::new();
            headers.insert("Job-Id", id);
            let stored = ledger.offer(&format!("functions.{subject}"), id.into(), headers).await;
            stored.unwrap();
        }
        let bodies: Vec<_> =
            ledger.results().await.into_iter().map(|result| result.payload).collect();
        assert_eq!(bodies, ["a", "b", "a"]);
        assert_eq!(ledger.tally().await, [("a".to_string(), 2), ("b".to_string(), 1)].into());
        assert_eq!(ledger.result("b").await.payload, "b");
        assert_eq!(ledger.dead_letters().await.len(), 1);
        assert_eq!(ledger.dead_letter("b").await.subject.as_str(), "functions.dead_letters");
        assert!(ledger.offer("nobody.keeps.this", "".into(), HeaderMap::new()).await.is_err());

        // Records and objects.
        assert_eq!(ledger.record("a").await, None);
        let record = json!({"id": "a", "state": "ended", "status": "succeeded", "sequence": 7});
        let bucket = context.get_key_value(kept::JOBS).await.unwrap();
        bucket.put("a", record.to_string().into()).await.unwrap();
        assert_eq!(ledger.record("a").await, Some(record));
        assert_eq!(ledger.outcome("a").await, json!({"id": "a", "status": "succeeded"}));
        assert_eq!(ledger.job_of(7).await, "a");
        let objects = context.get_object_store(kept::OBJECTS).await.unwrap();
        objects.put("a/stdout", &mut &b"all of it"[..]).await.unwrap();
        assert_eq!(ledger.object("a/stdout").await.unwrap(), b"all of it");
        assert_eq!(ledger.object("b/stdout").await, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn events_are_collected_in_order() {
    const AT: &str = "2030-01-31T12:00:00Z";
    let server = NatsServer::start().await;
    let client = server.client().await;
    let events = Events::of(&client, "a").await;
    for (id, state) in [("a", "running"), ("b", "queued"), ("a", "ended")] {
        let event = json!({"id": id, "state": state, "updated_at": AT});
        client.publish(format!("functions.events.{id}"), event.to_string().into()).await.unwrap();
    }
    let ended = json!({"id": "a", "state": "ended", "updated_at": AT});
    assert_eq!(events.wait_for("ended").await, ended);
    assert_eq!(events.states(), ["running", "ended"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_daemon_does_nothing_until_it_thaws() {
    let world = World::durable(&[]).await;
    world.daemon.freeze();
    let id = world.submit(json!({"parameter": "echo at last"})).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((world.ledger.record(&id).await, world.ledger.queue_messages().await), (None, 1));
    world.daemon.thaw();
    assert_eq!(world.ended(&id).await.text(), "at last\n");
    let (now, most) = (world.daemon.rss_bytes(), world.daemon.peak_memory());
    assert!(now > 1 << 20 && now <= most, "{now} of {most} bytes");
}

#[test]
fn settings_name_each_point_of_failure() {
    let settings = Settings::jetstream().failpoint("job.claimed", 1).failpoint("record.written", 3);
    let named = settings.get("WORKER_SPAWNER_FAILPOINTS");
    assert_eq!(named, Some("job.claimed=1,record.written=3"));
    assert_eq!(settings.get("DELIVERY"), Some("jetstream"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_durable_world_takes_jobs_to_their_ends() {
    for version in NatsVersion::all() {
        let nats = NatsOptions::durable(version);
        let world = World::durable_with(nats, Engine::shared().await, &[]).await;
        let ended = world.execute(json!({"parameter": "echo kept"})).await;
        assert_eq!(ended.text(), "kept\n");
        let id = world.id();
        let events = world.events(&id).await;
        world.submit(json!({"id": id, "parameter": "echo submitted"})).await;
        assert_eq!(world.ended(&id).await.text(), "submitted\n");
        events.wait_for("ended").await;
        let refused = world.execute_raw("no request".into(), HeaderMap::new()).await;
        assert_eq!(refused.code(), "request.invalid_json");
        world.ledger.settled().await;
    }
}
