//! One fault each, and what must hold through it: a job that was accepted ends once.
//!
//! In every test the daemons run with a short ACK_WAIT, so that what a worker lets go of is soon
//! delivered to another one.

use std::time::Duration;

use async_nats::HeaderMap;
use futures::future::join_all;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::support::engine::{Engine, PrivateEngine};
use crate::support::fleet::{Fleet, Once, server_version};
use crate::support::long;
use crate::support::nats::{NatsOptions, NatsServer, NatsVersion, Store};
use crate::support::process::Signal;
use crate::support::proxy::Flow;
use crate::support::streams::{
    ADVISORIES, CONSUMERS, DEAD_LETTERS, EXECUTE, QUEUE, RESULTS, header,
};
use crate::support::wait::{PATIENCE, eventually, eventually_within, within};
use crate::support::world::MANY;

/// A fault that lasts longer than any worker may be silent.
const PAST_ACK_WAIT: Duration = Duration::from_secs(5);
/// For tests in which nothing is to be delivered again.
const PATIENT: (&str, &str) = ("ACK_WAIT", "60s");

/// `once` is what a held job ends as when it is released.
fn released(once: &Once) {
    assert_eq!((once.status.as_str(), once.text.as_str()), ("succeeded", "released\n"), "{once:?}");
}

/// It works as if nothing had been.
async fn works(fleet: &Fleet) {
    let jobs = (0..4).map(|_| async {
        let id = fleet.submit(json!({"parameter": "echo still here"})).await;
        let once = fleet.ended_once(&id).await;
        assert_eq!(once.text, "still here\n", "{once:?}");
        assert_eq!(once.attempt, 1, "{once:?}");
    });
    join_all(jobs).await;
    fleet.clean().await;
}

// --- The daemon ---------------------------------------------------------------------------------

/// A job outlives its worker: it runs again elsewhere, as the next attempt, and has one outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_daemons_job_runs_again_elsewhere_and_ends_once() {
    let mut fleet = Fleet::start(2, &[]).await;
    let first = fleet.hold().await;
    let holder = fleet.holder(&first).await;
    fleet.workers[holder].daemon.crash().await;
    let second = fleet.taken_over(&first).await;
    assert_ne!(fleet.holder(&second).await, holder);
    fleet.release(&second).await;
    let once = fleet.ended_once(&first.id).await;
    released(&once);
    assert_eq!(once.attempt, 2, "{once:?}");
    works(&fleet).await;
}

/// Who comes back after another has ended its job does not add a second outcome, and does not
/// change what is recorded.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_holder_cannot_overwrite_the_end_of_the_job_it_lost() {
    let fleet = Fleet::start(2, &[]).await;
    let first = fleet.hold().await;
    let holder = fleet.holder(&first).await;
    fleet.workers[holder].daemon.freeze();
    let second = fleet.taken_over(&first).await;
    let taker = fleet.workers[fleet.holder(&second).await].name().await;
    fleet.release(&second).await;
    fleet.streams.recorded(&first.id, |record| record["state"] == "ended").await;
    // The one it lost has ended as well when it wakes: it has an outcome to publish.
    fleet.release(&first).await;
    fleet.workers[holder].daemon.thaw();
    fleet.clean().await;
    let once = fleet.ended_once(&first.id).await;
    released(&once);
    assert_eq!((once.attempt, &once.worker), (2, &taker), "{once:?}");
    works(&fleet).await;
}

/// Who comes back while another runs its job leaves the outcome to that one.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_holder_drops_its_outcome_while_another_runs_the_job() {
    let fleet = Fleet::start(2, &[]).await;
    let first = fleet.hold().await;
    let holder = fleet.holder(&first).await;
    fleet.workers[holder].daemon.freeze();
    let second = fleet.taken_over(&first).await;
    let taker = fleet.workers[fleet.holder(&second).await].name().await;
    fleet.release(&first).await;
    fleet.workers[holder].daemon.thaw();
    // It has seen that the job is no longer its own.
    eventually("the first container is gone", || async {
        let left = fleet.engine.containers_of(&first.id).await;
        left.iter().all(|container| container.id.as_deref() != Some(&first.container))
    })
    .await;
    assert_eq!(fleet.streams.results_of(&first.id).await.unwrap().len(), 0);
    fleet.release(&second).await;
    let once = fleet.ended_once(&first.id).await;
    released(&once);
    assert_eq!((once.attempt, &once.worker), (2, &taker), "{once:?}");
    works(&fleet).await;
}

