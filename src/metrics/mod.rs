//! What is counted and measured, and how it is shown.
//!
//! Modules get a [`Metrics`] and tell it what happens: that adds to atomics, and does nothing else,
//! whether anybody ever asks or not. What has a present value is read when somebody asks, by what was
//! given to [`Exposition::observe`]. No name of an image, job or caller becomes a label: the number of
//! series is bounded by this code alone.

mod ends;
mod exposition;
mod histogram;
mod readings;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::job::{Outcome, StartKind};
use ends::Ends;
pub use exposition::{Exposition, Format};
use histogram::Histogram;
pub use readings::Readings;

/// Where the daemon's parts report what happens. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Counts>);

/// Everything that is counted as it happens.
#[derive(Debug, Default)]
struct Counts {
    ends: Ends,
    cold_starts: AtomicU64,
    warm_starts: AtomicU64,
    retries: AtomicU64,
    dead_letters: AtomicU64,
    running: AtomicU64,
    callers_waiting: AtomicU64,
    queue: Histogram,
    pull: Histogram,
    create: Histogram,
    cold_start: Histogram,
    warm_start: Histogram,
    run: Histogram,
    publish: Histogram,
    job: Histogram,
}

/// Something that goes on, counted until this is dropped.
#[derive(Debug)]
pub struct Ongoing {
    counts: Arc<Counts>,
    which: fn(&Counts) -> &AtomicU64,
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        (self.which)(&self.counts).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Metrics {
    /// A job has its outcome. The stages of those whose function began are measured.
    pub fn ended(&self, outcome: &Outcome) {
        let counts = &*self.0;
        let code = outcome.error.as_ref().map(|error| error.code.as_ref());
        counts.ends.count(outcome.status, code);
        let Some(kind) = outcome.start else { return };
        let (starts, start) = match kind {
            StartKind::Cold => (&counts.cold_starts, &counts.cold_start),
            StartKind::Warm => (&counts.warm_starts, &counts.warm_start),
        };
        starts.fetch_add(1, Ordering::Relaxed);
        let timings = &outcome.timings;
        // A container that waited was not created for the job.
        let create = timings.create.filter(|_| kind == StartKind::Cold);
        for (stage, took) in [
            (&counts.queue, timings.queue),
            (&counts.pull, timings.pull),
            (&counts.create, create),
            (start, timings.start),
            (&counts.run, timings.run),
            (&counts.job, timings.total),
        ] {
            if let Some(took) = took {
                stage.observe(took);
            }
        }
    }

    /// An outcome was published and confirmed, which took so long.
    pub fn published(&self, took: Duration) {
        self.0.publish.observe(took);
    }

    /// A job will be tried again.
    pub fn retried(&self) {
        self.0.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// A request became a dead letter.
    pub fn buried(&self) {
        self.0.dead_letters.fetch_add(1, Ordering::Relaxed);
    }

    /// A function is being started or runs.
    #[must_use]
    pub fn running(&self) -> Ongoing {
        self.ongoing(|counts| &counts.running)
    }

    /// How many functions are being started or run.
    #[must_use]
    pub fn jobs_running(&self) -> u64 {
        self.0.running.load(Ordering::Relaxed)
    }

    /// Somebody waits for a slot, whose request is kept nowhere but here.
    #[must_use]
    pub fn caller_waits(&self) -> Ongoing {
        self.ongoing(|counts| &counts.callers_waiting)
    }

    fn ongoing(&self, which: fn(&Counts) -> &AtomicU64) -> Ongoing {
        which(&self.0).fetch_add(1, Ordering::Relaxed);
        Ongoing { counts: self.0.clone(), which }
    }
}
