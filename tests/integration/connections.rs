//! Ways to a NATS server: every kind of proof of identity, encryption, servers that come and go.

use std::time::Duration;

use serde_json::json;

use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::Engine;
use crate::support::images::Image;
use crate::support::nats::{Auth, NatsOptions, NatsServer, round_trip};
use crate::support::process::{Signal, free_port};
use crate::support::results::Results;
use crate::support::wait::{PATIENCE, eventually};
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_daemon_gets_in_with_every_kind_of_proof() {
    for tls in [false, true] {
        for auth in [Auth::Open, Auth::UserPassword, Auth::Token, Auth::Nkey, Auth::Credentials] {
            let nats = NatsOptions { auth, tls, ..NatsOptions::default() };
            let world = World::with(nats, Engine::shared().await, &[("RUST_LOG", "debug")]).await;
            let ended = world.execute(json!({"parameter": "echo in"})).await;
            assert_eq!(ended.text(), "in\n", "{nats:?}: {}", ended.outcome);
            let log = world.daemon.log().text();
            for secret in world.nats.secrets() {
                assert!(!log.contains(&secret), "{nats:?}: the log shows a secret:\n{log}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_could_keep_the_requests_need_not() {
    let nats = NatsOptions { jetstream: true, ..NatsOptions::default() };
    let world = World::with(nats, Engine::shared().await, &[("DELIVERY", "core")]).await;
    assert_eq!(world.execute(json!({"parameter": "echo in passing"})).await.text(), "in passing\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_secret_in_the_url_works_and_is_not_shown() {
    let server =
        NatsServer::with(NatsOptions { auth: Auth::UserPassword, ..NatsOptions::default() }).await;
    let url = server
        .url()
        .replace("nats://", &format!("nats://worker:{}@", crate::support::nats::PASSWORD));
    let mut daemon = Daemon::spawn(&Settings::new().set("NATS_URL", &url).set("RUST_LOG", "debug"));
    daemon.wait_ready().await;
    daemon.signal(Signal::TERM);
    let status = daemon.exit().await;
    let log = daemon.log().text();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains(crate::support::nats::PASSWORD), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_comes_later_is_found_and_waiting_is_said_once() {
    let mut server = NatsServer::absent(NatsOptions::default());
    let mut daemon = Daemon::spawn(&Settings::new().nats(&server));
    let log = daemon.log().clone();
    let waiting = log.wait_for("it says that it waits", |event| event["level"] == "WARN").await;
    // What the log must not do is tell each of them.
    server.hang_up(6).await;
    let told = log.events().iter().filter(|event| event["level"] == "WARN").count();
    assert!(told <= 2, "{told} warnings, the first: {waiting}\n{}", log.text());
    server.restart().await;
    daemon.wait_ready().await;

    let client = server.client().await;
    let results = Results::subscribe(&client, "functions.results").await;
    let image = Engine::shared().await.image(Image::Busybox).await;
    let id = format!("late-{}", crate::support::unique());
    let request = json!({"id": id, "image_reference": image, "parameter": "echo found you"});
    client.publish("functions.execute", request.to_string().into()).await.unwrap();
    assert_eq!(results.wait_for(&id).await.payload, "found you\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_next_server_of_the_list_is_used_when_the_first_is_away() {
    let server = NatsServer::start().await;
    let urls = format!("nats://127.0.0.1:{}, {}", free_port(), server.url());
    let mut daemon = Daemon::spawn(&Settings::new().set("NATS_URL", &urls));
    daemon.wait_ready().await;
    daemon.signal(Signal::INT);
    assert_eq!(daemon.exit().await.code(), Some(0), "{}", daemon.log().text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn waiting_for_a_server_can_be_stopped() {
    let server = NatsServer::absent(NatsOptions::default());
    // It has nothing to finish, so that it may not take long either.
    let settings = Settings::new().nats(&server).set("SHUTDOWN_GRACE", "1h");
    let mut daemon = Daemon::spawn(&settings);
    let log = daemon.log().clone();
    log.wait_for("it says that it waits", |event| event["level"] == "WARN").await;
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().await.code(), Some(0), "{}", log.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_restarts_loses_no_running_job() {
    let mut world = World::start(&[]).await;
    let held = world.hold().await;
    world.nats.restart().await;
    // Both sides have to find back before the job ends: what is published while nobody listens is
    // nobody's loss but the test's.
    eventually("the daemon is back", || async {
        let (_, request) = world.complete(json!({"parameter": "true"}));
        let asked = world.client.request("functions.run", request.to_string().into());
        matches!(tokio::time::timeout(Duration::from_secs(10), asked).await, Ok(Ok(_)))
    })
    .await;
    world.release(&held).await;
    assert_eq!(world.results.wait_for(&held.id).await.payload, "released\n");
    world.works(5).await;
    let log = world.daemon.log().events();
    let told =
        log.iter().filter(|event| event["level"] == "WARN" || event["level"] == "ERROR").count();
    assert!(
        (1..=3).contains(&told),
        "the change is told, not every try:\n{}",
        world.daemon.log().text()
    );
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_ends_while_the_server_is_away_is_published_when_it_is_back() {
    let mut world = World::start(&[]).await;
    let held = world.hold().await;
    world.nats.stop();
    world.release(&held).await;
    eventually("the job has ended", || async {
        let inspected = world.engine.docker().inspect_container(&held.container, None).await;
        inspected.ok().and_then(|found| found.state).and_then(|state| state.running) != Some(true)
    })
    .await;
    // The test has to listen before the daemon is back: what is published while nobody listens is
    // lost to the test alone.
    world.daemon.signal(Signal::STOP);
    world.nats.restart().await;
    round_trip(&world.client).await;
    world.daemon.signal(Signal::CONT);
    let arrived = tokio::time::timeout(PATIENCE, world.results.wait_for(&held.id)).await;
    assert!(arrived.is_ok_and(|message| message.payload == "released\n"));
    world.works(2).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_stands_still_does_not_stop_the_clean_up() {
    let world = World::start(&[("PUBLISH_TIMEOUT", "2s")]).await;
    let held = world.hold().await;
    world.nats.pause();
    world.release(&held).await;
    world.engine.gone(&held.id).await;
    world.nats.resume();
    assert_eq!(world.results.wait_for(&held.id).await.payload, "released\n");
    world.works(5).await;
}
