//! What durable delivery keeps in JetStream, seen from outside: with the API as the server
//! documents it, and none of the daemon's code.
//!
//! Every call may fail, and says so within seconds: most who look here do so while something is
//! being done to the server.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind};
use async_nats::{Client, HeaderMap, Subject};
use bytes::Bytes;
use serde_json::{Value, json};

use super::wait::{PATIENCE, within};

pub(crate) use super::jetstream::{DEAD_LETTERS, QUEUE, RESULTS};
pub(crate) const ADVISORIES: &str = "functions_advisories";
/// The stream behind the bucket of the records.
const JOBS: &str = "KV_functions_jobs";
/// The queue's consumers, one for each priority.
pub(crate) const CONSUMERS: [&str; 3] =
    ["worker-spawners_high", "worker-spawners", "worker-spawners_low"];
/// The subject of requests of the usual priority.
pub(crate) const EXECUTE: &str = "functions.execute";

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long to wait for a message to take.
const PULL: Duration = Duration::from_secs(1);
/// The server's word for "there is no message of this number".
const NOT_FOUND: usize = 404;

/// Why there was no answer, or what it said instead.
pub(crate) type Trouble = String;

/// What the server says of a message it has stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) sequence: u64,
    /// It had it already.
    pub(crate) duplicate: bool,
}

/// A way to the streams.
#[derive(Clone)]
pub(crate) struct Streams {
    client: Client,
    /// Results and dead letters that have been read: neither changes once it is stored.
    results: Arc<Mutex<Read>>,
    dead_letters: Arc<Mutex<Read>>,
}

/// As much of a stream as has been read.
#[derive(Default)]
struct Read {
    messages: Vec<StreamMessage>,
    next: u64,
}

impl Streams {
    pub(crate) fn new(client: &Client) -> Self {
        Self { client: client.clone(), results: Arc::default(), dead_letters: Arc::default() }
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Asks the server's API.
    pub(crate) async fn api(&self, call: &str, body: Value) -> Result<Value, Trouble> {
        let body = if body.is_null() { Bytes::new() } else { body.to_string().into() };
        self.ask(format!("$JS.API.{call}"), HeaderMap::new(), body).await
    }

    async fn ask(
        &self,
        subject: String,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Value, Trouble> {
        let asked = self.client.request_with_headers(subject, headers, body);
        let answer = tokio::time::timeout(ANSWER, asked)
            .await
            .map_err(|_| "no answer".to_string())?
            .map_err(|error| error.to_string())?;
        let answer: Value =
            serde_json::from_slice(&answer.payload).map_err(|error| error.to_string())?;
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer),
        }
    }

