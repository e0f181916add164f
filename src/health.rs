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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Run;
    use crate::job::Job;
    use async_trait::async_trait;
    use std::sync::Mutex;
    use tokio_util::sync::CancellationToken;

    /// An engine of which is known in advance how it will be found, again and again.
    struct Foretold(Mutex<Vec<Result<(), PreflightError>>>);

    #[async_trait]
    impl Backend for Foretold {
        async fn preflight(&self) -> Result<(), PreflightError> {
            match self.0.lock().ok().and_then(|mut left| left.pop()) {
                Some(found) => found,
                None => std::future::pending().await,
            }
        }

        fn prepare(&self, _job: Job) -> Box<dyn Run> {
            unreachable!("nothing is run")
        }

        async fn reap(&self) -> anyhow::Result<()> {
            Ok(())
        }

        async fn tend(&self, _enough: &CancellationToken) {}

        fn set_rules(&self, _: &crate::backend::Rules) -> anyhow::Result<()> {
            Ok(())
        }

        async fn retire(&self) {}
    }

    /// How the engine is seen, one after the other, and whether the daemon was told to end.
    async fn seen(found: Vec<Result<(), PreflightError>>) -> (Vec<Health>, bool) {
        let looks = found.len();
        let backend = Arc::new(Foretold(Mutex::new(found.into_iter().rev().collect())));
        let (health, mut seen) = watch::channel(Health::Unknown);
        let (_suspicions, suspected) = watch::channel(0);
        let (unfit, mut told) = oneshot::channel();
        let watching = tokio::spawn(watch_engine(backend, health, suspected, unfit));
        let mut all = Vec::new();
        while all.len() < looks && seen.changed().await.is_ok() {
            all.push(*seen.borrow_and_update());
        }
        watching.abort();
        (all, told.try_recv().is_ok())
    }

    fn unfit() -> Result<(), PreflightError> {
        Err(PreflightError::Unfit("it lacks a runtime".to_owned()))
    }

    fn away() -> Result<(), PreflightError> {
        Err(PreflightError::Unavailable("no socket".to_owned()))
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_comes_back_unfit_is_waited_for() {
        let (all, ends) = seen(vec![away(), Ok(()), away(), unfit(), Ok(())]).await;
        assert_eq!(all, [Health::Down, Health::Up, Health::Down, Health::Unfit, Health::Up]);
        assert!(!ends, "it was fit once");
        assert!(all.iter().all(|health| health.is_away() == (*health != Health::Up)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_is_unfit_at_first_ends_the_daemon() {
        let (all, ends) = seen(vec![away(), unfit()]).await;
        assert_eq!(all, [Health::Down, Health::Unfit]);
        assert!(ends);
    }
}
