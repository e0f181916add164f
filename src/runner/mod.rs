//! One delivery to exactly one outcome: decode, run, publish, settle, clean up.

mod attempt;
mod ticket;
mod verdict;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::admission::Slot;
use crate::backend::{Backend, Run};
use crate::cancel::Cancels;
use crate::capture::Captured;
use crate::config::Policy;
use crate::job::{
    self, Failure, JobError, JobId, Limits, Outcome, Retry, Status, Timings, Usage, code,
};
use crate::live::LiveLog;
use crate::objects::Objects;
use crate::protocol::outcome::{self, ResultMessage};
use crate::protocol::record::{self, Record, State};
use crate::protocol::{Refusal, Request, Subjects, request};
use crate::publish::{Publisher, Route};
use crate::retry::Backoff;
use crate::shutdown::Shutdown;
use crate::source::{Closed, Delivery, JOB_TTL, Message, Settle, expiry};
use crate::state::{Claim, Opened, Opening, Records};

pub use attempt::LAST_PATIENCE;
use attempt::{Attempt, Orders, Surroundings, Verdict, Why};
use ticket::Ticket;
use verdict::judge;

/// Delays between the attempts of one job.
const ATTEMPTS: Backoff =
    Backoff { first: Duration::from_millis(500), most: Duration::from_secs(30) };
/// Delays between the tries of one clean-up.
const CLEANUPS: Backoff =
    Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Tries after which a container that has stopped is left to the reaper.
const CLEANUP_TRIES: u32 = 4;

/// The limits of what never runs.
const NO_LIMITS: Limits = Limits { timeout: Duration::ZERO, memory_bytes: 0, cpus: 0.0, pids: 0 };
/// How long the rest of a job's live output may take after its end.
const LIVE_LOG_PATIENCE: Duration = Duration::from_secs(60);
/// Requests that may wait for the outcomes of others of their ids.
const MAX_FOLLOWERS: usize = 1024;
/// Delays between their looks.
const LOOKS: Backoff = Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Room for the headers of a result, in bytes.
const RESULT_HEADERS: usize = 4096;

/// What a runner needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The instance's name, on every outcome.
    pub worker: String,
    /// What requests may ask for.
    pub policy: Policy,
    /// The subjects requests may not be answered on.
    pub subjects: Subjects,
    /// How many attempts a job has.
    pub max_attempts: u32,
    /// Bytes kept of each output stream.
    pub output_limit: usize,
    /// How often a running job's record is looked at.
    pub look_interval: Duration,
    /// Whether output is published while a function runs, unless its request says.
    pub live_logs: bool,
    /// Bytes of a job's live output that may wait for NATS.
    pub live_logs_buffer: usize,
    /// From TERM to KILL.
    pub stop_grace: Duration,
    /// How long a killed function may take to be gone before it is given up on.
    pub kill_patience: Duration,
    /// How long publishing may delay the clean-up.
    pub publish_timeout: Duration,
}

/// Runs deliveries on a backend. Shared by all jobs of an instance.
pub struct Runner {
    backend: Arc<dyn Backend>,
    publisher: Publisher,
    /// Where jobs from a durable queue are recorded.
    records: Option<Records>,
    /// Where big inputs and outputs of such jobs are kept.
    objects: Option<Objects>,
    cancels: Cancels,
    /// The requests from the queue that this instance is at, by their place.
    under_way: Mutex<HashMap<u64, CancellationToken>>,
    /// Requests of jobs that are under way, which wait for their outcome.
    followers: Semaphore,
    options: Options,
    shutdown: Shutdown,
    /// Told when a run failed for the engine's sake, so that it is looked at before the next.
    suspicions: watch::Sender<u64>,
}

/// Who asked, where the answer goes, and since when they wait.
struct Context {
    message: Message,
    route: Route,
    begun: Instant,
    attempt: u32,
}

/// A request that will not run, and why.
struct Refused {
    id: JobId,
    image: Option<String>,
    failure: Failure,
}

/// An outcome as it is published.
struct Decided {
    id: JobId,
    /// Why the request is a dead letter, where it is one.
    dead: Option<JobError>,
    image: Option<String>,
    attempt: u32,
    result: ResultMessage,
    json: Bytes,
}

