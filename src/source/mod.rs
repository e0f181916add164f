//! Where requests come from. Every source yields the same thing: a delivery, to be settled once.

pub mod buffer;
pub mod core;
pub mod jetstream;
pub mod lease;

use std::time::{Duration, Instant, SystemTime};

use async_nats::HeaderMap;
use async_trait::async_trait;
use bytes::Bytes;

use crate::job::{JobId, Priority};
use lease::Lease;

/// A header that bounds how long a request may wait: a duration such as `30s`, from when the
/// server stored it, or where it stores nothing, from when it was received.
pub const JOB_TTL: &str = "Job-TTL";

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Message {
    /// Its body.
    pub payload: Bytes,
    /// Its headers.
    pub headers: HeaderMap,
    /// Where it was published.
    pub subject: String,
    /// The job's id where the body does not name it: of the `Nats-Msg-Id` header, of the place in
    /// the stream, or new. The same at every attempt.
    pub id: JobId,
    /// What it takes in memory, headers included, in bytes: the body is a part of one allocation
    /// with them.
    pub size: usize,
    /// Where an answer is waited for.
    pub reply: Option<String>,
    /// When it was stored, or where nothing stores it, when it arrived; for people.
    pub received_at: SystemTime,
    /// The same, for measuring.
    pub received: Instant,
    /// Which attempt this is, from 1, as far as the source knows.
    pub attempt: u32,
    /// Its place in the stream, where one keeps it.
    pub sequence: Option<u64>,
    /// What the queue it came from stands for, where queues differ.
    pub priority: Option<Priority>,
    /// When it is too late to begin.
    pub expires_at: Option<SystemTime>,
}

/// A request, with the duty to settle it.
pub struct Delivery {
    /// The request.
    pub message: Message,
    /// How it is settled.
    pub settle: Box<dyn Settle>,
}

/// A source that takes nothing back any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// What becomes of a delivery, decided once.
///
/// Dropping it settles nothing: a source that keeps its requests delivers them again.
#[async_trait]
pub trait Settle: Send {
    /// Whether [`Settle::retry`] will bring the request back.
    fn can_retry(&self) -> bool;

    /// Whether a request that is given back outlives this daemon.
    fn is_durable(&self) -> bool {
        false
    }

    /// How sure it is that nobody else has the request, where that is in question at all.
    fn lease(&self) -> Option<&Lease> {
        None
    }

    /// The outcome is published: nothing more is to be done.
    async fn done(self: Box<Self>);

    /// The infrastructure failed: deliver the request again, after a while.
    ///
    /// # Errors
    /// The source is closed, and the caller has the last word.
    async fn retry(self: Box<Self>, after: Duration) -> Result<(), Closed>;

    /// Puts the request at the end of the queue of a lower priority.
    ///
    /// # Errors
    /// There is no such queue, or it is full: the delivery is still to be settled.
    async fn demote(
        self: Box<Self>,
        message: &Message,
        priority: Priority,
    ) -> Result<(), Box<dyn Settle>>;
}

/// A stream of deliveries.
#[async_trait]
pub trait Source: Send {
    /// Waits until there is a delivery, without taking it: who waits for work holds no slot that
    /// others could use. There are `free` slots, one at least. Cancel-safe.
    async fn ready(&mut self, free: usize);

    /// The next delivery. Cancel-safe. Waits for ever when there is none.
    async fn next(&mut self) -> Delivery;

    /// There is no use for work now: what was fetched and not taken is left to others. Cancel-safe.
    async fn rest(&mut self) {}

    /// Takes no more requests, and hands back those nobody has taken and nobody else will.
    async fn close(&mut self) -> Vec<Message>;
}

/// What the header says about how late is too late; a header that is no duration is none.
#[must_use]
pub fn expiry(headers: &HeaderMap, received_at: SystemTime) -> Option<SystemTime> {
    let ttl = humantime::parse_duration(headers.get(JOB_TTL)?.as_str().trim()).ok()?;
    received_at.checked_add(ttl)
}
