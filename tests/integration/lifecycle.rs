//! How a daemon ends, and what the next one finds.

use std::time::Duration;

use futures::future::join_all;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::support::daemon::Daemon;
use crate::support::engine::{INSTANCE_LABEL, job_of, label};
use crate::support::process::Signal;
use crate::support::proxy::{Flow, Proxy};
use crate::support::registry::{Access, Registry};
use crate::support::results::{Results, header};
use crate::support::wait::{PATIENCE, eventually};
use crate::support::world::{World, held};

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_idle_daemon_ends_when_asked() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut world = World::start(&[("SHUTDOWN_GRACE", "1h")]).await;
        world.works(2).await;
        world.daemon.signal(signal);
        let status = world.daemon.exit().await;
        assert_eq!(status.code(), Some(0), "{signal:?}: {}", world.daemon.log().text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_runs_is_finished_and_what_waits_is_given_back() {
    let mut world = World::start(&[("MAX_CONTAINERS", "2")]).await;
    let running = [world.hold().await, world.hold().await];
    let mut waiting = Vec::new();
    for _ in 0..5 {
        waiting.push(world.submit(json!({"parameter": "echo too late"})).await);
    }
    world.daemon.signal(Signal::TERM);
    for id in &waiting {
        let message = world.results.wait_for(id).await;
        assert_eq!(
            header(&message, "Job-Status").as_deref(),
            Some("error"),
            "{:?}",
            message.headers
        );
        assert_eq!(
            header(&message, "Job-Error").as_deref(),
            Some("worker.shutting_down"),
            "{:?}",
            message.headers
        );
    }
    // It takes nothing more, which the server knows once the daemon has said so.
    eventually("nobody listens any more", || refused(&world)).await;
    for held in &running {
        world.release(held).await;
    }
    let status = world.daemon.exit().await;
    assert_eq!(status.code(), Some(0), "{}", world.daemon.log().text());
    for held in &running {
        assert_eq!(world.results.wait_for(&held.id).await.payload, "released\n");
    }
    assert!(world.containers().await.is_empty(), "it cleans up before it goes");
    assert!(world.tally().values().all(|count| *count == 1), "{:?}", world.tally());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_that_comes_during_the_end_is_answered_or_refused() {
    // The NATS client library forgets a subscription once it has told the server so, and not when
    // the server has confirmed it: what is on its way just then is lost, mostly nothing and at
    // this rate ten or twenty. Anything that waits in the daemon would be many more.
    const UNDER_WAY: usize = 60;
    let mut world = World::start(&[("SHUTDOWN_GRACE", "5s"), ("MAX_CONTAINERS", "2")]).await;
    let inbox = world.client.new_inbox();
    let reply_prefix = inbox.clone();
    let answers = Results::subscribe(&world.client, &format!("{inbox}.*")).await;
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let ended = CancellationToken::new();
    let publisher = {
        let client = world.client.clone();
        let request = world.complete(json!({"parameter": "true"})).1;
        let ended = ended.clone();
        tokio::spawn(async move {
            let mut begun = Some(begun);
            let mut requests = 0;
            while !ended.is_cancelled() {
                let subject = ["functions.execute", "functions.run"][requests % 2];
                let reply = format!("{reply_prefix}.{requests}");
                let mut request = request.clone();
                request["id"] = json!(format!("{}-{requests}", request["id"].as_str().unwrap()));
                client
                    .publish_with_reply(subject, reply, request.to_string().into())
                    .await
                    .unwrap();
                requests += 1;
                if requests % 10 == 0 {
                    // A stream of them and not one burst, so that the end falls within; and no faster
                    // than a daemon reads that shares its processors with other tests.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                if requests == 200 {
                    begun.take().unwrap().send(()).unwrap();
                }
            }
            requests
        })
    };
    has_begun.await.unwrap();
    world.daemon.signal(Signal::TERM);
    // The server itself says so when nobody listens any more.
    let is_refused = |answer: &async_nats::Message| answer.status.is_some();
    eventually("a request is refused", || async { answers.all().iter().any(is_refused) }).await;
    ended.cancel();
    let requests = publisher.await.unwrap();
    assert_eq!(world.daemon.exit().await.code(), Some(0), "{}", world.daemon.log().text());
    // All that will come is in the server's hands: this comes after it.
    world.client.publish(format!("{inbox}.end"), "".into()).await.unwrap();
    let is_end = |answer: &async_nats::Message| answer.subject.ends_with(".end");
    eventually("the last answer", || async { answers.all().last().is_some_and(is_end) }).await;
    let lost = requests - (answers.all().len() - 1);
    assert!(lost <= UNDER_WAY, "{lost} of {requests} were neither answered nor refused");
    assert!(world.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_does_not_finish_in_time_is_stopped_and_told() {
    let mut world = World::start(&[("SHUTDOWN_GRACE", "2s"), ("STOP_GRACE", "1s")]).await;
    let polite = world.hold_with(json!({})).await;
    let stubborn = world
        .submit(json!({"parameter": ["sh", "-c", "trap '' TERM; echo stubborn; while :; do sleep 1; done"]}))
        .await;
    world.engine.running(&stubborn).await;
    world.daemon.signal(Signal::TERM);
    let status = world.daemon.exit().await;
    assert_eq!(status.code(), Some(0), "{}", world.daemon.log().text());
    for id in [&polite.id, &stubborn] {
        let message = world.results.wait_for(id).await;
        assert_eq!(
            header(&message, "Job-Status").as_deref(),
            Some("error"),
            "{:?}",
            message.headers
        );
        assert_eq!(
            header(&message, "Job-Error").as_deref(),
            Some("job.stopped"),
            "{:?}",
            message.headers
        );
    }
    assert!(world.containers().await.is_empty(), "it cleans up before it goes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_second_signal_is_obeyed_at_once() {
    for second in [Signal::TERM, Signal::INT] {
        let mut world = World::start(&[("SHUTDOWN_GRACE", "1h")]).await;
        let held = world.hold().await;
        world.daemon.signal(Signal::TERM);
        // Signals within 50 ms of each other are one request: the second comes after the first
        // has had its effect, and later than that.
        eventually("the first signal is being obeyed", || async { refused(&world).await }).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        world.daemon.signal(second);
        let status = world.daemon.exit().await;
        assert!(!status.success(), "work was given up: {status:?}");
        world.daemon = Daemon::spawn(&world.settings);
        world.daemon.wait_ready().await;
        world.engine.gone(&held.id).await;
        world.works(5).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_daemon_leaves_nothing_the_next_does_not_remove() {
    let mut world = World::start(&[]).await;
    let jobs = join_all((0..3).map(|_| world.hold())).await;
    world.daemon.crash().await;
    assert_eq!(world.containers().await.len(), 3, "they outlive it");
    world.daemon = Daemon::spawn(&world.settings);
    world.daemon.wait_ready().await;
    for held in &jobs {
        world.engine.gone(&held.id).await;
    }
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_killed_at_any_moment_leaves_nothing_for_good() {
    let mut world = World::start(&[]).await;
    // The moments: while containers are made, started, running, removed.
    for results in [0, 1, 3, 6, 10, 15] {
        let before = world.results.all().len();
        for _ in 0..20 {
            world.submit(json!({"parameter": "true"})).await;
        }
        world.results.wait_for_count(before + results, PATIENCE).await;
        world.crash_and_restart().await;
    }
    world.clean().await;
    world.works(5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_live_neighbours_containers_are_left_alone() {
    let neighbour = World::start(&[("REAP_INTERVAL", "1s")]).await;
    let theirs = neighbour.hold().await;
    // One that is not running yet or any more must not look abandoned either.
    let mut world = World::start(&[("REAP_INTERVAL", "1s")]).await;
    let ours = world.hold().await;
    let instances: Vec<String> = [&theirs, &ours]
        .iter()
        .map(|held| {
            let found = futures::executor::block_on(world.engine.containers_of(&held.id));
            label(&found[0], INSTANCE_LABEL).unwrap().to_string()
        })
        .collect();
    assert_ne!(instances[0], instances[1]);
    world.crash_and_restart().await;
    world.engine.gone(&ours.id).await;
    // By now the new daemon has looked at all there is at least once.
    neighbour.works(2).await;
    let left = neighbour.engine.containers_of(&theirs.id).await;
    assert_eq!(left.len(), 1, "the neighbour's is there");
    neighbour.release(&theirs).await;
    assert_eq!(neighbour.results.wait_for(&theirs.id).await.payload, "released\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_dead_neighbours_containers_are_removed_by_the_living() {
    let mut dead = World::start(&[]).await;
    let theirs = dead.hold().await;
    let living = World::start(&[("REAP_INTERVAL", "1s")]).await;
    assert_eq!(dead.engine.containers_of(&theirs.id).await.len(), 1, "not before it is dead");
    dead.daemon.crash().await;
    dead.engine.gone(&theirs.id).await;
    living.works(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_neighbour_that_stands_still_is_not_dead() {
    let still = World::start(&[]).await;
    let theirs = still.hold().await;
    still.daemon.signal(Signal::STOP);
    let busy = World::start(&[("REAP_INTERVAL", "200ms")]).await;
    // Each of these takes longer than a look at all containers.
    busy.works(5).await;
    busy.works(5).await;
    assert_eq!(still.engine.containers_of(&theirs.id).await.len(), 1, "it is there");
    still.daemon.signal(Signal::CONT);
    still.release(&theirs).await;
    assert_eq!(still.results.wait_for(&theirs.id).await.payload, "released\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_pull_that_does_not_end_does_not_keep_a_daemon() {
    let registry = Registry::start(Access::Anyone).await;
    registry.put("never", "1", "never");
    let proxy = Proxy::to(registry.port, Flow::Shut).await;
    let image = format!("127.0.0.1:{}/never:1", proxy.port);
    let mut world = World::start(&[("SHUTDOWN_GRACE", "1s")]).await;
    let _guard = world.engine.remove_later(&image);
    let id = world.submit(json!({"image_reference": image})).await;
    eventually("the engine asks for the image", || async { proxy.connections() > 0 }).await;
    world.daemon.signal(Signal::TERM);
    let status = world.daemon.exit().await;
    assert_eq!(status.code(), Some(0), "{}", world.daemon.log().text());
    let message = world.results.wait_for(&id).await;
    assert_eq!(header(&message, "Job-Status").as_deref(), Some("error"), "{:?}", message.headers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn containers_of_nobodys_are_not_touched() {
    let world = World::start(&[("REAP_INTERVAL", "1s")]).await;
    let foreign = world.engine.foreign_container().await;
    let ours = world.hold().await;
    world.release(&ours).await;
    world.engine.gone(&ours.id).await;
    let mut second = Daemon::spawn(&world.settings);
    second.wait_ready().await;
    world.works(5).await;
    let left = world.engine.docker().inspect_container(&foreign.id, None).await;
    assert!(left.is_ok(), "a container with labels of somebody else's is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_removed_from_outside_does_not_keep_its_slot() {
    let world = World::start(&[("MAX_CONTAINERS", "1"), ("MAX_DELIVER", "1")]).await;
    let id = world.submit(held(json!({}))).await;
    let container = world.engine.running(&id).await;
    let options =
        bollard::query_parameters::RemoveContainerOptions { force: true, ..Default::default() };
    world.engine.docker().remove_container(&container, Some(options)).await.unwrap();
    let message = world.results.wait_for(&id).await;
    let status = header(&message, "Job-Status").unwrap();
    assert_ne!(status, "succeeded", "{:?}", message.headers);
    world.works(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_killed_from_outside_is_reported_as_killed() {
    let world = World::start(&[]).await;
    let held = world.hold().await;
    world.engine.docker().kill_container(&held.container, None).await.unwrap();
    let message = world.results.wait_for(&held.id).await;
    assert_eq!(header(&message, "Job-Status").as_deref(), Some("failed"), "{:?}", message.headers);
    assert_eq!(header(&message, "Job-Exit-Code").as_deref(), Some("137"), "{:?}", message.headers);
    world.engine.gone(&held.id).await;
    assert!(world.engine.containers().await.iter().all(|left| job_of(left) != Some(&held.id)));
}

/// Whether the server says that nobody takes requests. One that was under way when the daemon
/// left may get no answer at all.
async fn refused(world: &World) -> bool {
    let (_, request) = world.complete(json!({"parameter": "true"}));
    let asked = world.client.request("functions.run", request.to_string().into());
    match tokio::time::timeout(Duration::from_secs(5), asked).await {
        Ok(answer) => {
            answer.is_err_and(|error| error.kind() == async_nats::RequestErrorKind::NoResponders)
        }
        Err(_) => false,
    }
}
