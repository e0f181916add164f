#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use async_trait::async_trait;
use futures::future::FutureExt;
use tokio::sync::{Notify, watch};

use super::*;
use crate::backend::CleanupError;
use crate::job::{StartKind, Usage};
use crate::protocol::Subjects;

/// A run whose start is told and answered when the test says so, and whose function ends by a signal.
#[derive(Clone, Default)]
struct Scripted {
    told: watch::Sender<bool>,
    begun: Arc<Notify>,
    signalled: Arc<Notify>,
    signals: Arc<Mutex<Vec<Signal>>>,
}

#[async_trait]
impl Run for Scripted {
    async fn start(&mut self, _: &Progress) -> Result<Started, Failure> {
        self.begun.notified().await;
        Ok(Started {
            kind: StartKind::Warm,
            at: SystemTime::now(),
            since: Instant::now(),
            pull: Duration::ZERO,
            create: Duration::ZERO,
            start: Duration::ZERO,
        })
    }

    fn told(&self) -> watch::Receiver<bool> {
        self.told.subscribe()
    }

    async fn next(&mut self) -> Result<Event, Failure> {
        self.signalled.notified().await;
        let usage = Usage::default();
        Ok(Event::Exited(Exit {
            code: 143,
            oom_killed: false,
            not_started: None,
            ran: None,
            usage,
        }))
    }

    fn has_exited(&self) -> bool {
        false
    }

    fn signal(&self, signal: Signal) -> BoxFuture<'static, Result<(), Failure>> {
        self.signals.lock().unwrap().push(signal);
        self.signalled.notify_one();
        futures::future::ready(Ok(())).boxed()
    }

    async fn cleanup(&mut self) -> Result<(), CleanupError> {
        Ok(())
    }
}

/// What comes of a run that is driven like this while `happens`.
async fn driven(run: &Scripted, happens: impl AsyncFnOnce(&Orders, &Shutdown)) -> Attempt {
    let options = Options {
        worker: "worker".to_owned(),
        subjects: Subjects::new("functions"),
        max_attempts: 1,
        look_interval: Duration::from_secs(1),
        stop_grace: Duration::from_secs(60),
        kill_patience: Duration::from_secs(60),
        publish_timeout: Duration::from_secs(1),
        runs: Arc::default(),
    };
    let limits =
        Limits { timeout: Duration::from_secs(60), memory_bytes: 1 << 20, cpus: 1.0, pids: 1 };
    let (orders, shutdown) = (Orders::default(), Shutdown::default());
    let (progress, _) = watch::channel(None);
    let around = Surroundings {
        limits: &limits,
        options: &options,
        shutdown: &shutdown,
        orders: &orders,
        progress: &progress,
        keep: 10,
        live: None,
    };
    let mut driven = run.clone();
    let (attempt, ()) = tokio::join!(drive(&mut driven, &around), happens(&orders, &shutdown));
    attempt
}

/// Has everybody else go on as far as they can.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_was_not_told_to_begin_is_called_off_at_once() {
    let run = Scripted::default();
    let attempt = driven(&run, async |orders, _| orders.cancelled.cancel()).await;
    assert!(matches!(attempt.verdict, Verdict::Ended(Why::Cancelled, None)));
    let attempt = driven(&run, async |_, shutdown| shutdown.stopping.cancel()).await;
    assert!(matches!(attempt.verdict, Verdict::Failed(Failure::Permanent(_))));
    assert!(run.signals.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_may_run_already_is_signalled_once_its_start_is_over() {
    for by_cancel in [true, false] {
        let run = Scripted::default();
        let attempt = driven(&run, async |orders, shutdown| {
            run.told.send_replace(true);
            if by_cancel {
                orders.cancelled.cancel()
            } else {
                shutdown.stopping.cancel()
            }
            settle().await;
            run.begun.notify_one();
        });
        let attempt = attempt.await;
        let why = if by_cancel { Why::Cancelled } else { Why::Shutdown };
        assert!(
            matches!(&attempt.verdict, Verdict::Ended(w, Some(exit)) if *w == why && exit.code == 143)
        );
        assert!(attempt.started.is_some());
        assert_eq!(*run.signals.lock().unwrap(), [Signal::Term]);
    }
}

#[tokio::test]
async fn what_was_told_in_vain_is_called_off() {
    let run = Scripted::default();
    let attempt = driven(&run, async |orders, _| {
        run.told.send_replace(true);
        orders.cancelled.cancel();
        settle().await;
        run.told.send_replace(false);
    });
    assert!(matches!(attempt.await.verdict, Verdict::Ended(Why::Cancelled, None)));
    assert!(run.signals.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_job_that_is_anothers_waits_for_no_start() {
    let run = Scripted::default();
    let attempt = driven(&run, async |orders, _| {
        run.told.send_replace(true);
        orders.fenced.cancel();
    });
    assert!(matches!(attempt.await.verdict, Verdict::Ended(Why::Fenced, None)));
}
