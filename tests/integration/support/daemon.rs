//! The daemon as its users start it: the built program, settings in its environment.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

use super::engine::{self, Engine};
use super::nats::NatsServer;
use super::process::{self, Signal, bound_to_this_thread};
use super::wait::{PATIENCE, within};

/// What to start the daemon with.
#[derive(Clone)]
pub(crate) struct Settings(BTreeMap<String, String>);

impl Settings {
    /// The least it takes on this machine: nothing is inherited but how to find programs and the
    /// engine.
    pub(crate) fn new() -> Self {
        let mut settings = Self(BTreeMap::new());
        for name in
            ["PATH", "DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "LLVM_PROFILE_FILE"]
        {
            if let Ok(value) = std::env::var(name) {
                settings = settings.set(name, &value);
            }
        }
        // Containers that wait for jobs are there for those who ask for them.
        let plain = [("DELIVERY", "core"), ("WARM_CONTAINERS", "0")];
        settings.set("RUST_LOG", "info").set("LOG_FORMAT", "json").set_all(&plain)
    }

    /// As [`new`](Self::new), with requests that a stream keeps.
    pub(crate) fn jetstream() -> Self {
        Self::new().set("DELIVERY", "jetstream")
    }

    /// All of them, as environment variables.
    pub(crate) fn vars(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Lets the daemon abort when it comes to the point `name` for the `nth` time. Several points
    /// may be set.
    pub(crate) fn failpoint(self, name: &str, nth: usize) -> Self {
        const VARIABLE: &str = "WORKER_SPAWNER_FAILPOINTS";
        let before = self.get(VARIABLE).map(|points| format!("{points},")).unwrap_or_default();
        self.set(VARIABLE, &format!("{before}{name}={nth}"))
    }

    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self.0.insert(name.into(), value.into());
        self
    }

    pub(crate) fn set_all(mut self, settings: &[(&str, &str)]) -> Self {
        for (name, value) in settings {
            self = self.set(name, value);
        }
        self
    }

    /// Connects to `server`.
    pub(crate) fn nats(mut self, server: &NatsServer) -> Self {
        for (name, value) in server.settings() {
            self = self.set(name, &value);
        }
        self
    }

    /// Runs functions on `engine`.
    pub(crate) fn engine(self, engine: &Engine) -> Self {
        match &engine.host {
            Some(host) => self.set("DOCKER_HOST", host),
            None => self,
        }
    }
}

/// A running daemon, killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    log: Log,
    /// Where it may have left containers that waited for jobs, if it had any.
    pool: Option<Option<String>>,
    /// Its home and working directory, empty.
    _home: TempDir,
}

impl Daemon {
    pub(crate) fn spawn(settings: &Settings) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut child = bound_to_this_thread(env!("CARGO_BIN_EXE_worker-spawner"))
            .env_clear()
            .env("HOME", home.path())
            .envs(&settings.0)
            .current_dir(home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("setpriv is needed");
        let log = Log::default();
        log.follow(child.stdout.take().unwrap());
        log.follow(child.stderr.take().unwrap());
        let has_pool = settings.get("WARM_CONTAINERS") != Some("0");
        let pool = has_pool.then(|| settings.get("DOCKER_HOST").map(ToString::to_string));
        Self { child, log, pool, _home: home }
    }

    /// Waits until it says that it takes requests.
    pub(crate) async fn wait_ready(&mut self) {
        let log = self.log.clone();
        tokio::select! {
            _ = log.wait_for("the daemon is ready", |line| message_of(line) == "ready") => {}
            status = process::exit_of(&mut self.child, PATIENCE) => {
                panic!("the daemon ended before it was ready: {status:?}\n{}", self.log.text());
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        process::send(self.child.id(), signal);
    }

    /// Waits for its end.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        let status = process::exit_of(&mut self.child, PATIENCE).await;
        let status =
            status.unwrap_or_else(|| panic!("the daemon did not exit\n{}", self.log.text()));
        self.log.complete().await;
        status
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Ends it as a crash would, and waits until it is gone.
    pub(crate) async fn crash(&mut self) {
        self.signal(Signal::KILL);
        self.exit().await;
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it where it is, until [`thaw`](Self::thaw): as a machine does that sleeps, or swaps.
    pub(crate) fn freeze(&self) {
        process::suspend(self.pid());
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Most memory it ever held, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// The memory it holds now, in bytes.
    pub(crate) fn rss_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    fn memory(&self, kind: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(kind)).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        process::end(&mut self.child);
        if let Some(host) = &self.pool {
            engine::remove_idle_blocking(host.as_deref(), self.child.id());
        }
        if std::thread::panicking() {
            eprintln!("--- log of the daemon {}\n{}", self.child.id(), self.log.text());
        }
    }
}

/// What a daemon printed, line by line.
#[derive(Clone)]
pub(crate) struct Log {
    lines: Arc<Mutex<Vec<String>>>,
    /// How many lines there are.
    count: Arc<watch::Sender<usize>>,
    /// How many streams may still bring more.
    open: Arc<watch::Sender<usize>>,
}

impl Default for Log {
    fn default() -> Self {
        let counter = || Arc::new(watch::channel(0).0);
        Self { lines: Arc::default(), count: counter(), open: counter() }
    }
}

impl Log {
    fn follow(&self, stream: impl std::io::Read + Send + 'static) {
        let log = self.clone();
        self.open.send_modify(|open| *open += 1);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let total = {
                    let mut lines = log.lines.lock().unwrap();
                    lines.push(String::from_utf8_lossy(&line).into_owned());
                    lines.len()
                };
                log.count.send_replace(total);
            }
            log.open.send_modify(|open| *open -= 1);
        });
    }

    /// Waits until all that an ended process printed is here.
    async fn complete(&self) {
        let mut open = self.open.subscribe();
        within("the end of the log", PATIENCE, open.wait_for(|open| *open == 0)).await.unwrap();
    }

    /// All of it so far.
    pub(crate) fn text(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }

    /// The events so far; what is not an event is `null`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let lines = self.lines.lock().unwrap();
        lines.iter().map(|line| serde_json::from_str(line).unwrap_or(Value::Null)).collect()
    }

    /// Waits for an event that `matches`, from the start of the log on.
    pub(crate) async fn wait_for(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Value {
        let mut count = self.count.subscribe();
        within(what, PATIENCE, async {
            let mut seen = 0;
            loop {
                count.borrow_and_update();
                let events = self.events();
                if let Some(found) = events.iter().skip(seen).find(|event| matches(event)) {
                    return found.clone();
                }
                seen = events.len();
                count.changed().await.unwrap();
            }
        })
        .await
    }
}

/// The text of a log event.
pub(crate) fn message_of(event: &Value) -> &str {
    event["fields"]["message"].as_str().unwrap_or_default()
}