/// What a daemon's end stops is handed over: no outcome says that it was stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_terminated_daemon_hands_its_running_job_over() {
    let mut fleet = Fleet::start(2, &[("SHUTDOWN_GRACE", "500ms"), PATIENT]).await;
    let first = fleet.hold().await;
    let holder = fleet.holder(&first).await;
    let status = fleet.workers[holder].terminate().await;
    assert_eq!(status.code(), Some(0), "{}", fleet.workers[holder].daemon.log().text());
    let second = fleet.taken_over(&first).await;
    fleet.release(&second).await;
    let once = fleet.ended_once(&first.id).await;
    released(&once);
    assert_eq!(once.attempt, 2, "{once:?}");
    works(&fleet).await;
}

/// A request that ends whoever takes it does so a bounded number of times: then it is buried, and
/// says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_that_kills_every_daemon_is_buried_after_its_last_delivery() {
    let mut fleet = Fleet::start(1, &[("MAX_DELIVER", "3"), ("ACK_WAIT", "2s")]).await;
    fleet.workers[0].daemon.crash().await;
    let id = fleet.submit(json!({"parameter": "true"})).await;
    for _ in 0..3 {
        fleet.workers[0].respawn_to_abort("job.claimed", 1);
        fleet.workers[0].aborted().await;
    }
    // It would abort once more, should it be given the job once more.
    fleet.workers[0].respawn_to_abort("job.claimed", 1);
    let once = fleet.ended_once(&id).await;
    assert_eq!(
        (once.status.as_str(), once.code.as_str()),
        ("error", "job.max_deliver"),
        "{once:?}"
    );
    let dead = fleet.streams.dead_letters().await.unwrap();
    assert_eq!(dead.len(), 1);
    assert_eq!(header(&dead[0], "Job-Id"), id);
    assert_eq!(header(&dead[0], "Dead-Letter-Reason"), "job.max_deliver");
    let original: serde_json::Value = serde_json::from_slice(&dead[0].payload).unwrap();
    assert_eq!(original["id"], json!(id), "it is whole");
    eventually("the advisory is settled", || async {
        fleet.streams.count(ADVISORIES).await == Ok(0)
    })
    .await;
    assert!(fleet.workers[0].daemon.ended().is_none());
    fleet.workers[0].respawn();
    works(&fleet).await;
}

/// A request with a header that no server minds and the client library does not survive ends whoever
/// takes it, before there is anything to record. The server counts: after the last delivery its
/// advisory has the request buried, with what can be read of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_that_no_client_survives_is_buried_through_the_advisory() {
    let mut fleet = Fleet::start(1, &[("MAX_DELIVER", "1"), ("ACK_WAIT", "1s")]).await;
    let id = fleet.id();
    let body = json!({"id": id, "image_reference": fleet.image, "parameter": "true"}).to_string();
    let headers = "NATS/1.0\r\nBad: a\rb\r\nGood: kept\r\n\r\n";
    let address = fleet.nats.url().replace("nats://", "");
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let message = format!(
        "CONNECT {{\"verbose\":false,\"headers\":true}}\r\nHPUB functions.execute {} {}\r\n{headers}{body}\r\n",
        headers.len(),
        headers.len() + body.len(),
    );
    socket.write_all(message.as_bytes()).await.unwrap();
    let mut ends = 0;
    let dead = loop {
        if let Some(status) = fleet.workers[0].daemon.ended() {
            assert_eq!(status.code(), Some(1), "{}", fleet.workers[0].daemon.log().text());
            ends += 1;
            assert!(ends <= 11, "MAX_DELIVER and ten more deliveries at most");
            fleet.workers[0].respawn();
        }
        // The streams are asked by a client that never sees the header.
        let dead = fleet.streams.dead_letters().await.unwrap();
        if let Some(dead) = dead.into_iter().next() {
            break dead;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    };
    assert_eq!(header(&dead, "Job-Id"), id);
    assert_eq!(header(&dead, "Dead-Letter-Reason"), "job.max_deliver");
    assert_eq!(header(&dead, "Good"), "kept");
    assert_eq!(dead.payload, body);
    assert_eq!(fleet.ended_once(&id).await.code, "job.max_deliver");
    works(&fleet).await;
}

