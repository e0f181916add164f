//! What the service manager is told, in the words of `sd_notify(3)`: systemd, or whatever else sets
//! `NOTIFY_SOCKET`.
//!
//! It is looked at the daemon now and then, and told what is new; no job waits for that.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Between two looks at a daemon that starts: somebody waits for the end of the start.
const LOOK_AT_START: Duration = Duration::from_millis(100);
/// Between two looks later on.
const LOOK: Duration = Duration::from_secs(1);
/// How long a start waits for what is missing. After that the daemon counts as started: it does what
/// it can, which is to wait, and no restart would bring NATS or the engine back.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// The daemon at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Why requests are not taken or cannot be run; empty when they are.
    pub missing: Vec<&'static str>,
    /// Whether it works, whatever it waits for.
    pub alive: bool,
    /// Functions that run.
    pub jobs: u64,
}

impl Sight {
    fn status(&self) -> String {
        let state = if self.missing.is_empty() { "ready" } else { &self.missing.join("; ") };
        let plural = if self.jobs == 1 { "" } else { "s" };
        format!("{state}; {} job{plural} running", self.jobs)
    }
}

/// Keeps the service manager informed of what `look` sees, until the result is dropped. With
/// `draining` begins the end, which may take as long as `end_takes`. Nothing is done where no
/// service manager wants to know.
#[must_use]
pub fn begin(
    look: impl Fn() -> Sight + Send + 'static,
    draining: CancellationToken,
    end_takes: Duration,
) -> Option<AbortOnDropHandle<()>> {
    std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty())?;
    let watchdog = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
    Some(AbortOnDropHandle::new(tokio::spawn(inform(look, draining, end_takes, watchdog))))
}

/// That this task comes to run shows that the runtime makes progress, which is what a watchdog is for.
async fn inform(
    look: impl Fn() -> Sight,
    draining: CancellationToken,
    end_takes: Duration,
    watchdog: Option<Duration>,
) {
    let mut told = Told::new(end_takes);
    let mut pulse = watchdog.map(|limit| {
        let mut pulse = tokio::time::interval(limit / 2);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pulse
    });
    loop {
        let pause = if told.ready { LOOK } else { LOOK_AT_START };
        let is_due = tokio::select! {
            () = tick(&mut pulse) => true,
            () = tokio::time::sleep(pause) => false,
            () = draining.cancelled(), if !told.stopping => false,
        };
        let sight = look();
        let beats = is_due && sight.alive;
        let mut news = told.news(&sight, draining.is_cancelled());
        if beats {
            news.push(NotifyState::Watchdog.to_string());
        }
        if !news.is_empty() {
            send(news.join("\n")).await;
        }
    }
}

/// Waits for the next beat; for ever where there is no pulse.
async fn tick(pulse: &mut Option<Interval>) {
    match pulse {
        Some(pulse) => drop(pulse.tick().await),
        None => std::future::pending().await,
    }
}

/// Sends one message. A service manager that reads nothing more holds up nobody else.
async fn send(message: String) {
    let sent = tokio::task::spawn_blocking(move || {
        sd_notify::notify(&[NotifyState::Custom(message.as_str())])
    });
    if let Ok(Err(error)) = sent.await {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}

/// What the service manager knows.
#[derive(Debug)]
struct Told {
    begun: Instant,
    end_takes: Duration,
    ready: bool,
    stopping: bool,
    status: String,
}

impl Told {
    fn new(end_takes: Duration) -> Self {
        Self {
            begun: Instant::now(),
            end_takes,
            ready: false,
            stopping: false,
            status: String::new(),
        }
    }

    /// What is new in `sight`.
    fn news(&mut self, sight: &Sight, draining: bool) -> Vec<String> {
        let mut news = Vec::new();
        if draining && !self.stopping {
            self.stopping = true;
            news.push(NotifyState::Stopping.to_string());
            // Lengthens the manager's own patience where that is shorter, and never shortens it.
            // The crate's form ends at 71 minutes.
            news.push(format!("EXTEND_TIMEOUT_USEC={}", self.end_takes.as_micros()));
        }
        let started = sight.missing.is_empty() || self.begun.elapsed() >= START_PATIENCE;
        if started && !self.ready && !self.stopping {
            self.ready = true;
            news.push(NotifyState::Ready.to_string());
        }
        let status = sight.status();
        if status != self.status {
            news.push(NotifyState::Status(&status).to_string());
            self.status = status;
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight(missing: &[&'static str], jobs: u64) -> Sight {
        Sight { missing: missing.to_vec(), alive: true, jobs }
    }

    #[test]
    fn only_what_is_new_is_told() {
        let mut told = Told::new(Duration::from_secs(7200));
        let away = sight(&["nats: away", "engine: away"], 0);
        assert_eq!(told.news(&away, false), ["STATUS=nats: away; engine: away; 0 jobs running"]);
        assert!(told.news(&away, false).is_empty());
        let busy = sight(&[], 1);
        assert_eq!(told.news(&busy, false), ["READY=1", "STATUS=ready; 1 job running"]);
        assert!(told.news(&busy, false).is_empty());
        let draining = sight(&["draining"], 1);
        let end =
            ["STOPPING=1", "EXTEND_TIMEOUT_USEC=7200000000", "STATUS=draining; 1 job running"];
        assert_eq!(told.news(&draining, true), end);
        assert!(told.news(&draining, true).is_empty());
    }

    #[test]
    fn a_start_waits_for_what_is_missing_but_not_for_ever() {
        let mut told = Told::new(Duration::ZERO);
        let away = sight(&["nats: away"], 0);
        assert!(!told.news(&away, false).contains(&"READY=1".to_owned()));
        let Some(earlier) = told.begun.checked_sub(START_PATIENCE) else { return };
        told.begun = earlier;
        assert_eq!(told.news(&away, false), ["READY=1"]);
    }

    #[test]
    fn a_daemon_that_ends_before_it_was_ready_never_is() {
        let mut told = Told::new(Duration::ZERO);
        told.news(&sight(&["draining"], 0), true);
        assert!(told.news(&sight(&[], 0), true).iter().all(|line| line != "READY=1"));
    }
}
