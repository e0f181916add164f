//! The engine under test: the benchmark's image, the bare sequence of API calls that is the floor, and the sweep
//! that removes whatever a run left.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bollard::Docker;
use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigLogConfig, ResourcesUlimits,
};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptions, ListContainersOptionsBuilder,
    RemoveContainerOptionsBuilder, RemoveImageOptionsBuilder, StartContainerOptions,
    WaitContainerOptionsBuilder,
};
use futures::StreamExt;

pub(crate) const IMAGE: &str = "worker-spawner-bench/busybox:latest";
pub(crate) const COMMAND: [&str; 2] = ["echo", "hi"];
pub(crate) const PRINTED: &str = "hi\n";

/// When a job's result was known, and when its container was gone as well.
pub(crate) struct Timing {
    pub(crate) to_result: Duration,
    pub(crate) to_removed: Duration,
}

#[derive(Clone)]
pub(crate) struct Engine(Docker);

impl Engine {
    pub(crate) async fn connect() -> Result<Self> {
        let docker = Docker::connect_with_defaults().context("no Docker client")?;
        let docker =
            docker.negotiate_version().await.context("the Docker engine does not answer")?;
        Ok(Self(docker))
    }

    /// One line that says what the figures were measured on.
    pub(crate) async fn describe(&self) -> Result<String> {
        let version = self.0.version().await?;
        let info = self.0.info().await?;
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
        for applet in ["sh", "echo", "true"] {
            symlink("busybox", bin.join(applet))?;
        }
        let archive = pack(root.path())?;
        let mut import = Command::new("docker")
            .args(["import", "--change", "ENV PATH=/bin", "-", IMAGE])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("docker: the command line client is one of the contenders")?;
        import.stdin.take().context("no stdin")?.write_all(&archive)?;
        ensure!(import.wait()?.success(), "docker import failed");
        Ok(())
    }

    /// The floor: what any client has to ask of the engine for one job, in the order that loses no output.
    pub(crate) async fn run_bare(&self, body: ContainerCreateBody) -> Result<Timing> {
        let started = Instant::now();
        let id = self.0.create_container(None::<CreateContainerOptions>, body).await?.id;
        let attach =
            AttachContainerOptionsBuilder::default().stdout(true).stderr(true).stream(true).build();
        let mut attached = self.0.attach_container(&id, Some(attach)).await?;
        self.0.start_container(&id, None::<StartContainerOptions>).await?;
        let wait = WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut wait = std::pin::pin!(self.0.wait_container(&id, Some(wait)));
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
        self.0
            .remove_container(
                &id,
                Some(RemoveContainerOptionsBuilder::default().force(true).v(true).build()),
            )
            .await?;
        let to_removed = started.elapsed();
        ensure!(code == 0 && output == PRINTED.as_bytes(), "bare: exit {code}, output {output:?}");
        Ok(Timing { to_result, to_removed })
    }

    async fn containers(&self) -> Result<Vec<String>> {
        let filters = HashMap::from([("ancestor", vec![IMAGE])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        match self.0.list_containers(Some(options)).await {
            Ok(list) => Ok(list.into_iter().filter_map(|c| c.id).collect()),
            Err(bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }) => {
                Ok(Vec::new())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until no container of the benchmark is left, so that no contender pays for the one before it.
    pub(crate) async fn drained(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let left = self.containers().await?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} containers were still there 30 s after the last result", left.len());
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// Removes every container of the benchmark's image, then the image.
    pub(crate) async fn sweep(&self) {
        for id in self.containers().await.unwrap_or_default() {
            let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            if let Err(error) = self.0.remove_container(&id, Some(options)).await {
                eprintln!("bench: container {id} was not removed: {error}");
            }
        }
        let options = RemoveImageOptionsBuilder::default().force(true).build();
        match self.0.remove_image(IMAGE, Some(options), None).await {
            Ok(_)
            | Err(bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }) => {}
            Err(error) => eprintln!("bench: image {IMAGE} was not removed: {error}"),
        }
    }
}

/// The least a container without a network can be asked for. `NetworkDisabled` is what makes it the floor:
/// `NetworkMode: none` builds a network sandbox first.
pub(crate) fn minimal() -> ContainerCreateBody {
    ContainerCreateBody {
        image: Some(IMAGE.to_owned()),
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

fn pack(root: &Path) -> Result<Vec<u8>> {
    let tar = Command::new("tar")
        .arg("-C")
        .arg(root)
        .args(["--owner=0", "--group=0", "-cf", "-", "."])
        .output()?;
    ensure!(tar.status.success(), "tar failed: {}", String::from_utf8_lossy(&tar.stderr));
    Ok(tar.stdout)
}
