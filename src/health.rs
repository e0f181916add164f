//! Whether the engine is there, and what to do whenever it comes.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::backend::{Backend, PreflightError};
use crate::retry::Backoff;

/// How often a healthy engine is pinged, so that its absence is noticed while nothing runs.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Delays between looks at an engine that is away.
const ENGINE_RETRY: Backoff =
    Backoff { first: Duration::from_millis(250), most: Duration::from_secs(5) };

/// What is known of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nobody has looked yet.
    Unknown,
    /// It answers, and can do what is asked of it.
    Up,
    /// It does not.
    Down,
    /// It answers, and cannot do what is asked of it.
    Unfit,
}

impl Health {
    /// Whether it is known that nothing can be run.
    #[must_use]
    pub fn is_away(self) -> bool {
        matches!(self, Self::Down | Self::Unfit)
    }
}

/// Waits until the engine is there.
pub async fn up(engine: &mut watch::Receiver<Health>) {
    if engine.wait_for(|health| *health == Health::Up).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits until the engine is not there.
pub async fn down(engine: &mut watch::Receiver<Health>) {
    if engine.wait_for(|health| *health != Health::Up).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Keeps looking whether the engine is there: now and then while it is, soon after a suspicion,
/// and with growing delays while it is away. One log line per change.
///
/// An engine that turns out unfit when it first appears ends the daemon, as it would have at the
/// start; one that comes back unfit is waited for.
pub async fn watch_engine(
    backend: Arc<dyn Backend>,
    health: watch::Sender<Health>,
    mut suspected: watch::Receiver<u64>,
    unfit: oneshot::Sender<String>,
) {
    let mut failures = 0;
    let mut unfit = Some(unfit);
    loop {
        let now = match backend.preflight().await {
            Ok(()) => {
                unfit = None;
                Health::Up
            }
            Err(error) => {
                if let PreflightError::Unfit(why) = &error
                    && let Some(unfit) = unfit.take()
                {
                    // Nobody to hear it is the daemon's end, too.
                    let _ = unfit.send(why.clone());
                }
                if !health.borrow().is_away() {
                    tracing::warn!(%error, "the container engine is away; requests wait");
                }
                match error {
                    PreflightError::Unavailable(_) => Health::Down,
                    PreflightError::Unfit(_) => Health::Unfit,
                }
            }
        };
        if health.send_replace(now).is_away() && now == Health::Up {
            tracing::info!("the container engine is back");
        }
        failures = if now == Health::Up { 0 } else { failures + 1 };
        if now == Health::Up {
            // The sender lives as long as the runner, and so longer than this task.
            let _ = tokio::time::timeout(PING_INTERVAL, suspected.changed()).await;
        } else {
            tokio::time::sleep(ENGINE_RETRY.delay(failures)).await;
        }
    }
}

/// Looks for strays at the start, after every absence of the engine, and at every interval.
pub async fn reap(
    backend: Arc<dyn Backend>,
    mut engine: watch::Receiver<Health>,
    interval: Duration,
) {
    loop {
        up(&mut engine).await;
        if let Err(error) = backend.reap().await {
            tracing::warn!(%error, "not all stray containers could be removed");
        }
        // Whichever comes first: both lead to another look.
        let _ = tokio::time::timeout(interval, down(&mut engine)).await;
    }
}
