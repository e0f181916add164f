//! The list of settings: the one source of names, defaults and descriptions.

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The environment variable.
    pub name: &'static str,
    /// What it is when unset, as text; empty for none.
    pub default: &'static str,
    /// What it does, in a line.
    pub help: &'static str,
}

/// Whether there is a setting of this name.
#[must_use]
pub fn is_setting(name: &str) -> bool {
    SETTINGS.iter().any(|setting| setting.name == name)
}

/// Every setting, in the order of `.env.example`.
pub const SETTINGS: &[Setting] = &[
    s("NATS_URL", "nats://localhost:4222", "NATS servers, joined by commas; tls:// asks for TLS"),
    s("NATS_CREDS_FILE", "", "Credentials file (JWT and seed) of an account user"),
    s("NATS_NKEY_SEED_FILE", "", "File with an nkey seed"),
    s("NATS_USER", "", "User name; NATS_PASSWORD goes with it"),
    s("NATS_PASSWORD", "", "Password; NATS_USER goes with it"),
    s("NATS_TOKEN", "", "Token"),
    s("NATS_TLS_CA", "", "PEM file of certificate authorities, beside the system's"),
    s("NATS_TLS_CERT", "", "PEM file of the client's certificate; NATS_TLS_KEY goes with it"),
    s("NATS_TLS_KEY", "", "PEM file of the client's key; NATS_TLS_CERT goes with it"),
    s("MAX_CONTAINERS", "5", "Functions that run at once"),
    s("SUBJECT_PREFIX", "functions", "First part of every subject"),
    s("QUEUE_GROUP", "worker-spawners", "Instances of one group share the requests"),
    s(
        "DELIVERY",
        "auto",
        "How requests are delivered: jetstream (durable), core (plain NATS), or auto for the best there is",
    ),
    s("MAX_DELIVER", "5", "Attempts a job has when the infrastructure fails it"),
    s(
        "ACK_WAIT",
        "30s",
        "How long a worker may be silent before JetStream gives its job to another",
    ),
    s("STREAM_REPLICAS", "1", "Servers that keep each stream, in a NATS cluster: 1, 3 or 5"),
    s("STREAM_STORAGE", "file", "Where JetStream keeps the streams: file or memory"),
    s("QUEUE_MAX_MESSAGES", "1000000", "Requests the queue holds; more are refused"),
    s("QUEUE_MAX_BYTES", "1GiB", "Bytes the queue holds; more are refused"),
    s(
        "QUEUE_MAX_AGE",
        "3d",
        "How long a request may wait; an older one is cancelled instead of started",
    ),
    s(
        "DUPLICATE_WINDOW",
        "5m",
        "How long JetStream recognises a message that is published again by its Nats-Msg-Id",
    ),
    s("RESULTS_MAX_AGE", "7d", "How long results, and big outputs, are kept"),
    s("RESULTS_MAX_BYTES", "1GiB", "Bytes of results that are kept; the oldest go first"),
    s("DEAD_LETTERS_MAX_AGE", "30d", "How long dead letters are kept"),
    s(
        "DEAD_LETTERS_MAX_BYTES",
        "256MiB",
        "Bytes of dead letters that are kept; the oldest go first",
    ),
    s("RECORD_TTL", "7d", "How long a job's record is kept, and its id recognised"),
    s("RECORDS_MAX_BYTES", "1GiB", "Bytes of job records that are kept; the oldest go first"),
    s(
        "OBJECTS_MAX_BYTES",
        "1GiB",
        "Bytes of big inputs and outputs that are kept; when it is full, outputs are cut",
    ),
    s("BUFFER_MESSAGES", "65536", "Requests that may wait in memory for a slot"),
    s("BUFFER_BYTES", "64MiB", "Bytes of requests that may wait in memory for a slot"),
    s(
        "RUN_SLOT_TIMEOUT",
        "1s",
        "How long a functions.run request waits for a slot before it is told busy",
    ),
    s(
        "PUBLISH_TIMEOUT",
        "5s",
        "How long publishing an outcome may hold up the container's removal",
    ),
    s(
        "REPLY_PREFIXES",
        "",
        "Subjects that reply_to may begin with, joined by commas; _INBOX is always allowed",
    ),
    s("PULL_POLICY", "missing", "When to pull an image: missing, always or never"),
    s("PULL_TIMEOUT", "10m", "How long a pull may take"),
    s(
        "IMAGE_ALLOWLIST",
        "",
        "Glob patterns of the images that may run, joined by commas; empty allows all",
    ),
    s("DEFAULT_TIMEOUT", "5m", "How long a function may run when its request does not say"),
    s("MAX_TIMEOUT", "1h", "The longest a request may ask for"),
    s("MEMORY_LIMIT", "512MiB", "Memory of a function, swap included; a request may ask for less"),
    s("CPU_LIMIT", "1", "Processors of a function; a request may ask for less"),
    s("PIDS_LIMIT", "256", "Processes and threads of a function; a request may ask for less"),
    s(
        "OUTPUT_LIMIT",
        "512KiB",
        "Bytes kept of each output stream; the rest is dropped and counted",
    ),
    s(
        "OBJECT_LIMIT",
        "16MiB",
        "Bytes of one output stream, or of a stdin_object, that go through JetStream's object store; 0 turns it off",
    ),
    s(
        "LIVE_LOGS",
        "false",
        "Whether output is published while the function runs, unless its request says",
    ),
    s(
        "LIVE_LOGS_BUFFER",
        "1MiB",
        "Bytes of a job's live output that may wait for NATS; more are dropped",
    ),
    s("CONTAINER_NETWORK", "none", "Network of a function whose request names none"),
    s("ALLOWED_NETWORKS", "none", "Networks that a request may name, joined by commas"),
    s(
        "CONTAINER_USER",
        "",
        "User of a function whose request names none; empty for the image's own",
    ),
    s(
        "CONTAINER_RUNTIME",
        "",
        "OCI runtime, such as runsc or kata; empty for the engine's default",
    ),
    s("READONLY_ROOTFS", "true", "Whether everything but /tmp is read-only"),
    s("TMPFS_SIZE", "256MiB", "Size of /tmp, and of each tmpfs that covers an image's volume"),
    s(
        "WARM_CONTAINERS",
        "",
        "Containers that wait for jobs, beside MAX_CONTAINERS; empty for as many as those, 0 for none",
    ),
    s("WARM_IMAGES", "", "Images kept warm from the start, joined by commas"),
    s(
        "WARM_IDLE_TIMEOUT",
        "5m",
        "After how long without a job an image is not kept warm, unless WARM_IMAGES names it",
    ),
    s("STOP_GRACE", "2s", "How long a function has between TERM and KILL"),
    s("SHUTDOWN_GRACE", "30s", "How long running functions may go on after SIGTERM"),
    s("ENGINE_TIMEOUT", "30s", "How long one call to the engine may take"),
    s("REAP_INTERVAL", "1m", "How often containers of dead instances are looked for"),
    s(
        "HTTP_ADDR",
        "",
        "Address for health and metrics, such as 127.0.0.1:9464; empty for no listener",
    ),
    s(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "Collector of traces over OTLP/HTTP, such as http://localhost:4318; empty for none",
    ),
    s(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        "Headers for the collector, such as its key: name=value, joined by commas, %-encoded",
    ),
    s("OTEL_SERVICE_NAME", "worker-spawner", "What this daemon is called in traces"),
    s(
        "OTEL_TRACES_SAMPLER_ARG",
        "1",
        "Share of the jobs that are traced, 0 to 1, of those whose request does not say",
    ),
    s("LOG_FORMAT", "text", "Log lines: text or json"),
    s("RUST_LOG", "info", "Log level, or a filter such as worker_spawner=debug"),
    s(
        "DOCKER_HOST",
        "unix:///var/run/docker.sock",
        "The engine's address: unix://, tcp:// or https://",
    ),
    s("DOCKER_TLS_VERIFY", "", "Set to 1 for TLS with a tcp:// engine"),
    s("DOCKER_CERT_PATH", "", "Folder with ca.pem, cert.pem and key.pem for the engine"),
    s(
        "DOCKER_CONFIG",
        "",
        "Folder with config.json, for the registries' credentials; empty for ~/.docker",
    ),
    s(
        "CONFIG_FILE",
        "",
        "File of settings, NAME=value lines; the environment comes before it. Read again on SIGHUP",
    ),
];

const fn s(name: &'static str, default: &'static str, help: &'static str) -> Setting {
    Setting { name, default, help }
}

/// The default of the setting `name`; empty where there is none.
pub(super) fn default_of(name: &str) -> &'static str {
    SETTINGS.iter().find(|s| s.name == name).map_or("", |s| s.default)
}
