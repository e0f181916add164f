//! Ctrl-C: the first has the job cancelled, the second leaves it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use anyhow::Context as _;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use super::cancel::{self, Word};
use super::client::Link;
use crate::job::JobId;
use crate::shutdown::Signals;

/// What the user asked for by signals, from the moment this is made.
pub(super) struct Interrupt {
    shared: Arc<Shared>,
    news: Mutex<mpsc::Receiver<String>>,
    link: Arc<Link>,
    id: JobId,
}

#[derive(Default)]
struct Shared {
    /// The exit code that the first signal stands for; zero where there was none.
    code: AtomicU8,
    published: AtomicBool,
    first: CancellationToken,
    leave: CancellationToken,
}

impl Interrupt {
    /// Takes the signals over.
    ///
    /// # Errors
    /// The kernel refuses the handlers.
    pub(super) fn watch(link: Arc<Link>, id: JobId) -> anyhow::Result<Self> {
        let mut signals = Signals::install().context("signals cannot be handled")?;
        let shared = Arc::new(Shared::default());
        let (tell, news) = mpsc::channel(8);
        let (state, connection, job) = (shared.clone(), link.clone(), id.clone());
        tokio::spawn(async move {
            let code = signals.next().await;
            state.code.store(code, Ordering::Relaxed);
            state.first.cancel();
            if !state.published.load(Ordering::Relaxed) {
                // There is nothing to cancel.
                return state.leave.cancel();
            }
            // Nobody reads on where the job has ended meanwhile.
            let _ = tell.send("cancelling; again leaves at once".to_owned()).await;
            let asked = async {
                let (text, waits) = match cancel::ask(&connection, &job).await {
                    Ok(Word { text, waits, .. }) => (text, waits),
                    Err(error) => (format!("{error:#}"), false),
                };
                let _ = tell.send(text).await;
                // When its turn comes that is its end: nobody has to wait for that.
                if !waits {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = asked => {}
                _ = signals.next() => {}
            }
            state.leave.cancel();
        });
        Ok(Self { shared, news: Mutex::new(news), link, id })
    }

    /// From now on there is something to cancel.
    pub(super) fn published(&self) {
        self.shared.published.store(true, Ordering::Relaxed);
    }

    /// The first signal's exit code, when it comes.
    pub(super) async fn first(&self) -> u8 {
        self.shared.first.cancelled().await;
        self.shared.code.load(Ordering::Relaxed)
    }

    /// When the user does not want to wait any more. Cancel-safe.
    pub(super) async fn leave(&self) {
        self.shared.leave.cancelled().await;
    }

    /// What is to be told. Cancel-safe.
    pub(super) async fn news(&self) -> String {
        match self.news.lock().await.recv().await {
            Some(text) => text,
            None => std::future::pending().await,
        }
    }

    /// The exit code that a signal stands for, where one came.
    pub(super) fn code(&self) -> Option<u8> {
        Some(self.shared.code.load(Ordering::Relaxed)).filter(|code| *code > 0)
    }

    /// Has the job cancelled without a word.
    pub(super) async fn cancel(&self) {
        // What cannot be cancelled ends by itself.
        let _ = cancel::ask(&self.link, &self.id).await;
    }
}
