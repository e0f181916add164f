//! What the end of an attempt means for the job. Pure.

use std::time::SystemTime;

use super::attempt::{Verdict, Why};
use crate::backend::Exit;
use crate::job::{JobError, Limits, Status, code};
use crate::protocol::time::rfc3339;

/// What an ending means.
pub(super) struct Judgement {
    pub(super) status: Status,
    pub(super) error: Option<JobError>,
    pub(super) exit: Option<Exit>,
    /// Whether the command could not be executed.
    pub(super) not_started: bool,
}

/// The status of a job that ended so.
pub(super) fn status(verdict: &Verdict, limits: &Limits) -> Status {
    judge(verdict.clone(), limits).status
}

pub(super) fn judge(verdict: Verdict, limits: &Limits) -> Judgement {
    let done = |status, error, exit| Judgement { status, error, exit, not_started: false };
    match verdict {
        Verdict::Exited(Exit { not_started: Some(failure), .. }) => Judgement {
            status: failure.status(),
            error: Some(failure.error().clone()),
            exit: None,
            not_started: true,
        },
        Verdict::Exited(exit) if exit.code == 0 => done(Status::Succeeded, None, Some(exit)),
        Verdict::Exited(exit) if exit.oom_killed => {
            let message = format!(
                "the function needed more than its {} bytes of memory",
                limits.memory_bytes
            );
            let error = JobError::new(code::JOB_OUT_OF_MEMORY, message);
            done(Status::OutOfMemory, Some(error), Some(exit))
        }
        Verdict::Exited(exit) => done(Status::Failed, None, Some(exit)),
        Verdict::Ended(Why::Deadline, exit) => {
            let limit = humantime::format_duration(limits.timeout);
            let message = format!("the function did not end within {limit}");
            done(Status::TimedOut, Some(JobError::new(code::JOB_TIMED_OUT, message)), exit)
        }
        Verdict::Ended(Why::Shutdown, exit) => {
            let message = "the worker shut down before the function ended";
            done(Status::Error, Some(JobError::new(code::JOB_STOPPED, message)), exit)
        }
        // What is fenced has no outcome here; were one made, it would be this.
        Verdict::Ended(Why::Cancelled | Why::Fenced, exit) => {
            done(Status::Cancelled, Some(cancelled()), exit)
        }
        Verdict::Failed(failure) => done(failure.status(), Some(failure.error().clone()), None),
    }
}

/// Why a job was stopped that somebody cancelled.
pub(super) fn cancelled() -> JobError {
    JobError::new(code::JOB_CANCELLED, "the job was cancelled on request")
}

/// Why a job was not started that was too old.
pub(super) fn expired(at: SystemTime) -> JobError {
    let message = format!("the job was not started before {}", rfc3339(at));
    JobError::new(code::JOB_EXPIRED, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Failure, Usage};
    use std::time::Duration;

    fn exit(code: i64, oom_killed: bool) -> Exit {
        Exit { code, oom_killed, not_started: None, ran: None, usage: Usage::default() }
    }

    #[test]
    fn every_end_has_its_status() {
        let limits =
            Limits { timeout: Duration::from_secs(1), memory_bytes: 1 << 20, cpus: 1.0, pids: 1 };
        let error = || JobError::new(code::COMMAND_NOT_FOUND, "no such command");
        let unstarted = Exit { not_started: Some(Failure::Rejected(error())), ..exit(127, false) };
        for (verdict, status, code, not_started) in [
            (Verdict::Exited(exit(0, false)), Status::Succeeded, None, false),
            // A child of the function ran out of memory, and the function did without it.
            (Verdict::Exited(exit(0, true)), Status::Succeeded, None, false),
            (Verdict::Exited(exit(3, false)), Status::Failed, None, false),
            (Verdict::Exited(exit(137, false)), Status::Failed, None, false),
            (
                Verdict::Exited(exit(137, true)),
                Status::OutOfMemory,
                Some(code::JOB_OUT_OF_MEMORY),
                false,
            ),
            (Verdict::Exited(unstarted), Status::Rejected, Some(code::COMMAND_NOT_FOUND), true),
            (
                Verdict::Ended(Why::Deadline, Some(exit(143, false))),
                Status::TimedOut,
                Some(code::JOB_TIMED_OUT),
                false,
            ),
            (
                Verdict::Ended(Why::Deadline, None),
                Status::TimedOut,
                Some(code::JOB_TIMED_OUT),
                false,
            ),
            (
                Verdict::Ended(Why::Cancelled, Some(exit(0, false))),
                Status::Cancelled,
                Some(code::JOB_CANCELLED),
                false,
            ),
            (Verdict::Ended(Why::Shutdown, None), Status::Error, Some(code::JOB_STOPPED), false),
            (
                Verdict::Failed(Failure::Transient(error())),
                Status::Error,
                Some(code::COMMAND_NOT_FOUND),
                false,
            ),
        ] {
            let judged = judge(verdict, &limits);
            assert_eq!(judged.status, status);
            assert_eq!(judged.error.as_ref().map(|e| e.code.as_ref()), code, "{status}");
            assert_eq!(judged.not_started, not_started, "{status}");
        }
    }
}
