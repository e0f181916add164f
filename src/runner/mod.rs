//! One delivery to exactly one outcome: decode, run, publish, settle, clean up.

mod admit;
mod attempt;
mod conclude;
mod perform;
mod ticket;
mod verdict;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use async_nats::HeaderValue;
use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::admission::Slot;
use crate::backend::Backend;
use crate::cancel::Cancels;
use crate::capture::Captured;
use crate::config::Policy;
use crate::job::{
    self, Failure, JobError, JobId, Limits, Outcome, StartKind, Status, Timings, code,
};
use crate::metrics::Metrics;
use crate::objects::Objects;
use crate::protocol::{Refusal, Request, Subjects, request};
use crate::publish::{Publisher, Route};
use crate::retry::Backoff;
use crate::service::Tally;
use crate::shutdown::Shutdown;
use crate::source::{Delivery, JOB_TTL, Message, REQUEST_OBJECT, Settle, expiry};
use crate::spans::{JobSpan, Spans};
use crate::state::{Opened, Records};
use crate::trace::TraceContext;

use attempt::Attempt;
pub use attempt::LAST_PATIENCE;
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
/// What requests may take in memory that wait for the outcomes of others of their ids, in KiB.
const FOLLOWERS_KIB: usize = 16 << 10;
/// Delays between their looks.
const LOOKS: Backoff = Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Room for the headers of a result, in bytes.
const RESULT_HEADERS: usize = 4096;

/// What a runner needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The instance's name, on every outcome.
    pub worker: String,
    /// The subjects requests may not be answered on.
    pub subjects: Subjects,
    /// How many attempts a job has.
    pub max_attempts: u32,
    /// How often a running job's record is looked at.
    pub look_interval: Duration,
    /// From TERM to KILL.
    pub stop_grace: Duration,
    /// How long a killed function may take to be gone before it is given up on.
    pub kill_patience: Duration,
    /// How long publishing may delay the clean-up.
    pub publish_timeout: Duration,
    /// The `run` requests that were answered.
    pub runs: Arc<Tally>,
}

/// What a runner needs to know of jobs, and may be told otherwise between two of them.
#[derive(Clone, Debug)]
pub struct Rules {
    /// What requests may ask for.
    pub policy: Policy,
    /// Bytes kept of each output stream.
    pub output_limit: usize,
    /// Whether output is published while a function runs, unless its request says.
    pub live_logs: bool,
    /// Bytes of a job's live output that may wait for NATS.
    pub live_logs_buffer: usize,
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
    rules: RwLock<Arc<Rules>>,
    shutdown: Shutdown,
    /// Told when a run failed for the engine's sake, so that it is looked at before the next.
    suspicions: watch::Sender<u64>,
    metrics: Metrics,
    /// Where spans of jobs are exported.
    spans: Option<Arc<Spans>>,
}

/// Who asked, where the answer goes, and since when they wait.
struct Context {
    message: Message,
    route: Route,
    begun: Instant,
    attempt: u32,
    /// How many of the attempts do not count.
    spare: u32,
    /// Where this attempt's spans are to be exported: their ids.
    span: Option<JobSpan>,
}

/// A request that will not run, and why.
struct Refused {
    id: JobId,
    image: Option<String>,
    failure: Failure,
}

