//! The wiring: the only place that knows every part.

mod discovery;
mod durable;
mod observed;
mod reload;
mod supervised;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::admission::Slots;
use crate::backend::docker::{self, Docker};
use crate::backend::{Backend, PreflightError};
use crate::config::{Config, EX_CONFIG};
use crate::health::{Health, reap, up, watch_engine};
use crate::inquiry::Inquiries;
use crate::intake::Intake;
use crate::log::Log;
use crate::nats::Connection;
use crate::orders::Orders;
use crate::publish::Publisher;
use crate::runner::{self, Runner};
use crate::shutdown::{Shutdown, Signals};
use crate::source::buffer::Limits;
use crate::source::core::CoreSource;
use crate::source::depth::watch_depth;
use crate::source::jetstream::JetStreamSource;
use crate::source::{self, Source};
use crate::spans::Spans;
use crate::undertaker::Undertaker;
use discovery::{Tallies, service};
use durable::{Durable, durable};
use observed::Observed;
use reload::{Reloader, runner_rules};
use supervised::supervised;

/// Beyond the stopped functions' own grace and what they print: time to remove and to flush.
const LAST_RITES: Duration = Duration::from_secs(10);
/// How long a forced end may take to kill and remove what still runs.
const FORCED_RITES: Duration = Duration::from_secs(5);

/// Room between the socket and the buffer, in messages: enough that the buffer decides what is
/// refused, not the client library, which would drop silently.
const SUBSCRIPTION_SLACK: usize = 4096;

