//! The settings: read from the environment, all of them parsed before any error is reported.
//!
//! [`settings::SETTINGS`] is the one list of names, defaults and descriptions; `.env.example` and
//! the README's table are checked against it.

mod file;
mod parse;
mod secret;
pub mod settings;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::job::Limits;
use crate::protocol::Subjects;
use parse::{Problems, Servers};
pub use secret::Secret;

/// Exit code of a start with bad settings: `EX_CONFIG` of BSD's sysexits.h.
pub const EX_CONFIG: u8 = 78;

/// Everything an operator can set.
#[derive(Clone, Debug)]
pub struct Config {
    /// How NATS is reached.
    pub nats: Nats,
    /// The subjects, from `SUBJECT_PREFIX`.
    pub subjects: Subjects,
    /// `QUEUE_GROUP`: instances of one group share the requests.
    pub queue_group: String,
    /// `DELIVERY`: where requests come from.
    pub delivery: Delivery,
    /// `MAX_CONTAINERS`: how many functions run at once.
    pub max_containers: usize,
    /// `MAX_DELIVER`: how many attempts a job has when the infrastructure fails it.
    pub max_attempts: u32,
    /// The streams behind durable delivery.
    pub streams: Streams,
    /// `BUFFER_MESSAGES`: requests that may wait in memory.
    pub buffer_messages: usize,
    /// `BUFFER_BYTES`: bytes of requests that may wait in memory.
    pub buffer_bytes: usize,
    /// `RUN_SLOT_TIMEOUT`: how long a `run` request waits for a slot before it is told `busy`.
    pub run_slot_timeout: Duration,
    /// `PUBLISH_TIMEOUT`: how long publishing may delay the clean-up.
    pub publish_timeout: Duration,
    /// What requests may ask for.
    pub policy: Policy,
    /// Images: when to pull them, which are allowed.
    pub images: Images,
    /// How a function is confined.
    pub confinement: Confinement,
    /// Containers that wait for jobs.
    pub warm: Warm,
    /// `OUTPUT_LIMIT`: bytes kept of each output stream.
    pub output_limit: usize,
    /// `OBJECT_LIMIT`: bytes of one output stream, or of a standard input, that go through the
    /// object store; 0 for none.
    pub object_limit: usize,
    /// `LIVE_LOGS`: whether output is published while a function runs, unless its request says.
    pub live_logs: bool,
    /// `LIVE_LOGS_BUFFER`: bytes of a job's live output that may wait for NATS.
    pub live_logs_buffer: usize,
    /// `STOP_GRACE`: from TERM to KILL.
    pub stop_grace: Duration,
    /// `SHUTDOWN_GRACE`: how long running functions may go on after SIGTERM.
    pub shutdown_grace: Duration,
    /// How the engine and the registries' credentials are found.
    pub docker: Docker,
    /// `ENGINE_TIMEOUT`: how long one call to the engine may take.
    pub engine_timeout: Duration,
    /// `REAP_INTERVAL`: how often containers of dead instances are looked for.
    pub reap_interval: Duration,
    /// `HTTP_ADDR`: where health and metrics are served. Absent: nowhere.
    pub http_addr: Option<SocketAddr>,
    /// `LOG_FORMAT`.
    pub log_format: LogFormat,
    /// `RUST_LOG`, checked when the log starts.
    pub log_filter: String,
    /// What was set, by name.
    given: BTreeMap<String, Secret>,
}

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

/// How NATS is reached.
#[derive(Clone, Debug)]
pub struct Nats {
    /// `NATS_URL`, one entry a server, without the user and password it may hold.
    pub servers: Vec<String>,
    /// `NATS_CREDS_FILE`: a decentralised account's credentials.
    pub creds_file: Option<PathBuf>,
    /// The seed in `NATS_NKEY_SEED_FILE`.
    pub nkey_seed: Option<Secret>,
    /// `NATS_USER` and `NATS_PASSWORD`.
    pub user: Option<(String, Secret)>,
    /// `NATS_TOKEN`.
    pub token: Option<Secret>,
    /// `NATS_TLS_CA`: a PEM file of certificate authorities, beside the system's.
    pub tls_ca: Option<PathBuf>,
    /// `NATS_TLS_CERT` and `NATS_TLS_KEY`: PEM files for a server that verifies its clients.
    pub tls_client: Option<(PathBuf, PathBuf)>,
}

