//! Requests from JetStream: a work queue that keeps each until its outcome is published.
//!
//! Every priority has a durable consumer that all instances share. An instance asks for a request
//! only while it has a free slot, so that the fleet shares the load by free slots; and what it
//! has fetched it keeps with signs of life until it is settled, however long that takes.

mod ack;
mod stored;

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, Context};
use async_nats::{StatusCode, Subscriber};
use async_trait::async_trait;
use futures::future::FutureExt;
use futures::{StreamExt, future};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::{Closed, Delivery, Message, Source, order};
use crate::job::Priority;
use crate::nats::Connection;
use crate::protocol::Subjects;
use crate::retry::Backoff;
use crate::topology::{API_TIMEOUT, SetupError, Topology};
use ack::{Ack, Acker};
pub use stored::{Place, Stored, recovered};

/// How long the server keeps a request for work that finds none. Short, since an instance whose slots
/// fill up meanwhile has no use for what comes of it.
const PULL_EXPIRES: Duration = Duration::from_secs(5);
/// Delays between looks at a JetStream that does not answer.
const TROUBLE: Backoff =
    Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };

/// Deliveries that the server allows beyond the attempts a job has: some are no attempt, such as one
/// that found no slot, one whose worker was gone, and one that came too late.
pub const SPARE_DELIVERIES: u32 = 10;

/// What a JetStream source needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a worker may be silent.
    pub ack_wait: Duration,
    /// How many attempts a job has.
    pub max_attempts: u32,
    /// How long a request may wait.
    pub max_age: Duration,
}

/// How long a request that came when there was no slot for it waits here before it is left to others,
/// where it has been delivered too often to be left to them at once.
const HOLD: Duration = Duration::from_secs(3);
/// How long an acknowledgement may be tried for at most. Who waited longer would keep a slot, or the
/// daemon's end, for what the job's record makes good anyhow.
const ACK_PATIENCE: Duration = Duration::from_secs(10);
/// How long what is on the wire may take to come at the end.
const LAST_ANSWERS: Duration = Duration::from_millis(200);
/// How many deliveries are not too often.
const FEW_DELIVERIES: u32 = SPARE_DELIVERIES / 2;

/// The work queue, as one instance takes from it.
///
/// A server cannot be told to forget a pull, and what it delivers must not go unheard: it would be
/// missing for `ACK_WAIT`. So all pulls are answered on one subscription that lives as long as this.
pub struct JetStreamSource {
    connection: Connection,
    jetstream: Context,
    topology: Arc<Topology>,
    subjects: Subjects,
    options: Options,
    levels: Vec<Level>,
    /// Where the answers to all pulls arrive, and the subject's beginning.
    answers: Option<(Subscriber, String)>,
    /// On which connection the consumers were looked up, and of which generation they are: what waited
    /// at the server is gone with the connection. Nothing before that, and after trouble.
    bound: Option<(u64, u64)>,
    pulls: u64,
    picks: u32,
    /// Fetched and not yet taken, in the order they came.
    stash: Vec<Fetched>,
    failures: u32,
}

/// One priority's consumer, and the pull under way at it.
struct Level {
    priority: Priority,
    consumer: Option<Consumer<pull::Config>>,
    pull: Option<Pull>,
}

#[derive(Clone, Copy, Debug)]
struct Pull {
    number: u64,
    /// Whether the server keeps it until a request comes.
    waits: bool,
    /// When an answer is overdue.
    overdue: tokio::time::Instant,
}

/// A request that was fetched and not yet taken.
struct Fetched {
    at: tokio::time::Instant,
    /// The level it came from.
    level: usize,
    delivery: Delivery,
}

impl Fetched {
    /// Whether it is to be left to others by now. What would not be delivered once more stays until
    /// there is a slot.
    fn is_in_the_way(&self) -> bool {
        let few = self.delivery.message.attempt <= FEW_DELIVERIES;
        self.delivery.settle.can_retry() && (few || self.at.elapsed() >= HOLD)
    }
}

