//! Requests from JetStream: a work queue that keeps each until its outcome is published.
//!
//! Every priority has a durable consumer that all instances share. An instance asks for a request
//! only while it has a free slot, so that the fleet shares the load by free slots; and what it
//! has fetched it keeps with signs of life until it is settled, however long that takes.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, AckKind, Context};
use async_nats::{HeaderMap, HeaderName, HeaderValue, Request, Subject};
use async_trait::async_trait;
use bytes::Bytes;
use futures::future::FutureExt;
use futures::{StreamExt, future};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::{Closed, Delivery, Message, Settle, Source, expiry, order};
use crate::job::{JobId, Priority};
use crate::nats::Connection;
use crate::protocol::Subjects;
use crate::protocol::headers::NATS_MSG_ID;
use crate::retry::Backoff;
use crate::topology::{API_TIMEOUT, SetupError, Topology};

/// How long the server keeps a request for work that finds none. Short enough that one which was
/// lost on the way costs little.
const PULL_EXPIRES: Duration = Duration::from_secs(10);
/// Delays between looks at a JetStream that does not answer.
const TROUBLE: Backoff =
    Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Where a request that was moved to another queue keeps the id it had, and when it was published:
/// its own place and time are new.
const MOVED_ID: &str = "Worker-Spawner-Id";
const MOVED_AT: &str = "Worker-Spawner-Queued-At-Ms";
const MOVED_FROM: &str = "Worker-Spawner-Subject";
const MOVED_MSG_ID: &str = "Worker-Spawner-Msg-Id";
/// What three more headers and their framing take in a message, beside their values.
const MOVED_OVERHEAD: usize = 512;

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

/// The work queue, as one instance takes from it.
pub struct JetStreamSource {
    connection: Connection,
    jetstream: Context,
    topology: Arc<Topology>,
    subjects: Subjects,
    options: Options,
    levels: Vec<Level>,
    /// Of which connection the consumers are, and in which incarnation of the stream; nothing
    /// before they were looked up.
    bound: Option<Bound>,
    sweep: Option<Sweep>,
    picks: u32,
    /// Fetched and not yet taken, in the order they came.
    stash: std::collections::VecDeque<Delivery>,
    failures: u32,
}

/// One priority's consumer, and the pull that waits at it.
struct Level {
    priority: Priority,
    consumer: Option<Consumer<pull::Config>>,
    pull: Option<Pull>,
}

struct Pull {
    batch: pull::Batch,
    /// Whether the server keeps it until a request comes.
    waits: bool,
    /// When an answer is overdue.
    overdue: tokio::time::Instant,
}

#[derive(Clone, Copy, Debug)]
struct Bound {
    epoch: u64,
    /// When the stream was made, in nanoseconds since 1970: part of the ids of requests without
    /// one, so that a stream that is made anew does not repeat them.
    created: i128,
}

