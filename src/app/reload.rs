//! Settings that change while the daemon runs.

use std::sync::Arc;

use crate::admission::Slots;
use crate::backend::{self, Backend};
use crate::config::Config;
use crate::log::Log;
use crate::orders::{Order, Orders};
use crate::runner::{self, Runner};

/// What follows an operator's orders.
pub(super) struct Reloader {
    pub(super) config: Config,
    pub(super) log: Log,
    pub(super) slots: Slots,
    pub(super) runner: Arc<Runner>,
    pub(super) backend: Arc<dyn Backend>,
    /// Whether there have been warm containers from the start.
    pub(super) has_pool: bool,
}

impl Reloader {
    /// Follows orders for as long as it is let.
    pub(super) async fn follow(mut self, mut orders: Orders) {
        loop {
            match orders.next().await {
                Order::Reload => self.reload(),
                Order::LogVerbosely => {
                    self.log.set_verbose(&self.config.log_filter);
                    tracing::info!("logging verbosely, until SIGUSR2");
                }
                Order::LogAsSet => {
                    self.log.set(&self.config.log_filter);
                    tracing::info!(filter = self.config.log_filter, "logging as RUST_LOG says");
                }
            }
        }
    }

    /// Takes up the settings as they are now: all of them or, where one is wrong, none.
    fn reload(&mut self) {
        // Reading a file of a few lines is no matter even on a thread that has others to serve.
        let config = match Config::from_env() {
            Ok(config) => config,
            Err(error) => {
                tracing::error!("the settings stay as they are: {error}");
                return;
            }
        };
        let changes = self.config.changes(&config);
        let config = self.config.with_reloaded(&config);
        if let Err(error) = self.backend.set_rules(&backend_rules(&config)) {
            tracing::error!("the settings stay as they are: {error:#}");
            return;
        }
        self.runner.set_rules(runner_rules(&config));
        self.slots.resize(config.max_containers);
        self.log.set(&config.log_filter);
        tracing::info!(changed = changes.taken_up.join(", "), "the settings were read again");
        if !changes.left.is_empty() {
            let settings = changes.left.join(", ");
            tracing::warn!(settings, "these have changed and take effect at the next start");
        }
        if !self.has_pool && config.warm.containers > 0 {
            tracing::warn!(
                settings = "WARM_CONTAINERS",
                "this daemon began without warm containers; it takes some with its next start"
            );
        }
        self.config = config;
    }
}

/// What the runner is told of the settings.
pub(super) fn runner_rules(config: &Config) -> runner::Rules {
    runner::Rules {
        policy: config.policy.clone(),
        output_limit: config.output_limit,
        live_logs: config.live_logs,
        live_logs_buffer: config.live_logs_buffer,
    }
}

fn backend_rules(config: &Config) -> backend::Rules {
    backend::Rules {
        image_allowlist: config.images.allowlist.clone(),
        warm_containers: config.warm.containers,
    }
}