/// This instance's place at a request; left when it is dropped.
struct Turn<'a> {
    runner: &'a Runner,
    sequence: u64,
    _ended: DropGuard,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.runner.turns().remove(&self.sequence);
    }
}

/// What remains to be done once an attempt is over.
enum Next {
    /// The outcome is this attempt's.
    Conclude,
    /// The request goes back, for another attempt after a while.
    Again(Duration),
}

impl Runner {
    /// A runner on `backend`. Every failure that puts the engine in doubt bumps `suspicions`.
    #[must_use]
    pub fn new(
        backend: Arc<dyn Backend>,
        publisher: Publisher,
        options: Options,
        shutdown: Shutdown,
        suspicions: watch::Sender<u64>,
    ) -> Self {
        Self {
            backend,
            publisher,
            records: None,
            objects: None,
            cancels: Cancels::default(),
            under_way: Mutex::default(),
            followers: Semaphore::new(MAX_FOLLOWERS),
            options,
            shutdown,
            suspicions,
        }
    }

    /// The same, for jobs from a durable queue.
    #[must_use]
    pub fn durable(self, publisher: Publisher, records: Records, objects: Option<Objects>) -> Self {
        Self { publisher, records: Some(records), objects, ..self }
    }

    /// The jobs that can be cancelled.
    #[must_use]
    pub fn cancels(&self) -> Cancels {
        self.cancels.clone()
    }