    /// Publishes a request to `subject`, and waits until the stream has it.
    pub(crate) async fn publish(
        &self,
        subject: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Stored, Trouble> {
        let answer = self.ask(subject.to_string(), headers, body).await?;
        let sequence = answer["seq"].as_u64().ok_or_else(|| format!("no PubAck: {answer}"))?;
        Ok(Stored { sequence, duplicate: answer["duplicate"] == json!(true) })
    }

    /// Publishes the request of the job `id` to `subject` until the stream has it: once, however often
    /// it takes.
    pub(crate) async fn submit(&self, subject: &str, id: &str, request: &Value) -> Stored {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id);
        within(&format!("{id} is accepted"), PATIENCE, async {
            loop {
                let body = request.to_string().into();
                if let Ok(stored) = self.publish(subject, headers.clone(), body).await {
                    return stored;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        })
        .await
    }

    /// State and configuration of a stream.
    pub(crate) async fn info(&self, stream: &str) -> Result<Value, Trouble> {
        self.api(&format!("STREAM.INFO.{stream}"), Value::Null).await
    }

    /// How many messages there are in a stream.
    pub(crate) async fn count(&self, stream: &str) -> Result<u64, Trouble> {
        let info = self.info(stream).await?;
        info["state"]["messages"].as_u64().ok_or_else(|| format!("no count: {info}"))
    }

    pub(crate) async fn consumer(&self, stream: &str, name: &str) -> Result<Value, Trouble> {
        self.api(&format!("CONSUMER.INFO.{stream}.{name}"), Value::Null).await
    }

    /// How many requests the consumers of the queue have yet to deliver or to hear of.
    pub(crate) async fn backlog(&self) -> Result<u64, Trouble> {
        let mut backlog = 0;
        for name in CONSUMERS {
            let info = self.consumer(QUEUE, name).await?;
            let counts = [&info["num_pending"], &info["num_ack_pending"]];
            backlog += counts.iter().filter_map(|count| count.as_u64()).sum::<u64>();
        }
        Ok(backlog)
    }

    /// Takes a message as a worker does, if one comes soon: where to say what becomes of it.
    pub(crate) async fn pull(&self, stream: &str, consumer: &str) -> Option<Subject> {
        let call = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        let body = json!({"batch": 1, "expires": PULL.as_nanos()}).to_string();
        // Not every server answers one who has waited in vain.
        let asked = tokio::time::timeout(2 * PULL, self.client.request(call, body.into()));
        asked.await.ok()?.unwrap().reply
    }

    pub(crate) async fn delete_consumer(&self, stream: &str, name: &str) -> Result<(), Trouble> {
        self.api(&format!("CONSUMER.DELETE.{stream}.{name}"), Value::Null).await.map(|_| ())
    }

    pub(crate) async fn delete_stream(&self, stream: &str) -> Result<(), Trouble> {
        self.api(&format!("STREAM.DELETE.{stream}"), Value::Null).await.map(|_| ())
    }

    pub(crate) async fn purge(&self, stream: &str) -> Result<(), Trouble> {
        self.api(&format!("STREAM.PURGE.{stream}"), Value::Null).await.map(|_| ())
    }

    /// All results, in the stream's order.
    pub(crate) async fn results(&self) -> Result<Vec<StreamMessage>, Trouble> {
        self.read(RESULTS, &self.results).await
    }

    /// All dead letters, in the stream's order.
    pub(crate) async fn dead_letters(&self) -> Result<Vec<StreamMessage>, Trouble> {
        self.read(DEAD_LETTERS, &self.dead_letters).await
    }

    /// All messages of another stream, in its order.
    pub(crate) async fn messages(&self, stream: &str) -> Result<Vec<StreamMessage>, Trouble> {
        self.read(stream, &Mutex::default()).await
    }

    /// Reads on from where the last one ended.
    async fn read(&self, stream: &str, read: &Mutex<Read>) -> Result<Vec<StreamMessage>, Trouble> {
        let context = jetstream::new(self.client.clone());
        let found = tokio::time::timeout(ANSWER, context.get_stream(stream));
        let found = found.await.map_err(|_| "no answer")?.map_err(|error| error.to_string())?;
        let state = &found.cached_info().state;
        let mut next = read.lock().unwrap().next.max(state.first_sequence).max(1);
        while next <= state.last_sequence {
            let got = tokio::time::timeout(ANSWER, found.get_raw_message(next));
            let message = match got.await.map_err(|_| "no answer")? {
                Ok(message) => Some(message),
                Err(error) if is_not_found(&error) => None,
                Err(error) => return Err(error.to_string()),
            };
            next += 1;
            let mut read = read.lock().unwrap();
            // Somebody else may have read on meanwhile.
            if read.next < next {
                read.next = next;
                read.messages.extend(message);
            }
        }
        Ok(read.lock().unwrap().messages.clone())
    }

    /// The results of the job `id`.
    pub(crate) async fn results_of(&self, id: &str) -> Result<Vec<StreamMessage>, Trouble> {
        let mut all = self.results().await?;
        all.retain(|message| header(message, "Job-Id") == id);
        Ok(all)
    }

    /// Waits for a result of the job `id`, and returns the first.
    pub(crate) async fn result(&self, id: &str) -> StreamMessage {
        within(&format!("a result of {id}"), PATIENCE, async {
            loop {
                if let Some(first) =
                    self.results_of(id).await.unwrap_or_default().into_iter().next()
                {
                    return first;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await
    }

    /// What the bucket has about the job `id`.
    pub(crate) async fn record(&self, id: &str) -> Result<Option<Value>, Trouble> {
        let context = jetstream::new(self.client.clone());
        let got = async {
            let stream = context.get_stream_no_info(JOBS).await.map_err(|e| e.to_string())?;
            match stream.get_last_raw_message_by_subject(&format!("$KV.functions_jobs.{id}")).await
            {
                Ok(message) => Ok(serde_json::from_slice(&message.payload).ok()),
                Err(error) if is_not_found(&error) => Ok(None),
                Err(error) => Err(error.to_string()),
            }
        };
        tokio::time::timeout(ANSWER, got).await.map_err(|_| "no answer".to_string())?
    }

    /// Waits until the record of the job `id` is as wanted, and returns it.
    pub(crate) async fn recorded(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        within(&format!("the record of {id} is as it should be"), PATIENCE, async {
            loop {
                if let Ok(Some(record)) = self.record(id).await
                    && wanted(&record)
                {
                    return record;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await
    }

    /// Waits until every request has been settled.
    pub(crate) async fn settled(&self) {
        self.settled_within(PATIENCE).await;
    }

    /// Waits until so many requests are left in the queue.
    pub(crate) async fn left(&self, requests: u64) {
        super::wait::eventually(&format!("{requests} requests are in the queue"), || async {
            self.count(QUEUE).await == Ok(requests)
        })
        .await;
    }

    pub(crate) async fn settled_within(&self, patience: Duration) {
        super::wait::eventually_within("the queue is empty", patience, || async {
            self.count(QUEUE).await == Ok(0)
        })
        .await;
    }

    /// Asks to cancel a job.
    pub(crate) async fn cancel(&self, id: &str) -> Result<Value, Trouble> {
        self.ask("functions.cancel".into(), HeaderMap::new(), id.to_string().into()).await
    }
}

fn is_not_found(error: &RawMessageError) -> bool {
    match error.kind() {
        RawMessageErrorKind::NoMessageFound => true,
        RawMessageErrorKind::JetStream(error) => error.code() == NOT_FOUND,
        _ => false,
    }
}

/// The value of a stored message's header, or nothing.
pub(crate) fn header(message: &StreamMessage, name: &str) -> String {
    message.headers.get(name).map(|value| value.as_str().to_string()).unwrap_or_default()
}