/// How the engine and the registries' credentials are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Docker {
    /// `DOCKER_HOST`.
    pub host: String,
    /// With `DOCKER_TLS_VERIFY` or an https:// address: the files in `DOCKER_CERT_PATH`.
    pub tls: Option<DockerTls>,
    /// `DOCKER_CONFIG`, or the home directory's `.docker`: where config.json is.
    pub config_dir: Option<PathBuf>,
}

/// The PEM files for an engine that is reached by TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerTls {
    /// ca.pem
    pub ca: PathBuf,
    /// cert.pem
    pub cert: PathBuf,
    /// key.pem
    pub key: PathBuf,
}

/// Where requests come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// JetStream where the account has it, else plain NATS.
    Auto,
    /// JetStream, and nothing else.
    JetStream,
    /// A queue-group subscription: at most once between publisher and daemon.
    Core,
}

/// The streams behind durable delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Streams {
    /// `ACK_WAIT`: how long a worker may be silent before its job goes to another.
    pub ack_wait: Duration,
    /// `STREAM_REPLICAS`.
    pub replicas: usize,
    /// `STREAM_STORAGE`: in memory instead of in files.
    pub in_memory: bool,
    /// `QUEUE_MAX_MESSAGES`.
    pub queue_max_messages: u64,
    /// `QUEUE_MAX_BYTES`.
    pub queue_max_bytes: u64,
    /// `QUEUE_MAX_AGE`.
    pub queue_max_age: Duration,
    /// `DUPLICATE_WINDOW`.
    pub duplicate_window: Duration,
    /// `RESULTS_MAX_AGE`.
    pub results_max_age: Duration,
    /// `RESULTS_MAX_BYTES`.
    pub results_max_bytes: u64,
    /// `DEAD_LETTERS_MAX_AGE`.
    pub dead_letters_max_age: Duration,
    /// `DEAD_LETTERS_MAX_BYTES`.
    pub dead_letters_max_bytes: u64,
    /// `RECORD_TTL`.
    pub record_ttl: Duration,
    /// `RECORDS_MAX_BYTES`.
    pub records_max_bytes: u64,
    /// `OBJECTS_MAX_BYTES`.
    pub objects_max_bytes: u64,
}

/// The shape of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What requests may ask for, and what they get when they do not.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// `DEFAULT_TIMEOUT`.
    pub default_timeout: Duration,
    /// `MAX_TIMEOUT`.
    pub max_timeout: Duration,
    /// `MEMORY_LIMIT`: the default and the maximum, in bytes.
    pub memory_bytes: u64,
    /// `CPU_LIMIT`: the default and the maximum, in processors.
    pub cpus: f64,
    /// `PIDS_LIMIT`: the default and the maximum.
    pub pids: u64,
    /// `CONTAINER_NETWORK`: for requests that name none.
    pub network: String,
    /// `ALLOWED_NETWORKS`: what a request may name.
    pub allowed_networks: Vec<String>,
    /// `REPLY_PREFIXES`: what `reply_to` may begin with, beside `_INBOX.`.
    pub reply_prefixes: Vec<String>,
    /// `MAX_DELIVER`: how many attempts a request may ask for.
    pub max_attempts: u32,
}

/// When to pull an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    /// When the engine does not have it.
    Missing,
    /// Before every job.
    Always,
    /// Never.
    Never,
}

/// Images: when to pull them, which are allowed.
#[derive(Clone, Debug)]
pub struct Images {
    /// `PULL_POLICY`.
    pub pull_policy: PullPolicy,
    /// `PULL_TIMEOUT`.
    pub pull_timeout: Duration,
    /// `IMAGE_ALLOWLIST`: glob patterns; empty allows all.
    pub allowlist: Vec<String>,
}

/// How a function is confined.
#[derive(Clone, Debug, PartialEq)]
pub struct Confinement {
    /// `CONTAINER_USER`: for requests that name none. Absent: the image's own.
    pub user: Option<String>,
    /// `CONTAINER_RUNTIME`: an OCI runtime the engine knows. Absent: the engine's default.
    pub runtime: Option<String>,
    /// `READONLY_ROOTFS`.
    pub readonly_rootfs: bool,
    /// `TMPFS_SIZE`: bytes of /tmp, and of each tmpfs that covers an image's volume.
    pub tmpfs_bytes: u64,
}

