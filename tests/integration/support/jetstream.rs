//! What durable delivery keeps, as anybody with a NATS client can look at it.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::context::{Context, PublishError};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use async_nats::jetstream::{self, consumer};
use async_nats::{Client, HeaderMap, Message};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;
use tokio::io::AsyncReadExt;

use super::results::{Results, header};
use super::specification;
use super::wait::{PATIENCE, within};

pub(crate) const QUEUE: &str = "functions_queue";
pub(crate) const RESULTS: &str = "functions_results";
pub(crate) const DEAD_LETTERS: &str = "functions_dead_letters";
pub(crate) const JOBS: &str = "functions_jobs";
pub(crate) const OBJECTS: &str = "functions_objects";

/// The fields of a record that are not the outcome's.
const OF_RECORDS_ONLY: [&str; 11] = [
    "state",
    "pulling_at",
    "running_at",
    "updated_at",
    "retry_at",
    "cancel_requested_at",
    "pull",
    "sequence",
    "claim",
    "delivery",
    "interleaving",
];

/// The streams and the buckets. What waits bears with a server that is away; what does not wait
/// fails the test then.
#[derive(Clone)]
pub(crate) struct Ledger {
    context: Context,
}

impl Ledger {
    pub(crate) fn new(client: &Client) -> Self {
        Self { context: jetstream::new(client.clone()) }
    }

    /// Publishes, and says whether a stream has it.
    pub(crate) async fn offer(
        &self,
        subject: &str,
        payload: Bytes,
        headers: HeaderMap,
    ) -> Result<PublishAck, PublishError> {
        self.context.publish_with_headers(subject.to_string(), headers, payload).await?.await
    }

    /// Publishes a request, and returns once the stream has it.
    pub(crate) async fn publish_acked(
        &self,
        subject: &str,
        request: &Value,
        headers: HeaderMap,
    ) -> PublishAck {
        self.offer(subject, request.to_string().into(), headers).await.unwrap()
    }

    /// All messages in `stream`, the oldest first. Nobody else sees them differently for it.
    pub(crate) async fn messages(&self, stream: &str) -> Vec<Message> {
        self.messages_from(stream, 0)
            .await
            .unwrap()
            .into_iter()
            .map(|(_, message)| message)
            .collect()
    }

    pub(crate) async fn results(&self) -> Vec<Message> {
        self.messages(RESULTS).await
    }

    pub(crate) async fn dead_letters(&self) -> Vec<Message> {
        self.messages(DEAD_LETTERS).await
    }

    /// How many results each job has.
    pub(crate) async fn tally(&self) -> HashMap<String, usize> {
        let mut tally = HashMap::new();
        for message in self.results().await {
            *tally.entry(header(&message, "Job-Id").unwrap_or_default()).or_default() += 1;
        }
        tally
    }

    /// Waits for the result of the job `id`.
    pub(crate) async fn result(&self, id: &str) -> Message {
        self.about(RESULTS, id).await
    }

    /// Waits for the dead letter of the job `id`.
    pub(crate) async fn dead_letter(&self, id: &str) -> Message {
        self.about(DEAD_LETTERS, id).await
    }

    /// What is known of the job `id`.
    pub(crate) async fn record(&self, id: &str) -> Option<Value> {
        self.look_up(id).await.unwrap()
    }

    /// Waits until the record of the job `id` `matches`.
    pub(crate) async fn record_when(&self, id: &str, matches: impl Fn(&Value) -> bool) -> Value {
        let what = format!("the record of {id} is as it should be");
        patiently(&what, async || self.look_up(id).await.ok().flatten().filter(&matches)).await
    }

    /// Waits until the job `id` has ended, and returns its outcome.
    pub(crate) async fn outcome(&self, id: &str) -> Value {
        let mut outcome = self.record_when(id, |record| record["state"] == "ended").await;
        let fields = outcome.as_object_mut().unwrap();
        fields.retain(|name, _| !OF_RECORDS_ONLY.contains(&name.as_str()));
        outcome
    }

    /// Waits until it is known which job the request became that the queue has under that number.
    pub(crate) async fn job_of(&self, sequence: u64) -> String {
        patiently(&format!("a record of the request {sequence}"), async || {
            let records = self.messages_from(&format!("KV_{JOBS}"), 0).await.ok()?;
            let mut records = records
                .iter()
                .filter_map(|(_, record)| serde_json::from_slice::<Value>(&record.payload).ok());
            let record = records.find(|record| record["sequence"] == sequence)?;
            record["id"].as_str().map(str::to_string)
        })
        .await
    }

