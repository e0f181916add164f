//! JSON Schemas of what travels, made from the types that travel.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::outcome::Wire;
use super::record::Record;
use super::request::FIELDS;
use crate::job::{JobId, Priority, Status};

/// A request to run a function in a fresh container.
///
/// The decoder reads it field by field, so as to name every fault at once; this is what it takes.
#[derive(JsonSchema)]
#[schemars(rename = "Request", deny_unknown_fields)]
#[expect(dead_code, reason = "only its schema is of use")]
struct RequestSchema {
    /// The image: any OCI reference, by tag or by digest.
    #[schemars(length(min = 1, max = 512), example = "python:3.11-slim")]
    image_reference: String,
    /// The command. A string is split by POSIX shell quoting rules, and no shell is started; a list is
    /// taken as it is. It replaces the image's CMD and keeps its ENTRYPOINT. Absent or empty: the
    /// image's own CMD.
    #[schemars(example = "python3 -c \"print('Hello, World!')\"")]
    parameter: Option<Parameter>,
    /// The job's id. Absent: the Nats-Msg-Id header, else a new one.
    #[schemars(with = "Option<JobId>")]
    id: Option<JobId>,
    /// Added to the image's environment.
    env: Option<BTreeMap<String, String>>,
    /// Fed to the program's standard input, which is then closed.
    stdin: Option<String>,
    /// The object in the bucket of big inputs that is the program's standard input. Not beside stdin.
    #[schemars(length(min = 1, max = 512))]
    stdin_object: Option<String>,
    /// Overrides the image's working directory. Absolute.
    #[schemars(regex(pattern = "^/"))]
    working_dir: Option<String>,
    /// Overrides the image's user: user, uid, user:group or uid:gid.
    #[schemars(regex(pattern = "^[^:]+(:[^:]+)?$"))]
    user: Option<String>,
    /// The most wall time the function has, in milliseconds. Not above MAX_TIMEOUT.
    #[schemars(range(min = 1))]
    timeout_ms: Option<u64>,
    /// The most memory it has, swap included, in bytes. Not above MEMORY_LIMIT.
    #[schemars(range(min = 6_291_456))]
    memory_bytes: Option<u64>,
    /// The most processor time, in processors. Not above CPU_LIMIT.
    #[schemars(range(min = 0.01))]
    cpus: Option<f64>,
    /// The most processes and threads. Not above PIDS_LIMIT.
    #[schemars(range(min = 1))]
    pids: Option<u64>,
    /// The network it joins: one of ALLOWED_NETWORKS.
    network: Option<String>,
    /// Labels of the container. Names that begin with worker-spawner. are the worker's own.
    labels: Option<BTreeMap<String, String>>,
    /// Where the outcome goes as well: under _INBOX or one of REPLY_PREFIXES.
    #[schemars(length(max = 256))]
    reply_to: Option<String>,
    /// Before which other jobs it runs.
    priority: Option<Priority>,
    /// When it is no longer worth starting.
    expires_at: Option<Timestamp>,
    /// Which of the function's own failures are tried again. Absent: none.
    retry: Option<RetrySchema>,
    /// Whether output is published while the function runs. Absent: as LIVE_LOGS says.
    live_logs: Option<bool>,
}

/// A command line, or its arguments.
#[derive(JsonSchema)]
#[schemars(untagged, inline)]
#[expect(dead_code, reason = "only its schema is of use")]
enum Parameter {
    /// A command line.
    Line(String),
    /// The arguments.
    Arguments(Vec<String>),
}

/// When a function's own failure is tried again.
#[derive(JsonSchema)]
#[schemars(rename = "Retry", deny_unknown_fields)]
#[expect(dead_code, reason = "only its schema is of use")]
struct RetrySchema {
    /// How many attempts the job has in all. Not above MAX_DELIVER.
    #[schemars(range(min = 1))]
    max_attempts: u32,
    /// The endings that are tried again.
    #[schemars(length(min = 1))]
    on: Vec<Retried>,
}

/// An ending that can be tried again.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case", inline)]
#[expect(dead_code, reason = "only its schema is of use")]
enum Retried {
    Failed,
    TimedOut,
    OutOfMemory,
}

/// A point in time, as RFC 3339 has it.
pub(super) struct Timestamp;

impl JsonSchema for Timestamp {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Timestamp".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "date-time"})
    }
}

impl JsonSchema for JobId {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "JobId".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"})
    }
}

/// A request about one job.
#[derive(JsonSchema)]
#[schemars(rename = "JobReference", deny_unknown_fields)]
#[expect(dead_code, reason = "only its schema is of use")]
struct ReferenceSchema {
    /// The job's id.
    id: JobId,
}