    /// Takes a delivery to its outcome. The slot is held until the container is gone.
    pub async fn handle(&self, delivery: Delivery, slot: Slot) {
        let Delivery { message, mut settle } = delivery;
        let (decoded, mut context) = self.decode(message, Instant::now());
        if let Ok(Request { priority: Some(priority), .. }) = &decoded
            && context.message.priority.is_some_and(|queue| queue.is_before(*priority))
        {
            match settle.demote(&context.message, *priority).await {
                Ok(()) => return,
                // There is no other queue: it runs here.
                Err(back) => settle = back,
            }
        }
        let (id, image) = match &decoded {
            Ok(request) => (request.job.id.clone(), Some(request.job.image.clone())),
            Err(refused) => (refused.id.clone(), refused.image.clone()),
        };
        // A request that comes again while this instance is at it: its consumer was made anew, or
        // the server lost sight of it. The one that runs decides what becomes of both.
        let _turn = self.turn(context.message.sequence).await;
        let Some((mut ticket, mut settle, slot)) =
            self.admit(&id, image, &context, settle, slot).await
        else {
            return;
        };
        context.attempt = ticket.attempt();
        if context.attempt > self.options.max_attempts {
            context.attempt -= 1;
            let (image, attempts) = (ticket.record().image.clone(), context.attempt);
            let message = format!(
                "the job was begun {attempts} times, and no worker got to its end: MAX_DELIVER allows no more"
            );
            let error = JobError::new(code::MAX_DELIVER, message);
            let attempt = Attempt::failed(Failure::Permanent(error));
            let outcome = self.outcome(id, image, &NO_LIMITS, &context, attempt);
            self.conclude(outcome, &context, &mut ticket, settle).await;
            return;
        }
        let request = match decoded {
            Ok(request) => request,
            Err(Refused { id, image, failure }) => {
                // Nothing runs: the answer needs no slot. But what a queue keeps is not to be
                // fetched faster than its end is confirmed.
                let _slot = Some(slot).filter(|_| settle.is_durable());
                let outcome =
                    self.outcome(id, image, &NO_LIMITS, &context, Attempt::failed(failure));
                self.conclude(outcome, &context, &mut ticket, settle).await;
                return;
            }
        };
        let Request { mut job, expires_at, retry, stdin_object, live_logs, .. } = request;
        let recorded = matches!(ticket, Ticket::Claimed(_));
        let registration = self.cancels.register(&job.id, recorded);
        let orders = Orders { cancelled: registration.token.clone(), ..Orders::default() };
        if ticket.cancel_requested() {
            orders.cancelled.cancel();
        }
        let expires_at = expires_at.into_iter().chain(context.message.expires_at).min();
        let unstarted = if orders.cancelled.is_cancelled() {
            Some(verdict::cancelled())
        } else {
            expires_at.filter(|at| *at <= SystemTime::now()).map(verdict::expired)
        };
        if let Some(error) = unstarted {
            let mut outcome = self.outcome(
                job.id,
                Some(job.image),
                &job.limits,
                &context,
                Attempt::failed(Failure::Permanent(error)),
            );
            outcome.status = Status::Cancelled;
            self.conclude(outcome, &context, &mut ticket, settle).await;
            return;
        }
        crate::failpoint!("job.claimed");
        tracing::debug!(job = %job.id, image = %job.image, attempt = context.attempt, "job begins");
        let (id, limits) = (job.id.clone(), job.limits.clone());
        let image = job.image.clone();
        let live = live_logs
            .unwrap_or(self.options.live_logs)
            .then(|| self.publisher.live_log(&id, context.attempt, self.options.live_logs_buffer));
        let input = self.input(stdin_object).await;
        let (mut run, attempt) = match input {
            Ok(stdin) => {
                job.stdin = stdin.or(job.stdin);
                let mut run = self.backend.prepare(job);
                let attempt =
                    self.attempt(run.as_mut(), &limits, &mut ticket, &orders, live.as_ref()).await;
                (Some(run), attempt)
            }
            Err(failure) => (None, Attempt::failed(failure)),
        };
        let live_logs_dropped = live.map_or(0, |live| {
            let dropped = live.dropped();
            // Whoever waits for the outcome does not wait for it.
            drop(live.finish(LIVE_LOG_PATIENCE));
            dropped
        });
        crate::failpoint!("function.ended");
        if matches!(attempt.verdict, Verdict::Ended(Why::Fenced, _)) {
            tracing::warn!(job = %id, attempt = context.attempt, "another worker has taken the job over: this attempt counts for nothing");
            self.clean_up(&mut run, &id).await;
            return;
        }
        if let Verdict::Failed(failure) = &attempt.verdict
            && is_suspicious(failure)
        {
            self.suspicions.send_modify(|n| *n += 1);
        }
        let next = self.next(&attempt.verdict, &limits, retry.as_ref(), &context, settle.as_ref());
        let mut cleaned = false;
        if let Next::Again(delay) = next {
            self.report_again(&id, &attempt.verdict, &context, delay);
            // The next attempt must not run beside what is left of this one.
            cleaned = tokio::select! {
                biased;
                () = self.clean_up(&mut run, &id) => true,
                () = self.shutdown.silent.cancelled() => false,
            };
            if !cleaned && settle.is_durable() {
                // It comes again when this worker has been silent for long enough.
                return;
            }
            if cleaned {
                let counts = !delay.is_zero();
                match self.give_back(settle, &mut ticket, delay, counts).await {
                    Ok(()) => return,
                    // Nobody takes the job back: this attempt was the last.
                    Err(back) => settle = back,
                }
            }
        }

        let mut outcome = self.outcome(id.clone(), Some(image), &limits, &context, attempt);
        outcome.live_logs_dropped = live_logs_dropped;
        if ticket.cancel_requested() && matches!(next, Next::Again(_)) {
            outcome.status = Status::Cancelled;
            outcome.error = Some(verdict::cancelled());
        }
        // The outcome first: whoever waits for it does not wait for the removal. But a server that
        // is not there must not keep a container.
        let conclusion = self.conclude(outcome, &context, &mut ticket, settle);
        tokio::pin!(conclusion);
        let concluded = tokio::select! {
            biased;
            () = &mut conclusion => true,
            () = tokio::time::sleep(self.options.publish_timeout) => false,
            () = self.shutdown.stopping.cancelled() => false,
        };
        let clean_up = async {
            if !cleaned {
                self.clean_up(&mut run, &id).await;
            }
        };
        if concluded {
            crate::failpoint!("delivery.acked");
            clean_up.await;
        } else {
            tokio::join!(conclusion, clean_up);
        }
        drop((slot, registration));
    }

