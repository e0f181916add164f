//! Job records in a JetStream key-value bucket, changed by compare-and-set alone.
//!
//! A record is what makes one outcome of many deliveries: whoever would run a job claims it first,
//! and finds there whether it ended, was cancelled, or is another's by now.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::Context;
use async_nats::jetstream::kv::{self, Operation, UpdateErrorKind};
use bytes::Bytes;
use tokio::time::timeout;

use crate::job::{JobId, Status, code};
use crate::nats::Connection;
use crate::protocol::cancel::Answer;
use crate::protocol::record::{Record, State};
use crate::retry::Backoff;
use crate::source::jetstream::{Place, Stored, recovered};
use crate::topology::{API_TIMEOUT, SetupError, Topology};

/// Delays between tries to reach the bucket.
const TROUBLE: Backoff =
    Backoff { first: Duration::from_millis(100), most: Duration::from_secs(5) };

/// The most changes between the output streams of which a record keeps the order.
const MAX_ORDER: usize = 64;

/// The records of all jobs. Cheap to clone.
#[derive(Clone)]
pub struct Records {
    inner: Arc<Inner>,
}

struct Inner {
    connection: Connection,
    jetstream: Context,
    topology: Arc<Topology>,
    bucket: kv::Store,
    worker: String,
}

/// What a worker knows of a job it would run.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The job's id.
    pub id: JobId,
    /// The image, where the request names one.
    pub image: Option<String>,
    /// The request's place in the queue.
    pub sequence: Option<u64>,
    /// When it was queued.
    pub queued_at: SystemTime,
    /// Which delivery of the request this worker has; later ones are greater.
    pub delivery: Option<(u64, u64)>,
}

/// What there is to do for a job.
pub enum Opened {
    /// It is this worker's now.
    Mine(Box<Claim>),
    /// It is this worker's now, and its outcome is known: only to be published.
    Ending(Box<Claim>),
    /// It ended before: its record says how.
    Ended(Box<Record>),
    /// Another worker has a later delivery of the same request.
    Stale,
    /// Another request of the same id is in the queue, and brings the outcome.
    UnderWay,
}

/// What is to be expected of a job that another request was bringing to its end.
pub enum Outlook {
    /// It ended.
    Ended(Box<Record>),
    /// The other request is gone, and the job has not ended.
    Open,
    /// Nothing has changed, or nothing can be known just now.
    Unknown,
}

/// JetStream does not say what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("JetStream does not answer")]
pub struct Unread;

/// Another worker has claimed the job since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another worker has taken the job over")]
pub struct Fenced;

/// The right to run a job and to end it, until another worker claims it.
pub struct Claim {
    records: Records,
    /// The record as it was last written.
    pub record: Record,
    revision: u64,
}

/// What is stored under a key.
struct Kept {
    /// Nothing where it was deleted, or cannot be read.
    record: Option<Record>,
    revision: u64,
}

