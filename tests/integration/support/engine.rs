//! Docker engines: the machine's own, shared by all, and private ones to stop, kill and freeze.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use bollard::Docker;
use bollard::exec::{StartExecOptions, StartExecResults};
use bollard::models::{ContainerCreateBody, ContainerSummary, ExecConfig};
use bollard::query_parameters::{
    CreateContainerOptions, ListContainersOptions, ListImagesOptions, RemoveContainerOptions,
    RemoveImageOptions,
};
use futures::StreamExt;
use tempfile::TempDir;

use super::images::{self, Image};
use super::nats::Tmpfs;
use super::process::{self, Signal, bound_to_this_thread, children_of};
use super::wait::{PATIENCE, eventually, within};

/// The label that names a container's job.
pub(crate) const JOB_LABEL: &str = "worker-spawner.job-id";
/// The label that names the daemon a container belongs to.
pub(crate) const INSTANCE_LABEL: &str = "worker-spawner.instance";
/// The label of a container that was started for no job in particular.
pub(crate) const WARM_LABEL: &str = "worker-spawner.warm";
/// What the name of such a container holds until a job has it.
const IDLE: &str = "warm";
/// What the names of the volumes begin with that hold the agent of such containers.
pub(crate) const AGENT_VOLUMES: &str = "worker-spawner-agent-";

/// A way to an engine, with the questions tests ask it.
#[derive(Clone)]
pub(crate) struct Engine {
    docker: Docker,
    /// What DOCKER_HOST must be for the daemon to get to the same engine.
    pub(crate) host: Option<String>,
}

impl Engine {
    /// The engine the environment names, else the machine's own.
    pub(crate) async fn shared() -> Self {
        let host = std::env::var("DOCKER_HOST").ok();
        let docker = Docker::connect_with_defaults().unwrap();
        Self { docker: docker.negotiate_version().await.expect("a Docker engine is needed"), host }
    }

    /// The image's name on this engine, made if it was not there.
    pub(crate) async fn image(&self, image: Image) -> String {
        images::ensure(&self.docker, image).await
    }

    /// All containers, running or not, that are a job's.
    pub(crate) async fn containers(&self) -> Vec<ContainerSummary> {
        let mut all = self.labelled(INSTANCE_LABEL).await;
        all.retain(|container| job_of(container).is_some());
        all
    }

    /// The containers that wait for a job of the daemon `pid`, or have waited: one gets its job's
    /// name only when the job has run for a moment.
    pub(crate) async fn idle(&self, pid: u32) -> Vec<ContainerSummary> {
        let mut all = self.labelled(WARM_LABEL).await;
        all.retain(|container| is_idle(container) && is_owned_by(container, pid));
        all
    }

    /// The containers, running or not, that have this label.
    async fn labelled(&self, name: &str) -> Vec<ContainerSummary> {
        self.docker.list_containers(Some(labelled(name))).await.unwrap()
    }

    /// The containers of the job `id`, running or not.
    pub(crate) async fn containers_of(&self, id: &str) -> Vec<ContainerSummary> {
        let mut all = self.containers().await;
        all.retain(|container| job_of(container) == Some(id));
        all
    }

