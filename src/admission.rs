//! Slots: at most `MAX_CONTAINERS` functions run at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The slots of one instance. First come, first served. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Slots {
    semaphore: Arc<Semaphore>,
    size: Arc<Mutex<Size>>,
}

/// How many slots there are, and how many more until so many have been given back.
#[derive(Debug)]
struct Size {
    total: usize,
    surplus: usize,
}

/// The right to run one function. Dropped when its container is gone, and not before.
#[derive(Debug)]
pub struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    slots: Slots,
}

impl Slots {
    /// `total` free slots.
    #[must_use]
    pub fn new(total: usize) -> Self {
        let size = Arc::new(Mutex::new(Size { total, surplus: 0 }));
        Self { semaphore: Arc::new(Semaphore::new(total)), size }
    }

    fn size(&self) -> MutexGuard<'_, Size> {
        // Two numbers, each of them whole whatever its last holder did.
        self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are, free or not.
    #[must_use]
    pub fn total(&self) -> usize {
        self.size().total
    }

    /// How many are taken just now. More than there are after they have become fewer.
    #[must_use]
    pub fn used(&self) -> usize {
        let Size { total, surplus } = *self.size();
        (total + surplus).saturating_sub(self.semaphore.available_permits())
    }

    /// Has `total` slots from now on. Where more than that are taken, those are given up as their
    /// functions end.
    pub fn resize(&self, total: usize) {
        let mut size = self.size();
        if total > size.total {
            let more = total - size.total;
            let kept = more.min(size.surplus);
            size.surplus -= kept;
            self.semaphore.add_permits(more - kept);
        } else {
            let fewer = size.total - total;
            size.surplus += fewer - self.semaphore.forget_permits(fewer);
        }
        size.total = total;
    }

    /// Waits for a slot. Cancel-safe: a dropped wait takes none.
    pub async fn take(&self) -> Slot {
        match self.semaphore.clone().acquire_owned().await {
            Ok(permit) => Slot { permit: Some(permit), slots: self.clone() },
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

impl Drop for Slot {
    fn drop(&mut self) {
        let mut size = self.slots.size();
        if size.surplus > 0 {
            size.surplus -= 1;
            if let Some(permit) = self.permit.take() {
                permit.forget();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn take_now(slots: &Slots) -> Option<Slot> {
        slots.take().now_or_never()
    }

    #[test]
    fn more_slots_are_there_at_once() {
        let slots = Slots::new(1);
        let first = take_now(&slots);
        assert!(first.is_some() && take_now(&slots).is_none());
        slots.resize(2);
        let second = take_now(&slots);
        assert!(second.is_some() && take_now(&slots).is_none());
        assert_eq!((slots.total(), slots.used()), (2, 2));
    }

    #[test]
    fn fewer_slots_are_given_up_as_they_come_free() {
        let slots = Slots::new(3);
        let mut taken: Vec<_> = (0..2).map(|_| take_now(&slots)).collect();
        slots.resize(1);
        assert_eq!((slots.total(), slots.used()), (1, 2));
        assert!(take_now(&slots).is_none());
        taken.pop();
        assert_eq!((slots.total(), slots.used()), (1, 1));
        assert!(take_now(&slots).is_none());
        // Half of what was to be given up is wanted again before it was.
        slots.resize(2);
        taken.push(take_now(&slots));
        slots.resize(0);
        slots.resize(1);
        taken.pop();
        assert!(take_now(&slots).is_none());
        taken.pop();
        assert_eq!((slots.total(), slots.used()), (1, 0));
        assert!(take_now(&slots).is_some());
    }
}