/// Runs the daemon until it is told to end. Returns the exit code.
///
/// # Errors
/// The parts cannot be put together; nothing was taken from NATS.
pub async fn run(
    config: Config,
    log: Log,
    mut signals: Signals,
    orders: Orders,
) -> anyhow::Result<u8> {
    let (shutdown, broken) = (Shutdown::default(), CancellationToken::new());
    // First of all: whoever watches sees the start, too.
    let observed = match Observed::open(config.http_addr, &shutdown, &broken).await {
        Ok(observed) => observed,
        Err(error) => {
            tracing::error!("{error}");
            return Ok(EX_CONFIG);
        }
    };
    let _supervised = supervised(&observed, &shutdown, &config);
    let worker = instance_name();
    let backend: Arc<dyn Backend> = match Docker::new(docker_options(&config, &worker)) {
        Ok(docker) => Arc::new(docker),
        Err(error) => {
            tracing::error!("{error:#}");
            return Ok(EX_CONFIG);
        }
    };
    let spans = match config.traces.as_ref().map(|traces| Spans::start(traces, &worker)).transpose()
    {
        Ok(spans) => spans.map(Arc::new),
        Err(error) => {
            tracing::error!("{error:#}");
            return Ok(EX_CONFIG);
        }
    };
    if let Some(spans) = &spans {
        observed.spans(spans.clone());
    }
    let (health, engine_up) = watch::channel(Health::Unknown);
    observed.engine(backend.clone(), engine_up.clone());
    match backend.preflight().await {
        Ok(()) => drop(health.send_replace(Health::Up)),
        // An engine that cannot do what the settings ask for is a bad setting; one that is away is not.
        Err(PreflightError::Unfit(why)) => {
            tracing::error!("{why}");
            return Ok(EX_CONFIG);
        }
        Err(PreflightError::Unavailable(_)) => {}
    }

    let subscription_capacity = config.buffer_messages.saturating_add(SUBSCRIPTION_SLACK);
    let connection = match Connection::open(&config.nats, &worker, subscription_capacity).await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::error!("{error}");
            return Ok(EX_CONFIG);
        }
    };
    observed.connection(&connection);
    let durable = tokio::select! {
        durable = durable(&connection, &config, &worker) => match durable {
            Ok(durable) => durable,
            Err(why) => {
                tracing::error!("{why}");
                return Ok(EX_CONFIG);
            }
        },
        _ = signals.next() => return Ok(0),
    };
    let (suspicions, suspected) = watch::channel(0);
    let publisher = Publisher::new(connection.clone(), &config.subjects);
    let tallies = Tallies::default();
    let options = runner_options(&config, &worker, &tallies);
    let rules = runner_rules(&config);
    let runner = Runner::new(
        backend.clone(),
        publisher.clone(),
        options,
        rules,
        shutdown.clone(),
        suspicions,
    );
    let mut runner = runner.metered(observed.metrics.clone()).traced(spans.clone());
    if let Some(Durable { jetstream, topology, records, objects }) = &durable {
        let publisher = publisher.clone().durable(jetstream.clone(), topology.clone());
        runner = runner.durable(publisher, records.clone(), objects.clone());
    }
    let runner = Arc::new(runner);
    let intake = Intake {
        connection: connection.clone(),
        publisher: publisher.clone(),
        cancellations: tallies.cancel.clone(),
        runner: runner.clone(),
        slots: Slots::new(config.max_containers),
        jobs: TaskTracker::new(),
        shutdown: shutdown.clone(),
        run_slot_timeout: config.run_slot_timeout,
        buffer_bytes: config.buffer_bytes,
        records: durable.as_ref().map(|durable| durable.records.clone()),
        metrics: observed.metrics.clone(),
    };
    observed.slots(&intake.slots);
    let mut parts = Vec::new();
    let source: Box<dyn Source> = match &durable {
        Some(Durable { jetstream, topology, .. }) => Box::new(JetStreamSource::new(
            connection.clone(),
            jetstream.clone(),
            topology.clone(),
            config.subjects.clone(),
            source_options(&config),
        )),
        None => {
            let (source, refused) = CoreSource::subscribe(
                &connection,
                &config.subjects,
                &config.queue_group,
                Limits { messages: config.buffer_messages, bytes: config.buffer_bytes },
            )
            .await?;
            parts.push(guarded(&broken, intake.clone().answer_refused(refused)));
            observed.buffer(source.buffer());
            Box::new(source)
        }
    };
    let client = &connection.client;
    let run_requests =
        client.queue_subscribe(config.subjects.run.clone(), config.queue_group.clone()).await?;
    let cancellations = client.subscribe(config.subjects.cancel.clone()).await?;
    let inquiries = Inquiries {
        worker: worker.clone(),
        cancels: runner.cancels(),
        records: intake.records.clone(),
        publisher: publisher.clone(),
        tally: tallies.status.clone(),
    };
    let asked_of_all = client.subscribe(config.subjects.status.clone()).await?;
    let asked_of_one =
        client.queue_subscribe(config.subjects.status.clone(), config.queue_group.clone()).await?;
    parts.push(guarded(&broken, intake.clone().execute(source, engine_up.clone())));
    parts.push(guarded(&broken, intake.clone().run(run_requests, engine_up.clone())));

    let background = TaskTracker::new();
    let ended = CancellationToken::new();
    let spawn = |task: futures::future::BoxFuture<'static, ()>| {
        let ended = ended.clone();
        background.spawn(async move {
            tokio::select! { () = task => {}, () = ended.cancelled() => {} }
        });
    };
    let (unfit_found, unfit) = oneshot::channel();
    spawn(Box::pin(watch_engine(backend.clone(), health, suspected, unfit_found)));
    spawn(Box::pin(reap(backend.clone(), engine_up.clone(), config.reap_interval)));
    spawn(Box::pin(intake.clone().cancel(cancellations)));
    spawn(Box::pin(inquiries.clone().answer_for_own(asked_of_all)));
    spawn(Box::pin(inquiries.answer_for_all(asked_of_one)));
    let delivery = if durable.is_some() { "jetstream" } else { "core" };
    let service = service(&config, &worker, delivery, &tallies, &intake);
    let services = connection.clone();
    spawn(Box::pin(async move {
        if let Err(error) = service.answer(&services).await {
            tracing::debug!(%error, "this service cannot be discovered");
        }
    }));
    let reloader = Reloader {
        config: config.clone(),
        log,
        slots: intake.slots.clone(),
        runner: runner.clone(),
        backend: backend.clone(),
        has_pool: config.warm.containers > 0,
    };
    spawn(Box::pin(reloader.follow(orders)));
    // What is made ahead of time is for jobs to come.
    let (tended, draining) = (backend.clone(), shutdown.draining.clone());
    let tending = AbortOnDropHandle::new(tokio::spawn(async move { tended.tend(&draining).await }));
    let started = observed.when_started();
    let ready =
        announce(connection.clone(), engine_up.clone(), config.clone(), worker, delivery, started);
    spawn(Box::pin(ready));
    if let Some(Durable { jetstream, topology, .. }) = durable {
        if observed.is_open() {
            let (depth, seen) = watch::channel(None);
            observed.queue(seen);
            let (connection, jetstream) = (connection.clone(), jetstream.clone());
            spawn(Box::pin(watch_depth(connection, jetstream, topology.clone(), depth)));
        }
        let undertaker = Undertaker {
            connection: connection.clone(),
            jetstream,
            topology,
            subjects: config.subjects.clone(),
            runner,
            // What is in doubt is settled after one ACK_WAIT.
            sweep_interval: config.streams.ack_wait.max(Duration::from_secs(5)),
        };
        spawn(Box::pin(undertaker.run()));
    }

    let (drained_code, forced_code) = tokio::select! {
        forced_code = signals.next() => (0, forced_code),
        Ok(why) = unfit => {
            tracing::error!("{why}");
            (EX_CONFIG, EX_CONFIG)
        }
        // Better an end that a supervisor sees than a daemon that takes no more work.
        () = broken.cancelled() => {
            tracing::error!("a part of the intake broke down");
            (1, 1)
        }
    };
    tracing::info!(jobs = intake.jobs.len(), "draining: no more requests are taken");
    shutdown.draining.cancel();
    let drained = drain(&intake, parts, &config);
    tokio::pin!(drained);
    let exit_code = tokio::select! {
        all_ended = &mut drained => if all_ended { drained_code } else { 1 },
        _ = signals.next() => {
            tracing::warn!("told again: killing what still runs");
            shutdown.stopping.cancel();
            shutdown.forced.cancel();
            silence_after(&shutdown, FORCED_RITES / 2);
            // Nobody waits for anybody any more; one more signal ends even this.
            tokio::select! {
                _ = tokio::time::timeout(FORCED_RITES, &mut drained) => {}
                _ = signals.next() => {}
            }
            forced_code
        }
    };
    ended.cancel();
    background.close();
    background.wait().await;
    let engine_is_up = *engine_up.borrow() == Health::Up;
    let tidy = async {
        if engine_is_up {
            // It has brought to an end what it had begun, or broken down, which is as good here.
            let _ = tending.await;
            // A start that was cut short may have left a container after its clean-up.
            if let Err(error) = backend.reap().await {
                tracing::warn!(%error, "not all containers could be removed");
            }
            backend.retire().await;
        }
    };
    let flush = async {
        if let Some(spans) = &spans {
            spans.finish().await;
        }
    };
    let last = async { tokio::join!(connection.settle(config.publish_timeout), tidy, flush) };
    let patience = if shutdown.forced.is_cancelled() { FORCED_RITES / 2 } else { LAST_RITES };
    tokio::select! {
        last = tokio::time::timeout(patience, last) => if last.is_err() {
            tracing::warn!("the end took too long");
        },
        _ = signals.next() => tracing::warn!("told again: leaving the rest to the next start"),
    }
    tracing::info!(exit_code, "stopped");
    Ok(exit_code)
}

