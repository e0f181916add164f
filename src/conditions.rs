//! What must hold, and what stands in the way.

use std::sync::{Arc, Mutex, PoisonError};

/// Says why a condition does not hold; nothing where it does.
type Check = Box<dyn Fn() -> Option<&'static str> + Send + Sync>;

/// Conditions that must all hold. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Conditions(Arc<Mutex<Vec<Check>>>);

impl Conditions {
    /// Adds a condition: `check` says, without waiting, why it does not hold.
    pub fn require(&self, check: impl Fn() -> Option<&'static str> + Send + Sync + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(check));
    }

    /// Why not all hold, a reason for each that does not, in the order in which they were added.
    #[must_use]
    pub fn failing(&self) -> Vec<&'static str> {
        // A list is whole whatever its last holder did.
        let checks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        checks.iter().filter_map(|check| check()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn every_condition_that_fails_is_named() {
        let conditions = Conditions::default();
        assert!(conditions.failing().is_empty());
        let holds = Arc::new(AtomicBool::new(false));
        let seen = holds.clone();
        conditions.require(move || (!seen.load(Ordering::Relaxed)).then_some("first"));
        conditions.require(|| None);
        conditions.require(|| Some("third"));
        assert_eq!(conditions.clone().failing(), ["first", "third"]);
        holds.store(true, Ordering::Relaxed);
        assert_eq!(conditions.failing(), ["third"]);
    }
}
