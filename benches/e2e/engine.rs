//! The engine under test: the benchmark's image, the bare sequence of API calls that is the floor, and the sweep
//! that removes whatever a run left.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bollard::Docker;
use bollard::models::{
    ContainerCreateBody, ContainerSummary, ContainerSummaryStateEnum, HealthConfig, HostConfig,
    HostConfigLogConfig, ResourcesUlimits,
};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptions, ListContainersOptionsBuilder,
    ListImagesOptionsBuilder, RemoveContainerOptionsBuilder, RemoveImageOptionsBuilder,
    RemoveVolumeOptions, StartContainerOptions, WaitContainerOptionsBuilder,
};
use futures::StreamExt;

use crate::images;

/// What the names of all images of this run begin with. No other run's do: several may share an engine, and each counts,
/// waits for and removes what is its own.
pub(crate) static IMAGES: LazyLock<String> = LazyLock::new(|| {
    let unique = uuid::Uuid::now_v7().as_u64_pair().1 & 0xffff_ffff;
    format!("worker-spawner-bench/{unique:08x}-")
});
pub(crate) static IMAGE: LazyLock<String> = LazyLock::new(|| format!("{}busybox:latest", *IMAGES));
pub(crate) const COMMAND: [&str; 2] = ["echo", "hi"];
pub(crate) const PRINTED: &str = "hi\n";

/// When a job's result was known, and when its container was gone as well.
pub(crate) struct Timing {
    pub(crate) to_result: Duration,
    pub(crate) to_removed: Duration,
}

#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) docker: Docker,
    /// The pools there should be, by their daemons' processes.
    pools: Arc<Mutex<HashMap<u32, Pool>>>,
    /// The volume of the daemons' agent was there before them, and is not theirs alone.
    agent_was_there: bool,
}

/// Containers of one daemon that wait.
#[derive(Default)]
struct Pool {
    /// How many; nothing where it is left to the daemon.
    size: Option<usize>,
    /// Those that waited when it was at rest last.
    waited: HashSet<String>,
    /// How many of them were taken since.
    taken: usize,
}

/// A daemon's label on its containers: four parts, of which the third is its process.
const LABEL_OWNER: &str = "worker-spawner.owner";
/// A daemon's label on a container that was made ahead of time.
const LABEL_WARM: &str = "worker-spawner.warm";
/// A daemon's label with the image's name: what an engine lists is an id at times.
const LABEL_IMAGE: &str = "worker-spawner.image";
/// The benchmark's own label on a container that runs beside the contenders.
pub(crate) const LABEL_BYSTANDER: &str = "worker-spawner-bench.bystander";
/// How long a container's agent may take to be heard of once the container runs.
const HELLO: Duration = Duration::from_millis(20);

impl Engine {
    pub(crate) async fn connect() -> Result<Self> {
        let docker = Docker::connect_with_defaults().context("no Docker client")?;
        let docker =
            docker.negotiate_version().await.context("the Docker engine does not answer")?;
        let volume = docker.inspect_volume(&agent_volume()).await;
        Ok(Self { docker, pools: Arc::default(), agent_was_there: volume.is_ok() })
    }

    /// One line that says what the figures were measured on.
    pub(crate) async fn describe(&self) -> Result<String> {
        let version = self.docker.version().await?;
        let info = self.docker.info().await?;
        Ok(format!(
            "engine {} (API {}, {}, cgroup v{}, {}), kernel {}, {} cores",
            version.version.unwrap_or_default(),
            version.api_version.unwrap_or_default(),
            info.driver.unwrap_or_default(),
            info.cgroup_version.map(|v| v.to_string()).unwrap_or_default(),
            info.default_runtime.unwrap_or_default(),
            info.kernel_version.unwrap_or_default(),
            info.ncpu.unwrap_or_default(),
        ))
    }

    /// Imports a static busybox as the benchmark's image: nothing is pulled, so no registry has a part in the figures.
    pub(crate) fn import_image() -> Result<()> {
        let busybox = std::env::var("BENCH_BUSYBOX").unwrap_or_else(|_| "/bin/busybox".to_owned());
        let root = tempfile::tempdir()?;
        let bin = root.path().join("bin");
        std::fs::create_dir(&bin)?;
        std::fs::create_dir(root.path().join("tmp"))?;
        std::fs::copy(&busybox, bin.join("busybox"))
            .with_context(|| format!("{busybox}: install busybox-static or set BENCH_BUSYBOX"))?;
        std::fs::set_permissions(bin.join("busybox"), std::fs::Permissions::from_mode(0o755))?;
        for applet in ["sh", "echo", "true", "cat"] {
            symlink("busybox", bin.join(applet))?;
        }
        images::import(&mut &pack(root.path())?[..], &IMAGE, "/bin")
    }

