//! One container, as the engine's API knows it: each step of its life is a method.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bollard::Docker;
use bollard::container::AttachContainerResults;
use bollard::errors::Error;
use bollard::models::{ContainerCreateBody, ContainerInspectResponse};
use bollard::query_parameters::{
    AttachContainerOptions, ContainerArchiveInfoOptions, CreateContainerOptions,
    InspectContainerOptions, KillContainerOptions, RenameContainerOptions, StartContainerOptions,
    WaitContainerOptions,
};
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};

use super::Shared;
use super::engine::{CallError, Engine};
use super::renaming::Renaming;
use super::spec;
use crate::backend::{CleanupError, Exit, Signal};
use crate::job::{Failure, Job, JobError, JobId, Limits, Usage, code};

/// When to look again whether an exit with 137 was for want of memory: the kernel's notice and the
/// exit reach the engine by different ways.
const OOM_NOTICE_DELAYS: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(150)];
/// Exit code of a process that SIGKILL ended.
const KILLED: i64 = 128 + 9;
/// How many places a command is looked for in, and for how long.
const MAX_CANDIDATES: usize = 32;
const LOOK_PATIENCE: Duration = Duration::from_secs(5);
/// How long a function runs before its container, made for none, is named after its job.
const RENAME_AFTER: Duration = Duration::from_millis(300);
/// Slack between a run's own deadline and the label that lets others remove its container.
const DEADLINE_MARGIN: Duration = Duration::from_secs(60);

/// A container's name, and the engine it is in. The name is known before the container exists, so
/// that it can be removed even when the call that creates it gets no answer.
pub(super) struct Container {
    shared: Arc<Shared>,
    name: String,
    /// The name it gets once it serves a job, where it was made for none.
    job_name: Option<String>,
    /// What the engine calls it, whatever its name becomes.
    id: OnceLock<String>,
    /// Whether a signal was asked for: an exit with 137 is then no riddle.
    signalled: AtomicBool,
}

impl Container {
    /// A container that does not exist yet, named after `purpose`: a job's id, or what it is kept
    /// for. The reaper leaves it alone until this value is dropped.
    pub(super) fn new(shared: Arc<Shared>, purpose: &str) -> Self {
        let name = name_for(purpose);
        shared.live().insert(name.clone());
        Self { shared, name, job_name: None, id: OnceLock::new(), signalled: false.into() }
    }

    fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// What to call it in calls to the engine.
    pub(super) fn handle(&self) -> String {
        self.id.get().unwrap_or(&self.name).clone()
    }

    /// What is on the labels of a container that may live for `lifetime` beyond the calls that make
    /// and end it.
    pub(super) fn create_deadline(shared: &Shared, lifetime: Duration) -> SystemTime {
        let options = &shared.options;
        let calls = options.stop_grace + 2 * options.call_timeout;
        SystemTime::now() + lifetime + calls + DEADLINE_MARGIN
    }

    /// Creates it.
    pub(super) async fn create(&self, body: ContainerCreateBody) -> Result<(), CallError> {
        let query = CreateContainerOptions { name: Some(self.name.clone()), ..Default::default() };
        let create = |d: Docker| async move { d.create_container(Some(query), body).await };
        let created = self.engine().call("create the container", create).await?;
        // It is created once.
        let _ = self.id.set(created.id);
        Ok(())
    }

    /// Attaches, then starts: what a function prints in its first milliseconds is lost otherwise.
    pub(super) async fn start(&self, stdin: bool) -> Result<AttachContainerResults, CallError> {
        let name = &self.handle();
        let query = AttachContainerOptions {
            stream: true,
            stdin,
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let attach = |d: Docker| async move { d.attach_container(name, Some(query)).await };
        let attached = self.engine().call("attach to the container", attach).await?;
        let options = None::<StartContainerOptions>;
        let start = |d: Docker| async move { d.start_container(name, options).await };
        self.engine().call("start the container", start).await?;
        Ok(attached)
    }

    /// Gives it other limits than it was created with.
    pub(super) async fn limit(&self, limits: &Limits) -> Result<(), CallError> {
        let (body, handle) = (spec::update_body(limits), self.handle());
        let update = |d: Docker| async move { d.update_container(&handle, body).await };
        self.engine().call("change the container's limits", update).await
    }

    /// Gives it to a job, whose name it gets by and by: by then a name is of use to those who look,
    /// and whoever waits for a short function does not wait for it. The renaming must have ended before
    /// the container is removed.
    pub(super) fn serve(&mut self, id: &JobId) -> Renaming {
        let name = name_for(id.as_str());
        self.shared.live().insert(name.clone());
        self.job_name = Some(name.clone());
        let (engine, handle) = (self.engine().clone(), self.handle());
        Renaming::after(RENAME_AFTER, async move {
            let query = RenameContainerOptions { name };
            let rename = |d: Docker| async move { d.rename_container(&handle, query).await };
            if let Err(error) = engine.call("rename the container", rename).await {
                tracing::debug!(%error, "a container keeps the name it had before it served");
            }
        })
    }

    /// Waits for the container's exit code.
    ///
    /// `not-running` returns at once for a container that has ended already; it is asked for only
    /// after a successful start, since before one it would return at once, too.
    pub(super) fn exit_code(&self) -> BoxFuture<'static, Result<i64, Failure>> {
        let (engine, name) = (self.engine().clone(), self.handle());
        async move {
            let query = WaitContainerOptions { condition: "not-running".to_owned() };
            let mut exits = engine.docker()?.wait_container(&name, Some(query));
            match exits.next().await {
                Some(Ok(exit)) => Ok(exit.status_code),
                // The library's way to say that the code was not 0.
                Some(Err(Error::DockerContainerWaitError { code, .. })) => Ok(code),
                Some(Err(Error::DockerResponseServerError { status_code: 404, .. })) => {
                    Err(vanished())
                }
                Some(Err(_)) | None => Err(engine_lost()),
            }
        }
        .boxed()
    }

