//! Telling the server what becomes of a delivery.

use std::time::Duration;

use async_nats::jetstream::{AckKind, Context};
use async_nats::{Request, Subject};
use async_trait::async_trait;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::TROUBLE;
use super::stored::{moved_headers, moved_size};
use crate::job::Priority;
use crate::nats::Connection;
use crate::protocol::Subjects;
use crate::source::{Closed, Message, Settle};
use crate::topology::API_TIMEOUT;

/// Tells the server what becomes of one delivery.
#[derive(Clone)]
pub(super) struct Acker {
    pub(super) connection: Connection,
    pub(super) subject: Subject,
}

impl Acker {
    /// Tells the server once. Returns whether it confirmed.
    async fn tell(&self, kind: AckKind) -> bool {
        let request = Request::new().payload(kind.into()).timeout(Some(API_TIMEOUT));
        self.connection.client.send_request(self.subject.clone(), request).await.is_ok()
    }

    /// Gives signs of life for ever.
    pub(super) async fn keep_alive(self, interval: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            let _ = timeout(interval, self.tell(AckKind::Progress)).await;
        }
    }
}

/// Settles by acknowledgement.
pub(super) struct Ack {
    pub(super) jetstream: Context,
    pub(super) subjects: Subjects,
    pub(super) acker: Acker,
    /// How long an acknowledgement is tried for.
    pub(super) patience: Duration,
    /// Whether the server will not deliver the request again.
    pub(super) is_last: bool,
    pub(super) _keep_alive: AbortOnDropHandle<()>,
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
        if moved_size(message) > limit {
            // It runs where it is.
            return Err(self);
        }
        let headers = moved_headers(message, priority);
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
