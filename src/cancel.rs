//! Jobs that are to be cancelled, as far as one instance can bring that about.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    running: HashMap<JobId, Vec<CancellationToken>>,
    forbidden: HashSet<JobId>,
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

impl Cancels {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can leave the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the job be cancelled from now on. One that was forbidden before is at once.
    #[must_use]
    pub fn register(&self, id: &JobId) -> Registration {
        let token = CancellationToken::new();
        let mut state = self.state();
        if state.forbidden.contains(id) {
            token.cancel();
        }
        state.running.entry(id.clone()).or_default().push(token.clone());
        Registration { cancels: self.clone(), id: id.clone(), token }
    }

    /// Cancels the job if it runs here. Returns whether it does.
    #[must_use]
    pub fn cancel(&self, id: &JobId) -> bool {
        match self.state().running.get(id) {
            None => false,
            Some(tokens) => {
                tokens.iter().for_each(CancellationToken::cancel);
                true
            }
        }
    }

    /// Keeps the job from starting here.
    pub fn forbid(&self, id: &JobId) {
        let mut state = self.state();
        if state.forbidden.insert(id.clone()) {
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
            if let Some(at) = tokens.iter().position(|token| *token == self.token) {
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
        assert!(!cancels.cancel(&id));
        let (one, two) = (cancels.register(&id), cancels.register(&id));
        drop(one);
        assert!(!two.token.is_cancelled() && cancels.cancel(&id) && two.token.is_cancelled());
        drop(two);
        assert!(!cancels.cancel(&id) && cancels.state().running.is_empty());
    }

    #[test]
    fn what_is_forbidden_does_not_start_and_is_forgotten_in_the_end() {
        let (cancels, id) = (Cancels::default(), JobId::new());
        cancels.forbid(&id);
        cancels.forbid(&id);
        assert!(cancels.register(&id).token.is_cancelled());
        for _ in 0..REMEMBERED {
            cancels.forbid(&JobId::new());
        }
        assert!(!cancels.register(&id).token.is_cancelled());
        assert_eq!(cancels.state().forbidden.len(), REMEMBERED);
    }
}
