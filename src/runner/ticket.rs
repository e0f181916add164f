//! A job's record and events while one worker has the job.

use std::convert::Infallible;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::attempt::Orders;
use crate::job::{JobId, PullProgress};
use crate::protocol::record::{Record, State};
use crate::publish::Publisher;
use crate::state::{Claim, Fenced};

/// How often the progress of a pull is told at most.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

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

    /// Keeps the record up to date and gives the orders that come through it. Never returns.
    pub(super) async fn watch(
        &mut self,
        publisher: &Publisher,
        mut progress: watch::Receiver<Option<PullProgress>>,
        orders: &Orders,
        look_interval: Duration,
    ) -> Infallible {
        // Beside the start, not before it.
        publisher.event(self.record()).await;
        let mut pulling_since = None;
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
                () = tokio::time::sleep(look_interval) => {
                    if let Self::Claimed(claim) = self
                        && claim.look().await.is_err()
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
