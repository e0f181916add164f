//! From the first signal to the last: drain, then stop, then force.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How far the end has come. Each token is cancelled once, in this order, and stays so.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// No new work is taken.
    pub draining: CancellationToken,
    /// Running functions are stopped: the grace is over.
    pub stopping: CancellationToken,
    /// Running functions are killed at once: the operator insists.
    pub forced: CancellationToken,
    /// Nothing more is published: who could not be reached by now is given up on.
    pub silent: CancellationToken,
}

/// SIGTERM and SIGINT, from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    term: Signal,
    int: Signal,
    last: Option<Instant>,
}

/// Signals closer together are one request. timeout(1), for one, signals its child and then the
/// child's whole group, which no operator means as insisting.
const SAME_REQUEST: Duration = Duration::from_millis(50);

/// The exit code of a process that was forced to end by SIGINT, by shells' convention.
pub const EXIT_SIGINT: u8 = 128 + 2;
/// The exit code of a process that was forced to end by SIGTERM, by shells' convention.
pub const EXIT_SIGTERM: u8 = 128 + 15;

impl Signals {
    /// Takes the signals over from their default, which is to end the process.
    ///
    /// # Errors
    /// The kernel refuses the handlers.
    pub fn install() -> io::Result<Self> {
        let (term, int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { term, int, last: None })
    }

    /// The next signal, as the exit code it stands for when it forces the end.
    /// Cancel-safe.
    pub async fn next(&mut self) -> u8 {
        loop {
            let exit_code = tokio::select! {
                _ = self.term.recv() => EXIT_SIGTERM,
                _ = self.int.recv() => EXIT_SIGINT,
            };
            let now = Instant::now();
            let before = self.last.replace(now);
            if before.is_none_or(|before| now - before > SAME_REQUEST) {
                return exit_code;
            }
        }
    }
}
