//! What durable delivery keeps in JetStream: streams, consumers and buckets, by name and by shape.
//!
//! [`Topology::ensure`] makes what is missing and checks what is there. It never changes anything:
//! an operator who set a limit by hand finds it as it was, and a daemon that wants another one says
//! so and does not start.

mod look;

use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind, RequestErrorKind};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{self, Context, ErrorCode};
use serde::Serialize;
use serde_json::Value;

use crate::config::Streams;
use crate::job::Priority;
use crate::protocol::Subjects;
pub use look::{Present, Sight};

/// How long one answer of JetStream may take.
pub const API_TIMEOUT: Duration = Duration::from_secs(5);
/// Pulls that may wait at one consumer: three for each of many instances.
const MAX_WAITING: i64 = 8192;

/// The names of everything, from the subjects' prefix and the queue group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The stream of requests.
    pub queue: String,
    /// The stream of results.
    pub results: String,
    /// The stream of dead letters.
    pub dead_letters: String,
    /// The stream of the server's notices that a request was delivered for the last time.
    pub advisories: String,
    /// The bucket of job records.
    pub jobs: String,
    /// The bucket of big inputs and outputs.
    pub objects: String,
    /// The queue group as a consumer's name.
    group: String,
}

impl Names {
    /// The names under a prefix. A stream's name cannot hold a dot, so dots become underscores.
    #[must_use]
    pub fn new(subjects: &Subjects, queue_group: &str) -> Self {
        let base = subjects.prefix().replace('.', "_");
        let name = |what: &str| format!("{base}_{what}");
        Self {
            queue: name("queue"),
            results: name("results"),
            dead_letters: name("dead_letters"),
            advisories: name("advisories"),
            jobs: name("jobs"),
            objects: name("objects"),
            group: queue_group.replace('.', "_"),
        }
    }

    /// The consumer of the requests of this priority.
    #[must_use]
    pub fn consumer(&self, priority: Priority) -> String {
        match priority {
            Priority::Normal => self.group.clone(),
            other => format!("{}_{}", self.group, other.as_str()),
        }
    }

    /// The consumer of the advisories.
    #[must_use]
    pub fn advisory_consumer(&self) -> String {
        self.group.clone()
    }
}