    /// The floor: what any client has to ask of the engine for one job, in the order that loses no output.
    pub(crate) async fn run_bare(&self, body: ContainerCreateBody) -> Result<Timing> {
        let started = Instant::now();
        let id = self.docker.create_container(None::<CreateContainerOptions>, body).await?.id;
        let attach =
            AttachContainerOptionsBuilder::default().stdout(true).stderr(true).stream(true).build();
        let mut attached = self.docker.attach_container(&id, Some(attach)).await?;
        self.docker.start_container(&id, None::<StartContainerOptions>).await?;
        let wait = WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut wait = std::pin::pin!(self.docker.wait_container(&id, Some(wait)));
        let drain = async {
            let mut output = Vec::new();
            while let Some(chunk) = attached.output.next().await {
                output.extend_from_slice(&chunk?.into_bytes());
            }
            Ok::<_, bollard::errors::Error>(output)
        };
        let (output, exit) = tokio::join!(drain, wait.next());
        let to_result = started.elapsed();
        let output = output?;
        let code = exit.context("wait ended without an answer")??.status_code;
        self.docker
            .remove_container(
                &id,
                Some(RemoveContainerOptionsBuilder::default().force(true).v(true).build()),
            )
            .await?;
        let to_removed = started.elapsed();
        ensure!(code == 0 && output == PRINTED.as_bytes(), "bare: exit {code}, output {output:?}");
        Ok(Timing { to_result, to_removed })
    }

    /// Those of this run's images, whoever made them.
    pub(crate) async fn containers(&self) -> Result<Vec<ContainerSummary>> {
        let options = ListContainersOptionsBuilder::default().all(true).build();
        let all = self.docker.list_containers(Some(options)).await?;
        let is_ours = |c: &ContainerSummary| {
            let named = [c.image.as_deref(), label(c, LABEL_IMAGE)];
            // Engine 20.10 may go on listing a container that it has removed, without a name: there is nothing behind that.
            let is_there = c.names.as_ref().is_some_and(|names| !names.is_empty());
            is_there && named.into_iter().flatten().any(|name| name.starts_with(&**IMAGES))
        };
        Ok(all.into_iter().filter(is_ours).collect())
    }

    /// From now on so many containers wait for jobs of this daemon whenever there is nothing to do.
    pub(crate) fn expect_pool(&self, daemon: u32, size: Option<usize>) {
        self.pools.lock().unwrap().insert(daemon, Pool { size, ..Pool::default() });
    }

    /// None any more.
    pub(crate) fn expect_no_pool(&self, daemon: u32) {
        self.pools.lock().unwrap().remove(&daemon);
    }

    /// So many jobs of this daemon began in a container that waited: as many new ones are to come, which is how a full
    /// pool is told from one whose last container has not gone yet.
    pub(crate) fn taken(&self, daemon: u32, jobs: usize) {
        if let Some(pool) = self.pools.lock().unwrap().get_mut(&daemon) {
            pool.taken += jobs;
        }
    }

