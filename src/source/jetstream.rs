//! Requests from JetStream: a work queue that keeps each until its outcome is published.
//!
//! Every priority has a durable consumer that all instances share. An instance asks for a request
//! only while it has a free slot, so that the fleet shares the load by free slots; and what it
//! has fetched it keeps with signs of life until it is settled, however long that takes.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, AckKind, Context, ErrorCode};
use async_nats::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Subject, Subscriber};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::future::FutureExt;
use futures::{StreamExt, future};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::{Closed, Delivery, Message, Settle, Source, expiry, order};
use crate::job::{JobId, Priority};
use crate::nats::Connection;
use crate::protocol::Subjects;
use crate::protocol::headers::NATS_MSG_ID;
use crate::protocol::time::parse_rfc3339;
use crate::retry::Backoff;
use crate::topology::{API_TIMEOUT, SetupError, Topology};

/// How long the server keeps a request for work that finds none. Short, since an instance whose slots
/// fill up meanwhile has no use for what comes of it.
const PULL_EXPIRES: Duration = Duration::from_secs(5);
/// Delays between looks at a JetStream that does not answer.
const TROUBLE: Backoff =
    Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Where a request that was moved to another queue keeps the id it had, and when it was published:
/// its own place and time are new.
const MOVED_ID: &str = "Worker-Spawner-Id";
const MOVED_AT: &str = "Worker-Spawner-Queued-At-Ms";
const MOVED_FROM: &str = "Worker-Spawner-Subject";
const MOVED_MSG_ID: &str = "Worker-Spawner-Msg-Id";
/// What the further headers and their framing take in a message, beside their values.
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

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).map(|value| value.as_str())
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
    /// How often it was delivered.
    pub deliveries: u32,
}

/// Which stored request to read.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Place<'a> {
    /// Its place, or where to begin to look.
    pub seq: u64,
    /// The first one from there on with this subject.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_by_subj: Option<&'a str>,
}

impl Stored {
    /// Reads a request from the stream instead of having it delivered. Nothing where there is none.
    ///
    /// By `$JS.API.STREAM.MSG.GET` of the JetStream wire API, whose answer holds the headers as data:
    /// whoever publishes may send headers that no client library reads.
    ///
    /// # Errors
    /// The stream cannot be asked.
    pub async fn read(
        jetstream: &Context,
        stream: &str,
        place: Place<'_>,
    ) -> Result<Option<Self>, async_nats::Error> {
        #[derive(serde::Deserialize)]
        struct Answer {
            message: Option<Raw>,
            error: Option<ApiError>,
        }
        #[derive(serde::Deserialize)]
        struct Raw {
            subject: String,
            seq: u64,
            #[serde(default)]
            hdrs: String,
            #[serde(default)]
            data: String,
            time: String,
        }
        #[derive(serde::Deserialize)]
        struct ApiError {
            err_code: u64,
            #[serde(default)]
            description: String,
        }
        let subject = format!("STREAM.MSG.GET.{stream}");
        let answer: Answer = jetstream.request(subject, &place).await?;
        let raw = match answer {
            Answer { message: Some(raw), .. } => raw,
            Answer { error: Some(e), .. } if e.err_code == ErrorCode::NO_MESSAGE_FOUND.0 => {
                return Ok(None);
            }
            Answer { error: Some(e), .. } => return Err(e.description.into()),
            Answer { .. } => return Err("an answer that is none".into()),
        };
        Ok(Some(Self {
            subject: raw.subject,
            headers: readable_headers(&BASE64.decode(raw.hdrs)?),
            payload: BASE64.decode(raw.data)?.into(),
            sequence: raw.seq,
            stored_at: parse_rfc3339(&raw.time).ok_or("a time that is none")?,
            deliveries: 0,
        }))
    }
}

/// Those headers of a block that can be read; the others are left out.
fn readable_headers(block: &[u8]) -> HeaderMap {
    let text = String::from_utf8_lossy(block);
    let mut headers = HeaderMap::new();
    for line in text.split("\r\n").skip(1) {
        let Some((name, value)) = line.split_once(':') else { continue };
        let pair = (name.parse::<HeaderName>(), value.trim().parse::<HeaderValue>());
        if let (Ok(name), Ok(value)) = pair {
            headers.append(name, value);
        }
    }
    headers
}

/// A request from the stream as one of ours. The same from wherever it is read.
#[must_use]
pub fn recovered(stored: Stored) -> Message {
    let Stored { mut subject, mut headers, payload, sequence, stored_at, deliveries } = stored;
    let from = header(&headers, MOVED_FROM).map(str::to_owned);
    let message_id = header(&headers, MOVED_MSG_ID).map(str::to_owned);
    let moved_at = header(&headers, MOVED_AT).and_then(|ms| ms.parse().ok());
    let received_at = moved_at
        .and_then(|ms| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)))
        .unwrap_or(stored_at);
    let id = header(&headers, MOVED_ID).or_else(|| header(&headers, NATS_MSG_ID)).map_or_else(
        // The same wherever it is read, and another one in a stream that was made anew.
        || JobId::from_message_id(&format!("{:x}-{sequence}", nanos(stored_at))),
        JobId::from_message_id,
    );
    if header(&headers, MOVED_ID).is_some() {
        let ours = [MOVED_ID, MOVED_AT, MOVED_FROM, MOVED_MSG_ID, NATS_MSG_ID];
        headers = without(&headers, |name| ours.contains(&name));
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

/// Nanoseconds since 1970.
fn nanos(time: SystemTime) -> u128 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos()
}

/// The headers but for those whose names are not wanted.
fn without(headers: &HeaderMap, unwanted: impl Fn(&str) -> bool) -> HeaderMap {
    headers
        .iter()
        .filter(|(name, _)| !unwanted(AsRef::<str>::as_ref(name)))
        .flat_map(|(name, values)| values.iter().map(|value| (name.clone(), value.clone())))
        .collect()
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
    /// How long an acknowledgement is tried for.
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
        let mut headers = without(&message.headers, |name| name.starts_with("Nats-Expected-"));
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
            Ok(Ok(stored)) if !stored.duplicate => {
                self.send(AckKind::Ack).await;
                Ok(())
            }
            _ => Err(self),
        }
    }
}