/// What a server is asked with a pull: `$JS.API.CONSUMER.MSG.NEXT` of the JetStream wire API (ADR-13).
#[derive(serde::Serialize)]
struct PullRequest {
    batch: u32,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    no_wait: bool,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
}

impl JetStreamSource {
    /// A source on queues that exist already.
    #[must_use]
    pub fn new(
        connection: Connection,
        jetstream: Context,
        topology: Arc<Topology>,
        subjects: Subjects,
        options: Options,
    ) -> Self {
        let level = |priority: &Priority| Level { priority: *priority, consumer: None, pull: None };
        Self {
            connection,
            jetstream,
            topology,
            subjects,
            options,
            levels: Priority::ALL.iter().map(level).collect(),
            answers: None,
            bound: None,
            pulls: 0,
            // Not zero: a quiet queue is asked in its natural order.
            picks: 1,
            stash: Vec::new(),
            failures: 0,
        }
    }

    /// Finds the consumers, again after each new connection. Where something is missing it is made
    /// again.
    async fn bind(&mut self) -> Result<u64, SetupError> {
        self.connection.connected().await;
        let epoch = self.connection.epoch();
        let generation = self.topology.generation();
        if self.bound == Some((epoch, generation)) {
            return Ok(epoch);
        }
        for level in &mut self.levels {
            level.pull = None;
        }
        let unavailable = |error: &dyn Display| SetupError::Unavailable(error.to_string());
        if self.answers.is_none() {
            let inbox = self.connection.client.new_inbox();
            let answers = self.connection.client.subscribe(format!("{inbox}.*")).await;
            self.answers = Some((answers.map_err(|e| unavailable(&e))?, inbox));
        }
        if self.lookup().await.is_err() {
            self.topology.mend(&self.jetstream).await?;
            self.lookup().await.map_err(|e| unavailable(&e))?;
        }
        self.bound = Some((epoch, generation));
        Ok(epoch)
    }

    async fn lookup(&mut self) -> Result<(), async_nats::Error> {
        let names = &self.topology.names;
        let stream = self.jetstream.get_stream(&names.queue).await?;
        for level in &mut self.levels {
            let name = names.consumer(level.priority);
            level.consumer = Some(stream.get_consumer(&name).await?);
        }
        Ok(())
    }

    /// Asks level `at` for one request: now or never, or whenever one comes.
    async fn ask(&mut self, at: usize, waits: bool) -> Result<(), SetupError> {
        let Some((_, inbox)) = &self.answers else { return Ok(()) };
        self.pulls += 1;
        let number = self.pulls;
        let names = &self.topology.names;
        let consumer = names.consumer(self.levels[at].priority);
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{consumer}", names.queue);
        let expires = u64::try_from(PULL_EXPIRES.as_nanos()).ok().filter(|_| waits);
        let request = PullRequest { batch: 1, no_wait: !waits, expires };
        let request = serde_json::to_vec(&request).unwrap_or_default();
        let reply = format!("{inbox}.{number}");
        let asked = self.connection.client.publish_with_reply(subject, reply, request.into()).await;
        asked.map_err(|e| SetupError::Unavailable(e.to_string()))?;
        let patience = if waits { PULL_EXPIRES + API_TIMEOUT } else { API_TIMEOUT };
        let overdue = tokio::time::Instant::now() + patience;
        self.levels[at].pull = Some(Pull { number, waits, overdue });
        Ok(())
    }