    /// Waits until no container of the benchmark is left but those that wait, and every pool is full, so that no
    /// contender pays for the one before it.
    pub(crate) async fn drained(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let left = self.containers().await?;
            if self.is_at_rest(&left) {
                break;
            }
            if Instant::now() > deadline {
                let describe = |c: &ContainerSummary| {
                    let waits = if label(c, LABEL_WARM).is_some() { "warm" } else { "" };
                    format!("{:?} {waits} {:?}", c.names, c.status.as_deref().unwrap_or_default())
                };
                let left: Vec<String> = left.iter().map(describe).collect();
                bail!("not at rest 60 s after the last result:\n{}", left.join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        if !self.pools.lock().unwrap().is_empty() {
            tokio::time::sleep(HELLO).await;
        }
        Ok(())
    }

    fn is_at_rest(&self, containers: &[ContainerSummary]) -> bool {
        let mut pools = self.pools.lock().unwrap();
        let mut waiting: HashMap<u32, HashSet<String>> = HashMap::new();
        for container in containers.iter().filter(|c| label(c, LABEL_BYSTANDER).is_none()) {
            let Some(daemon) = owner(container).filter(|pid| pools.contains_key(pid)) else {
                return false;
            };
            let runs = container.state == Some(ContainerSummaryStateEnum::RUNNING);
            if !runs || label(container, LABEL_WARM).is_none() {
                return false;
            }
            waiting.entry(daemon).or_default().extend(container.id.clone());
        }
        let is_full = |(pid, pool): (&u32, &Pool)| {
            let Some(size) = pool.size else { return true };
            let Some(waiting) = waiting.get(pid) else { return size == 0 };
            let new = waiting.difference(&pool.waited).count();
            waiting.len() == size && new >= pool.taken.min(size)
        };
        if !pools.iter().all(is_full) {
            return false;
        }
        for (pid, pool) in pools.iter_mut() {
            pool.waited = waiting.remove(pid).unwrap_or_default();
            pool.taken = 0;
        }
        true
    }

    /// Removes every container of this run's images, then the images, and the daemons' volume where that is theirs.
    pub(crate) async fn sweep(&self) {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        for id in self.containers().await.unwrap_or_default().into_iter().filter_map(|c| c.id) {
            report(
                "container",
                &id,
                self.docker.remove_container(&id, Some(options.clone())).await,
            );
        }
        let filters = HashMap::from([("reference", vec![format!("{}*", *IMAGES)])]);
        let list = ListImagesOptionsBuilder::default().filters(&filters).build();
        let images = self.docker.list_images(Some(list)).await.unwrap_or_default();
        let options = RemoveImageOptionsBuilder::default().force(true).build();
        // The latest first: one that another was made from goes after it.
        for tag in images.iter().flat_map(|image| &image.repo_tags) {
            let removed = self.docker.remove_image(tag, Some(options.clone()), None).await;
            report("image", tag, removed);
        }
        if !self.agent_was_there {
            let volume = agent_volume();
            // One that is in use by now is somebody else's as well, and stays.
            let _ = self.docker.remove_volume(&volume, None::<RemoveVolumeOptions>).await;
        }
    }
}

fn report<T>(what: &str, name: &str, removed: Result<T, bollard::errors::Error>) {
    match removed {
        Ok(_) | Err(bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }) => {
        }
        Err(error) => eprintln!("bench: {what} {name} was not removed: {error}"),
    }
}

fn label<'a>(container: &'a ContainerSummary, name: &str) -> Option<&'a str> {
    container.labels.as_ref()?.get(name).map(String::as_str)
}

/// The process of the daemon that made a container.
pub(crate) fn owner(container: &ContainerSummary) -> Option<u32> {
    label(container, LABEL_OWNER)?.split('/').nth(2)?.parse().ok()
}

/// Where the daemons under test keep their agent in the engine.
fn agent_volume() -> String {
    format!("worker-spawner-agent-{}", &worker_spawner::agent::digest()[..16])
}

/// The least a container without a network can be asked for. `NetworkDisabled` is what makes it the floor:
/// `NetworkMode: none` builds a network sandbox first.
pub(crate) fn minimal() -> ContainerCreateBody {
    ContainerCreateBody {
        image: Some(IMAGE.clone()),
        cmd: Some(COMMAND.map(str::to_owned).to_vec()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        network_disabled: Some(true),
        ..Default::default()
    }
}

/// The same with everything the daemon confines a function with by default: what confinement costs.
pub(crate) fn confined() -> ContainerCreateBody {
    let ulimit = |name: &str, n| ResourcesUlimits {
        name: Some(name.to_owned()),
        soft: Some(n),
        hard: Some(n),
    };
    ContainerCreateBody {
        healthcheck: Some(HealthConfig {
            test: Some(vec!["NONE".to_owned()]),
            ..Default::default()
        }),
        host_config: Some(HostConfig {
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges".to_owned()]),
            readonly_rootfs: Some(true),
            tmpfs: Some(HashMap::from([(
                "/tmp".to_owned(),
                "rw,nosuid,nodev,size=268435456".to_owned(),
            )])),
            memory: Some(512 << 20),
            memory_swap: Some(512 << 20),
            nano_cpus: Some(1_000_000_000),
            pids_limit: Some(256),
            init: Some(true),
            ulimits: Some(vec![ulimit("nofile", 1024), ulimit("core", 0)]),
            log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
            ..Default::default()
        }),
        ..minimal()
    }
}

pub(crate) fn pack(root: &Path) -> Result<Vec<u8>> {
    let tar = Command::new("tar")
        .arg("-C")
        .arg(root)
        .args(["--owner=0", "--group=0", "-cf", "-", "."])
        .output()?;
    ensure!(tar.status.success(), "tar failed: {}", String::from_utf8_lossy(&tar.stderr));
    Ok(tar.stdout)
}
