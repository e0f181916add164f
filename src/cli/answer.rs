//! An outcome, as a client reads it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use crate::capture::Stream;
use crate::job::{JobError, Status};
use crate::protocol::record::{Record, State};

/// What became of a job. Fields that are not known here are a later version's.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// Nothing where it is none of those there are.
    pub(super) status: Option<Status>,
    pub(super) exit_code: Option<i64>,
    pub(super) error: Option<JobError>,
    pub(super) attempt: u64,
    /// The whole of it.
    pub(super) json: Map<String, Value>,
}

/// What an outcome has of one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Output {
    /// The beginning of it, or all.
    pub(super) bytes: Vec<u8>,
    /// Bytes are missing from that.
    pub(super) truncated: bool,
    /// Where more of it is: bucket and name.
    pub(super) object: Option<(String, String)>,
    /// Bytes are missing from the object, too.
    pub(super) object_truncated: bool,
}

impl Answer {
    /// Reads an outcome. Nothing where it is none.
    pub(super) fn of(json: Value) -> Option<Self> {
        let Value::Object(json) = json else { return None };
        let status = json.get("status")?.as_str()?.parse().ok();
        let error = json.get("error").and_then(|error| {
            let text = |name: &str| error.get(name).and_then(Value::as_str).map(str::to_owned);
            let message = text("message").unwrap_or_default();
            Some(JobError { code: text("code")?.into(), message })
        });
        Some(Self {
            status,
            exit_code: json.get("exit_code").and_then(Value::as_i64),
            error,
            attempt: json.get("attempt").and_then(Value::as_u64).unwrap_or(1),
            json,
        })
    }

    /// Reads an outcome from its JSON. Nothing where it is none.
    pub(super) fn parse(json: &[u8]) -> Option<Self> {
        Self::of(serde_json::from_slice(json).ok()?)
    }

    /// What it has of a stream.
    pub(super) fn output(&self, stream: Stream) -> Output {
        let name = name_of(stream);
        let field = |suffix: &str| self.json.get(&format!("{name}{suffix}"));
        let text = field("").and_then(Value::as_str).unwrap_or_default();
        let bytes = match field("_encoding").and_then(Value::as_str) {
            Some("base64") => BASE64.decode(text).unwrap_or_default(),
            _ => text.as_bytes().to_vec(),
        };
        let object = field("_object");
        let of_object = |part: &str| object?.get(part)?.as_str().map(str::to_owned);
        let is_true = |value: Option<&Value>| value.and_then(Value::as_bool).unwrap_or_default();
        Output {
            bytes,
            truncated: is_true(field("_truncated")),
            object: of_object("bucket").zip(of_object("name")),
            object_truncated: is_true(object.and_then(|object| object.get("truncated"))),
        }
    }

    /// The name of its status.
    pub(super) fn status_name(&self) -> &str {
        self.json.get("status").and_then(Value::as_str).unwrap_or_default()
    }

    /// What there is to say of its end beside the output; nothing where it succeeded.
    pub(super) fn complaint(&self) -> Option<String> {
        match (self.status, &self.error) {
            (Some(Status::Succeeded), _) => None,
            (_, Some(error)) => {
                Some(format!("{}: {}: {}", self.status_name(), error.code, error.message))
            }
            (_, None) => {
                let code = self.exit_code.map(|code| format!(" with exit code {code}"));
                Some(format!("{}{}", self.status_name(), code.unwrap_or_default()))
            }
        }
    }
}

/// The outcome in a record, where the job has ended.
pub(super) fn ended(record: &Record) -> Option<Answer> {
    if record.state != State::Ended {
        return None;
    }
    Answer::parse(&record.outcome_json()?)
}

/// What a stream is called.
pub(super) fn name_of(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    #[test]
    fn streams_are_decoded() {
        let answer = Answer::of(json!({
            "status": "failed", "exit_code": 3, "attempt": 2,
            "stdout": "text", "stdout_encoding": "utf8", "stdout_truncated": true,
            "stdout_object": {"bucket": "b", "name": "id/2/stdout", "truncated": true},
            "stderr": "AP8=", "stderr_encoding": "base64", "stderr_truncated": false,
        }))
        .unwrap();
        let wanted = Output {
            bytes: b"text".to_vec(),
            truncated: true,
            object: Some(("b".to_owned(), "id/2/stdout".to_owned())),
            object_truncated: true,
        };
        assert_eq!(answer.output(Stream::Stdout), wanted);
        let stderr = answer.output(Stream::Stderr);
        assert_eq!(stderr, Output { bytes: vec![0, 0xff], ..Output::default() });
        assert_eq!(answer.complaint().as_deref(), Some("failed with exit code 3"));
        assert_eq!(answer.attempt, 2);
    }

    #[test]
    fn what_is_no_outcome_is_none() {
        for json in ["", "[]", "{}", r#"{"stream": "s", "seq": 1}"#, r#"{"status": 7}"#] {
            assert!(Answer::parse(json.as_bytes()).is_none(), "{json}");
        }
    }
}