    /// Waits until a container of the job `id` runs, and returns the container's id.
    pub(crate) async fn running(&self, id: &str) -> String {
        within(&format!("a container of {id} runs"), PATIENCE, async {
            loop {
                if let Some(container) = self.running_now(id).await {
                    return container;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await
    }

    async fn running_now(&self, id: &str) -> Option<String> {
        self.running_all(id).await.into_iter().next()
    }

    /// The containers of the job `id` that run.
    pub(crate) async fn running_all(&self, id: &str) -> Vec<String> {
        let mut running = Vec::new();
        for container in self.containers_of(id).await.into_iter().filter_map(|found| found.id) {
            let inspected = self.docker.inspect_container(&container, None).await;
            let state = inspected.ok().and_then(|inspected| inspected.state);
            if state.and_then(|state| state.running) == Some(true) {
                running.push(container);
            }
        }
        running
    }

    /// Waits until nothing is left of the job `id`.
    pub(crate) async fn gone(&self, id: &str) {
        eventually(&format!("no container of {id} is left"), || async {
            self.containers_of(id).await.is_empty()
        })
        .await;
    }

    /// Runs a command inside a running container, and returns what it printed.
    pub(crate) async fn exec(&self, container: &str, command: &[&str]) -> String {
        self.try_exec(container, command).await.unwrap()
    }

    /// As [`exec`](Self::exec), in a container that may have ended.
    pub(crate) async fn try_exec(
        &self,
        container: &str,
        command: &[&str],
    ) -> Result<String, bollard::errors::Error> {
        let config = ExecConfig {
            cmd: Some(command.iter().map(ToString::to_string).collect()),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..Default::default()
        };
        let exec = self.docker.create_exec(container, config).await?;
        let started = self.docker.start_exec(&exec.id, None::<StartExecOptions>).await?;
        let StartExecResults::Attached { mut output, .. } = started else {
            panic!("exec did not attach")
        };
        let mut printed = String::new();
        while let Some(chunk) = output.next().await {
            printed.push_str(&chunk?.to_string());
        }
        Ok(printed)
    }

    pub(crate) fn docker(&self) -> &Docker {
        &self.docker
    }

    /// As [`remove_containers_blocking`].
    pub(crate) fn remove_containers_blocking(
        &self,
        matches: impl Fn(&ContainerSummary) -> bool + Send,
    ) {
        remove_containers_blocking(self.host.as_deref(), matches);
    }

    /// Removes all images of the repository of `name` when the returned guard is dropped, those
    /// that have lost their tag to a later one as well.
    pub(crate) fn remove_later(&self, name: &str) -> ImageGuard {
        let name = name.split('@').next().unwrap_or(name);
        let end = name.rfind('/').unwrap_or(0);
        let tag = name[end..].find(':').map_or(name.len(), |colon| end + colon);
        ImageGuard { host: self.host.clone(), repository: name[..tag].to_string() }
    }

    /// Makes a container that is no daemon's, with labels that look a little like one's.
    pub(crate) async fn foreign_container(&self) -> ForeignContainer {
        let labels = HashMap::from([
            ("worker-spawner".to_string(), "1".to_string()),
            ("com.example.worker-spawner.instance".to_string(), "gone".to_string()),
        ]);
        let body = ContainerCreateBody {
            image: Some(self.image(Image::Busybox).await),
            cmd: Some(vec!["sleep".into(), "1000".into()]),
            labels: Some(labels),
            network_disabled: Some(true),
            ..Default::default()
        };
        let options = CreateContainerOptions {
            name: Some(format!("worker-spawner-look-alike-{}", super::unique())),
            ..Default::default()
        };
        let id = self.docker.create_container(Some(options), body).await.unwrap().id;
        ForeignContainer { host: self.host.clone(), id }
    }
}

/// The value of `container`'s label `name`.
pub(crate) fn label<'a>(container: &'a ContainerSummary, name: &str) -> Option<&'a str> {
    container.labels.as_ref()?.get(name).map(String::as_str)
}

/// The job a container is or was for. One that was started ahead of time has it in its name alone.
pub(crate) fn job_of(container: &ContainerSummary) -> Option<&str> {
    label(container, JOB_LABEL).or_else(|| {
        label(container, WARM_LABEL)?;
        purpose(container).filter(|purpose| *purpose != IDLE)
    })
}

/// Whether no job has this container, as far as its name says.
fn is_idle(container: &ContainerSummary) -> bool {
    label(container, WARM_LABEL).is_some() && purpose(container) == Some(IDLE)
}

/// What a container's name says that it is for.
fn purpose(container: &ContainerSummary) -> Option<&str> {
    let name = container.names.as_ref()?.first()?;
    let (purpose, _) = name.strip_prefix("/worker-spawner-")?.rsplit_once('-')?;
    Some(purpose)
}

/// Whether the process `pid` made this container.
fn is_owned_by(container: &ContainerSummary, pid: u32) -> bool {
    let owner = label(container, "worker-spawner.owner").unwrap_or_default();
    owner.split('/').nth(2) == Some(&pid.to_string())
}

fn labelled(name: &str) -> ListContainersOptions {
    let filters = HashMap::from([("label".to_string(), vec![name.to_string()])]);
    ListContainersOptions { all: true, filters: Some(filters), ..Default::default() }
}

/// Removes the containers that waited for jobs of the daemon `pid`, which has ended.
pub(crate) fn remove_idle_blocking(host: Option<&str>, pid: u32) {
    remove_containers_blocking(host, |container| is_idle(container) && is_owned_by(container, pid));
}

/// Removes every container `matches` picks. For `Drop`, which cannot await: runs on a thread and a
/// runtime of its own, and never panics.
fn remove_containers_blocking(
    host: Option<&str>,
    matches: impl Fn(&ContainerSummary) -> bool + Send,
) {
    let host = host.map(ToString::to_string);
    on_own_runtime(async move {
        let Some(docker) = connect(host.as_deref()) else {
            return;
        };
        // A call of the killed daemon's may still be under way in the engine: look again after
        // there was something to remove, and once where there was nothing.
        for look in 0..5 {
            let Ok(all) = docker.list_containers(Some(labelled(INSTANCE_LABEL))).await else {
                return;
            };
            let left: Vec<String> =
                all.into_iter().filter(&matches).filter_map(|container| container.id).collect();
            if left.is_empty() && look > 0 {
                return;
            }
            for id in left {
                let options = RemoveContainerOptions { force: true, v: true, ..Default::default() };
                // The daemon may have been faster; what matters is that it is gone.
                let _ = docker.remove_container(&id, Some(options)).await;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
}

/// Removes pulled images in the end.
pub(crate) struct ImageGuard {
    host: Option<String>,
    repository: String,
}

impl Drop for ImageGuard {
    fn drop(&mut self) {
        let (host, repository) = (self.host.clone(), self.repository.clone());
        on_own_runtime(async move {
            let Some(docker) = connect(host.as_deref()) else { return };
            let labelled = HashMap::from([("label".to_string(), vec![images::LABEL.to_string()])]);
            let options =
                ListImagesOptions { all: true, filters: Some(labelled), ..Default::default() };
            let Ok(images) = docker.list_images(Some(options)).await else { return };
            let ours = images.into_iter().filter(|image| {
                image.repo_tags.iter().chain(&image.repo_digests).any(|name| {
                    name.strip_prefix(&repository).is_some_and(|rest| rest.starts_with([':', '@']))
                })
            });
            for image in ours {
                let options = RemoveImageOptions { force: true, ..Default::default() };
                // Not there any more is as good.
                let _ = docker.remove_image(&image.id, Some(options), None).await;
            }
        });
    }
}

/// A container of a test's own, removed in the end.
pub(crate) struct ForeignContainer {
    host: Option<String>,
    pub(crate) id: String,
}

impl Drop for ForeignContainer {
    fn drop(&mut self) {
        let (host, id) = (self.host.clone(), self.id.clone());
        on_own_runtime(async move {
            let Some(docker) = connect(host.as_deref()) else {
                return;
            };
            let options = RemoveContainerOptions { force: true, ..Default::default() };
            // The test has said already what it thinks of its being gone.
            let _ = docker.remove_container(&id, Some(options)).await;
        });
    }
}

fn connect(host: Option<&str>) -> Option<Docker> {
    match host {
        Some(host) => Docker::connect_with_host(host).ok(),
        None => Docker::connect_with_defaults().ok(),
    }
}

fn on_own_runtime(work: impl Future<Output = ()> + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            // A frozen engine must not hang the test's end as well.
            let _ = runtime
                .block_on(async { tokio::time::timeout(Duration::from_secs(30), work).await });
        });
    });
}

/// An engine of the test's own, in network, mount and process namespaces of its own: a second one
/// in the shared network namespace would fight over the bridge. Ending the first process of the
/// namespaces takes the engine, its containerd, its shims, its containers and its mounts with it.
pub(crate) struct PrivateEngine {
    /// Where its data are, if that is a disk of its own; goes before the directory it is in.
    _disk: Option<Tmpfs>,
    dir: TempDir,
    cgroup: String,
    holder: Child,
    init: u32,
    /// The `nsenter` that started the engine, and the engine.
    dockerd: Option<(Child, u32)>,
}

impl PrivateEngine {
    pub(crate) async fn start() -> Self {
        let mut engine = Self::absent().await;
        engine.restart().await;
        engine
    }

    /// One that keeps its data on a disk of so many bytes. Mounting takes root.
    pub(crate) async fn start_on_disk(size: usize) -> Self {
        let mut engine = Self::absent_on(Some(size)).await;
        engine.restart().await;
        engine
    }

    /// All of an engine but the engine.
    pub(crate) async fn absent() -> Self {
        Self::absent_on(None).await
    }

    async fn absent_on(disk: Option<usize>) -> Self {
        let dir = tempfile::Builder::new().prefix("engine-").tempdir().unwrap();
        // Before its namespaces are made, so that it is seen in them and outside.
        let disk = disk.map(|size| Tmpfs::mount(dir.path().join("data"), size));
        let holder = bound_to_this_thread("unshare")
            .args(["--kill-child=KILL", "--pid", "--fork", "--mount", "--net", "--mount-proc"])
            // A shell in wait reaps what is orphaned to it.
            .args(["sh", "-c", "while :; do sleep 1000; done"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv and unshare are needed");
        let cgroup = format!("/worker-spawner-test-{}", super::unique());
        let mut engine = Self { _disk: disk, dir, cgroup, holder, init: 0, dockerd: None };
        let parent = engine.holder.id();
        eventually("the engine's namespaces exist", || async move {
            // The name changes from unshare to sh once the namespaces and /proc are in place.
            children_of(parent).first().is_some_and(|init| {
                std::fs::read_to_string(format!("/proc/{init}/comm"))
                    .is_ok_and(|name| name.trim() == "sh")
            })
        })
        .await;
        engine.init = children_of(parent)[0];
        engine
    }

    /// Starts it, or starts it again on what it left. Returns when it answers.
    pub(crate) async fn restart(&mut self) {
        assert!(self.dockerd.is_none(), "the engine runs already");
        let log = File::options().create(true).append(true).open(self.path("dockerd.log")).unwrap();
        let text = |name: &str| self.path(name).to_str().unwrap().to_string();
        // A killed engine leaves its files; both would be in the next one's way.
        let _ = std::fs::remove_file(self.path("dockerd.pid"));
        let child = bound_to_this_thread("nsenter")
            .args(["--target", &self.init.to_string(), "--net", "--mount", "--pid", "dockerd"])
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false"])
            .args(["--data-root", &text("data"), "--exec-root", &text("exec")])
            .args(["--pidfile", &text("dockerd.pid"), "--host", &self.host()])
            .args(["--cgroup-parent", &self.cgroup])
            // A containerd that is slow to end is asked by its engine for its stacks, and writes them there.
            .env("TMPDIR", self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("nsenter and dockerd are needed");
        let parent = child.id();
        eventually(
            "nsenter has started the engine",
            || async move { !children_of(parent).is_empty() },
        )
        .await;
        let pid = children_of(parent)[0];
        self.dockerd = Some((child, pid));
        eventually("the private engine answers", || async {
            // Without a socket there is not even a client.
            match Docker::connect_with_unix(&self.host(), 5, bollard::API_DEFAULT_VERSION) {
                Ok(docker) => docker.negotiate_version().await.is_ok(),
                Err(_) => false,
            }
        })
        .await;
    }

    /// Asks it to stop, as a package upgrade does, and waits until it has.
    pub(crate) async fn stop(&mut self) {
        let (mut child, pid) = self.dockerd.take().unwrap();
        process::send(pid, Signal::TERM);
        let ended = process::exit_of(&mut child, PATIENCE).await;
        assert!(ended.is_some(), "the engine did not stop");
    }

    /// Kills it; its containers live on in the care of their shims.
    pub(crate) async fn kill(&mut self) {
        let (mut child, pid) = self.dockerd.take().unwrap();
        process::send(pid, Signal::KILL);
        let ended = process::exit_of(&mut child, PATIENCE).await;
        assert!(ended.is_some(), "the engine did not die");
    }

    /// Suspends it: its socket accepts, nothing answers.
    pub(crate) fn freeze(&self) {
        process::send(self.dockerd.as_ref().unwrap().1, Signal::STOP);
    }

    pub(crate) fn thaw(&self) {
        let (child, pid) = self.dockerd.as_ref().unwrap();
        // nsenter stops itself when what it started is stopped.
        process::send(child.id(), Signal::CONT);
        process::send(*pid, Signal::CONT);
    }

    pub(crate) fn host(&self) -> String {
        format!("unix://{}", self.path("docker.sock").display())
    }

    /// The way to this engine, which must run.
    pub(crate) async fn engine(&self) -> Engine {
        let docker =
            Docker::connect_with_unix(&self.host(), 60, bollard::API_DEFAULT_VERSION).unwrap();
        Engine { docker: docker.negotiate_version().await.unwrap(), host: Some(self.host()) }
    }

    /// What the engine has printed so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("dockerd.log")).unwrap_or_default()
    }

    /// What runs in the containers of this engine, by number and command.
    pub(crate) fn processes(&self) -> Vec<String> {
        processes(|pid| {
            proc_file(pid, "cgroup").is_some_and(|groups| groups.contains(&self.cgroup))
        })
    }

    /// The processes that stand beside this engine's containers, one for each.
    pub(crate) fn shims(&self) -> Vec<String> {
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(&self.init.to_string());
        processes(|pid| {
            let is_shim = |name: String| name.starts_with("containerd-shim");
            proc_file(pid, "comm").is_some_and(is_shim) && namespace(pid) == own
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for PrivateEngine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- end of the private engine's log");
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
        if self.dockerd.is_some() {
            // A namespace ends only once all in it are reaped, the engine by nsenter.
            self.thaw();
        }
        if self.init == 0 {
            process::end(&mut self.holder);
        } else {
            // The kernel ends everything in the namespaces before the first process of them, and
            // unshare ends after that one.
            process::send(self.init, Signal::KILL);
            let _ = self.holder.wait();
        }
        if let Some((mut child, _)) = self.dockerd.take() {
            process::end(&mut child);
        }
        // Only the control groups are outside of the namespaces and stay.
        for _ in 0..100 {
            if remove_cgroups(&self.cgroup) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// All processes `wanted` picks, by number and command.
fn processes(wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let numbers = std::fs::read_dir("/proc").unwrap().flatten();
    numbers
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && wanted(name))
        .filter_map(|pid| {
            let command = proc_file(&pid, "cmdline")?.replace('\0', " ");
            Some(format!("process {pid}: {}", command.trim()))
        })
        .collect()
}

/// What the kernel says of a process, unless it has ended.
fn proc_file(pid: &str, name: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok()
}

/// Removes the control groups called `name` from all hierarchies; false while one is still busy.
fn remove_cgroups(name: &str) -> bool {
    let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
    roots.extend(
        std::fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path()),
    );
    roots
        .iter()
        .map(|root| root.join(&name[1..]))
        .filter(|group| group.is_dir())
        .all(|group| remove_tree(&group))
}

fn remove_tree(group: &Path) -> bool {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() && !remove_tree(&entry.path()) {
            return false;
        }
    }
    std::fs::remove_dir(group).is_ok()
}
