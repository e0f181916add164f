//! Requests that were delivered for the last time and never settled: those that kill whoever takes
//! them, and those that were unlucky too often.
//!
//! The server stops to deliver them, keeps them, and says so once. A stream keeps what it says; and
//! since a server that dies at the wrong moment says nothing, the queue is looked through as well.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{AckKind, Context};
use futures::{StreamExt, TryStreamExt};
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
/// The most that one look at the queue finds, the most that it comes past, and the most bytes it
/// reads: the next one goes on from there.
const MOST_FOUND: usize = 10_000;
const MOST_PASSED: usize = 1_000;
const MOST_READ: usize = 16 << 20;
/// Every subject.
const ALL: &str = ">";
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

/// How far the queue was looked through.
#[derive(Default)]
struct Search {
    /// Where the next look begins.
    from: u64,
    /// What should not be there, with when it was stored. In the order of the queue.
    suspects: BTreeMap<u64, SystemTime>,
}

/// Up to where in the stream the consumers are done with what is in it, for each subject.
struct Done(HashMap<String, u64>);

impl Done {
    fn with(&self, stored: &Stored) -> bool {
        self.0.get(&stored.subject).is_some_and(|up_to| stored.sequence <= *up_to)
    }

    fn end(&self) -> u64 {
        self.0.values().copied().max().unwrap_or_default()
    }
}

type Trouble = async_nats::Error;

impl Undertaker {
    /// Works until it is dropped.
    pub async fn run(self) {
        // The first look is not at once: what a crash left in doubt is settled by then.
        let mut next_sweep = tokio::time::Instant::now() + self.sweep_interval;
        let mut search = Search::default();
        loop {
            self.connection.connected().await;
            if let Err(error) = self.follow(&mut next_sweep, &mut search).await {
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
        search: &mut Search,
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
                    Ok(advisory) => self.heed(&queue, &advisory).await?,
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
                self.sweep(&queue, search).await?;
            }
        }
    }

    /// Looks for requests that the consumers are done with and the queue still has. Only what is
    /// there at the next look, too, is buried: an acknowledgement may be on its way.
    async fn sweep(&self, queue: &Stream, search: &mut Search) -> Result<(), Trouble> {
        let done = self.done(queue).await?;
        for (sequence, stored_at) in std::mem::take(&mut search.suspects) {
            let place = Place { seq: sequence, next_by_subj: None };
            // A queue, or a consumer, that was made anew meanwhile begins again.
            if let Some(stored) = self.read(place).await?
                && stored.stored_at == stored_at
                && done.with(&stored)
            {
                self.bury(queue, stored).await;
            }
        }
        let (mut passed, mut read) = (0, 0);
        while passed < MOST_PASSED && read < MOST_READ && search.suspects.len() < MOST_FOUND {
            // Not by subject: where requests were settled in another order than they came in,
            // nats-server 2.9 does not know any more where those of a subject begin.
            let place = Place { seq: search.from.max(1), next_by_subj: Some(ALL) };
            let next = self.read(place).await?.filter(|stored| stored.sequence <= done.end());
            let Some(stored) = next else {
                search.from = 0;
                break;
            };
            search.from = stored.sequence + 1;
            read += stored.payload.len();
            if done.with(&stored) {
                search.suspects.insert(stored.sequence, stored.stored_at);
            } else {
                passed += 1;
            }
        }
        Ok(())
    }

    /// How far the consumers are, of whose requests there are any: the others say nothing of
    /// where there is something to find, and are far ahead.
    async fn done(&self, queue: &Stream) -> Result<Done, Trouble> {
        let mut subjects = queue.info_with_subjects(ALL).await?;
        let messages = subjects.info.state.messages;
        let mut counts = HashMap::new();
        while let Some((subject, count)) = subjects.try_next().await? {
            counts.insert(subject, count as u64);
        }
        // What was stored meanwhile is of no concern, and what is not counted may be anybody's.
        let is_complete = counts.values().sum::<u64>() >= messages;
        let mut done = HashMap::new();
        for priority in Priority::ALL {
            let subject = self.subjects.execute_at(priority);
            if is_complete && counts.get(&subject).is_none_or(|count| *count == 0) {
                continue;
            }
            let consumer = queue.consumer_info(&self.topology.names.consumer(priority)).await?;
            // The floor rises with acknowledgements: it stays below what was delivered for the last
            // time. Where nothing is out, all that was delivered is done with.
            let up_to = if consumer.num_ack_pending == 0 {
                consumer.delivered.stream_sequence
            } else {
                consumer.ack_floor.stream_sequence
            };
            done.insert(subject, up_to);
        }
        Ok(Done(done))
    }

    async fn read(&self, place: Place<'_>) -> Result<Option<Stored>, Trouble> {
        Stored::read(&self.jetstream, &self.topology.names.queue, place).await
    }

    /// Buries what the server says it will not deliver again. Returns whether it is done with.
    async fn heed(&self, queue: &Stream, advisory: &Advisory) -> Result<bool, Trouble> {
        let place = Place { seq: advisory.stream_seq, next_by_subj: None };
        // Somebody got to its end after all, or this was done before.
        let Some(stored) = self.read(place).await? else { return Ok(true) };
        // A queue that was made anew may hold another request in the place the advisory speaks of.
        if stored.stored_at > advisory.at() {
            return Ok(true);
        }
        Ok(self.bury(queue, Stored { deliveries: advisory.deliveries, ..stored }).await)
    }

    /// Gives a request its end and takes it out of the queue. Returns whether it is done with.
    async fn bury(&self, queue: &Stream, stored: Stored) -> bool {
        let sequence = stored.sequence;
        if !self.runner.give_up(recovered(stored)).await {
            return false;
        }
        // Whether it is gone shows at the next look.
        if let Err(error) = queue.delete_message(sequence).await {
            tracing::debug!(sequence, %error, "could not delete a dead letter from the queue");
        }
        true
    }
}