/// What is wanted in JetStream.
#[derive(Clone, Debug)]
pub struct Topology {
    /// The names.
    pub names: Names,
    streams: Vec<(stream::Config, &'static [Field])>,
    consumers: Vec<(String, pull::Config)>,
    /// When what is missing was last made again.
    mended: Arc<tokio::sync::Mutex<Option<Instant>>>,
    /// Counts the reasons to look the consumers up again.
    generation: Arc<AtomicU64>,
}

/// A field of a stream that must be as wanted, and the setting that says how.
struct Field {
    name: &'static str,
    setting: &'static str,
    /// The option of `nats stream edit` that changes it; empty where nothing can.
    option: &'static str,
}

impl fmt::Debug for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const fn field(name: &'static str, setting: &'static str, option: &'static str) -> Field {
    Field { name, setting, option }
}

const SUBJECTS: Field = field("subjects", "SUBJECT_PREFIX", "");
const RETENTION: Field = field("retention", "", "");
const STORAGE: Field = field("storage", "STREAM_STORAGE", "");
const REPLICAS: Field = field("num_replicas", "STREAM_REPLICAS", "--replicas");
const WINDOW: Field = field("duplicate_window", "DUPLICATE_WINDOW", "--dupe-window");
const DISCARD: Field = field("discard", "", "--discard");

/// What would undo the promise in any stream.
const EVERY_STREAM: &[Field] = &[
    field("max_msgs_per_subject", "", "--max-msgs-per-subject"),
    field("max_msg_size", "", "--max-msg-size"),
    field("no_ack", "", ""),
    field("sealed", "", ""),
    // With it, whoever publishes can have a stream forget all that is in it.
    field("allow_rollup_hdrs", "", ""),
];
/// What would be forgotten after so many.
const MAX_MSGS: Field = field("max_msgs", "", "--max-msgs");

const QUEUE_FIELDS: &[Field] = &[
    SUBJECTS,
    RETENTION,
    STORAGE,
    REPLICAS,
    DISCARD,
    WINDOW,
    field("max_msgs", "QUEUE_MAX_MESSAGES", "--max-msgs"),
    field("max_bytes", "QUEUE_MAX_BYTES", "--max-bytes"),
    field("deny_delete", "", ""),
    // A stream forgets what is too old without a word; the daemon ends it with an outcome.
    field("max_age", "", "--max-age"),
];
const RESULTS_FIELDS: &[Field] = &[
    SUBJECTS,
    RETENTION,
    STORAGE,
    REPLICAS,
    DISCARD,
    WINDOW,
    MAX_MSGS,
    field("max_age", "RESULTS_MAX_AGE", "--max-age"),
    field("max_bytes", "RESULTS_MAX_BYTES", "--max-bytes"),
];
const DEAD_LETTERS_FIELDS: &[Field] = &[
    SUBJECTS,
    RETENTION,
    STORAGE,
    REPLICAS,
    WINDOW,
    DISCARD,
    MAX_MSGS,
    field("max_age", "DEAD_LETTERS_MAX_AGE", "--max-age"),
    field("max_bytes", "DEAD_LETTERS_MAX_BYTES", "--max-bytes"),
];
const ADVISORIES_FIELDS: &[Field] = &[SUBJECTS, RETENTION, STORAGE, REPLICAS, MAX_MSGS];
const JOBS_FIELDS: &[Field] = &[
    STORAGE,
    REPLICAS,
    DISCARD,
    field("max_age", "RECORD_TTL", "--max-age"),
    field("max_bytes", "RECORDS_MAX_BYTES", "--max-bytes"),
    MAX_MSGS,
];
const OBJECTS_FIELDS: &[Field] = &[
    STORAGE,
    REPLICAS,
    field("max_age", "RESULTS_MAX_AGE", "--max-age"),
    field("max_bytes", "OBJECTS_MAX_BYTES", "--max-bytes"),
];

/// Why JetStream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The account has no JetStream.
    #[error("this NATS account has no JetStream ({0})")]
    Absent(String),
    /// The server did not answer. That may pass.
    #[error("JetStream does not answer: {0}")]
    Unavailable(String),
    /// What is there is not what the settings ask for, or the server refuses to make it. That will
    /// not pass by waiting.
    #[error("{0}")]
    Unfit(String),
}

