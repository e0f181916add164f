//! The agent as the first process of a namespace, and the daemon's side of its channel.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use worker_spawner::agent;
use worker_spawner::agent::dialogue::{Dialogue, Said};
use worker_spawner::agent::frame::{self, Exit, Kind, Refusal, Start};

/// Nothing here takes longer, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// No function here prints more: one that does not stop must not fill the machine's memory.
const MAX_OUTPUT: usize = 64 << 20;
/// What a container's first process has: root, and nothing that makes it more than its name.
const CONFINED: [&str; 4] = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];

/// The agent's file. Written once and before anything is executed: a program whose file some child
/// still has open for writing could not be.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("agent");
        let new = path.with_extension(std::process::id().to_string());
        fs::write(&new, agent::BINARY).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    })
}

pub(crate) fn start(argv: &[&str]) -> Start {
    let argv = argv.iter().map(|arg| arg.as_bytes().to_vec()).collect();
    Start { argv, ..Start::default() }
}

pub(crate) fn sh(script: &str) -> Start {
    start(&["sh", "-c", script])
}

/// An agent, from its hello on. Ends with this value, and all that it runs with it.
pub(crate) struct Agent {
    process: Child,
    pub(crate) channel: Option<File>,
    output: Option<Receiver<Bytes>>,
    dialogue: Dialogue,
}

/// What came of a function.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Exit,
    /// The agent's own.
    pub(crate) status: ExitStatus,
}

impl Outcome {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

impl Agent {
    /// One that has no capabilities.
    pub(crate) fn new() -> Self {
        Self::through(&CONFINED)
    }

    /// One that is executed by `prefix`.
    pub(crate) fn through(prefix: &[&str]) -> Self {
        let mut agent = Self::spawn(prefix);
        assert_eq!(agent.hear(), Some(Said::Ready));
        agent
    }

    fn spawn(prefix: &[&str]) -> Self {
        let program = program();
        let mut command = Command::new("unshare");
        if !geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"])
            .args(prefix)
            .arg(program)
            .env_clear()
            // In this order, that of their names.
            .envs([("FIRST", "1"), ("HOME", "/root"), ("PATH", "/usr/bin:/bin"), ("SECOND", "2")])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let channel = Some(File::from(OwnedFd::from(process.stdin.take().unwrap())));
        let mut stdout = process.stdout.take().unwrap();
        // Nothing is read ahead beyond a chunk or two: who does not ask lets the agent wait.
        let (sender, output) = sync_channel(0);
        thread::spawn(move || {
            let mut chunk = vec![0; 10_000];
            while let Ok(length @ 1..) = stdout.read(&mut chunk) {
                if sender.send(Bytes::copy_from_slice(&chunk[..length])).is_err() {
                    break;
                }
            }
        });
        Self { process, channel, output: Some(output), dialogue: Dialogue::new() }
    }

    /// What it says next; nothing once its output has ended.
    pub(crate) fn hear(&mut self) -> Option<Said> {
        loop {
            if let Some(said) = self.dialogue.pull().unwrap() {
                return Some(said);
            }
            let output = self.output.as_ref().unwrap();
            match output.recv_timeout(PATIENCE) {
                Ok(chunk) => self.dialogue.push(chunk),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(error) => panic!("the agent says nothing: {error}"),
            }
        }
    }

    pub(crate) fn say(&self, kind: Kind, payload: &[u8]) {
        let mut bytes = Vec::new();
        frame::push(&mut bytes, kind, payload);
        self.channel.as_ref().unwrap().write_all(&bytes).unwrap();
    }

    /// Input for a function that does not read: its pipe is full then, the agent has a frame that it
    /// cannot deliver, and another waits in the channel.
    pub(crate) fn say_too_much(&self) {
        for length in [frame::MAX_DATA, frame::MAX_DATA, 1] {
            self.say(Kind::Stdin, &vec![0; length]);
        }
    }

    pub(crate) fn start(&mut self, start: &Start) {
        self.say(Kind::Start, &start.encode().unwrap());
        assert_eq!(self.hear(), Some(Said::Started));
    }

    /// Starts a function and waits until it has printed `word` and nothing else.
    pub(crate) fn start_until(&mut self, start: &Start, word: &str) {
        self.start(start);
        let mut printed = Vec::new();
        while printed != word.as_bytes() {
            match self.hear() {
                Some(Said::Stdout(bytes)) => printed.extend_from_slice(&bytes),
                other => panic!("{other:?} and not {word:?}"),
            }
        }
    }

    /// The rest of a function that was started.
    pub(crate) fn finish(mut self) -> Outcome {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = loop {
            assert!(stdout.len() + stderr.len() <= MAX_OUTPUT, "the function prints without end");
            match self.hear() {
                Some(Said::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
                Some(Said::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
                Some(Said::Exited(exit)) => break exit,
                other => panic!("{other:?} instead of output or an exit"),
            }
        };
        self.channel = None;
        assert_eq!(self.hear(), None);
        Outcome { stdout, stderr, exit, status: self.wait() }
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// What it printed to its own standard error, to the end.
    pub(crate) fn complaint(&mut self) -> String {
        let mut text = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Closes the daemon's end of what it says.
    pub(crate) fn stop_listening(&mut self) {
        self.output = None;
    }

    /// Its process, as this namespace counts.
    pub(crate) fn pid(&self) -> Pid {
        let unshare = self.process.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"));
        Pid::from_raw(children.unwrap().trim().parse().unwrap()).unwrap()
    }

    /// Sends it a signal from outside, as `docker kill` does.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Processor time that it took itself, in nanoseconds.
    pub(crate) fn cpu_ns(&self) -> u64 {
        let schedstat =
            fs::read_to_string(format!("/proc/{}/schedstat", self.pid().as_raw_nonzero()));
        schedstat.unwrap().split(' ').next().unwrap().parse().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended; otherwise its namespace ends with it, and the agent before with its channel.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs a function that has no input from the daemon.
pub(crate) fn run(start: &Start) -> Outcome {
    let mut agent = Agent::new();
    agent.start(start);
    agent.finish()
}

/// Runs a function that gets `input`, sent in frames as big as they may be.
pub(crate) fn run_with(start: Start, input: &[u8]) -> Outcome {
    let mut agent = Agent::new();
    agent.start(&Start { stdin: true, ..start });
    let channel = agent.channel.as_ref().unwrap().try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut bytes = Vec::new();
            for chunk in input.chunks(frame::MAX_DATA) {
                frame::push(&mut bytes, Kind::Stdin, chunk);
            }
            frame::push(&mut bytes, Kind::StdinEnd, &[]);
            // It is taken to the end even where the function does not read it.
            (&channel).write_all(&bytes).unwrap();
        });
        agent.finish()
    })
}

/// Has a function refused.
pub(crate) fn refusal(start: &Start) -> Refusal {
    let mut agent = Agent::new();
    agent.say(Kind::Start, &start.encode().unwrap());
    match agent.hear() {
        Some(Said::Refused(refusal)) => {
            agent.channel = None;
            assert_eq!(agent.hear(), None);
            refusal
        }
        other => panic!("{other:?} instead of a refusal"),
    }
}
