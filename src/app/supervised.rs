//! The daemon as its service manager sees it.

use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

use super::LAST_RITES;
use super::observed::Observed;
use crate::config::Config;
use crate::notify::{self, Sight};
use crate::runner;
use crate::shutdown::Shutdown;

/// Keeps the service manager informed, if there is one, until the result is dropped.
pub(super) fn supervised(
    observed: &Observed,
    shutdown: &Shutdown,
    config: &Config,
) -> Option<AbortOnDropHandle<()>> {
    let (alive, ready) = (observed.alive.clone(), observed.ready.clone());
    let metrics = observed.metrics.clone();
    let look = move || Sight {
        missing: ready.failing(),
        alive: alive.failing().is_empty(),
        jobs: metrics.jobs_running(),
    };
    notify::begin(look, shutdown.draining.clone(), longest_end(config))
}

/// The longest that the end takes of a daemon that is not wedged: the running functions' grace, their
/// stop and its report, and what comes after the last of them.
fn longest_end(config: &Config) -> Duration {
    let stop = config.stop_grace + runner::LAST_PATIENCE + config.publish_timeout;
    config.shutdown_grace + stop + 2 * LAST_RITES + Duration::from_secs(5)
}
