//! Requests that name one job and nothing else.

use bytes::Bytes;
use serde_json::{Value, json};

use super::request::{Object, kind, parse, quote};
use crate::job::{InvalidJobId, JobError, JobId, code};

/// The code of the refusal that no worker knows of the job. No outcome has it.
pub const JOB_UNKNOWN: &str = "job.unknown";

/// The longest request: an id with room to spare.
const MAX_REQUEST: usize = 1024;

/// The job a request is about: its id alone, or `{"id": …}`.
///
/// # Errors
/// Says what is wrong with the request.
pub fn decode(payload: &[u8]) -> Result<JobId, JobError> {
    if payload.len() > MAX_REQUEST {
        let message = format!("id: must be at most {MAX_REQUEST} bytes with all that is around it");
        return Err(JobError::new(code::INVALID_FIELD, message));
    }
    // What a shell puts behind an id is no part of it.
    let payload = payload.trim_ascii_end();
    let wrong = |why: String| JobError::new(code::INVALID_FIELD, format!("id: {why}"));
    let read =
        |id: &str| id.parse().map_err(|e: InvalidJobId| wrong(format!("{e}, not {}", quote(id))));
    if payload.is_empty() {
        return Err(wrong("is required, alone or as {\"id\": …}".to_owned()));
    }
    if !payload.trim_ascii_start().starts_with(b"{") {
        return read(&String::from_utf8_lossy(payload));
    }
    let Object { mut fields, twice } = parse(payload)?;
    if let Some(name) = twice.first() {
        let message = format!("{}: is given twice", quote(name));
        return Err(JobError::new(code::INVALID_FIELD, message));
    }
    let id = fields.remove("id");
    if let Some(name) = fields.keys().next() {
        let message = format!("{}: is no field of this request; the field is id", quote(name));
        return Err(JobError::new(code::INVALID_FIELD, message));
    }
    match id {
        Some(Value::String(id)) => read(&id),
        None | Some(Value::Null) => Err(wrong("is required".to_owned())),
        Some(other) => Err(wrong(format!("must be a string, not {}", kind(&other)))),
    }
}

/// What is answered to a request that cannot be followed.
#[must_use]
pub fn refusal(error: &JobError) -> Bytes {
    json!({"error": {"code": error.code, "message": error.message}}).to_string().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_id_is_read_alone_and_from_json() {
        for payload in [
            "job-1",
            "job-1\n",
            "job-1 \r\n\t",
            "{\"id\": \"job-1\"}",
            " {\"id\": \"job-1\"}\n",
            "{\"\\u0069d\":\"job-1\"}",
        ] {
            assert_eq!(decode(payload.as_bytes()).unwrap().as_str(), "job-1", "{payload:?}");
        }
    }

    #[test]
    fn what_names_no_job_is_refused() {
        let long = "x".repeat(100_000);
        for (payload, code, message) in [
            ("", code::INVALID_FIELD, "id: is required"),
            (" \n", code::INVALID_FIELD, "id: is required"),
            ("a b", code::INVALID_FIELD, "id: must be 1 to 64 characters"),
            (" job-1", code::INVALID_FIELD, "id: must be"),
            ("\"job-1\"", code::INVALID_FIELD, "id: must be"),
            ("[\"job-1\"]", code::INVALID_FIELD, "id: must be"),
            ("*", code::INVALID_FIELD, "id: must be"),
            (&long, code::INVALID_FIELD, "id: must be"),
            ("{}", code::INVALID_FIELD, "id: is required"),
            ("{\"id\": null}", code::INVALID_FIELD, "id: is required"),
            ("{\"id\": 7}", code::INVALID_FIELD, "id: must be a string, not a number"),
            ("{\"id\": \"job-1 \"}", code::INVALID_FIELD, "id: must be"),
            ("{\"id\": \"a\", \"id\": \"b\"}", code::INVALID_FIELD, "\"id\": is given twice"),
            ("{\"id\": \"a\", \"force\": true}", code::INVALID_FIELD, "\"force\": is no field"),
            ("{\"id\": \"a\"", code::INVALID_JSON, "the request is no JSON object"),
            ("{\"id\": \"a\"} x", code::INVALID_JSON, "the request is no JSON object"),
        ] {
            let error = decode(payload.as_bytes()).unwrap_err();
            assert_eq!(error.code, code, "{payload:.40}");
            assert!(error.message.starts_with(message), "{payload:.40}: {}", error.message);
            assert!(error.message.len() < 300);
        }
        assert_eq!(decode(b"\xff\xfe").unwrap_err().code, code::INVALID_FIELD);
    }

    #[test]
    fn a_refusal_says_why() {
        let encoded: Value = serde_json::from_slice(&refusal(&decode(b"").unwrap_err())).unwrap();
        assert_eq!(encoded["error"]["code"], code::INVALID_FIELD);
        assert!(encoded["error"]["message"].as_str().unwrap().starts_with("id: is required"));
    }
}
