//! One delivery to exactly one outcome: decode, run, publish, settle, clean up.

mod attempt;
mod verdict;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use crate::admission::Slot;
use crate::backend::{Backend, Run};
use crate::capture::Captured;
use crate::config::Policy;
use crate::job::{
    Failure, Job, JobError, JobId, Limits, Objects, Outcome, Status, Timings, Usage, code,
};
use crate::protocol::{Request, Subjects, request};
use crate::publish::{Publisher, Route};
use crate::retry::Backoff;
use crate::shutdown::Shutdown;
use crate::source::{Delivery, Message, Settle};

pub use attempt::LAST_PATIENCE;
use attempt::{Attempt, Verdict};
use verdict::judge;

/// Delays between the attempts of one job.
const ATTEMPTS: Backoff =
    Backoff { first: Duration::from_millis(500), most: Duration::from_secs(30) };
/// Delays between the tries of one clean-up.
const CLEANUPS: Backoff =
    Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Tries after which a container that has stopped is left to the reaper.
const CLEANUP_TRIES: u32 = 4;

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
        Self { backend, publisher, options, shutdown, suspicions }
    }

    /// Takes a delivery to its outcome. The slot is held until the container is gone.
    pub async fn handle(&self, delivery: Delivery, slot: Slot) {
        let Delivery { message, settle } = delivery;
        let begun = Instant::now();
        let (job, context) = match self.decode(message, begun) {
            Ok(decoded) => decoded,
            Err(refused) => {
                let (outcome, context) = *refused;
                // Nothing runs: the answer needs no slot.
                drop(slot);
                self.report(&outcome);
                self.publish(&outcome, &context.route).await;
                settle.done().await;
                return;
            }
        };
        tracing::debug!(job = %job.id, image = %job.image, attempt = context.message.attempt, "job begins");
        let (id, image, limits) = (job.id.clone(), job.image.clone(), job.limits.clone());
        let mut run = self.backend.prepare(job);
        let attempt = attempt::drive(run.as_mut(), &limits, &self.options, &self.shutdown).await;
        let mut cleaned = false;
        let mut settle = Some(settle);
        if let Some(delay) = self.retry_delay(&id, &attempt.verdict, &context, settle.as_deref()) {
            // The next attempt must not run beside what is left of this one.
            cleaned = tokio::select! {
                () = self.clean_up(run.as_mut(), &id) => true,
                () = self.shutdown.stopping.cancelled() => false,
            };
            if let Some(settle) = settle.take_if(|_| cleaned)
                && settle.retry(delay).await.is_ok()
            {
                return;
            }
            // Nobody takes the job back: this attempt was the last.
        }

        let outcome = self.outcome(id, Some(image), &limits, &context, attempt);
        self.report(&outcome);
        // The outcome first: whoever waits for it does not wait for the removal. But a server that
        // is not there must not keep a container.
        let publish = self.publish(&outcome, &context.route);
        tokio::pin!(publish);
        let published = tokio::select! {
            biased;
            () = &mut publish => true,
            () = tokio::time::sleep(self.options.publish_timeout) => false,
            () = self.shutdown.stopping.cancelled() => false,
        };
        let clean_up = async {
            if !cleaned {
                self.clean_up(run.as_mut(), &outcome.id).await;
            }
        };
        if published {
            settle_done(settle).await;
            clean_up.await;
        } else {
            tokio::join!(publish, clean_up);
            settle_done(settle).await;
        }
        drop(slot);
    }

    /// After how long the job is to be tried again; nothing where this attempt was the last.
    fn retry_delay(
        &self,
        id: &JobId,
        verdict: &Verdict,
        context: &Context,
        settle: Option<&dyn Settle>,
    ) -> Option<Duration> {
        let Verdict::Failed(failure) = verdict else { return None };
        if is_suspicious(failure) {
            self.suspicions.send_modify(|n| *n += 1);
        }
        let attempt = context.message.attempt;
        let again = settle.is_some_and(Settle::can_retry)
            && matches!(failure, Failure::Transient(_))
            && attempt < self.options.max_attempts
            && !self.shutdown.draining.is_cancelled();
        if !again {
            return None;
        }
        let delay = ATTEMPTS.delay(attempt);
        tracing::warn!(
            job = %id,
            attempt,
            %failure,
            delay_ms = delay.as_millis(),
            "the infrastructure failed the job; it will be tried again"
        );
        Some(delay)
    }

    /// Answers a message without running it.
    pub async fn refuse(&self, message: Message, error: JobError) {
        let now = Instant::now();
        // What kind of request it is decides where the answer goes, even if it is a bad one.
        let (job, context) = match self.decode(message, now) {
            Ok(decoded) => decoded,
            Err(refused) => {
                let (outcome, context) = *refused;
                self.report(&outcome);
                self.publish(&outcome, &context.route).await;
                return;
            }
        };
        let mut route = context.route.clone();
        // A request that was told to come back is no job yet.
        route.results &= error.code != code::BUSY;
        let attempt = Attempt::failed(Failure::Permanent(error));
        let outcome = self.outcome(job.id, Some(job.image), &job.limits, &context, attempt);
        self.report(&outcome);
        self.publish(&outcome, &route).await;
    }

    /// Publishes for as long as it takes while the daemon lives, and a moment longer at its end.
    async fn publish(&self, outcome: &Outcome, route: &Route) {
        tokio::select! {
            biased;
            () = self.publisher.publish(outcome, route, &self.shutdown.stopping) => {}
            () = self.shutdown.silent.cancelled() => {
                let (job, status) = (&outcome.id, outcome.status);
                tracing::error!(%job, %status, "NATS did not confirm the outcome: it may be lost");
            }
        }
    }

    fn decode(
        &self,
        message: Message,
        begun: Instant,
    ) -> Result<(Job, Context), Box<(Outcome, Context)>> {
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
        let context = Context { message, route, begun };
        match decoded {
            Ok(Request { job, .. }) => Ok((job, context)),
            Err(refusal) => {
                let attempt = Attempt::failed(Failure::Rejected(refusal.error));
                let limits =
                    Limits { timeout: Duration::ZERO, memory_bytes: 0, cpus: 0.0, pids: 0 };
                let outcome = self.outcome(refusal.id, refusal.image, &limits, &context, attempt);
                Err(Box::new((outcome, context)))
            }
        }
    }

    /// Removes what the run left in the engine, as often as it takes. At the daemon's end a second
    /// try must do; the next start sees to the rest.
    async fn clean_up(&self, run: &mut dyn Run, id: &JobId) {
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
            objects: Objects::default(),
            live_logs_dropped: 0,
            oom_killed: judged.exit.map(|exit| exit.oom_killed),
            attempt: message.attempt,
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

async fn settle_done(settle: Option<Box<dyn Settle>>) {
    if let Some(settle) = settle {
        settle.done().await;
    }
}

/// Whether a failure puts the engine itself in doubt.
fn is_suspicious(failure: &Failure) -> bool {
    [code::ENGINE_UNAVAILABLE, code::ENGINE_TIMEOUT, code::ENGINE_ERROR]
        .contains(&failure.error().code.as_ref())
}
