//! Dead letters as they are kept.

use async_nats::jetstream::stream::Stream;
use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::cli::client::Link;
use crate::cli::print;
use crate::job::printable;
use crate::protocol::dead_letter::{AT, ATTEMPTS, MESSAGE, QUEUED_AT, REASON, SUBJECT, TRUNCATED};
use crate::protocol::headers::{JOB_ID, JOB_IMAGE};
use crate::protocol::time::rfc3339;
use crate::source::jetstream::{Place, Stored};

/// The most of a header that is shown, in bytes.
const MAX_HEADER: usize = 4096;

/// The dead letters, the oldest first.
pub(super) struct Letters<'a> {
    link: &'a Link,
    stream: Stream,
    next: u64,
}

/// A request that could not be run.
pub(super) struct Letter(Stored);

impl<'a> Letters<'a> {
    /// # Errors
    /// There is no stream of them.
    pub(super) async fn open(link: &'a Link, command: &str) -> anyhow::Result<Self> {
        let stream = link.stream(command, &link.names.dead_letters).await?;
        Ok(Self { link, stream, next: 1 })
    }

    /// The next one. They are read one by one, since whoever publishes may send headers that the
    /// client library does not read.
    ///
    /// # Errors
    /// They cannot be read.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Letter>> {
        let subject = self.link.subjects.dead_letters.as_str();
        let place = Place { seq: self.next, next_by_subj: Some(subject) };
        let stored = Stored::read(&self.link.jetstream, &self.link.names.dead_letters, place).await;
        let stored = stored
            .map_err(|e| self.link.news.explain(format!("dead letters cannot be read: {e}")))?;
        let Some(stored) = stored else { return Ok(None) };
        self.next = stored.sequence + 1;
        Ok(Some(Letter(stored)))
    }

    /// The place of the last one there was when this was opened.
    pub(super) fn last(&self) -> u64 {
        self.stream.cached_info().state.last_sequence
    }

    /// Removes one.
    ///
    /// # Errors
    /// The server does not.
    pub(super) async fn remove(&self, letter: &Letter) -> anyhow::Result<()> {
        let removed = self.stream.delete_message(letter.0.sequence).await;
        removed.map(|_| ()).map_err(|e| {
            self.link
                .news
                .explain(format!("the dead letter of {} cannot be removed: {e}", letter.id()))
        })
    }
}

impl Letter {
    #[cfg(test)]
    pub(super) fn of(headers: &[(&str, &str)], body: &'static str) -> Self {
        let mut map = async_nats::HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        Self(Stored {
            subject: "functions.dead_letters".to_owned(),
            headers: map,
            payload: Bytes::from_static(body.as_bytes()),
            sequence: 7,
            stored_at: std::time::SystemTime::UNIX_EPOCH,
            deliveries: 0,
        })
    }

    /// A header; empty where it has none of that name.
    pub(super) fn header(&self, name: &str) -> &str {
        self.0.headers.get(name).map(|value| value.as_str()).unwrap_or_default()
    }

    /// Its place in the stream.
    pub(super) fn sequence(&self) -> u64 {
        self.0.sequence
    }

    pub(super) fn id(&self) -> &str {
        self.header(JOB_ID)
    }

    pub(super) fn reason(&self) -> &str {
        self.header(REASON)
    }

    /// Where the request was published.
    pub(super) fn subject(&self) -> &str {
        self.header(SUBJECT)
    }

    pub(super) fn truncated(&self) -> bool {
        self.header(TRUNCATED) == "true"
    }

    pub(super) fn body(&self) -> Bytes {
        self.0.payload.clone()
    }

    pub(super) fn cells(&self) -> Vec<String> {
        let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        vec![
            or_none(self.id()),
            print::age(Some(self.0.stored_at)),
            or_none(self.reason()),
            or_none(self.header(JOB_IMAGE)),
            self.header(MESSAGE).to_owned(),
        ]
    }

    pub(super) fn json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("sequence".to_owned(), json!(self.0.sequence));
        fields.insert("stored_at".to_owned(), json!(rfc3339(self.0.stored_at)));
        fields.insert("bytes".to_owned(), json!(self.0.payload.len()));
        for (name, header) in [
            ("id", JOB_ID),
            ("image", JOB_IMAGE),
            ("reason", REASON),
            ("message", MESSAGE),
            ("attempts", ATTEMPTS),
            ("subject", SUBJECT),
            ("queued_at", QUEUED_AT),
            ("given_up_at", AT),
        ] {
            let value = self.header(header);
            if !value.is_empty() {
                fields.insert(name.to_owned(), json!(value));
            }
        }
        Value::Object(fields)
    }

    /// The headers, one a line, and an empty line.
    pub(super) fn headers(&self) -> String {
        let mut lines: Vec<String> = self
            .0
            .headers
            .iter()
            .flat_map(|(name, values)| {
                values.iter().map(move |value| {
                    format!("{name}: {}\n", printable(value.as_str(), MAX_HEADER))
                })
            })
            .collect();
        lines.sort();
        lines.push("\n".to_owned());
        lines.concat()
    }
}
