//! The settings as they are given: text, by name.

use serde::Deserialize;

use super::{ConfigError, settings};

/// The settings as text, before they mean anything. A field per setting, by its name.
#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(default)]
pub(super) struct Raw {
    /// Read before the others, see [`super::file`].
    #[allow(dead_code, reason = "a setting all the same")]
    pub(super) config_file: Option<String>,
    pub(super) nats_url: Option<String>,
    pub(super) nats_creds_file: Option<String>,
    pub(super) nats_nkey_seed_file: Option<String>,
    pub(super) nats_user: Option<String>,
    pub(super) nats_password: Option<String>,
    pub(super) nats_token: Option<String>,
    pub(super) nats_tls_ca: Option<String>,
    pub(super) nats_tls_cert: Option<String>,
    pub(super) nats_tls_key: Option<String>,
    pub(super) max_containers: Option<String>,
    pub(super) subject_prefix: Option<String>,
    pub(super) queue_group: Option<String>,
    pub(super) delivery: Option<String>,
    pub(super) max_deliver: Option<String>,
    pub(super) ack_wait: Option<String>,
    pub(super) stream_replicas: Option<String>,
    pub(super) stream_storage: Option<String>,
    pub(super) queue_max_messages: Option<String>,
    pub(super) queue_max_bytes: Option<String>,
    pub(super) queue_max_age: Option<String>,
    pub(super) duplicate_window: Option<String>,
    pub(super) results_max_age: Option<String>,
    pub(super) results_max_bytes: Option<String>,
    pub(super) dead_letters_max_age: Option<String>,
    pub(super) dead_letters_max_bytes: Option<String>,
    pub(super) record_ttl: Option<String>,
    pub(super) records_max_bytes: Option<String>,
    pub(super) objects_max_bytes: Option<String>,
    pub(super) buffer_messages: Option<String>,
    pub(super) buffer_bytes: Option<String>,
    pub(super) run_slot_timeout: Option<String>,
    pub(super) publish_timeout: Option<String>,
    pub(super) reply_prefixes: Option<String>,
    pub(super) pull_policy: Option<String>,
    pub(super) pull_timeout: Option<String>,
    pub(super) image_allowlist: Option<String>,
    pub(super) default_timeout: Option<String>,
    pub(super) max_timeout: Option<String>,
    pub(super) memory_limit: Option<String>,
    pub(super) cpu_limit: Option<String>,
    pub(super) pids_limit: Option<String>,
    pub(super) output_limit: Option<String>,
    pub(super) object_limit: Option<String>,
    pub(super) live_logs: Option<String>,
    pub(super) live_logs_buffer: Option<String>,
    pub(super) container_network: Option<String>,
    pub(super) allowed_networks: Option<String>,
    pub(super) container_user: Option<String>,
    pub(super) container_runtime: Option<String>,
    pub(super) readonly_rootfs: Option<String>,
    pub(super) tmpfs_size: Option<String>,
    pub(super) warm_containers: Option<String>,
    pub(super) warm_images: Option<String>,
    pub(super) warm_idle_timeout: Option<String>,
    pub(super) stop_grace: Option<String>,
    pub(super) shutdown_grace: Option<String>,
    pub(super) engine_timeout: Option<String>,
    pub(super) reap_interval: Option<String>,
    pub(super) http_addr: Option<String>,
    pub(super) otel_exporter_otlp_endpoint: Option<String>,
    pub(super) otel_exporter_otlp_headers: Option<String>,
    pub(super) otel_service_name: Option<String>,
    pub(super) otel_traces_sampler_arg: Option<String>,
    pub(super) log_format: Option<String>,
    pub(super) rust_log: Option<String>,
    pub(super) docker_host: Option<String>,
    pub(super) docker_tls_verify: Option<String>,
    pub(super) docker_cert_path: Option<String>,
    pub(super) docker_config: Option<String>,
    /// Not a setting, but where one of them is looked for.
    pub(super) home: Option<String>,
}

impl Raw {
    /// Of all variables those that are settings. An empty one is an unset one.
    pub(super) fn from_vars(
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let ours = vars.into_iter().filter(|(name, value)| {
            let ours = name == "HOME" || settings::is_setting(name);
            ours && !value.trim().is_empty()
        });
        envy::from_iter(ours).map_err(|e| ConfigError { problems: vec![e.to_string()] })
    }
}
