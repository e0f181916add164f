//! Where requests come from. Every source yields the same thing: a delivery, to be settled once.

pub mod buffer;
pub mod core;

use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;

use crate::job::JobId;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Message {
    /// Its body.
    pub payload: Bytes,
    /// The job's id where the body does not name it: of the `Nats-Msg-Id` header, or new. The same
    /// at every attempt.
    pub id: JobId,
    /// What it takes in memory, headers included, in bytes: the body is a part of one allocation
    /// with them.
    pub size: usize,
    /// Where an answer is waited for.
    pub reply: Option<String>,
    /// When it arrived, for people.
    pub received_at: SystemTime,
    /// When it arrived, for measuring.
    pub received: Instant,
    /// Which attempt this is, from 1.
    pub attempt: u32,
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
#[async_trait]
pub trait Settle: Send {
    /// Whether [`Settle::retry`] will bring the request back.
    fn can_retry(&self) -> bool;

    /// The outcome is published: nothing more is to be done.
    async fn done(self: Box<Self>);

    /// The infrastructure failed: deliver the request again, after a while.
    ///
    /// # Errors
    /// The source is closed, and the caller has the last word.
    async fn retry(self: Box<Self>, after: Duration) -> Result<(), Closed>;
}

/// A stream of deliveries.
#[async_trait]
pub trait Source: Send {
    /// Waits until there is a delivery, without taking it: who waits for work holds no slot that
    /// others could use. Cancel-safe.
    async fn ready(&mut self);

    /// The next delivery. Cancel-safe. Waits for ever when there is none.
    async fn next(&mut self) -> Delivery;

    /// Takes no more requests, and hands back those nobody has taken.
    async fn close(&mut self) -> Vec<Message>;
}
