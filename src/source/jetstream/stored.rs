//! A request as the stream keeps it: read, moved to another queue, and understood again.

use std::time::{Duration, Instant, SystemTime};

use async_nats::jetstream::{Context, ErrorCode};
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;

use crate::job::{JobId, Priority};
use crate::protocol::headers::NATS_MSG_ID;
use crate::protocol::time::parse_rfc3339;
use crate::source::{Message, expiry};

/// Where a request that was moved to another queue keeps the id it had, and when it was published:
/// its own place and time are new.
const MOVED_ID: &str = "Worker-Spawner-Id";
const MOVED_AT: &str = "Worker-Spawner-Queued-At-Ms";
const MOVED_FROM: &str = "Worker-Spawner-Subject";
const MOVED_MSG_ID: &str = "Worker-Spawner-Msg-Id";
/// What the further headers and their framing take in a message, beside their values.
const MOVED_OVERHEAD: usize = 512;

/// A request as the stream keeps it.
pub struct Stored {
    /// Where it was published.
    pub subject: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub payload: Bytes,
    /// Its place in the stream.
    pub sequence: u64,
    /// When it was stored.
    pub stored_at: SystemTime,
    /// How often it was delivered.
    pub deliveries: u32,
}

/// Which stored request to read.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Place<'a> {
    /// Its place, or where to begin to look.
    pub seq: u64,
    /// The first one from there on with this subject.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_by_subj: Option<&'a str>,
}

impl Stored {
    /// Reads a request from the stream instead of having it delivered. Nothing where there is none.
    ///
    /// By `$JS.API.STREAM.MSG.GET` of the JetStream wire API, whose answer holds the headers as data:
    /// whoever publishes may send headers that no client library reads.
    ///
    /// # Errors
    /// The stream cannot be asked.
    pub async fn read(
        jetstream: &Context,
        stream: &str,
        place: Place<'_>,
    ) -> Result<Option<Self>, async_nats::Error> {
        #[derive(serde::Deserialize)]
        struct Answer {
            message: Option<Raw>,
            error: Option<ApiError>,
        }
        #[derive(serde::Deserialize)]
        struct Raw {
            subject: String,
            seq: u64,
            #[serde(default)]
            hdrs: String,
            #[serde(default)]
            data: String,
            time: String,
        }
        #[derive(serde::Deserialize)]
        struct ApiError {
            err_code: u64,
            #[serde(default)]
            description: String,
        }
        let subject = format!("STREAM.MSG.GET.{stream}");
        let answer: Answer = jetstream.request(subject, &place).await?;
        let raw = match answer {
            Answer { message: Some(raw), .. } => raw,
            Answer { error: Some(e), .. } if e.err_code == ErrorCode::NO_MESSAGE_FOUND.0 => {
                return Ok(None);
            }
            Answer { error: Some(e), .. } => return Err(e.description.into()),
            Answer { .. } => return Err("an answer that is none".into()),
        };
        Ok(Some(Self {
            subject: raw.subject,
            headers: readable_headers(&BASE64.decode(raw.hdrs)?),
            payload: BASE64.decode(raw.data)?.into(),
            sequence: raw.seq,
            stored_at: parse_rfc3339(&raw.time).ok_or("a time that is none")?,
            deliveries: 0,
        }))
    }
}

/// Those headers of a block that can be read; the others are left out.
fn readable_headers(block: &[u8]) -> HeaderMap {
    let text = String::from_utf8_lossy(block);
    let mut headers = HeaderMap::new();
    for line in text.split("\r\n").skip(1) {
        let Some((name, value)) = line.split_once(':') else { continue };
        let pair = (name.parse::<HeaderName>(), value.trim().parse::<HeaderValue>());
        if let (Ok(name), Ok(value)) = pair {
            headers.append(name, value);
        }
    }
    headers
}

/// A request from the stream as one of ours. The same from wherever it is read.
#[must_use]
pub fn recovered(stored: Stored) -> Message {
    let Stored { mut subject, mut headers, payload, sequence, stored_at, deliveries } = stored;
    let from = header(&headers, MOVED_FROM).map(str::to_owned);
    let message_id = header(&headers, MOVED_MSG_ID).map(str::to_owned);
    let moved_at = header(&headers, MOVED_AT).and_then(|ms| ms.parse().ok());
    let received_at = moved_at
        .and_then(|ms| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)))
        .unwrap_or(stored_at);
    let id = header(&headers, MOVED_ID).or_else(|| header(&headers, NATS_MSG_ID)).map_or_else(
        // The same wherever it is read, and another one in a stream that was made anew.
        || JobId::from_message_id(&format!("{:x}-{sequence}", nanos(stored_at))),
        JobId::from_message_id,
    );
    if header(&headers, MOVED_ID).is_some() {
        let ours = [MOVED_ID, MOVED_AT, MOVED_FROM, MOVED_MSG_ID, NATS_MSG_ID];
        headers = without(&headers, |name| ours.contains(&name));
        subject = from.unwrap_or(subject);
        if let Some(message_id) = message_id {
            headers.insert(NATS_MSG_ID, message_id);
        }
    }
    // Clocks differ: what was stored in the future has not waited.
    let waited = received_at.elapsed().unwrap_or_default();
    let size_of = |(name, values): (&HeaderName, &Vec<HeaderValue>)| -> usize {
        values.iter().map(|value| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4).sum()
    };
    let headers_size: usize = headers.iter().map(size_of).sum();
    Message {
        size: payload.len() + headers_size,
        payload,
        expires_at: expiry(&headers, received_at).unwrap_or_default(),
        headers,
        subject,
        id,
        reply: None,
        received_at,
        received: Instant::now().checked_sub(waited).unwrap_or_else(Instant::now),
        attempt: deliveries,
        sequence: Some(sequence),
        delivery: None,
        priority: None,
    }
}

/// Nanoseconds since 1970.
fn nanos(time: SystemTime) -> u128 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos()
}

/// The headers but for those whose names are not wanted.
fn without(headers: &HeaderMap, unwanted: impl Fn(&str) -> bool) -> HeaderMap {
    headers
        .iter()
        .filter(|(name, _)| !unwanted(AsRef::<str>::as_ref(name)))
        .flat_map(|(name, values)| values.iter().map(|value| (name.clone(), value.clone())))
        .collect()
}

/// The most that a request takes once it is moved.
pub(super) fn moved_size(message: &Message) -> usize {
    message.size + message.subject.len() + 2 * message.id.as_str().len() + MOVED_OVERHEAD
}

/// The headers of a request that is moved to the queue of another priority.
pub(super) fn moved_headers(message: &Message, priority: Priority) -> HeaderMap {
    let mut headers = without(&message.headers, |name| name.starts_with("Nats-Expected-"));
    if let Some(message_id) = headers.get(NATS_MSG_ID).cloned() {
        headers.insert(MOVED_MSG_ID, message_id);
    }
    headers.insert(MOVED_ID, message.id.as_str());
    headers.insert(MOVED_FROM, message.subject.as_str());
    let queued_at = message.received_at.duration_since(SystemTime::UNIX_EPOCH);
    headers.insert(MOVED_AT, queued_at.unwrap_or_default().as_millis().to_string());
    // Under the id it had, the stream would take it for the same message again; and under this
    // one it takes a second try to move it for what it is.
    let place = message.sequence.unwrap_or_default();
    headers.insert(NATS_MSG_ID, format!("{}.{place}.{priority}", message.id));
    headers
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).map(|value| value.as_str())
}
