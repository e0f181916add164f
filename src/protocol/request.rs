//! From a message's bytes to a job, or to a refusal that names every field at fault.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::Subjects;
use super::time::parse_rfc3339;
use crate::config::Policy;
use crate::job::{Job, JobError, JobId, Limits, Priority, Retry, Status, code, printable};
use crate::reference::Reference;

/// The prefix of container labels that belong to the daemon.
pub const RESERVED_LABEL_PREFIX: &str = "worker-spawner.";

/// The most of a caller's value that an error quotes, in bytes.
const MAX_QUOTE: usize = 64;

/// The most faults that an error lists.
const MAX_FAULTS: usize = 8;

/// A caller's value as an error shows it.
pub(super) fn quote(value: &str) -> String {
    format!("{:?}", printable(value, MAX_QUOTE))
}

/// The longest image reference, in bytes: beyond what any registry takes.
const MAX_IMAGE_LENGTH: usize = 512;

/// The fields of a request. Anything else is refused, so that a slip of the pen is no silent
/// change of meaning.
pub(super) const FIELDS: &[&str] = &[
    "image_reference",
    "parameter",
    "id",
    "env",
    "stdin",
    "working_dir",
    "user",
    "timeout_ms",
    "memory_bytes",
    "cpus",
    "pids",
    "network",
    "labels",
    "reply_to",
    "priority",
    "expires_at",
    "retry",
    "live_logs",
    "stdin_object",
];

/// The longest name of an object, in bytes. It becomes part of a subject, in base64.
const MAX_OBJECT_NAME_LENGTH: usize = 512;

/// A request that can be run.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to run.
    pub job: Job,
    /// Where the outcome goes as well. Checked.
    pub reply_to: Option<String>,
    /// Before which other jobs it is to run.
    pub priority: Option<Priority>,
    /// When it is no longer worth starting.
    pub expires_at: Option<SystemTime>,
    /// Which of the function's own failures are tried again.
    pub retry: Option<Retry>,
    /// Whether output is published while the function runs.
    pub live_logs: Option<bool>,
    /// The object that is to be the job's standard input. Never beside a `stdin` of its own.
    pub stdin_object: Option<String>,
}

/// A request that cannot be run, with what is known of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The job's id: the request's own where that is valid.
    pub id: JobId,
    /// The image, where the request named one.
    pub image: Option<String>,
    /// Where the outcome goes as well, where the request named an allowed subject.
    pub reply_to: Option<String>,
    /// Every field at fault.
    pub error: JobError,
}