impl Records {
    /// The records of a topology that exists.
    ///
    /// # Errors
    /// The bucket or the queue cannot be found.
    pub async fn new(
        connection: Connection,
        jetstream: Context,
        topology: Arc<Topology>,
        worker: String,
    ) -> Result<Self, SetupError> {
        let unavailable = |e: &dyn std::fmt::Display| SetupError::Unavailable(e.to_string());
        let bucket = jetstream.get_key_value(&topology.names.jobs).await;
        let bucket = bucket.map_err(|e| unavailable(&e))?;
        let inner = Inner { connection, jetstream, topology, bucket, worker };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Claims a job for this worker, unless there is nothing to do. Waits for JetStream for as long
    /// as it takes. Cancel-safe: a claim that nobody holds is like one whose holder died.
    pub async fn open(&self, opening: &Opening) -> Opened {
        let claim = format!("{}.{}", self.inner.worker, uuid::Uuid::now_v7().simple());
        // Most jobs have no record yet: the first try is to make it.
        let mut stored = Kept { record: None, revision: 0 };
        let mut failures = 0;
        loop {
            let record = match &stored.record {
                Some(record) if record.claim.as_ref() == Some(&claim) => {
                    // The write whose confirmation was lost.
                    let (record, revision) = (record.clone(), stored.revision);
                    return self.mine(record, revision);
                }
                Some(record) if record.state == State::Ended => {
                    return Opened::Ended(Box::new(record.clone()));
                }
                Some(record)
                    if record.sequence == opening.sequence
                        && record.claim.is_some()
                        && record.delivery > opening.delivery =>
                {
                    // Or the consumer is not the one it was taken for.
                    self.inner.topology.doubt();
                    return Opened::Stale;
                }
                Some(record) => match self.is_another(record, opening).await {
                    Ok(true) => return Opened::UnderWay,
                    Ok(false) => self.claimed(Some(record), opening, &claim),
                    Err(()) => {
                        failures += 1;
                        self.wait_out(failures).await;
                        continue;
                    }
                },
                None => self.claimed(None, opening, &claim),
            };
            match self.write(&record, stored.revision).await {
                Ok(revision) => return self.mine(record, revision),
                Err(Refused::Revision) => {}
                Err(Refused::Trouble) => {
                    failures += 1;
                    self.wait_out(failures).await;
                }
            }
            match self.read(&opening.id).await {
                Ok(found) => stored = found,
                Err(()) => {
                    failures += 1;
                    self.wait_out(failures).await;
                }
            }
        }
    }

    /// What there is to do for a request of a job that another request was bringing to its end.
    pub async fn outlook(&self, opening: &Opening) -> Outlook {
        let record = match self.read(&opening.id).await {
            Ok(Kept { record: Some(record), .. }) => record,
            Ok(Kept { record: None, .. }) => return Outlook::Open,
            Err(()) => return Outlook::Unknown,
        };
        if record.state == State::Ended {
            return Outlook::Ended(Box::new(record));
        }
        match self.is_another(&record, opening).await {
            Ok(false) => Outlook::Open,
            Ok(true) | Err(()) => Outlook::Unknown,
        }
    }

    /// The record of a job, if there is one.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn get(&self, id: &JobId) -> Result<Option<Record>, Unread> {
        self.read(id).await.map(|kept| kept.record).map_err(|()| Unread)
    }

    /// Asks for a job to be cancelled, wherever it is. Waits for JetStream for as long as it takes. A
    /// job that was cancelled since `asked_at` was cancelled for this.
    pub async fn request_cancel(&self, id: &JobId, asked_at: SystemTime) -> Answer {
        let mut failures = 0;
        loop {
            let Ok(stored) = self.read(id).await else {
                failures += 1;
                self.wait_out(failures).await;
                continue;
            };
            let now = SystemTime::now();
            let mut record =
                stored.record.unwrap_or_else(|| Record::new(id.clone(), State::Queued, now));
            let answer = match record.state {
                State::Ending | State::Ended
                    if record.status() == Some(Status::Cancelled)
                        && record.error().is_some_and(|e| e.code == code::JOB_CANCELLED)
                        && record.updated_at >= asked_at =>
                {
                    let began = record.outcome.is_some_and(|o| o.contains_key("started_at"));
                    return if began { Answer::Stopping } else { Answer::WillNotStart };
                }
                State::Ending | State::Ended => {
                    let status = record.status().map_or("ended", |status| status.as_str());
                    return Answer::AlreadyEnded(status.to_owned());
                }
                State::Queued => Answer::WillNotStart,
                State::Pulling | State::Running => Answer::Stopping,
            };
            if record.cancel_requested_at.is_some() {
                return answer;
            }
            record.cancel_requested_at = Some(now);
            record.updated_at = now;
            match self.write(&record, stored.revision).await {
                Ok(_) => return answer,
                Err(Refused::Revision) => {}
                Err(Refused::Trouble) => {
                    failures += 1;
                    self.wait_out(failures).await;
                }
            }
        }
    }

