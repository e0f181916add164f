//! The engine's API with a deadline on every call, and its errors told apart.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bollard::errors::Error;
use bollard::{API_DEFAULT_VERSION, Docker};

use super::PreflightError;
use crate::config::{self, DockerTls};
use crate::job::{Failure, JobError, code};

/// A client for one engine. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    /// Made when the engine's socket is first there: the library makes none without.
    docker: Arc<OnceLock<Docker>>,
    address: Arc<config::Docker>,
    call_timeout: Duration,
    /// Whether the engine was found fit since it last came up.
    fit: Arc<AtomicBool>,
}

/// How long a healthy engine may take to say that it is alive.
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The engine answered with an error.
    #[error("the engine refused to {action}: {message}")]
    Refused { action: &'static str, status: u16, message: String },
    /// No connection, or it broke.
    #[error("the engine cannot be reached: {why}")]
    Unreachable { why: String },
    /// No answer in time.
    #[error("the engine did not {action} within {}", humantime::format_duration(*.after))]
    Timeout { action: &'static str, after: Duration },
}

impl CallError {
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// The engine answered, and said no.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// The state the call asked for holds already (304), or cannot hold any more (409): a
    /// container that has stopped, a removal under way.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused { status: 304 | 409, .. })
    }

    pub(super) fn from_bollard(action: &'static str, error: Error) -> Self {
        match error {
            Error::DockerResponseServerError { status_code, message } => {
                Self::Refused { action, status: status_code, message }
            }
            other => Self::Unreachable { why: explain(&other) },
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
    /// A client for the engine at `address`. Does not connect, and does not mind that
    /// there is no engine yet.
    pub(super) fn new(address: config::Docker, call_timeout: Duration) -> anyhow::Result<Self> {
        let engine = Self {
            docker: Arc::default(),
            address: Arc::new(address),
            call_timeout,
            fit: Arc::default(),
        };
        match engine.connect() {
            Ok(_) | Err(Error::SocketNotFoundError(_)) => Ok(engine),
            Err(error) => Err(anyhow::anyhow!("DOCKER_HOST: {}", explain(&error))),
        }
    }

    fn connect(&self) -> Result<Docker, Error> {
        if let Some(docker) = self.docker.get() {
            return Ok(docker.clone());
        }
        // The library's own timeout covers the response's head alone; every call gets one of ours.
        let timeout = self.call_timeout.as_secs() + 1;
        let (host, version) = (&self.address.host, API_DEFAULT_VERSION);
        let docker = match &self.address.tls {
            Some(DockerTls { ca, cert, key }) => {
                Docker::connect_with_ssl(host, key, cert, ca, timeout, version)?
            }
            None if host.starts_with("unix://") => {
                Docker::connect_with_unix(host, timeout, version)?
            }
            None => Docker::connect_with_http(host, timeout, version)?,
        };
        Ok(self.docker.get_or_init(|| docker).clone())
    }

    /// The library's client, for streams; single calls go through [`Self::call`].
    pub(super) fn docker(&self) -> Result<Docker, CallError> {
        self.connect().map_err(|e| CallError::Unreachable { why: explain(&e) })
    }

    /// A call that ends within the call timeout, whatever the engine does.
    pub(super) async fn call<T, F>(
        &self,
        action: &'static str,
        call: impl FnOnce(Docker) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let call = call(self.docker()?);
        match tokio::time::timeout(self.call_timeout, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(CallError::from_bollard(action, error)),
            Err(_) => Err(CallError::Timeout { action, after: self.call_timeout }),
        }
    }

    /// Whether other machines may use this engine too.
    pub(super) fn is_remote(&self) -> bool {
        !self.address.host.starts_with("unix://")
    }

    /// Checks that the engine answers, speaks a version of the API we know, and has the runtime.
    /// Once it has passed, a ping will do until one fails.
    pub(super) async fn preflight(&self, runtime: Option<&str>) -> Result<(), PreflightError> {
        let checked = async {
            if self.fit.load(Ordering::Relaxed) {
                let alive = self.call("answer a ping", |d| async move { d.ping().await }).await;
                alive.map(|_| ()).map_err(|e| PreflightError::Unavailable(e.to_string()))
            } else {
                self.examine(runtime).await
            }
        };
        let result = tokio::time::timeout(PING_TIMEOUT, checked).await.unwrap_or_else(|_| {
            Err(PreflightError::Unavailable(format!(
                "the engine did not answer within {}",
                humantime::format_duration(PING_TIMEOUT)
            )))
        });
        self.fit.store(result.is_ok(), Ordering::Relaxed);
        result
    }

    async fn examine(&self, runtime: Option<&str>) -> Result<(), PreflightError> {
        // Lowers the version of all clones to what the engine speaks: they share it.
        self.call("tell its version", Docker::negotiate_version).await.map_err(unavailable)?;
        let info = self
            .call("describe itself", |d| async move { d.info().await })
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

fn unavailable(error: CallError) -> PreflightError {
    PreflightError::Unavailable(error.to_string())
}

/// An error with its causes, which the library's own words leave out, and what to do where that is
/// plain.
fn explain(error: &Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    let mut words: Vec<String> = Vec::new();
    for cause in causes.map(ToString::to_string) {
        // Some errors say what their causes say again.
        if !words.iter().any(|known| known.contains(&cause)) {
            words.push(cause);
        }
    }
    let words = words.join(": ");
    if words.contains("Permission denied") {
        format!("{words}; the daemon's user needs access to the socket, usually by its group")
    } else {
        words
    }
}
