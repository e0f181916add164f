//! One attempt at a job, and what comes of it: an outcome, or another attempt.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::watch;

use super::attempt::{self, Attempt, Orders, Surroundings, Verdict, Why};
use super::ticket::Ticket;
use super::{
    ATTEMPTS, CLEANUP_TRIES, CLEANUPS, Context, LIVE_LOG_PATIENCE, Runner, is_suspicious, verdict,
};
use crate::admission::Slot;
use crate::backend::Run;
use crate::job::{Failure, Job, JobError, JobId, Limits, Retry, Status, code};
use crate::live::LiveLog;
use crate::objects::Objects;
use crate::protocol::Request;
use crate::protocol::record::State;
use crate::source::core::Once;
use crate::source::{Closed, Settle};
use crate::spans::JobSpan;
use crate::trace::TraceContext;

/// What remains to be done once an attempt is over.
enum Next {
    /// The outcome is this attempt's.
    Conclude,
    /// The request goes back, for another attempt after a while.
    Again(Duration),
}

/// What came of arranging for another attempt.
enum Again {
    /// There will be one, or another worker has the job.
    Arranged,
    /// There will be none. `cleaned` says whether there is nothing left of this one.
    Refused { settle: Box<dyn Settle>, cleaned: bool },
}

impl Runner {
    /// Runs a job that is this worker's, and sees to what comes of it.
    pub(super) async fn perform(
        &self,
        request: Request,
        context: Context,
        mut ticket: Ticket,
        settle: Box<dyn Settle>,
        slot: Slot,
    ) {
        let Request { mut job, expires_at, retry, stdin_object, live_logs, .. } = request;
        let (id, image, limits) = (job.id.clone(), job.image.clone(), job.limits.clone());
        let recorded = matches!(ticket, Ticket::Claimed(_));
        let registration = self.cancels.register(&id, recorded);
        let orders = Orders { cancelled: registration.token.clone(), ..Orders::default() };
        if ticket.cancel_requested() {
            orders.cancelled.cancel();
        }
        if let Some(error) = too_late(expires_at, &context, &orders) {
            let attempt = Attempt::failed(Failure::Permanent(error));
            let mut outcome = self.outcome(id, Some(image), &limits, &context, attempt);
            outcome.status = Status::Cancelled;
            return self.conclude(outcome, &context, &mut ticket, settle).await;
        }
        let own = context.span.as_ref().map(JobSpan::for_function);
        let trace = own.as_ref().or(context.route.trace.as_ref());
        for (name, value) in trace.into_iter().flat_map(TraceContext::variables) {
            // The caller's own word counts for more.
            job.env.entry(name).or_insert_with(|| value.to_owned());
        }
        crate::failpoint!("job.claimed");

        tracing::debug!(job = %id, image, attempt = context.attempt, "job begins");
        let rules = self.rules();
        let live = live_logs
            .unwrap_or(rules.live_logs)
            .then(|| self.publisher.live_log(&id, context.attempt, rules.live_logs_buffer));
        let running = self.metrics.running();
        let (mut run, attempt) =
            self.attempt(job, stdin_object, &mut ticket, &orders, live.as_ref()).await;
        drop(running);
        let live_logs_dropped = live.as_ref().map_or(0, LiveLog::dropped);
        // Whoever waits for the outcome does not wait for the rest of it.
        drop(live.map(|live| live.finish(LIVE_LOG_PATIENCE)));
        crate::failpoint!("function.ended");

        if matches!(attempt.verdict, Verdict::Ended(Why::Fenced, _)) {
            tracing::warn!(job = %id, attempt = context.attempt, "another worker has taken the job over: this attempt counts for nothing");
            return self.clean_up(&mut run, &id).await;
        }
        if let Verdict::Failed(failure) = &attempt.verdict
            && is_suspicious(failure)
        {
            self.suspicions.send_modify(|n| *n += 1);
        }
        let next = self.next(&attempt.verdict, &limits, retry.as_ref(), &context, settle.as_ref());
        let (settle, cleaned) = match next {
            Next::Conclude => (settle, false),
            Next::Again(delay) => {
                report_again(&id, &attempt.verdict, &context, delay);
                self.metrics.retried();
                let (finished_at, total) = (SystemTime::now(), context.message.received.elapsed());
                match self.try_again(settle, &mut ticket, &orders, &mut run, delay).await {
                    Again::Arranged => {
                        if context.span.is_some() {
                            let mut outcome =
                                self.outcome(id, Some(image), &limits, &context, attempt);
                            (outcome.finished_at, outcome.timings.total) =
                                (finished_at, Some(total));
                            self.export(&outcome, &context, None);
                        }
                        return;
                    }
                    // Nobody takes the job back: this attempt was the last.
                    Again::Refused { settle, cleaned } => (settle, cleaned),
                }
            }
        };
        let mut outcome = self.outcome(id.clone(), Some(image), &limits, &context, attempt);
        outcome.live_logs_dropped = live_logs_dropped;
        let cancelled = orders.cancelled.is_cancelled() || ticket.cancel_requested();
        if cancelled && matches!(next, Next::Again(_)) {
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
        crate::stage!("cleaned up", id);
        drop((slot, registration));
    }

    /// The standard input that is kept as an object.
    async fn input(&self, name: Option<String>) -> Result<Option<Bytes>, Failure> {
        let Some(name) = name else { return Ok(None) };
        self.object("stdin_object", &name).await.map(Some)
    }

    /// One attempt, with the record kept up to date beside it. There is no run where there was nothing
    /// to begin with.
    async fn attempt(
        &self,
        mut job: Job,
        stdin_object: Option<String>,
        ticket: &mut Ticket,
        orders: &Orders,
        live: Option<&LiveLog>,
    ) -> (Option<Box<dyn Run>>, Attempt) {
        let input = tokio::select! {
            biased;
            () = orders.cancelled.cancelled() => return (None, Attempt::ended(Why::Cancelled)),
            () = self.shutdown.stopping.cancelled() => {
                return (None, Attempt::ended(Why::Shutdown));
            }
            input = self.input(stdin_object) => input,
        };
        match input {
            Ok(stdin) => job.stdin = stdin.or(job.stdin),
            Err(failure) => return (None, Attempt::failed(failure)),
        }
        let limits = job.limits.clone();
        let mut run = self.backend.prepare(job);
        let (progress, told) = watch::channel(None);
        let recorded = matches!(ticket, Ticket::Claimed(_));
        let objects = self.objects.as_ref().filter(|_| recorded).map_or(0, Objects::limit);
        let around = Surroundings {
            limits: &limits,
            options: &self.options,
            shutdown: &self.shutdown,
            orders,
            progress: &progress,
            keep: self.rules().output_limit.max(objects),
            live,
        };
        let attempt = tokio::select! {
            biased;
            attempt = attempt::drive(run.as_mut(), &around) => attempt,
            never = ticket.watch(&self.publisher, told, orders, self.options.look_interval) => match never {},
        };
        (Some(run), attempt)
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
        if !settle.can_retry()
            || !keeps
            || context.attempt >= self.options.max_attempts + context.spare
        {
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
                let again = retry
                    .is_some_and(|retry| retry.covers(status, context.attempt - context.spare));
                if again { Next::Again(delay) } else { Next::Conclude }
            }
        }
    }

