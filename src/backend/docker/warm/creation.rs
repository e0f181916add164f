//! How a container comes to wait: created, attached to, started, and heard of.

use std::sync::Arc;
use std::time::Duration;

use super::line::{self, Lost};
use super::run::Idle;
use super::{MAX_AGE, volume};
use crate::agent::dialogue::Said;
use crate::backend::docker::Shared;
use crate::backend::docker::container::Container;
use crate::backend::docker::engine::CallError;
use crate::backend::docker::image::Image;
use crate::backend::docker::spec::{self, AGENT_PATH, Marks};
use crate::job::Job;

/// What the names of such containers hold where those of jobs hold the job's id.
const PURPOSE: &str = "warm";
/// How long an agent may take to say that it is there.
const READY_PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no container.
#[derive(Debug, thiserror::Error)]
pub(super) enum CreateError {
    /// The volume does not hold the agent.
    #[error("the agent is not where it should be in the container")]
    NoAgent,
    /// The engine did not do it.
    #[error(transparent)]
    Engine(CallError),
    /// The agent cannot be run in it.
    #[error("the agent does not run in it: {0}")]
    Unfit(String),
}

impl CreateError {
    /// Whether it would most likely be the same again.
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            Self::Engine(error) => error.is_refusal(),
            Self::NoAgent | Self::Unfit(_) => true,
        }
    }
}

/// Makes a container that waits for a job like `pattern`. Where that fails, what was made of it is
/// removed, or left to the reaper.
pub(super) async fn create(
    shared: &Arc<Shared>,
    pattern: &Job,
    image: &Arc<Image>,
) -> Result<Idle, CreateError> {
    let options = &shared.options;
    let owner = shared.owner.labels();
    let marks = Marks {
        instance: &options.instance,
        owner: &owner,
        deadline: Container::create_deadline(shared, MAX_AGE + pattern.limits.timeout),
    };
    let body = spec::waiting_body(pattern, image, &options.confinement, marks, volume::name());
    let container = Container::new(shared.clone(), PURPOSE);
    let started = async {
        container.create(body).await?;
        container.start(true).await
    };
    let failed = match started.await {
        Ok(attached) => {
            let (mut ear, voice) = line::open(attached);
            match tokio::time::timeout(READY_PATIENCE, ear.next()).await {
                Ok(Ok(Said::Ready)) => {
                    return Ok(Idle { container, limits: pattern.limits.clone(), ear, voice });
                }
                Ok(Ok(_)) => CreateError::Unfit("it begins with something else".to_owned()),
                Ok(Err(error @ Lost::Violated(_))) => CreateError::Unfit(error.to_string()),
                Ok(Err(Lost::Ended)) => CreateError::Unfit("it ends at once".to_owned()),
                Err(_) => CreateError::Unfit("it says nothing".to_owned()),
            }
        }
        Err(CallError::Refused { message, .. })
            if message.contains(AGENT_PATH) && message.contains("no such file") =>
        {
            CreateError::NoAgent
        }
        Err(error) => {
            if error.is_not_found() {
                // The image is gone, whatever was known of it.
                shared.images.forget();
            }
            CreateError::Engine(error)
        }
    };
    if let Err(error) = container.remove().await {
        tracing::debug!(%error, "a container that did not start is left to the reaper");
    }
    Err(failed)
}
