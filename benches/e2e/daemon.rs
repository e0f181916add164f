//! A NATS server and daemons of the benchmark's own, and the client that loads them.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_nats::jetstream;
use futures::StreamExt;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::engine::{COMMAND, IMAGE, PRINTED};

/// A result that has not arrived after this long is counted as lost.
const LOST_AFTER: Duration = Duration::from_secs(60);
/// The unit of the times in `/proc/<pid>/stat`: `USER_HZ`, 100 on every Linux there is a Docker for.
const TICK_MS: f64 = 10.0;
/// What a daemon's log calls the points on a job's way.
const STAGE_TARGET: &str = "worker_spawner::stage";
/// How many of them may wait to be looked at: those of a few jobs.
const STAGES: usize = 256;

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

/// How a daemon is set up, beside its defaults.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) slots: usize,
    pub(crate) delivery: Delivery,
    /// `WARM_CONTAINERS`.
    pub(crate) warm: usize,
    /// `WARM_IMAGES`.
    pub(crate) images: &'static str,
    /// `RUST_LOG`.
    pub(crate) log: &'static str,
}

impl Setup {
    /// Every job in a container that is made for it.
    pub(crate) fn cold(slots: usize, delivery: Delivery) -> Self {
        Self { slots, delivery, warm: 0, images: "", log: "info" }
    }

    /// As many containers wait as there are slots, those of `images` from the start.
    pub(crate) fn warm(slots: usize, delivery: Delivery, images: &'static str) -> Self {
        Self { warm: slots, images, ..Self::cold(slots, delivery) }
    }
}

/// What is asked of a daemon, and what has to come back.
#[derive(Clone)]
pub(crate) struct Function {
    pub(crate) image: Arc<str>,
    pub(crate) command: &'static [&'static str],
    pub(crate) prints: &'static str,
    /// Another limit than the daemon's own.
    pub(crate) memory_bytes: Option<u64>,
}

impl Function {
    /// The one that all contenders run.
    pub(crate) fn echo() -> Self {
        Self::echo_in(&IMAGE)
    }

    pub(crate) fn echo_in(image: &str) -> Self {
        Self { image: image.into(), command: &COMMAND, prints: PRINTED, memory_bytes: None }
    }

    fn request(&self, id: &str) -> String {
        let mut request = serde_json::json!(
            {"image_reference": &*self.image, "parameter": self.command, "id": id});
        if let Some(bytes) = self.memory_bytes {
            request["memory_bytes"] = bytes.into();
        }
        request.to_string()
    }
}

/// How the jobs of a daemon began, as its events say.
#[derive(Default)]
pub(crate) struct Starts {
    warm: AtomicUsize,
    all: AtomicUsize,
}

/// A job under way: since when, and what it is to print.
struct Sent {
    at: Instant,
    prints: &'static str,
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

impl Batch {
    pub(crate) fn absorb(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        self.lost += other.lost;
        self.wrong += other.wrong;
    }
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
    pub(crate) pid: u32,
    pub(crate) setup: Setup,
    prefix: String,
    client: async_nats::Client,
    /// Where requests are kept, and when the server said so of each.
    queue: Option<(jetstream::Context, Arc<Mutex<Vec<Duration>>>)>,
    results: async_nats::Subscriber,
    starts: Arc<Starts>,
    _counting: Option<AbortOnDropHandle<()>>,
    tail: Arc<Mutex<VecDeque<String>>>,
    /// Lines of the log about where its jobs' time goes, where they are asked for.
    pub(crate) stages: mpsc::Receiver<String>,
    pub(crate) jobs_done: usize,
    hits_told: usize,
    sequence: usize,
}

impl Daemon {
    /// Starts a daemon on subjects of its own.
    pub(crate) async fn start(nats: &Nats, setup: Setup) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let prefix = format!("bench{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let client = nats.client().await?;
        let queue = (setup.delivery == Delivery::JetStream)
            .then(|| (jetstream::new(client.clone()), Arc::default()));
        let results = client.subscribe(format!("{prefix}.results")).await?;
        client.flush().await?;
        let mut process = Command::new(env!("CARGO_BIN_EXE_worker-spawner"))
            .env("NATS_URL", &nats.url)
            .env("SUBJECT_PREFIX", &prefix)
            .env("QUEUE_GROUP", &prefix)
            .env("MAX_CONTAINERS", setup.slots.to_string())
            .env("DELIVERY", setup.delivery.name())
            .env("WARM_CONTAINERS", setup.warm.to_string())
            .env("WARM_IMAGES", setup.images)
            .env("LOG_FORMAT", "json")
            .env("RUST_LOG", setup.log)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let pid = process.id().context("the daemon ended at once")?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let (ready, mut is_ready) = mpsc::channel(1);
        let (tell, stages) = mpsc::channel(STAGES);
        let log = Log { tail: Arc::clone(&tail), ready, stages: tell };
        follow(process.stdout.take().context("no stdout")?, log.clone());
        follow(process.stderr.take().context("no stderr")?, log);
        let mut daemon = Self {
            process,
            pid,
            setup,
            prefix,
            client,
            queue,
            results,
            starts: Arc::default(),
            _counting: None,
            tail,
            stages,
            jobs_done: 0,
            hits_told: 0,
            sequence: 0,
        };
        // Without a pool there is nothing to count, and nobody else subscribes to its events.
        if daemon.setup.warm > 0 {
            daemon._counting = Some(count_starts(daemon.events().await?, &daemon.starts));
        }
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
        self.run_each(vec![Function::echo(); jobs], parallel).await
    }

