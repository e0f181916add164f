//! What is not counted as it happens, but looked at when somebody asks.

use std::sync::{Mutex, PoisonError};

use crate::backend::WarmCounts;

/// What there is to read at one moment. What is not known, or not there, is absent.
#[derive(Debug, Default)]
pub struct Readings {
    /// Whether requests are taken and can be run.
    pub ready: bool,
    /// Whether the engine answers, and can do what is asked of it.
    pub engine_up: Option<bool>,
    /// Whether there is a connection to NATS.
    pub nats_connected: Option<bool>,
    /// How often the connection to NATS was made again.
    pub nats_reconnects: Option<u64>,
    /// Messages that the NATS client dropped, because they came faster than they were taken.
    pub nats_dropped: Option<u64>,
    /// How many functions may run at once.
    pub slots: Option<u64>,
    /// How many of the slots are taken.
    pub slots_used: Option<u64>,
    /// Requests of plain NATS that wait in memory for a slot.
    pub buffered: Option<u64>,
    /// Requests that wait in the stream, of each priority by its name.
    pub queued: Option<Vec<(&'static str, u64)>>,
    /// Spans that a collector took, and spans that were dropped.
    pub spans: Option<(u64, u64)>,
    /// The containers that wait for jobs.
    pub warm: Option<WarmCounts>,
}

/// Fills in what one part of the daemon has to say.
type Reader = Box<dyn Fn(&mut Readings) + Send + Sync>;

/// Who is asked for readings.
#[derive(Default)]
pub(super) struct Readers(Mutex<Vec<Reader>>);

impl Readers {
    pub(super) fn add(&self, reader: impl Fn(&mut Readings) + Send + Sync + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(reader));
    }

    pub(super) fn read(&self) -> Readings {
        let mut readings = Readings::default();
        // A list is whole whatever its last holder did.
        for reader in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            reader(&mut readings);
        }
        readings
    }
}

impl std::fmt::Debug for Readers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Readers")
    }
}