/// The server says of a request it gives up once, to whoever listens. Where nothing kept what it
/// said, the queue is looked through: also when the server delivers nothing after it, and so does not
/// count the request as settled.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_whose_advisory_is_lost_is_buried_all_the_same() {
    let mut fleet = Fleet::start(1, &[("MAX_DELIVER", "1"), ("ACK_WAIT", "2s")]).await;
    fleet.workers[0].daemon.crash().await;
    let id = fleet.submit(json!({"parameter": "true"})).await;
    // Who takes it gives it back, until the server has had enough.
    within("the last delivery", PATIENCE, async {
        while fleet.streams.count(ADVISORIES).await != Ok(1) {
            if let Some(reply) = fleet.streams.pull(QUEUE, CONSUMERS[1]).await {
                fleet.streams.client().request(reply, "-NAK".into()).await.unwrap();
            }
        }
    })
    .await;
    fleet.streams.purge(ADVISORIES).await.unwrap();
    fleet.workers[0].respawn();
    let once = fleet.ended_once(&id).await;
    assert_eq!((once.status.as_str(), once.code.as_str()), ("error", "job.max_deliver"));
    let dead = fleet.streams.dead_letters().await.unwrap();
    assert_eq!(dead.iter().map(|dead| header(dead, "Job-Id")).collect::<Vec<_>>(), [id]);
    works(&fleet).await;
}

/// A daemon that aborts at `point` leaves a job that ends once, when another daemon is there; the
/// function runs so many times in all.
async fn survives(point: &str, runs: std::ops::RangeInclusive<usize>) {
    let mut fleet = Fleet::start(1, &[]).await;
    fleet.workers[0].daemon.crash().await;
    fleet.workers[0].respawn_to_abort(point, 1);
    let id = fleet.submit(json!({"parameter": "echo done"})).await;
    fleet.workers[0].aborted().await;
    fleet.workers[0].respawn();
    let once = fleet.ended_once(&id).await;
    assert_eq!((once.status.as_str(), once.text.as_str()), ("succeeded", "done\n"), "{once:?}");
    fleet.clean().await;
    fleet.told().await;
    let times = fleet.runs.of(&id);
    assert!(runs.contains(&times), "it ran {times} times");
    works(&fleet).await;
}

/// What was claimed and not begun is begun by another.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_between_claim_and_creation_loses_nothing() {
    survives("job.claimed", 1..=1).await;
}

/// A container that was created and not started is removed, and the job runs once.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_between_create_and_start_loses_nothing() {
    survives("container.created", 1..=1).await;
}

/// A function whose end nobody published runs again: at least once, and one outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_before_the_outcome_is_published_loses_nothing() {
    survives("function.ended", 2..=2).await;
}

/// An outcome that was decided on and not published is published by another, and is the job's
/// outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_between_decision_and_publication_loses_no_outcome() {
    survives("outcome.decided", 1..=1).await;
}

/// An outcome that was published and not recorded is the job's outcome, whatever runs after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_between_outcome_and_record_adds_no_second_outcome() {
    survives("result.published", 1..=1).await;
}

/// What is recorded as ended does not run again, though it was never acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_between_record_and_acknowledgement_runs_nothing_twice() {
    survives("record.written", 1..=1).await;
}

/// The container of a job that is done with is removed by whoever comes next.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_between_acknowledgement_and_removal_leaves_no_container() {
    survives("delivery.acked", 1..=1).await;
}

// --- NATS ---------------------------------------------------------------------------------------

/// A server that dies while a job runs costs neither its outcome nor a run of those that had ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_nats_server_loses_no_outcome_and_repeats_no_ended_job() {
    outage(async |fleet, held| {
        fleet.nats.stop();
        fleet.release(held).await;
        fleet.nats.restart().await;
    })
    .await;
}

/// The same, for a server that sends its clients away and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lame_duck_loses_no_outcome_and_repeats_no_ended_job() {
    outage(async |fleet, held| {
        fleet.nats.lame_duck();
        fleet.release(held).await;
        fleet.nats.ended().await;
        fleet.nats.restart().await;
    })
    .await;
}

