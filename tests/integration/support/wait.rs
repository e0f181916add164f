//! Waiting for events. The deadlines are generous because the machines are slow and shared; a
//! passing test never waits for one.

use std::future::Future;
use std::time::Duration;

/// How long anything may take before it counts as never.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// Awaits `event`, or fails the test naming `what` did not happen.
pub(crate) async fn within<F: Future>(what: &str, patience: Duration, event: F) -> F::Output {
    match tokio::time::timeout(patience, event).await {
        Ok(value) => value,
        Err(_) => panic!("not within {patience:?}: {what}"),
    }
}

/// Asks until `condition` holds, or fails the test naming `what` did not come true.
pub(crate) async fn eventually<F, Fut>(what: &str, condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    eventually_within(what, PATIENCE, condition).await;
}

/// As [`eventually`], with a deadline of the caller's.
pub(crate) async fn eventually_within<F, Fut>(what: &str, patience: Duration, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    // The question itself may hang as well: the deadline is for all of it.
    within(what, patience, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}