/// Decodes a request.
///
/// `outer_id` serves where the body does not name the job.
///
/// # Errors
/// Names every field at fault and says what would be right.
pub fn decode(
    payload: &[u8],
    outer_id: &JobId,
    policy: &Policy,
    subjects: &Subjects,
) -> Result<Request, Box<Refusal>> {
    let object = match parse(payload) {
        Ok(object) => object,
        Err(error) => {
            return Err(Box::new(Refusal {
                id: outer_id.clone(),
                image: None,
                reply_to: None,
                error,
            }));
        }
    };
    let mut fields = Fields { object: object.fields, faults: Vec::new() };
    for name in object.twice {
        fields.object.remove(&name);
        if !fields.faulty(&name) {
            fields.fault(&name, "is given twice");
        }
    }

    let id = fields.take("id", |v| text(v)?.parse::<JobId>().map_err(|e| e.to_string()));
    let reply_to = fields.take("reply_to", |v| {
        let subject = text(v)?;
        match subjects.check_reply_to(&subject, &policy.reply_prefixes) {
            Ok(()) => Ok(subject),
            Err(why) => Err(format!("{} {why}", quote(&subject))),
        }
    });
    let image = fields.take("image_reference", image_reference);
    if image.is_none() && !fields.faulty("image_reference") {
        fields.fault("image_reference", "is required, such as \"python:3.11-slim\"");
    }
    let args = fields.take("parameter", arguments).unwrap_or_default();
    let env = fields.take("env", |v| map(v, check_variable)).unwrap_or_default();
    let labels = fields.take("labels", |v| map(v, check_label)).unwrap_or_default();
    let stdin = fields.take("stdin", |v| text(v).map(Bytes::from));
    let stdin_object = fields.take("stdin_object", object_name);
    if stdin.is_some() && stdin_object.is_some() {
        fields.fault("stdin_object", "must not be given together with stdin");
    }
    let priority = fields.take("priority", priority);
    let expires_at = fields.take("expires_at", expires_at);
    let retry = fields.take("retry", |v| retry(v, policy.max_attempts));
    let live_logs = fields.take("live_logs", boolean);
    let working_dir = fields.take("working_dir", working_dir);
    let user = fields.take("user", user);
    let network = fields.take("network", |v| {
        let name = text(v)?;
        if name == policy.network || policy.allowed_networks.contains(&name) {
            Ok(name)
        } else {
            Err(format!(
                "{} is not one of this worker's ALLOWED_NETWORKS: {}",
                quote(&name),
                policy.allowed_networks.join(", ")
            ))
        }
    });
    let limits = Limits {
        timeout: fields
            .take("timeout_ms", |v| {
                whole(v, 1, millis(policy.max_timeout), "MAX_TIMEOUT").map(Duration::from_millis)
            })
            .unwrap_or(policy.default_timeout),
        memory_bytes: fields
            .take("memory_bytes", |v| {
                whole(v, MIN_MEMORY_BYTES, policy.memory_bytes, "MEMORY_LIMIT")
            })
            .unwrap_or(policy.memory_bytes),
        cpus: fields.take("cpus", |v| cpus(v, policy.cpus)).unwrap_or(policy.cpus),
        pids: fields
            .take("pids", |v| whole(v, 1, policy.pids, "PIDS_LIMIT"))
            .unwrap_or(policy.pids),
    };

    let (image, error) = match (fields.into_error(), image) {
        (None, Some(image)) => {
            let job = Job {
                id: id.unwrap_or_else(|| outer_id.clone()),
                image,
                args,
                env,
                stdin,
                working_dir,
                user,
                network: network.unwrap_or_else(|| policy.network.clone()),
                labels,
                limits,
            };
            return Ok(Request {
                job,
                reply_to,
                priority,
                expires_at,
                retry,
                live_logs,
                stdin_object,
            });
        }
        (Some(error), image) => (image, error),
        (None, None) => (None, JobError::new(code::INVALID_FIELD, "image_reference: is required")),
    };
    Err(Box::new(Refusal { id: id.unwrap_or_else(|| outer_id.clone()), image, reply_to, error }))
}

/// The least memory an engine takes: runc refuses to start a container with less than 6 MiB.
const MIN_MEMORY_BYTES: u64 = 6 << 20;

pub(super) fn parse(payload: &[u8]) -> Result<Object, JobError> {
    serde_json::from_slice(payload).map_err(|e| {
        JobError::new(code::INVALID_JSON, format!("the request is no JSON object: {e}"))
    })
}

/// A JSON object, and which of its names came twice. Parsers disagree on what that means, so that
/// a gateway in front of this one may have checked another value.
#[derive(Default)]
pub(super) struct Object {
    pub(super) fields: Map<String, Value>,
    pub(super) twice: Vec<String>,
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut object = Object::default();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if object.fields.insert(name.clone(), value).is_some() {
                        object.twice.push(name);
                    }
                }
                Ok(object)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// The request's fields while they are taken out one by one.
struct Fields {
    object: Map<String, Value>,
    faults: Vec<(String, String)>,
}

impl Fields {
    /// Takes the field out. Absent and null are the same. A fault is noted, and yields nothing.
    fn take<T>(&mut self, name: &str, read: impl FnOnce(Value) -> Result<T, String>) -> Option<T> {
        debug_assert!(FIELDS.contains(&name));
        let value = self.object.remove(name).filter(|v| !v.is_null())?;
        match read(value) {
            Ok(value) => Some(value),
            Err(why) => {
                self.fault(name, &why);
                None
            }
        }
    }

    fn fault(&mut self, name: &str, why: &str) {
        self.faults.push((printable(name, MAX_QUOTE), why.to_owned()));
    }

    fn faulty(&self, name: &str) -> bool {
        self.faults.iter().any(|(faulty, _)| faulty == name)
    }