impl Topology {
    /// What these settings want.
    #[must_use]
    pub fn new(
        subjects: &Subjects,
        queue_group: &str,
        settings: &Streams,
        max_deliver: u32,
        with_objects: bool,
    ) -> Self {
        let names = Names::new(subjects, queue_group);
        let storage = if settings.in_memory { StorageType::Memory } else { StorageType::File };
        let base = |name: &str, what: &str| stream::Config {
            name: name.to_owned(),
            description: Some(format!("worker-spawner: {what}")),
            storage,
            num_replicas: settings.replicas,
            max_bytes: -1,
            max_messages: -1,
            max_messages_per_subject: -1,
            ..stream::Config::default()
        };
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let queue = stream::Config {
            subjects: Priority::ALL.iter().map(|p| subjects.execute_at(*p)).collect(),
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_messages: bytes(settings.queue_max_messages),
            max_bytes: bytes(settings.queue_max_bytes),
            duplicate_window: settings.duplicate_window,
            allow_direct: true,
            ..base(&names.queue, "requests")
        };
        let results = stream::Config {
            subjects: vec![subjects.results.clone()],
            max_age: settings.results_max_age,
            max_bytes: bytes(settings.results_max_bytes),
            duplicate_window: settings.duplicate_window,
            allow_direct: true,
            ..base(&names.results, "results")
        };
        let dead_letters = stream::Config {
            subjects: vec![subjects.dead_letters.clone()],
            max_age: settings.dead_letters_max_age,
            max_bytes: bytes(settings.dead_letters_max_bytes),
            duplicate_window: settings.duplicate_window,
            allow_direct: true,
            ..base(&names.dead_letters, "what could not be run")
        };
        let advisories = stream::Config {
            subjects: vec![format!("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{}.>", names.queue)],
            retention: RetentionPolicy::WorkQueue,
            ..base(&names.advisories, "requests that were delivered for the last time")
        };
        // As the client libraries make a key-value bucket and an object store.
        let jobs = stream::Config {
            subjects: vec![format!("$KV.{}.>", names.jobs)],
            max_messages_per_subject: 1,
            max_age: settings.record_ttl,
            max_bytes: bytes(settings.records_max_bytes),
            duplicate_window: settings.record_ttl.min(Duration::from_secs(120)),
            // Client libraries make theirs refuse what is new. Here that would stop all jobs for the
            // sake of those that ended long ago.
            discard: DiscardPolicy::Old,
            allow_rollup: true,
            deny_delete: true,
            allow_direct: true,
            ..base(&format!("KV_{}", names.jobs), "job records")
        };
        let objects = stream::Config {
            subjects: vec![
                format!("$O.{}.C.>", names.objects),
                format!("$O.{}.M.>", names.objects),
            ],
            max_age: settings.results_max_age,
            max_bytes: bytes(settings.objects_max_bytes),
            duplicate_window: settings.results_max_age.min(Duration::from_secs(120)),
            discard: DiscardPolicy::New,
            allow_rollup: true,
            allow_direct: true,
            ..base(&format!("OBJ_{}", names.objects), "big inputs and outputs")
        };
        let mut streams = vec![
            (queue, QUEUE_FIELDS),
            (results, RESULTS_FIELDS),
            (dead_letters, DEAD_LETTERS_FIELDS),
            (advisories, ADVISORIES_FIELDS),
            (jobs, JOBS_FIELDS),
        ];
        if with_objects {
            streams.push((objects, OBJECTS_FIELDS));
        }
        let consumer = |name: String, filter_subject: String| pull::Config {
            durable_name: Some(name),
            ack_policy: AckPolicy::Explicit,
            deliver_policy: DeliverPolicy::All,
            ack_wait: settings.ack_wait,
            filter_subject,
            max_waiting: MAX_WAITING,
            // Every instance bounds what it holds by its own slots.
            max_ack_pending: -1,
            ..pull::Config::default()
        };
        let mut consumers: Vec<(String, pull::Config)> = Priority::ALL
            .iter()
            .map(|priority| {
                let config = consumer(names.consumer(*priority), subjects.execute_at(*priority));
                let max_deliver = i64::from(max_deliver);
                (names.queue.clone(), pull::Config { max_deliver, ..config })
            })
            .collect();
        consumers
            .push((names.advisories.clone(), consumer(names.advisory_consumer(), String::new())));
        Self { names, streams, consumers, mended: Arc::default(), generation: Arc::default() }
    }

