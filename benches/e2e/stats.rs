//! Exact percentiles over every sample: a run is a few hundred jobs, so nothing needs to be bucketed.

use std::time::Duration;

/// Sorted millisecond samples.
#[derive(Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn of(durations: &[Duration]) -> Self {
        Self::from_values(durations.iter().map(|d| d.as_secs_f64() * 1e3).collect())
    }

    pub(crate) fn from_values(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn absorb(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
        self.0.sort_by(f64::total_cmp);
    }

    /// Nearest rank: the smallest sample that at least `p` percent of the samples do not exceed.
    pub(crate) fn percentile(&self, p: f64) -> f64 {
        if self.0.is_empty() {
            return f64::NAN;
        }
        let rank = (p / 100.0 * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    pub(crate) fn median(&self) -> f64 {
        let n = self.0.len();
        if n == 0 {
            return f64::NAN;
        }
        if n % 2 == 1 { self.0[n / 2] } else { f64::midpoint(self.0[n / 2 - 1], self.0[n / 2]) }
    }

    pub(crate) fn min(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }
}
