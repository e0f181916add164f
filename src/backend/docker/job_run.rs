//! A job's run, whichever way its container comes about: one that waits is taken, else one is made.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::watch;

use super::Shared;
use super::cold::ColdRun;
use super::image::Image;
use super::warm::{Begun, Miss, WarmRun};
use crate::backend::{CleanupError, Event, Progress, Run, Signal, Started};
use crate::job::{Failure, Job, JobError, StartKind, code};

/// A run of one job. It has at most one of the two.
pub(super) struct JobRun {
    shared: Arc<Shared>,
    job: Job,
    warm: Option<WarmRun>,
    cold: Option<ColdRun>,
    /// As [`Run::told`].
    told: watch::Sender<bool>,
}

impl JobRun {
    pub(super) fn new(shared: Arc<Shared>, job: Job) -> Self {
        Self { shared, job, warm: None, cold: None, told: watch::Sender::new(false) }
    }

    /// Begins in a container that waits, if there is one. Returns when, or what stands in the way.
    ///
    /// # Errors
    /// Something of the job may be running and cannot be removed.
    async fn start_warm(&mut self, image: &Arc<Image>) -> Result<Result<Begun, Miss>, Failure> {
        let (idle, order) = match self.shared.pool.lease(&self.job, image) {
            Ok(leased) => leased,
            Err(miss) => return Ok(Err(miss)),
        };
        crate::stage!("leased", self.job.id);
        // Kept where the clean-up finds it, should this be dropped half-way.
        let run = self.warm.insert(WarmRun::new(idle, &self.job));
        let miss = match run.begin(&order, self.job.stdin.clone(), &self.told).await {
            Ok(begun) => return Ok(Ok(begun)),
            Err(miss) => miss,
        };
        self.told.send_replace(false);
        // What may have begun in it must not run beside what begins elsewhere.
        let mut removed = run.cleanup().await;
        if removed.as_ref().is_err_and(|error| !error.may_be_running) {
            // What failed since the engine was in its own way mostly succeeds at once.
            removed = run.cleanup().await;
        }
        match removed {
            Ok(()) => {}
            Err(error) if error.may_be_running => {
                let message = format!("a warm container failed and cannot be removed: {error}");
                return Err(Failure::Transient(JobError::new(code::ENGINE_ERROR, message)));
            }
            Err(error) => {
                tracing::warn!(job = %self.job.id, %error, "a warm container that failed stays behind for the reaper");
            }
        }
        self.warm = None;
        Ok(Err(miss))
    }
}

#[async_trait]
impl Run for JobRun {
    async fn start(&mut self, progress: &Progress) -> Result<Started, Failure> {
        let begun = Instant::now();
        let image = self.shared.images.ensure(&self.job.image, progress).await?;
        if self.job.args.is_empty() && !image.has_command() {
            return Err(Failure::Rejected(JobError::new(
                code::IMAGE_NO_COMMAND,
                format!(
                    "{} names no command of its own; give one in the field parameter",
                    self.job.image
                ),
            )));
        }
        let pulled = Instant::now();
        crate::stage!("image known", self.job.id);
        let begun_warm = self.start_warm(&image).await?;
        let counters = &self.shared.pool.counters;
        let miss = match begun_warm {
            Ok(Begun { at, since }) => {
                counters.hit();
                return Ok(Started {
                    kind: StartKind::Warm,
                    at,
                    since,
                    pull: pulled - begun,
                    create: Duration::ZERO,
                    start: since - pulled,
                });
            }
            Err(miss) => miss,
        };
        tracing::debug!(job = %self.job.id, ?miss, "no warm container");
        counters.missed(miss);
        let run = self.cold.insert(ColdRun::new(self.shared.clone(), self.job.clone(), image));
        let (create, start) = run.start().await?;
        Ok(Started {
            kind: StartKind::Cold,
            at: SystemTime::now(),
            since: Instant::now(),
            pull: pulled - begun,
            create,
            start,
        })
    }

    fn told(&self) -> watch::Receiver<bool> {
        self.told.subscribe()
    }

    async fn next(&mut self) -> Result<Event, Failure> {
        match (&mut self.warm, &mut self.cold) {
            (Some(run), _) => run.next().await,
            (None, Some(run)) => run.next().await,
            (None, None) => {
                let error = JobError::new(code::ENGINE_ERROR, "nothing was started");
                Err(Failure::Transient(error))
            }
        }
    }

    fn has_exited(&self) -> bool {
        self.warm.as_ref().is_some_and(WarmRun::has_exited)
            || self.cold.as_ref().is_some_and(ColdRun::has_exited)
    }

    fn signal(&self, signal: Signal) -> BoxFuture<'static, Result<(), Failure>> {
        match (&self.warm, &self.cold) {
            (Some(run), _) => run.signal(signal),
            (None, Some(run)) => run.signal(signal),
            (None, None) => async { Ok(()) }.boxed(),
        }
    }

    async fn cleanup(&mut self) -> Result<(), CleanupError> {
        if let Some(run) = &mut self.warm {
            run.cleanup().await?;
        }
        if let Some(run) = &mut self.cold {
            run.cleanup().await?;
        }
        Ok(())
    }
}