    pub(super) fn signal(&self, signal: Signal) -> BoxFuture<'static, Result<(), Failure>> {
        self.signalled.store(true, Ordering::Relaxed);
        let (engine, name) = (self.engine().clone(), self.handle());
        let signal = match signal {
            Signal::Term => "SIGTERM",
            Signal::Kill => "SIGKILL",
        };
        async move {
            let query = KillContainerOptions { signal: signal.to_owned() };
            let kill = |d: Docker| async move { d.kill_container(&name, Some(query)).await };
            match engine.call("signal the container", kill).await {
                Err(e) if !e.is_not_found() && !e.is_conflict() => Err(e.into()),
                _ => Ok(()),
            }
        }
        .boxed()
    }

    pub(super) async fn remove(&self) -> Result<(), CleanupError> {
        let Err(error) = self.shared.remove(&self.handle()).await else {
            return Ok(());
        };
        let may_be_running = match self.inspect().await {
            Ok(inspected) => inspected.state.and_then(|s| s.running).unwrap_or(true),
            Err(e) => !e.is_not_found(),
        };
        Err(CleanupError { message: error.to_string(), may_be_running })
    }

    async fn inspect(&self) -> Result<ContainerInspectResponse, CallError> {
        let (query, handle) = (None::<InspectContainerOptions>, self.handle());
        let inspect = |d: Docker| async move { d.inspect_container(&handle, query).await };
        self.engine().call("inspect the container", inspect).await
    }

    /// What the engine says of the exit. That it answers at all shows that it was not its own
    /// end that killed the function.
    pub(super) async fn explain(
        &self,
        code: i64,
        init_message: Option<&[u8]>,
    ) -> Result<Exit, Failure> {
        let gone = |e: CallError| {
            if e.is_not_found() { vanished() } else { e.into() }
        };
        let oom = |i: &ContainerInspectResponse| {
            i.state.as_ref().and_then(|s| s.oom_killed).unwrap_or(false)
        };
        let mut inspected = self.inspect().await.map_err(gone)?;
        let signalled = self.signalled.load(Ordering::Relaxed);
        for delay in OOM_NOTICE_DELAYS {
            if oom(&inspected) || code != KILLED || signalled {
                break;
            }
            tokio::time::sleep(delay).await;
            inspected = self.inspect().await.map_err(gone)?;
        }
        let not_started = self.not_started(code, init_message, &inspected).await;
        Ok(Exit {
            code,
            oom_killed: oom(&inspected),
            not_started,
            ran: None,
            usage: Usage::default(),
        })
    }

    /// Whether the exit is the init process' word that it could not execute the command, and not
    /// the function's own.
    async fn not_started(
        &self,
        code: i64,
        said: Option<&[u8]>,
        inspected: &ContainerInspectResponse,
    ) -> Option<Failure> {
        let said = said?;
        let (command, reason) = init_failure(code, said)?;
        if inspected.path.as_deref() != Some(command) {
            return None;
        }
        // A function can print the same words, but only one whose command can be run.
        let looked =
            tokio::time::timeout(LOOK_PATIENCE, self.is_runnable(command, code, inspected));
        if looked.await.unwrap_or(true) {
            return None;
        }
        let (code, what) = match code {
            126 => (code::COMMAND_NOT_EXECUTABLE, "cannot be executed"),
            _ => (code::COMMAND_NOT_FOUND, "is not in the image"),
        };
        let message = format!("the command {command:?} {what}: {reason}");
        Some(Failure::Rejected(JobError::new(code, message)))
    }

    /// Whether the file that the init process could not execute can be executed after all: is
    /// there (127), or is there for everybody to execute (126).
    async fn is_runnable(
        &self,
        command: &str,
        code: i64,
        inspected: &ContainerInspectResponse,
    ) -> bool {
        let config = inspected.config.as_ref();
        let dir = config.and_then(|c| c.working_dir.as_deref()).unwrap_or_default();
        let env = config.and_then(|c| c.env.as_deref()).unwrap_or_default();
        for path in candidates(command, dir, env) {
            let Some(mut file) = self.stat(path).await else { continue };
            if file.is_link() {
                let Some(target) = self.stat(file.link_target).await else { continue };
                file = target;
            }
            if code == 127 || file.is_executable_by_all() {
                return true;
            }
        }
        false
    }

    async fn stat(&self, path: String) -> Option<File> {
        let query = ContainerArchiveInfoOptions { path };
        let name = &self.handle();
        let stat = |d: Docker| async move { d.get_container_archive_info(name, Some(query)).await };
        let stat = self.engine().call("look for the command", stat).await.ok()?;
        Some(File { mode: stat.file_mode, link_target: stat.link_target })
    }
}