/// The same, for a server that stands still for longer than a worker may be silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_nats_server_loses_no_outcome_and_repeats_no_ended_job() {
    outage(async |fleet, held| {
        fleet.nats.pause();
        fleet.release(held).await;
        tokio::time::sleep(PAST_ACK_WAIT).await;
        fleet.nats.resume();
    })
    .await;
}

/// An outage of the server while one job has ended, one runs, and some wait.
async fn outage(fault: impl AsyncFnOnce(&mut Fleet, &crate::support::world::Held)) {
    let mut fleet = Fleet::start(2, &[("MAX_CONTAINERS", "1")]).await;
    let ended = fleet.submit(json!({"parameter": "echo ended"})).await;
    fleet.ended_once(&ended).await;
    let (held, other) = (fleet.hold().await, fleet.hold().await);
    let waiting = join_all((0..4).map(|_| fleet.submit(json!({"parameter": "echo waited"})))).await;
    fault(&mut fleet, &held).await;
    // A server that comes back may deliver again what runs: whichever container it is, it can end.
    let (once, another) = tokio::join!(fleet.finish(&held.id), fleet.finish(&other.id));
    released(&once);
    released(&another);
    for id in &waiting {
        let once = fleet.ended_once(id).await;
        assert_eq!(once.text, "waited\n", "{once:?}");
    }
    fleet.clean().await;
    fleet.told().await;
    assert_eq!(fleet.runs.of(&ended), 1, "what has ended does not run again");
    works(&fleet).await;
}

/// A server that is killed soon after an acknowledgement may have the request back, though its
/// consumer is done with it: the old one keeps what it removed a while longer than what it was told.
/// Nobody delivers such a request, so the daemons look for it; also where the server's own index
/// does not lead to it: 2.9 loses the way when requests end in another order than they came in.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn settled_requests_that_are_back_in_the_queue_are_removed_and_do_not_run_again() {
    for version in NatsVersion::all() {
        let nats = NatsServer::with(NatsOptions::durable(version)).await;
        // A worker may be silent for as long as a server takes to come back.
        let settings = [("ACK_WAIT", "6s"), ("MAX_CONTAINERS", "3")];
        let mut fleet = Fleet::on(nats, Engine::shared().await, 1, &settings).await;
        let first = fleet.hold().await;
        // The index is of use only where there are several subjects.
        let other = fleet.hold_at("functions.execute.low").await;
        let back = fleet.hold().await;
        fleet.nats.copy_messages(QUEUE);
        fleet.release(&back).await;
        fleet.streams.left(2).await;
        fleet.nats.terminate().await;
        fleet.nats.put_messages_back(QUEUE);
        fleet.nats.restart().await;
        fleet.streams.left(3).await;
        let last = fleet.submit(json!({"parameter": "true"})).await;
        fleet.streams.recorded(&last, |record| record["state"] == "ended").await;
        fleet.streams.left(3).await;
        fleet.release(&first).await;
        // The one that still runs, and not the one that was back.
        fleet.streams.left(1).await;
        fleet.release(&other).await;
        let all = [&first, &other, &back];
        for held in all {
            released(&fleet.ended_once(&held.id).await);
        }
        fleet.told().await;
        assert_eq!(all.map(|held| fleet.runs.of(&held.id)), [1, 1, 1], "{version:?}");
        assert_eq!(fleet.streams.count(DEAD_LETTERS).await, Ok(0), "{version:?}");
        works(&fleet).await;
    }
}

/// A server without space accepts nothing that it does not keep: the publisher is told, or not
/// answered, and what was accepted ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_store_refuses_what_it_cannot_keep_and_loses_nothing_it_accepted() {
    let options =
        NatsOptions { store: Store::Tmpfs(64 << 20), ..NatsOptions::durable(server_version()) };
    let engine = crate::support::engine::Engine::shared().await;
    let nats = NatsServer::with(options).await;
    let mut fleet = Fleet::on(nats, engine, 2, &[]).await;
    let held = fleet.hold().await;
    let waiting = join_all((0..6).map(|_| fleet.submit(json!({"parameter": "echo waited"})))).await;
    fleet.nats.fill_disk();
    // Ends while nothing can be stored.
    fleet.release(&held).await;
    let refused = fleet.id();
    let request = json!({"id": refused, "image_reference": fleet.image, "parameter": "echo late"});
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", refused.as_str());
    let trouble = within("the publisher is told", PATIENCE, async {
        loop {
            let body = request.to_string().into();
            if let Err(trouble) = fleet.streams.publish(EXECUTE, headers.clone(), body).await {
                return trouble;
            }
            // There was some space left in a page of its own. The next one does not fit.
            headers.insert("Nats-Msg-Id", fleet.id().as_str());
        }
    })
    .await;
    eprintln!("the publisher is told: {trouble}");
    fleet.nats.free_disk();
    // A server that could not write does not try again by itself, and an older one does not even
    // end when it is asked to.
    fleet.nats.restart().await;
    fleet.streams.submit(EXECUTE, &refused, &request).await;
    released(&fleet.finish(&held.id).await);
    for id in &waiting {
        assert_eq!(fleet.ended_once(id).await.text, "waited\n");
    }
    assert_eq!(fleet.ended_once(&refused).await.text, "late\n");
    works(&fleet).await;
}

