//! What a pool counts.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::WarmCounts;

/// Why a job did not get a warm container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::docker) enum Miss {
    /// There is no pool.
    Off,
    /// None waited.
    Empty,
    /// Those that waited had died.
    Died,
    /// The job wants labels, which a container gets when it is created.
    Labels,
    /// The job has HOME empty, which has an init process look for one; and the image may have another.
    Home,
    /// The job's command and environment fit no frame.
    Size,
    /// The engine did not give the container the job's limits.
    Limits,
    /// The agent could not begin the function.
    Refused,
    /// The container ended before the function was heard to have begun.
    Lost,
    /// The agent did not answer.
    Hung,
}

impl Miss {
    const ALL: [Self; 10] = [
        Self::Off,
        Self::Empty,
        Self::Died,
        Self::Labels,
        Self::Home,
        Self::Size,
        Self::Limits,
        Self::Refused,
        Self::Lost,
        Self::Hung,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Empty => "empty",
            Self::Died => "died",
            Self::Labels => "labels",
            Self::Home => "home",
            Self::Size => "size",
            Self::Limits => "limits",
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::Hung => "hung",
        }
    }
}

/// Counts since the start.
#[derive(Debug, Default)]
pub(in crate::backend::docker) struct Counters {
    hits: AtomicU64,
    misses: [AtomicU64; Miss::ALL.len()],
    created: AtomicU64,
    failed: AtomicU64,
    evicted: AtomicU64,
    retired: AtomicU64,
    died: AtomicU64,
}

impl Counters {
    /// A job got a container.
    pub(in crate::backend::docker) fn hit(&self) {
        add(&self.hits, 1);
    }

    /// A job got none.
    pub(in crate::backend::docker) fn missed(&self, miss: Miss) {
        add(&self.misses[miss as usize], 1);
    }

    /// A container was made.
    pub(super) fn created(&self) {
        add(&self.created, 1);
    }

    /// Whether any was made.
    pub(super) fn has_created(&self) -> bool {
        self.created.load(Ordering::Relaxed) > 0
    }

    /// One could not be made.
    pub(super) fn failed(&self) {
        add(&self.failed, 1);
    }

    /// One gave way to another kind.
    pub(super) fn evicted(&self) {
        add(&self.evicted, 1);
    }

    /// Some had waited for too long.
    pub(super) fn retired(&self, count: usize) {
        add(&self.retired, count);
    }

    /// Some had died before anybody needed them.
    pub(super) fn died(&self, count: usize) {
        add(&self.died, count);
    }

    /// Every count.
    pub(super) fn snapshot(&self) -> WarmCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let misses = Miss::ALL.into_iter().zip(&self.misses);
        WarmCounts {
            waiting: 0,
            hits: get(&self.hits),
            misses: misses.map(|(miss, count)| (miss.as_str(), get(count))).collect(),
            made: get(&self.created),
            failed: get(&self.failed),
            evicted: get(&self.evicted),
            retired: get(&self.retired),
            died: get(&self.died),
        }
    }
}

fn add(count: &AtomicU64, more: usize) {
    count.fetch_add(more as u64, Ordering::Relaxed);
}

impl fmt::Display for Counters {
    /// Those that are not zero.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.snapshot();
        let mut all = vec![("warm.hits".to_owned(), counts.hits)];
        for (reason, count) in counts.misses {
            all.push((format!("warm.misses.{reason}"), count));
        }
        for (name, count) in [
            ("warm.created", counts.made),
            ("warm.failed", counts.failed),
            ("warm.evicted", counts.evicted),
            ("warm.retired", counts.retired),
            ("warm.died", counts.died),
        ] {
            all.push((name.to_owned(), count));
        }
        let all = all.into_iter().filter(|(_, count)| *count > 0);
        let words: Vec<String> = all.map(|(name, count)| format!("{name}={count}")).collect();
        f.write_str(&words.join(" "))
    }
}