    /// Takes in an answer to a pull. Returns the level where that ended the pull under way.
    fn take(&mut self, message: async_nats::Message) -> Result<Option<usize>, SetupError> {
        let at = match message.status {
            None | Some(StatusCode::OK) => match self.delivery(message) {
                Ok((at, delivery)) => {
                    self.failures = 0;
                    let fetched = tokio::time::Instant::now();
                    self.stash.push(Fetched { at: fetched, level: at, delivery });
                    // It bears the subject it was published to, and so not its pull's number. Should
                    // it be a late answer to an earlier one, there is one pull too many for a while.
                    Some(at)
                }
                // Only a server that speaks another protocol gets here.
                Err(error) => {
                    tracing::error!(%error, "a delivery that is none");
                    None
                }
            },
            Some(status) => {
                let number = message.subject.rsplit('.').next().and_then(|n| n.parse().ok());
                let is_its_own =
                    |level: &Level| level.pull.is_some_and(|pull| Some(pull.number) == number);
                let at = self.levels.iter().position(is_its_own);
                match status {
                    StatusCode::IDLE_HEARTBEAT => None,
                    // There is nothing, or was nothing in time.
                    StatusCode::NOT_FOUND | StatusCode::TIMEOUT => at,
                    _ if at.is_none() => None,
                    _ => {
                        let why = message.description.unwrap_or_default();
                        let why = format!("a pull was refused: {status} {why}");
                        return Err(SetupError::Unavailable(why));
                    }
                }
            }
        };
        if let Some(at) = at {
            self.levels[at].pull = None;
        }
        Ok(at)
    }

    fn delivery(
        &self,
        message: async_nats::Message,
    ) -> Result<(usize, Delivery), async_nats::Error> {
        let message = jetstream::Message { message, context: self.jetstream.clone() };
        let info = message.info()?;
        let names = &self.topology.names;
        let is_its_own = |level: &Level| names.consumer(level.priority) == info.consumer;
        let at = self.levels.iter().position(is_its_own).ok_or("it is of another consumer")?;
        let level = &self.levels[at];
        let priority = level.priority;
        let (sequence, published) = (info.stream_sequence, info.published);
        let deliveries = u32::try_from(info.delivered).unwrap_or(u32::MAX);
        let count = info.consumer_sequence;
        let made = level.consumer.as_ref().map(|c| c.cached_info().created);
        let made = made.map_or(0, |made| made.unix_timestamp_nanos() / 1000);
        let message = message.message;
        let Some(reply) = message.reply else { return Err("it has no reply subject".into()) };
        let mut message = recovered(Stored {
            subject: message.subject.to_string(),
            headers: message.headers.unwrap_or_default(),
            payload: message.payload,
            sequence,
            stored_at: published.into(),
            deliveries,
        });
        message.delivery = Some((u64::try_from(made).unwrap_or(0), count));
        crate::stage!("received", message.id);
        let too_old = message.received_at.checked_add(self.options.max_age);
        message.expires_at = message.expires_at.into_iter().chain(too_old).min();
        message.priority = Some(priority);
        let acker = Acker { connection: self.connection.clone(), subject: reply };
        let keep_alive = acker.clone().keep_alive(self.options.ack_wait / 3);
        let settle = Box::new(Ack {
            jetstream: self.jetstream.clone(),
            subjects: self.subjects.clone(),
            acker,
            patience: self.options.ack_wait.min(ACK_PATIENCE),
            is_last: deliveries >= self.options.max_attempts + SPARE_DELIVERIES,
            _keep_alive: AbortOnDropHandle::new(tokio::spawn(keep_alive)),
        });
        Ok((at, Delivery { message, settle }))
    }

    /// The next answer to any pull, or nothing where one is overdue or the connection broke.
    async fn answer(&mut self, epoch: u64) -> Option<async_nats::Message> {
        let overdue = self.levels.iter().filter_map(|level| Some(level.pull?.overdue)).min();
        let never = tokio::time::Instant::now() + Duration::from_secs(3600);
        let (answers, _) = self.answers.as_mut()?;
        tokio::select! {
            biased;
            answer = answers.next() => answer,
            () = tokio::time::sleep_until(overdue.unwrap_or(never)) => None,
            () = self.connection.broken(epoch) => None,
        }
    }

    /// The request to take next: of those that were fetched, the one whose queue comes first in this
    /// pick. Nothing where a queue that comes before it may have something.
    fn best(&self) -> Option<usize> {
        for at in order(self.picks) {
            if let Some(place) = self.stash.iter().position(|fetched| fetched.level == at) {
                return Some(place);
            }
            // A queue with a pull that waits is empty: it would have answered.
            if self.levels[at].pull.is_none_or(|pull| !pull.waits) {
                return None;
            }
        }
        None
    }

