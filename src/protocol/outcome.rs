//! An outcome on the wire: the results message and the JSON reply, each within the server's limit.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::headers;
use super::schema::Timestamp;
use super::time::rfc3339;
use crate::capture::Captured;
use crate::job::{JobError, JobId, ObjectRef, Outcome, StartKind, Status};
use crate::trace::TraceContext;

/// A message on the results subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultMessage {
    /// Its headers.
    pub headers: Vec<(&'static str, String)>,
    /// The raw output, or the error's message for a job that never ran.
    pub body: Bytes,
}

/// The results message of `outcome`, at most `limit` bytes with its headers. The body is cut and
/// flagged where it would not fit.
#[must_use]
pub fn result_message(outcome: &Outcome, limit: usize) -> ResultMessage {
    let output = &outcome.output;
    let dropped = output.stdout_dropped + output.stderr_dropped > 0;
    // `false` is the longer word, so the length computed with it is enough for both.
    let room = limit.saturating_sub(headers::encoded_length(&headers::of(outcome, false)));
    let (body, cut) = match &outcome.error {
        Some(error) if outcome.started_at.is_none() => {
            let message = prefix_within(&error.message, room, |_| 0);
            (Bytes::copy_from_slice(message.as_bytes()), message.len() < error.message.len())
        }
        _ => output.interleaved(room),
    };
    ResultMessage { headers: headers::of(outcome, cut || dropped), body }
}

/// The results message of an outcome that is known by its JSON alone, as [`json`] encodes it.
/// `order` is that of the two streams. Nothing where it is no outcome.
#[must_use]
pub fn result_of_json(
    json: &[u8],
    order: &[u32],
    trace: Option<&TraceContext>,
    limit: usize,
) -> Option<ResultMessage> {
    let fields: Map<String, Value> = serde_json::from_slice(json).ok()?;
    let text = |name: &str| fields.get(name).and_then(Value::as_str);
    let is_true = |name: &str| fields.get(name).and_then(Value::as_bool) == Some(true);
    let id = text("id")?;
    let error = fields.get("error");
    let mut lines = vec![
        (headers::JOB_ID, id.to_owned()),
        (headers::JOB_STATUS, text("status")?.to_owned()),
        (headers::JOB_ATTEMPT, fields.get("attempt")?.to_string()),
        (headers::JOB_OUTPUT_TRUNCATED, "false".to_owned()),
        (headers::NATS_MSG_ID, id.to_owned()),
    ];
    let mut optional = |name, value: Option<String>| {
        lines.extend(value.map(|value| (name, headers::one_line(&value))));
    };
    optional(headers::JOB_EXIT_CODE, fields.get("exit_code").map(Value::to_string));
    optional(headers::JOB_IMAGE, text("image").map(str::to_owned));
    let of_error = |name: &str| error.and_then(|e| e.get(name)).and_then(Value::as_str);
    optional(headers::JOB_ERROR, of_error("code").map(str::to_owned));
    let total = fields.get("timings_ms").and_then(|t| t.get("total")).and_then(Value::as_f64);
    optional(headers::JOB_DURATION_MS, total.map(|ms| format!("{}", ms.floor())));
    for (name, stream) in [
        (headers::JOB_STDOUT_OBJECT, "stdout_object"),
        (headers::JOB_STDERR_OBJECT, "stderr_object"),
    ] {
        let part = |name: &str| fields.get(stream)?.get(name)?.as_str();
        optional(name, part("bucket").zip(part("name")).map(|(b, n)| format!("{b}/{n}")));
    }
    lines.extend(headers::of_trace(trace));
    let stream = |name: &str| match text(&format!("{name}_encoding")) {
        Some("base64") => BASE64.decode(text(name).unwrap_or_default()).unwrap_or_default(),
        _ => text(name).unwrap_or_default().as_bytes().to_vec(),
    };
    let room = limit.saturating_sub(headers::encoded_length(&lines));
    let (body, cut) = match of_error("message") {
        Some(message) if fields.get("started_at").is_none() => {
            let kept = prefix_within(message, room, |_| 0);
            (Bytes::copy_from_slice(kept.as_bytes()), kept.len() < message.len())
        }
        _ => Captured::ordered(stream("stdout"), stream("stderr"), order).interleaved(room),
    };
    if cut || is_true("stdout_truncated") || is_true("stderr_truncated") {
        lines[3].1 = "true".to_owned();
    }
    Some(ResultMessage { headers: lines, body })
}

/// The bytes that the two streams of `outcome` take in its JSON.
#[must_use]
pub fn encoded_lengths(outcome: &Outcome) -> (usize, usize) {
    let output = &outcome.output;
    let length = |bytes: &[u8]| Text::of(bytes, false).encoded_length();
    (length(&output.stdout), length(&output.stderr))
}

/// Why an outcome cannot be sent as JSON.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Even without output it does not fit.
    #[error("the outcome needs {needed} bytes without its output; the server takes {limit}")]
    TooLarge {
        /// The bytes it needs.
        needed: usize,
        /// The bytes the server takes.
        limit: usize,
    },
    /// It is no JSON: a defect of this program.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// `outcome` as JSON, at most `limit` bytes. Output that would not fit is cut and flagged: the
