//! From an outcome to the end of its request: decide, publish, record, settle.

use std::time::{Instant, SystemTime};

use bytes::Bytes;

use super::ticket::Ticket;
use super::{Context, RESULT_HEADERS, Runner, is_dead};
use crate::job::{JobError, JobId, Outcome, code};
use crate::protocol::outcome::{self, ResultMessage};
use crate::protocol::record::{self, Record};
use crate::source::Settle;
use crate::state::Claim;

/// An outcome as it is published.
pub(super) struct Decided {
    pub(super) id: JobId,
    /// Why the request is a dead letter, where it is one.
    pub(super) dead: Option<JobError>,
    pub(super) image: Option<String>,
    pub(super) attempt: u32,
    pub(super) result: ResultMessage,
    pub(super) json: Bytes,
}

impl Runner {
    /// Publishes an outcome, records it, and settles the request, in that order; for as long as it
    /// takes while the daemon lives, and a moment longer at its end.
    pub(super) async fn conclude(
        &self,
        mut outcome: Outcome,
        context: &Context,
        ticket: &mut Ticket,
        settle: Box<dyn Settle>,
    ) {
        crate::stage!("outcome made", outcome.id);
        let made = Instant::now();
        let published = tokio::select! {
            biased;
            published = self.publish(&mut outcome, context, ticket) => published,
            () = self.shutdown.silent.cancelled() => {
                let (job, status) = (&outcome.id, outcome.status);
                if settle.is_durable() {
                    tracing::warn!(%job, %status, "JetStream did not confirm the outcome: the job goes to another worker");
                } else {
                    tracing::error!(%job, %status, "NATS did not confirm the outcome: it may be lost");
                }
                false
            }
        };
        let took = published.then(|| made.elapsed());
        if let Some(took) = took {
            self.metrics.published(took);
            settle.done().await;
        }
        self.export(&outcome, context, took);
    }

    /// Publishes and records an outcome. Returns whether the request is done with.
    pub(super) async fn publish(
        &self,
        outcome: &mut Outcome,
        context: &Context,
        ticket: &mut Ticket,
    ) -> bool {
        let claim = match ticket {
            Ticket::Claimed(claim) => claim,
            Ticket::Unrecorded(record) => {
                self.report(outcome);
                self.publish_unrecorded(outcome, context, record).await;
                return true;
            }
        };
        let limit = self.publisher.json_limit().saturating_sub(record::ENDED_OVERHEAD);
        if let Some(objects) = &self.objects {
            let room = limit.saturating_sub(RESULT_HEADERS);
            objects.offload(outcome, self.rules().output_limit, room).await;
        }
        let json = match outcome::json(outcome, limit) {
            Ok(json) => json,
            Err(error) => {
                tracing::error!(job = %outcome.id, %error, "the outcome cannot be recorded");
                Bytes::new()
            }
        };
        // From here on whoever has the job publishes this outcome, and who lost it does not.
        if claim.decide(&json, outcome.output.order()).await.is_err() {
            tracing::warn!(job = %outcome.id, "another worker has taken the job over: this outcome counts for nothing");
            return false;
        }
        crate::stage!("decided", outcome.id);
        self.report(outcome);
        crate::failpoint!("outcome.decided");
        let decided = Decided {
            id: outcome.id.clone(),
            dead: outcome.error.clone().filter(|_| is_dead(outcome.status)),
            image: outcome.image.clone(),
            attempt: outcome.attempt,
            result: outcome::result_message(outcome, self.publisher.max_payload()),
            json,
        };
        self.announce(claim, context, decided).await
    }

    /// Publishes an outcome that is recorded: the dead letter, the result, the replies; and records
    /// that this was done. Returns whether the request is done with.
    pub(super) async fn announce(
        &self,
        claim: &mut Claim,
        context: &Context,
        decided: Decided,
    ) -> bool {
        let Decided { id, dead, image, attempt, result, json } = decided;
        if let Some(error) = dead {
            self.publisher.bury(&context.message, &id, image.as_deref(), attempt, &error).await;
            self.metrics.buried();
        }
        self.publisher.store(&id, result).await;
        crate::stage!("confirmed", id);
        crate::failpoint!("result.published");
        self.publisher.reply(&id, &json, &context.route).await;
        if claim.end().await.is_err() {
            tracing::warn!(job = %id, "another worker has taken the job over while its outcome was published");
            return false;
        }
        self.publisher.event(&claim.record).await;
        crate::failpoint!("record.written");
        true
    }

    pub(super) async fn publish_unrecorded(
        &self,
        outcome: &Outcome,
        context: &Context,
        record: &mut Record,
    ) {
        self.publisher.publish(outcome, &context.route, &self.shutdown.stopping).await;
        self.tally(outcome, context);
        // That a worker was told to stop is no reason: whoever sent it is told to send it again.
        if let Some(error) = &outcome.error
            && is_dead(outcome.status)
            && error.code != code::JOB_STOPPED
        {
            let (image, attempt) = (outcome.image.as_deref(), outcome.attempt);
            self.bury_within_reason(context, &outcome.id, image, attempt, error).await;
        }
        let ended = outcome::json(outcome, self.publisher.json_limit())
            .ok()
            .and_then(|json| Record::ended(&json, None, SystemTime::now()).ok());
        if let Some(ended) = ended {
            *record = ended;
            self.publisher.event(record).await;
        }
    }

    /// Publishes a dead letter of a request that nothing keeps: a stream that does not take it in time
    /// does without, and holds up nobody.
    pub(super) async fn bury_within_reason(
        &self,
        context: &Context,
        id: &JobId,
        image: Option<&str>,
        attempts: u32,
        error: &JobError,
    ) {
        let bury = self.publisher.bury(&context.message, id, image, attempts, error);
        match tokio::time::timeout(self.options.publish_timeout, bury).await {
            Ok(()) => self.metrics.buried(),
            Err(_) => tracing::warn!(job = %id, "the dead letter could not be stored"),
        }
    }
}
