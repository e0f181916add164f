//! The engine's API with a deadline on every call, and its errors told apart.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;

use super::PreflightError;
use crate::job::{Failure, JobError, code};

/// A client for one engine. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    docker: Docker,
    call_timeout: Duration,
    /// Whether the engine was found fit since it last came up.
    fit: Arc<AtomicBool>,
}

/// How long a healthy engine may take to say that it is alive.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The engine answered with an error.
    #[error("the engine refused to {action}: {message}")]
    Refused {
        action: &'static str,
        status: u16,
        message: String,
    },
    /// No connection, or it broke.
    #[error("the engine cannot be reached to {action}: {source}")]
    Unreachable {
        action: &'static str,
        source: Box<Error>,
    },
    /// No answer in time.
    #[error("the engine did not {action} within {}", humantime::format_duration(*.after))]
    Timeout {
        action: &'static str,
        after: Duration,
    },
}

impl CallError {
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// The state the call asked for holds already (304), or cannot hold any more (409): a
    /// container that has stopped, a removal under way.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                status: 304 | 409,
                ..
            }
        )
    }

    fn from_bollard(action: &'static str, error: Error) -> Self {
        match error {
            Error::DockerResponseServerError {
                status_code,
                message,
            } => Self::Refused {
                action,
                status: status_code,
                message,
            },
            other => Self::Unreachable {
                action,
                source: Box::new(other),
            },
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let code = match &error {
            CallError::Refused { .. } => code::ENGINE_ERROR,
            CallError::Unreachable { .. } => code::ENGINE_UNAVAILABLE,
            CallError::Timeout { .. } => code::ENGINE_TIMEOUT,
        };
        Self::Transient(JobError::new(code, error.to_string()))
    }
}

impl Engine {
    pub(super) fn new(call_timeout: Duration) -> anyhow::Result<Self> {
        let docker = Docker::connect_with_defaults()?;
        // The library's own timeout covers the response's head alone; every call gets one of ours.
        let docker = docker.with_timeout(call_timeout + Duration::from_secs(1));
        Ok(Self {
            docker,
            call_timeout,
            fit: Arc::default(),
        })
    }

    /// The library's client, for streams; single calls go through [`Self::call`].
    pub(super) fn docker(&self) -> &Docker {
        &self.docker
    }

    /// A call that ends within the call timeout, whatever the engine does.
    pub(super) async fn call<T>(
        &self,
        action: &'static str,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(self.call_timeout, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(CallError::from_bollard(action, error)),
            Err(_) => Err(CallError::Timeout {
                action,
                after: self.call_timeout,
            }),
        }
    }

    /// Whether other machines may use this engine too.
    pub(super) fn is_remote(&self) -> bool {
        std::env::var("DOCKER_HOST")
            .is_ok_and(|host| !host.is_empty() && !host.starts_with("unix:"))
    }

    /// Checks that the engine answers, speaks a version of the API we know, and has the runtime.
    /// Once it has passed, a ping will do until one fails.
    pub(super) async fn preflight(&self, runtime: Option<&str>) -> Result<(), PreflightError> {
        let checked = async {
            if self.fit.load(Ordering::Relaxed) {
                let alive = self.call("answer a ping", self.docker.ping()).await;
                alive
                    .map(|_| ())
                    .map_err(|e| PreflightError::Unavailable(e.to_string()))
            } else {
                self.examine(runtime).await
            }
        };
        let result = tokio::time::timeout(PING_TIMEOUT, checked)
            .await
            .unwrap_or_else(|_| {
                Err(PreflightError::Unavailable(format!(
                    "the engine did not answer within {}",
                    humantime::format_duration(PING_TIMEOUT)
                )))
            });
        self.fit.store(result.is_ok(), Ordering::Relaxed);
        result
    }

    async fn examine(&self, runtime: Option<&str>) -> Result<(), PreflightError> {
        let unavailable = |e: CallError| PreflightError::Unavailable(e.to_string());
        // Lowers the version of all clones to what the engine speaks: they share it.
        self.call("tell its version", self.docker.clone().negotiate_version())
            .await
            .map_err(unavailable)?;
        let info = self
            .call("describe itself", self.docker.info())
            .await
            .map_err(unavailable)?;
        if let Some(os) = info.os_type.as_deref().filter(|os| *os != "linux") {
            return Err(PreflightError::Unfit(format!(
                "the engine runs {os} containers; functions need Linux containers"
            )));
        }
        let known = info.runtimes.unwrap_or_default();
        if let Some(runtime) = runtime.filter(|r| !known.contains_key(*r)) {
            let mut names: Vec<&str> = known.keys().map(String::as_str).collect();
            names.sort_unstable();
            return Err(PreflightError::Unfit(format!(
                "CONTAINER_RUNTIME is {runtime:?}, which the engine does not have; it has {}",
                names.join(", ")
            )));
        }
        if info.memory_limit == Some(false) || info.pids_limit == Some(false) {
            tracing::warn!(
                "the engine cannot limit memory or processes: functions are less confined"
            );
        }
        Ok(())
    }
}
