//! What happened when, for the account of a run that went wrong.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::daemon::Log;

/// Cheap to clone; all clones write the same one.
#[derive(Clone)]
pub(crate) struct Chronicle(Arc<Shared>);

struct Shared {
    begun: Instant,
    entries: Mutex<Vec<Entry>>,
    /// How often each fault was done.
    faults: Mutex<BTreeMap<String, usize>>,
    deaths: Mutex<Vec<String>>,
    /// The log of each life of each daemon.
    logs: Mutex<Vec<(String, Log)>>,
}

struct Entry {
    at: Duration,
    /// In the daemons' own time, to find the place in their logs.
    clock: String,
    what: String,
}

impl Chronicle {
    pub(crate) fn begin() -> Self {
        Self(Arc::new(Shared {
            begun: Instant::now(),
            entries: Mutex::default(),
            faults: Mutex::default(),
            deaths: Mutex::default(),
            logs: Mutex::default(),
        }))
    }

    /// How long the run has taken so far.
    pub(crate) fn elapsed(&self) -> Duration {
        self.0.begun.elapsed()
    }

    /// Sleeps until the run has taken `at`.
    pub(crate) async fn sleep_until(&self, at: Duration) {
        tokio::time::sleep_until((self.0.begun + at).into()).await;
    }

    pub(crate) fn note(&self, what: impl Into<String>) {
        let clock = jiff::Timestamp::now().to_string();
        let entry = Entry { at: self.elapsed(), clock, what: what.into() };
        self.0.entries.lock().unwrap().push(entry);
    }

    /// A fault was done.
    pub(crate) fn count(&self, fault: &str) {
        *self.0.faults.lock().unwrap().entry(fault.to_string()).or_default() += 1;
    }

    /// A daemon ended, or did not, in a way nobody asked for.
    pub(crate) fn died(&self, what: String) {
        self.note(what.clone());
        self.0.deaths.lock().unwrap().push(what);
    }

    pub(crate) fn deaths(&self) -> Vec<String> {
        self.0.deaths.lock().unwrap().clone()
    }

    /// A daemon began a life with this log.
    pub(crate) fn keep(&self, whose: String, log: &Log) {
        self.0.logs.lock().unwrap().push((whose, log.clone()));
    }

    pub(crate) fn faults(&self) -> BTreeMap<String, usize> {
        self.0.faults.lock().unwrap().clone()
    }

    /// All entries.
    pub(crate) fn text(&self) -> String {
        self.matching(|_| true)
    }

    /// The entries that name `id`, and the lines of the daemons' logs that do.
    pub(crate) fn of(&self, id: &str) -> String {
        let names = |text: &str| {
            text.match_indices(id).any(|(at, _)| {
                // Not the first digits of a longer number.
                !text[at + id.len()..].starts_with(|next: char| next.is_ascii_digit())
            })
        };
        // The server knows it by its place in the queue.
        let places: Vec<String> = {
            let entries = self.0.entries.lock().unwrap();
            let own = entries.iter().filter(|entry| names(&entry.what));
            own.filter_map(|entry| place(&entry.what)).collect()
        };
        let mut text = self.matching(|entry| {
            names(entry) || place(entry).is_some_and(|place| places.contains(&place))
        });
        for (whose, log) in self.0.logs.lock().unwrap().iter() {
            for line in log.text().lines().filter(|line| names(line)) {
                let _ = writeln!(text, "    {whose}: {line}");
            }
        }
        text
    }

    fn matching(&self, wanted: impl Fn(&str) -> bool) -> String {
        let mut text = String::new();
        let entries = self.0.entries.lock().unwrap();
        for Entry { at, clock, what } in entries.iter().filter(|entry| wanted(&entry.what)) {
            let _ = writeln!(text, "    {:8.2} s  {clock}  {what}", at.as_secs_f32());
        }
        text
    }

    /// The logs, each with a name that can be a file's.
    pub(crate) fn logs(&self) -> Vec<(String, String)> {
        let logs = self.0.logs.lock().unwrap();
        logs.iter().map(|(whose, log)| (whose.clone(), log.text())).collect()
    }
}

/// The number behind "sequence: ".
fn place(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("sequence: ")?;
    Some(rest.chars().take_while(char::is_ascii_digit).collect())
}
