//! The vocabulary every module shares: a job, its limits, its outcome, and why it failed.
//!
//! Nothing here knows NATS or Docker, or how it is written as JSON; only some names on the wire, and
//! their schemas, are kept beside what they name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::trace::TraceContext;

/// The longest job id, in bytes. It is part of a container's name and of a NATS subject.
pub const MAX_ID_LENGTH: usize = 64;

/// A job's id: 1 to 64 characters of `[A-Za-z0-9_-]`, safe in a subject, a header, a container's
/// name and a key-value key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(String);

/// Why a string is no job id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be 1 to {MAX_ID_LENGTH} characters of A-Z, a-z, 0-9, '_' and '-'")]
pub struct InvalidJobId;

impl JobId {
    /// A new id: a UUIDv7, so ids sort by the time they were made.
    #[must_use]
    pub fn new() -> Self {
        Self(uuid::Uuid::now_v7().to_string())
    }

    /// The id of a message that names itself with `Nats-Msg-Id`.
    ///
    /// A value that is no job id is hashed (SHA-256, first 128 bits in hexadecimal), so that a
    /// redelivery always has the same id.
    #[must_use]
    pub fn from_message_id(message_id: &str) -> Self {
        message_id.parse().unwrap_or_else(|InvalidJobId| {
            let digest = Sha256::digest(message_id.as_bytes());
            Self(digest.iter().take(16).map(|b| format!("{b:02x}")).collect())
        })
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for JobId {
    fn default() -> Self {
        Self::new()
    }
}

impl FromStr for JobId {
    type Err = InvalidJobId;

    fn from_str(s: &str) -> Result<Self, InvalidJobId> {
        let fits = (1..=MAX_ID_LENGTH).contains(&s.len());
        let clean = s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        if fits && clean { Ok(Self(s.to_owned())) } else { Err(InvalidJobId) }
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a job may use. Every value is within the operator's maximum.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Wall time from the container's start, on the daemon's clock.
    pub timeout: Duration,
    /// Memory, swap included, in bytes.
    pub memory_bytes: u64,
    /// Processors' time, in processors: 0.5 is half of one.
    pub cpus: f64,
    /// Processes and threads at once.
    pub pids: u64,
}

/// A checked request to run one function.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// The image, as the request named it.
    pub image: String,
    /// The arguments that replace the image's command; empty for the image's own.
    pub args: Vec<String>,
    /// Added to the image's environment.
    pub env: BTreeMap<String, String>,
    /// Fed to the program, then closed. Absent: the program reads nothing.
    pub stdin: Option<Bytes>,
    /// Overrides the image's working directory. Absolute.
    pub working_dir: Option<String>,
    /// Overrides the image's user: `user`, `uid`, `user:group` or `uid:gid`.
    pub user: Option<String>,
    /// The network the container joins; `none` for no network at all.
    pub network: String,
    /// The caller's labels for the container.
    pub labels: BTreeMap<String, String>,
    /// What it may use.
    pub limits: Limits,
}

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, schemars::JsonSchema)]
#[schemars(rename_all = "snake_case")]
pub enum Status {
    /// The function ended with exit code 0.
    Succeeded,
    /// The function ended with another exit code, or by a signal.
    Failed,
    /// The function was stopped at its deadline.
    TimedOut,
    /// The function was killed for want of memory.
    OutOfMemory,
    /// The job was cancelled.
    Cancelled,
    /// The job never ran, and never will: the request is at fault.
    Rejected,
    /// The infrastructure gave up.
    Error,
}

impl Status {
    /// Every status.
    pub const ALL: [Self; 7] = [
        Self::Succeeded,
        Self::Failed,
        Self::TimedOut,
        Self::OutOfMemory,
        Self::Cancelled,
        Self::Rejected,
        Self::Error,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::OutOfMemory => "out_of_memory",
            Self::Cancelled => "cancelled",
            Self::Rejected => "rejected",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Status {
    type Err = UnknownName;

    fn from_str(s: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|status| status.as_str() == s).ok_or(UnknownName)
    }
}

/// A word that is none of those it could be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("is none of the known names")]
pub struct UnknownName;

/// Before which other jobs a job is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, schemars::JsonSchema)]
#[schemars(rename_all = "snake_case")]
pub enum Priority {
    /// Before all others.
    High,
    /// After those of high priority.
    #[default]
    Normal,
    /// When nothing else waits.
    Low,
}

impl Priority {
    /// Every priority, the highest first.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    /// Whether jobs of this priority go before those of the other one.
    #[must_use]
    pub fn is_before(self, other: Self) -> bool {
        let rank = |priority| Self::ALL.iter().position(|p| *p == priority);
        rank(self) < rank(other)
    }

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Priority {
    type Err = UnknownName;

    fn from_str(s: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|priority| priority.as_str() == s).ok_or(UnknownName)
    }
}

/// Which of a function's own failures are tried again, because the request asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// How many attempts the job has in all.
    pub max_attempts: u32,
    /// The endings that are tried again; of [`Retry::STATUSES`], each at most once.
    pub on: Vec<Status>,
}