/// A round through the queues, in an order, as far as it has come.
#[derive(Clone, Copy, Debug)]
struct Sweep {
    order: [usize; 3],
    at: usize,
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
            bound: None,
            sweep: None,
            // Not zero: a quiet queue is asked in its natural order.
            picks: 1,
            stash: std::collections::VecDeque::new(),
            failures: 0,
        }
    }

    /// Finds the consumers, again after each new connection: what waited at the server is gone with
    /// the old one. Where something is missing it is made again.
    async fn bind(&mut self) -> Result<(), SetupError> {
        self.connection.connected().await;
        let epoch = self.connection.epoch();
        if self.bound.is_some_and(|bound| bound.epoch == epoch) {
            return Ok(());
        }
        self.unbind();
        if self.lookup(epoch).await.is_err() {
            self.topology.ensure(&self.jetstream).await?;
            self.lookup(epoch).await.map_err(|e| SetupError::Unavailable(e.to_string()))?;
        }
        Ok(())
    }

    async fn lookup(&mut self, epoch: u64) -> Result<(), async_nats::Error> {
        let names = &self.topology.names;
        let stream = self.jetstream.get_stream(&names.queue).await?;
        for level in &mut self.levels {
            let name = names.consumer(level.priority);
            level.consumer = Some(stream.get_consumer(&name).await?);
        }
        let created = stream.cached_info().created.unix_timestamp_nanos();
        self.bound = Some(Bound { epoch, created });
        Ok(())
    }

    /// Forgets the consumers and what waits at them. What arrived meanwhile is kept.
    fn unbind(&mut self) {
        self.collect();
        for level in &mut self.levels {
            (level.consumer, level.pull) = (None, None);
        }
        self.bound = None;
    }

    /// Takes in what the pulls have brought so far.
    fn collect(&mut self) {
        for at in 0..self.levels.len() {
            let Some(pull) = &mut self.levels[at].pull else { continue };
            if let Some(answer) = pull.batch.next().now_or_never() {
                self.take(at, answer);
            }
        }
    }

    /// What came of the pull at level `at`.
    fn take(&mut self, at: usize, answer: Option<Result<jetstream::Message, async_nats::Error>>) {
        self.levels[at].pull = None;
        // Otherwise the server has nothing, or nothing yet; or it is in trouble, and then so is the
        // next pull.
        let Some(Ok(message)) = answer else { return };
        self.failures = 0;
        match self.delivery(at, message) {
            Ok(delivery) => self.stash.push_back(delivery),
            // Only a server that speaks another protocol gets here.
            Err(error) => tracing::error!(%error, "a delivery that is none"),
        }
    }

    fn delivery(
        &self,
        at: usize,
        message: jetstream::Message,
    ) -> Result<Delivery, async_nats::Error> {
        let info = message.info()?;
        let (sequence, published) = (info.stream_sequence, info.published);
        let deliveries = u32::try_from(info.delivered).unwrap_or(u32::MAX);
        let count = info.consumer_sequence;
        let made = self.levels[at].consumer.as_ref().map(|c| c.cached_info().created);
        let made = made.map_or(0, |made| made.unix_timestamp_nanos() / 1000);
        let message = message.message;
        let Some(reply) = message.reply else { return Err("it has no reply subject".into()) };
        let mut message = recovered(Stored {
            subject: message.subject.to_string(),
            headers: message.headers.unwrap_or_default(),
            payload: message.payload,
            sequence,
            stored_at: published.into(),
            created: self.bound.map_or(0, |bound| bound.created),
            deliveries,
        });
        message.delivery = Some((u64::try_from(made).unwrap_or(0), count));
        let too_old = message.received_at.checked_add(self.options.max_age);
        message.expires_at = message.expires_at.into_iter().chain(too_old).min();
        message.priority = Some(self.levels[at].priority);
        let acker = Acker { connection: self.connection.clone(), subject: reply };
        let keep_alive = acker.clone().keep_alive(self.options.ack_wait / 3);
        let settle = Box::new(Ack {
            jetstream: self.jetstream.clone(),
            subjects: self.subjects.clone(),
            acker,
            patience: self.options.ack_wait,
            is_last: deliveries >= self.options.max_attempts + SPARE_DELIVERIES,
            _keep_alive: AbortOnDropHandle::new(tokio::spawn(keep_alive)),
        });
        Ok(Delivery { message, settle })
    }

    /// One step towards a delivery: ask, or wait for an answer.
    async fn step(&mut self) -> Result<(), SetupError> {
        self.bind().await?;
        let Some(Bound { epoch, .. }) = self.bound else { return Ok(()) };
        let mut sweep = match self.sweep {
            Some(sweep) => sweep,
            None => *self.sweep.insert(Sweep { order: order(self.picks), at: 0 }),
        };
        // A queue with a pull that waits is empty: it would have answered.
        while sweep.at < 3 {
            let level = &mut self.levels[sweep.order[sweep.at]];
            match &mut level.pull {
                None => {
                    level.ask(false).await?;
                    break;
                }
                Some(pull) if !pull.waits => break,
                Some(_) => sweep.at += 1,
            }
        }
        self.sweep = Some(sweep);
        if sweep.at == 3 {
            for level in &mut self.levels {
                if level.pull.is_none() {
                    level.ask(true).await?;
                }
            }
        }
        let one = (sweep.at < 3).then(|| sweep.order[sweep.at]);
        let answer = {
            let answers = self.levels.iter_mut().enumerate().filter_map(|(at, level)| {
                let pull = level.pull.as_mut().filter(|_| one.is_none_or(|one| one == at))?;
                let answer = tokio::time::timeout_at(pull.overdue, pull.batch.next());
                Some(answer.map(move |answer| (at, answer)).boxed())
            });
            tokio::select! {
                (answer, _, _) = future::select_all(answers) => Some(answer),
                () = self.connection.broken(epoch) => None,
            }
        };
        let Some((at, answer)) = answer else {
            self.unbind();
            return Ok(());
        };
        if !matches!(answer, Ok(Some(_)))
            && let Some(sweep) = &mut self.sweep
        {
            sweep.at = (sweep.at + 1).min(3);
        }
        let answer = answer.unwrap_or(None);
        let trouble = match &answer {
            Some(Err(error)) => Some(SetupError::Unavailable(error.to_string())),
            _ => None,
        };
        self.take(at, answer);
        if !self.stash.is_empty() {
            // Others may have come with it: they wait no longer than it does.
            self.collect();
            self.picks = self.picks.wrapping_add(1);
            self.sweep = None;
        }
        trouble.map_or(Ok(()), Err)
    }
}