/// A file in a container.
struct File {
    /// Go's `FileMode`, which the engine sends: permissions as in Unix, kinds in the high bits.
    mode: u32,
    link_target: String,
}

impl File {
    const DIRECTORY: u32 = 1 << 31;
    const LINK: u32 = 1 << 27;

    fn is_link(&self) -> bool {
        self.mode & Self::LINK != 0
    }

    fn is_executable_by_all(&self) -> bool {
        self.mode & Self::DIRECTORY == 0 && self.mode & 0o001 != 0
    }
}

/// Where `command` is looked for, as execvp(3) does. At most [`MAX_CANDIDATES`] places: the
/// environment is the caller's.
fn candidates(command: &str, dir: &str, env: &[String]) -> Vec<String> {
    if command.is_empty() {
        Vec::new()
    } else if command.starts_with('/') {
        vec![command.to_owned()]
    } else if command.contains('/') {
        vec![format!("{dir}/{command}")]
    } else {
        let path = env.iter().find_map(|v| v.strip_prefix("PATH="));
        let dirs = path.unwrap_or(DEFAULT_PATH).split(':');
        dirs.take(MAX_CANDIDATES).map(|dir| format!("{dir}/{command}")).collect()
    }
}

impl Drop for Container {
    /// A container that was not removed is the reaper's from here on.
    fn drop(&mut self) {
        let mut live = self.shared.live();
        live.remove(&self.name);
        if let Some(name) = &self.job_name {
            live.remove(name);
        }
    }
}

fn name_for(purpose: &str) -> String {
    let unique = uuid::Uuid::now_v7().as_u64_pair().1;
    format!("worker-spawner-{purpose}-{:08x}", unique & 0xffff_ffff)
}

/// The failure of a run whose engine went away: nothing is known of the function's end.
pub(super) fn engine_lost() -> Failure {
    let message = "the engine went away while the function ran";
    Failure::Transient(JobError::new(code::ENGINE_UNAVAILABLE, message))
}

fn vanished() -> Failure {
    let message = "the container was removed by somebody else while it ran";
    Failure::Transient(JobError::new(code::CONTAINER_VANISHED, message))
}

/// An engine's refusal to create or start a container, put down to whom it is due to.
pub(super) fn failure(error: CallError, job: &Job) -> Failure {
    match &error {
        CallError::Refused { status, message, .. } => {
            refusal(*status, message, job).unwrap_or_else(|| error.into())
        }
        _ => error.into(),
    }
}

/// Where commands are looked for when the image does not say; what engines set then.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Tells what the engine's words mean for a container it will not create or start; nothing where
/// they mean the engine's own failure.
fn refusal(status: u16, message: &str, job: &Job) -> Option<Failure> {
    let lower = message.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let rejected = |code, message: String| Some(Failure::Rejected(JobError::new(code, message)));
    if says(&["unable to find user", "unable to find group", "no matching entries in"]) {
        let user = job.user.as_deref().unwrap_or_default();
        return rejected(code::INVALID_USER, format!("user {user:?}: {message}"));
    }
    // The engine's own trouble can come in the same words: a full disk, a missing helper program.
    if says(&["no space left", "cannot allocate memory", "docker-init", "containerd-shim"]) {
        return None;
    }
    if says(&["cannot mkdir", "chdir to cwd"]) {
        let dir = job.working_dir.as_deref().unwrap_or_default();
        return rejected(code::INVALID_WORKING_DIR, format!("working_dir {dir:?}: {message}"));
    }
    // The command's own name, and not that of a runtime or a helper program of the engine.
    if job.args.first().is_some_and(|arg| message.contains(&format!("exec: {arg:?}"))) {
        if says(&["executable file not found", "no such file or directory"]) {
            return rejected(code::COMMAND_NOT_FOUND, message.to_owned());
        }
        if says(&["permission denied"]) {
            return rejected(code::COMMAND_NOT_EXECUTABLE, message.to_owned());
        }
    }
    if says(&["no command specified"]) {
        return rejected(code::IMAGE_NO_COMMAND, message.to_owned());
    }
    // An image that was removed between its inspection and now is pulled again by a next attempt,
    // a container removed between its creation and now is created again.
    if status == 404 && says(&["no such image", "no such container"]) {
        return None;
    }
    // What remains of the client errors will not be mended by trying again.
    (400..500)
        .contains(&status)
        .then(|| Failure::Permanent(JobError::new(code::CONTAINER_REFUSED, message)))
}

