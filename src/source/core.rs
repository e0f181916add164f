//! Requests from plain NATS: a queue-group subscription, and a buffer for what the server pushes
//! before there is a slot.
//!
//! Plain NATS keeps nothing: what waits here is lost if the process is killed.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_nats::Subscriber;
use async_trait::async_trait;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::buffer::{Buffer, Limits};
use super::{Closed, Delivery, Message, Settle, Source, expiry};
use crate::job::{JobId, Priority};
use crate::nats::Connection;
use crate::protocol::Subjects;
use crate::protocol::headers::NATS_MSG_ID;

/// How many refused messages may wait to be answered. Beyond it they are only counted: whoever
/// floods a full buffer gets no buffer for the answers.
const REFUSED_CAPACITY: usize = 64;

/// Queue-group subscriptions with their buffer.
pub struct CoreSource {
    buffer: Arc<Buffer>,
    intakes: Vec<AbortOnDropHandle<()>>,
    closing: CancellationToken,
}

/// Why there is no subscription.
pub type SubscribeError = async_nats::SubscribeError;

impl CoreSource {
    /// Subscribes to the requests of every priority. Messages that find the buffer full come out of
    /// the second value.
    ///
    /// # Errors
    /// The client is closed.
    pub async fn subscribe(
        connection: &Connection,
        subjects: &Subjects,
        queue_group: &str,
        limits: Limits,
    ) -> Result<(Self, mpsc::Receiver<Message>), SubscribeError> {
        let buffer = Arc::new(Buffer::new(limits));
        let (refused, refusals) = mpsc::channel(REFUSED_CAPACITY);
        let closing = CancellationToken::new();
        let mut intakes = Vec::new();
        for priority in Priority::ALL {
            let subject = subjects.execute_at(priority);
            let subscriber =
                connection.client.queue_subscribe(subject, queue_group.to_owned()).await?;
            let intake = Intake {
                priority,
                buffer: buffer.clone(),
                connection: connection.clone(),
                refused: refused.clone(),
                overflow: Overflow::default(),
            };
            let task = tokio::spawn(intake.run(subscriber, closing.clone()));
            intakes.push(AbortOnDropHandle::new(task));
        }
        Ok((Self { buffer, intakes, closing }, refusals))
    }

    /// Where requests wait.
    #[must_use]
    pub fn buffer(&self) -> Arc<Buffer> {
        self.buffer.clone()
    }
}

#[async_trait]
impl Source for CoreSource {
    async fn ready(&mut self) {
        self.buffer.ready().await;
    }

    async fn next(&mut self) -> Delivery {
        let message = self.buffer.pop().await;
        let settle = Box::new(Requeue { message: message.clone(), buffer: self.buffer.clone() });
        Delivery { message, settle }
    }

    async fn close(&mut self) -> Vec<Message> {
        self.closing.cancel();
        let ended = futures::future::join_all(self.intakes.drain(..));
        // They end by themselves once the server has stopped pushing; those that cannot are aborted.
        let _ = tokio::time::timeout(Duration::from_secs(5), ended).await;
        self.buffer.close();
        self.buffer.drain()
    }
}

/// Moves messages from the client's channel to the buffer, so that the socket is always read.
struct Intake {
    priority: Priority,
    buffer: Arc<Buffer>,
    connection: Connection,
    refused: mpsc::Sender<Message>,
    overflow: Overflow,
}

impl Intake {
    async fn run(mut self, mut subscriber: Subscriber, closing: CancellationToken) {
        let mut count = 0;
        loop {
            tokio::select! {
                message = subscriber.next() => match message {
                    Some(message) => {
                        count += 1;
                        self.take(received(message));
                    }
                    None => return,
                },
                () = closing.cancelled() => break,
            }
        }
        let connection = self.connection.clone();
        connection
            .unsubscribe(&mut subscriber, count, |message| self.take(received(message)))
            .await;
    }

    fn take(&mut self, mut message: Message) {
        message.priority = Some(self.priority);
        crate::stage!("received", message.id);
        let full = match self.buffer.push(message) {
            Ok(()) => false,
            Err(message) => {
                // Where even the refusals overflow, the episode's count still tells.
                let _ = self.refused.try_send(*message);
                true
            }
        };
        self.overflow.observe(full, &self.buffer, self.connection.lost());
    }
}

impl Drop for Overflow {
    fn drop(&mut self) {
        if let Some(refused) = self.episode {
            tracing::info!(refused, "the buffer was full until the end");
        }
    }
}

/// Reports an overflow at its beginning and its end, with a count.
#[derive(Debug, Default)]
struct Overflow {
    episode: Option<u64>,
    lost_before: u64,
}

impl Overflow {
    fn observe(&mut self, full: bool, buffer: &Buffer, lost_by_client: u64) {
        let lost = lost_by_client - self.lost_before;
        self.lost_before = lost_by_client;
        let refused = u64::from(full) + lost;
        match &mut self.episode {
            None if refused > 0 => {
                self.episode = Some(refused);
                tracing::warn!(
                    waiting = buffer.len(),
                    "the buffer is full: requests are refused until it has room again; see BUFFER_MESSAGES and BUFFER_BYTES"
                );
            }
            None => {}
            Some(count) => {
                *count += refused;
                if !full && buffer.has_relaxed() {
                    tracing::info!(refused = *count, "the buffer has room again");
                    self.episode = None;
                }
            }
        }
    }
}

/// A message of the client library as one of ours.
pub fn received(message: async_nats::Message) -> Message {
    let headers = message.headers.unwrap_or_default();
    let message_id = headers.get(NATS_MSG_ID);
    let id = message_id.map_or_else(JobId::new, |id| JobId::from_message_id(id.as_str()));
    let received_at = SystemTime::now();
    Message {
        payload: message.payload,
        expires_at: expiry(&headers, received_at).unwrap_or_default(),
        headers,
        subject: message.subject.to_string(),
        id,
        size: message.length,
        reply: message.reply.map(|reply| reply.to_string()),
        received_at,
        received: Instant::now(),
        attempt: 1,
        sequence: None,
        delivery: None,
        priority: None,
    }
}

/// Settles by memory alone: done is done, and a retry goes back into the buffer.
struct Requeue {
    message: Message,
    buffer: Arc<Buffer>,
}

#[async_trait]
impl Settle for Requeue {
    fn can_retry(&self) -> bool {
        true
    }

    async fn done(self: Box<Self>) {}

    async fn retry(self: Box<Self>, after: Duration) -> Result<(), Closed> {
        let Self { mut message, buffer } = *self;
        message.attempt += 1;
        buffer.put_back(message, after)
    }

    async fn demote(
        self: Box<Self>,
        _message: &Message,
        priority: Priority,
    ) -> Result<(), Box<dyn Settle>> {
        let demoted = Message { priority: Some(priority), ..self.message.clone() };
        self.buffer.requeue(demoted).map_err(|_closed| self as Box<dyn Settle>)
    }
}

/// Settles a request that is answered once, whatever the answer.
pub struct Once;

#[async_trait]
impl Settle for Once {
    fn can_retry(&self) -> bool {
        false
    }

    async fn done(self: Box<Self>) {}

    async fn retry(self: Box<Self>, _after: Duration) -> Result<(), Closed> {
        Err(Closed)
    }

    async fn demote(
        self: Box<Self>,
        _message: &Message,
        _priority: Priority,
    ) -> Result<(), Box<dyn Settle>> {
        Err(self)
    }
}