impl Level {
    /// Asks for one request: now or never, or whenever one comes.
    async fn ask(&mut self, wait: bool) -> Result<(), SetupError> {
        let Some(consumer) = &self.consumer else { return Ok(()) };
        let (batch, patience) = if wait {
            let expires = PULL_EXPIRES;
            (consumer.batch().max_messages(1).expires(expires).messages().await, 2 * expires)
        } else {
            (consumer.fetch().max_messages(1).messages().await, API_TIMEOUT)
        };
        let batch = batch.map_err(|e| SetupError::Unavailable(e.to_string()))?;
        let overdue = tokio::time::Instant::now() + patience;
        self.pull = Some(Pull { batch, waits: wait, overdue });
        Ok(())
    }
}

/// A request as the stream keeps it.
pub struct Stored {
    /// Where it was published.
    pub subject: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub payload: Bytes,
    /// Its place in the stream.
    pub sequence: u64,
    /// When it was stored.
    pub stored_at: SystemTime,
    /// When the stream was made, in nanoseconds since 1970.
    pub created: i128,
    /// How often it was delivered.
    pub deliveries: u32,
}

/// A request from the stream as one of ours. The same from wherever it is read.
#[must_use]
pub fn recovered(stored: Stored) -> Message {
    let Stored { mut subject, mut headers, payload, sequence, stored_at, created, deliveries } =
        stored;
    let from = header(&headers, MOVED_FROM).map(str::to_owned);
    let message_id = header(&headers, MOVED_MSG_ID).map(str::to_owned);
    let moved_at = header(&headers, MOVED_AT).and_then(|ms| ms.parse().ok());
    let received_at = moved_at
        .and_then(|ms| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)))
        .unwrap_or(stored_at);
    let id = header(&headers, MOVED_ID).or_else(|| header(&headers, NATS_MSG_ID)).map_or_else(
        || JobId::from_message_id(&format!("{created:x}-{sequence}")),
        JobId::from_message_id,
    );
    if header(&headers, MOVED_ID).is_some() {
        headers = headers
            .iter()
            .filter(|(name, _)| {
                let name: &str = name.as_ref();
                ![MOVED_ID, MOVED_AT, MOVED_FROM, MOVED_MSG_ID, NATS_MSG_ID].contains(&name)
            })
            .flat_map(|(name, values)| values.iter().map(|value| (name.clone(), value.clone())))
            .collect();
        subject = from.unwrap_or(subject);
        if let Some(message_id) = message_id {
            headers.insert(NATS_MSG_ID, message_id);
        }
    }
    // Clocks differ: what was stored in the future has not waited.
    let waited = received_at.elapsed().unwrap_or_default();
    let size_of = |(name, values): (&HeaderName, &Vec<HeaderValue>)| -> usize {
        values.iter().map(|value| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4).sum()
    };
    let headers_size: usize = headers.iter().map(size_of).sum();
    Message {
        size: payload.len() + headers_size,
        payload,
        expires_at: expiry(&headers, received_at).unwrap_or_default(),
        headers,
        subject,
        id,
        reply: None,
        received_at,
        received: Instant::now().checked_sub(waited).unwrap_or_else(Instant::now),
        attempt: deliveries,
        sequence: Some(sequence),
        delivery: None,
        priority: None,
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).map(|value| value.as_str())
}

#[async_trait]
impl Source for JetStreamSource {
    async fn ready(&mut self, _free: usize) {
        while self.stash.is_empty() {
            let Err(error) = self.step().await else { continue };
            self.bound = None;
            self.failures += 1;
            // Once an episode, and again while it lasts.
            if self.failures == 1 || self.failures.is_multiple_of(20) {
                tracing::warn!(%error, "cannot take requests from JetStream; trying on");
            }
            tokio::time::sleep(TROUBLE.delay(self.failures)).await;
        }
    }

    async fn next(&mut self) -> Delivery {
        loop {
            if let Some(delivery) = self.stash.pop_front() {
                return delivery;
            }
            self.ready(1).await;
        }
    }