/// A consumer that somebody deletes is made again, and neither what runs nor what waits notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_deleted_consumer_is_made_again_and_work_goes_on() {
    let fleet = Fleet::start(1, &[]).await;
    for consumer in CONSUMERS {
        let held = fleet.hold().await;
        fleet.streams.delete_consumer(QUEUE, consumer).await.unwrap();
        eventually("the consumer is back", || async {
            fleet.streams.consumer(QUEUE, consumer).await.is_ok()
        })
        .await;
        released(&fleet.finish(&held.id).await);
        for subject in ["functions.execute.high", EXECUTE, "functions.execute.low"] {
            let id = fleet.id();
            let request = json!({"id": id, "image_reference": fleet.image, "parameter": "echo on"});
            let body = request.to_string().into();
            fleet.streams.publish(subject, HeaderMap::new(), body).await.unwrap();
            assert_eq!(fleet.ended_once(&id).await.text, "on\n", "{consumer} {subject}");
        }
    }
    works(&fleet).await;
}

/// The stream of requests, deleted by somebody, is made again: what was in it is gone, and the next
/// requests are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_deleted_queue_is_made_again_and_work_goes_on() {
    let fleet = Fleet::start(2, &[]).await;
    fleet.streams.delete_stream(QUEUE).await.unwrap();
    works(&fleet).await;
}

/// The stream of results, deleted by somebody, is made again for the outcome of a job that ran
/// meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_deleted_stream_of_results_is_made_again_and_no_outcome_is_lost() {
    let fleet = Fleet::start(2, &[]).await;
    let held = fleet.hold().await;
    fleet.streams.delete_stream(RESULTS).await.unwrap();
    fleet.release(&held).await;
    released(&fleet.finish(&held.id).await);
    works(&fleet).await;
}

// --- The way between them -----------------------------------------------------------------------

/// A worker that is cut off for a moment keeps its job: one run, one outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_link_that_breaks_during_a_run_costs_nothing() {
    for flow in [Flow::Cut, Flow::Stalled] {
        let fleet = Fleet::start(2, &[PATIENT]).await;
        let held = fleet.hold().await;
        let link = &fleet.workers[fleet.holder(&held).await].link;
        link.set(flow);
        fleet.release(&held).await;
        eventually("the function has ended", || async {
            !fleet.engine.running_all(&held.id).await.contains(&held.container)
        })
        .await;
        link.set(Flow::Open);
        let once = fleet.ended_once(&held.id).await;
        released(&once);
        assert_eq!(once.attempt, 1, "{flow:?}: {once:?}");
        fleet.told().await;
        assert_eq!(fleet.runs.of(&held.id), 1, "{flow:?}");
        works(&fleet).await;
    }
}

/// A worker that is cut off for too long loses its job to another: two runs, one outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_link_that_stays_broken_hands_the_job_over() {
    for flow in [Flow::Cut, Flow::Stalled] {
        let fleet = Fleet::start(2, &[]).await;
        let first = fleet.hold().await;
        let holder = fleet.holder(&first).await;
        fleet.workers[holder].link.set(flow);
        let second = fleet.taken_over(&first).await;
        // Both have an outcome: that of the worker which is cut off comes first.
        fleet.release(&first).await;
        fleet.release(&second).await;
        let taker = fleet.workers[fleet.holder(&second).await].name().await;
        fleet.streams.recorded(&first.id, |record| record["state"] == "ended").await;
        fleet.workers[holder].link.set(Flow::Open);
        fleet.clean().await;
        let once = fleet.ended_once(&first.id).await;
        released(&once);
        assert_eq!((once.attempt, &once.worker), (2, &taker), "{flow:?}: {once:?}");
        works(&fleet).await;
    }
}