/// smaller stream is kept whole where that is possible.
///
/// # Errors
/// Says when even an outcome without output would not fit.
pub fn json(outcome: &Outcome, limit: usize) -> Result<Bytes, EncodeError> {
    let (stdout, stderr) = (
        Text::of(&outcome.output.stdout, outcome.output.stdout_dropped > 0),
        Text::of(&outcome.output.stderr, outcome.output.stderr_dropped > 0),
    );
    let whole = serde_json::to_vec(&Wire::of(outcome, &stdout, &stderr))?;
    if whole.len() <= limit {
        return Ok(whole.into());
    }
    let bare = serde_json::to_vec(&Wire::of(outcome, &stdout.bare(), &stderr.bare()))?.len();
    let Some(room) = limit.checked_sub(bare) else {
        return match &outcome.error {
            Some(error) if !error.message.is_empty() => {
                // A reason cut short beats no answer.
                let excess = bare - limit;
                let room = encoded_length(&error.message).saturating_sub(excess);
                let message = prefix_within(&error.message, room, extra_json_bytes).to_owned();
                let error = Some(JobError { code: error.code.clone(), message });
                json(&Outcome { error, output: Captured::default(), ..outcome.clone() }, limit)
            }
            _ => Err(EncodeError::TooLarge { needed: bare, limit }),
        };
    };
    let (out, err) = (stdout.encoded_length(), stderr.encoded_length());
    let half = room / 2;
    let (for_out, for_err) = match (out <= half, err <= half) {
        (true, _) => (out, room - out),
        (_, true) => (room - err, err),
        (false, false) => (half, half),
    };
    let (stdout, stderr) = (stdout.cut(for_out), stderr.cut(for_err));
    Ok(serde_json::to_vec(&Wire::of(outcome, &stdout, &stderr))?.into())
}

/// A stream of output as JSON carries it.
#[derive(Debug, PartialEq, Eq)]
struct Text {
    text: String,
    encoding: &'static str,
    truncated: bool,
}

impl Text {
    /// UTF-8 as it is, anything else in base64. A character that the output limit cut in two does
    /// not make a text binary: its first half is dropped.
    fn of(bytes: &[u8], truncated: bool) -> Self {
        let utf8 = match std::str::from_utf8(bytes) {
            Ok(text) => Some(text),
            Err(e) if truncated && e.error_len().is_none() => {
                std::str::from_utf8(&bytes[..e.valid_up_to()]).ok()
            }
            Err(_) => None,
        };
        match utf8 {
            Some(text) => Self { text: text.to_owned(), encoding: "utf8", truncated },
            None => Self { text: BASE64.encode(bytes), encoding: "base64", truncated },
        }
    }

    /// Without its text. Not flagged: `false` is the longer word, so that what fits beside it fits
    /// beside `true` as well.
    fn bare(&self) -> Self {
        Self { text: String::new(), encoding: self.encoding, truncated: false }
    }

    fn encoded_length(&self) -> usize {
        encoded_length(&self.text)
    }

    /// The first part of it that takes at most `room` bytes in JSON.
    fn cut(&self, room: usize) -> Self {
        let kept = prefix_within(&self.text, room, extra_json_bytes);
        // Base64 is decodable only in groups of four.
        let length = if self.encoding == "base64" { kept.len() / 4 * 4 } else { kept.len() };
        Self {
            text: self.text[..length].to_owned(),
            encoding: self.encoding,
            truncated: self.truncated || length < self.text.len(),
        }
    }
}

/// The bytes `text` takes in a JSON string, without the quotation marks.
fn encoded_length(text: &str) -> usize {
    text.chars().map(|c| c.len_utf8() + extra_json_bytes(c)).sum()
}

/// How many bytes more than its own a character takes in a JSON string, as serde_json writes it.
fn extra_json_bytes(c: char) -> usize {
    match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 1,
        '\0'..='\u{1f}' => 5,
        _ => 0,
    }
}

/// The longest prefix of `text` whose characters, each with its extra bytes, take at most `room`.
pub(super) fn prefix_within(text: &str, room: usize, extra: impl Fn(char) -> usize) -> &str {
    let mut used = 0;
    for (at, c) in text.char_indices() {
        used += c.len_utf8() + extra(c);
        if used > room {
            return &text[..at];
        }
    }
    text
}

