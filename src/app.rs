//! The wiring: the only place that knows every part.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::Slots;
use crate::backend::docker::{self, Docker};
use crate::backend::{Backend, PreflightError};
use crate::config::{Config, EX_CONFIG};
use crate::health::{Health, down, reap, up, watch_engine};
use crate::job::{JobError, code};
use crate::nats::Connection;
use crate::publish::Publisher;
use crate::runner::{self, Runner};
use crate::shutdown::{Shutdown, Signals};
use crate::source::buffer::Limits;
use crate::source::core::{CoreSource, Once, received};
use crate::source::{Delivery, Message, Source};

/// Beyond the stopped functions' own grace and what they print: time to remove and to flush.
const LAST_RITES: Duration = Duration::from_secs(10);
/// How long a forced end may take to kill and remove what still runs.
const FORCED_RITES: Duration = Duration::from_secs(5);
/// Answers under way at once to requests that found the buffer full.
const REFUSALS: usize = 64;
/// What a `run` request that waits for a slot counts for beside its own bytes.
const RUN_OVERHEAD: usize = 2048;

/// Room between the socket and the buffer, in messages: enough that the buffer decides what is
/// refused, not the client library, which would drop silently.
const SUBSCRIPTION_SLACK: usize = 4096;

/// Runs the daemon until it is told to end. Returns the exit code.
///
/// # Errors
/// The parts cannot be put together; nothing was taken from NATS.
pub async fn run(config: Config, mut signals: Signals) -> anyhow::Result<u8> {
    crate::protocol::request::warm_up();
    let worker = instance_name();
    let backend: Arc<dyn Backend> = match Docker::new(docker_options(&config, &worker)) {
        Ok(docker) => Arc::new(docker),
        Err(error) => {
            tracing::error!("{error:#}");
            return Ok(EX_CONFIG);
        }
    };
    // An engine that cannot do what the settings ask for is a bad setting; one that is away is not.
    if let Err(PreflightError::Unfit(why)) = backend.preflight().await {
        tracing::error!("{why}");
        return Ok(EX_CONFIG);
    }

    let subscription_capacity = config.buffer_messages.saturating_add(SUBSCRIPTION_SLACK);
    let connection = match Connection::open(&config.nats, &worker, subscription_capacity).await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::error!("{error}");
            return Ok(EX_CONFIG);
        }
    };
    let publisher = Publisher::new(connection.clone(), &config.subjects);
    let shutdown = Shutdown::default();
    let (suspicions, suspected) = watch::channel(0);
    let runner = Arc::new(Runner::new(
        backend.clone(),
        publisher,
        runner_options(&config, &worker),
        shutdown.clone(),
        suspicions,
    ));
    let daemon = Daemon {
        connection: connection.clone(),
        runner,
        slots: Slots::new(config.max_containers),
        jobs: TaskTracker::new(),
        shutdown: shutdown.clone(),
        run_slot_timeout: config.run_slot_timeout,
        buffer_bytes: config.buffer_bytes,
    };

    let (source, refused) = CoreSource::subscribe(
        &connection,
        &config.subjects.execute,
        &config.queue_group,
        Limits { messages: config.buffer_messages, bytes: config.buffer_bytes },
    )
    .await?;
    let run_requests = connection
        .client
        .queue_subscribe(config.subjects.run.clone(), config.queue_group.clone())
        .await?;

    let (health, engine_up) = watch::channel(Health::Unknown);
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
    spawn(Box::pin(announce(connection.clone(), engine_up.clone(), config.clone(), worker)));
    let broken = CancellationToken::new();
    let intake = [
        guarded(&broken, daemon.clone().execute(source, engine_up.clone())),
        guarded(&broken, daemon.clone().answer_refused(refused)),
        guarded(&broken, daemon.clone().run(run_requests, engine_up.clone())),
    ];

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
    tracing::info!(jobs = daemon.jobs.len(), "draining: no more requests are taken");
    shutdown.draining.cancel();
    let drained = daemon.drain(intake, &config);
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
            // A start that was cut short may have left a container after its clean-up.
            if let Err(error) = backend.reap().await {
                tracing::warn!(%error, "not all containers could be removed");
            }
            backend.retire().await;
        }
    };
    let last = async { tokio::join!(connection.settle(config.publish_timeout), tidy) };
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
        call_timeout: config.engine_timeout,
        stop_grace: config.stop_grace,
    }
}

