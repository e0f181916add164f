//! The renaming of a container: some time after it was given to a job, and not beside its removal.
//!
//! Docker writes a container's files anew when it renames it, even while it is removing them. Then the
//! removal fails ("unable to remove filesystem … directory not empty"), or the container stays in the
//! engine's list without a name. Docker 20.10.24 failed to remove 48 of 60 containers that were being
//! renamed all the while.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How long a call that is under way may hold up a removal: an engine that does not answer the one may
/// still do the other, and a function may run until it does.
const PATIENCE: Duration = Duration::from_secs(5);

/// A renaming that is to come, is under way, or is over. Dropped, it does not come any more; a call
/// that is under way is then not waited for.
pub(super) struct Renaming {
    needless: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Renaming {
    /// Does `rename` in the background once `delay` is over.
    pub(super) fn after(
        delay: Duration,
        rename: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let needless = CancellationToken::new();
        let given_up = needless.clone();
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            if given_up.run_until_cancelled(tokio::time::sleep(delay)).await.is_some() {
                rename.await;
            }
        }));
        Self { needless, task }
    }

    /// Gives it up, or waits for the call that is under way: five seconds at most. Cancel-safe; not to
    /// be called again once it was over.
    pub(super) async fn end(&mut self) {
        self.needless.cancel();
        // Over either way: an engine that takes so long for a name is in no state to wait for.
        let _ = tokio::time::timeout(PATIENCE, &mut self.task).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::future::pending;

    use tokio::sync::oneshot;
    use tokio::time::Instant;

    use super::*;

    const DELAY: Duration = Duration::from_millis(300);

    #[tokio::test(start_paused = true)]
    async fn what_is_not_needed_any_more_is_not_called() {
        let (called, mut call) = oneshot::channel();
        let mut renaming = Renaming::after(DELAY, async move { called.send(()).unwrap() });
        tokio::time::sleep(DELAY / 2).await;
        let before = Instant::now();
        renaming.end().await;
        assert_eq!(before.elapsed(), Duration::ZERO);
        assert_eq!(call.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_under_way_is_waited_for() {
        const CALL: Duration = Duration::from_millis(40);
        let (answered, mut answer) = oneshot::channel();
        let mut renaming = Renaming::after(DELAY, async move {
            tokio::time::sleep(CALL).await;
            answered.send(()).unwrap();
        });
        tokio::time::sleep(DELAY + CALL / 4).await;
        // Somebody who began to wait and gave up takes nothing from the one who waits next.
        let _ = tokio::time::timeout(CALL / 4, renaming.end()).await;
        assert_eq!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        renaming.end().await;
        assert_eq!(answer.try_recv(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_gets_no_answer_is_not_waited_for_for_ever() {
        let mut renaming = Renaming::after(DELAY, pending());
        tokio::time::sleep(2 * DELAY).await;
        let before = Instant::now();
        renaming.end().await;
        assert_eq!(before.elapsed(), PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_done_long_ago_holds_up_nothing() {
        let mut renaming = Renaming::after(DELAY, async {});
        tokio::time::sleep(2 * DELAY).await;
        let before = Instant::now();
        renaming.end().await;
        assert_eq!(before.elapsed(), Duration::ZERO);
    }
}
