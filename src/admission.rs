//! Slots: at most `MAX_CONTAINERS` functions run at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The slots of one instance. First come, first served.
#[derive(Clone, Debug)]
pub struct Slots {
    semaphore: Arc<Semaphore>,
    total: usize,
}

/// The right to run one function. Dropped when its container is gone, and not before.
#[derive(Debug)]
pub struct Slot {
    _permit: OwnedSemaphorePermit,
}

impl Slots {
    /// `total` free slots.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self { semaphore: Arc::new(Semaphore::new(total)), total }
    }

    /// How many there are, free or not.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// How many are taken just now.
    #[must_use]
    pub fn used(&self) -> usize {
        self.total.saturating_sub(self.semaphore.available_permits())
    }

    /// Waits for a slot. Cancel-safe: a dropped wait takes none.
    pub async fn take(&self) -> Slot {
        match self.semaphore.clone().acquire_owned().await {
            Ok(permit) => Slot { _permit: permit },
            // The semaphore is never closed; a wait that ended otherwise would grant a slot that
            // is not there.
            Err(_closed) => std::future::pending().await,
        }
    }

    /// Waits until a slot is free, behind those who wait for one, and leaves it free. Cancel-safe.
    pub async fn free(&self) {
        drop(self.take().await);
    }

    /// Waits for a slot no longer than `patience`.
    pub async fn take_within(&self, patience: Duration) -> Option<Slot> {
        tokio::time::timeout(patience, self.take()).await.ok()
    }
}
