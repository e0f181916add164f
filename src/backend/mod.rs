//! What runs a job: the seam between the runner and an engine.
//!
//! A backend is chosen at run time. Nothing outside this module's children knows an engine's types.

pub mod docker;

use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::capture::Stream;
use crate::job::{Failure, Job, PullProgress, StartKind, Usage};

/// What a backend may be told otherwise while it works.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Glob patterns of the images that may run; empty for all.
    pub image_allowlist: Vec<String>,
    /// How many containers may wait for jobs.
    pub warm_containers: usize,
}

/// An engine that runs functions in containers. Shared by all jobs of an instance.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Checks that the engine answers and can do what the settings ask for.
    ///
    /// # Errors
    /// [`PreflightError::Unavailable`] may pass; [`PreflightError::Unfit`] will not.
    async fn preflight(&self) -> Result<(), PreflightError>;

    /// A run of `job`, not yet begun. Allocates nothing in the engine.
    fn prepare(&self, job: Job) -> Box<dyn Run>;

    /// Removes what dead instances left in the engine, and what this one lost track of. Never
    /// touches what belongs to a live instance.
    ///
    /// # Errors
    /// Says what could not be looked at or removed; the rest was.
    async fn reap(&self) -> anyhow::Result<()>;

    /// Keeps ready what makes jobs start sooner, beside them, until `enough`; then brings to an end
    /// what it has begun, and returns.
    async fn tend(&self, enough: &CancellationToken);

    /// Follows other rules from now on.
    ///
    /// # Errors
    /// The rules cannot be followed; those from before are.
    fn set_rules(&self, rules: &Rules) -> anyhow::Result<()>;

    /// Withdraws what this instance keeps in the engine for its own sake, at the end of its life.
    async fn retire(&self);

    /// What it counts of the containers it keeps ready; nothing where it keeps none. Does not wait for
    /// the engine.
    fn warm_counts(&self) -> Option<WarmCounts> {
        None
    }
}

/// Counts of containers that are kept ready: since the start, but for those that wait now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WarmCounts {
    /// Containers that wait for a job now.
    pub waiting: u64,
    /// Jobs that got one.
    pub hits: u64,
    /// Jobs that got none, by the reason's name.
    pub misses: Vec<(&'static str, u64)>,
    /// Containers that were made.
    pub made: u64,
    /// Containers that could not be made.
    pub failed: u64,
    /// Containers that gave way to another kind.
    pub evicted: u64,
    /// Containers that had waited for too long.
    pub retired: u64,
    /// Containers that had died before anybody needed them.
    pub died: u64,
}

/// Where a run tells how far the pull of its image is; nothing while no pull is under way.
pub type Progress = watch::Sender<Option<PullProgress>>;

/// One run of one job, from its start to its clean-up.
///
/// The owner calls [`Run::start`], then [`Run::next`] until it yields an exit or fails, and in
/// every case, also when `start` failed or was dropped half-way, [`Run::cleanup`] until it
/// succeeds. Dropping a run leaves its container to the reaper.
#[async_trait]
pub trait Run: Send {
    /// Makes the image available and starts the function. A pull that takes part in that is told
    /// to `progress`.
    ///
    /// # Errors
    /// Says whether the request or the infrastructure is at fault.
    async fn start(&mut self, progress: &Progress) -> Result<Started, Failure>;

    /// Whether something was told to begin the function and has not answered yet: the function may run
    /// then, and a start that is dropped takes it along without a signal. To be asked for beforehand.
    fn told(&self) -> watch::Receiver<bool>;

    /// The next thing that happens. Cancel-safe. Output must be taken promptly: a program whose
    /// output nobody takes stands still.
    ///
    /// # Errors
    /// The run was lost: its output or its exit cannot be known.
    async fn next(&mut self) -> Result<Event, Failure>;

    /// Whether the function has ended, though not all that [`Run::next`] has to say of it is said.
    fn has_exited(&self) -> bool;

    /// Asks the engine to signal the function. A function that is gone already is no error.
    ///
    /// The future owns what it needs, so that output can be taken while it is under way.
    fn signal(&self, signal: Signal) -> futures::future::BoxFuture<'static, Result<(), Failure>>;

    /// Removes the container with everything that belongs to it, whatever state it is in.
    /// Idempotent; to be called again after a failure.
    ///
    /// # Errors
    /// Says whether something of the job may still be running.
    async fn cleanup(&mut self) -> Result<(), CleanupError>;
}

/// What came of a start.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    /// Created for this job, or taken from a pool.
    pub kind: StartKind,
    /// When the function started, or was told to.
    pub at: SystemTime,
    /// The same; its time runs from here.
    pub since: Instant,
    /// Finding the image, and pulling it where that was needed.
    pub pull: Duration,
    /// Creating the container.
    pub create: Duration,
    /// Attaching to it and starting it; of one from a pool, until the function was told to start.
    pub start: Duration,
}

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The function printed something.
    Output(Stream, Bytes),
    /// The function ended; nothing follows.
    Exited(Exit),
}

/// How a function ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code; 128 + n for signal n.
    pub code: i64,
    /// Whether the kernel killed a process of it for want of memory.
    pub oom_killed: bool,
    /// Set where the function never began: its command could not be executed.
    pub not_started: Option<Failure>,
    /// From its start to its end, where the engine's side measured that.
    pub ran: Option<Duration>,
    /// What it used, as far as that is known.
    pub usage: Usage,
}

/// A signal to a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ask it to end.
    Term,
    /// End it.
    Kill,
}

/// Why an engine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// It does not answer. That may pass.
    #[error("{0}")]
    Unavailable(String),
    /// It cannot do what the settings ask for. That will not pass by waiting.
    #[error("{0}")]
    Unfit(String),
}

/// Why a clean-up did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CleanupError {
    /// What went wrong.
    pub message: String,
    /// Whether the function may still be running, and so still takes its slot.
    pub may_be_running: bool,
}
