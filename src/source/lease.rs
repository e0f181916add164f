//! How sure a worker is that the request it holds is its own.
//!
//! JetStream gives a request to another worker when its holder has been silent for `ACK_WAIT`. A
//! holder that was frozen does not notice by itself: what it knows is when it was last heard.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// When the holder of a request was last heard. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lease {
    ack_wait: Duration,
    heard: Arc<Mutex<(Instant, SystemTime)>>,
}

impl Lease {
    /// A lease that begins now.
    #[must_use]
    pub fn begin(ack_wait: Duration) -> Self {
        Self { ack_wait, heard: Arc::new(Mutex::new(now())) }
    }

    /// The server heard a sign of life that was sent at `sent`.
    pub fn renew(&self, sent: (Instant, SystemTime)) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = sent;
    }

    /// Whether nobody else can have been given the request yet. A third of the time is kept back
    /// for what the answer is used for.
    ///
    /// Two clocks, since one of them stands still while the machine is suspended and the other can
    /// be set.
    #[must_use]
    pub fn is_sure(&self) -> bool {
        let (instant, time) = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let safe = self.ack_wait * 2 / 3;
        instant.elapsed() < safe && time.elapsed().is_ok_and(|elapsed| elapsed < safe)
    }

    /// How often to give a sign of life.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.ack_wait / 3
    }
}

/// This moment, on both clocks.
#[must_use]
pub fn now() -> (Instant, SystemTime) {
    (Instant::now(), SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_on_either_clock_is_doubt() {
        let lease = Lease::begin(Duration::from_secs(30));
        assert!(lease.is_sure());
        let (instant, time) = now();
        let ago = Duration::from_secs(21);
        lease.renew((instant, time - ago));
        assert!(!lease.is_sure());
        lease.renew((instant.checked_sub(ago).unwrap_or(instant), time));
        assert!(!lease.is_sure());
        // A clock that was set back says nothing.
        lease.renew((instant, time + ago));
        assert!(!lease.is_sure());
    }
}