    /// How many requests the stream has: those that wait, and those that are being worked on.
    pub(crate) async fn queue_messages(&self) -> u64 {
        self.stream(QUEUE).await.unwrap().cached_info().state.messages
    }

    /// Waits until every request is settled. The consumers are asked, since a 2.9 server that was
    /// killed shows what they had settled in the stream again, for ever.
    pub(crate) async fn settled(&self) {
        patiently("no consumer has a request left", async || {
            let queue = self.stream(QUEUE).await.ok()?;
            let consumers: Vec<consumer::Info> = queue.consumers().try_collect().await.ok()?;
            let done = |consumer: &consumer::Info| {
                consumer.num_pending == 0 && consumer.num_ack_pending == 0
            };
            (!consumers.is_empty() && consumers.iter().all(done)).then_some(())
        })
        .await;
    }

    /// What the server says of a consumer of the requests.
    pub(crate) async fn consumer_info(&self, name: &str) -> consumer::Info {
        self.stream(QUEUE).await.unwrap().consumer_info(name).await.unwrap()
    }

    /// The object of that name, such as a job's whole output.
    pub(crate) async fn object(&self, name: &str) -> Option<Vec<u8>> {
        let bucket = self.context.get_object_store(OBJECTS).await.unwrap();
        let mut object = bucket.get(name).await.ok()?;
        let mut content = Vec::new();
        object.read_to_end(&mut content).await.unwrap();
        Some(content)
    }

    async fn stream(&self, name: &str) -> Result<Stream, async_nats::Error> {
        Ok(self.context.get_stream(name).await?)
    }

    async fn look_up(&self, id: &str) -> Result<Option<Value>, async_nats::Error> {
        let value = self.context.get_key_value(JOBS).await?.get(id).await?;
        Ok(value.map(|json| serde_json::from_slice(&json)).transpose()?)
    }

    /// Waits for a message about the job `id` in `stream`.
    async fn about(&self, stream: &str, id: &str) -> Message {
        let mut next = 0;
        patiently(&format!("a message about {id} in {stream}"), async || {
            let messages = self.messages_from(stream, next).await.unwrap_or_default();
            next = messages.last().map_or(next, |(sequence, _)| sequence + 1);
            let mut messages = messages.into_iter().map(|(_, message)| message);
            messages.find(|message| header(message, "Job-Id").as_deref() == Some(id))
        })
        .await
    }

    /// The messages from a sequence number on, each with its own. They are looked up one by one,
    /// since requests may have no second consumer.
    async fn messages_from(
        &self,
        name: &str,
        sequence: u64,
    ) -> Result<Vec<(u64, Message)>, async_nats::Error> {
        let stream = &self.stream(name).await?;
        let state = &stream.cached_info().state;
        // The first number of a stream that never held a message is 0 or 1.
        let numbers = state.first_sequence.max(sequence).max(1)..=state.last_sequence;
        let found = futures::stream::iter(numbers).map(|number| async move {
            match stream.get_raw_message(number).await {
                Ok(message) => Ok(Some((number, as_received(message)))),
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
                Err(error) => Err(error),
            }
        });
        let found: Vec<_> = found.buffered(64).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }
}

/// A stored message in the form in which a subscriber gets it.
fn as_received(message: StreamMessage) -> Message {
    Message {
        subject: message.subject,
        reply: None,
        length: message.payload.len(),
        payload: message.payload,
        headers: Some(message.headers),
        status: None,
        description: None,
    }
}

/// The changes of one job, as they are told.
pub(crate) struct Events(Results);

impl Events {
    /// Listens from now on to what is told of the job `id`.
    pub(crate) async fn of(client: &Client, id: &str) -> Self {
        Self(Results::subscribe(client, &format!("functions.events.{id}")).await)
    }

    pub(crate) fn all(&self) -> Vec<Value> {
        let messages = self.0.all();
        let events = messages.iter().map(|event| serde_json::from_slice(&event.payload).unwrap());
        events.inspect(specification::assert_event).collect()
    }

    /// The states in the order in which they were told; one that was told again is there again.
    pub(crate) fn states(&self) -> Vec<String> {
        let events = self.all();
        events.iter().map(|event| event["state"].as_str().unwrap_or_default().into()).collect()
    }

    /// Waits for an event of that state, and returns the first.
    pub(crate) async fn wait_for(&self, state: &str) -> Value {
        patiently(&format!("an event of the state {state}"), async || {
            self.all().into_iter().find(|event| event["state"] == state)
        })
        .await
    }
}

/// Asks until there is an answer.
async fn patiently<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    within(what, PATIENCE, async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}
