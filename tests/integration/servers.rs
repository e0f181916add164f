//! What the other tests rely on: the servers and the daemon they are given do what they say.

use std::time::Duration;

use async_nats::jetstream::{self, stream};
use serde_json::{Value, json};

use crate::support::daemon::Settings;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_daemon_does_nothing_until_it_thaws() {
    let world = World::start(&[]).await;
    world.daemon.freeze();
    let id = world.submit(json!({"parameter": "echo at last"})).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(world.results.of(&id).is_empty());
    world.daemon.thaw();
    assert_eq!(world.results.wait_for(&id).await.payload, "at last\n");
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