    /// The same with these functions, one after the other.
    pub(crate) async fn run_each(
        &mut self,
        functions: impl IntoIterator<Item = Function>,
        parallel: usize,
    ) -> Result<Batch> {
        let mut functions = functions.into_iter();
        let mut batch = Batch::default();
        let mut sent = HashMap::new();
        for function in functions.by_ref().take(parallel) {
            self.publish(&function, Instant::now(), &mut sent).await?;
        }
        self.client.flush().await?;
        while !sent.is_empty() {
            let Some(result) = self.next_result(LOST_AFTER).await? else {
                self.complain();
                batch.lost += sent.len() + functions.count();
                break;
            };
            if !self.take(result, &mut sent, &mut batch) {
                continue;
            }
            if let Some(function) = functions.next() {
                self.publish(&function, Instant::now(), &mut sent).await?;
                self.client.flush().await?;
            }
        }
        Ok(batch)
    }

    /// Publishes these functions at fixed times, whether or not those before have come back. The clock of each runs from
    /// the time at which it was due: a client that falls behind does not make the daemon look better.
    pub(crate) async fn run_paced(
        &mut self,
        functions: impl IntoIterator<Item = Function>,
        interval: Duration,
    ) -> Result<Batch> {
        let mut functions = functions.into_iter().peekable();
        let mut batch = Batch::default();
        let mut sent = HashMap::new();
        let mut due = Instant::now();
        while functions.peek().is_some() || !sent.is_empty() {
            let patience = if functions.peek().is_some() {
                due.saturating_duration_since(Instant::now())
            } else {
                LOST_AFTER
            };
            match self.next_result(patience).await? {
                Some(result) => {
                    self.take(result, &mut sent, &mut batch);
                }
                None => {
                    let Some(function) = functions.next() else {
                        self.complain();
                        batch.lost += sent.len();
                        break;
                    };
                    self.publish(&function, due, &mut sent).await?;
                    self.client.flush().await?;
                    due += interval;
                }
            }
        }
        Ok(batch)
    }

    /// Notes a result. Returns whether it is one of those that are waited for.
    fn take(
        &mut self,
        result: JobResult,
        sent: &mut HashMap<String, Sent>,
        batch: &mut Batch,
    ) -> bool {
        let Some(Sent { at, prints }) = sent.remove(&result.id) else { return false };
        batch.latencies.push(result.at - at);
        batch.wrong += usize::from(!result.is_good(prints));
        self.jobs_done += 1;
        true
    }

