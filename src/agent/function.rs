//! The function: begun as a cold container's init process would, and what is known of it while it runs.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{CString, NulError, OsStr, OsString};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Instant;

use crate::frame::{Refusal, Start, Step};
use crate::sys::{self, Program, SpawnError};

/// Where programs are looked for when the environment does not say: glibc's own default.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";
/// The variables that an engine gives every container.
const ENGINES: [&[u8]; 2] = [b"PATH", b"HOSTNAME"];

/// A function that runs, and the agent's ends of its standard streams.
pub struct Function {
    pub pid: i32,
    pub began: Instant,
    /// Absent where it has no input from the daemon, or none any more.
    pub stdin: Option<PipeWriter>,
    /// Absent once they ended.
    pub stdout: Option<PipeReader>,
    pub stderr: Option<PipeReader>,
}

impl Function {
    /// Runs it. Returns once the program is executed.
    pub fn begin(start: Start) -> Result<Self, Refusal> {
        let strings = |list: Vec<Vec<u8>>| -> Result<Vec<CString>, Refusal> {
            list.into_iter().map(CString::new).collect::<Result<_, _>>().map_err(nul)
        };
        let env = merge(own_environment(), start.env);
        let candidates = strings(candidates(&start.argv[0], &env))?;
        let (argv, env) = (strings(start.argv)?, strings(env)?);
        if let Some(dir) = start.dir {
            let dir = CString::new(dir).map_err(nul)?;
            env::set_current_dir(OsStr::from_bytes(dir.as_bytes()))
                .map_err(|error| refusal(Step::Dir, &error))?;
        }
        let other = |error: io::Error| refusal(Step::Other, &error);
        let (input, stdin) = Input::make(start.stdin).map_err(other)?;
        let (stdout, output) = io::pipe().map_err(other)?;
        let (stderr, error) = io::pipe().map_err(other)?;
        let ours = [stdin.as_ref().map(AsFd::as_fd), Some(stdout.as_fd()), Some(stderr.as_fd())];
        for end in ours.into_iter().flatten() {
            sys::set_nonblocking(end).map_err(other)?;
        }
        let stdio = [input.as_fd(), output.as_fd(), error.as_fd()];
        let program = Program { candidates: &candidates, argv: &argv, env: &env, stdio };
        let began = Instant::now();
        let pid = sys::spawn(&program).map_err(|error| match error {
            SpawnError::Exec(errno) => Refusal { step: Step::Exec, errno },
            SpawnError::Clone(error) => refusal(Step::Other, &error),
        })?;
        Ok(Self { pid, began, stdin, stdout: Some(stdout), stderr: Some(stderr) })
    }
}

/// What the function reads.
enum Input {
    Nothing(File),
    Daemon(PipeReader),
}

impl Input {
    fn make(from_daemon: bool) -> io::Result<(Self, Option<PipeWriter>)> {
        if from_daemon {
            let (reader, writer) = io::pipe()?;
            Ok((Self::Daemon(reader), Some(writer)))
        } else {
            Ok((Self::Nothing(File::open("/dev/null")?), None))
        }
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Nothing(file) => file.as_fd(),
            Self::Daemon(pipe) => pipe.as_fd(),
        }
    }
}

fn nul(_: NulError) -> Refusal {
    Refusal { step: Step::Other, errno: 0 }
}

fn refusal(step: Step, error: &io::Error) -> Refusal {
    Refusal { step, errno: error.raw_os_error().unwrap_or(0) }
}

fn own_environment() -> Vec<Vec<u8>> {
    env::vars_os()
        .map(|(name, value)| [name, OsString::from("="), value].map(OsString::into_vec).concat())
        .collect()
}

/// What a container would have that was created with `changes`, from what this one has: the engine's
/// own variables first, then those of the request, then the image's, and HOME where an init process
/// set it.
fn merge(own: Vec<Vec<u8>>, changes: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let (mut env, images): (Vec<_>, Vec<_>) =
        own.into_iter().partition(|variable| ENGINES.contains(&name(variable)));
    let mut places: BTreeMap<Vec<u8>, usize> =
        env.iter().enumerate().map(|(place, variable)| (name(variable).to_vec(), place)).collect();
    for change in changes {
        let place = *places.entry(name(&change).to_vec()).or_insert(env.len());
        match env.get_mut(place) {
            Some(variable) => *variable = change,
            None => env.push(change),
        }
    }
    env.extend(images.into_iter().filter(|variable| !places.contains_key(name(variable))));
    env
}

fn name(variable: &[u8]) -> &[u8] {
    variable.split(|byte| *byte == b'=').next().unwrap_or(variable)
}

/// Where `program` may be: itself where it names a directory, else below each one that PATH names, of
/// which an empty one is the working directory.
fn candidates(program: &[u8], env: &[Vec<u8>]) -> Vec<Vec<u8>> {
    if program.is_empty() {
        return Vec::new();
    }
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    let path = env.iter().find_map(|variable| variable.strip_prefix(b"PATH=".as_slice()));
    path.unwrap_or(DEFAULT_PATH)
        .split(|byte| *byte == b':')
        .map(|dir| if dir.is_empty() { program.to_vec() } else { [dir, b"/", program].concat() })
        .collect()
}