/// The command and the reason, where `said` is nothing but the init process' report that it could
/// not execute the function: `[FATAL tini (7)] exec COMMAND failed: REASON`.
fn init_failure(code: i64, said: &[u8]) -> Option<(&str, &str)> {
    if !matches!(code, 126 | 127) {
        return None;
    }
    let said = std::str::from_utf8(said).ok()?.strip_suffix('\n')?;
    let (pid, rest) = said.strip_prefix("[FATAL tini (")?.split_once(")] exec ")?;
    pid.parse::<u32>().ok()?;
    rest.rsplit_once(" failed: ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Limits;

    fn refused(status: u16, message: &str) -> Option<String> {
        let job = Job {
            id: crate::job::JobId::new(),
            image: "python".to_owned(),
            args: vec!["nosuch".to_owned()],
            env: Default::default(),
            stdin: None,
            working_dir: Some("/w".to_owned()),
            user: None,
            network: "none".to_owned(),
            labels: Default::default(),
            limits: Limits { timeout: Duration::ZERO, memory_bytes: 0, cpus: 1.0, pids: 1 },
        };
        refusal(status, message, &job).map(|failure| failure.error().code.to_string())
    }

    #[test]
    fn refusals_are_put_down_to_whom_they_are_due_to() {
        for (status, message, code) in [
            (
                400,
                "unable to find user x: no matching entries in passwd file",
                Some(code::INVALID_USER),
            ),
            (400, "Cannot mkdir: /etc/passwd is not a directory", Some(code::INVALID_WORKING_DIR)),
            (500, "mkdir /var/lib/docker/overlay2/x: no space left on device", None),
            (500, "mkdir /sys/fs/cgroup/memory/docker/x: cannot allocate memory", None),
            (500, "exec: \"docker-init\": executable file not found in $PATH", None),
            (
                400,
                "runc create failed: exec: \"nosuch\": executable file not found in $PATH",
                Some(code::COMMAND_NOT_FOUND),
            ),
            (400, "exec: \"nosuch\": permission denied", Some(code::COMMAND_NOT_EXECUTABLE)),
            (500, "failed: exec: \"runsc\": executable file not found in $PATH", None),
            (404, "No such image: sha256:x", None),
            (404, "No such container: x", None),
            (404, "network lan not found", Some(code::CONTAINER_REFUSED)),
            (500, "server error", None),
        ] {
            assert_eq!(refused(status, message).as_deref(), code, "{message}");
        }
    }

    #[test]
    fn commands_are_looked_for_in_few_places() {
        assert_eq!(candidates("", "/", &[]), [""; 0]);
        assert_eq!(candidates("/a/b", "/", &[]), ["/a/b"]);
        assert_eq!(candidates("./b", "/w", &[]), ["/w/./b"]);
        assert_eq!(candidates("b", "/w", &["PATH=/x:/y".to_owned()]), ["/x/b", "/y/b"]);
        let long = format!("PATH={}", "/x:".repeat(5000));
        assert_eq!(candidates("b", "/", &[long]).len(), MAX_CANDIDATES);
    }

    #[test]
    fn the_init_process_own_words_are_known() {
        let not_found = b"[FATAL tini (7)] exec nosuch failed: No such file or directory\n";
        assert_eq!(init_failure(127, not_found), Some(("nosuch", "No such file or directory")));
        assert_eq!(init_failure(1, not_found), None);
        for said in [
            &b""[..],
            b"sh: nosuch: not found\n",
            b"x[FATAL tini (7)] exec nosuch failed: No such file or directory\n",
            b"[FATAL tini (7)] exec nosuch failed: No such file or directory\nmore",
            b"[FATAL tini (x)] exec nosuch failed: No such file or directory\n",
            b"\xff\n",
        ] {
            assert_eq!(init_failure(127, said), None, "{:?}", String::from_utf8_lossy(said));
        }
    }
}
