//! The Docker backend: a fresh container for every job, through the engine's API.

mod cold;
mod container;
mod credentials;
mod engine;
mod image;
mod owner;
mod progress;
mod reap;
mod reference;
mod spec;
mod turns;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bollard::query_parameters::RemoveContainerOptions;

use super::{Backend, PreflightError, Run};
use crate::config::{self, Confinement, Images};
use crate::job::Job;
use engine::{CallError, Engine};

pub use reference::AllowList;

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
    pub call_timeout: std::time::Duration,
    /// How long a function may take from TERM to KILL; part of a container's deadline label.
    pub stop_grace: std::time::Duration,
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
        Ok(Self {
            shared: Arc::new(Shared {
                engine,
                images,
                options,
                owner,
                live,
                turns,
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
        Box::new(cold::ColdRun::new(self.shared.clone(), job))
    }

    async fn reap(&self) -> anyhow::Result<()> {
        reap::sweep(&self.shared).await
    }

    async fn retire(&self) {
        self.shared.owner.withdraw(&self.shared.engine).await;
    }
}
