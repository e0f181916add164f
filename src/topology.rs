//! What durable delivery keeps in JetStream: streams, consumers and buckets, by name and by shape.
//!
//! [`Topology::ensure`] makes what is missing and checks what is there. It never changes anything:
//! an operator who set a limit by hand finds it as it was, and a daemon that wants another one says
//! so and does not start.

mod difference;
mod look;
mod make;
mod names;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType};

use crate::config::Streams;
use crate::job::Priority;
use crate::protocol::Subjects;
pub use difference::Fault;
use difference::{Field, consumer_differences, differences, field};
pub use look::{Present, Sight};
use make::{account, ensure_consumer, ensure_stream};
pub use names::Names;

/// How long one answer of JetStream may take.
pub const API_TIMEOUT: Duration = Duration::from_secs(5);
/// Pulls that may wait at one consumer: three for each of many instances.
const MAX_WAITING: i64 = 8192;

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

const SUBJECTS: Field = field("subjects", "SUBJECT_PREFIX", "");
const RETENTION: Field = field("retention", "", "");
const STORAGE: Field = field("storage", "STREAM_STORAGE", "");
const REPLICAS: Field = field("num_replicas", "STREAM_REPLICAS", "--replicas");
const WINDOW: Field = field("duplicate_window", "DUPLICATE_WINDOW", "--dupe-window");
const DISCARD: Field = field("discard", "", "--discard");

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

#[cfg(test)]
mod tests {
    use super::*;

    fn topology() -> Topology {
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
        Topology::new(&Subjects::new("functions"), "my.group", &settings, 5, true)
    }

    #[test]
    fn what_differs_is_named_with_its_remedy() {
        let topology = topology();
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
