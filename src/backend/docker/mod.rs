//! The Docker backend: a fresh container for every job, through the engine's API. One that was started
//! ahead of time where there is one, else one that is made for the job.

mod allowlist;
mod cold;
mod container;
mod credentials;
mod engine;
pub mod examine;
mod image;
mod job_run;
mod owner;
mod progress;
mod reap;
mod renaming;
mod spec;
mod turns;
mod warm;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bollard::query_parameters::RemoveContainerOptions;
use tokio_util::sync::CancellationToken;

use super::{Backend, PreflightError, Rules, Run, WarmCounts};
use crate::config::{self, Confinement, Images};
use crate::job::Job;
use crate::retry::Backoff;
use engine::{CallError, Engine};

pub use allowlist::AllowList;

/// Delays between tries to hear of the engine's images.
const LISTEN_AGAIN: Backoff =
    Backoff { first: Duration::from_millis(250), most: Duration::from_secs(5) };

/// What the Docker backend needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The instance's name, on the label of every container.
    pub instance: String,
    /// Where the engine and the registries' credentials are.
    pub docker: config::Docker,
    /// When to pull images, and which are allowed.
    pub images: Images,
    /// How functions are confined.
    pub confinement: Confinement,
    /// How long one call to the engine may take.
    pub call_timeout: Duration,
    /// Containers that wait for jobs.
    pub warm: config::Warm,
    /// How long a function may take from TERM to KILL; part of a container's deadline label.
    pub stop_grace: Duration,
}

/// Runs jobs in containers of a Docker engine.
pub struct Docker {
    shared: Arc<Shared>,
}

/// What all runs of one backend share.
struct Shared {
    engine: Engine,
    images: image::Store,
    options: Options,
    owner: owner::Identity,
    /// Names of the containers that a run still sees to.
    live: Mutex<HashSet<String>>,
    turns: turns::Turns,
    pool: warm::Pool,
    heartbeats: tokio::sync::Mutex<owner::Heartbeats>,
}

impl Docker {
    /// A backend for this engine. Does not connect yet.
    ///
    /// # Errors
    /// The address, or the certificates that go with it, cannot be used.
    pub fn new(options: Options) -> anyhow::Result<Self> {
        let engine = Engine::new(options.docker.clone(), options.call_timeout)?;
        let images =
            image::Store::new(engine.clone(), &options.images, options.docker.config_dir.clone())?;
        let owner = owner::Identity::of_this_process();
        let live = Mutex::default();
        let turns = turns::Turns::new();
        let pool = warm::Pool::new(options.warm.clone());
        Ok(Self {
            shared: Arc::new(Shared {
                engine,
                images,
                options,
                owner,
                live,
                turns,
                pool,
                heartbeats: tokio::sync::Mutex::default(),
            }),
        })
    }
}

impl Shared {
    fn live(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        // A set of names is whole whatever its last holder did.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a container with its anonymous volumes, running or not. One that is gone is no
    /// error.
    pub(super) async fn remove(&self, name: &str) -> Result<(), CallError> {
        let turn = self.turns.remove().await;
        let query =
            RemoveContainerOptions { force: true, v: true, ..RemoveContainerOptions::default() };
        let remove =
            |d: bollard::Docker| async move { d.remove_container(name, Some(query)).await };
        let removed = self.engine.call("remove the container", remove).await;
        drop(turn);
        match removed {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for Docker {
    async fn preflight(&self) -> Result<(), PreflightError> {
        self.shared.engine.preflight(self.shared.options.confinement.runtime.as_deref()).await?;
        let identify = async {
            self.shared.owner.locate(&self.shared.engine).await;
            self.shared.owner.beat(&self.shared.engine).await;
        };
        tokio::time::timeout(engine::PING_TIMEOUT, identify).await.map_err(|_| {
            PreflightError::Unavailable("the engine answers pings and nothing else".to_owned())
        })
    }

    fn prepare(&self, job: Job) -> Box<dyn Run> {
        Box::new(job_run::JobRun::new(self.shared.clone(), job))
    }

    async fn reap(&self) -> anyhow::Result<()> {
        reap::sweep(&self.shared).await
    }

    async fn tend(&self, enough: &CancellationToken) {
        let changed = tokio::sync::Notify::new();
        let listen = async {
            for failures in 1.. {
                let error = self.shared.images.listen(&changed).await;
                tracing::debug!(%error, "changes of images are not heard of; the engine is asked for each job's");
                tokio::time::sleep(LISTEN_AGAIN.delay(failures)).await;
            }
        };
        tokio::select! {
            () = listen => {}
            () = self.shared.pool.tend(&self.shared, &changed, enough) => {}
        }
    }

    fn set_rules(&self, rules: &Rules) -> anyhow::Result<()> {
        self.shared.images.allow(AllowList::new(&rules.image_allowlist)?);
        self.shared.pool.resize(rules.warm_containers);
        Ok(())
    }

    async fn retire(&self) {
        self.shared.pool.withdraw(&self.shared).await;
        self.shared.owner.withdraw(&self.shared.engine).await;
    }

    fn warm_counts(&self) -> Option<WarmCounts> {
        Some(self.shared.pool.counts())
    }
}
