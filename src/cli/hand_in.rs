//! Handing in a request, and what the answer to that means.

use std::time::Duration;

use anyhow::{anyhow, bail};
use async_nats::{HeaderMap, Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::answer::{Answer, ended};
use super::client::{ANSWER, Link};
use super::records;
use crate::job::JobId;
use crate::protocol::headers::encoded_length;
use crate::trace::{self, TraceContext};

/// How often a record is looked at, where the outcome comes by itself, and where it does not.
const LOOKS: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(1)];

/// The answer to a request.
#[derive(Debug)]
pub(super) enum Reply {
    /// A stream keeps it.
    Stored,
    /// It is known what became of it.
    Outcome(Answer),
    /// Nobody has it.
    Refused(String),
    /// Something else, or of a later version.
    Unknown,
}

impl Reply {
    /// Reads an answer.
    pub(super) fn of(message: &Message) -> Self {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            let why =
                "nobody takes requests: no daemon runs there, or it has another --subject-prefix";
            return Self::Refused(why.to_owned());
        }
        let Ok(json) = serde_json::from_slice::<Value>(&message.payload) else {
            return Self::Unknown;
        };
        if json.get("status").is_some() {
            return Answer::of(json).map_or(Self::Unknown, Self::Outcome);
        }
        if let Some(error) = json.get("error") {
            let why = error.get("description").and_then(Value::as_str).unwrap_or("no reason given");
            return Self::Refused(format!("the server does not take it: {why}"));
        }
        if json.get("stream").is_some() { Self::Stored } else { Self::Unknown }
    }
}

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Into a stream: the answer says that it is there.
    Stream,
    /// To a daemon: the answer is the outcome.
    Plain,
    /// That cannot be known before the answer.
    Unknown,
}

/// Whether a stream takes what is published on `subject`.
pub(super) async fn mode(link: &Link, subject: &str) -> Mode {
    let filter = json!({"subject": subject});
    let answer: Result<Value, _> = link.jetstream.request("STREAM.NAMES", &filter).await;
    match answer {
        Ok(answer) if answer.get("error").is_some() => Mode::Plain,
        Ok(answer) => match answer.get("streams").and_then(Value::as_array) {
            Some(streams) if !streams.is_empty() => Mode::Stream,
            _ => Mode::Plain,
        },
        Err(error)
            if error.kind() == async_nats::jetstream::context::RequestErrorKind::NoResponders =>
        {
            Mode::Plain
        }
        Err(_) => {
            // Some may not ask. The server's complaint about that is none of the caller's concern.
            link.news.complaints();
            Mode::Unknown
        }
    }
}

/// A request that is on its way, and where answers to it come.
pub(super) struct Sent {
    pub(super) replies: Subscriber,
}

/// Checks that a message is not too large for the server, which would hang up.
///
/// # Errors
/// It is.
pub(super) fn check_size(link: &Link, headers: &HeaderMap, payload: &[u8]) -> anyhow::Result<()> {
    let lines: Vec<(String, String)> = headers
        .iter()
        .flat_map(|(name, values)| {
            values.iter().map(|value| (name.to_string(), value.as_str().to_owned()))
        })
        .collect();
    let framing = if lines.is_empty() { 0 } else { encoded_length(&lines) };
    let (size, limit) = (payload.len() + framing, link.client.max_payload());
    if size > limit {
        bail!("the request has {size} bytes, and the server takes {limit}");
    }
    Ok(())
}

/// The headers of a request from here: those that make it a part of the trace that `TRACEPARENT` and
/// `TRACESTATE` name, where they are set.
pub(super) fn headers() -> HeaderMap {
    let [parent, state] = [trace::TRACEPARENT, trace::TRACESTATE]
        .map(|name| std::env::var(name.to_ascii_uppercase()).ok());
    let trace = TraceContext::of(|name| match name {
        trace::TRACEPARENT => parent.as_deref(),
        _ => state.as_deref(),
    });
    let mut headers = HeaderMap::new();
    for (name, value) in trace.iter().flat_map(TraceContext::headers) {
        headers.insert(name, value);
    }
    headers
}

/// Publishes a request so that answers come to `inbox`.
///
/// # Errors
/// It is too large, or the connection is gone.
pub(super) async fn send(
    link: &Link,
    subject: &str,
    inbox: String,
    headers: HeaderMap,
    payload: Bytes,
) -> anyhow::Result<Sent> {
    check_size(link, &headers, &payload)?;
    let replies = link.client.subscribe(inbox.clone()).await?;
    let subject = subject.to_owned();
    let published = if headers.is_empty() {
        link.client.publish_with_reply(subject, inbox, payload).await
    } else {
        link.client.publish_with_reply_and_headers(subject, inbox, headers, payload).await
    };
    published?;
    Ok(Sent { replies })
}

impl Sent {
    /// Waits until the request is accepted, as far as that can be known. Returns the outcome where
    /// that came first.
    ///
    /// # Errors
    /// It was not, or nobody says.
    pub(super) async fn accepted(
        &mut self,
        link: &Link,
        mode: Mode,
    ) -> anyhow::Result<Option<Answer>> {
        let reply = match mode {
            Mode::Plain => {
                // A daemon answers at the end. That nobody has it the server says at once, before
                // it answers anything that was asked later.
                link.round_trip().await?;
                match self.replies.next().now_or_never().flatten() {
                    Some(message) => Reply::of(&message),
                    None => return Ok(None),
                }
            }
            Mode::Stream | Mode::Unknown => {
                match tokio::time::timeout(ANSWER, self.replies.next()).await {
                    Ok(Some(message)) => Reply::of(&message),
                    Ok(None) => bail!("the connection is closed"),
                    Err(_) => {
                        let why = "the server does not say whether it has the request; hand it in again with the same id";
                        return Err(link.news.explain(why));
                    }
                }
            }
        };
        match reply {
            Reply::Stored => Ok(None),
            Reply::Outcome(answer) => Ok(Some(answer)),
            Reply::Refused(why) => Err(anyhow!(why)),
            Reply::Unknown => Err(anyhow!("the answer to the request is none that is known here")),
        }
    }

    /// Waits for the outcome: where it is told, and in the record of the job, where there is one.
    /// `comes` is whether it is told to whoever handed the request in.
    ///
    /// # Errors
    /// The connection is closed.
    pub(super) async fn outcome(
        mut self,
        link: &Link,
        recorded: Option<&JobId>,
        comes: bool,
    ) -> anyhow::Result<Answer> {
        let [rarely, often] = LOOKS;
        let pause = if comes { rarely } else { often };
        let mut looks = interval_at(Instant::now() + pause, pause);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = self.replies.next() => match message.as_ref().map(Reply::of) {
                    Some(Reply::Outcome(answer)) => return Ok(answer),
                    Some(_) => {}
                    None => bail!("the connection to NATS is closed"),
                },
                _ = looks.tick() => {
                    let Some(id) = recorded else { continue };
                    let record = records::look(link, id).await.ok().flatten();
                    if let Some(answer) = record.as_ref().and_then(ended) {
                        return Ok(answer);
                    }
                }
            }
        }
    }
}