    /// Arranges for another attempt: cleans up after this one, records that the job waits, and gives the
    /// request back.
    async fn try_again(
        &self,
        settle: Box<dyn Settle>,
        ticket: &mut Ticket,
        orders: &Orders,
        run: &mut Option<Box<dyn Run>>,
        delay: Duration,
    ) -> Again {
        let id = ticket.record().id.clone();
        // The next attempt must not run beside what is left of this one.
        let cleaned = tokio::select! {
            biased;
            () = self.clean_up(run, &id) => true,
            () = self.shutdown.silent.cancelled() => false,
        };
        if !cleaned && settle.is_durable() {
            // It comes again when this worker has been silent for long enough.
            return Again::Arranged;
        }
        if !cleaned || orders.cancelled.is_cancelled() {
            return Again::Refused { settle, cleaned };
        }
        let retry_at = SystemTime::now() + delay;
        // A worker that was told to stop is no fault of the job's.
        let handed_over = u32::from(delay.is_zero());
        let queued = ticket.update(&self.publisher, |record| {
            record.state = State::Queued;
            record.retry_at = Some(retry_at);
            record.handed_over += handed_over;
            (record.running_at, record.pulling_at, record.pull) = (None, None, None);
        });
        let queued = tokio::select! {
            biased;
            queued = queued => queued,
            // Without a word the request comes back as well, only later.
            () = self.shutdown.silent.cancelled() => return Again::Arranged,
        };
        if queued.is_err() {
            // Whoever has it sees to it.
            return Again::Arranged;
        }
        if ticket.cancel_requested() || orders.cancelled.is_cancelled() {
            return Again::Refused { settle, cleaned };
        }
        match settle.retry(delay).await {
            Ok(()) => Again::Arranged,
            Err(Closed) => Again::Refused { settle: Box::new(Once), cleaned },
        }
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
}

/// Why a job is not started at all: somebody cancelled it, or it waited for too long.
fn too_late(
    expires_at: Option<SystemTime>,
    context: &Context,
    orders: &Orders,
) -> Option<JobError> {
    if orders.cancelled.is_cancelled() {
        return Some(verdict::cancelled());
    }
    let expires_at = expires_at.into_iter().chain(context.message.expires_at).min();
    // What was begun in time is brought to its end.
    expires_at.filter(|at| context.attempt == 1 && *at <= SystemTime::now()).map(verdict::expired)
}

fn report_again(id: &JobId, verdict: &Verdict, context: &Context, delay: Duration) {
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
