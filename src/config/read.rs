//! From the settings as they are given to what they mean.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::parse::{Problems, Servers};
use super::raw::Raw;
use super::{
    Config, ConfigError, Confinement, Delivery, Docker, Images, LogFormat, Nats, Policy,
    PullPolicy, Secret, Streams, Traces, Warm, file, settings,
};
use crate::job::Limits;
use crate::protocol::Subjects;

impl Nats {
    /// Reads how NATS is reached, and under which subjects, and nothing else: a client needs no
    /// other setting to be right.
    ///
    /// # Errors
    /// Names every setting of these that is wrong, with what was expected.
    pub fn from_vars(
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(Self, Subjects), ConfigError> {
        let mut raw = Raw::from_vars(vars)?;
        let mut problems = Problems::default();
        let nats = Self::from_raw(&mut raw, &mut problems);
        let prefix = problems.subject("SUBJECT_PREFIX", raw.subject_prefix);
        match problems.into_lines() {
            lines if lines.is_empty() => Ok((nats, Subjects::new(&prefix))),
            problems => Err(ConfigError { problems }),
        }
    }

    fn from_raw(raw: &mut Raw, p: &mut Problems) -> Self {
        let Servers { servers, user: url_user, token: url_token } =
            p.servers("NATS_URL", raw.nats_url.take());
        let url_has_secret = url_user.is_some() || url_token.is_some();
        let nats = Nats {
            servers,
            creds_file: p.creds_file("NATS_CREDS_FILE", raw.nats_creds_file.take()),
            nkey_seed: p.nkey_seed("NATS_NKEY_SEED_FILE", raw.nats_nkey_seed_file.take()),
            user: p
                .pair("NATS_USER", raw.nats_user.take(), "NATS_PASSWORD", raw.nats_password.take())
                .map(|(user, password)| (user, Secret::new(password))),
            token: raw.nats_token.take().map(Secret::new),
            tls_ca: p.certificates("NATS_TLS_CA", raw.nats_tls_ca.take()),
            tls_client: p
                .pair(
                    "NATS_TLS_CERT",
                    raw.nats_tls_cert.take(),
                    "NATS_TLS_KEY",
                    raw.nats_tls_key.take(),
                )
                .and_then(|(cert, key)| {
                    let cert = p.certificates("NATS_TLS_CERT", Some(cert));
                    cert.zip(p.private_key("NATS_TLS_KEY", Some(key)))
                }),
        };
        p.at_most_one(&[
            ("NATS_CREDS_FILE", nats.creds_file.is_some()),
            ("NATS_NKEY_SEED_FILE", nats.nkey_seed.is_some()),
            ("NATS_USER", nats.user.is_some()),
            ("NATS_TOKEN", nats.token.is_some()),
            ("a user or token in NATS_URL", url_has_secret),
        ]);
        Self { user: nats.user.or(url_user), token: nats.token.or(url_token), ..nats }
    }
}

impl Config {
    /// Reads the settings from the process' environment, and those it does not set from the file that
    /// its `CONFIG_FILE` names.
    ///
    /// # Errors
    /// The file cannot be read, or is wrong; or names every setting that is wrong, with what was
    /// expected.
    pub fn from_env() -> Result<Self, ConfigError> {
        // A variable that is no Unicode cannot be one of ours, except by mistake: it is passed on
        // with the bad bytes replaced, so that the parser names it.
        let vars = std::env::vars_os().map(|(name, value)| {
            (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
        });
        Self::from_vars(file::completed(vars.collect())?)
    }

    /// Reads the settings from these variables. An empty value is an unset one.
    ///
    /// # Errors
    /// Names every setting that is wrong, with what was expected.
    pub fn from_vars(
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let vars: BTreeMap<String, String> = vars.into_iter().collect();
        let raw = Raw::from_vars(vars.clone())?;
        let mut problems = Problems::default();
        let mut config = Self::from_raw(raw, &mut problems);
        config.given = vars
            .into_iter()
            .filter(|(name, value)| settings::is_setting(name) && !value.trim().is_empty())
            .map(|(name, value)| (name, Secret::new(value.trim())))
            .collect();
        match problems.into_lines() {
            lines if lines.is_empty() => Ok(config),
            problems => Err(ConfigError { problems }),
        }
    }

    /// Every field gets a value, the default's where the given one is wrong, so that one pass
    /// finds all problems. The result counts only where there is none.
    fn from_raw(mut raw: Raw, p: &mut Problems) -> Self {
        let nats = Nats::from_raw(&mut raw, p);
        let docker_dir = raw.docker_config.map(PathBuf::from);
        let docker_dir = docker_dir.or_else(|| Some(PathBuf::from(raw.home?).join(".docker")));
        let host = p.docker_host("DOCKER_HOST", raw.docker_host);
        let certs = raw.docker_cert_path.map(PathBuf::from).or_else(|| docker_dir.clone());
        if raw.docker_tls_verify.is_some() && host.starts_with("http://") {
            p.say("DOCKER_TLS_VERIFY", "is set, and DOCKER_HOST asks for plain http://");
        }
        let by_tls = host.starts_with("https://")
            || (raw.docker_tls_verify.is_some() && host.starts_with("tcp://"));
        let docker = Docker {
            tls: by_tls.then(|| p.docker_tls("DOCKER_CERT_PATH", certs)).flatten(),
            host,
            config_dir: docker_dir,
        };

        let max_attempts = p.number("MAX_DELIVER", raw.max_deliver, 1..=1_000);
        let policy = Policy {
            default_timeout: p.nonzero_duration("DEFAULT_TIMEOUT", raw.default_timeout),
            max_timeout: p.nonzero_duration("MAX_TIMEOUT", raw.max_timeout),
            memory_bytes: p.size("MEMORY_LIMIT", raw.memory_limit, 6 << 20),
            cpus: p.cpus("CPU_LIMIT", raw.cpu_limit),
            pids: p.number("PIDS_LIMIT", raw.pids_limit, 1..=4_194_304),
            network: p.network("CONTAINER_NETWORK", raw.container_network),
            allowed_networks: p.networks("ALLOWED_NETWORKS", raw.allowed_networks),
            reply_prefixes: p.reply_prefixes("REPLY_PREFIXES", raw.reply_prefixes),
            max_attempts,
        };
        if policy.default_timeout > policy.max_timeout {
            p.say("DEFAULT_TIMEOUT", "must not be longer than MAX_TIMEOUT");
        }

        let streams = Streams {
            ack_wait: p.duration_of_at_least("ACK_WAIT", raw.ack_wait, Duration::from_secs(1)),
            replicas: p.choice(
                "STREAM_REPLICAS",
                raw.stream_replicas,
                &[("1", 1), ("3", 3), ("5", 5)],
            ),
            in_memory: p.choice(
                "STREAM_STORAGE",
                raw.stream_storage,
                &[("file", false), ("memory", true)],
            ),
            queue_max_messages: p.number("QUEUE_MAX_MESSAGES", raw.queue_max_messages, 1..=1 << 40),
            queue_max_bytes: p.size("QUEUE_MAX_BYTES", raw.queue_max_bytes, 64 << 10),
            queue_max_age: p.nonzero_duration("QUEUE_MAX_AGE", raw.queue_max_age),
            duplicate_window: p.duration_of_at_least(
                "DUPLICATE_WINDOW",
                raw.duplicate_window,
                Duration::from_secs(1),
            ),
            results_max_age: p.nonzero_duration("RESULTS_MAX_AGE", raw.results_max_age),
            results_max_bytes: p.size("RESULTS_MAX_BYTES", raw.results_max_bytes, 64 << 10),
            dead_letters_max_age: p
                .nonzero_duration("DEAD_LETTERS_MAX_AGE", raw.dead_letters_max_age),
            dead_letters_max_bytes: p.size(
                "DEAD_LETTERS_MAX_BYTES",
                raw.dead_letters_max_bytes,
                64 << 10,
            ),
            record_ttl: p.nonzero_duration("RECORD_TTL", raw.record_ttl),
            records_max_bytes: p.size("RECORDS_MAX_BYTES", raw.records_max_bytes, 64 << 10),
            objects_max_bytes: p.size("OBJECTS_MAX_BYTES", raw.objects_max_bytes, 64 << 10),
        };
        // A record is what keeps a cancelled job from starting, and an ended one from running again.
        if streams.record_ttl < streams.queue_max_age {
            p.say("RECORD_TTL", "must not be shorter than QUEUE_MAX_AGE");
        }
        for (name, age) in [
            ("RECORD_TTL", streams.record_ttl),
            ("RESULTS_MAX_AGE", streams.results_max_age),
            ("DEAD_LETTERS_MAX_AGE", streams.dead_letters_max_age),
        ] {
            if age < streams.duplicate_window {
                p.say(name, "must not be shorter than DUPLICATE_WINDOW");
            }
        }

        let delivery = p.choice(
            "DELIVERY",
            raw.delivery,
            &[
                ("auto", Delivery::Auto),
                ("jetstream", Delivery::JetStream),
                ("core", Delivery::Core),
            ],
        );
        let prefix = p.subject("SUBJECT_PREFIX", raw.subject_prefix);
        let queue_group = p.subject("QUEUE_GROUP", raw.queue_group);
        if delivery != Delivery::Core {
            p.stream_name("SUBJECT_PREFIX", &prefix);
            p.stream_name("QUEUE_GROUP", &queue_group);
        }

        let max_containers = p.number("MAX_CONTAINERS", raw.max_containers, 1..=10_000);
        let warm = Warm {
            containers: match raw.warm_containers {
                None => max_containers,
                given => p.number("WARM_CONTAINERS", given, 0..=10_000),
            },
            images: p.images("WARM_IMAGES", raw.warm_images),
            idle_timeout: p.nonzero_duration("WARM_IDLE_TIMEOUT", raw.warm_idle_timeout),
            limits: Limits {
                timeout: policy.max_timeout,
                memory_bytes: policy.memory_bytes,
                cpus: policy.cpus,
                pids: policy.pids,
            },
            network: policy.network.clone(),
        };
        if !warm.images.is_empty() && warm.containers < warm.images.len() {
            p.say("WARM_CONTAINERS", "must not be less than the number of WARM_IMAGES");
        }

        // Other programs have these variables, too: they count for nothing where nothing is exported.
        let traces = raw.otel_exporter_otlp_endpoint.map(|endpoint| Traces {
            endpoint: p.http_url("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            headers: p.headers("OTEL_EXPORTER_OTLP_HEADERS", raw.otel_exporter_otlp_headers),
            service_name: p.text("OTEL_SERVICE_NAME", raw.otel_service_name),
            ratio: p.share("OTEL_TRACES_SAMPLER_ARG", raw.otel_traces_sampler_arg),
        });

        Self {
            nats,
            subjects: Subjects::new(&prefix),
            queue_group,
            delivery,
            streams,
            max_containers,
            max_attempts,
            buffer_messages: p.number("BUFFER_MESSAGES", raw.buffer_messages, 1..=10_000_000),
            buffer_bytes: p.size("BUFFER_BYTES", raw.buffer_bytes, 64 << 10),
            run_slot_timeout: p.duration("RUN_SLOT_TIMEOUT", raw.run_slot_timeout),
            publish_timeout: p.nonzero_duration("PUBLISH_TIMEOUT", raw.publish_timeout),
            policy,
            images: Images {
                pull_policy: p.choice(
                    "PULL_POLICY",
                    raw.pull_policy,
                    &[
                        ("missing", PullPolicy::Missing),
                        ("always", PullPolicy::Always),
                        ("never", PullPolicy::Never),
                    ],
                ),
                pull_timeout: p.nonzero_duration("PULL_TIMEOUT", raw.pull_timeout),
                allowlist: p.globs("IMAGE_ALLOWLIST", raw.image_allowlist),
            },
            confinement: Confinement {
                user: raw.container_user,
                runtime: raw.container_runtime,
                readonly_rootfs: p.boolean("READONLY_ROOTFS", raw.readonly_rootfs),
                tmpfs_bytes: p.size("TMPFS_SIZE", raw.tmpfs_size, 1 << 12),
            },
            warm,
            output_limit: p.size::<u32>("OUTPUT_LIMIT", raw.output_limit, 0) as usize,
            object_limit: p.size::<u32>("OBJECT_LIMIT", raw.object_limit, 0) as usize,
            live_logs: p.boolean("LIVE_LOGS", raw.live_logs),
            live_logs_buffer: p.size::<u32>("LIVE_LOGS_BUFFER", raw.live_logs_buffer, 64 << 10)
                as usize,
            stop_grace: p.duration("STOP_GRACE", raw.stop_grace),
            shutdown_grace: p.duration("SHUTDOWN_GRACE", raw.shutdown_grace),
            docker,
            engine_timeout: p.nonzero_duration("ENGINE_TIMEOUT", raw.engine_timeout),
            reap_interval: p.nonzero_duration("REAP_INTERVAL", raw.reap_interval),
            http_addr: p.socket_addr("HTTP_ADDR", raw.http_addr),
            traces,
            log_format: p.choice(
                "LOG_FORMAT",
                raw.log_format,
                &[("text", LogFormat::Text), ("json", LogFormat::Json)],
            ),
            log_filter: p.log_filter("RUST_LOG", raw.rust_log),
            given: BTreeMap::new(),
        }
    }
}
