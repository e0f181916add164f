//! One attempt: from a run's start to its end, whoever brings that about.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{BoxFuture, OptionFuture};

use super::Options;
use crate::backend::{Event, Exit, Progress, Run, Signal, Started};
use crate::capture::{Capture, Captured, Stream};
use crate::job::{Failure, JobError, Limits, code};
use crate::live::LiveLog;
use crate::shutdown::Shutdown;
use tokio_util::sync::CancellationToken;

/// How long a killed function may take to be gone at the daemon's end. Shorter than the end's own
/// patience, so that an engine that hangs does not cost the outcome.
pub const LAST_PATIENCE: Duration = Duration::from_secs(3);

/// How an attempt ended.
pub(super) struct Attempt {
    pub(super) started: Option<Started>,
    /// From the start to the end.
    pub(super) ran: Option<Duration>,
    pub(super) output: Captured,
    pub(super) verdict: Verdict,
}

#[derive(Clone)]
pub(super) enum Verdict {
    /// The function ended by itself.
    Exited(Exit),
    /// The daemon ended it; with the exit, where it was seen.
    Ended(Why, Option<Exit>),
    /// It never began, or its end cannot be known.
    Failed(Failure),
}

/// Why the daemon ends a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Deadline,
    Shutdown,
    /// Somebody asked for it.
    Cancelled,
    /// Another worker has taken the job over: whatever comes of this run counts for nothing.
    Fenced,
}

/// What may come from outside while a run is under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Orders {
    /// End the function: the job is cancelled.
    pub(super) cancelled: CancellationToken,
    /// End the function at once: the job is another worker's.
    pub(super) fenced: CancellationToken,
}

impl Attempt {
    /// One that was ended before it began.
    pub(super) fn ended(why: Why) -> Self {
        let verdict = Verdict::Ended(why, None);
        Self { started: None, ran: None, output: Captured::default(), verdict }
    }

    /// One that never began.
    pub(super) fn failed(failure: Failure) -> Self {
        let verdict = Verdict::Failed(failure);
        Self { started: None, ran: None, output: Captured::default(), verdict }
    }
}

/// What a run is driven by.
pub(super) struct Surroundings<'a> {
    pub(super) limits: &'a Limits,
    pub(super) options: &'a Options,
    pub(super) shutdown: &'a Shutdown,
    pub(super) orders: &'a Orders,
    /// How far the pull of the image is.
    pub(super) progress: &'a Progress,
    /// Bytes kept of each output stream.
    pub(super) keep: usize,
    /// Where output goes while the function runs.
    pub(super) live: Option<&'a LiveLog>,
}

/// Where a function's output goes.
struct Sink<'a> {
    capture: Capture,
    live: Option<&'a LiveLog>,
}

impl Sink<'_> {
    fn push(&mut self, stream: Stream, chunk: &Bytes) {
        self.capture.push(stream, chunk);
        if let Some(live) = self.live {
            live.push(stream, chunk);
        }
    }
}

/// Starts the run and sees it to its end, whoever brings that about.
pub(super) async fn drive(run: &mut dyn Run, around: &Surroundings<'_>) -> Attempt {
    let mut sink = Sink { capture: Capture::new(around.keep), live: around.live };
    let mut told = run.told();
    let orders = around.orders;
    let called_off = async {
        let called_off = tokio::select! {
            biased;
            () = orders.cancelled.cancelled() => Attempt::ended(Why::Cancelled),
            () = around.shutdown.stopping.cancelled() => {
                let message = "the worker shut down before the function began";
                Attempt::failed(Failure::Permanent(JobError::new(code::JOB_STOPPED, message)))
            }
        };
        // A function that may run already gets a signal, like any other, once its start is over.
        let _ = told.wait_for(|told| !told).await;
        called_off
    };
    let started = tokio::select! {
        biased;
        () = orders.fenced.cancelled() => return Attempt::ended(Why::Fenced),
        called_off = called_off => return called_off,
        started = run.start(around.progress) => started,
    };
    let started = match started {
        Ok(started) => started,
        Err(failure) => {
            return Attempt::failed(failure);
        }
    };
    let begun = started.since;
    let verdict = watch(run, &mut sink, begun + around.limits.timeout, around).await;
    Attempt {
        started: Some(started),
        ran: Some(begun.elapsed()),
        output: sink.capture.finish(),
        verdict,
    }
}