    async fn rest(&mut self) {
        self.collect();
        for level in &mut self.levels {
            level.pull = None;
        }
        self.sweep = None;
        // What would not be delivered once more stays until there is a slot.
        let (back, kept): (Vec<_>, _) =
            self.stash.drain(..).partition(|delivery| delivery.settle.can_retry());
        let kept: Vec<Delivery> = kept;
        self.stash = kept.into();
        let back = back.into_iter().map(|delivery| delivery.settle.retry(Duration::ZERO));
        // A source that keeps its requests takes them back at any time.
        let _: Vec<Result<(), Closed>> = future::join_all(back).await;
    }

    async fn close(&mut self) -> Vec<Message> {
        self.rest().await;
        Vec::new()
    }
}

/// Tells the server what becomes of one delivery.
#[derive(Clone)]
struct Acker {
    connection: Connection,
    subject: Subject,
}

impl Acker {
    /// Tells the server once. Returns whether it confirmed.
    async fn tell(&self, kind: AckKind) -> bool {
        let request = Request::new().payload(kind.into()).timeout(Some(API_TIMEOUT));
        self.connection.client.send_request(self.subject.clone(), request).await.is_ok()
    }

    /// Gives signs of life for ever.
    async fn keep_alive(self, interval: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            let _ = timeout(interval, self.tell(AckKind::Progress)).await;
        }
    }
}

/// Settles by acknowledgement.
struct Ack {
    jetstream: Context,
    subjects: Subjects,
    acker: Acker,
    /// How long an acknowledgement may take: after that the request comes again anyhow.
    patience: Duration,
    /// Whether the server will not deliver the request again.
    is_last: bool,
    _keep_alive: AbortOnDropHandle<()>,
}

impl Ack {
    /// Sends an acknowledgement until the server confirms it. One that does not for a while, or
    /// comes back without having heard of it, delivers the request again: the job's record tells
    /// whoever gets it what was done.
    async fn send(&self, kind: AckKind) {
        let confirmed = timeout(self.patience, async {
            for failures in 1.. {
                self.acker.connection.connected().await;
                if self.acker.tell(kind).await {
                    break;
                }
                tokio::time::sleep(TROUBLE.delay(failures)).await;
            }
        });
        if confirmed.await.is_err() {
            tracing::warn!(
                "JetStream did not confirm an acknowledgement: the request comes again, and is recognised then"
            );
        }
    }
}

#[async_trait]
impl Settle for Ack {
    fn can_retry(&self) -> bool {
        !self.is_last
    }

    fn is_durable(&self) -> bool {
        true
    }

    async fn done(self: Box<Self>) {
        self.send(AckKind::Ack).await;
    }

    async fn retry(self: Box<Self>, after: Duration) -> Result<(), Closed> {
        let delay = (!after.is_zero()).then_some(after);
        self.send(AckKind::Nak(delay)).await;
        Ok(())
    }

    async fn demote(
        self: Box<Self>,
        message: &Message,
        priority: Priority,
    ) -> Result<(), Box<dyn Settle>> {
        let limit = self.acker.connection.client.max_payload();
        if message.size + message.subject.len() + 2 * message.id.as_str().len() + MOVED_OVERHEAD
            > limit
        {
            // It runs where it is.
            return Err(self);
        }
        let mut headers = message.headers.clone();
        if let Some(message_id) = headers.get(NATS_MSG_ID).cloned() {
            headers.insert(MOVED_MSG_ID, message_id);
        }
        headers.insert(MOVED_ID, message.id.as_str());
        headers.insert(MOVED_FROM, message.subject.as_str());
        let queued_at = message.received_at.duration_since(SystemTime::UNIX_EPOCH);
        headers.insert(MOVED_AT, queued_at.unwrap_or_default().as_millis().to_string());
        // Under the id it had, the stream would take it for the same message again; and under this
        // one it takes a second try to move it for what it is.
        let place = message.sequence.unwrap_or_default();
        headers.insert(NATS_MSG_ID, format!("{}.{place}.{priority}", message.id));
        let subject = self.subjects.execute_at(priority);
        let moved = async {
            let publish =
                self.jetstream.publish_with_headers(subject, headers, message.payload.clone());
            publish.await?.await
        };
        match timeout(API_TIMEOUT, moved).await {
            Ok(Ok(_)) => {
                self.send(AckKind::Ack).await;
                Ok(())
            }
            _ => Err(self),
        }
    }
}
