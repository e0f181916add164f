//! Where requests come from. Every source yields the same thing: a delivery, to be settled once.

pub mod buffer;
pub mod core;
pub mod depth;
pub mod jetstream;

use std::time::{Duration, Instant, SystemTime};

use async_nats::HeaderMap;
use async_trait::async_trait;
use bytes::Bytes;

use crate::job::{JobId, Priority};

/// A header that bounds how long a request may wait: a duration such as `30s`, from when the
/// server stored it, or where it stores nothing, from when it was received.
pub const JOB_TTL: &str = "Job-TTL";

/// A header that names the object which is the request, where that is too big for a message.
pub const REQUEST_OBJECT: &str = "Job-Request-Object";

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
    /// Which delivery of it this is, where it may be delivered more than once: of two, the later one
    /// is greater.
    pub delivery: Option<(u64, u64)>,
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
    /// others could use. There is a free one now. Cancel-safe.
    async fn ready(&mut self);

    /// The next delivery. Cancel-safe. Waits for ever when there is none.
    async fn next(&mut self) -> Delivery;

    /// There is no use for work now: what was fetched and not taken is left to others, after a
    /// moment. Never returns. Cancel-safe.
    async fn rest(&mut self) {
        std::future::pending().await
    }

    /// Takes no more requests, and hands back those nobody has taken and nobody else will.
    async fn close(&mut self) -> Vec<Message>;
}

/// What the header says about how late is too late.
///
/// # Errors
/// It is no duration. A job that nobody bounded might be run very late.
pub fn expiry(
    headers: &HeaderMap,
    received_at: SystemTime,
) -> Result<Option<SystemTime>, humantime::DurationError> {
    let Some(ttl) = headers.get(JOB_TTL) else { return Ok(None) };
    let ttl = humantime::parse_duration(ttl.as_str().trim())?;
    Ok(received_at.checked_add(ttl))
}

/// Which queue comes first at this pick, as places in [`Priority::ALL`]. Of sixteen picks the lowest
/// is first once and the normal one three times; so none starves, however much waits above it.
fn order(pick: u32) -> [usize; 3] {
    match pick % 16 {
        0 => [2, 0, 1],
        4 | 8 | 12 => [1, 0, 2],
        _ => [0, 1, 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_queue_starves() {
        let mut first = [0; 3];
        for pick in 0..160 {
            let order = order(pick);
            first[order[0]] += 1;
            let mut sorted = order;
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2], "every queue is asked at every pick");
        }
        assert_eq!(first, [120, 30, 10]);
    }
}