    /// What is at fault, with every field nobody took.
    fn into_error(mut self) -> Option<JobError> {
        for name in std::mem::take(&mut self.object).keys().take(MAX_FAULTS) {
            let why = format!("is no field of a request; the fields are {}", FIELDS.join(", "));
            self.fault(name, &why);
        }
        if self.faults.is_empty() {
            return None;
        }
        // A request with thousands of wrong fields needs no message of that length.
        let lines: Vec<String> = self
            .faults
            .iter()
            .take(MAX_FAULTS)
            .map(|(name, why)| format!("{name}: {why}"))
            .collect();
        Some(JobError::new(code::INVALID_FIELD, lines.join("; ")))
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn text(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("must be a string, not {}", kind(&other))),
    }
}

/// Text that ends up in an argument list, where NUL ends a string.
fn text_without_nul(value: Value) -> Result<String, String> {
    let text = text(value)?;
    if text.contains('\0') { Err("must not contain a NUL character".to_owned()) } else { Ok(text) }
}

fn image_reference(value: Value) -> Result<String, String> {
    let image = text(value)?;
    if image.is_empty() {
        Err("must not be empty".to_owned())
    } else if image.len() > MAX_IMAGE_LENGTH {
        Err(format!("must be at most {MAX_IMAGE_LENGTH} bytes long"))
    } else if let Err(e) = image.parse::<Reference>() {
        Err(format!("{} is no image reference: {e}", quote(&image)))
    } else {
        Ok(image)
    }
}

fn arguments(value: Value) -> Result<Vec<String>, String> {
    match value {
        Value::Array(items) => items
            .into_iter()
            .enumerate()
            .map(|(at, item)| text_without_nul(item).map_err(|why| format!("item {at} {why}")))
            .collect(),
        line @ Value::String(_) => split(&text_without_nul(line)?),
        other => Err(format!("must be a string or a list of strings, not {}", kind(&other))),
    }
}

/// Splits a command line by POSIX shell quoting. There is no shell, so there are no comments:
/// `#` is an ordinary character.
fn split(line: &str) -> Result<Vec<String>, String> {
    let quoting = |e: shell_words::ParseError| format!("cannot be split into arguments: {e}");
    if !line.contains('#') {
        return shell_words::split(line).map_err(quoting);
    }
    // `#` takes no part in quoting, so a character that is not in the line can stand in for it
    // while the splitter, which knows comments, does its work. Unicode sets these 32 aside for
    // a program's own use.
    let Some(stand_in) = ('\u{fdd0}'..='\u{fdef}').find(|c| !line.contains(*c)) else {
        return Err("holds '#' together with every noncharacter; send a list instead".to_owned());
    };
    let words = shell_words::split(&line.replace('#', &stand_in.to_string())).map_err(quoting)?;
    Ok(words.into_iter().map(|word| word.replace(stand_in, "#")).collect())
}

fn map(
    value: Value,
    check: fn(&str, &str) -> Result<(), String>,
) -> Result<BTreeMap<String, String>, String> {
    let Value::Object(object) = value else {
        return Err(format!("must be an object of strings, not {}", kind(&value)));
    };
    let entry = |(name, value): (String, Value)| {
        let value = text(value).map_err(|why| format!("{} {why}", quote(&name)))?;
        check(&name, &value).map(|()| (name, value))
    };
    object.into_iter().map(entry).collect()
}

fn check_variable(name: &str, value: &str) -> Result<(), String> {
    if name.is_empty() || name.contains(['=', '\0']) {
        Err(format!("{} is no name of a variable", quote(name)))
    } else if value.contains('\0') {
        Err(format!("the value of {} must not contain a NUL character", quote(name)))
    } else {
        Ok(())
    }
}

fn check_label(name: &str, _value: &str) -> Result<(), String> {
    if name.is_empty() {
        Err("a label needs a name".to_owned())
    } else if name.starts_with(RESERVED_LABEL_PREFIX) {
        Err(format!("{} begins with {RESERVED_LABEL_PREFIX:?}, which is reserved", quote(name)))
    } else {
        Ok(())
    }
}

fn working_dir(value: Value) -> Result<String, String> {
    let dir = text_without_nul(value)?;
    if dir.starts_with('/') {
        Ok(dir)
    } else {
        Err(format!("{} must be an absolute path", quote(&dir)))
    }
}