    /// A ticket for the job, and what goes with it; nothing where it is dealt with otherwise.
    async fn admit(
        &self,
        id: &JobId,
        image: Option<String>,
        context: &Context,
        settle: Box<dyn Settle>,
        slot: Slot,
    ) -> Option<(Ticket, Box<dyn Settle>, Slot)> {
        let message = &context.message;
        let (Some(records), Some(_)) = (&self.records, message.sequence) else {
            let (attempt, at) = (message.attempt, message.received_at);
            let worker = &self.options.worker;
            let ticket = Ticket::unrecorded(id.clone(), image, attempt, worker, at);
            return Some((ticket, settle, slot));
        };
        match self.open(records, id, image, context).await? {
            Opened::Mine(claim) => return Some((Ticket::Claimed(claim), settle, slot)),
            Opened::Ending(mut claim) => {
                if self.complete(&mut claim, context).await {
                    settle.done().await;
                }
            }
            Opened::Ended(record) => {
                self.repeat(&record, context).await;
                settle.done().await;
            }
            Opened::UnderWay => {
                drop(slot);
                self.follow(records, id, context, settle).await;
            }
            // An answer of any kind would be about the other delivery.
            Opened::Stale => {
                tracing::info!(job = %id, "another worker has a later delivery of the request; this one is dropped");
            }
        }
        None
    }

    /// Opens the job, unless the daemon's end comes before an answer.
    async fn open(
        &self,
        records: &Records,
        id: &JobId,
        image: Option<String>,
        context: &Context,
    ) -> Option<Opened> {
        let message = &context.message;
        let opening = Opening {
            id: id.clone(),
            image,
            sequence: message.sequence,
            queued_at: message.received_at,
            delivery: message.delivery,
        };
        tokio::select! {
            biased;
            opened = records.open(&opening) => Some(opened),
            () = self.shutdown.stopping.cancelled() => None,
        }
    }