    /// Which generation the consumers are of: they are to be looked up again after a change.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Has the consumers looked up again: they may not be those they were.
    pub fn doubt(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Makes again what has gone missing, unless that was done a moment ago.
    ///
    /// # Errors
    /// Says why JetStream cannot be used as the settings ask.
    pub async fn mend(&self, jetstream: &Context) -> Result<(), SetupError> {
        let mut mended = self.mended.lock().await;
        if mended.is_some_and(|at| at.elapsed() < MEND_INTERVAL) {
            return Ok(());
        }
        // A server may still be at it when it says that a stream is gone: what is made in that moment
        // under the same name goes with the rest.
        tokio::time::sleep(DELETION).await;
        let result = self.ensure(jetstream).await;
        *mended = Some(Instant::now());
        result
    }

    /// Makes what is missing and checks what is there.
    ///
    /// # Errors
    /// Says why JetStream cannot be used as the settings ask.
    pub async fn ensure(&self, jetstream: &Context) -> Result<(), SetupError> {
        account(jetstream).await?;
        let mut faults = Vec::new();
        for (config, fields) in &self.streams {
            if let Some(found) = ensure_stream(jetstream, config, fields).await? {
                faults.extend(differences(&found, config, fields));
            }
        }
        if faults.is_empty() {
            for (stream, config) in &self.consumers {
                match ensure_consumer(jetstream, stream, config).await? {
                    Some(found) => faults.extend(consumer_differences(stream, &found, config)),
                    None => self.doubt(),
                }
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        Err(SetupError::Unfit(faults.join("; ")))
    }
}

/// How often what is missing is made again at most: many may find out at once.
const MEND_INTERVAL: Duration = Duration::from_secs(2);

/// How long a server may take to delete a stream.
const DELETION: Duration = Duration::from_millis(500);

/// Whether the account has JetStream.
async fn account(jetstream: &Context) -> Result<(), SetupError> {
    /// Of the answer nothing else counts; older servers leave fields out that the client library
    /// would insist on.
    #[derive(serde::Deserialize)]
    struct Answer {
        error: Option<ApiError>,
    }
    #[derive(serde::Deserialize)]
    struct ApiError {
        code: usize,
        err_code: u64,
        #[serde(default)]
        description: String,
    }
    match jetstream.request("INFO", &serde_json::json!({})).await {
        Ok(Answer { error: None }) => Ok(()),
        Ok(Answer { error: Some(ApiError { code, err_code, description }) }) => {
            let absent = [
                ErrorCode::JETSTREAM_NOT_ENABLED.0,
                ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT.0,
            ];
            Err(if absent.contains(&err_code) {
                SetupError::Absent(description)
            } else {
                SetupError::Unavailable(format!("{description} ({code})"))
            })
        }
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            Err(SetupError::Absent("nobody answers".to_owned()))
        }
        Err(error) => Err(SetupError::Unavailable(error.to_string())),
    }
}

/// The server's answer to a request it would not fulfil.
fn refused(what: &str, status: usize, code: ErrorCode, error: &dyn Display) -> SetupError {
    match code {
        ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
            SetupError::Absent(error.to_string())
        }
        // 503: a cluster without a leader, a server that is about to stop.
        _ if status == 503 && code != ErrorCode::INSUFFICIENT_RESOURCES => {
            SetupError::Unavailable(format!("cannot {what}: {error}"))
        }
        _ => SetupError::Unfit(format!("JetStream does not {what}: {error}")),
    }
}

/// The stream's configuration where it was there already.
async fn ensure_stream(
    jetstream: &Context,
    wanted: &stream::Config,
    fields: &[Field],
) -> Result<Option<stream::Config>, SetupError> {
    for last in [false, true] {
        match jetstream.get_stream(&wanted.name).await {
            Ok(stream) => return Ok(Some(stream.cached_info().config.clone())),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(e)
                    if e.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
                GetStreamErrorKind::JetStream(e) => {
                    return Err(refused(
                        &format!("show the stream {}", wanted.name),
                        e.code(),
                        e.error_code(),
                        &e,
                    ));
                }
                _ => return Err(SetupError::Unavailable(error.to_string())),
            },
        }
        match jetstream.create_stream(wanted.clone()).await {
            Ok(_) => {
                tracing::info!(stream = wanted.name, "created the stream");
                return Ok(None);
            }
            Err(error) => match error.kind() {
                // Another instance was faster; what it made is looked at.
                CreateStreamErrorKind::JetStream(e)
                    if e.error_code() == ErrorCode::STREAM_NAME_EXIST && !last => {}
                CreateStreamErrorKind::JetStream(e) => {
                    let bytes = fields.iter().find(|field| field.name == "max_bytes");
                    let bytes = bytes.map_or("its bytes", |field| field.setting);
                    let what = format!(
                        "create the stream {} with STREAM_REPLICAS={} and {bytes}={}",
                        wanted.name, wanted.num_replicas, wanted.max_bytes
                    );
                    return Err(refused(&what, e.code(), e.error_code(), &e));
                }
                _ => return Err(SetupError::Unavailable(error.to_string())),
            },
        }
    }
    Err(SetupError::Unavailable(format!("the stream {} comes and goes", wanted.name)))
}