    /// Publishes `jobs` at once and counts the distinct results.
    pub(crate) async fn burst(&mut self, jobs: usize) -> Result<(Batch, Duration)> {
        let mut batch = Batch::default();
        let mut sent = HashMap::new();
        let started = Instant::now();
        for _ in 0..jobs {
            self.publish(&Function::echo(), Instant::now(), &mut sent).await?;
        }
        self.client.flush().await?;
        while !sent.is_empty() {
            let Some(result) = self.next_result(LOST_AFTER).await? else {
                self.complain();
                break;
            };
            let counts = self.take(result, &mut sent, &mut batch);
            if counts && !sent.is_empty() && sent.len().is_multiple_of(1000) {
                eprintln!("bench: burst, {} to go", sent.len());
            }
        }
        batch.lost = sent.len();
        Ok((batch, started.elapsed()))
    }

    async fn publish(
        &mut self,
        function: &Function,
        at: Instant,
        sent: &mut HashMap<String, Sent>,
    ) -> Result<()> {
        self.sequence += 1;
        let id = format!("{}-{}-{}", self.prefix, self.pid, self.sequence);
        let request = function.request(&id);
        let subject = format!("{}.execute", self.prefix);
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
        sent.insert(id, Sent { at, prints: function.prints });
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

    /// The next result; `None` when none came for too long.
    async fn next_result(&mut self, patience: Duration) -> Result<Option<JobResult>> {
        let Ok(message) = tokio::time::timeout(patience, self.results.next()).await else {
            return Ok(None);
        };
        let at = Instant::now();
        let message = message.context("the subscription ended")?;
        let header = |name: &str| {
            message.headers.as_ref().and_then(|h| h.get(name)).map(|v| v.as_str().to_owned())
        };
        let id = header("Job-Id").context("a result without Job-Id")?;
        Ok(Some(JobResult { id, status: header("Job-Status"), printed: message.payload, at }))
    }

    fn complain(&self) {
        eprintln!(
            "bench: no result for {} s; the daemon's last lines:\n{}",
            LOST_AFTER.as_secs(),
            self.last_lines()
        );
    }

    /// How many jobs have begun in a container that waited since this was asked last; once the daemon has told of all
    /// that have come back, which it does just after the result.
    pub(crate) async fn new_hits(&mut self) -> Result<usize> {
        if self._counting.is_none() {
            return Ok(0);
        }
        let told = async {
            while self.starts.all.load(Ordering::Acquire) < self.jobs_done {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(LOST_AFTER, told).await.context("no event of a job's end")?;
        let hits = self.starts.warm.load(Ordering::Relaxed);
        Ok(hits - std::mem::replace(&mut self.hits_told, hits))
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
pub(crate) fn cpu_now(pid: u32) -> Result<f64> {
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

/// What came of a job.
struct JobResult {
    id: String,
    status: Option<String>,
    printed: bytes::Bytes,
    at: Instant,
}

impl JobResult {
    fn is_good(&self, prints: &str) -> bool {
        let good = self.status.as_deref() == Some("succeeded") && self.printed == prints.as_bytes();
        if !good {
            eprintln!("bench: {} ended as {:?}: {:?}", self.id, self.status, self.printed);
        }
        good
    }
}

/// Counts how jobs begin until dropped.
fn count_starts(mut events: Events, starts: &Arc<Starts>) -> AbortOnDropHandle<()> {
    let starts = Arc::clone(starts);
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(event) = events.0.next().await {
            let event = serde_json::from_slice::<serde_json::Value>(&event.payload);
            let Some(event) = event.ok().filter(|event| event["state"] == "ended") else {
                continue;
            };
            starts.warm.fetch_add(usize::from(event["start"] == "warm"), Ordering::Relaxed);
            starts.all.fetch_add(1, Ordering::Release);
        }
    }))
}

/// Where the lines of a daemon's log go.
#[derive(Clone)]
struct Log {
    tail: Arc<Mutex<VecDeque<String>>>,
    ready: mpsc::Sender<()>,
    stages: mpsc::Sender<String>,
}

fn follow(stream: impl AsyncRead + Unpin + Send + 'static, log: Log) {
    let Log { tail, ready, stages } = log;
    tokio::spawn(async move {
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if !ready.is_closed() && says_ready(&line) {
                let _ = ready.try_send(());
            }
            if line.contains(STAGE_TARGET) {
                // What nobody takes is not kept.
                let _ = stages.try_send(line);
                continue;
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
