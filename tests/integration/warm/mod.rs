//! Containers that wait for jobs: what a function sees of the difference, how many there are when, what
//! a function can do to the program that waited, and what becomes of them when something fails.

mod faults;
mod likeness;
mod pool;
mod safety;

use std::time::Duration;

use bollard::models::ContainerSummary;
use serde_json::{Value, json};

use crate::support::engine::Engine;
use crate::support::images::Image;
use crate::support::nats::NatsOptions;
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::world::{Ended, World};

/// A daemon with so many containers that wait for jobs of the busybox image, and these settings.
async fn warm_world(containers: usize, settings: &[(&str, &str)]) -> World {
    warm_world_on(Engine::shared().await, containers, settings).await
}

/// As [`warm_world`], on this engine.
async fn warm_world_on(engine: Engine, containers: usize, settings: &[(&str, &str)]) -> World {
    let (containers, image) = (containers.to_string(), Image::Busybox.name());
    let pool = [("WARM_CONTAINERS", containers.as_str()), ("WARM_IMAGES", &image)];
    World::with(NatsOptions::default(), engine, &[&pool, settings].concat()).await
}

/// A daemon none of whose containers waits.
async fn cold_world(settings: &[(&str, &str)]) -> World {
    World::start(&[&[("WARM_CONTAINERS", "0")], settings].concat()).await
}

fn is_warm(ended: &Ended) -> bool {
    ended.outcome["start"] == "warm"
}

/// Runs `request` until it has started warm: the first ones make its kind known, and one may come
/// before there is a container for it.
async fn run_warm(world: &World, request: &Value) -> Ended {
    within("a job starts warm", 2 * PATIENCE, async {
        loop {
            let ended = world.execute(request.clone()).await;
            if is_warm(&ended) {
                return ended;
            }
            assert_eq!(ended.outcome["start"], "cold", "it never ran: {}", ended.outcome);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
    .await
}

/// The containers that wait, or were started to, of the image with this id or name.
async fn waiting(world: &World, image: &str) -> Vec<ContainerSummary> {
    let id = world.engine.docker().inspect_image(image).await.unwrap().id;
    let mut idle = world.idle().await;
    idle.retain(|container| container.image_id == id && is_running(container));
    idle
}

fn is_running(container: &ContainerSummary) -> bool {
    container.status.as_deref().is_some_and(|status| status.starts_with("Up"))
}

/// Waits until exactly `count` containers wait.
async fn wait_for_waiting(world: &World, count: usize) {
    eventually(&format!("{count} containers wait"), || async {
        let idle = world.idle().await;
        idle.len() == count && idle.iter().all(is_running)
    })
    .await;
}

fn shell(script: &str) -> Value {
    json!({"parameter": ["sh", "-c", script]})
}
