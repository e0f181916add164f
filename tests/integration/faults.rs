//! Engines that are absent, stop, die and freeze. Each test has an engine of its own.

use serde_json::json;

use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::PrivateEngine;
use crate::support::images::Image;
use crate::support::nats::{NatsOptions, NatsServer};
use crate::support::process::Signal;
use crate::support::results::{Results, header};
use crate::support::world::{World, held, listening};

async fn world_on(private: &PrivateEngine, settings: &[(&str, &str)]) -> World {
    World::with(NatsOptions::default(), private.engine().await, settings).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_wait_for_an_engine_that_comes_later() {
    let mut private = PrivateEngine::start().await;
    let image = private.engine().await.image(Image::Busybox).await;
    private.stop().await;
    let server = NatsServer::start().await;
    let client = server.client().await;
    let results = Results::subscribe(&client, "functions.results").await;
    let settings = Settings::new().nats(&server).set("DOCKER_HOST", &private.host());
    let mut daemon = Daemon::spawn(&settings);
    listening(&client).await;
    for n in 0..8 {
        let request = json!({"id": format!("early-{n}"), "image_reference": image, "parameter": "echo worth it"});
        client.publish("functions.execute", request.to_string().into()).await.unwrap();
    }
    let log = daemon.log().clone();
    log.wait_for("it says that the engine is away", |event| event["level"] == "WARN").await;
    private.restart().await;
    for n in 0..8 {
        let message = results.wait_for(&format!("early-{n}")).await;
        assert_eq!(message.payload, "worth it\n", "{:?}", message.headers);
    }
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().await.code(), Some(0), "{}", log.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_without_an_engine_can_be_stopped() {
    let private = PrivateEngine::absent().await;
    let server = NatsServer::start().await;
    let settings = Settings::new()
        .nats(&server)
        .set("DOCKER_HOST", &private.host())
        // What has not begun is given back at once, however long running jobs may take.
        .set("SHUTDOWN_GRACE", "1h");
    let client = server.client().await;
    let results = Results::subscribe(&client, "functions.results").await;
    let mut daemon = Daemon::spawn(&settings);
    listening(&client).await;
    let request = json!({"id": "in-vain", "image_reference": "any", "parameter": "true"});
    client.publish("functions.execute", request.to_string().into()).await.unwrap();
    crate::support::nats::round_trip(&client).await;
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().await.code(), Some(0), "{}", daemon.log().text());
    let message = results.wait_for("in-vain").await;
    assert_eq!(header(&message, "Job-Status").as_deref(), Some("error"), "{:?}", message.headers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_an_engine_takes_down_with_it_is_run_again() {
    for graceful in [true, false] {
        let mut private = PrivateEngine::start().await;
        let world = world_on(&private, &[("MAX_CONTAINERS", "2")]).await;
        let id = world.submit(held(json!({}))).await;
        let first = world.engine.running(&id).await;
        if graceful {
            private.stop().await;
        } else {
            private.kill().await;
        }
        private.restart().await;
        // The engine's own restart ends the old container; the daemon's new one is the second.
        let second = loop {
            let container = world.engine.running(&id).await;
            if container != first {
                break container;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        };
        world.engine.exec(&second, &["touch", "/tmp/go"]).await;
        let message = world.results.wait_for(&id).await;
        assert_eq!(message.payload, "released\n", "graceful: {graceful}: {:?}", message.headers);
        assert_eq!(header(&message, "Job-Status").as_deref(), Some("succeeded"));
        let attempt: u32 = header(&message, "Job-Attempt").unwrap().parse().unwrap();
        assert!(attempt >= 2, "graceful: {graceful}: it says that it took {attempt} attempts");
        world.works(2).await;
        world.clean().await;
        assert!(world.tally().values().all(|count| *count == 1), "{:?}", world.tally());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_has_no_attempt_left_says_what_failed_it() {
    let mut private = PrivateEngine::start().await;
    let world = world_on(&private, &[("MAX_CONTAINERS", "1"), ("MAX_DELIVER", "1")]).await;
    let held = world.hold().await;
    private.kill().await;
    private.restart().await;
    let message = world.results.wait_for(&held.id).await;
    assert_eq!(header(&message, "Job-Status").as_deref(), Some("error"), "{:?}", message.headers);
    let code = header(&message, "Job-Error").unwrap();
    assert!(code.starts_with("engine."), "{:?}", message.headers);
    assert_eq!(header(&message, "Job-Attempt").as_deref(), Some("1"));
    world.works(1).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_engine_holds_nobody_for_ever() {
    let private = PrivateEngine::start().await;
    let world = world_on(
        &private,
        &[("MAX_CONTAINERS", "2"), ("ENGINE_TIMEOUT", "2s"), ("MAX_DELIVER", "2")],
    )
    .await;
    world.works(2).await;
    let running = world.hold().await;
    private.freeze();
    let mut stuck = Vec::new();
    for _ in 0..3 {
        stuck.push(world.submit(json!({"parameter": "echo after all"})).await);
    }
    let log = world.daemon.log().clone();
    log.wait_for("it notices", |event| event["level"] == "WARN" || event["level"] == "ERROR").await;
    private.thaw();
    for id in &stuck {
        let message = world.results.wait_for(id).await;
        let status = header(&message, "Job-Status").unwrap();
        let code = header(&message, "Job-Error").unwrap_or_default();
        // Those that waited run now; those that were in the engine's hands may have run out of
        // attempts.
        let known = ["engine.timeout", "engine.unavailable"].contains(&code.as_str());
        assert!(status == "succeeded" || (status == "error" && known), "{:?}", message.headers);
    }
    // The job that ran through it all is untouched or was run again; either way it can end.
    if world.results.of(&running.id).is_empty() {
        for container in world.engine.containers_of(&running.id).await {
            world.engine.exec(&container.id.unwrap(), &["touch", "/tmp/go"]).await;
        }
    }
    world.results.wait_for(&running.id).await;
    world.works(2).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_engine_that_stays_frozen_ends_no_daemon_and_no_shutdown() {
    let private = PrivateEngine::start().await;
    let mut world = world_on(
        &private,
        &[("ENGINE_TIMEOUT", "1s"), ("MAX_DELIVER", "2"), ("SHUTDOWN_GRACE", "3s")],
    )
    .await;
    let running = world.hold().await;
    private.freeze();
    let waiting = world.submit(json!({"parameter": "true"})).await;
    world.daemon.signal(Signal::TERM);
    let status = world.daemon.exit().await;
    private.thaw();
    assert!(status.code().is_some(), "it ended by itself: {status:?}");
    for id in [&running.id, &waiting] {
        let message = world.results.wait_for(id).await;
        assert_eq!(
            header(&message, "Job-Status").as_deref(),
            Some("error"),
            "{:?}",
            message.headers
        );
    }
    world.daemon = Daemon::spawn(&world.settings);
    world.daemon.wait_ready().await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_engine_that_comes_and_goes_costs_no_slot() {
    let mut private = PrivateEngine::start().await;
    let world = world_on(&private, &[("MAX_CONTAINERS", "3"), ("MAX_DELIVER", "20")]).await;
    let mut ids = Vec::new();
    for round in 0..3 {
        for _ in 0..6 {
            ids.push(world.submit(json!({"parameter": "echo done"})).await);
        }
        if round % 2 == 0 {
            private.kill().await;
        } else {
            private.stop().await;
        }
        private.restart().await;
    }
    for id in &ids {
        let message = world.results.wait_for(id).await;
        assert_eq!(message.payload, "done\n", "{:?}", message.headers);
    }
    world.works(3).await;
    world.clean().await;
    assert!(world.tally().values().all(|count| *count == 1), "{:?}", world.tally());
}