impl Retry {
    /// The endings a request may ask to be tried again.
    pub const STATUSES: [Status; 3] = [Status::Failed, Status::TimedOut, Status::OutOfMemory];

    /// Whether a job whose attempt number `attempt`, from 1, ended with `status` is tried again.
    #[must_use]
    pub fn covers(&self, status: Status, attempt: u32) -> bool {
        attempt < self.max_attempts && self.on.contains(&status)
    }
}

/// The dotted error codes. Stable: callers match on them.
pub mod code {
    /// The payload is no JSON object.
    pub const INVALID_JSON: &str = "request.invalid_json";
    /// A field is unknown, missing, of the wrong type or out of bounds.
    pub const INVALID_FIELD: &str = "request.invalid_field";
    /// The object that standard input comes from does not exist, or cannot be used.
    pub const STDIN_NOT_FOUND: &str = "request.stdin_not_found";
    /// The image matches no pattern of `IMAGE_ALLOWLIST`.
    pub const IMAGE_NOT_ALLOWED: &str = "image.not_allowed";
    /// Neither the engine nor the registry has the image.
    pub const IMAGE_NOT_FOUND: &str = "image.not_found";
    /// The registry wants other credentials.
    pub const IMAGE_UNAUTHORIZED: &str = "image.unauthorized";
    /// The pull failed for another reason.
    pub const IMAGE_PULL_FAILED: &str = "image.pull_failed";
    /// The pull took longer than `PULL_TIMEOUT`.
    pub const IMAGE_PULL_TIMEOUT: &str = "image.pull_timeout";
    /// Neither the request nor the image names a command.
    pub const IMAGE_NO_COMMAND: &str = "image.no_command";
    /// The command is not in the image.
    pub const COMMAND_NOT_FOUND: &str = "command.not_found";
    /// The command is in the image and cannot be executed.
    pub const COMMAND_NOT_EXECUTABLE: &str = "command.not_executable";
    /// The user or group is not in the image.
    pub const INVALID_USER: &str = "container.invalid_user";
    /// The working directory cannot be one.
    pub const INVALID_WORKING_DIR: &str = "container.invalid_working_dir";
    /// The engine refused the container for another reason.
    pub const CONTAINER_REFUSED: &str = "container.refused";
    /// The container was removed by somebody else while it ran.
    pub const CONTAINER_VANISHED: &str = "container.vanished";
    /// The engine cannot be reached, or went away while the job ran.
    pub const ENGINE_UNAVAILABLE: &str = "engine.unavailable";
    /// The engine did not answer within `ENGINE_TIMEOUT`.
    pub const ENGINE_TIMEOUT: &str = "engine.timeout";
    /// The engine reported a failure of its own.
    pub const ENGINE_ERROR: &str = "engine.error";
    /// The function was stopped at its deadline.
    pub const JOB_TIMED_OUT: &str = "job.timed_out";
    /// The function was killed for want of memory.
    pub const JOB_OUT_OF_MEMORY: &str = "job.out_of_memory";
    /// Somebody asked for the job to be cancelled.
    pub const JOB_CANCELLED: &str = "job.cancelled";
    /// The job's time was over before it began.
    pub const JOB_EXPIRED: &str = "job.expired";
    /// The job was delivered `MAX_DELIVER` times, and no worker said what became of it.
    pub const MAX_DELIVER: &str = "job.max_deliver";
    /// The worker shut down before the function ended.
    pub const JOB_STOPPED: &str = "job.stopped";
    /// The worker shut down before the job began.
    pub const SHUTTING_DOWN: &str = "worker.shutting_down";
    /// JetStream does not answer just now.
    pub const JETSTREAM_UNAVAILABLE: &str = "jetstream.unavailable";
    /// JetStream's object store cannot be read just now.
    pub const OBJECT_STORE: &str = "object_store.unavailable";
    /// No slot came free in time.
    pub const BUSY: &str = "busy";
    /// The buffer of waiting requests is full.
    pub const BUFFER_FULL: &str = "buffer.full";
}

