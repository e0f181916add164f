//! Outcomes on their way out.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::Context;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use futures::FutureExt;
use tokio_util::sync::CancellationToken;

use crate::capture::Stream;
use crate::job::{JobError, JobId, Outcome};
use crate::live::{Chunk, End, LiveLog};
use crate::nats::Connection;
use crate::protocol::dead_letter::{DeadLetter, Undelivered, dead_letter};
use crate::protocol::outcome::ResultMessage;
use crate::protocol::record::Record;
use crate::protocol::{Subjects, by_id, headers, outcome};
use crate::retry::Backoff;
use crate::source::Message;
use crate::topology::Topology;
use crate::trace::TraceContext;

/// Publishes outcomes. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    connection: Connection,
    subjects: Subjects,
    streams: Option<Streams>,
}

/// The streams that keep what is published.
#[derive(Clone)]
struct Streams {
    jetstream: Context,
    topology: Arc<Topology>,
}

/// Delays between tries to store what JetStream does not take.
const TROUBLE: Backoff =
    Backoff { first: Duration::from_millis(250), most: Duration::from_secs(10) };

/// The most bytes of live output in one message.
const MAX_CHUNK: usize = 64 << 10;
/// A server's own framing of a message that is published to a stream, and headers the client adds.
const ENVELOPE: usize = 512;

/// How long subscribers may take to come back after an outage: NATS' client libraries wait up to two
/// seconds between their tries by default.
const SUBSCRIBERS_RETURN: Duration = Duration::from_secs(3);

/// Where an outcome goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// To the results subject, raw with headers.
    pub results: bool,
    /// To these subjects, as JSON. Checked before they get here.
    pub replies: Vec<String>,
    /// The trace that is named there.
    pub trace: Option<TraceContext>,
}

impl Publisher {
    /// A publisher under these subjects.
    #[must_use]
    pub fn new(connection: Connection, subjects: &Subjects) -> Self {
        Self { connection, subjects: subjects.clone(), streams: None }
    }

    /// The same, on streams that keep outcomes and dead letters.
    #[must_use]
    pub fn durable(self, jetstream: Context, topology: Arc<Topology>) -> Self {
        Self { streams: Some(Streams { jetstream, topology }), ..self }
    }

    /// The most bytes of a message, its headers included.
    #[must_use]
    pub fn max_payload(&self) -> usize {
        self.connection.client.max_payload()
    }

    /// The most bytes of an outcome's JSON.
    #[must_use]
    pub fn json_limit(&self) -> usize {
        self.connection.client.max_payload().saturating_sub(ENVELOPE)
    }

    /// Stores the result in its stream, again until the server has confirmed it; waits for as long
    /// as it takes, and the caller bounds the wait. The stream recognises what it has by the
    /// job's id.
    pub async fn store(&self, id: &JobId, result: ResultMessage) {
        let ResultMessage { headers, body } = result;
        self.keep(id, &self.subjects.results, header_map(headers), body).await;
    }

    /// Publishes the request as a dead letter: into its stream where there is one, again until the
    /// server has confirmed it.
    pub async fn bury(
        &self,
        message: &Message,
        id: &JobId,
        image: Option<&str>,
        attempts: u32,
        error: &JobError,
    ) {
        let headers: Vec<(String, String)> = message
            .headers
            .iter()
            .flat_map(|(name, values)| {
                values.iter().map(|value| (name.to_string(), value.as_str().to_owned()))
            })
            .collect();
        let request = Undelivered {
            payload: &message.payload,
            headers: &headers,
            id,
            image,
            error,
            attempts,
            subject: &message.subject,
            queued_at: message.received_at,
        };
        let limit = self.connection.client.max_payload();
        let DeadLetter { headers, body, .. } = dead_letter(&request, SystemTime::now(), limit);
        self.keep(id, &self.subjects.dead_letters, header_map(headers), body).await;
    }

