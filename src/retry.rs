//! Growing delays between attempts.

use std::time::Duration;

/// Delays that double from `first` to `most`, each shortened by up to a half at random, so that
/// many who failed together do not come back together.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The delay after the first failure.
    pub first: Duration,
    /// The longest delay.
    pub most: Duration,
}

impl Backoff {
    /// The delay after failure number `failures`, counted from 1.
    #[must_use]
    pub fn delay(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(20);
        let full = self.first.saturating_mul(1 << doublings).min(self.most);
        full.mul_f64(0.5 + 0.5 * unit_interval())
    }
}

/// A number in 0..1, spread well enough for jitter.
fn unit_interval() -> f64 {
    // The random bits of a UUIDv4-like value are good enough and already a dependency.
    let (_, low) = uuid::Uuid::now_v7().as_u64_pair();
    f64::from((low & 0xffff_ffff) as u32) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_bound() {
        let backoff = Backoff { first: Duration::from_millis(100), most: Duration::from_secs(5) };
        for (failures, full) in [(1, 100), (2, 200), (3, 400), (7, 5000), (4_000_000_000, 5000)] {
            let delay = backoff.delay(failures).as_millis();
            assert!((full / 2..=full).contains(&delay), "{failures}: {delay} ms of {full}");
        }
    }
}