/// Why a job did not succeed: a stable code for machines, a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct JobError {
    /// One of [`code`].
    pub code: Cow<'static, str>,
    /// What was wrong, where, and what would be right.
    pub message: String,
}

impl JobError {
    /// An error of this code with this message.
    ///
    /// Messages quote callers, registries and engines. Whatever those say, a message is at most
    /// [`MAX_MESSAGE_LENGTH`] bytes of printable text, fit for a log line and a reply.
    pub fn new(code: &'static str, message: impl AsRef<str>) -> Self {
        let message = printable(message.as_ref(), MAX_MESSAGE_LENGTH);
        Self { code: Cow::Borrowed(code), message }
    }
}

/// The longest error message, in bytes.
pub const MAX_MESSAGE_LENGTH: usize = 2048;

/// The beginning of `text` without control characters, at most `limit` bytes and marked where it
/// was cut.
#[must_use]
pub fn printable(text: &str, limit: usize) -> String {
    let clean = |c: char| match c {
        '\n' | '\t' | '\r' => ' ',
        c if c.is_control() => '?',
        c => c,
    };
    let mut shown = String::new();
    for c in text.trim_end().chars().map(clean) {
        if shown.len() + c.len_utf8() > limit {
            shown.push('…');
            break;
        }
        shown.push(c);
    }
    shown
}

/// How a job that could not run to its own end should be treated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The request is at fault: it will never run.
    #[error("{0}")]
    Rejected(JobError),
    /// The infrastructure is at fault, and another attempt may well succeed.
    #[error("{0}")]
    Transient(JobError),
    /// The infrastructure is at fault, and another attempt would fare no better.
    #[error("{0}")]
    Permanent(JobError),
}

impl Failure {
    /// The error it carries.
    #[must_use]
    pub fn error(&self) -> &JobError {
        match self {
            Self::Rejected(e) | Self::Transient(e) | Self::Permanent(e) => e,
        }
    }

    /// The status of an outcome that ends with it.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Rejected(_) => Status::Rejected,
            Self::Transient(_) | Self::Permanent(_) => Status::Error,
        }
    }
}

/// How the container came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, schemars::JsonSchema)]
#[schemars(rename_all = "snake_case")]
pub enum StartKind {
    /// Created for this job.
    Cold,
    /// Taken from a pool, already started.
    Warm,
}

impl StartKind {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
        }
    }
}

/// How far the pull of an image is.
///
/// The totals grow while the engine finds out what there is to pull.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
pub struct PullProgress {
    /// The layers known so far.
    pub layers: u64,
    /// Those of them that are there.
    pub layers_done: u64,
    /// The bytes to be fetched, as far as they are known.
    pub bytes: u64,
    /// Those of them that were fetched.
    pub bytes_done: u64,
}

/// How long each stage took. Absent: the stage was not reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From receipt to the beginning of this attempt.
    pub queue: Option<Duration>,
    /// Finding the image, and pulling it where that was needed.
    pub pull: Option<Duration>,
    /// Creating the container.
    pub create: Option<Duration>,
    /// Attaching to it and starting it.
    pub start: Option<Duration>,
    /// From its start to its exit.
    pub run: Option<Duration>,
    /// From receipt to the outcome.
    pub total: Option<Duration>,
}

/// What a function used. Absent: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time.
    pub cpu: Option<Duration>,
    /// The most memory it held, in bytes.
    pub memory_peak_bytes: Option<u64>,
}

/// An object in a bucket that holds what does not fit into a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectRef {
    /// The bucket.
    pub bucket: String,
    /// The object's name in it.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its digest, as the object store gives it.
    pub digest: String,
    /// Whether bytes of the stream are missing from it.
    pub truncated: bool,
}

/// Where the streams are that did not fit into a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Standard output.
    pub stdout: Option<ObjectRef>,
    /// Standard error.
    pub stderr: Option<ObjectRef>,
}