/// Takes the output until the function ends, and ends it when it must.
///
/// Output is taken all the while, also while a signal is on its way: an engine that cannot
/// get rid of output does not get to the signal either.
async fn watch(
    run: &mut dyn Run,
    sink: &mut Sink<'_>,
    deadline: Instant,
    around: &Surroundings<'_>,
) -> Verdict {
    let Surroundings { options, shutdown, orders, .. } = *around;
    let mut ending: Option<(Why, Signal)> = None;
    let mut hurried = false;
    let mut alarm = tokio::time::Instant::from_std(deadline);
    let mut signalling: OptionFuture<BoxFuture<'static, Result<(), Failure>>> = None.into();
    loop {
        let why = ending.map(|(why, _)| why);
        let killed = matches!(ending, Some((_, Signal::Kill)));
        let (why, signal) = tokio::select! {
            event = run.next() => match (event, why) {
                (Ok(Event::Output(stream, chunk)), _) => {
                    sink.push(stream, &chunk);
                    continue;
                }
                (Ok(Event::Exited(exit)), None) => return Verdict::Exited(exit),
                (Ok(Event::Exited(exit)), Some(why)) => return Verdict::Ended(why, Some(exit)),
                (Err(failure), None) => return Verdict::Failed(failure),
                (Err(_), Some(why)) => return Verdict::Ended(why, None),
            },
            Some(result) = &mut signalling => {
                signalling = None.into();
                if let Err(error) = result {
                    tracing::warn!(%error, "could not signal the function");
                }
                continue;
            }
            () = tokio::time::sleep_until(alarm) => match ending {
                None => (Why::Deadline, Signal::Term),
                Some((why, Signal::Term)) => (why, Signal::Kill),
                // The engine does not say that it is gone. The clean-up goes on trying.
                Some((why, Signal::Kill)) => return Verdict::Ended(why, None),
            },
            () = shutdown.stopping.cancelled(), if killed && !hurried => {
                hurried = true;
                alarm = alarm.min(tokio::time::Instant::now() + LAST_PATIENCE);
                continue;
            }
            () = shutdown.forced.cancelled(), if !killed => {
                (why.unwrap_or(Why::Shutdown), Signal::Kill)
            }
            () = shutdown.stopping.cancelled(), if ending.is_none() => {
                (Why::Shutdown, Signal::Term)
            }
            () = orders.fenced.cancelled(), if why != Some(Why::Fenced) => {
                (Why::Fenced, Signal::Kill)
            }
            () = orders.cancelled.cancelled(), if ending.is_none() => {
                (Why::Cancelled, Signal::Term)
            }
        };
        if run.has_exited() && ending.is_none() {
            return explained(run, sink, options, shutdown).await;
        }
        ending = Some((why, signal));
        signalling = Some(run.signal(signal)).into();
        let patience = match signal {
            Signal::Term => options.stop_grace,
            Signal::Kill if shutdown.stopping.is_cancelled() => {
                options.kill_patience.min(LAST_PATIENCE)
            }
            Signal::Kill => options.kill_patience,
        };
        alarm = tokio::time::Instant::now() + patience;
    }
}

/// The rest of a run whose function has ended by itself: neither its deadline nor the daemon's end
/// makes its result another one. Only an engine that does not say how it ended can.
async fn explained(
    run: &mut dyn Run,
    sink: &mut Sink<'_>,
    options: &Options,
    shutdown: &Shutdown,
) -> Verdict {
    let rest = async {
        loop {
            match run.next().await {
                Ok(Event::Output(stream, chunk)) => sink.push(stream, &chunk),
                Ok(Event::Exited(exit)) => return Verdict::Exited(exit),
                Err(failure) => return Verdict::Failed(failure),
            }
        }
    };
    let end_of_patience = async {
        tokio::select! {
            () = tokio::time::sleep(options.kill_patience) => {}
            () = shutdown.stopping.cancelled() => tokio::time::sleep(LAST_PATIENCE).await,
        }
    };
    tokio::select! {
        biased;
        verdict = rest => verdict,
        () = end_of_patience => {
            let message = "the function ended and the engine did not say how";
            Verdict::Failed(Failure::Transient(JobError::new(code::ENGINE_TIMEOUT, message)))
        }
    }
}

#[cfg(test)]
#[path = "attempt_tests.rs"]
mod tests;
