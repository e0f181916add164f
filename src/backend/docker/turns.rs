//! Who goes first in the engine: creations before removals, and removals one at a time.
//!
//! An engine creates and removes containers under one lock of its layer store. A removal holds it
//! for some 25 ms, three times as long as a creation, and several removals at once slow one
//! another down. So a removal waits until no creation is under way: the next job's result comes
//! sooner, and the removal then runs beside its start, which needs no such lock. `docs/BENCHMARKS.md`
//! has the figures.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};

/// How long a removal waits before it looks whether a creation is under way: time for the caller
/// who just got a result to send the next request.
const LINGER: Duration = Duration::from_millis(2);
/// How long creations may hold a removal up: a few of them, one after the other. Removals free
/// slots, and under full load, when a creation is always under way, they must not wait for long.
const MAX_YIELD: Duration = Duration::from_millis(20);
/// How long creations may hold up what is made ahead of time.
const MAX_SPARE_WAIT: Duration = Duration::from_millis(500);
/// How long a removal waits for its turn: a hanging engine call must not stop the others for ever.
const MAX_QUEUE: Duration = Duration::from_secs(10);

/// The order of calls to one engine.
#[derive(Debug)]
pub(super) struct Turns {
    creating: watch::Sender<usize>,
    starting: AtomicUsize,
    started: Notify,
    removing: Semaphore,
}

/// A creation under way, until dropped.
pub(super) struct Creating<'a>(&'a Turns);

/// A job whose container is being made and started, until dropped.
pub(super) struct Starting<'a>(&'a Turns);

impl Turns {
    pub(super) fn new() -> Self {
        let (creating, starting) = (watch::Sender::new(0), AtomicUsize::new(0));
        Self { creating, starting, started: Notify::new(), removing: Semaphore::new(1) }
    }

    /// Marks a creation. Never waits.
    pub(super) fn create(&self) -> Creating<'_> {
        self.creating.send_modify(|n| *n += 1);
        Creating(self)
    }

    /// Marks a job that waits for a container to be made and started. Never waits.
    pub(super) fn start(&self) -> Starting<'_> {
        self.starting.fetch_add(1, Ordering::Relaxed);
        Starting(self)
    }

    /// How many jobs wait for a container just now.
    pub(super) fn starting(&self) -> usize {
        self.starting.load(Ordering::Relaxed)
    }

    /// Waits until one job less waits for a container, or is over at once if that has come about since
    /// the last time. For one who waits.
    pub(super) async fn started(&self) {
        self.started.notified().await;
    }

    /// Waits until nobody waits for a creation: what is made ahead of time comes after it. Not for
    /// ever, or what makes jobs start sooner would never be made where it is needed most.
    pub(super) async fn spare_moment(&self) {
        let mut creating = self.creating.subscribe();
        // Over either way: the wait is a courtesy.
        let _ = tokio::time::timeout(MAX_SPARE_WAIT, creating.wait_for(|n| *n == 0)).await;
    }

    /// Waits for the turn to remove. Nothing comes back where it did not come in time: then the
    /// removal goes ahead without one.
    pub(super) async fn remove(&self) -> Option<SemaphorePermit<'_>> {
        // Before the turn, not within it: the next removal in the queue lingers meanwhile.
        tokio::time::sleep(LINGER).await;
        let turn = tokio::time::timeout(MAX_QUEUE, self.removing.acquire()).await.ok()?.ok()?;
        let mut creating = self.creating.subscribe();
        // Over either way: the wait is a courtesy.
        let _ = tokio::time::timeout(MAX_YIELD, creating.wait_for(|n| *n == 0)).await;
        Some(turn)
    }
}

impl Drop for Creating<'_> {
    fn drop(&mut self) {
        self.0.creating.send_modify(|n| *n -= 1);
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.starting.fetch_sub(1, Ordering::Relaxed);
        self.0.started.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn removals_come_one_at_a_time_and_after_creations() {
        let turns = Turns::new();
        let begun = Instant::now();
        let first = turns.remove().await;
        assert!(first.is_some() && begun.elapsed() < MAX_YIELD);

        let second = turns.remove();
        tokio::pin!(second);
        assert!(tokio::time::timeout(Duration::from_secs(1), &mut second).await.is_err());
        let creating = turns.create();
        drop(first);
        assert!(tokio::time::timeout(MAX_YIELD / 2, &mut second).await.is_err());
        drop(creating);
        assert!(tokio::time::timeout(MAX_YIELD / 4, &mut second).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_that_wait_are_counted_and_their_end_is_told() {
        let turns = Turns::new();
        let (one, other) = (turns.start(), turns.start());
        assert_eq!(turns.starting(), 2);
        assert!(tokio::time::timeout(Duration::from_secs(1), turns.started()).await.is_err());
        drop(one);
        turns.started().await;
        assert_eq!(turns.starting(), 1);
        drop(other);
        turns.started().await;
        assert_eq!(turns.starting(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn neither_creations_nor_a_hanging_removal_hold_one_up_for_ever() {
        let turns = Turns::new();
        let _creating = turns.create();
        let hanging = turns.remove().await;
        assert!(hanging.is_some());
        assert!(turns.remove().await.is_none());
    }
}