    /// Publishes into the stream behind `subject`, or where there is none, to whoever listens.
    async fn keep(&self, job: &JobId, subject: &str, headers: HeaderMap, body: Bytes) {
        let Some(Streams { jetstream, topology }) = &self.streams else {
            let published =
                self.connection.client.publish_with_headers(subject.to_owned(), headers, body);
            if let Err(error) = published.await {
                tracing::error!(%job, subject, %error, "could not publish");
            }
            return;
        };
        for failures in 1u32.. {
            self.connection.connected().await;
            let publish =
                jetstream.publish_with_headers(subject.to_owned(), headers.clone(), body.clone());
            let error = match publish.await {
                Ok(confirmation) => match confirmation.await {
                    Ok(_) => return,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            // Full stores and lost leaders pass; until then the job keeps its slot and its lease.
            if failures == 1 || failures.is_multiple_of(20) {
                tracing::warn!(%job, subject, %error, "JetStream did not confirm a message; it is sent again");
            }
            if error.kind() == PublishErrorKind::StreamNotFound || failures > 1 {
                let _ = topology.mend(jetstream).await;
            }
            tokio::time::sleep(TROUBLE.delay(failures)).await;
        }
    }

    /// Publishes a job's record to whoever listens.
    pub async fn event(&self, record: &Record) {
        let subject = self.subjects.events(&record.id);
        if let Err(error) = self.connection.client.publish(subject, record.encode()).await {
            tracing::debug!(job = %record.id, %error, "could not publish an event");
        }
    }

    /// Publishes what a function prints while it runs; at most `limit` bytes of it wait here.
    #[must_use]
    pub fn live_log(&self, id: &JobId, attempt: u32, limit: usize) -> LiveLog {
        let client = self.connection.client.clone();
        let subjects =
            [Stream::Stdout, Stream::Stderr].map(|s| Subject::from(self.subjects.logs(id, s)));
        let [stdout, stderr] = subjects;
        let id = id.clone();
        let max_chunk = client.max_payload().saturating_sub(ENVELOPE).min(MAX_CHUNK);
        let publish = move |stream, chunk: Chunk| {
            let subject = match stream {
                Stream::Stdout => stdout.clone(),
                Stream::Stderr => stderr.clone(),
            };
            let headers = header_map(live_headers(&id, attempt, &chunk));
            let client = client.clone();
            async move {
                if let Err(error) = client.publish_with_headers(subject, headers, chunk.bytes).await
                {
                    tracing::debug!(%error, "could not publish live output");
                }
                // Only what is on the wire makes room for more.
                let _ = client.flush().await;
            }
            .boxed()
        };
        LiveLog::start(publish, limit, max_chunk)
    }

    /// Sends the JSON of an outcome to those who asked for it.
    pub async fn reply(&self, job: &JobId, json: &Bytes, route: &Route) {
        let client = &self.connection.client;
        for reply in &route.replies {
            let (subject, json) = (reply.clone(), json.clone());
            let published = match &route.trace {
                None => client.publish(subject, json).await,
                trace => {
                    let headers = header_map(headers::of_trace(trace.as_ref()).collect());
                    client.publish_with_headers(subject, headers, json).await
                }
            };
            if let Err(error) = published {
                tracing::error!(%job, reply, %error, "could not reply");
            }
        }
    }

    /// Answers a request that is not about running a job. A `refusal` is also told in the headers
    /// that clients of NATS services look at.
    ///
    /// Nothing is sent where the daemon may publish and its callers may not.
    pub async fn answer(&self, to: Option<Subject>, answer: &Result<Bytes, JobError>) {
        let Some(to) = to else { return };
        if let Err(why) = self.subjects.check_reply(&to) {
            tracing::warn!(reply = ?to, %why, "no answer is sent there");
            return;
        }
        let client = &self.connection.client;
        let published = match answer {
            Ok(answer) => client.publish(to, answer.clone()).await,
            Err(error) => {
                let headers = header_map(headers::of_refusal(error));
                client.publish_with_headers(to, headers, by_id::refusal(error)).await
            }
        };
        if let Err(error) = published {
            tracing::warn!(%error, "could not answer a request");
        }
    }

    /// Publishes `outcome` along `route`, again where the connection broke before the server
    /// confirmed it: the receiver can tell by the id. Waits for a server where there is none, for
    /// as long as it takes; the caller bounds the wait.
    ///
    /// What cannot be sent at all is logged with the job's id: there is nobody else to tell.
    ///
    /// Once `hurry` is cancelled, subscribers are no longer waited for.
    pub async fn publish(&self, outcome: &Outcome, route: &Route, hurry: &CancellationToken) {
        let mut unbroken = true;
        loop {
            unbroken &= self.connection.connected().await;
            if !unbroken {
                // Those who wait for it were cut off as well, and plain NATS keeps nothing.
                tokio::select! {
                    () = tokio::time::sleep(SUBSCRIBERS_RETURN) => {}
                    () = hurry.cancelled() => {}
                }
                if !self.connection.connected().await {
                    continue;
                }
            }
            unbroken = false;
            let epoch = self.connection.epoch();
            self.send(outcome, route).await;
            crate::stage!("sent", outcome.id);
            if self.connection.confirmed(epoch).await {
                crate::stage!("confirmed", outcome.id);
                return;
            }
            tracing::warn!(job = %outcome.id, "the connection broke before the outcome was confirmed; it is sent again");
        }
    }

    async fn send(&self, outcome: &Outcome, route: &Route) {
        let client = &self.connection.client;
        // The server closes the connection of who sends more, and everybody's results with it.
        let limit = client.max_payload();
        let job = &outcome.id;
        if !route.replies.is_empty() {
            let trace: Vec<_> = headers::of_trace(route.trace.as_ref()).collect();
            let around = if trace.is_empty() { 0 } else { headers::encoded_length(&trace) };
            match outcome::json(outcome, limit.saturating_sub(around)) {
                Ok(json) => self.reply(job, &json, route).await,
                Err(error) => tracing::error!(%job, %error, "could not reply"),
            }
        }
        if route.results {
            let message = outcome::result_message(outcome, limit);
            let headers = header_map(message.headers);
            let results = self.subjects.results.clone();
            let published = client.publish_with_headers(results, headers, message.body).await;
            if let Err(error) = published {
                tracing::error!(%job, %error, "could not publish the result");
            }
        }
    }
}

fn live_headers(id: &JobId, attempt: u32, chunk: &Chunk) -> Vec<(&'static str, String)> {
    let mut headers = vec![
        (headers::JOB_ID, id.to_string()),
        (headers::JOB_ATTEMPT, attempt.to_string()),
        (headers::SEQ, chunk.seq.to_string()),
        (headers::OFFSET, chunk.offset.to_string()),
    ];
    if let Some(End { dropped }) = chunk.end {
        headers.push((headers::END, "true".to_owned()));
        if dropped > 0 {
            headers.push((headers::DROPPED_BYTES, dropped.to_string()));
        }
    }
    headers
}

fn header_map<N: AsRef<str>>(headers: Vec<(N, String)>) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(name.as_ref(), value);
    }
    map
}