    fn mine(&self, record: Record, revision: u64) -> Opened {
        let ending = record.state == State::Ending;
        let claim = Box::new(Claim { records: self.clone(), record, revision });
        if ending { Opened::Ending(claim) } else { Opened::Mine(claim) }
    }

    /// The record of a job that this worker takes, after what was there before.
    fn claimed(&self, before: Option<&Record>, opening: &Opening, claim: &str) -> Record {
        let now = SystemTime::now();
        if let Some(before) = before.filter(|before| before.state == State::Ending) {
            return Record {
                updated_at: now,
                claim: Some(claim.to_owned()),
                sequence: opening.sequence,
                delivery: opening.delivery,
                ..before.clone()
            };
        }
        let queued_at = before.and_then(|before| before.queued_at).unwrap_or(opening.queued_at);
        Record {
            image: opening.image.clone(),
            attempt: before.map_or(0, |before| before.attempt) + 1,
            handed_over: before.map_or(0, |before| before.handed_over),
            worker: Some(self.inner.worker.clone()),
            queued_at: Some(queued_at),
            running_at: Some(now),
            cancel_requested_at: before.and_then(|before| before.cancel_requested_at),
            sequence: opening.sequence,
            claim: Some(claim.to_owned()),
            delivery: opening.delivery,
            ..Record::new(opening.id.clone(), State::Running, now)
        }
    }

    /// Whether the record is of another request of the same id that is still in the queue.
    async fn is_another(&self, record: &Record, opening: &Opening) -> Result<bool, ()> {
        let Some(other) = record.sequence.filter(|other| Some(*other) != opening.sequence) else {
            return Ok(false);
        };
        let place = Place { seq: other, next_by_subj: None };
        let inner = &self.inner;
        let stored = Stored::read(&inner.jetstream, &inner.topology.names.queue, place).await;
        let Some(stored) = stored.map_err(|_| ())? else { return Ok(false) };
        // A queue that was made anew may hold another job there.
        #[derive(serde::Deserialize)]
        struct Named {
            id: Option<String>,
        }
        let named: Option<Named> = serde_json::from_slice(&stored.payload).ok();
        Ok(match named.and_then(|named| named.id) {
            Some(id) => id == opening.id.as_str(),
            None => recovered(stored).id == opening.id,
        })
    }

    async fn read(&self, id: &JobId) -> Result<Kept, ()> {
        let entry = timeout(API_TIMEOUT, self.inner.bucket.entry(id.as_str())).await;
        let Ok(Ok(entry)) = entry else { return Err(()) };
        let Some(entry) = entry else { return Ok(Kept { record: None, revision: 0 }) };
        let record = match entry.operation {
            Operation::Put => Record::decode(&entry.value)
                .inspect_err(|error| tracing::warn!(job = %id, %error, "its record is overwritten"))
                .ok(),
            Operation::Delete | Operation::Purge => None,
        };
        Ok(Kept { record, revision: entry.revision })
    }

    async fn write(&self, record: &Record, revision: u64) -> Result<u64, Refused> {
        let update = self.inner.bucket.update(record.id.as_str(), record.encode(), revision);
        match timeout(API_TIMEOUT, update).await {
            Ok(Ok(revision)) => Ok(revision),
            Ok(Err(error)) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                Err(Refused::Revision)
            }
            Ok(Err(error)) => {
                tracing::debug!(job = %record.id, %error, "the record was not written");
                Err(Refused::Trouble)
            }
            Err(_) => Err(Refused::Trouble),
        }
    }

    /// Waits a while after `failures` failures in a row, and mends what can be mended.
    async fn wait_out(&self, failures: u32) {
        let inner = &self.inner;
        tokio::time::sleep(TROUBLE.delay(failures)).await;
        inner.connection.connected().await;
        if failures > 1 {
            let mended = inner.topology.mend(&inner.jetstream).await;
            if failures % 20 == 3 {
                let error = mended.err().map(tracing::field::display);
                tracing::warn!(
                    error,
                    bucket = inner.topology.names.jobs,
                    "a job's record cannot be read or written; trying on"
                );
            }
        }
    }
}