fn source_options(config: &Config) -> source::jetstream::Options {
    source::jetstream::Options {
        ack_wait: config.streams.ack_wait,
        max_attempts: config.max_attempts,
        max_age: config.streams.queue_max_age,
    }
}

/// Spawns a part of the intake that ends only with the drain; `broken` is cancelled when it ends,
/// however that comes about.
fn guarded(
    broken: &CancellationToken,
    part: impl Future<Output = ()> + Send + 'static,
) -> tokio::task::JoinHandle<()> {
    let guard = broken.clone().drop_guard();
    tokio::spawn(async move {
        part.await;
        drop(guard);
    })
}

fn docker_options(config: &Config, worker: &str) -> docker::Options {
    docker::Options {
        instance: worker.to_owned(),
        docker: config.docker.clone(),
        images: config.images.clone(),
        confinement: config.confinement.clone(),
        warm: config.warm.clone(),
        call_timeout: config.engine_timeout,
        stop_grace: config.stop_grace,
    }
}

fn runner_options(config: &Config, worker: &str, tallies: &Tallies) -> runner::Options {
    runner::Options {
        worker: worker.to_owned(),
        subjects: config.subjects.clone(),
        max_attempts: config.max_attempts,
        look_interval: config.streams.ack_wait / 3,
        stop_grace: config.stop_grace,
        kill_patience: config.engine_timeout,
        publish_timeout: config.publish_timeout,
        runs: tallies.run.clone(),
    }
}

/// A name no other instance has, that a person can place: the host's, and a part made up.
fn instance_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String =
        host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(32).collect();
    let unique = uuid::Uuid::now_v7().as_u64_pair().1;
    format!("{host}-{:08x}", unique & 0xffff_ffff)
}

/// Sees every job to its end: by itself within the grace, stopped after it. Returns whether
/// all of them got there.
async fn drain(intake: &Intake, parts: Vec<tokio::task::JoinHandle<()>>, config: &Config) -> bool {
    let all_ended = async {
        // One that broke down was reported when it did.
        futures::future::join_all(parts).await;
        intake.jobs.close();
        intake.jobs.wait().await;
    };
    tokio::pin!(all_ended);
    if tokio::time::timeout(config.shutdown_grace, &mut all_ended).await.is_ok() {
        return true;
    }
    tracing::warn!(jobs = intake.jobs.len(), "SHUTDOWN_GRACE is over: stopping what still runs");
    intake.shutdown.stopping.cancel();
    // First the functions' own end, then a moment to say so.
    let patience = config.stop_grace + runner::LAST_PATIENCE + config.publish_timeout;
    silence_after(&intake.shutdown, patience);
    let patience = patience + LAST_RITES;
    let all_ended = tokio::time::timeout(patience, &mut all_ended).await.is_ok();
    if !all_ended {
        tracing::error!(
            jobs = intake.jobs.len(),
            "jobs are still not done with; their containers are left to the next start"
        );
    }
    all_ended
}
/// Ends all publishing after a while.
fn silence_after(shutdown: &Shutdown, patience: Duration) {
    let silent = shutdown.silent.clone();
    tokio::spawn(async move {
        tokio::time::sleep(patience).await;
        silent.cancel();
    });
}

/// Says once that requests are taken and can be run.
async fn announce(
    connection: Connection,
    mut engine: watch::Receiver<Health>,
    config: Config,
    worker: String,
    delivery: &'static str,
    started: impl FnOnce(),
) {
    connection.connected().await;
    // The subscriptions have reached the server when this returns.
    connection.settle(config.publish_timeout).await;
    started();
    up(&mut engine).await;
    tracing::info!(
        worker,
        delivery,
        subject = config.subjects.execute,
        queue_group = config.queue_group,
        max_containers = config.max_containers,
        "ready"
    );
}
