//! Signals by which an operator has a running daemon do something other than end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What an operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// SIGHUP: take up the settings as they are now.
    Reload,
    /// SIGUSR1: log everything.
    LogVerbosely,
    /// SIGUSR2: log what the settings say.
    LogAsSet,
}

/// SIGHUP, SIGUSR1 and SIGUSR2, from the moment this is made.
#[derive(Debug)]
pub struct Orders {
    hup: Signal,
    usr1: Signal,
    usr2: Signal,
}

impl Orders {
    /// Takes the signals over from their default, which is to end the process.
    ///
    /// # Errors
    /// The kernel refuses the handlers.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            hup: signal(SignalKind::hangup())?,
            usr1: signal(SignalKind::user_defined1())?,
            usr2: signal(SignalKind::user_defined2())?,
        })
    }

    /// The next order. Cancel-safe. Several of one kind that come close together are one.
    pub async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.hup.recv() => Order::Reload,
            _ = self.usr1.recv() => Order::LogVerbosely,
            _ = self.usr2.recv() => Order::LogAsSet,
        }
    }
}
