//! Which settings a running daemon takes up, and what of others is otherwise.

use std::collections::BTreeSet;

use super::{Config, Images, Policy, Warm};

/// The settings a running daemon takes up when it is told to read them again. The others take effect
/// when it starts.
pub const RELOADABLE: [&str; 14] = [
    "MAX_CONTAINERS",
    "DEFAULT_TIMEOUT",
    "MAX_TIMEOUT",
    "MEMORY_LIMIT",
    "CPU_LIMIT",
    "PIDS_LIMIT",
    "ALLOWED_NETWORKS",
    "REPLY_PREFIXES",
    "IMAGE_ALLOWLIST",
    "OUTPUT_LIMIT",
    "LIVE_LOGS",
    "LIVE_LOGS_BUFFER",
    "WARM_CONTAINERS",
    "RUST_LOG",
];

/// The settings that differ, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Those a running daemon takes up.
    pub taken_up: Vec<String>,
    /// Those that take effect when it starts.
    pub left: Vec<String>,
}

impl Config {
    /// These settings, with those of `other` that a running daemon takes up.
    #[must_use]
    pub fn with_reloaded(&self, other: &Self) -> Self {
        let is_reloadable = |name: &String| RELOADABLE.contains(&name.as_str());
        let mut given = self.given.clone();
        given.retain(|name, _| !is_reloadable(name));
        let taken_up = other.given.iter().filter(|(name, _)| is_reloadable(name));
        given.extend(taken_up.map(|(name, value)| (name.clone(), value.clone())));
        let (images, warm) = (self.images.clone(), self.warm.clone());
        Self {
            max_containers: other.max_containers,
            policy: Policy {
                network: self.policy.network.clone(),
                max_attempts: self.policy.max_attempts,
                ..other.policy.clone()
            },
            images: Images { allowlist: other.images.allowlist.clone(), ..images },
            output_limit: other.output_limit,
            live_logs: other.live_logs,
            live_logs_buffer: other.live_logs_buffer,
            warm: Warm { containers: other.warm.containers, ..warm },
            log_filter: other.log_filter.clone(),
            given,
            ..self.clone()
        }
    }

    /// What `other` sets otherwise than this.
    #[must_use]
    pub fn changes(&self, other: &Self) -> Changes {
        let mut changes = Changes::default();
        let names: BTreeSet<&String> = self.given.keys().chain(other.given.keys()).collect();
        for name in names {
            let value = |config: &Self| config.given.get(name).map(|v| v.expose().to_owned());
            if value(self) != value(other) {
                let is_reloadable = RELOADABLE.contains(&name.as_str());
                let list = if is_reloadable { &mut changes.taken_up } else { &mut changes.left };
                list.push(name.clone());
            }
        }
        changes
    }
}
