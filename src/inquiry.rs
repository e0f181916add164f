//! Answers what becomes of a job, to whoever asks for it by its id.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{Message, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::json;

use crate::cancel::Cancels;
use crate::job::{JobError, JobId, code};
use crate::protocol::by_id;
use crate::publish::Publisher;
use crate::service::Tally;
use crate::state::Records;

/// Inquiries that are looked into at once.
const AT_ONCE: usize = 256;
/// How long the instance that runs a job without a record has to say so before another says that
/// nobody knows of it.
const OWNER_FIRST: Duration = Duration::from_millis(250);
/// How long reading a record may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What answers inquiries.
#[derive(Clone)]
pub struct Inquiries {
    /// The instance's name.
    pub worker: String,
    /// The jobs that run here.
    pub cancels: Cancels,
    /// The records of durable jobs, where there are any.
    pub records: Option<Records>,
    /// Who sends the answers.
    pub publisher: Publisher,
    /// The inquiries that were answered.
    pub tally: Arc<Tally>,
}

impl Inquiries {
    /// Answers what all instances are asked: jobs without a record are known only where they run.
    pub async fn answer_for_own(self, mut requests: Subscriber) {
        while let Some(Message { payload, reply, .. }) = requests.next().await {
            let asked = Instant::now();
            let Ok(id) = by_id::decode(&payload) else { continue };
            if self.cancels.runs_unrecorded(&id) {
                let state = json!({"id": id.as_str(), "state": "running", "worker": self.worker});
                self.tally.observe(asked.elapsed(), None);
                self.publisher.answer(reply, &Ok(state.to_string().into())).await;
            }
        }
    }

    /// Answers what one instance of all is asked: what the records say, or that nobody knows.
    pub async fn answer_for_all(self, requests: Subscriber) {
        requests.for_each_concurrent(AT_ONCE, |message| self.answer_one(message)).await;
    }

    async fn answer_one(&self, Message { payload, reply, .. }: Message) {
        let asked = Instant::now();
        let answer = match by_id::decode(&payload) {
            Ok(id) => self.look_up(&id).await,
            Err(error) => Err(error),
        };
        let Some(answer) = answer.transpose() else { return };
        self.tally.observe(asked.elapsed(), answer.as_ref().err());
        self.publisher.answer(reply, &answer).await;
    }

    /// What is known of the job; nothing where its own instance says it.
    async fn look_up(&self, id: &JobId) -> Result<Option<Bytes>, JobError> {
        if let Some(records) = &self.records {
            let read = tokio::time::timeout(PATIENCE, records.get(id)).await;
            let Ok(Ok(record)) = read else {
                return Err(JobError::new(
                    code::JETSTREAM_UNAVAILABLE,
                    "JetStream does not say what is recorded of the job; try again later",
                ));
            };
            if let Some(record) = record {
                return Ok(Some(record.encode()));
            }
        }
        if self.cancels.runs_unrecorded(id) {
            return Ok(None);
        }
        tokio::time::sleep(OWNER_FIRST).await;
        let known = match self.records {
            Some(_) => "has a record, and none",
            None => "runs just now; without JetStream no record is kept, and none",
        };
        Err(JobError::new(
            by_id::JOB_UNKNOWN,
            format!("no job {id} {known} is known to have been asked for"),
        ))
    }
}