/// What became of a job. What is not known is absent.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Outcome")]
pub(super) struct Wire<'a> {
    /// The job's id.
    #[schemars(with = "JobId")]
    id: &'a str,
    /// The image, as the request named it.
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<&'a str>,
    /// What became of it.
    #[schemars(with = "Status")]
    status: &'static str,
    /// The function's exit code, where it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i64>,
    /// The signal it ended by, as far as its exit code, 128 and the signal's number, says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<i64>,
    /// Why it did not succeed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<WireError<'a>>,
    /// What it printed to standard output.
    stdout: &'a str,
    /// What it printed to standard error.
    stderr: &'a str,
    /// How stdout is written here.
    #[schemars(with = "Encoding")]
    stdout_encoding: &'static str,
    /// How stderr is written here.
    #[schemars(with = "Encoding")]
    stderr_encoding: &'static str,
    /// Whether bytes of stdout are missing here.
    stdout_truncated: bool,
    /// Whether bytes of stderr are missing here.
    stderr_truncated: bool,
    /// The object that holds standard output, where it did not fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout_object: Option<WireObject<'a>>,
    /// The object that holds standard error, where it did not fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr_object: Option<WireObject<'a>>,
    /// Bytes that live output left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    live_logs_dropped_bytes: Option<u64>,
    /// Whether a process of it was killed for want of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    oom_killed: Option<bool>,
    /// Which attempt this was, from 1.
    attempt: u32,
    /// The instance that ran it.
    worker: &'a str,
    /// How its container came to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<StartKind>")]
    start: Option<&'static str>,
    /// When the request was received.
    #[schemars(with = "Timestamp")]
    queued_at: String,
    /// When the function started.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Timestamp>")]
    started_at: Option<String>,
    /// When its end was known.
    #[schemars(with = "Timestamp")]
    finished_at: String,
    /// How long each stage took, in milliseconds.
    timings_ms: WireTimings,
    /// What it used.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<WireUsage>,
}

/// How output is written in JSON.
#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase", inline)]
#[expect(dead_code, reason = "only its schema is of use")]
enum Encoding {
    Utf8,
    Base64,
}

/// Why a job did not succeed.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Error")]
pub(super) struct WireError<'a> {
    /// A stable, dotted code, for machines.
    code: &'a str,
    /// A sentence, for people.
    message: &'a str,
}

/// An object that holds output.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Object")]
struct WireObject<'a> {
    /// The bucket.
    bucket: &'a str,
    /// The object's name in it.
    name: &'a str,
    /// Its bytes.
    size: u64,
    /// Its digest, as the object store writes it.
    digest: &'a str,
    /// Whether bytes of the output are missing in it.
    truncated: bool,
}

impl<'a> WireObject<'a> {
    fn of(object: &'a ObjectRef) -> Self {
        let ObjectRef { bucket, name, size, digest, truncated } = object;
        Self { bucket, name, size: *size, digest, truncated: *truncated }
    }
}

/// Milliseconds. A stage that was not reached is absent.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Timings")]
struct WireTimings {
    /// From receipt to a slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<f64>,
    /// Until the image was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pull: Option<f64>,
    /// Until there was a container.
    #[serde(skip_serializing_if = "Option::is_none")]
    create: Option<f64>,
    /// Until the function began.
    #[serde(skip_serializing_if = "Option::is_none")]
    start: Option<f64>,
    /// Until it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<f64>,
    /// From receipt to the outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<f64>,
}

/// What a function used.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Usage")]
struct WireUsage {
    /// Processor time, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_ms: Option<f64>,
    /// The most memory at once, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_peak_bytes: Option<u64>,
}

impl<'a> Wire<'a> {
    fn of(outcome: &'a Outcome, stdout: &'a Text, stderr: &'a Text) -> Self {
        let (t, u) = (&outcome.timings, &outcome.usage);
        let error = |e: &'a JobError| WireError { code: &e.code, message: &e.message };
        Self {
            id: outcome.id.as_str(),
            image: outcome.image.as_deref(),
            status: Status::as_str(outcome.status),
            exit_code: outcome.exit_code,
            signal: outcome.signal(),
            error: outcome.error.as_ref().map(error),
            stdout: &stdout.text,
            stderr: &stderr.text,
            stdout_encoding: stdout.encoding,
            stderr_encoding: stderr.encoding,
            stdout_truncated: stdout.truncated,
            stderr_truncated: stderr.truncated,
            stdout_object: outcome.objects.stdout.as_ref().map(WireObject::of),
            stderr_object: outcome.objects.stderr.as_ref().map(WireObject::of),
            live_logs_dropped_bytes: Some(outcome.live_logs_dropped).filter(|bytes| *bytes > 0),
            oom_killed: outcome.oom_killed,
            attempt: outcome.attempt,
            worker: &outcome.worker,
            start: outcome.start.map(crate::job::StartKind::as_str),
            queued_at: rfc3339(outcome.queued_at),
            started_at: outcome.started_at.map(rfc3339),
            finished_at: rfc3339(outcome.finished_at),
            timings_ms: WireTimings {
                queue: t.queue.map(ms),
                pull: t.pull.map(ms),
                create: t.create.map(ms),
                start: t.start.map(ms),
                run: t.run.map(ms),
                total: t.total.map(ms),
            },
            usage: (u.cpu.is_some() || u.memory_peak_bytes.is_some()).then(|| WireUsage {
                cpu_ms: u.cpu.map(ms),
                memory_peak_bytes: u.memory_peak_bytes,
            }),
        }
    }
}

/// Milliseconds, to the microsecond.
fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
#[path = "outcome_tests.rs"]
mod tests;
