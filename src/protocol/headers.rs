//! The headers of a message on the results subject.

use super::by_id;
use crate::job::{JobError, JobId, ObjectRef, Outcome, code};
use crate::trace::TraceContext;

/// The job's id.
pub const JOB_ID: &str = "Job-Id";
/// What became of it.
pub const JOB_STATUS: &str = "Job-Status";
/// The exit code, where the function ended.
pub const JOB_EXIT_CODE: &str = "Job-Exit-Code";
/// The image, as the request named it.
pub const JOB_IMAGE: &str = "Job-Image";
/// The error's code, where there is an error.
pub const JOB_ERROR: &str = "Job-Error";
/// Which attempt this was, from 1.
pub const JOB_ATTEMPT: &str = "Job-Attempt";
/// Milliseconds from receipt to outcome.
pub const JOB_DURATION_MS: &str = "Job-Duration-Ms";
/// `true` where bytes of the output are missing from the body, else `false`.
pub const JOB_OUTPUT_TRUNCATED: &str = "Job-Output-Truncated";
/// `bucket/name` of the object that holds standard output, where it did not fit.
pub const JOB_STDOUT_OBJECT: &str = "Job-Stdout-Object";
/// `bucket/name` of the object that holds standard error, where it did not fit.
pub const JOB_STDERR_OBJECT: &str = "Job-Stderr-Object";
/// Of live output: its number in its stream, from 1.
pub const SEQ: &str = "Seq";
/// Of live output: the bytes of its stream that came before it.
pub const OFFSET: &str = "Offset";
/// Of live output: `true` on the last message of a stream, which has no body.
pub const END: &str = "End";
/// Of live output, on the last message of a stream: the bytes that were dropped.
pub const DROPPED_BYTES: &str = "Dropped-Bytes";
/// What NATS deduplicates by: the job's id.
pub const NATS_MSG_ID: &str = "Nats-Msg-Id";

/// Of a refusal by a NATS service: its message, and its code in the manner of HTTP (ADR-32 of
/// nats-architecture-and-design).
pub const SERVICE_ERROR: &str = "Nats-Service-Error";
/// See [`SERVICE_ERROR`].
pub const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";

/// The headers of the refusal of a request that is not about running a job.
#[must_use]
pub fn of_refusal(error: &JobError) -> Vec<(&'static str, String)> {
    let number = match error.code.as_ref() {
        by_id::JOB_UNKNOWN => 404,
        code::BUSY | code::JETSTREAM_UNAVAILABLE => 503,
        _ => 400,
    };
    vec![(SERVICE_ERROR, one_line(&error.message)), (SERVICE_ERROR_CODE, number.to_string())]
}

/// The headers of `outcome`, in order. Every value is one line of printable text.
#[must_use]
pub fn of(outcome: &Outcome, truncated: bool) -> Vec<(&'static str, String)> {
    let mut headers = vec![
        (JOB_ID, outcome.id.to_string()),
        (JOB_STATUS, outcome.status.to_string()),
        (JOB_ATTEMPT, outcome.attempt.to_string()),
        (JOB_OUTPUT_TRUNCATED, truncated.to_string()),
        (NATS_MSG_ID, deduplication_id(&outcome.id)),
    ];
    let mut optional = |name, value: Option<String>| {
        headers.extend(value.map(|value| (name, one_line(&value))));
    };
    optional(JOB_EXIT_CODE, outcome.exit_code.map(|code| code.to_string()));
    optional(JOB_IMAGE, outcome.image.clone());
    optional(JOB_ERROR, outcome.error.as_ref().map(|e| e.code.to_string()));
    optional(JOB_DURATION_MS, outcome.timings.total.map(|d| d.as_millis().to_string()));
    let object = |object: &ObjectRef| format!("{}/{}", object.bucket, object.name);
    optional(JOB_STDOUT_OBJECT, outcome.objects.stdout.as_ref().map(object));
    optional(JOB_STDERR_OBJECT, outcome.objects.stderr.as_ref().map(object));
    headers.extend(of_trace(outcome.trace.as_ref()));
    headers
}

/// The headers that pass a trace on.
pub fn of_trace(
    trace: Option<&TraceContext>,
) -> impl Iterator<Item = (&'static str, String)> + use<'_> {
    trace.into_iter().flat_map(|trace| trace.headers().map(|(n, value)| (n, value.to_owned())))
}

/// Outcomes of one job carry one id, whoever publishes them and however often.
fn deduplication_id(id: &JobId) -> String {
    id.to_string()
}

/// The bytes these headers take in a message: NATS' own framing, as its client protocol says.
#[must_use]
pub fn encoded_length<N: AsRef<str>, V: AsRef<str>>(headers: &[(N, V)]) -> usize {
    let line = |(name, value): &(N, V)| name.as_ref().len() + value.as_ref().len() + 4;
    let lines: usize = headers.iter().map(line).sum();
    "NATS/1.0\r\n".len() + lines + "\r\n".len()
}

/// `value` without anything that could end a header's line.
pub(super) fn one_line(value: &str) -> String {
    value.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
