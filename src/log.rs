//! The log, and how much of it there is.

use std::io::IsTerminal;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};

/// What the filter is while somebody looks for a fault, beside the operator's own.
const VERBOSE: &str = "worker_spawner=debug";

/// The log of this process. Cheap to clone.
#[derive(Clone)]
pub struct Log {
    set: Arc<dyn Fn(EnvFilter) -> bool + Send + Sync>,
}

impl Log {
    /// Begins to log to standard error. Once in the life of a process.
    #[must_use]
    pub fn start(config: &Config) -> Self {
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter(&config.log_filter))
            .with_writer(std::io::stderr);
        match config.log_format {
            LogFormat::Text => {
                let log = log.with_ansi(std::io::stderr().is_terminal()).with_filter_reloading();
                let handle = log.reload_handle();
                log.init();
                Self { set: Arc::new(move |filter| handle.reload(filter).is_ok()) }
            }
            LogFormat::Json => {
                let log = log.json().with_filter_reloading();
                let handle = log.reload_handle();
                log.init();
                Self { set: Arc::new(move |filter| handle.reload(filter).is_ok()) }
            }
        }
    }

    /// Logs what `wanted`, in the syntax of `RUST_LOG`, lets through from now on.
    pub fn set(&self, wanted: &str) {
        if !(self.set)(filter(wanted)) {
            tracing::error!(filter = wanted, "the log's filter cannot be changed any more");
        }
    }

    /// Logs all this program has to say for those who look for a fault, beside what `wanted` lets
    /// through.
    pub fn set_verbose(&self, wanted: &str) {
        self.set(&format!("{wanted},{VERBOSE}"));
    }
}

/// The client library reports every try to connect; this program reports every change, and what the
/// library's events say. Who names the library in the filter gets its words, too.
fn filter(wanted: &str) -> EnvFilter {
    let quiet = if wanted.contains("async_nats") { "" } else { ",async_nats=off" };
    // Checked with the other settings.
    EnvFilter::try_new(format!("{wanted}{quiet}")).unwrap_or_else(|_| EnvFilter::new("info"))
}