/// A publication of an outcome that may have been stored or not is repeated under the same id: one
/// outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_outcome_that_is_lost_on_its_way_or_not_confirmed_is_published_once() {
    // Lost on its way; stored, and the answer is lost.
    for flow in [Flow::Cut, Flow::Stalled, Flow::Shut] {
        let fleet = Fleet::start(2, &[PATIENT]).await;
        let held = fleet.hold().await;
        let link = &fleet.workers[fleet.holder(&held).await].link;
        link.set_when_sent(b"HPUB functions.results ", flow);
        fleet.release(&held).await;
        within("the outcome is on its way", PATIENCE, link.becomes(flow)).await;
        if flow == Flow::Shut {
            fleet.streams.result(&held.id).await;
            // Whatever the daemon does without an answer, it does it on a new connection.
            link.set(Flow::Cut);
        }
        link.set(Flow::Open);
        let once = fleet.ended_once(&held.id).await;
        released(&once);
        assert_eq!(once.attempt, 1, "{flow:?}: {once:?}");
        fleet.told().await;
        assert_eq!(fleet.runs.of(&held.id), 1, "{flow:?}");
        works(&fleet).await;
    }
}

/// An acknowledgement that gets lost has the request delivered again, and the function does not run
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lost_acknowledgement_is_made_up_for_without_a_second_run() {
    for flow in [Flow::Cut, Flow::Stalled] {
        let fleet = Fleet::start(2, &[]).await;
        let held = fleet.hold().await;
        let link = &fleet.workers[fleet.holder(&held).await].link;
        link.set_when_sent(b"+ACK", flow);
        fleet.release(&held).await;
        within("the acknowledgement is on its way", PATIENCE, link.becomes(flow)).await;
        // The other one is given it, and settles it.
        let once = fleet.ended_once(&held.id).await;
        released(&once);
        assert_eq!(once.attempt, 1, "{flow:?}: {once:?}");
        link.set(Flow::Open);
        fleet.told().await;
        assert_eq!(fleet.runs.of(&held.id), 1, "{flow:?}");
        works(&fleet).await;
    }
}

// --- The engine ---------------------------------------------------------------------------------

/// An engine that takes a job down with it costs an attempt; those that wait meanwhile are not
/// drained into failures.
async fn engine_outage(graceful: bool) {
    let mut private = PrivateEngine::start().await;
    let nats = NatsServer::with(NatsOptions::durable(server_version())).await;
    let fleet = Fleet::on(nats, private.engine().await, 2, &[]).await;
    let first = fleet.hold().await;
    if graceful {
        private.stop().await;
    } else {
        private.kill().await;
    }
    let waiting = join_all((0..8).map(|_| fleet.submit(json!({"parameter": "echo waited"})))).await;
    private.restart().await;
    let once = fleet.finish(&first.id).await;
    released(&once);
    assert_eq!(once.attempt, 2, "{once:?}");
    for id in &waiting {
        // Those by which a daemon noticed took an attempt. Then none takes what it cannot run.
        let once = fleet.ended_once(id).await;
        assert_eq!(once.text, "waited\n", "{once:?}");
        assert!(once.attempt <= 2, "{once:?}");
    }
    assert_eq!(fleet.streams.dead_letters().await.unwrap().len(), 0);
    works(&fleet).await;
}

/// See [`engine_outage`].
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_engine_costs_each_job_an_attempt_at_most() {
    engine_outage(false).await;
}

/// See [`engine_outage`].
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_terminated_engine_costs_each_job_an_attempt_at_most() {
    engine_outage(true).await;
}

/// An engine that stands still loses nothing: all that was accepted succeeds in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_engine_loses_nothing() {
    let private = PrivateEngine::start().await;
    let nats = NatsServer::with(NatsOptions::durable(server_version())).await;
    let settings = [("ENGINE_TIMEOUT", "5s"), ("MAX_DELIVER", "10")];
    let fleet = Fleet::on(nats, private.engine().await, 2, &settings).await;
    let held = fleet.hold().await;
    private.freeze();
    let waiting = join_all((0..8).map(|_| fleet.submit(json!({"parameter": "echo waited"})))).await;
    for worker in &fleet.workers {
        worker.daemon.log().wait_for("the engine is away", |event| event["level"] == "WARN").await;
    }
    private.thaw();
    released(&fleet.finish(&held.id).await);
    for id in &waiting {
        assert_eq!(fleet.ended_once(id).await.text, "waited\n");
    }
    works(&fleet).await;
}

