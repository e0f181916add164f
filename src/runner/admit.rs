//! Who may begin a job: whether it ended before, is another's, or is this worker's to run.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};

use super::conclude::Decided;
use super::ticket::Ticket;
use super::{Context, LOOKS, Runner, is_dead};
use crate::admission::Slot;
use crate::job::{JobId, Status};
use crate::protocol::outcome;
use crate::protocol::record::Record;
use crate::source::Settle;
use crate::state::{Claim, Opened, Opening, Outlook, Records};

/// This instance's place at a request; left when it is dropped.
pub(super) struct Turn<'a> {
    runner: &'a Runner,
    sequence: u64,
    _ended: DropGuard,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.runner.turns().remove(&self.sequence);
    }
}

impl Runner {
    /// A ticket for the job, and what goes with it; nothing where it is dealt with otherwise.
    pub(super) async fn admit(
        &self,
        id: &JobId,
        image: Option<String>,
        context: &Context,
        settle: Box<dyn Settle>,
        slot: Slot,
    ) -> Option<(Ticket, Box<dyn Settle>, Slot)> {
        let message = &context.message;
        let (Some(records), Some(_)) = (&self.records, message.sequence) else {
            let (attempt, at) = (message.attempt, message.received_at);
            let worker = &self.options.worker;
            let ticket = Ticket::unrecorded(id.clone(), image, attempt, worker, at);
            return Some((ticket, settle, slot));
        };
        match self.open(records, id, image, context).await? {
            Opened::Mine(claim) => return Some((Ticket::Claimed(claim), settle, slot)),
            Opened::Ending(mut claim) => {
                if self.complete(&mut claim, context).await {
                    settle.done().await;
                }
            }
            Opened::Ended(record) => {
                self.repeat(&record, context).await;
                settle.done().await;
            }
            Opened::UnderWay => {
                drop(slot);
                self.follow(records, id, context, settle).await;
            }
            // An answer of any kind would be about the other delivery.
            Opened::Stale => {
                tracing::info!(job = %id, "another worker has a later delivery of the request; this one is dropped");
            }
        }
        None
    }

    /// Opens the job, unless the daemon's end comes before an answer.
    pub(super) async fn open(
        &self,
        records: &Records,
        id: &JobId,
        image: Option<String>,
        context: &Context,
    ) -> Option<Opened> {
        let opening = opening(id, image, context);
        tokio::select! {
            biased;
            opened = records.open(&opening) => Some(opened),
            () = self.shutdown.stopping.cancelled() => None,
        }
    }

    /// Waits until this instance is done with another delivery of the same request, and takes its
    /// place.
    pub(super) async fn turn(&self, sequence: Option<u64>) -> Option<Turn<'_>> {
        let sequence = sequence?;
        loop {
            let ended = match self.turns().entry(sequence) {
                Entry::Vacant(vacant) => {
                    let ended = CancellationToken::new();
                    vacant.insert(ended.clone());
                    return Some(Turn { runner: self, sequence, _ended: ended.drop_guard() });
                }
                Entry::Occupied(occupied) => occupied.get().clone(),
            };
            ended.cancelled().await;
        }
    }

    fn turns(&self) -> MutexGuard<'_, HashMap<u64, CancellationToken>> {
        // A map is whole whatever its last holder did.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Settles a request of a job that another request brings to its end, once that is there: whoever
    /// asked to be told is told.
    pub(super) async fn follow(
        &self,
        records: &Records,
        id: &JobId,
        context: &Context,
        settle: Box<dyn Settle>,
    ) {
        tracing::info!(job = %id, "a request of this id is in the queue already; this one waits for its outcome");
        if context.route.replies.is_empty() {
            return settle.done().await;
        }
        let weight = u32::try_from(2 + (context.message.size >> 9)).unwrap_or(u32::MAX);
        let Ok(_place) = self.followers.try_acquire_many(weight) else {
            tracing::warn!(job = %id, "too many requests wait for outcomes of others; this one goes without an answer");
            return settle.done().await;
        };
        for looks in 1.. {
            tokio::select! {
                () = tokio::time::sleep(LOOKS.delay(looks)) => {}
                () = self.shutdown.draining.cancelled() => {
                    let _ = settle.retry(Duration::ZERO).await;
                    return;
                }
            }
            match records.outlook(&opening(id, None, context)).await {
                Outlook::Ended(record) => {
                    self.repeat(&record, context).await;
                    return settle.done().await;
                }
                Outlook::Open => {
                    let _ = settle.retry(Duration::ZERO).await;
                    return;
                }
                Outlook::Unknown => {}
            }
        }
    }

    /// Publishes the outcome that a worker decided on and did not get to publish. Returns whether the
    /// request is done with.
    pub(super) async fn complete(&self, claim: &mut Claim, context: &Context) -> bool {
        let record = claim.record.clone();
        let limit = self.publisher.max_payload();
        let json = record.outcome_json().unwrap_or_default();
        let trace = context.route.trace.as_ref();
        let Some(result) = outcome::result_of_json(&json, &record.interleaving, trace, limit)
        else {
            tracing::error!(job = %record.id, "the record of an outcome that is none");
            return false;
        };
        tracing::info!(job = %record.id, "publishing the outcome another worker left");
        let decided = Decided {
            id: record.id.clone(),
            dead: record.error().filter(|_| record.status().is_some_and(is_dead)),
            image: record.image.clone(),
            attempt: record.attempt,
            result,
            json,
        };
        tokio::select! {
            biased;
            done = self.announce(claim, context, decided) => done,
            () = self.shutdown.silent.cancelled() => false,
        }
    }

    /// Says again what became of a job that ended before.
    pub(super) async fn repeat(&self, record: &Record, context: &Context) {
        tracing::info!(job = %record.id, status = record.status().map(Status::as_str), "the job ended before; its outcome is told again");
        self.publisher.event(record).await;
        if let Some(json) = record.outcome_json() {
            self.publisher.reply(&record.id, &json, &context.route).await;
        }
    }
}

/// What is known of a job by its request.
fn opening(id: &JobId, image: Option<String>, context: &Context) -> Opening {
    let message = &context.message;
    Opening {
        id: id.clone(),
        image,
        sequence: message.sequence,
        queued_at: message.received_at,
        delivery: message.delivery,
    }
}