/// Containers that wait for jobs.
#[derive(Clone, Debug, PartialEq)]
pub struct Warm {
    /// `WARM_CONTAINERS`: how many wait at most; 0 for none.
    pub containers: usize,
    /// `WARM_IMAGES`: images that are kept warm from the start.
    pub images: Vec<String>,
    /// `WARM_IDLE_TIMEOUT`: how long other images stay warm after their last job.
    pub idle_timeout: Duration,
    /// The limits of containers of `images`: what jobs get that ask for none. The time is the longest
    /// that any job may take.
    pub limits: Limits,
    /// The network of containers of `images`.
    pub network: String,
}

/// The settings that were wrong, one line each.
#[derive(Debug)]
pub struct ConfigError {
    problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bad setting(s):", self.problems.len())?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    /// What was wrong: the setting's name, a colon, and why.
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}

/// The settings as text, before they mean anything. A field per setting, by its name.
#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(default)]
struct Raw {
    /// Read before the others, see [`file`].
    #[allow(dead_code, reason = "a setting all the same")]
    config_file: Option<String>,
    nats_url: Option<String>,
    nats_creds_file: Option<String>,
    nats_nkey_seed_file: Option<String>,
    nats_user: Option<String>,
    nats_password: Option<String>,
    nats_token: Option<String>,
    nats_tls_ca: Option<String>,
    nats_tls_cert: Option<String>,
    nats_tls_key: Option<String>,
    max_containers: Option<String>,
    subject_prefix: Option<String>,
    queue_group: Option<String>,
    delivery: Option<String>,
    max_deliver: Option<String>,
    ack_wait: Option<String>,
    stream_replicas: Option<String>,
    stream_storage: Option<String>,
    queue_max_messages: Option<String>,
    queue_max_bytes: Option<String>,
    queue_max_age: Option<String>,
    duplicate_window: Option<String>,
    results_max_age: Option<String>,
    results_max_bytes: Option<String>,
    dead_letters_max_age: Option<String>,
    dead_letters_max_bytes: Option<String>,
    record_ttl: Option<String>,
    records_max_bytes: Option<String>,
    objects_max_bytes: Option<String>,
    buffer_messages: Option<String>,
    buffer_bytes: Option<String>,
    run_slot_timeout: Option<String>,
    publish_timeout: Option<String>,
    reply_prefixes: Option<String>,
    pull_policy: Option<String>,
    pull_timeout: Option<String>,
    image_allowlist: Option<String>,
    default_timeout: Option<String>,
    max_timeout: Option<String>,
    memory_limit: Option<String>,
    cpu_limit: Option<String>,
    pids_limit: Option<String>,
    output_limit: Option<String>,
    object_limit: Option<String>,
    live_logs: Option<String>,
    live_logs_buffer: Option<String>,
    container_network: Option<String>,
    allowed_networks: Option<String>,
    container_user: Option<String>,
    container_runtime: Option<String>,
    readonly_rootfs: Option<String>,
    tmpfs_size: Option<String>,
    warm_containers: Option<String>,
    warm_images: Option<String>,
    warm_idle_timeout: Option<String>,
    stop_grace: Option<String>,
    shutdown_grace: Option<String>,
    engine_timeout: Option<String>,
    reap_interval: Option<String>,
    http_addr: Option<String>,
    log_format: Option<String>,
    rust_log: Option<String>,
    docker_host: Option<String>,
    docker_tls_verify: Option<String>,
    docker_cert_path: Option<String>,
    docker_config: Option<String>,
    /// Not a setting, but where one of them is looked for.
    home: Option<String>,
}

impl Raw {
    /// Of all variables those that are settings. An empty one is an unset one.
    fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let ours = vars.into_iter().filter(|(name, value)| {
            let ours = name == "HOME" || settings::is_setting(name);
            ours && !value.trim().is_empty()
        });
        envy::from_iter(ours).map_err(|e| ConfigError { problems: vec![e.to_string()] })
    }
}

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

#[cfg(test)]
mod tests;