/// What becomes of a job that was to be cancelled.
#[derive(JsonSchema)]
#[schemars(rename = "Cancellation")]
#[expect(dead_code, reason = "only its schema is of use")]
struct CancellationSchema {
    /// The job's id.
    id: JobId,
    /// What the cancellation did.
    result: Cancelled,
    /// How the job had ended already.
    status: Option<Status>,
}

/// What a cancellation did.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case", inline)]
#[expect(dead_code, reason = "only its schema is of use")]
enum Cancelled {
    /// The job runs, and is being stopped.
    Stopping,
    /// The job does not run, and will not.
    WillNotStart,
    /// The job had ended.
    AlreadyEnded,
}

/// Why a request was not followed.
#[derive(JsonSchema)]
#[schemars(rename = "Refusal")]
#[expect(dead_code, reason = "only its schema is of use")]
struct RefusalSchema {
    /// The reason.
    error: super::outcome::WireError<'static>,
}

/// A job on a worker that keeps no records of it.
#[derive(JsonSchema)]
#[schemars(rename = "RunningJob")]
#[expect(dead_code, reason = "only its schema is of use")]
struct RunningSchema {
    /// The job's id.
    id: JobId,
    /// Always `running`.
    state: super::record::State,
    /// The instance that has it.
    worker: String,
}

/// The schema of a request.
#[must_use]
pub fn request() -> Value {
    taken::<RequestSchema>("request")
}

/// The schema of an outcome's JSON.
#[must_use]
pub fn outcome() -> Value {
    given::<Wire<'static>>("outcome")
}

/// The schema of an event: a job's record.
#[must_use]
pub fn event() -> Value {
    given::<Record>("event")
}

/// The schema of a request about one job.
#[must_use]
pub fn reference() -> Value {
    taken::<ReferenceSchema>("reference")
}

/// The schema of the answer to a cancellation.
#[must_use]
pub fn cancellation() -> Value {
    taken::<CancellationSchema>("cancellation")
}

/// The schema of a refusal.
#[must_use]
pub fn refusal() -> Value {
    taken::<RefusalSchema>("refusal")
}

/// The schema of what is known of a job without a record.
#[must_use]
pub fn running() -> Value {
    taken::<RunningSchema>("running")
}

/// What the endpoint `run` says of its messages.
#[must_use]
pub fn of_run() -> BTreeMap<&'static str, String> {
    metadata(&request(), &outcome())
}

/// What the endpoint `cancel` says of its messages.
#[must_use]
pub fn of_cancel() -> BTreeMap<&'static str, String> {
    metadata(&reference(), &json!({"anyOf": [cancellation(), refusal()]}))
}

/// What the endpoint `status` says of its messages.
#[must_use]
pub fn of_status() -> BTreeMap<&'static str, String> {
    metadata(&reference(), &json!({"anyOf": [event(), running(), refusal()]}))
}

fn metadata(request: &Value, response: &Value) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("request_schema", request.to_string()),
        ("response_schema", response.to_string()),
    ])
}

/// Every field a request may have, as the decoder has it.
#[must_use]
pub fn request_fields() -> &'static [&'static str] {
    FIELDS
}

/// The schema of a type as it is read: what may be left out is optional.
fn taken<T: JsonSchema>(name: &str) -> Value {
    schema::<T>(name, SchemaSettings::draft2020_12().for_deserialize())
}

/// The schema of a type as it is written: what may be left out is what its serialisation leaves out.
fn given<T: JsonSchema>(name: &str) -> Value {
    schema::<T>(name, SchemaSettings::draft2020_12().for_serialize())
}

fn schema<T: JsonSchema>(name: &str, settings: SchemaSettings) -> Value {
    let settings = settings.with_transform(RecursiveTransform(without_null));
    let settings = settings.with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<T>();
    schema.insert("$id".to_owned(), format!("urn:worker-spawner:schema:{name}").into());
    schema.to_value()
}

/// What is not known is absent, and never null. (A request may say null for absent; that is no form
/// to recommend.)
fn without_null(schema: &mut Schema) {
    let Some(object) = schema.as_object_mut() else { return };
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            object.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(values)) = object.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    let is_null = |schema: &Value| schema.get("type").is_some_and(|name| name == "null");
    if let Some(Value::Array(schemas)) = object.get_mut("anyOf") {
        schemas.retain(|schema| !is_null(schema));
        if let [Value::Object(only)] = schemas.as_slice() {
            let only = only.clone();
            object.remove("anyOf");
            for (name, value) in only {
                object.entry(name).or_insert(value);
            }
        }
    }
}

#[cfg(test)]
#[path = "schema_tests.rs"]
mod tests;