// --- Many ---------------------------------------------------------------------------------------

/// Three daemons share what there is by free slots. One is killed, and neither is a job lost nor
/// does one end twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn three_daemons_share_the_jobs_and_one_that_dies_loses_none() {
    let jobs = if long() { 3_000 } else { 300 };
    let patience = if long() { Duration::from_secs(3_600) } else { MANY };
    let mut fleet = Fleet::start(3, &[("MAX_CONTAINERS", "3")]).await;
    let mut ids = Vec::with_capacity(jobs);
    for n in 0..jobs {
        ids.push(fleet.submit(json!({"parameter": ["echo", n.to_string()]})).await);
    }
    let results = async || fleet.streams.count(RESULTS).await.unwrap_or_default();
    let third = jobs as u64 / 3;
    eventually_within("a third has ended", patience, || async { results().await >= third }).await;
    fleet.workers[0].daemon.crash().await;
    fleet.streams.settled_within(patience).await;
    let all = fleet.streams.results().await.unwrap();
    let wrong: Vec<String> = ids
        .iter()
        .enumerate()
        .filter_map(|(n, id)| {
            let own: Vec<_> = all.iter().filter(|one| header(one, "Job-Id") == **id).collect();
            let right = own.len() == 1 && own[0].payload == format!("{n}\n");
            (!right).then(|| format!("{id}: {own:?}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {jobs} went wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(all.len(), jobs);
    let mut shares: std::collections::BTreeMap<String, usize> = Default::default();
    for id in &ids {
        let record = fleet.streams.record(id).await.unwrap().unwrap();
        assert_eq!(record["state"], "ended", "{record}");
        *shares.entry(record["worker"].as_str().unwrap().to_string()).or_default() += 1;
    }
    eprintln!("shares: {shares:?}");
    assert_eq!(shares.len(), 3, "each had its share: {shares:?}");
    assert!(shares.values().all(|share| share * 10 >= jobs), "a fair one: {shares:?}");
    fleet.clean().await;
    fleet.workers[0].respawn();
    works(&fleet).await;
}

/// What waits is the server's to keep: a long queue takes no memory of the daemon's.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_hundred_thousand_queued_requests_leave_the_daemons_memory_flat() {
    const QUEUED: u64 = 100_000;
    const ALLOWED: u64 = 16 << 20;
    let settings = [("MAX_CONTAINERS", "2"), ("QUEUE_MAX_BYTES", "256MiB")];
    let fleet = Fleet::start(1, &settings).await;
    works(&fleet).await;
    let daemon = &fleet.workers[0].daemon;
    let held = [fleet.hold().await, fleet.hold().await];
    let before = daemon.rss_bytes();
    let request = json!({"image_reference": fleet.image, "parameter": "true"}).to_string();
    let request = bytes::Bytes::from(request);
    for _ in 0..QUEUED {
        // Without waiting for each to be stored: the count in the end tells.
        fleet.streams.client().publish(EXECUTE, request.clone()).await.unwrap();
    }
    eventually_within("all are stored", MANY, || async {
        fleet.streams.count(QUEUE).await == Ok(QUEUED + 2)
    })
    .await;
    let queued = daemon.rss_bytes();
    // As flat while it works on them.
    for held in &held {
        fleet.release(held).await;
    }
    eventually("some have ended", || async {
        fleet.streams.count(RESULTS).await.is_ok_and(|results| results >= 30)
    })
    .await;
    let working = daemon.rss_bytes();
    fleet.streams.purge(QUEUE).await.unwrap();
    let [before, queued, working] = [before, queued, working].map(|bytes| bytes >> 10);
    eprintln!("memory in KiB: {before} before, {queued} with a queue, {working} at work on it");
    assert!(queued.max(working) < before + (ALLOWED >> 10), "{before}, {queued}, {working} KiB");
    works(&fleet).await;
    fleet.workers[0].daemon.signal(Signal::TERM);
}
