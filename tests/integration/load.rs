//! Many at once: nothing lost, nothing twice, and what does not fit is said not to.

use std::collections::HashMap;

use futures::future::join_all;
use serde_json::json;

use crate::support::daemon::message_of;
use crate::support::long;
use crate::support::nats::round_trip;
use crate::support::process::Signal;
use crate::support::results::header;
use crate::support::wait::PATIENCE;
use crate::support::world::{MANY, World};

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn three_hundred_programs_that_end_at_once_lose_no_output() {
    let world = World::start(&[("MAX_CONTAINERS", "8")]).await;
    let ids: Vec<String> = (0..300).map(|_| world.id()).collect();
    for (n, id) in ids.iter().enumerate() {
        let (_, request) =
            world.complete(json!({"id": id, "parameter": ["echo", format!("output {n}")]}));
        world.client.publish("functions.execute", request.to_string().into()).await.unwrap();
    }
    world.results.wait_for_count(300, MANY).await;
    world.clean().await;
    let tally = world.tally();
    for (n, id) in ids.iter().enumerate() {
        assert_eq!(tally.get(id), Some(&1), "job {n} has one result");
    }
    let wrong: Vec<String> = ids
        .iter()
        .enumerate()
        .filter_map(|(n, id)| {
            let message = world.results.of(id).remove(0);
            let right = message.payload == format!("output {n}\n")
                && header(&message, "Job-Status").as_deref() == Some("succeeded");
            (!right).then(|| format!("{n}: {:?} {:?}", message.payload, message.headers))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of 300 went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_burst_of_ten_thousand_is_received_whole() {
    const BURST: usize = 10_000;
    let mut world = World::start(&[("MAX_CONTAINERS", "5")]).await;
    let mut ids = Vec::with_capacity(BURST);
    for _ in 0..BURST {
        let (id, request) = world.complete(json!({"parameter": "true"}));
        world.client.publish("functions.execute", request.to_string().into()).await.unwrap();
        ids.push(id);
    }
    round_trip(&world.client).await;
    if long() {
        world.results.wait_for_count(BURST, std::time::Duration::from_secs(3 * 3600)).await;
    } else {
        // Enough to know that work goes on while the rest waits.
        world.results.wait_for_count(20, PATIENCE).await;
        assert!(world.containers().await.len() <= 5);
    }
    world.daemon.signal(Signal::TERM);
    let status = world.daemon.exit().await;
    assert_eq!(status.code(), Some(0));
    world.results.wait_for_count(BURST, PATIENCE).await;
    round_trip(&world.client).await;
    let tally = world.tally();
    let wrong: Vec<&String> = ids.iter().filter(|id| tally.get(*id) != Some(&1)).collect();
    assert!(wrong.is_empty(), "{} of {BURST} have not exactly one result", wrong.len());
    let mut ends: HashMap<(String, String), usize> = HashMap::new();
    for message in world.results.all() {
        let end = (
            header(&message, "Job-Status").unwrap(),
            header(&message, "Job-Error").unwrap_or_default(),
        );
        *ends.entry(end).or_default() += 1;
    }
    let succeeded = ends.remove(&("succeeded".into(), String::new())).unwrap_or_default();
    let stopped = ends.remove(&("error".into(), "worker.shutting_down".into())).unwrap_or_default();
    assert_eq!(succeeded + stopped, BURST, "other ends: {ends:?}");
    assert!(succeeded >= 20);
    if long() {
        assert_eq!(succeeded, BURST);
    }
    assert!(world.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_the_buffer_cannot_hold_is_refused_and_said_once() {
    let settings = [("MAX_CONTAINERS", "1"), ("BUFFER_MESSAGES", "10")];
    let world = World::start(&settings).await;
    let held = world.hold().await;
    let mut ids = Vec::new();
    for _ in 0..60 {
        ids.push(world.submit(json!({"parameter": "echo through"})).await);
    }
    // Those that did not fit are answered at once, while nothing else moves.
    world.results.wait_for_count(40, PATIENCE).await;
    for message in world.results.all() {
        assert_eq!(header(&message, "Job-Status").as_deref(), Some("error"));
        assert_eq!(header(&message, "Job-Error").as_deref(), Some("buffer.full"));
    }
    world.release(&held).await;
    world.results.wait_for_count(61, MANY).await;
    let tally = world.tally();
    assert!(ids.iter().all(|id| tally.get(id) == Some(&1)), "each has one result: {tally:?}");
    let through =
        world.results.all().iter().filter(|message| message.payload == "through\n").count();
    assert!((10..=12).contains(&through), "{through} of 60 fit into 10 places and the hands");
    let told: Vec<String> = world
        .daemon
        .log()
        .events()
        .iter()
        .filter(|event| {
            event["level"] == "WARN" && message_of(event).to_lowercase().contains("buffer")
        })
        .map(ToString::to_string)
        .collect();
    assert_eq!(told.len(), 1, "one episode, one warning: {told:?}");
    world.works(1).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_waits_is_counted_in_bytes_as_well() {
    let settings = [("MAX_CONTAINERS", "1"), ("BUFFER_BYTES", "1MiB")];
    let world = World::start(&settings).await;
    let held = world.hold().await;
    let weight = "x".repeat(300_000);
    for _ in 0..10 {
        world.submit(json!({"parameter": "wc -c", "stdin": weight})).await;
    }
    world.results.wait_for_count(5, PATIENCE).await;
    world.release(&held).await;
    world.results.wait_for_count(11, MANY).await;
    let through = world
        .results
        .all()
        .iter()
        .filter(|message| message.payload.trim_ascii() == b"300000")
        .count();
    assert!(
        (3..=5).contains(&through),
        "{through} of 10 fit into three times their weight and the hands"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn good_bad_and_slow_requests_do_not_get_in_each_others_way() {
    let world = World::start(&[("MAX_CONTAINERS", "6")]).await;
    let held = world.hold().await;
    let jobs = (0..30).map(|n| {
        let world = &world;
        async move {
            match n % 5 {
                0 => assert_eq!(
                    world.execute(json!({"parameter": "echo good"})).await.text(),
                    "good\n"
                ),
                1 => assert_eq!(world.execute(json!({"parameter": 7})).await.status(), "rejected"),
                2 => assert_eq!(
                    world.execute(json!({"parameter": "no-such-program"})).await.status(),
                    "rejected"
                ),
                3 => assert_eq!(
                    world.execute(json!({"parameter": "false"})).await.exit_code(),
                    Some(1)
                ),
                _ => {
                    let slow =
                        world.execute(json!({"parameter": "sleep 100", "timeout_ms": 500})).await;
                    assert_eq!(slow.status(), "timed_out", "{}", slow.outcome);
                }
            }
        }
    });
    join_all(jobs).await;
    world.release(&held).await;
    assert_eq!(world.results.wait_for(&held.id).await.payload, "released\n");
    world.clean().await;
}
