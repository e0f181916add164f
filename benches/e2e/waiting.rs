//! What the engine does with containers that wait: how fast it makes them, how fast it changes their limits, how fast a
//! byte gets to one and back, and what they cost while nothing happens.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bollard::container::LogOutput;
use bollard::errors::Error;
use bollard::models::{ContainerCreateBody, ContainerUpdateBody, HostConfig};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptions, InspectContainerOptions,
    RemoveContainerOptionsBuilder, StartContainerOptions,
};
use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::BoxStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::daemon::cpu_now;
use crate::engine::{self, Engine};
use crate::stats::Samples;

/// A container of the benchmark's own that waits, as the daemon's do, and gives back what it is sent.
pub(crate) struct Waiting {
    engine: Engine,
    id: String,
    input: Pin<Box<dyn AsyncWrite + Send>>,
    output: BoxStream<'static, Result<LogOutput, Error>>,
}

impl Waiting {
    /// Creates, attaches, starts: what the daemon asks of the engine for one.
    pub(crate) async fn make(engine: &Engine) -> Result<Self> {
        let docker = &engine.docker;
        let confined = engine::confined();
        let body = ContainerCreateBody {
            cmd: Some(vec!["cat".to_owned()]),
            attach_stdin: Some(true),
            open_stdin: Some(true),
            stdin_once: Some(true),
            host_config: confined.host_config.map(|host| HostConfig {
                init: Some(false),
                // The same as a quota, which can be changed.
                nano_cpus: None,
                cpu_period: Some(100_000),
                cpu_quota: Some(100_000),
                ..host
            }),
            ..confined
        };
        let id = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
        let options = AttachContainerOptionsBuilder::default()
            .stdin(true)
            .stdout(true)
            .stderr(true)
            .stream(true)
            .build();
        let attached = docker.attach_container(&id, Some(options)).await?;
        docker.start_container(&id, None::<StartContainerOptions>).await?;
        let engine = engine.clone();
        Ok(Self { engine, id, input: attached.input, output: attached.output })
    }

    /// A byte there and back.
    pub(crate) async fn echo(&mut self) -> Result<Duration> {
        let began = Instant::now();
        self.input.write_all(b"x").await?;
        self.input.flush().await?;
        self.output.next().await.context("the container has ended")??;
        Ok(began.elapsed())
    }

    /// Changes all the limits that requests may name.
    pub(crate) async fn limit(&self, memory: i64) -> Result<Duration> {
        let body = ContainerUpdateBody {
            memory: Some(memory),
            memory_swap: Some(memory),
            cpu_period: Some(100_000),
            cpu_quota: Some(50_000),
            pids_limit: Some(64),
            ..Default::default()
        };
        let began = Instant::now();
        self.engine.docker.update_container(&self.id, body).await?;
        Ok(began.elapsed())
    }

    pub(crate) async fn remove(self) -> Result<()> {
        drop((self.input, self.output));
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        Ok(self.engine.docker.remove_container(&self.id, Some(options)).await?)
    }
}

/// How many containers per second the engine makes with `parallel` creations under way, of `count`, and how long each
/// takes. Removing them is not counted.
pub(crate) async fn creations(
    engine: &Engine,
    parallel: usize,
    count: usize,
) -> Result<(f64, Samples)> {
    let taken = AtomicUsize::new(0);
    let began = Instant::now();
    let lines = (0..parallel).map(|_| async {
        let mut made = Vec::new();
        while taken.fetch_add(1, Ordering::Relaxed) < count {
            let began = Instant::now();
            made.push((Waiting::make(engine).await?, began.elapsed()));
        }
        Ok::<_, anyhow::Error>(made)
    });
    let made = try_join_all(lines).await?;
    let rate = count as f64 / began.elapsed().as_secs_f64();
    let mut took = Vec::new();
    for (waiting, time) in made.into_iter().flatten() {
        took.push(time);
        waiting.remove().await?;
    }
    Ok((rate, Samples::of(&took)))
}

/// What the containers of one daemon cost while nothing happens, each.
#[derive(Default)]
pub(crate) struct IdleCost {
    pub(crate) containers: usize,
    pub(crate) agent_resident_kib: Samples,
    pub(crate) agent_own_kib: Samples,
    pub(crate) agent_cpu_ms: Samples,
    pub(crate) shim_resident_kib: Samples,
    pub(crate) shim_own_kib: Samples,
    pub(crate) shim_cpu_ms: Samples,
    /// Of all of them together, per second.
    pub(crate) daemon_cpu_ms: f64,
}

/// Looks at a daemon and its containers for `span`, in which nothing happens. Nothing comes back where the engine runs on
/// another machine: its processes are not to be seen then.
pub(crate) async fn idle_cost(
    engine: &Engine,
    daemon: u32,
    span: Duration,
) -> Result<Option<IdleCost>> {
    let mut agents = Vec::new();
    for container in engine.containers().await? {
        if engine::owner(&container) != Some(daemon) {
            continue;
        }
        let id = container.id.unwrap_or_default();
        let inspected =
            engine.docker.inspect_container(&id, None::<InspectContainerOptions>).await?;
        let pid = inspected.state.and_then(|s| s.pid).and_then(|pid| u32::try_from(pid).ok());
        let Some((pid, shim)) = pid.and_then(|pid| Some((pid, parent(pid)?))) else {
            return Ok(None);
        };
        agents.push((pid, shim));
    }
    let account = |pid| cpu_now(pid).unwrap_or_default();
    let before: Vec<_> = agents.iter().map(|(a, s)| (account(*a), account(*s))).collect();
    let daemon_before = account(daemon);
    let began = Instant::now();
    tokio::time::sleep(span).await;
    let seconds = began.elapsed().as_secs_f64();
    let daemon_cpu_ms = (account(daemon) - daemon_before) / seconds;
    let each = |of: &dyn Fn(usize, u32, u32) -> f64| {
        let all = agents.iter().enumerate().map(|(n, (agent, shim))| of(n, *agent, *shim));
        Samples::from_values(all.collect())
    };
    Ok(Some(IdleCost {
        containers: agents.len(),
        agent_resident_kib: each(&|_, agent, _| memory(agent, "VmRSS:")),
        agent_own_kib: each(&|_, agent, _| own_memory(agent)),
        agent_cpu_ms: each(&|n, agent, _| (account(agent) - before[n].0) / seconds),
        shim_resident_kib: each(&|_, _, shim| memory(shim, "VmRSS:")),
        shim_own_kib: each(&|_, _, shim| own_memory(shim)),
        shim_cpu_ms: each(&|n, _, shim| (account(shim) - before[n].1) / seconds),
        daemon_cpu_ms,
    }))
}

fn parent(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

fn memory(pid: u32, field: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    kib(&status, field).unwrap_or(f64::NAN)
}

/// What would be free without the process: pages that it shares with no other.
fn own_memory(pid: u32) -> f64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let own = ["Private_Clean:", "Private_Dirty:"].map(|field| kib(&rollup, field));
    own.into_iter().sum::<Option<f64>>().unwrap_or(f64::NAN)
}

fn kib(text: &str, field: &str) -> Option<f64> {
    let line = text.lines().find_map(|l| l.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}
