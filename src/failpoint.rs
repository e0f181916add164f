//! Places where a test can have the daemon die: between two effects, where a crash shows most.
//!
//! Only with the cargo feature `failpoints`, which no release has. `WORKER_SPAWNER_FAILPOINTS`
//! names them, each with the hit at which the process aborts: `result.published=1,job.claimed=3`.

/// Dies here if the test says so. Nothing without the feature `failpoints`.
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::hit($name);
    };
}

/// Counts a hit, and aborts the process if it is the one.
#[cfg(feature = "failpoints")]
pub fn hit(name: &'static str) {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex, PoisonError};

    static LEFT: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(|| {
        let text = std::env::var("WORKER_SPAWNER_FAILPOINTS").unwrap_or_default();
        let entry = |entry: &str| {
            let (name, hits) = entry.split_once('=')?;
            Some((name.trim().to_owned(), hits.trim().parse().ok()?))
        };
        Mutex::new(text.split(',').filter_map(entry).collect())
    });
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(left) = left.get_mut(name) {
        *left = left.saturating_sub(1);
        if *left == 0 {
            tracing::error!(failpoint = name, "dying here, as told");
            std::process::abort();
        }
    }
}