/// The consumer's configuration where it was there already.
async fn ensure_consumer(
    jetstream: &Context,
    stream: &str,
    wanted: &pull::Config,
) -> Result<Option<consumer::Config>, SetupError> {
    let name = wanted.durable_name.as_deref().unwrap_or_default();
    // No message of its own: creating a consumer that is there would change it on older servers.
    let subject = format!("CONSUMER.INFO.{stream}.{name}");
    let answer: Result<jetstream::response::Response<consumer::Info>, _> =
        jetstream.request(subject, &serde_json::json!({})).await;
    match answer {
        Ok(jetstream::response::Response::Ok(info)) => return Ok(Some(info.config)),
        Ok(jetstream::response::Response::Err { error })
            if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => {}
        Ok(jetstream::response::Response::Err { error }) => {
            return Err(refused(
                &format!("show the consumer {name} of {stream}"),
                error.code(),
                error.error_code(),
                &error,
            ));
        }
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            return Err(SetupError::Absent(error.to_string()));
        }
        Err(error) => return Err(SetupError::Unavailable(error.to_string())),
    }
    match jetstream.create_consumer_on_stream(wanted.clone(), stream).await {
        Ok(_) => Ok(None),
        Err(error) => Err(match error.kind() {
            jetstream::stream::ConsumerErrorKind::JetStream(e)
                if e.error_code() == ErrorCode::CONSUMER_WQ_CONSUMER_NOT_UNIQUE =>
            {
                SetupError::Unfit(format!(
                    "the stream {stream} has a consumer of another name than {name} already: instances on one SUBJECT_PREFIX share one QUEUE_GROUP; set it to that name, or delete the other consumer"
                ))
            }
            jetstream::stream::ConsumerErrorKind::JetStream(e) => refused(
                &format!("create the consumer {name} of {stream}"),
                e.code(),
                e.error_code(),
                &e,
            ),
            _ => SetupError::Unavailable(error.to_string()),
        }),
    }
}

/// Something that is not as wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is not as wanted, and how it should be.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.remedy)
    }
}

/// What of a stream is not as wanted.
fn differences(found: &stream::Config, wanted: &stream::Config, fields: &[Field]) -> Vec<Fault> {
    let (found_json, wanted_json) = (json(found), json(wanted));
    let mut faults = Vec::new();
    for Field { name, setting, option } in fields.iter().chain(EVERY_STREAM) {
        let (is, should) = (shown(name, &found_json[*name]), shown(name, &wanted_json[*name]));
        if is == should {
            continue;
        }
        let stream = &wanted.name;
        let by_setting = match *setting {
            "" => String::new(),
            setting => format!("set {setting} to match, or "),
        };
        let by_edit = match *option {
            "" => "delete the stream, or use another SUBJECT_PREFIX".to_owned(),
            option => {
                let none = if DURATIONS.contains(name) { "0s" } else { "-1" };
                let value = if should == "none" { none } else { &should };
                format!("run: nats stream edit {stream} {option}={value}")
            }
        };
        faults.push(Fault {
            what: format!("stream {stream}: {name} is {is} and should be {should}"),
            remedy: format!("{by_setting}{by_edit}"),
        });
    }
    faults
}

fn consumer_differences(
    stream: &str,
    found: &consumer::Config,
    wanted: &pull::Config,
) -> Vec<Fault> {
    let (found_json, wanted_json) = (json(found), json(wanted));
    let name = wanted.durable_name.as_deref().unwrap_or_default();
    [
        ("ack_wait", "ACK_WAIT", "--wait"),
        ("max_deliver", "MAX_DELIVER (10 less)", "--max-deliver"),
        ("ack_policy", "", ""),
        ("filter_subject", "SUBJECT_PREFIX", ""),
        ("deliver_subject", "", ""),
        ("max_ack_pending", "", "--max-pending"),
        ("headers_only", "", ""),
    ]
    .into_iter()
    .filter_map(|(field, setting, option)| {
        let (is, should) = (shown(field, &found_json[field]), shown(field, &wanted_json[field]));
        if is == should {
            return None;
        }
        let by_setting = match setting {
            "" => String::new(),
            setting => format!("set {setting} to match, or "),
        };
        let by_edit = match option {
            "" => format!("run: nats consumer rm {stream} {name}"),
            option => format!("run: nats consumer edit {stream} {name} {option}={should}"),
        };
        Some(Fault {
            what: format!(
                "consumer {name} of stream {stream}: {field} is {is} and should be {should}"
            ),
            remedy: format!("{by_setting}{by_edit}"),
        })
    })
    .collect()
}

