//! Jobs that are to be cancelled, as far as one instance can bring that about.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::job::JobId;

/// How many ids of jobs that shall not start are remembered. The oldest go first.
const REMEMBERED: usize = 16_384;

/// The jobs of an instance that can be cancelled. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Cancels {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    running: HashMap<JobId, Vec<Running>>,
    /// Until when.
    forbidden: HashMap<JobId, Instant>,
    oldest: VecDeque<JobId>,
}

/// A running job that can be cancelled, until this is dropped.
#[derive(Debug)]
pub struct Registration {
    cancels: Cancels,
    id: JobId,
    /// Cancelled when the job is to be.
    pub token: CancellationToken,
}

#[derive(Clone, Debug)]
struct Running {
    token: CancellationToken,
    recorded: bool,
}

impl Cancels {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can leave the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the job be cancelled from now on. One that was forbidden before is at once. `recorded` says
    /// whether there is a record of it.
    #[must_use]
    pub fn register(&self, id: &JobId, recorded: bool) -> Registration {
        let token = CancellationToken::new();
        let mut state = self.state();
        // It is spent on the job it was meant for.
        if state.forbidden.remove(id).is_some_and(|until| until > Instant::now()) {
            token.cancel();
        }
        state
            .running
            .entry(id.clone())
            .or_default()
            .push(Running { token: token.clone(), recorded });
        Registration { cancels: self.clone(), id: id.clone(), token }
    }

    /// Whether the job runs here, and has no record.
    #[must_use]
    pub fn runs_unrecorded(&self, id: &JobId) -> bool {
        let state = self.state();
        state.running.get(id).is_some_and(|jobs| jobs.iter().any(|running| !running.recorded))
    }

    /// Cancels the job if it runs here, and else keeps it from starting here for a while: as long as its
    /// request may wait in memory. Returns whether there is a record of it; nothing where it does not
    /// run here.
    #[must_use]
    pub fn cancel(&self, id: &JobId, patience: Duration) -> Option<bool> {
        let mut state = self.state();
        if let Some(running) = state.running.get(id) {
            running.iter().for_each(|running| running.token.cancel());
            return Some(running.iter().any(|running| running.recorded));
        }
        if state.forbidden.insert(id.clone(), Instant::now() + patience).is_none() {
            state.oldest.push_back(id.clone());
        }
        // Some of them were spent meanwhile.
        while state.oldest.len() > REMEMBERED
            && let Some(oldest) = state.oldest.pop_front()
        {
            state.forbidden.remove(&oldest);
        }
        None
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut state = self.cancels.state();
        if let Some(tokens) = state.running.get_mut(&self.id) {
            if let Some(at) = tokens.iter().position(|running| running.token == self.token) {
                tokens.swap_remove(at);
            }
            if tokens.is_empty() {
                state.running.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn what_runs_is_cancelled() {
        let (cancels, id) = (Cancels::default(), JobId::new());
        let (one, two) = (cancels.register(&id, true), cancels.register(&id, false));
        drop(one);
        assert!(!two.token.is_cancelled());
        assert_eq!(cancels.cancel(&id, LONG), Some(false));
        assert!(two.token.is_cancelled());
        drop(two);
        assert!(cancels.state().running.is_empty());
        assert!(!cancels.register(&id, false).token.is_cancelled(), "it was meant for the others");
    }

    #[test]
    fn what_does_not_run_yet_does_not_start() {
        let (cancels, id) = (Cancels::default(), JobId::new());
        assert_eq!(cancels.cancel(&id, LONG), None);
        assert_eq!(cancels.cancel(&id, LONG), None);
        assert!(cancels.register(&id, false).token.is_cancelled());
        assert!(!cancels.register(&id, false).token.is_cancelled(), "it is spent");
        assert_eq!(cancels.cancel(&id, Duration::ZERO), None);
        assert!(!cancels.register(&id, false).token.is_cancelled(), "its time is over");
    }

    #[test]
    fn not_all_are_remembered() {
        let (cancels, id) = (Cancels::default(), JobId::new());
        for id in [id.clone()].into_iter().chain((0..REMEMBERED).map(|_| JobId::new())) {
            assert_eq!(cancels.cancel(&id, LONG), None);
        }
        assert!(!cancels.register(&id, false).token.is_cancelled());
        assert!(cancels.state().forbidden.len() <= REMEMBERED);
    }
}