    /// One step towards a delivery: ask, or wait for an answer. Cancel-safe.
    async fn step(&mut self) -> Result<(), SetupError> {
        let epoch = self.bind().await?;
        // The first queue that may have something is asked, and the others only when it has nothing.
        if !self.levels.iter().any(|level| level.pull.is_some_and(|pull| !pull.waits)) {
            let order = order(self.picks);
            if let Some(at) = order.into_iter().find(|at| self.levels[*at].pull.is_none()) {
                self.ask(at, false).await?;
            }
        }
        let Some(answer) = self.answer(epoch).await else {
            // Whatever it was, the pulls count no more; what still comes of them is taken in.
            self.bound = None;
            return Ok(());
        };
        let nothing = matches!(answer.status, Some(StatusCode::NOT_FOUND | StatusCode::TIMEOUT));
        if let Some(at) = self.take(answer)?
            && nothing
        {
            // From here on the server says when there is something.
            self.ask(at, true).await?;
        }
        // What came with it waits no longer than it does.
        self.collect()
    }

    /// Takes in what has arrived.
    fn collect(&mut self) -> Result<(), SetupError> {
        loop {
            let Some((answers, _)) = &mut self.answers else { return Ok(()) };
            let Some(Some(answer)) = answers.next().now_or_never() else { return Ok(()) };
            self.take(answer)?;
        }
    }

    /// The next answer to any pull, as long as there are any.
    async fn last_answer(&mut self) -> Option<async_nats::Message> {
        self.answers.as_mut()?.0.next().await
    }

    /// Gives back what is to be left to others.
    fn give_back(
        &mut self,
        is_others: impl Fn(&Fetched) -> bool,
    ) -> Vec<JoinHandle<Result<(), Closed>>> {
        let (back, kept) = self.stash.drain(..).partition::<Vec<_>, _>(is_others);
        self.stash = kept;
        // Tasks of their own: whoever gives up waiting for this must not keep them from being told.
        let told = back.into_iter().map(|Fetched { delivery, .. }| {
            tokio::spawn(async move { delivery.settle.retry(Duration::ZERO).await })
        });
        told.collect()
    }
}

#[async_trait]
impl Source for JetStreamSource {
    async fn ready(&mut self) {
        while self.best().is_none() {
            let Err(error) = self.step().await else { continue };
            self.bound = None;
            self.failures += 1;
            // Once an episode, and again while it lasts.
            if self.failures == 1 || self.failures.is_multiple_of(10) {
                tracing::warn!(%error, "cannot take requests from JetStream; trying on");
            }
            tokio::time::sleep(TROUBLE.delay(self.failures)).await;
        }
    }

    async fn next(&mut self) -> Delivery {
        loop {
            if let Some(place) = self.best() {
                self.picks = self.picks.wrapping_add(1);
                return self.stash.remove(place).delivery;
            }
            self.ready().await;
        }
    }

    async fn rest(&mut self) {
        loop {
            // Trouble shows again when there is something to do.
            let _ = self.collect();
            drop(self.give_back(Fetched::is_in_the_way));
            let next = async {
                match &mut self.answers {
                    Some((answers, _)) => answers.next().await,
                    None => std::future::pending().await,
                }
            };
            match timeout(HOLD, next).await {
                Ok(Some(answer)) => {
                    let _ = self.take(answer);
                }
                // The client is closed.
                Ok(None) => std::future::pending().await,
                Err(_) => {}
            }
        }
    }

    async fn close(&mut self) -> Vec<Message> {
        if let Some((answers, _)) = &mut self.answers {
            // No interest, no deliveries; what is on the wire is taken in first.
            let _ = answers.drain().await;
            while let Ok(Some(answer)) = timeout(LAST_ANSWERS, self.last_answer()).await {
                let _ = self.take(answer);
            }
        }
        future::join_all(self.give_back(|_| true)).await;
        Vec::new()
    }
}
