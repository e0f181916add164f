//! What takes requests from NATS and hands them to the runner, each with a slot.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_nats::{Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::admission::{Slot, Slots};
use crate::health::{Health, down, up};
use crate::job::{JobError, JobId, code};
use crate::metrics::Metrics;
use crate::nats::Connection;
use crate::protocol::by_id;
use crate::protocol::cancel::{self, Answer};
use crate::publish::Publisher;
use crate::runner::Runner;
use crate::service::Tally;
use crate::shutdown::Shutdown;
use crate::source::core::{Once, received};
use crate::source::{Delivery, Message, Source};
use crate::state::Records;

/// Answers under way at once to requests that found the buffer full.
const REFUSALS: usize = 64;
/// What a `run` request that waits for a slot counts for beside its own bytes.
const RUN_OVERHEAD: usize = 2048;
/// How long the instance that runs a job has to answer a cancellation before the others do.
const OWNER_FIRST: Duration = Duration::from_millis(250);
/// How long a request that was fetched waits for a slot before it is left to others.
const IN_LINE: Duration = Duration::from_secs(1);
/// How long recording a cancellation may hold up its answer.
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);
/// How long a cancellation waits for a job in memory, where nothing else remembers it.
const AN_HOUR: Duration = Duration::from_secs(3600);
/// Cancellations that are looked into at once.
const CANCELLATIONS: usize = 8192;

/// The parts that take work and hand it to the runner.
#[derive(Clone)]
pub struct Intake {
    /// The connection.
    pub connection: Connection,
    /// Who answers.
    pub publisher: Publisher,
    /// The cancellations that were answered.
    pub cancellations: Arc<Tally>,
    /// Who runs what is taken.
    pub runner: Arc<Runner>,
    /// The slots.
    pub slots: Slots,
    /// The jobs under way.
    pub jobs: TaskTracker,
    /// How far the end has come.
    pub shutdown: Shutdown,
    /// How long a `run` request waits for a slot.
    pub run_slot_timeout: Duration,
    /// Bytes of `run` requests that may wait.
    pub buffer_bytes: usize,
    /// The records of durable jobs, where there are any.
    pub records: Option<Records>,
    /// Who is told of those that wait.
    pub metrics: Metrics,
}

impl Intake {
    /// Runs what `execute` asks for: a healthy engine first, then a free slot, and only then is the
    /// request taken.
    pub async fn execute(self, mut source: Box<dyn Source>, mut engine: watch::Receiver<Health>) {
        loop {
            let taken = self.unless_draining(async {
                tokio::select! {
                    biased;
                    () = self.could_run(&mut engine) => {}
                    () = source.rest() => return None,
                }
                tokio::select! {
                    () = source.ready() => {}
                    // Back to waiting: what is taken now would only fail.
                    () = down(&mut engine) => return None,
                }
                // A `run` request may have been faster; then this one is next in line.
                let slot = self.slots.take_within(IN_LINE).await?;
                Some((source.next().await, slot))
            });
            match taken.await {
                None => break,
                Some(None) => {}
                Some(Some((delivery, slot))) => {
                    self.spawn_job(delivery, slot);
                    // The job before the next pull.
                    tokio::task::yield_now().await;
                }
            }
        }
        for message in source.close().await {
            self.refuse(message, shutting_down());
        }
    }

    /// Waits for a healthy engine and a free slot.
    async fn could_run(&self, engine: &mut watch::Receiver<Health>) {
        up(engine).await;
        self.slots.free().await;
    }

    /// Answers what found the buffer full.
    pub async fn answer_refused(self, mut refused: mpsc::Receiver<Message>) {
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
    pub async fn run(self, mut requests: Subscriber, engine: watch::Receiver<Health>) {
        // In KiB: what waits here is bounded as the buffer of the other requests is.
        let places = u32::try_from(self.buffer_bytes >> 10).unwrap_or(u32::MAX).min(1 << 29);
        let waiting = Arc::new(Semaphore::new(places as usize));
        let mut count = 0;
        while let Some(Some(message)) = self.unless_draining(requests.next()).await {
            count += 1;
            let message = received(message);
            if engine.borrow().is_away() {
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
            let waiting = self.metrics.caller_waits();
            self.jobs.spawn(async move {
                let patience = daemon.run_slot_timeout;
                let slot = daemon.unless_draining(daemon.slots.take_within(patience)).await;
                drop((place, waiting));
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
        let refuse = |message| self.refuse(received(message), shutting_down());
        self.connection.unsubscribe(&mut requests, count, refuse).await;
    }

    fn spawn_job(&self, delivery: Delivery, slot: Slot) {
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

    /// Follows what `cancel` asks for. Every instance is asked; the one that runs the job answers first.
    pub async fn cancel(self, mut requests: Subscriber) {
        let elsewhere = Arc::new(Semaphore::new(CANCELLATIONS));
        let others = TaskTracker::new();
        while let Some(message) = requests.next().await {
            let asked = Instant::now();
            // What runs here is stopped without waiting for anything.
            let id = match by_id::decode(&message.payload) {
                Ok(id) => id,
                Err(error) => {
                    self.answer_cancellation(asked, message.reply, Err(error)).await;
                    continue;
                }
            };
            let asked_at = SystemTime::now();
            let patience = match self.records {
                Some(_) => self.run_slot_timeout + CANCEL_PATIENCE,
                None => AN_HOUR,
            };
            // What waits in this instance's memory is known to nobody else.
            let recorded = self.runner.cancels().cancel(&id, patience);
            if recorded.is_some() {
                tracing::info!(job = %id, "cancelling the job");
            }
            if recorded == Some(false) {
                let answer = cancel::answer(&id, &Answer::Stopping);
                self.answer_cancellation(asked, message.reply, Ok(answer)).await;
                continue;
            }
            let Ok(place) = elsewhere.clone().try_acquire_owned() else {
                let error = JobError::new(
                    code::BUSY,
                    "too many cancellations are under way; try again later",
                );
                self.answer_cancellation(asked, message.reply, Err(error)).await;
                continue;
            };
            let intake = self.clone();
            others.spawn(async move {
                let answer = intake.record_cancellation(id, asked_at, recorded.is_some()).await;
                intake.answer_cancellation(asked, message.reply, answer).await;
                drop(place);
            });
        }
    }

    /// Sees to it that a job is cancelled wherever it is, and stays so should its worker die now: only
    /// then it is answered.
    async fn record_cancellation(
        &self,
        id: JobId,
        asked_at: SystemTime,
        runs_here: bool,
    ) -> Result<Bytes, JobError> {
        if !runs_here {
            tokio::time::sleep(OWNER_FIRST).await;
        }
        let Some(records) = &self.records else {
            return Ok(cancel::answer(&id, &Answer::WillNotStart));
        };
        let recorded = records.request_cancel(&id, asked_at);
        match tokio::time::timeout(CANCEL_PATIENCE, recorded).await {
            // It was under way, though its function may not have begun.
            Ok(Answer::WillNotStart) if runs_here => Ok(cancel::answer(&id, &Answer::Stopping)),
            Ok(answer) => Ok(cancel::answer(&id, &answer)),
            Err(_) => Err(JobError::new(
                code::JETSTREAM_UNAVAILABLE,
                "JetStream did not take the cancellation in time; try again later",
            )),
        }
    }

    async fn answer_cancellation(
        &self,
        asked: Instant,
        to: Option<Subject>,
        answer: Result<Bytes, JobError>,
    ) {
        self.cancellations.observe(asked.elapsed(), answer.as_ref().err());
        self.publisher.answer(to, &answer).await;
    }
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