/// What became of a job, and what it printed.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The job's id.
    pub id: JobId,
    /// The image, as the request named it; absent where the request did not say.
    pub image: Option<String>,
    /// What became of it.
    pub status: Status,
    /// The exit code, where the function ended.
    pub exit_code: Option<i64>,
    /// Why it did not succeed.
    pub error: Option<JobError>,
    /// What it printed.
    pub output: crate::capture::Captured,
    /// Where the streams are that did not fit.
    pub objects: Objects,
    /// Bytes of output that were not published while the function ran, for want of time.
    pub live_logs_dropped: u64,
    /// Whether the kernel killed a process of the job for want of memory.
    pub oom_killed: Option<bool>,
    /// Which attempt this was, from 1.
    pub attempt: u32,
    /// The instance that ran it.
    pub worker: String,
    /// How the container came to be.
    pub start: Option<StartKind>,
    /// When the request was received.
    pub queued_at: SystemTime,
    /// When the container started.
    pub started_at: Option<SystemTime>,
    /// When the outcome was known.
    pub finished_at: SystemTime,
    /// How long each stage took.
    pub timings: Timings,
    /// What it used.
    pub usage: Usage,
    /// The trace it is part of.
    pub trace: Option<TraceContext>,
}

impl Outcome {
    /// The signal that ended the function, where its exit code says so.
    ///
    /// Engines report death by signal n as exit code 128 + n, as shells do; a function that
    /// chooses such an exit code itself cannot be told apart.
    #[must_use]
    pub fn signal(&self) -> Option<i64> {
        self.exit_code.filter(|code| (129..=128 + 64).contains(code)).map(|code| code - 128)
    }
}

#[cfg(test)]
impl Outcome {
    /// Of the job `a-1`, which got no further than to its worker `w`, all of it at that time.
    pub(crate) fn bare(status: Status, at: SystemTime) -> Self {
        Self {
            id: JobId("a-1".to_owned()),
            image: None,
            status,
            exit_code: None,
            error: None,
            output: crate::capture::Captured::default(),
            objects: Objects::default(),
            live_logs_dropped: 0,
            oom_killed: None,
            attempt: 1,
            worker: "w".to_owned(),
            start: None,
            queued_at: at,
            started_at: None,
            finished_at: at,
            timings: Timings::default(),
            usage: Usage::default(),
            trace: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_short_and_printable() {
        let error = JobError::new(code::INVALID_FIELD, "a\nb\u{1b}[31m\u{85}é");
        assert_eq!(error.message, "a b?[31m?é");
        let long = JobError::new(code::INVALID_FIELD, "é".repeat(100_000)).message;
        assert!(long.len() <= MAX_MESSAGE_LENGTH + 3 && long.ends_with("é…"));
    }

    #[test]
    fn names_are_read_back() {
        for status in Status::ALL {
            assert_eq!(status.as_str().parse(), Ok(status));
        }
        for priority in Priority::ALL {
            assert_eq!(priority.as_str().parse(), Ok(priority));
        }
        assert_eq!("HIGH".parse::<Priority>(), Err(UnknownName));
        assert_eq!("".parse::<Status>(), Err(UnknownName));
    }

    #[test]
    fn only_what_was_asked_for_is_tried_again() {
        let retry = Retry { max_attempts: 2, on: vec![Status::Failed] };
        assert!(retry.covers(Status::Failed, 1));
        assert!(!retry.covers(Status::Failed, 2));
        assert!(!retry.covers(Status::TimedOut, 1));
    }

    #[test]
    fn ids_take_what_fits_and_hash_what_does_not() {
        assert_eq!(JobId::from_message_id("order-17_b").as_str(), "order-17_b");
        let hashed = JobId::from_message_id("order 17/b");
        assert_eq!(hashed.as_str().len(), 32);
        assert_eq!(hashed, JobId::from_message_id("order 17/b"));
        assert_ne!(hashed, JobId::from_message_id("order 17/c"));
        for bad in ["", "a b", "a.b", "a*", "é", &"x".repeat(65)] {
            assert_eq!(bad.parse::<JobId>(), Err(InvalidJobId), "{bad:?}");
        }
        assert!("x".repeat(64).parse::<JobId>().is_ok());
        assert!(JobId::new().as_str().parse::<JobId>().is_ok());
    }
}
