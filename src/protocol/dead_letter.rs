//! Dead letters: requests that could not be run, as they came, with the reason in headers.

use std::time::SystemTime;

use bytes::Bytes;

use super::headers::{JOB_ID, JOB_IMAGE, NATS_MSG_ID, encoded_length, one_line};
use super::outcome::prefix_within;
use super::time::rfc3339;
use crate::job::{JobError, JobId};

/// The error's code.
pub const REASON: &str = "Dead-Letter-Reason";
/// The error's message, shortened where there was no room for it.
pub const MESSAGE: &str = "Dead-Letter-Message";
/// How often the job was tried.
pub const ATTEMPTS: &str = "Dead-Letter-Attempts";
/// The subject the request came on.
pub const SUBJECT: &str = "Dead-Letter-Subject";
/// When the request was received.
pub const QUEUED_AT: &str = "Dead-Letter-Queued-At";
/// When it was given up.
pub const AT: &str = "Dead-Letter-At";
/// `true` where headers of the request are missing.
pub const HEADERS_DROPPED: &str = "Dead-Letter-Headers-Dropped";
/// `true` where the end of the body is missing.
pub const TRUNCATED: &str = "Dead-Letter-Truncated";

/// What the names of a request's headers are prefixed with where the server or this service would
/// take them for their own.
const ORIGINAL: &str = "Original-";

/// A request that could not be run.
#[derive(Clone, Copy, Debug)]
pub struct Undelivered<'a> {
    /// Its body.
    pub payload: &'a Bytes,
    /// Its headers.
    pub headers: &'a [(String, String)],
    /// The job's id.
    pub id: &'a JobId,
    /// The image, where the request named one.
    pub image: Option<&'a str>,
    /// Why it could not be run.
    pub error: &'a JobError,
    /// How often it was tried.
    pub attempts: u32,
    /// The subject it came on.
    pub subject: &'a str,
    /// When it was received.
    pub queued_at: SystemTime,
}

/// A message on the dead letters' subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its headers: the reason's, then the request's.
    pub headers: Vec<(String, String)>,
    /// The request's body.
    pub body: Bytes,
    /// Whether the end of the body is missing.
    pub truncated: bool,
}

/// The dead letter of `request`, given up at `now`, at most `limit` bytes with its headers.
///
/// A request may be as large as the server takes, so that there is no room left for the reason.
/// Then the message is shortened; if that is not enough the request's headers go, the last one
/// first; and in the end the body is cut. Nobody can send that again, so the message gets its room back.
#[must_use]
pub fn dead_letter(request: &Undelivered<'_>, now: SystemTime, limit: usize) -> DeadLetter {
    let originals: Vec<(String, String)> = request.headers.iter().filter_map(original).collect();
    let refused = originals.len() < request.headers.len();
    let body = request.payload;
    let message = one_line(&request.error.message);
    let line = |name: &str, value: &str| (name.to_owned(), one_line(value));
    // The most important first.
    let mut headers = vec![
        line(NATS_MSG_ID, &format!("{}-dead", request.id)),
        line(JOB_ID, request.id.as_str()),
        line(REASON, &request.error.code),
        line(ATTEMPTS, &request.attempts.to_string()),
        line(AT, &rfc3339(now)),
        line(QUEUED_AT, &rfc3339(request.queued_at)),
        line(SUBJECT, request.subject),
    ];
    headers.extend(request.image.map(|image| line(JOB_IMAGE, image)));
    let message_line = (MESSAGE.to_owned(), String::new());
    let dropped_line = (HEADERS_DROPPED.to_owned(), "true".to_owned());
    let own = encoded_length(&headers) + line_length(&message_line);

    let mut kept = originals.len();
    let mut length = own + body.len() + originals.iter().map(line_length).sum::<usize>();
    loop {
        let dropped = refused || kept < originals.len();
        let length_now = length + if dropped { line_length(&dropped_line) } else { 0 };
        if length_now <= limit {
            let message = shortened(&message, limit - length_now);
            headers.push((MESSAGE.to_owned(), message));
            headers.extend(dropped.then_some(dropped_line));
            headers.extend(originals.into_iter().take(kept));
            return DeadLetter { headers, body: body.clone(), truncated: false };
        }
        if kept == 0 {
            break;
        }
        kept -= 1;
        length -= line_length(&originals[kept]);
    }

    let mut flags = vec![(TRUNCATED.to_owned(), "true".to_owned())];
    flags.extend((refused || !originals.is_empty()).then_some(dropped_line));
    let after_reason = 3;
    headers.splice(after_reason..after_reason, flags);
    // Only a limit that no server is run with makes this necessary.
    while headers.len() > 1 && encoded_length(&headers) > limit {
        headers.pop();
    }
    let room = limit.saturating_sub(encoded_length(&headers) + line_length(&message_line));
    let message = shortened(&message, room / 2);
    if !message.is_empty() {
        headers.push((MESSAGE.to_owned(), message));
    }
    let room = limit.saturating_sub(encoded_length(&headers));
    let truncated = room < body.len();
    if !truncated {
        headers.retain(|(name, _)| name != TRUNCATED);
    }
    DeadLetter { headers, body: body.slice(..room.min(body.len())), truncated }
}

/// A header of the request under a name that means nothing to the server and is none of a dead
/// letter's own. Nothing where it is no header that could be sent.
fn original((name, value): &(String, String)) -> Option<(String, String)> {
    let sendable = |b: u8| b.is_ascii_graphic() && b != b':';
    if name.is_empty() || !name.bytes().all(sendable) {
        return None;
    }
    let begins_with = |prefix: &str| {
        name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    let taken = begins_with("Nats-")
        || begins_with("Dead-Letter-")
        || name.eq_ignore_ascii_case(JOB_ID)
        || name.eq_ignore_ascii_case(JOB_IMAGE);
    let name = if taken { format!("{ORIGINAL}{name}") } else { name.clone() };
    Some((name, one_line(value)))
}

fn line_length(line: &(String, String)) -> usize {
    encoded_length(std::slice::from_ref(line)) - encoded_length::<String, String>(&[])
}

/// The beginning of `text`, at most `room` bytes and marked where it was cut.
fn shortened(text: &str, room: usize) -> String {
    const MARK: char = '…';
    if text.len() <= room {
        return text.to_owned();
    }
    let Some(room) = room.checked_sub(MARK.len_utf8()) else { return String::new() };
    let mut shown = prefix_within(text, room, |_| 0).to_owned();
    shown.push(MARK);
    shown
}

#[cfg(test)]
#[path = "dead_letter_tests.rs"]
mod tests;
