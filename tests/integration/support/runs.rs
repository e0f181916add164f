//! How often each job ran: what the engine says of containers it started.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use bollard::models::EventMessage;
use bollard::query_parameters::EventsOptions;
use futures::StreamExt;
use tokio::task::JoinHandle;

use super::engine::{Engine, JOB_LABEL};

/// The containers of each job that were started.
type Seen = Arc<Mutex<BTreeMap<String, BTreeSet<String>>>>;

/// An observer of one engine. It asks for events as long as it lives, since an engine remembers
/// only the last few hundred; what one that is killed has not told yet is lost.
pub(crate) struct Runs {
    seen: Seen,
    task: JoinHandle<()>,
}

impl Runs {
    /// Sees all that happens from now on.
    pub(crate) fn watch(engine: &Engine) -> Self {
        let seen = Seen::default();
        let (docker, kept) = (engine.docker().clone(), Arc::clone(&seen));
        let task = tokio::spawn(async move {
            // In whole seconds, one of which may just be ending.
            let mut since = UNIX_EPOCH.elapsed().unwrap().as_secs() - 1;
            loop {
                let filters = [("type", vec!["container"]), ("event", vec!["start"])];
                let filters = filters.map(|(name, values)| {
                    (name.to_string(), values.iter().map(ToString::to_string).collect())
                });
                let options = EventsOptions {
                    since: Some(since.to_string()),
                    filters: Some(filters.into()),
                    ..EventsOptions::default()
                };
                let mut events = std::pin::pin!(docker.events(Some(options)));
                while let Some(Ok(event)) = events.next().await {
                    note(&kept, &event);
                    let at = event.time.and_then(|time| u64::try_from(time).ok());
                    since = at.unwrap_or(since);
                }
                // The engine is away. What it tells twice when it is back counts once.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        Self { seen, task }
    }

    /// How many containers of the job `id` were started.
    pub(crate) fn of(&self, id: &str) -> usize {
        self.seen.lock().unwrap().get(id).map_or(0, BTreeSet::len)
    }

    /// How many containers of each job were started.
    pub(crate) fn all(&self) -> BTreeMap<String, usize> {
        let seen = self.seen.lock().unwrap();
        seen.iter().map(|(id, containers)| (id.clone(), containers.len())).collect()
    }

    /// Somebody else has seen a container of the job `id` run.
    pub(crate) fn add(&self, id: &str, container: &str) {
        let mut seen = self.seen.lock().unwrap();
        seen.entry(id.to_string()).or_default().insert(container.to_string());
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn note(seen: &Seen, event: &EventMessage) {
    let Some(actor) = &event.actor else { return };
    let job = actor.attributes.as_ref().and_then(|attributes| attributes.get(JOB_LABEL));
    let (Some(job), Some(container)) = (job, &actor.id) else { return };
    seen.lock().unwrap().entry(job.clone()).or_default().insert(container.clone());
}