impl Runner {
    /// A runner on `backend`. Every failure that puts the engine in doubt bumps `suspicions`.
    #[must_use]
    pub fn new(
        backend: Arc<dyn Backend>,
        publisher: Publisher,
        options: Options,
        rules: Rules,
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
            followers: Semaphore::new(FOLLOWERS_KIB),
            options,
            rules: RwLock::new(Arc::new(rules)),
            shutdown,
            suspicions,
            metrics: Metrics::default(),
            spans: None,
        }
    }

    /// The same, for jobs from a durable queue.
    #[must_use]
    pub fn durable(self, publisher: Publisher, records: Records, objects: Option<Objects>) -> Self {
        Self { publisher, records: Some(records), objects, ..self }
    }

    /// The same, with what happens told to `metrics`.
    #[must_use]
    pub fn metered(self, metrics: Metrics) -> Self {
        Self { metrics, ..self }
    }

    /// The same, with spans of its jobs exported.
    #[must_use]
    pub fn traced(self, spans: Option<Arc<Spans>>) -> Self {
        Self { spans, ..self }
    }

    /// Has jobs that are taken from now on follow these rules.
    pub fn set_rules(&self, rules: Rules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    fn rules(&self) -> Arc<Rules> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The jobs that can be cancelled.
    #[must_use]
    pub fn cancels(&self) -> Cancels {
        self.cancels.clone()
    }

    /// Takes a delivery to its outcome. The slot is held until the container is gone.
    pub async fn handle(&self, delivery: Delivery, slot: Slot) {
        let Delivery { message, settle } = delivery;
        let begun = Instant::now();
        crate::stage!("taken", message.id);
        let (decoded, mut context) = match self.body(&message).await {
            Ok(body) => self.decode(message, body, begun),
            Err(Failure::Transient(error)) if settle.can_retry() => {
                tracing::warn!(job = %message.id, %error, "the request could not be read yet; it is tried again");
                let _ = settle.retry(ATTEMPTS.delay(message.attempt)).await;
                return;
            }
            Err(failure) => {
                let (_, context) = self.decode(message, None, begun);
                let id = context.message.id.clone();
                (Err(Refused { id, image: None, failure }), context)
            }
        };
        let (id, image) = match &decoded {
            Ok(request) => (request.job.id.clone(), Some(request.job.image.clone())),
            Err(refused) => (refused.id.clone(), refused.image.clone()),
        };
        crate::stage!("decoded", id);
        // A request that comes again while this instance is at it: its consumer was made anew, or
        // the server lost sight of it. The one that runs decides what becomes of both.
        let _turn = self.turn(context.message.sequence).await;
        let Some(settle) = demoted(&decoded, &context, settle).await else { return };
        let admitted = self.admit(&id, image.clone(), &context, settle, slot).await;
        let Some((mut ticket, settle, slot)) = admitted else { return };
        crate::stage!("admitted", id);
        (context.attempt, context.spare) = (ticket.attempt(), ticket.record().handed_over);
        self.begin_span(&mut context, &id);
        let failure = match decoded {
            _ if context.attempt > self.options.max_attempts + context.spare => {
                context.attempt -= 1;
                Failure::Permanent(exhausted(&format!("begun {} times", context.attempt)))
            }
            Err(refused) => refused.failure,
            Ok(request) => return self.perform(request, context, ticket, settle, slot).await,
        };
        // Nothing runs: the answer needs no slot. But what a queue keeps is not to be fetched faster
        // than its end is confirmed.
        let _slot = Some(slot).filter(|_| settle.is_durable());
        let outcome = self.outcome(id, image, &NO_LIMITS, &context, Attempt::failed(failure));
        self.conclude(outcome, &context, &mut ticket, settle).await;
    }

    /// Answers a message without running it.
    pub async fn refuse(&self, message: Message, error: JobError) {
        // What kind of request it is decides where the answer goes, even if it is a bad one.
        let (decoded, mut context) = self.decode(message, None, Instant::now());
        let (id, image, failure) = match decoded {
            Ok(Request { job, .. }) => {
                // A request that was told to come back is no job yet.
                context.route.results = error.code != code::BUSY;
                (job.id, Some(job.image), Failure::Permanent(error))
            }
            Err(Refused { id, image, failure }) => (id, image, failure),
        };
        self.begin_span(&mut context, &id);
        let outcome = self.outcome(id, image, &NO_LIMITS, &context, Attempt::failed(failure));
        self.report(&outcome);
        let made = Instant::now();
        let publish = async {
            self.publisher.publish(&outcome, &context.route, &self.shutdown.stopping).await;
            self.tally(&outcome, &context);
            self.export(&outcome, &context, Some(made.elapsed()));
            if outcome.status == Status::Rejected
                && let Some(error) = &outcome.error
            {
                let image = outcome.image.as_deref();
                self.bury_within_reason(&context, &outcome.id, image, 0, error).await;
            }
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
        let (decoded, mut context) = self.decode(message, None, Instant::now());
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
            // Those who asked were told then, or will be.
            Some(Opened::Ended(_) | Opened::UnderWay) => return true,
            Some(Opened::Stale) | None => return false,
        };
        // The claim is no attempt.
        context.attempt = (ticket.attempt() - 1).max(1);
        self.begin_span(&mut context, &id);
        let error = exhausted(&format!("delivered {deliveries} times"));
        let attempt = Attempt::failed(Failure::Permanent(error));
        let mut outcome = self.outcome(id, image, &NO_LIMITS, &context, attempt);
        if ticket.cancel_requested() {
            outcome.status = Status::Cancelled;
            outcome.error = Some(verdict::cancelled());
        }
        let made = Instant::now();
        let published = tokio::select! {
            biased;
            published = self.publish(&mut outcome, &context, &mut ticket) => published,
            () = self.shutdown.silent.cancelled() => false,
        };
        self.export(&outcome, &context, published.then(|| made.elapsed()));
        published
    }

    /// The body of a request that is kept as an object; nothing where the message is the request.
    async fn body(&self, message: &Message) -> Result<Option<Bytes>, Failure> {
        let Some(name) = message.headers.get(REQUEST_OBJECT) else { return Ok(None) };
        self.object(REQUEST_OBJECT, name.as_str()).await.map(Some)
    }

    /// An object that a request speaks of; `what` says where.
    async fn object(&self, what: &str, name: &str) -> Result<Bytes, Failure> {
        let Some(objects) = &self.objects else {
            let message = format!(
                "{what}: this worker has no object store: it needs JetStream and an OBJECT_LIMIT above 0"
            );
            return Err(Failure::Rejected(JobError::new(code::STDIN_NOT_FOUND, message)));
        };
        objects.fetch(what, name).await.map(Bytes::from)
    }

    fn decode(
        &self,
        message: Message,
        body: Option<Bytes>,
        begun: Instant,
    ) -> (Result<Request, Refused>, Context) {
        let (rules, subjects) = (self.rules(), &self.options.subjects);
        let payload = body.as_ref().unwrap_or(&message.payload);
        let decoded = request::decode(payload, &message.id, &rules.policy, subjects);
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
        let header = |name: &str| message.headers.get(name).map(HeaderValue::as_str);
        let trace = TraceContext::of(header);
        let route = Route { results: true, replies, trace };
        let attempt = message.attempt;
        let context = Context { message, route, begun, attempt, spare: 0, span: None };
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
            oom_killed: judged.exit.as_ref().map(|exit| exit.oom_killed),
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
                run: judged.exit.as_ref().and_then(|exit| exit.ran).or(ran).filter(|_| ran_at_all),
                total: Some(message.received.elapsed()),
            },
            usage: judged.exit.map(|exit| exit.usage).unwrap_or_default(),
            trace: context.route.trace.clone(),
        }
    }

    /// Makes this attempt a span of its trace, where spans are exported: it is what is passed on from
    /// here.
    fn begin_span(&self, context: &mut Context, id: &JobId) {
        let Some(spans) = &self.spans else { return };
        let caller = context.route.trace.take();
        let (own, span) = spans.begin(caller, id, context.message.received_at);
        (context.route.trace, context.span) = (Some(own), span);
    }

    /// Exports the spans of an attempt whose outcome took so long to be confirmed, if it was.
    fn export(&self, outcome: &Outcome, context: &Context, published: Option<Duration>) {
        if let (Some(spans), Some(span)) = (&self.spans, &context.span) {
            spans.tell(span, outcome, &context.message.subject, published);
        }
    }

    /// Counts the answer to a `run` request.
    fn tally(&self, outcome: &Outcome, context: &Context) {
        if context.message.subject == self.options.subjects.run {
            let at_fault = matches!(outcome.status, Status::Rejected | Status::Error);
            let error = outcome.error.as_ref().filter(|_| at_fault);
            self.options.runs.observe(context.message.received.elapsed(), error);
        }
    }

    /// One log line for one outcome, and one more in the counts.
    fn report(&self, outcome: &Outcome) {
        self.metrics.ended(outcome);
        let error = outcome.error.as_ref().map(tracing::field::display);
        let exit_code = outcome.exit_code;
        let total_ms = outcome.timings.total.map(|d| d.as_millis());
        let (job, status, attempt) = (&outcome.id, outcome.status, outcome.attempt);
        let (image, start) = (outcome.image.as_deref(), outcome.start.map(StartKind::as_str));
        let trace_id = outcome.trace.as_ref().map(TraceContext::trace_id);
        if status == Status::Error {
            tracing::warn!(%job, image, %status, exit_code, attempt, start, total_ms, trace_id, error, "job ended");
        } else {
            tracing::info!(%job, image, %status, exit_code, attempt, start, total_ms, trace_id, error, "job ended");
        }
    }
}

/// Moves a request to the end of the queue of the priority it asks for, where that is a lower one
/// than its queue's. Hands back what is still to be settled.
async fn demoted(
    decoded: &Result<Request, Refused>,
    context: &Context,
    settle: Box<dyn Settle>,
) -> Option<Box<dyn Settle>> {
    let Ok(Request { priority: Some(priority), .. }) = decoded else { return Some(settle) };
    let is_lower = context.message.priority.is_some_and(|queue| queue.is_before(*priority));
    // One that was delivered before may have been begun where it is.
    if !is_lower || context.message.attempt > 1 {
        return Some(settle);
    }
    // Where there is no other queue it runs here.
    settle.demote(&context.message, *priority).await.err()
}

/// Why a job is given up that was tried often enough.
fn exhausted(how: &str) -> JobError {
    let message =
        format!("the job was {how}, and no worker got to its end: MAX_DELIVER allows no more");
    JobError::new(code::MAX_DELIVER, message)
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
