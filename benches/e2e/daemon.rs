//! A NATS server and daemons of the benchmark's own, and the client that loads them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_nats::jetstream;
use futures::StreamExt;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::engine::{COMMAND, IMAGE, PRINTED};

/// A result that has not arrived after this long is counted as lost.
const LOST_AFTER: Duration = Duration::from_secs(60);
/// The unit of the times in `/proc/<pid>/stat`: `USER_HZ`, 100 on every Linux there is a Docker for.
const TICK_MS: f64 = 10.0;

/// How a daemon takes requests: what it is told by `DELIVERY`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Delivery {
    Core,
    JetStream,
}

impl Delivery {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::JetStream => "jetstream",
        }
    }
}

pub(crate) struct Nats {
    _server: Child,
    pid: u32,
    files: tempfile::TempDir,
    pub(crate) url: String,
    pub(crate) version: String,
}

impl Nats {
    /// Starts a server on a free loopback port, with JetStream on disk, in files of its own.
    pub(crate) async fn start() -> Result<Self> {
        let files = tempfile::tempdir()?;
        std::fs::create_dir(files.path().join("ports"))?;
        let program = std::env::var("NATS_SERVER").unwrap_or_else(|_| "nats-server".to_owned());
        let server = Command::new(&program)
            .args(["-a", "127.0.0.1", "-p", "-1", "--ports_file_dir"])
            .arg(files.path().join("ports"))
            .args(["--jetstream", "--store_dir"])
            .arg(files.path().join("store"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{program}: install nats-server or set NATS_SERVER"))?;
        let pid = server.id().context("nats-server ended at once")?;
        let url = port_file(&files.path().join("ports")).await?;
        let client = async_nats::connect(&url).await?;
        let version = client.server_info().version.clone();
        Ok(Self { _server: server, pid, files, url, version })
    }

    /// Which file system its streams are on.
    pub(crate) fn file_system(&self) -> String {
        let described = std::process::Command::new("stat")
            .args(["--file-system", "--format=%T"])
            .arg(self.files.path())
            .output();
        described.map_or_else(
            |_| "unknown".to_owned(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
    }

    pub(crate) fn cpu_now(&self) -> Result<f64> {
        cpu_now(self.pid)
    }

    pub(crate) async fn client(&self) -> Result<async_nats::Client> {
        Ok(async_nats::connect(&self.url).await?)
    }
}

async fn port_file(dir: &Path) -> Result<String> {
    for _ in 0..500 {
        for entry in std::fs::read_dir(dir)?.flatten() {
            let Ok(ports) =
                serde_json::from_slice::<serde_json::Value>(&std::fs::read(entry.path())?)
            else {
                continue;
            };
            if let Some(url) = ports["nats"][0].as_str() {
                return Ok(url.to_owned());
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bail!("nats-server did not say which port it took")
}

/// What a batch of jobs came to.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) latencies: Vec<Duration>,
    pub(crate) lost: usize,
    pub(crate) wrong: usize,
}

/// Where a daemon's process stands.
#[derive(Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) cpu_ms: f64,
    pub(crate) resident_kib: u64,
    pub(crate) peak_kib: u64,
    pub(crate) threads: u64,
}

pub(crate) struct Daemon {
    process: Child,
    pid: u32,
    prefix: String,
    client: async_nats::Client,
    /// Where requests are kept, and when the server said so of each.
    queue: Option<(jetstream::Context, Arc<Mutex<Vec<Duration>>>)>,
    results: async_nats::Subscriber,
    tail: Arc<Mutex<VecDeque<String>>>,
    pub(crate) jobs_done: usize,
    sequence: usize,
}

impl Daemon {
    /// Starts a daemon with `slots` containers at most, on subjects of its own.
    pub(crate) async fn start(nats: &Nats, slots: usize, delivery: Delivery) -> Result<Self> {
        let prefix = format!("bench{slots}");
        let client = nats.client().await?;
        let queue = (delivery == Delivery::JetStream)
            .then(|| (jetstream::new(client.clone()), Arc::default()));
        let results = client.subscribe(format!("{prefix}.results")).await?;
        client.flush().await?;
        let mut process = Command::new(env!("CARGO_BIN_EXE_worker-spawner"))
            .env("NATS_URL", &nats.url)
            .env("SUBJECT_PREFIX", &prefix)
            .env("QUEUE_GROUP", &prefix)
            .env("MAX_CONTAINERS", slots.to_string())
            .env("DELIVERY", delivery.name())
            .env("WARM_CONTAINERS", "0")
            .env("LOG_FORMAT", "json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let pid = process.id().context("the daemon ended at once")?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let (ready, mut is_ready) = mpsc::channel(1);
        follow(process.stdout.take().context("no stdout")?, Arc::clone(&tail), ready.clone());
        follow(process.stderr.take().context("no stderr")?, Arc::clone(&tail), ready);
        let daemon =
            Self { process, pid, prefix, client, queue, results, tail, jobs_done: 0, sequence: 0 };
        match tokio::time::timeout(Duration::from_secs(30), is_ready.recv()).await {
            Ok(Some(())) => Ok(daemon),
            _ => bail!("the daemon did not become ready; its last lines:\n{}", daemon.last_lines()),
        }
    }

    pub(crate) fn last_lines(&self) -> String {
        self.tail.lock().unwrap().iter().cloned().collect::<Vec<_>>().join("\n")
    }

    /// Keeps `parallel` jobs under way until `jobs` have come back.
    pub(crate) async fn run(&mut self, jobs: usize, parallel: usize) -> Result<Batch> {
        let mut batch = Batch::default();
        let mut sent = HashMap::new();
        let mut to_send = jobs;
        while to_send > 0 && sent.len() < parallel {
            self.publish(&mut sent).await?;
            to_send -= 1;
        }
        self.client.flush().await?;
        while !sent.is_empty() {
            let Some((id, good)) = self.next_result().await? else {
                batch.lost += sent.len();
                break;
            };
            let Some(at) = sent.remove(&id) else { continue };
            batch.latencies.push(at.elapsed());
            batch.wrong += usize::from(!good);
            self.jobs_done += 1;
            if to_send > 0 {
                self.publish(&mut sent).await?;
                self.client.flush().await?;
                to_send -= 1;
            }
        }
        batch.lost += to_send;
        Ok(batch)
    }

    /// Publishes `jobs` at once and counts the distinct results.
    pub(crate) async fn burst(&mut self, jobs: usize) -> Result<(Batch, Duration)> {
        let mut batch = Batch::default();
        let mut sent = HashMap::new();
        let started = Instant::now();
        for _ in 0..jobs {
            self.publish(&mut sent).await?;
        }
        self.client.flush().await?;
        let mut open: HashSet<String> = sent.keys().cloned().collect();
        while !open.is_empty() {
            let Some((id, good)) = self.next_result().await? else {
                break;
            };
            if open.remove(&id) {
                batch.latencies.push(sent[&id].elapsed());
                batch.wrong += usize::from(!good);
                self.jobs_done += 1;
                if !open.is_empty() && open.len().is_multiple_of(1000) {
                    eprintln!("bench: burst, {} to go", open.len());
                }
            }
        }
        batch.lost = open.len();
        Ok((batch, started.elapsed()))
    }

    async fn publish(&mut self, sent: &mut HashMap<String, Instant>) -> Result<()> {
        self.sequence += 1;
        let id = format!("{}-{}-{}", self.prefix, self.pid, self.sequence);
        let request = serde_json::json!({"image_reference": IMAGE, "parameter": COMMAND, "id": id})
            .to_string();
        let subject = format!("{}.execute", self.prefix);
        let at = Instant::now();
        if let Some((jetstream, confirmed)) = &self.queue {
            let mut headers = async_nats::HeaderMap::new();
            headers.insert("Nats-Msg-Id", id.as_str());
            let stored = jetstream.publish_with_headers(subject, headers, request.into()).await?;
            let confirmed = Arc::clone(confirmed);
            tokio::spawn(async move {
                match stored.await {
                    Ok(_) => confirmed.lock().unwrap().push(at.elapsed()),
                    Err(error) => eprintln!("bench: a request was not stored: {error}"),
                }
            });
        } else {
            self.client.publish(subject, request.into()).await?;
        }
        sent.insert(id, at);
        Ok(())
    }

    /// How long the server took to say of each request that it is stored, since this was asked last.
    pub(crate) fn confirmations(&self) -> Vec<Duration> {
        let Some((_, confirmed)) = &self.queue else { return Vec::new() };
        std::mem::take(&mut *confirmed.lock().unwrap())
    }

    /// What the daemon tells about jobs from now on.
    pub(crate) async fn events(&self) -> Result<Events> {
        let events = self.client.subscribe(format!("{}.events.*", self.prefix)).await?;
        self.client.flush().await?;
        Ok(Events(events))
    }

    /// The next result's job, and whether it is what the command prints; `None` when none came for too long.
    async fn next_result(&mut self) -> Result<Option<(String, bool)>> {
        let Ok(message) = tokio::time::timeout(LOST_AFTER, self.results.next()).await else {
            eprintln!(
                "bench: no result for {} s; the daemon's last lines:\n{}",
                LOST_AFTER.as_secs(),
                self.last_lines()
            );
            return Ok(None);
        };
        let message = message.context("the subscription ended")?;
        let header = |name: &str| {
            message.headers.as_ref().and_then(|h| h.get(name)).map(|v| v.as_str().to_owned())
        };
        let id = header("Job-Id").context("a result without Job-Id")?;
        let good = header("Job-Status").as_deref() == Some("succeeded")
            && message.payload == PRINTED.as_bytes();
        if !good {
            eprintln!("bench: {id} ended as {:?}: {:?}", header("Job-Status"), message.payload);
        }
        Ok(Some((id, good)))
    }

    pub(crate) fn cpu_now(&self) -> Result<f64> {
        cpu_now(self.pid)
    }

    /// `utime + stime` of all threads, past ones included. The kernel scales the two so that their sum is the
    /// scheduler's own nanosecond account, so the only loss is the rounding to a tick.
    pub(crate) fn usage(&self) -> Result<Usage> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .context("the daemon is gone")?;
        let fields: Vec<&str> =
            stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|l| l.strip_prefix(name))
                .and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok())
                .with_context(|| format!("no {name} in status"))
        };
        Ok(Usage {
            cpu_ms: ticks * TICK_MS,
            resident_kib: field("VmRSS:")?,
            peak_kib: field("VmHWM:")?,
            threads: field("Threads:")?,
        })
    }

    /// Stops the daemon as an operator would, and waits for it.
    pub(crate) async fn stop(mut self) {
        let terminated = Command::new("kill").arg(self.pid.to_string()).status().await;
        if terminated.is_ok() {
            let _ = tokio::time::timeout(Duration::from_secs(40), self.process.wait()).await;
        }
        let _ = self.process.start_kill();
    }
}

/// What a daemon tells about its jobs.
pub(crate) struct Events(async_nats::Subscriber);

impl Events {
    /// What the engine took for the next job that ends: the pull's look at the image, creation, start and run. The rest
    /// of a job's time is NATS' and the daemon's.
    pub(crate) async fn engine_time(&mut self) -> Result<Duration> {
        let ended = async {
            while let Some(event) = self.0.next().await {
                let event: serde_json::Value = serde_json::from_slice(&event.payload)?;
                let timings = &event["timings_ms"];
                if event["state"] != "ended" {
                    continue;
                }
                let ms = |name: &str| timings[name].as_f64().unwrap_or_default();
                let ms = ms("pull") + ms("create") + ms("start") + ms("run");
                return Ok(Duration::from_secs_f64(ms / 1e3));
            }
            bail!("the events ended")
        };
        tokio::time::timeout(LOST_AFTER, ended).await.context("no event of a job's end")?
    }
}

/// The scheduler's account of all threads a process has now, in milliseconds with every nanosecond counted: for turns
/// too short for [`Usage::cpu_ms`] and its ticks.
fn cpu_now(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).context("the process is gone")? {
        // A thread may end between the listing and the reading.
        let Ok(account) = std::fs::read_to_string(task?.path().join("schedstat")) else {
            continue;
        };
        nanoseconds += account.split_whitespace().next().context("schedstat")?.parse::<f64>()?;
    }
    Ok(nanoseconds / 1e6)
}

fn follow(
    stream: impl AsyncRead + Unpin + Send + 'static,
    tail: Arc<Mutex<VecDeque<String>>>,
    ready: mpsc::Sender<()>,
) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if !ready.is_closed() && says_ready(&line) {
                let _ = ready.try_send(());
            }
            let mut tail = tail.lock().unwrap();
            if tail.len() == 40 {
                tail.pop_front();
            }
            tail.push_back(line);
        }
    });
}

fn says_ready(line: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(line).is_ok_and(|entry| {
        [&entry["message"], &entry["fields"]["message"], &entry["msg"]]
            .iter()
            .any(|m| m.as_str() == Some("ready"))
    })
}