/// Why a record was not written.
enum Refused {
    /// It has changed since it was read.
    Revision,
    /// JetStream is in trouble; it may have been written all the same.
    Trouble,
}

impl Claim {
    /// Whether somebody asked for the job to be cancelled, as far as this worker knows.
    #[must_use]
    pub fn cancel_requested(&self) -> bool {
        self.record.cancel_requested_at.is_some()
    }

    /// Looks whether the claim still holds, and whether the job is to be cancelled. Where the record
    /// cannot be read just now, nothing is known, and that is no error.
    ///
    /// # Errors
    /// It is another's.
    pub async fn look(&mut self) -> Result<(), Fenced> {
        match self.records.read(&self.record.id).await {
            Ok(stored) => self.adopt(stored),
            Err(()) => Ok(()),
        }
    }

    /// Changes the record. Waits for JetStream for as long as it takes.
    ///
    /// # Errors
    /// It is another's by now.
    pub async fn update(&mut self, change: impl Fn(&mut Record)) -> Result<(), Fenced> {
        let mut failures = 0;
        loop {
            let mut record = self.record.clone();
            change(&mut record);
            record.updated_at = SystemTime::now();
            match self.records.write(&record, self.revision).await {
                Ok(revision) => {
                    (self.record, self.revision) = (record, revision);
                    return Ok(());
                }
                Err(Refused::Revision) => {}
                Err(Refused::Trouble) => {
                    failures += 1;
                    self.records.wait_out(failures).await;
                }
            }
            match self.records.read(&record.id).await {
                Ok(stored) => self.adopt(stored)?,
                Err(()) => {
                    failures += 1;
                    self.records.wait_out(failures).await;
                }
            }
        }
    }

    /// Records the outcome, of which this is the JSON, as the one that will be published: from here
    /// on whoever has the job publishes this and nothing else. `order` is that of the two output
    /// streams. Waits for JetStream for as long as it takes.
    ///
    /// # Errors
    /// The job is another's by now: its outcome counts.
    pub async fn decide(&mut self, outcome: &Bytes, order: &[u32]) -> Result<(), Fenced> {
        let now = SystemTime::now();
        let ended = match Record::ended(outcome, self.record.sequence, now) {
            Ok(ended) => ended,
            // Only a defect of this program gets here; a job without a record of its end is run
            // again, so what is known is written.
            Err(error) => {
                tracing::error!(job = %self.record.id, %error, "the outcome makes no record");
                self.record.clone()
            }
        };
        let (claim, delivery) = (self.record.claim.clone(), self.record.delivery);
        let order = if order.len() <= MAX_ORDER { order } else { &[] };
        self.update(|record| {
            *record = Record {
                state: State::Ending,
                claim: claim.clone(),
                delivery,
                interleaving: order.to_vec(),
                ..ended.clone()
            };
        })
        .await
    }

    /// Records that the outcome is published. Waits for JetStream for as long as it takes.
    ///
    /// # Errors
    /// Another worker has the job, and publishes the same outcome.
    pub async fn end(&mut self) -> Result<(), Fenced> {
        self.update(|record| {
            record.state = State::Ended;
            record.interleaving.clear();
        })
        .await
    }

    /// Takes over what others may change in a record; the rest is this worker's own.
    fn adopt(&mut self, stored: Kept) -> Result<(), Fenced> {
        if let Some(record) = &stored.record {
            if record.claim != self.record.claim {
                return Err(Fenced);
            }
            self.record.cancel_requested_at = record.cancel_requested_at;
        }
        self.revision = stored.revision;
        Ok(())
    }
}