fn json(config: &impl Serialize) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// The fields that hold nanoseconds.
const DURATIONS: [&str; 3] = ["max_age", "duplicate_window", "ack_wait"];

/// A field's value as an operator would write it. Absent, zero and minus one are all "none".
fn shown(name: &str, value: &Value) -> String {
    match value {
        Value::Number(n) if DURATIONS.contains(&name) => match n.as_u64() {
            None | Some(0) => "none".to_owned(),
            Some(nanos) => as_the_cli_takes_it(Duration::from_nanos(nanos)),
        },
        Value::Null => "none".to_owned(),
        Value::Number(n) if n.as_i64().is_some_and(|n| n <= 0) => "none".to_owned(),
        Value::String(text) if text.is_empty() => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let mut items: Vec<String> = items.iter().map(|item| shown(name, item)).collect();
            items.sort_unstable();
            items.join(",")
        }
        other => other.to_string(),
    }
}

/// A duration as `nats` takes it in an option: hours, minutes, seconds.
fn as_the_cli_takes_it(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let mut text = String::new();
    for (value, unit) in [(hours, "h"), (minutes, "m"), (seconds % 60, "s")] {
        if value > 0 {
            text.push_str(&format!("{value}{unit}"));
        }
    }
    if nanos > 0 {
        text.push_str(&format!("{nanos}ns"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(prefix: &str) -> Topology {
        let settings = Streams {
            ack_wait: Duration::from_secs(30),
            replicas: 1,
            in_memory: false,
            queue_max_messages: 10,
            queue_max_bytes: 1 << 20,
            queue_max_age: Duration::from_secs(60),
            duplicate_window: Duration::from_secs(300),
            results_max_age: Duration::from_secs(3600),
            results_max_bytes: 1 << 20,
            dead_letters_max_age: Duration::from_secs(3600),
            dead_letters_max_bytes: 1 << 20,
            record_ttl: Duration::from_secs(3600),
            records_max_bytes: 1 << 20,
            objects_max_bytes: 1 << 20,
        };
        Topology::new(&Subjects::new(prefix), "my.group", &settings, 5, true)
    }

    #[test]
    fn names_hold_no_dots() {
        let names = topology("team.functions").names;
        assert_eq!(names.queue, "team_functions_queue");
        assert_eq!(names.consumer(Priority::Normal), "my_group");
        assert_eq!(names.consumer(Priority::High), "my_group_high");
    }

    #[test]
    fn what_differs_is_named_with_its_remedy() {
        let topology = topology("functions");
        let (wanted, fields) = &topology.streams[0];
        assert!(differences(wanted, wanted, fields).is_empty());
        let found = stream::Config {
            max_messages: 7,
            max_age: Duration::from_secs(5400),
            retention: RetentionPolicy::Limits,
            description: Some("mine".to_owned()),
            ..wanted.clone()
        };
        let faults = differences(&found, wanted, fields);
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(
            faults,
            [
                "stream functions_queue: retention is limits and should be workqueue: delete the stream, or use another SUBJECT_PREFIX",
                "stream functions_queue: max_msgs is 7 and should be 10: set QUEUE_MAX_MESSAGES to match, or run: nats stream edit functions_queue --max-msgs=10",
                "stream functions_queue: max_age is 1h30m and should be none: run: nats stream edit functions_queue --max-age=0s",
            ]
        );
    }
}
