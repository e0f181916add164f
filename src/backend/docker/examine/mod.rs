//! What an operator wants to know of an engine before a daemon relies on it.
//!
//! Nothing here changes anything in the engine.

mod abilities;
mod disk;
mod registries;
mod socket;

use super::engine::{Engine, PING_TIMEOUT};
use crate::config::{Confinement, Docker, Policy};
use crate::finding::{Finding, Tell};

/// The check of whether the engine is there.
const ENGINE: &str = "engine";

/// Looks at the engine, at what it can do, and at the credentials of the registries.
pub async fn examine(docker: &Docker, confinement: &Confinement, policy: &Policy, tell: Tell<'_>) {
    if let Some(engine) = reach(docker, tell).await {
        abilities::examine(&engine, docker, confinement, policy, tell).await;
    }
    registries::examine(docker.config_dir.as_deref(), tell);
}

/// An engine that answers.
async fn reach(docker: &Docker, tell: Tell<'_>) -> Option<Engine> {
    if let Some(path) = docker.host.strip_prefix("unix://")
        && let Err(finding) = socket::examine(path.as_ref()).await
    {
        tell(finding);
        return None;
    }
    let engine = match Engine::new(docker.clone(), PING_TIMEOUT) {
        Ok(engine) => engine,
        Err(error) => {
            tell(Finding::fail(
                ENGINE,
                format!("{error:#}"),
                "correct DOCKER_HOST, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH",
            ));
            return None;
        }
    };
    match engine.call("answer a ping", |d| async move { d.ping().await }).await {
        Ok(_) => Some(engine),
        Err(error) => {
            tell(socket::silent(&docker.host, &error));
            None
        }
    }
}
