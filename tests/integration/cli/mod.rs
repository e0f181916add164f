//! The command line: the built program as a client, against real servers and a real daemon.

mod connections;
mod dead_letters;
mod jobs;
mod run;
mod submit;
mod terminal;

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::process::{self, Signal, bound_to_this_thread};
use crate::support::wait::{PATIENCE, eventually};
use crate::support::world::World;

/// The most that is kept of what a client prints.
const MOST: usize = 64 << 20;

/// How a client ended, and what it printed.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ran {
    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }

    /// Standard output as lines of JSON.
    pub(crate) fn json(&self) -> Vec<Value> {
        self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// A client that runs, killed when dropped.
pub(crate) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Printed,
    stderr: Printed,
    _home: Arc<TempDir>,
}

/// What to start a client with: nothing is inherited but how to find programs.
pub(crate) struct Client {
    command: Vec<String>,
    variables: Vec<(String, String)>,
    home: Arc<TempDir>,
}

impl Client {
    /// Of no server.
    pub(crate) fn new(arguments: &[&str]) -> Self {
        let program = env!("CARGO_BIN_EXE_worker-spawner");
        let command = [program].iter().chain(arguments).map(ToString::to_string).collect();
        let mut variables = Vec::new();
        for name in ["PATH", "LLVM_PROFILE_FILE"] {
            variables.extend(std::env::var(name).map(|value| (name.to_string(), value)));
        }
        Self { command, variables, home: Arc::new(tempfile::tempdir().unwrap()) }
    }

    /// Of the server of `world`.
    pub(crate) fn of(world: &World, arguments: &[&str]) -> Self {
        world
            .nats
            .settings()
            .into_iter()
            .fold(Self::new(arguments), |client, (name, value)| client.set(name, &value))
    }

    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_string(), value.to_string()));
        self
    }

    /// On a terminal of its own.
    pub(crate) fn on_a_terminal(mut self) -> Self {
        let quoted: Vec<String> =
            self.command.iter().map(|word| shell_words::quote(word).into_owned()).collect();
        let line = format!("exec {}", quoted.join(" "));
        self.command =
            ["script", "-qefc", &line, "/dev/null"].iter().map(ToString::to_string).collect();
        self.set("TERM", "xterm").set("SHELL", "/bin/sh")
    }

    pub(crate) fn spawn(self) -> Running {
        let mut command: Command = bound_to_this_thread(&self.command[0]);
        let mut child = command
            .args(&self.command[1..])
            .env_clear()
            .env("HOME", self.home.path())
            .envs(self.variables)
            .current_dir(self.home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("setpriv is needed");
        let stdin = child.stdin.take();
        let stdout = Printed::of(child.stdout.take().unwrap());
        let stderr = Printed::of(child.stderr.take().unwrap());
        Running { child, stdin, stdout, stderr, _home: self.home }
    }

    /// Runs it to its end without input.
    pub(crate) async fn run(self) -> Ran {
        self.run_with(b"").await
    }

    /// Runs it to its end with this input.
    pub(crate) async fn run_with(self, input: &[u8]) -> Ran {
        let mut running = self.spawn();
        let (mut stdin, input) = (running.stdin.take().unwrap(), input.to_vec());
        // Who reads nothing more has ended; the test sees how.
        std::thread::spawn(move || stdin.write_all(&input));
        running.end().await
    }
}

impl Running {
    /// Waits until it has printed that to standard output.
    pub(crate) async fn prints(&self, text: &str) {
        self.stdout.wait_for(text, self).await;
    }

    /// Waits until it has said that on standard error.
    pub(crate) async fn says(&self, text: &str) {
        self.stderr.wait_for(text, self).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        process::send(self.child.id(), signal);
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Types on its terminal, or writes to its standard input.
    pub(crate) fn types(&mut self, keys: &[u8]) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(keys).and_then(|()| stdin.flush()).unwrap();
    }

    /// Waits for its end.
    pub(crate) async fn end(mut self) -> Ran {
        let status = process::exit_of(&mut self.child, PATIENCE).await;
        let status = status.unwrap_or_else(|| panic!("the client does not end: {}", self.told()));
        eventually("all is read that the client printed", || async {
            self.stdout.complete() && self.stderr.complete()
        })
        .await;
        Ran {
            code: status.code().unwrap_or(-1),
            stdout: self.stdout.bytes(),
            stderr: String::from_utf8_lossy(&self.stderr.bytes()).into_owned(),
        }
    }

    fn told(&self) -> String {
        let text = |printed: &Printed| {
            let bytes = printed.bytes();
            String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]).into_owned()
        };
        format!("stdout {:?}, stderr {:?}", text(&self.stdout), text(&self.stderr))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        process::end(&mut self.child);
    }
}

/// What comes out of a pipe.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<(Vec<u8>, bool)>>);

impl Printed {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let printed = Self::default();
        let kept = printed.clone();
        std::thread::spawn(move || {
            let mut part = vec![0; 64 << 10];
            while let Ok(length @ 1..) = pipe.read(&mut part) {
                let mut kept = kept.0.lock().unwrap();
                let room = MOST.saturating_sub(kept.0.len());
                kept.0.extend_from_slice(&part[..length.min(room)]);
            }
            kept.0.lock().unwrap().1 = true;
        });
        printed
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().0.clone()
    }

    fn complete(&self) -> bool {
        self.0.lock().unwrap().1
    }

    async fn wait_for(&self, text: &str, running: &Running) {
        let found = || {
            let kept = self.0.lock().unwrap();
            kept.0.windows(text.len()).any(|window| window == text.as_bytes())
        };
        let deadline = std::time::Instant::now() + PATIENCE;
        while !found() {
            let over = self.complete() || std::time::Instant::now() > deadline;
            assert!(!over || found(), "it never said {text:?}: {}", running.told());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// A world without streams, and one with them.
pub(crate) async fn worlds(settings: &[(&str, &str)]) -> [World; 2] {
    [World::start(settings).await, World::durable(settings).await]
}

pub(crate) fn is_durable(world: &World) -> bool {
    world.settings.get("DELIVERY") == Some("jetstream")
}

/// The arguments of `run` for a shell script, under an id.
pub(crate) fn script<'a>(world: &'a World, id: &'a str, script: &'a str) -> Vec<&'a str> {
    vec!["run", &world.image, "--id", id, "--", "sh", "-c", script]
}

/// A script that goes on until somebody makes /tmp/go.
pub(crate) const HELD: &str =
    "echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo released";
