//! Requests that were delivered for the last time and never settled: those that kill whoever takes
//! them, and those that were unlucky too often.
//!
//! The server stops to deliver them, keeps them, and says so once. A stream keeps what it says; and
//! since a server that dies at the wrong moment says nothing, the queue is looked through as well.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{AckKind, Context};
use futures::StreamExt;
use serde::Deserialize;

use crate::job::Priority;
use crate::nats::Connection;
use crate::protocol::Subjects;
use crate::protocol::time::parse_rfc3339;
use crate::runner::Runner;
use crate::source::jetstream::{Place, Stored, recovered};
use crate::topology::Topology;

/// How long the server keeps a request for advisories.
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// The most requests one look at the queue takes in: the next one goes on.
const MOST_AT_ONCE: usize = 10_000;
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
        let mut suspects = HashSet::new();
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
        suspects: &mut HashSet<u64>,
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
    async fn sweep(&self, queue: &Stream, suspects: &mut HashSet<u64>) -> Result<(), Trouble> {
        let mut found = HashSet::new();
        for priority in Priority::ALL {
            let name = self.topology.names.consumer(priority);
            let floor = queue.consumer_info(&name).await?.ack_floor.stream_sequence;
            let subject = self.subjects.execute_at(priority);
            let mut from = 1;
            while found.len() < MOST_AT_ONCE {
                let place = Place { seq: from, next_by_subj: Some(&subject) };
                match Stored::read(&self.jetstream, &self.topology.names.queue, place).await? {
                    Some(stored) if stored.sequence <= floor => {
                        found.insert(stored.sequence);
                        from = stored.sequence + 1;
                    }
                    _ => break,
                }
            }
        }
        for sequence in found.intersection(suspects) {
            self.bury(queue, *sequence, None).await?;
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
        let place = Place { seq: sequence, next_by_subj: None };
        let stored = Stored::read(&self.jetstream, &self.topology.names.queue, place).await?;
        // Somebody got to its end after all, or this was done before.
        let Some(stored) = stored else { return Ok(true) };
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
