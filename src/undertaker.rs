//! Requests that were delivered for the last time and never settled: those that kill whoever takes
//! them, and those that were unlucky too often.
//!
//! The server stops to deliver them, keeps them, and says so once. A stream keeps what it says; and
//! since a server that dies at the wrong moment says nothing, the queue is looked through as well.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::stream::{DirectGetErrorKind, RawMessageErrorKind, Stream};
use async_nats::jetstream::{AckKind, Context};
use futures::StreamExt;
use serde::Deserialize;

use crate::job::Priority;
use crate::nats::Connection;
use crate::protocol::Subjects;
use crate::protocol::time::parse_rfc3339;
use crate::runner::Runner;
use crate::source::jetstream::{Stored, recovered};
use crate::topology::Topology;

/// How long the server keeps a request for advisories.
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// How long to wait after trouble with JetStream.
const TROUBLE: Duration = Duration::from_secs(2);

/// Ends the jobs nobody got to the end of.
pub struct Undertaker {
    /// The connection.
    pub connection: Connection,
    /// Its JetStream.
    pub jetstream: Context,
    /// Where the queue and the advisories are.
    pub topology: Arc<Topology>,
    /// The subjects of the queue.
    pub subjects: Subjects,
    /// Who publishes their end.
    pub runner: Arc<Runner>,
    /// How often the queue is looked through.
    pub sweep_interval: Duration,
}

/// What the server says of a message it no longer delivers.
#[derive(Debug, Deserialize)]
struct Advisory {
    stream_seq: u64,
    deliveries: u32,
    timestamp: String,
}

impl Advisory {
    fn at(&self) -> SystemTime {
        parse_rfc3339(&self.timestamp).unwrap_or_else(SystemTime::now)
    }
}

type Trouble = async_nats::Error;

impl Undertaker {
    /// Works until it is dropped.
    pub async fn run(self) {
        // The first look is not at once: what a crash left in doubt is settled by then.
        let mut next_sweep = tokio::time::Instant::now() + self.sweep_interval;
        let mut suspects = Vec::new();
        loop {
            self.connection.connected().await;
            if let Err(error) = self.follow(&mut next_sweep, &mut suspects).await {
                tracing::debug!(%error, "cannot look after what was delivered for the last time");
                tokio::time::sleep(TROUBLE).await;
                // What cannot be mended is told by those who take requests.
                let _ = self.topology.mend(&self.jetstream).await;
            }
        }
    }

    async fn follow(
        &self,
        next_sweep: &mut tokio::time::Instant,
        suspects: &mut Vec<u64>,
    ) -> Result<(), Trouble> {
        let names = &self.topology.names;
        let queue = self.jetstream.get_stream(&names.queue).await?;
        let advisories = self.jetstream.get_stream(&names.advisories).await?;
        let consumer: Consumer<pull::Config> =
            advisories.get_consumer(&names.advisory_consumer()).await?;
        loop {
            let pull = consumer.batch().max_messages(1).expires(PULL_EXPIRES);
            let mut batch = pull.messages().await?;
            while let Some(message) = batch.next().await {
                let message = message?;
                let done = match serde_json::from_slice::<Advisory>(&message.payload) {
                    Ok(advisory) => self.bury(&queue, advisory.stream_seq, Some(&advisory)).await?,
                    Err(error) => {
                        tracing::warn!(%error, "an advisory that is none");
                        true
                    }
                };
                if done {
                    message.double_ack().await?;
                } else {
                    message.ack_with(AckKind::Nak(Some(TROUBLE))).await?;
                }
            }
            if *next_sweep <= tokio::time::Instant::now() {
                *next_sweep = tokio::time::Instant::now() + self.sweep_interval;
                self.sweep(&queue, suspects).await?;
            }
        }
    }

    /// Looks for requests that the consumer is done with and the queue still has. Only what was
    /// there at the last look, too, is buried: an acknowledgement may be on its way.
    async fn sweep(&self, queue: &Stream, suspects: &mut Vec<u64>) -> Result<(), Trouble> {
        let mut found = Vec::new();
        for priority in Priority::ALL {
            let name = self.topology.names.consumer(priority);
            let floor = queue.consumer_info(&name).await?.ack_floor.stream_sequence;
            let subject = self.subjects.execute_at(priority);
            let mut next = Some(1);
            while let Some(from) = next.take() {
                let message = queue
                    .direct_get_builder()
                    .next_by_subject(subject.as_str())
                    .sequence(from)
                    .send()
                    .await;
                match message {
                    Ok(message) if message.sequence <= floor => {
                        found.push(message.sequence);
                        next = Some(message.sequence + 1);
                    }
                    Ok(_) => {}
                    Err(error) if error.kind() == DirectGetErrorKind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        for sequence in &found {
            if suspects.contains(sequence) {
                self.bury(queue, *sequence, None).await?;
            }
        }
        *suspects = found;
        Ok(())
    }

    /// Gives a request its end and takes it out of the queue. Returns whether it is done with.
    async fn bury(
        &self,
        queue: &Stream,
        sequence: u64,
        advisory: Option<&Advisory>,
    ) -> Result<bool, Trouble> {
        let message = match queue.get_raw_message(sequence).await {
            Ok(message) => message,
            Err(error) => {
                return match error.kind() {
                    // Somebody got to its end after all, or this was done before.
                    RawMessageErrorKind::NoMessageFound => Ok(true),
                    _ => Err(error.into()),
                };
            }
        };
        let stored = Stored::of(message);
        // A queue that was made anew may hold another request in the place the advisory speaks of.
        if advisory.is_some_and(|advisory| stored.stored_at > advisory.at()) {
            return Ok(true);
        }
        let deliveries = advisory.map_or(0, |advisory| advisory.deliveries);
        let message = recovered(Stored { deliveries, ..stored });
        if !self.runner.give_up(message).await {
            return Ok(false);
        }
        match queue.delete_message(sequence).await {
            Ok(_) => Ok(true),
            // Whether it is gone shows at the next look.
            Err(error) => {
                tracing::debug!(sequence, %error, "could not delete a dead letter from the queue");
                Ok(true)
            }
        }
    }
}
