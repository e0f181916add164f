//! How far a job is: drawn on a terminal, told line by line elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::print;
use crate::job::{JobId, PullProgress, printable};
use crate::protocol::record::{Record, State};

/// How often a pull is told of at most, where each time is a line.
const PULL_LINES: Duration = Duration::from_secs(5);
/// How often the drawing moves.
const TICK: Duration = Duration::from_millis(100);
/// The most of a name that is shown.
const MAX_NAME: usize = 80;

/// Whether nothing is to be told.
#[derive(Args, Debug)]
pub(super) struct Quiet {
    /// Say nothing of how far it is.
    #[arg(short, long)]
    quiet: bool,
}

impl Quiet {
    pub(super) fn is_set(&self) -> bool {
        self.quiet
    }
}

/// Tells how far a job is.
pub(super) struct Progress {
    shown: Shown,
    id: JobId,
    image: String,
    /// What was told last.
    last: String,
    pull_told: Option<Instant>,
}

enum Shown {
    Nothing,
    Lines,
    Drawing(ProgressBar),
}

impl Progress {
    /// Of a job; nothing is told where `quiet`.
    pub(super) fn new(quiet: bool, id: &JobId, image: &str) -> Self {
        let shown = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Shown::Nothing,
            (false, false) => Shown::Lines,
            (false, true) => {
                let bar = ProgressBar::new_spinner();
                bar.enable_steady_tick(TICK);
                Shown::Drawing(bar)
            }
        };
        let image = printable(image, MAX_NAME);
        Self { shown, id: id.clone(), image, last: String::new(), pull_told: None }
    }

    /// The job waits.
    pub(super) fn queued(&mut self) {
        self.tell(format!("job {} is queued", self.id));
    }

    /// The job has come so far.
    pub(super) fn record(&mut self, record: &Record) {
        let worker = printable(record.worker.as_deref().unwrap_or("a worker"), MAX_NAME);
        match (record.state, record.pull) {
            (State::Queued, _) if record.attempt > 0 => {
                let attempt = record.attempt;
                self.tell(format!("attempt {attempt} failed; another one follows"));
            }
            (State::Queued, _) => self.queued(),
            (State::Pulling, Some(pull)) => self.pulling(pull),
            (State::Pulling, None) => self.tell(format!("pulling {}", self.image)),
            (State::Running, _) if record.attempt > 1 => {
                self.tell(format!("running on {worker}, attempt {}", record.attempt));
            }
            (State::Running, _) => self.tell(format!("running on {worker}")),
            (State::Ending | State::Ended, _) => {}
        }
    }

    fn pulling(&mut self, pull: PullProgress) {
        let PullProgress { layers, layers_done, bytes, bytes_done } = pull;
        match &self.shown {
            Shown::Drawing(bar) if bytes > 0 => {
                bar.set_length(bytes);
                bar.set_position(bytes_done.min(bytes));
                bar.set_style(pull_style());
                bar.set_message(format!("pulling {} ({layers_done}/{layers} layers)", self.image));
                self.last.clear();
            }
            _ if layers == 0 => self.tell(format!("pulling {}", self.image)),
            _ => {
                let due = self.pull_told.is_none_or(|told| told.elapsed() >= PULL_LINES);
                if due {
                    self.pull_told = Some(Instant::now());
                    self.tell(format!(
                        "pulling {}: {layers_done} of {layers} layers, {} of {}",
                        self.image,
                        HumanBytes(bytes_done),
                        HumanBytes(bytes)
                    ));
                }
            }
        }
    }

    /// Something passing, that is no news when it is told again.
    pub(super) fn tell(&mut self, text: String) {
        if text == self.last {
            return;
        }
        match &self.shown {
            Shown::Nothing => {}
            Shown::Lines => print::note(&text),
            Shown::Drawing(bar) => {
                bar.set_style(ProgressStyle::default_spinner());
                bar.set_message(text.clone());
            }
        }
        self.last = text;
    }

    /// Something that must be read.
    pub(super) fn warn(&self, text: impl std::fmt::Display) {
        match &self.shown {
            Shown::Drawing(bar) => bar.suspend(|| print::note(text)),
            _ => print::note(text),
        }
    }

    /// Leaves the terminal to the function.
    pub(super) fn make_room(&mut self) {
        if let Shown::Drawing(bar) = &self.shown {
            bar.finish_and_clear();
            self.shown = Shown::Nothing;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.make_room();
    }
}

fn pull_style() -> ProgressStyle {
    let template = "{spinner} {msg} [{bar:30}] {bytes}/{total_bytes}";
    // A template that cannot be read is this program's mistake; the pull is shown all the same.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
        .progress_chars("=> ")
}

/// A bar for many jobs; nothing where it would not be seen.
pub(super) fn bar(quiet: bool, total: Option<u64>) -> Option<ProgressBar> {
    if quiet || !std::io::stderr().is_terminal() {
        return None;
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{spinner} [{bar:40}] {pos}/{len} {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {pos} {msg}"),
    };
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    bar.enable_steady_tick(TICK);
    Some(bar)
}