fn runner_options(config: &Config, worker: &str) -> runner::Options {
    runner::Options {
        worker: worker.to_owned(),
        policy: config.policy.clone(),
        subjects: config.subjects.clone(),
        max_attempts: config.max_attempts,
        output_limit: config.output_limit,
        stop_grace: config.stop_grace,
        kill_patience: config.engine_timeout,
        publish_timeout: config.publish_timeout,
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

/// The parts that take work and hand it to the runner.
#[derive(Clone)]
struct Daemon {
    connection: Connection,
    runner: Arc<Runner>,
    slots: Slots,
    jobs: TaskTracker,
    shutdown: Shutdown,
    run_slot_timeout: Duration,
    buffer_bytes: usize,
}

impl Daemon {
    /// Runs what `execute` asks for: a healthy engine first, then a slot, and only then is the
    /// request taken.
    async fn execute(self, mut source: impl Source, mut engine: watch::Receiver<Health>) {
        loop {
            let Some(slot) = self
                .unless_draining(async {
                    up(&mut engine).await;
                    source.ready().await;
                    self.slots.take().await
                })
                .await
            else {
                break;
            };
            let next = self.unless_draining(async {
                tokio::select! {
                    delivery = source.next() => Some(delivery),
                    // Back to waiting: what is taken now would only fail.
                    () = down(&mut engine) => None,
                }
            });
            match next.await {
                Some(Some(delivery)) => self.spawn_job(delivery, slot),
                Some(None) => {}
                None => break,
            }
        }
        for message in source.close().await {
            self.refuse(message, shutting_down());
        }
    }

    /// Answers what found the buffer full.
    async fn answer_refused(self, mut refused: mpsc::Receiver<Message>) {
        let refused = futures::stream::poll_fn(move |context| refused.poll_recv(context));
        refused
            .for_each_concurrent(REFUSALS, |message| async {
                let error = JobError::new(
                    code::BUFFER_FULL,
                    "this worker has as many requests waiting as it can hold; try again later",
                );
                self.runner.refuse(message, error).await;
            })
            .await;
    }

    /// Runs what `run` asks for, or says at once that it cannot.
    async fn run(self, mut requests: async_nats::Subscriber, engine: watch::Receiver<Health>) {
        // In KiB: what waits here is bounded as the buffer of the other requests is.
        let places = u32::try_from(self.buffer_bytes >> 10).unwrap_or(u32::MAX).min(1 << 29);
        let waiting = Arc::new(Semaphore::new(places as usize));
        let mut count = 0;
        while let Some(Some(message)) = self.unless_draining(requests.next()).await {
            count += 1;
            let message = received(message);
            if *engine.borrow() == Health::Down {
                let error = JobError::new(
                    code::ENGINE_UNAVAILABLE,
                    "the container engine is away; try again later",
                );
                self.refuse(message, error);
                continue;
            }
            let weight = u32::try_from((message.size + RUN_OVERHEAD) >> 10).unwrap_or(u32::MAX);
            let weight = weight.min(places);
            let Ok(place) = waiting.clone().try_acquire_many_owned(weight) else {
                self.refuse(message, busy(self.run_slot_timeout));
                continue;
            };
            let daemon = self.clone();
            self.jobs.spawn(async move {
                let patience = daemon.run_slot_timeout;
                let slot = daemon.unless_draining(daemon.slots.take_within(patience)).await;
                drop(place);
                match slot {
                    Some(Some(slot)) => {
                        let delivery = Delivery { message, settle: Box::new(Once) };
                        daemon.runner.handle(delivery, slot).await;
                    }
                    Some(None) => {
                        daemon.runner.refuse(message, busy(patience)).await;
                    }
                    None => daemon.runner.refuse(message, shutting_down()).await,
                }
            });
        }
        // What came in before the end of the subscription is answered, too.
        for message in self.connection.unsubscribe(&mut requests, count).await {
            self.refuse(received(message), shutting_down());
        }
    }

    fn spawn_job(&self, delivery: Delivery, slot: crate::admission::Slot) {
        let runner = self.runner.clone();
        self.jobs.spawn(async move { runner.handle(delivery, slot).await });
    }

    fn refuse(&self, message: Message, error: JobError) {
        let runner = self.runner.clone();
        self.jobs.spawn(async move { runner.refuse(message, error).await });
    }

    /// The future's value, or nothing if the drain begins first.
    async fn unless_draining<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.shutdown.draining.cancelled() => None,
            value = future => Some(value),
        }
    }

    /// Sees every job to its end: by itself within the grace, stopped after it. Returns whether
    /// all of them got there.
    async fn drain(&self, intake: [tokio::task::JoinHandle<()>; 3], config: &Config) -> bool {
        let all_ended = async {
            // One that broke down was reported when it did.
            futures::future::join_all(intake).await;
            self.jobs.close();
            self.jobs.wait().await;
        };
        tokio::pin!(all_ended);
        if tokio::time::timeout(config.shutdown_grace, &mut all_ended).await.is_ok() {
            return true;
        }
        tracing::warn!(jobs = self.jobs.len(), "SHUTDOWN_GRACE is over: stopping what still runs");
        self.shutdown.stopping.cancel();
        // First the functions' own end, then a moment to say so.
        let patience = config.stop_grace + runner::LAST_PATIENCE + config.publish_timeout;
        silence_after(&self.shutdown, patience);
        let patience = patience + LAST_RITES;
        let all_ended = tokio::time::timeout(patience, &mut all_ended).await.is_ok();
        if !all_ended {
            tracing::error!(
                jobs = self.jobs.len(),
                "jobs are still not done with; their containers are left to the next start"
            );
        }
        all_ended
    }
}

/// Ends all publishing after a while.
fn silence_after(shutdown: &Shutdown, patience: Duration) {
    let silent = shutdown.silent.clone();
    tokio::spawn(async move {
        tokio::time::sleep(patience).await;
        silent.cancel();
    });
}

fn busy(patience: Duration) -> JobError {
    let patience = humantime::format_duration(patience);
    JobError::new(code::BUSY, format!("no slot came free within {patience}; try again later"))
}

fn shutting_down() -> JobError {
    JobError::new(
        code::SHUTTING_DOWN,
        "the worker shut down before the function began; send it again",
    )
}

/// Says once that requests are taken and can be run.
async fn announce(
    connection: Connection,
    mut engine: watch::Receiver<Health>,
    config: Config,
    worker: String,
) {
    connection.connected().await;
    // The subscriptions have reached the server when this returns.
    connection.settle(config.publish_timeout).await;
    up(&mut engine).await;
    tracing::info!(
        worker,
        subject = config.subjects.execute,
        queue_group = config.queue_group,
        max_containers = config.max_containers,
        "ready"
    );
}
