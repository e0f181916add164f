//! A job's record and events while one worker has the job.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::watch;

use super::attempt::Orders;
use crate::job::{JobId, PullProgress};
use crate::protocol::record::{Record, State};
use crate::publish::Publisher;
use crate::source::lease::Lease;
use crate::state::{Claim, Fenced, LookError};

/// How often the progress of a pull is told at most.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// How often a lost look at the record is tried again.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What a worker keeps of a job it has: a claim where records are kept, else only what events tell.
pub(super) enum Ticket {
    Claimed(Box<Claim>),
    Unrecorded(Box<Record>),
}

impl Ticket {
    /// Of a job nobody keeps a record of.
    pub(super) fn unrecorded(
        id: JobId,
        image: Option<String>,
        attempt: u32,
        worker: &str,
        queued_at: SystemTime,
    ) -> Self {
        let now = SystemTime::now();
        Self::Unrecorded(Box::new(Record {
            image,
            attempt,
            worker: Some(worker.to_owned()),
            queued_at: Some(queued_at),
            running_at: Some(now),
            ..Record::new(id, State::Running, now)
        }))
    }

    pub(super) fn record(&self) -> &Record {
        match self {
            Self::Claimed(claim) => &claim.record,
            Self::Unrecorded(record) => record,
        }
    }

    /// Which attempt this is, from 1.
    pub(super) fn attempt(&self) -> u32 {
        self.record().attempt
    }

    pub(super) fn cancel_requested(&self) -> bool {
        self.record().cancel_requested_at.is_some()
    }

    /// Changes the record, and tells whoever listens.
    pub(super) async fn update(
        &mut self,
        publisher: &Publisher,
        change: impl Fn(&mut Record),
    ) -> Result<(), Fenced> {
        match self {
            Self::Claimed(claim) => claim.update(change).await?,
            Self::Unrecorded(record) => {
                change(record);
                record.updated_at = SystemTime::now();
            }
        }
        publisher.event(self.record()).await;
        Ok(())
    }

    /// Records and tells the outcome, of which this is the JSON.
    pub(super) async fn end(
        &mut self,
        publisher: &Publisher,
        outcome: &Bytes,
    ) -> Result<(), Fenced> {
        match self {
            Self::Claimed(claim) => claim.end(outcome).await?,
            Self::Unrecorded(record) => {
                if let Ok(ended) = Record::ended(outcome, record.sequence, SystemTime::now()) {
                    **record = ended;
                }
            }
        }
        publisher.event(self.record()).await;
        Ok(())
    }

    /// Whether the job is still this worker's. Asks the record where the lease leaves it in doubt,
    /// for as long as it takes to get an answer.
    pub(super) async fn holds(&mut self, lease: Option<&Lease>) -> bool {
        let Self::Claimed(claim) = self else { return true };
        if lease.is_none_or(Lease::is_sure) {
            return true;
        }
        loop {
            match claim.look().await {
                Ok(()) => return true,
                Err(LookError::Fenced(_)) => return false,
                Err(LookError::Unknown) => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Keeps the record up to date and gives the orders that come through it. Never returns.
    pub(super) async fn watch(
        &mut self,
        publisher: &Publisher,
        mut progress: watch::Receiver<Option<PullProgress>>,
        orders: &Orders,
        lease: Option<&Lease>,
    ) {
        let mut pulling_since = None;
        let never = Duration::from_secs(365 * 24 * 3600);
        loop {
            tokio::select! {
                changed = progress.changed() => {
                    if changed.is_err() {
                        // The run's own end is a matter of moments.
                        return std::future::pending().await;
                    }
                    let pull = *progress.borrow_and_update();
                    let since = pull.map(|_| *pulling_since.get_or_insert_with(SystemTime::now));
                    let result = self.update(publisher, |record| {
                        record.state = if pull.is_some() { State::Pulling } else { State::Running };
                        record.running_at = pull.is_none().then(SystemTime::now);
                        record.pulling_at = since.or(record.pulling_at);
                        record.pull = pull;
                    });
                    if result.await.is_err() {
                        orders.fenced.cancel();
                    }
                    // More often is of no use to anybody.
                    let done = tokio::time::timeout(PROGRESS_INTERVAL, progress.wait_for(Option::is_none));
                    if pull.is_some() && done.await.is_ok() {
                        progress.mark_changed();
                    }
                }
                () = tokio::time::sleep(lease.map_or(never, Lease::interval)) => {
                    if let Self::Claimed(claim) = self
                        && let Err(LookError::Fenced(Fenced)) = claim.look().await
                    {
                        orders.fenced.cancel();
                    }
                }
            }
            if self.cancel_requested() {
                orders.cancelled.cancel();
            }
        }
    }
}
