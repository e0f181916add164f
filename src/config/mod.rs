//! The settings: read from the environment, all of them parsed before any error is reported.
//!
//! [`settings::SETTINGS`] is the one list of names, defaults and descriptions; `.env.example` and
//! the README's table are checked against it.

mod error;
mod file;
mod parse;
mod raw;
mod read;
mod reload;
mod secret;
pub mod settings;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::job::Limits;
use crate::protocol::Subjects;
pub use error::ConfigError;
pub use reload::{Changes, RELOADABLE};
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
    /// Where traces are exported. Absent: nowhere.
    pub traces: Option<Traces>,
    /// `LOG_FORMAT`.
    pub log_format: LogFormat,
    /// `RUST_LOG`, checked when the log starts.
    pub log_filter: String,
    /// What was set, by name.
    given: BTreeMap<String, Secret>,
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

/// Where traces are exported, and which.
#[derive(Clone, Debug, PartialEq)]
pub struct Traces {
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`: the collector's address, without the path of traces.
    pub endpoint: String,
    /// `OTEL_EXPORTER_OTLP_HEADERS`: names and values for each request to it.
    pub headers: Vec<(String, Secret)>,
    /// `OTEL_SERVICE_NAME`.
    pub service_name: String,
    /// `OTEL_TRACES_SAMPLER_ARG`: the share of jobs that is traced of those whose request does not
    /// say, from 0 to 1.
    pub ratio: f64,
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

#[cfg(test)]
mod tests;