    /// Waits until this instance is done with another delivery of the same request, and takes its
    /// place.
    async fn turn(&self, sequence: Option<u64>) -> Option<Turn<'_>> {
        let sequence = sequence?;
        loop {
            let ended = match self.turns().entry(sequence) {
                Entry::Vacant(vacant) => {
                    let ended = CancellationToken::new();
                    vacant.insert(ended.clone());
                    return Some(Turn { runner: self, sequence, _ended: ended.drop_guard() });
                }
                Entry::Occupied(occupied) => occupied.get().clone(),
            };
            ended.cancelled().await;
        }
    }

    fn turns(&self) -> MutexGuard<'_, HashMap<u64, CancellationToken>> {
        // A map is whole whatever its last holder did.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Settles a request of a job that another request brings to its end, once that is there: whoever
    /// asked to be told is told.
    async fn follow(
        &self,
        records: &Records,
        id: &JobId,
        context: &Context,
        settle: Box<dyn Settle>,
    ) {
        tracing::info!(job = %id, "a request of this id is in the queue already; this one waits for its outcome");
        if context.route.replies.is_empty() {
            return settle.done().await;
        }
        let Ok(_place) = self.followers.try_acquire() else {
            tracing::warn!(job = %id, "too many requests wait for outcomes of others; this one goes without an answer");
            return settle.done().await;
        };
        for looks in 1.. {
            tokio::select! {
                () = tokio::time::sleep(LOOKS.delay(looks)) => {}
                () = self.shutdown.draining.cancelled() => {
                    let _ = settle.retry(Duration::ZERO).await;
                    return;
                }
            }
            if let Some(record) = records.ended(id).await {
                self.repeat(&record, context).await;
                return settle.done().await;
            }
        }
    }

    /// Publishes the outcome that a worker decided on and did not get to publish. Returns whether the
    /// request is done with.
    async fn complete(&self, claim: &mut Claim, context: &Context) -> bool {
        let record = claim.record.clone();
        let limit = self.publisher.max_payload();
        let json = record.outcome_json().unwrap_or_default();
        let Some(result) = outcome::result_of_json(&json, &record.interleaving, limit) else {
            tracing::error!(job = %record.id, "the record of an outcome that is none");
            return false;
        };
        tracing::info!(job = %record.id, "publishing the outcome another worker left");
        let decided = Decided {
            id: record.id.clone(),
            dead: record.error().filter(|_| record.status().is_some_and(is_dead)),
            image: record.image.clone(),
            attempt: record.attempt,
            result,
            json,
        };
        tokio::select! {
            biased;
            done = self.announce(claim, context, decided) => done,
            () = self.shutdown.silent.cancelled() => false,
        }
    }

    /// Says again what became of a job that ended before.
    async fn repeat(&self, record: &Record, context: &Context) {
        tracing::info!(job = %record.id, status = record.status().map(Status::as_str), "the job ended before; its outcome is told again");
        self.publisher.event(record).await;
        if let Some(json) = record.outcome_json() {
            self.publisher.reply(&record.id, &json, &context.route.replies).await;
        }
    }

    /// The standard input that is kept as an object.
    async fn input(&self, name: Option<String>) -> Result<Option<Bytes>, Failure> {
        let Some(name) = name else { return Ok(None) };
        let Some(objects) = &self.objects else {
            let message = "stdin_object: this worker has no object store: it needs JetStream and an OBJECT_LIMIT above 0";
            return Err(Failure::Rejected(JobError::new(code::STDIN_NOT_FOUND, message)));
        };
        objects.fetch(&name).await.map(|bytes| Some(bytes.into()))
    }

    /// One attempt, with the record kept up to date beside it.
    async fn attempt(
        &self,
        run: &mut dyn Run,
        limits: &Limits,
        ticket: &mut Ticket,
        orders: &Orders,
        live: Option<&LiveLog>,
    ) -> Attempt {
        let (progress, told) = watch::channel(None);
        let recorded = matches!(ticket, Ticket::Claimed(_));
        let objects = self.objects.as_ref().filter(|_| recorded).map_or(0, Objects::limit);
        let around = Surroundings {
            limits,
            options: &self.options,
            shutdown: &self.shutdown,
            orders,
            progress: &progress,
            keep: self.options.output_limit.max(objects),
            live,
        };
        tokio::select! {
            biased;
            attempt = attempt::drive(run, &around) => attempt,
            () = ticket.watch(&self.publisher, told, orders, self.options.look_interval) => {
                // It never returns.
                Attempt::failed(Failure::Transient(JobError::new(code::ENGINE_ERROR, "")))
            }
        }
    }

    /// What is to be done after an attempt that ended so.
    fn next(
        &self,
        verdict: &Verdict,
        limits: &Limits,
        retry: Option<&Retry>,
        context: &Context,
        settle: &dyn Settle,
    ) -> Next {
        let keeps = settle.is_durable() || !self.shutdown.draining.is_cancelled();
        if !settle.can_retry() || !keeps || context.attempt >= self.options.max_attempts {
            return Next::Conclude;
        }
        let delay = ATTEMPTS.delay(context.attempt);
        match verdict {
            // Others can do what this worker has no time for.
            Verdict::Ended(Why::Shutdown, _) if settle.is_durable() => Next::Again(Duration::ZERO),
            Verdict::Failed(Failure::Permanent(error))
                if settle.is_durable() && error.code == code::JOB_STOPPED =>
            {
                Next::Again(Duration::ZERO)
            }
            Verdict::Failed(Failure::Transient(_)) => Next::Again(delay),
            verdict => {
                let status = verdict::status(verdict, limits);
                let again = retry.is_some_and(|retry| retry.covers(status, context.attempt));
                if again { Next::Again(delay) } else { Next::Conclude }
            }
        }
    }

    fn report_again(&self, id: &JobId, verdict: &Verdict, context: &Context, delay: Duration) {
        let attempt = context.attempt;
        let delay_ms = delay.as_millis();
        match verdict {
            Verdict::Failed(failure) => {
                tracing::warn!(job = %id, attempt, %failure, delay_ms, "the infrastructure failed the job; it will be tried again");
            }
            Verdict::Ended(Why::Shutdown, _) => {
                tracing::info!(job = %id, attempt, "the job is left to another worker");
            }
            _ => {
                tracing::info!(job = %id, attempt, delay_ms, "the function failed; its request asks for another attempt");
            }
        }
    }

    /// Records that the job waits again, and gives the request back.
    async fn give_back(
        &self,
        settle: Box<dyn Settle>,
        ticket: &mut Ticket,
        delay: Duration,
        counts: bool,
    ) -> Result<(), Box<dyn Settle>> {
        let retry_at = SystemTime::now() + delay;
        let queued = ticket.update(&self.publisher, |record| {
            record.state = State::Queued;
            record.retry_at = Some(retry_at);
            // A worker that was told to stop is no fault of the job's.
            record.attempt -= u32::from(!counts && record.attempt > 0);
            (record.running_at, record.pulling_at, record.pull) = (None, None, None);
        });
        let queued = tokio::select! {
            biased;
            queued = queued => queued,
            // Without a word the request comes back as well, only later.
            () = self.shutdown.silent.cancelled() => return Ok(()),
        };
        if queued.is_err() {
            // Whoever has it sees to it.
            return Ok(());
        }
        if ticket.cancel_requested() {
            return Err(settle);
        }
        let id = ticket.record().id.clone();
        match settle.retry(delay).await {
            Ok(()) => Ok(()),
            Err(Closed) => {
                tracing::debug!(job = %id, "nobody takes the job back");
                Err(Box::new(crate::source::core::Once))
            }
        }
    }

    /// Publishes an outcome, records it, and settles the request, in that order; for as long as it
    /// takes while the daemon lives, and a moment longer at its end.
    async fn conclude(
        &self,
        mut outcome: Outcome,
        context: &Context,
        ticket: &mut Ticket,
        settle: Box<dyn Settle>,
    ) {
        self.report(&outcome);
        let published = tokio::select! {
            biased;
            published = self.publish(&mut outcome, context, ticket) => published,
            () = self.shutdown.silent.cancelled() => {
                let (job, status) = (&outcome.id, outcome.status);
                if settle.is_durable() {
                    tracing::warn!(%job, %status, "JetStream did not confirm the outcome: the job goes to another worker");
                } else {
                    tracing::error!(%job, %status, "NATS did not confirm the outcome: it may be lost");
                }
                false
            }
        };
        if published {
            settle.done().await;
        }
    }

    /// Publishes and records an outcome. Returns whether the request is done with.
    async fn publish(&self, outcome: &mut Outcome, context: &Context, ticket: &mut Ticket) -> bool {
        let claim = match ticket {
            Ticket::Claimed(claim) => claim,
            Ticket::Unrecorded(record) => {
                self.publish_unrecorded(outcome, context, record).await;
                return true;
            }
        };
        let limit = self.publisher.json_limit().saturating_sub(record::ENDED_OVERHEAD);
        if let Some(objects) = &self.objects {
            let room = limit.saturating_sub(RESULT_HEADERS);
            objects.offload(outcome, self.options.output_limit, room).await;
        }
        let json = match outcome::json(outcome, limit) {
            Ok(json) => json,
            Err(error) => {
                tracing::error!(job = %outcome.id, %error, "the outcome cannot be recorded");
                Bytes::new()
            }
        };
        // From here on whoever has the job publishes this outcome, and who lost it does not.
        if claim.decide(&json, outcome.output.order()).await.is_err() {
            tracing::warn!(job = %outcome.id, "another worker has taken the job over: this outcome counts for nothing");
            return false;
        }
        crate::failpoint!("outcome.decided");
        let decided = Decided {
            id: outcome.id.clone(),
            dead: outcome.error.clone().filter(|_| is_dead(outcome.status)),
            image: outcome.image.clone(),
            attempt: outcome.attempt,
            result: outcome::result_message(outcome, self.publisher.max_payload()),
            json,
        };
        self.announce(claim, context, decided).await
    }

    /// Publishes an outcome that is recorded: the dead letter, the result, the replies; and records
    /// that this was done. Returns whether the request is done with.
    async fn announce(&self, claim: &mut Claim, context: &Context, decided: Decided) -> bool {
        let Decided { id, dead, image, attempt, result, json } = decided;
        if let Some(error) = dead {
            self.publisher.bury(&context.message, &id, image.as_deref(), attempt, &error).await;
        }
        self.publisher.store(&id, result).await;
        crate::failpoint!("result.published");
        self.publisher.reply(&id, &json, &context.route.replies).await;
        if claim.end().await.is_err() {
            tracing::warn!(job = %id, "another worker has taken the job over while its outcome was published");
            return false;
        }
        self.publisher.event(&claim.record).await;
        crate::failpoint!("record.written");
        true
    }

    async fn publish_unrecorded(&self, outcome: &Outcome, context: &Context, record: &mut Record) {
        // That a worker was told to stop is no reason: whoever sent it is told to send it again.
        if let Some(error) = &outcome.error
            && is_dead(outcome.status)
            && error.code != code::JOB_STOPPED
        {
            let (image, attempt) = (outcome.image.as_deref(), outcome.attempt);
            self.publisher.bury(&context.message, &outcome.id, image, attempt, error).await;
        }
        self.publisher.publish(outcome, &context.route, &self.shutdown.stopping).await;
        let ended = outcome::json(outcome, self.publisher.json_limit())
            .ok()
            .and_then(|json| Record::ended(&json, None, SystemTime::now()).ok());
        if let Some(ended) = ended {
            *record = ended;
            self.publisher.event(record).await;
        }
    }

    /// Answers a message without running it.
    pub async fn refuse(&self, message: Message, error: JobError) {
        // What kind of request it is decides where the answer goes, even if it is a bad one.
        let (decoded, mut context) = self.decode(message, Instant::now());
        let (id, image, failure) = match decoded {
            Ok(Request { job, .. }) => {
                // A request that was told to come back is no job yet.
                context.route.results = error.code != code::BUSY;
                (job.id, Some(job.image), Failure::Permanent(error))
            }
            Err(Refused { id, image, failure }) => (id, image, failure),
        };
        let outcome = self.outcome(id, image, &NO_LIMITS, &context, Attempt::failed(failure));
        self.report(&outcome);
        let publish = async {
            if outcome.status == Status::Rejected
                && let Some(error) = &outcome.error
            {
                let image = outcome.image.as_deref();
                self.publisher.bury(&context.message, &outcome.id, image, 0, error).await;
            }
            self.publisher.publish(&outcome, &context.route, &self.shutdown.stopping).await;
        };
        tokio::select! {
            biased;
            () = publish => {}
            () = self.shutdown.silent.cancelled() => {
                let (job, status) = (&outcome.id, outcome.status);
                tracing::error!(%job, %status, "NATS did not confirm the outcome: it may be lost");
            }
        }
    }

    /// Ends a job whose request was delivered for the last time and never settled. Returns whether
    /// the request is done with.
    pub async fn give_up(&self, message: Message) -> bool {
        let deliveries = message.attempt;
        let (decoded, mut context) = self.decode(message, Instant::now());
        let (id, image) = match decoded {
            Ok(Request { job, .. }) => (job.id, Some(job.image)),
            Err(Refused { id, image, .. }) => (id, image),
        };
        let Some(records) = &self.records else { return false };
        // Whoever may still have it has an earlier delivery than this.
        context.message.delivery = Some((u64::MAX, u64::MAX));
        let mut ticket = match self.open(records, &id, image.clone(), &context).await {
            Some(Opened::Mine(claim)) => Ticket::Claimed(claim),
            Some(Opened::Ending(mut claim)) => return self.complete(&mut claim, &context).await,
            // Those who asked were told then; it is the server that forgot.
            Some(Opened::Ended(_)) => return true,
            Some(Opened::UnderWay) => return true,
            Some(Opened::Stale) | None => return false,
        };
        // The claim is no attempt.
        context.attempt = (ticket.attempt() - 1).max(1);
        let message = format!(
            "the request was delivered {deliveries} times, and no worker got to its end: MAX_DELIVER allows no more"
        );
        let error = JobError::new(code::MAX_DELIVER, message);
        let attempt = Attempt::failed(Failure::Permanent(error));
        let mut outcome = self.outcome(id, image, &NO_LIMITS, &context, attempt);
        self.report(&outcome);
        tokio::select! {
            biased;
            published = self.publish(&mut outcome, &context, &mut ticket) => published,
            () = self.shutdown.silent.cancelled() => false,
        }
    }

    fn decode(&self, message: Message, begun: Instant) -> (Result<Request, Refused>, Context) {
        let Options { policy, subjects, .. } = &self.options;
        let decoded = request::decode(&message.payload, &message.id, policy, subjects);
        let asked = match &decoded {
            Ok(Request { reply_to, .. }) => reply_to,
            Err(refusal) => &refusal.reply_to,
        };
        let mut replies: Vec<String> = Vec::new();
        for reply in message.reply.iter().chain(asked) {
            match subjects.check_reply(reply) {
                Err(why) => tracing::warn!(?reply, %why, "no answer is sent there"),
                Ok(()) if replies.contains(reply) => {}
                Ok(()) => replies.push(reply.clone()),
            }
        }
        let route = Route { results: true, replies };
        let attempt = message.attempt;
        let context = Context { message, route, begun, attempt };
        let decoded = decoded.map_err(|refusal| *refusal).and_then(|request| {
            match expiry(&context.message.headers, context.message.received_at) {
                Ok(_) => Ok(request),
                Err(why) => Err(Refusal {
                    id: request.job.id,
                    image: Some(request.job.image),
                    reply_to: request.reply_to,
                    error: JobError::new(
                        code::INVALID_FIELD,
                        format!("header {JOB_TTL}: expected a duration such as 30s: {why}"),
                    ),
                }),
            }
        });
        let decoded = decoded.map_err(|refusal| Refused {
            id: refusal.id,
            image: refusal.image,
            failure: Failure::Rejected(refusal.error),
        });
        (decoded, context)
    }

    /// Removes what the run left in the engine, as often as it takes. At the daemon's end a second
    /// try must do; the next start sees to the rest.
    async fn clean_up(&self, run: &mut Option<Box<dyn Run>>, id: &JobId) {
        let Some(run) = run else { return };
        for failures in 1.. {
            let Err(error) = run.cleanup().await else {
                return;
            };
            let ending = self.shutdown.stopping.is_cancelled() && failures >= 2;
            if ending || (!error.may_be_running && failures >= CLEANUP_TRIES) {
                tracing::warn!(job = %id, %error, "the container stays behind for the reaper");
                return;
            }
            if failures == 1 {
                tracing::warn!(job = %id, %error, "could not remove the container yet; trying on");
            }
            self.suspicions.send_modify(|n| *n += 1);
            tokio::time::sleep(CLEANUPS.delay(failures)).await;
        }
    }

    fn outcome(
        &self,
        id: JobId,
        image: Option<String>,
        limits: &Limits,
        context: &Context,
        attempt: Attempt,
    ) -> Outcome {
        let Attempt { started, ran, output, verdict } = attempt;
        let message = &context.message;
        let judged = judge(verdict, limits);
        // Where the command could not be executed there was no function, and what was said of it
        // is no output.
        let ran_at_all = !judged.not_started;
        let started = started.filter(|_| ran_at_all);
        Outcome {
            id,
            image,
            status: judged.status,
            exit_code: judged.exit.as_ref().map(|exit| exit.code),
            error: judged.error,
            output: if ran_at_all { output } else { Captured::default() },
            objects: job::Objects::default(),
            live_logs_dropped: 0,
            oom_killed: judged.exit.map(|exit| exit.oom_killed),
            attempt: context.attempt,
            worker: self.options.worker.clone(),
            start: started.map(|s| s.kind),
            queued_at: message.received_at,
            started_at: started.map(|s| s.at),
            finished_at: SystemTime::now(),
            timings: Timings {
                queue: Some(context.begun.duration_since(message.received)),
                pull: started.map(|s| s.pull),
                create: started.map(|s| s.create),
                start: started.map(|s| s.start),
                run: ran.filter(|_| ran_at_all),
                total: Some(message.received.elapsed()),
            },
            usage: Usage::default(),
        }
    }

    /// One log line for one outcome.
    fn report(&self, outcome: &Outcome) {
        let error = outcome.error.as_ref().map(tracing::field::display);
        let exit_code = outcome.exit_code;
        let total_ms = outcome.timings.total.map(|d| d.as_millis());
        let (job, status, attempt) = (&outcome.id, outcome.status, outcome.attempt);
        let image = outcome.image.as_deref();
        if status == Status::Error {
            tracing::warn!(%job, image, %status, exit_code, attempt, total_ms, error, "job ended");
        } else {
            tracing::info!(%job, image, %status, exit_code, attempt, total_ms, error, "job ended");
        }
    }
}

/// Whether a job that ended so is a dead letter: nothing ran to an end of its own, and sending the
/// same again as it is may help later, if ever.
fn is_dead(status: Status) -> bool {
    matches!(status, Status::Rejected | Status::Error)
}

/// Whether a failure puts the engine itself in doubt.
fn is_suspicious(failure: &Failure) -> bool {
    [code::ENGINE_UNAVAILABLE, code::ENGINE_TIMEOUT, code::ENGINE_ERROR]
        .contains(&failure.error().code.as_ref())
}