fn user(value: Value) -> Result<String, String> {
    let user = text_without_nul(value)?;
    let parts = user.split(':').count();
    if (1..=2).contains(&parts) && user.split(':').all(|part| !part.is_empty()) {
        Ok(user)
    } else {
        Err(format!("{} is none of user, uid, user:group and uid:gid", quote(&user)))
    }
}

fn whole(value: Value, least: u64, most: u64, setting: &str) -> Result<u64, String> {
    let Value::Number(number) = &value else {
        return Err(format!("must be a whole number, not {}", kind(&value)));
    };
    match number.as_u64() {
        Some(n) if n > most => Err(format!("{n} is above this worker's {setting}, {most}")),
        Some(n) if n >= least => Ok(n),
        _ => Err(format!("must be a whole number of at least {least}, not {number}")),
    }
}

fn cpus(value: Value, most: f64) -> Result<f64, String> {
    let Some(n) = value.as_f64() else {
        return Err(format!("must be a number, not {}", kind(&value)));
    };
    if n > most {
        Err(format!("{n} is above this worker's CPU_LIMIT, {most}"))
    } else if n >= 0.01 {
        Ok(n)
    } else {
        Err(format!("must be at least 0.01, not {n}"))
    }
}

fn boolean(value: Value) -> Result<bool, String> {
    match value {
        Value::Bool(boolean) => Ok(boolean),
        other => Err(format!("must be true or false, not {}", kind(&other))),
    }
}

fn object_name(value: Value) -> Result<String, String> {
    let name = text(value)?;
    if name.is_empty() {
        Err("must not be empty".to_owned())
    } else if name.len() > MAX_OBJECT_NAME_LENGTH {
        Err(format!("must be at most {MAX_OBJECT_NAME_LENGTH} bytes long"))
    } else {
        Ok(name)
    }
}

fn priority(value: Value) -> Result<Priority, String> {
    let name = text(value)?;
    name.parse().map_err(|_| {
        let names = Priority::ALL.map(Priority::as_str).join(", ");
        format!("{} is none of {names}", quote(&name))
    })
}

fn expires_at(value: Value) -> Result<SystemTime, String> {
    let time = text(value)?;
    parse_rfc3339(&time).ok_or_else(|| {
        format!("{} is no time of RFC 3339, such as \"2030-01-31T12:00:00Z\"", quote(&time))
    })
}

/// Both of its fields are required: neither a number of attempts nor a reason for them is to be
/// guessed.
fn retry(value: Value, most: u32) -> Result<Retry, String> {
    let Value::Object(mut object) = value else {
        return Err(format!("must be an object, not {}", kind(&value)));
    };
    let mut take = |name: &str| {
        let value = object.remove(name).filter(|v| !v.is_null());
        value.ok_or_else(|| format!("{name} is required"))
    };
    let max_attempts = whole(take("max_attempts")?, 1, most.into(), "MAX_DELIVER")
        .and_then(|n| u32::try_from(n).map_err(|e| e.to_string()))
        .map_err(|why| format!("max_attempts: {why}"))?;
    let on = retried(take("on")?).map_err(|why| format!("on: {why}"))?;
    match object.keys().next() {
        None => Ok(Retry { max_attempts, on }),
        Some(name) => {
            Err(format!("{} is no field of it; the fields are max_attempts, on", quote(name)))
        }
    }
}

fn retried(value: Value) -> Result<Vec<Status>, String> {
    let names = Retry::STATUSES.map(Status::as_str).join(", ");
    let Value::Array(values) = value else {
        return Err(format!("must be a list of {names}, not {}", kind(&value)));
    };
    let mut on = Vec::new();
    for value in values {
        let name = text(value).map_err(|why| format!("each entry {why}"))?;
        let status = name.parse().ok().filter(|status| Retry::STATUSES.contains(status));
        let status = status.ok_or_else(|| format!("{} is none of {names}", quote(&name)))?;
        if !on.contains(&status) {
            on.push(status);
        }
    }
    if on.is_empty() { Err(format!("must name at least one of {names}")) } else { Ok(on) }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "request_tests.rs"]
pub(super) mod tests;
