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
        if state.forbidden.get(id).is_some_and(|until| *until > Instant::now()) {
            token.cancel();
        }
        state
            .running
            .entry(id.clone())
            .or_default()
            .push(Running { token: token.clone(), recorded });
        Registration { cancels: self.clone(), id: id.clone(), token }
    }

    /// Cancels the job if it runs here. Returns whether there is a record of it; nothing where it does
    /// not run here.
    #[must_use]
    pub fn cancel(&self, id: &JobId) -> Option<bool> {
        let state = self.state();
        let running = state.running.get(id)?;
        running.iter().for_each(|running| running.token.cancel());
        Some(running.iter().any(|running| running.recorded))
    }

    /// Keeps the job from starting here for a while: as long as its request may wait in memory.
    pub fn forbid(&self, id: &JobId, patience: Duration) {
        let mut state = self.state();
        if state.forbidden.insert(id.clone(), Instant::now() + patience).is_none() {
            state.oldest.push_back(id.clone());
        }
        if state.oldest.len() > REMEMBERED
            && let Some(oldest) = state.oldest.pop_front()
        {
            state.forbidden.remove(&oldest);
        }
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

    #[test]
    fn only_what_runs_is_cancelled() {
        let (cancels, id) = (Cancels::default(), JobId::new());
        assert_eq!(cancels.cancel(&id), None);
        let (one, two) = (cancels.register(&id, true), cancels.register(&id, false));
        drop(one);
        assert!(!two.token.is_cancelled());
        assert_eq!(cancels.cancel(&id), Some(false));
        assert!(two.token.is_cancelled());
        drop(two);
        assert!(cancels.cancel(&id).is_none() && cancels.state().running.is_empty());
    }

    #[test]
    fn what_is_forbidden_does_not_start_and_is_forgotten_in_the_end() {
        let (cancels, id) = (Cancels::default(), JobId::new());
        let long = Duration::from_secs(3600);
        cancels.forbid(&id, long);
        cancels.forbid(&id, long);
        assert!(cancels.register(&id, false).token.is_cancelled());
        for _ in 0..REMEMBERED {
            cancels.forbid(&JobId::new(), long);
        }
        assert!(!cancels.register(&id, false).token.is_cancelled());
        assert_eq!(cancels.state().forbidden.len(), REMEMBERED);
        cancels.forbid(&id, Duration::ZERO);
        assert!(!cancels.register(&id, false).token.is_cancelled(), "its time is over");
    }
}
