//! `ps`, `status`, `result`, `logs` and `cancel`.

use async_nats::HeaderMap;
use serde_json::json;

use super::{Client, HELD};
use crate::support::wait::eventually;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn jobs_are_listed_shown_and_cancelled() {
    let world = World::durable(&[]).await;
    let failed =
        world.execute(json!({"parameter": ["sh", "-c", "echo a; echo b >&2; exit 4"]})).await;
    let failed = failed.outcome["id"].as_str().unwrap().to_string();
    let held = world.hold().await;

    // What runs, what has ended, and either by name.
    let ids = async |line: &[&str]| {
        let ran = Client::of(&world, line).run().await;
        assert_eq!(ran.code, 0, "{ran:?}");
        let mut ids: Vec<String> =
            ran.json().iter().map(|job| job["id"].as_str().unwrap().to_string()).collect();
        ids.sort();
        ids
    };
    let mut both = vec![failed.clone(), held.id.clone()];
    both.sort();
    assert_eq!(ids(&["ps", "--json"]).await, std::slice::from_ref(&held.id));
    assert_eq!(ids(&["ps", "--json", "--all"]).await, both);
    assert_eq!(ids(&["ps", "--json", "--status", "failed"]).await, std::slice::from_ref(&failed));
    let table = Client::of(&world, &["ps"]).run().await.text();
    let (head, line) = table.split_once('\n').unwrap();
    assert_eq!(
        head.split_whitespace().collect::<Vec<_>>(),
        ["ID", "IMAGE", "STATE", "AGE", "WORKER"]
    );
    let cells: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(cells[..3], [held.id.as_str(), &world.image, "running"]);

    let status = Client::of(&world, &["status", &failed]).run().await;
    assert!(status.text().contains("exit_code              4\n"), "{status:?}");
    let status = Client::of(&world, &["status", "--json", &held.id]).run().await;
    assert_eq!(status.json()[0]["state"], "running");
    let unknown = Client::of(&world, &["status", "nobody-knows-it"]).run().await;
    assert_eq!(unknown.code, 1);
    assert!(unknown.stderr.contains("no record of nobody-knows-it"), "{unknown:?}");

    let early = Client::of(&world, &["result", &held.id]).run().await;
    assert_eq!(early.code, 1);
    assert!(early.stderr.contains("has not ended: it is running"), "{early:?}");

    let cancelled = Client::of(&world, &["cancel", &held.id, &failed]).run().await;
    let wanted = format!("{} is being stopped\n{failed} had ended already: failed\n", held.id);
    assert_eq!((cancelled.code, cancelled.text()), (1, wanted), "{cancelled:?}");
    assert_eq!(world.ended(&held.id).await.status(), "cancelled");
    let never = world.id();
    let cancelled = Client::of(&world, &["cancel", &never]).run().await;
    assert_eq!(cancelled.code, 0, "{cancelled:?}");
    assert!(cancelled.text().contains("will not start"), "{cancelled:?}");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_no_worker_has_met_is_counted() {
    let world = World::durable(&[("MAX_CONTAINERS", "1")]).await;
    let held = world.hold().await;
    let said = async |line: &[&str]| {
        let ran = Client::of(&world, line).run().await;
        assert_eq!((ran.code, ran.text().matches(&held.id).count()), (0, 1), "{ran:?}");
        ran.stderr
    };
    assert_eq!(said(&["ps"]).await, "", "nothing waits");
    let mut ids = Vec::new();
    for subject in ["functions.execute", "functions.execute.low", "functions.execute.low"] {
        let (id, request) = world.complete(json!({"parameter": ["true"]}));
        world.ledger.publish_acked(subject, &request, HeaderMap::new()).await;
        ids.push(id);
    }
    // Some may have been delivered and given back for want of a slot: there is no record of those.
    let counted = "worker-spawner: and 3 more wait in the queue, which holds 4 in all (high 0, normal 2, low 2)\n";
    // The server counts a little later than it accepts.
    eventually("they are counted", || async { said(&["ps"]).await == counted }).await;
    assert_eq!(said(&["ps", "--json"]).await, counted, "each line of JSON is a job");
    assert_eq!(said(&["ps", "--status", "running"]).await, "", "it is not asked for");
    world.release(&held).await;
    for id in ids {
        assert_eq!(world.ended(&id).await.status(), "succeeded");
    }
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn results_are_whole_however_large() {
    let world = World::durable(&[("OUTPUT_LIMIT", "64KiB")]).await;
    let small = world.execute(json!({"parameter": ["sh", "-c", "echo a; echo b >&2"]})).await;
    let id = small.outcome["id"].as_str().unwrap();
    let ran = Client::of(&world, &["result", id]).run().await;
    assert_eq!(ran.stdout, small.result.payload, "as the stream has it");
    assert_eq!(Client::of(&world, &["result", "--stream", "stderr", id]).run().await.text(), "b\n");
    let logs = Client::of(&world, &["logs", id]).run().await;
    assert_eq!((logs.text().as_str(), logs.stderr.as_str()), ("a\n", "b\n"));

    let print = "seq 1 300000 | head -c 1000000; echo b >&2";
    let large = world.execute(json!({"parameter": ["sh", "-c", print]})).await;
    let id = large.outcome["id"].as_str().unwrap();
    let all: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    let both = format!("{}b\n", &all[..1_000_000]);
    let ran = Client::of(&world, &["result", id]).run().await;
    assert!(ran.text() == both, "{} bytes: {}", ran.stdout.len(), ran.stderr);
    let logs = Client::of(&world, &["logs", "-f", id]).run().await;
    assert!(logs.stdout == all.as_bytes()[..1_000_000] && logs.stderr == "b\n", "{}", logs.stderr);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_follows_a_job_sees_it_to_its_end() {
    let world = World::durable(&[]).await;
    let id = world.id();
    let steps = "for i in 1 2 3; do while [ ! -e /tmp/$i ]; do sleep 0.1; done; echo step $i; done";
    world.submit(json!({"id": id, "parameter": ["sh", "-c", steps], "live_logs": true})).await;
    let container = world.engine.running(&id).await;
    let go = async |step: &str| {
        world.engine.exec(&container, &["touch", &format!("/tmp/{step}")]).await;
    };
    let first = Client::of(&world, &["logs", "-f", &id]).spawn();
    // It listens once it is asked for the record, and tells what comes from then on.
    go("1").await;
    let late = Client::of(&world, &["logs", "--follow", &id]).spawn();
    go("2").await;
    go("3").await;
    for ran in [first.end().await, late.end().await] {
        assert_eq!(ran.code, 0, "{ran:?}");
        let all = "step 1\nstep 2\nstep 3\n";
        let text = ran.text();
        assert!(all.ends_with(&text) && !text.is_empty(), "{ran:?}");
        assert_eq!(text == all, !ran.stderr.contains("came before"), "{ran:?}");
    }
    // Without live output there is only the end.
    let held = world.hold().await;
    let running = Client::of(&world, &["logs", "-f", &held.id]).spawn();
    let now = Client::of(&world, &["logs", &held.id]).run().await;
    assert!(now.code == 1 && now.stderr.contains("is running"), "{now:?}");
    world.release(&held).await;
    assert_eq!(running.end().await.text(), "released\n");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_streams_it_is_said_what_is_needed() {
    let world = World::start(&[]).await;
    for line in [
        &["ps"][..],
        &["status", "a"],
        &["result", "a"],
        &["logs", "-f", "a"],
        &["dead-letters", "list"],
        &["dead-letters", "redrive", "--all"],
    ] {
        let ran = Client::of(&world, line).run().await;
        assert_eq!((ran.code, ran.text().as_str()), (1, ""), "{line:?}: {ran:?}");
        assert!(ran.stderr.contains("needs JetStream, and NATS at "), "{line:?}: {ran:?}");
    }
    // Cancelling needs none.
    let id = world.id();
    let running = Client::of(&world, &super::script(&world, &id, HELD)).spawn();
    running.prints("begun\n").await;
    let cancelled = Client::of(&world, &["cancel", &id]).run().await;
    assert_eq!(cancelled.code, 0, "{cancelled:?}");
    let ran = running.end().await;
    assert_eq!(ran.code, 125, "somebody else cancelled it: {ran:?}");
    assert!(ran.stderr.contains("cancelled: job.cancelled: "), "{ran:?}");
    eventually("the container is gone", || async {
        world.engine.containers_of(&id).await.is_empty()
    })
    .await;
    world.clean().await;
}
