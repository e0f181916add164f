//! The agent: the first process of a container that was started ahead of time. It waits for a
//! function, runs it once, tells how that went, and ends when the daemon hangs up, and the container
//! with it.
//!
//! What it does for the function is what the init process of a container does that is started for
//! it, so that no function can tell in which of the two it runs. It holds the daemon's channel in the
//! same container as the function, so that has to be out of the function's reach: see
//! [`sys::forbid_inspection`].
//!
//! Everything happens in one thread that waits in one place at a time, and waits for nobody who does
//! not read: neither the daemon nor the function. That the kernel ends all processes of a container
//! with its first one does the rest: however this program ends, nothing is left.
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod farewell;
#[allow(dead_code, reason = "the daemon's half of it")]
mod frame;
mod function;
mod inbox;
mod memory;
mod outbox;
mod supervisor;
mod sys;

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;

use frame::{Kind, Malformed, Start};
use function::Function;
use inbox::{Heard, Inbox};
use memory::OomKills;
use outbox::Outbox;
use supervisor::Supervisor;
use sys::{POLLERR, POLLHUP, POLLIN, Poll, SIGCHLD, Signals};

/// Why the agent ends without a word to the daemon.
pub enum Failure {
    /// It is not the first process of its container, and will kill all it can.
    NotInit,
    /// The daemon said what it may not.
    Protocol(Malformed),
    /// The daemon went away while the function ran.
    HungUp,
    /// The kernel refused what it never refuses.
    System(io::Error),
}

impl Failure {
    /// The exit code: that of sysexits.h where there is one, or as if by SIGHUP.
    fn code(&self) -> u8 {
        match self {
            Self::NotInit => 64,
            Self::Protocol(_) => 65,
            Self::System(_) => 71,
            Self::HungUp => 129,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInit => f.write_str("runs only as the first process of a container"),
            Self::Protocol(malformed) => write!(f, "was sent {malformed}"),
            Self::HungUp => f.write_str("was left alone with a running function"),
            Self::System(error) => write!(f, "cannot go on: {error}"),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // A write to a pipe that nobody reads: both ends of the daemon's are gone together.
        if error.kind() == io::ErrorKind::BrokenPipe { Self::HungUp } else { Self::System(error) }
    }
}

fn main() -> ExitCode {
    run().map_or_else(
        |failure| {
            // There is nobody else to tell.
            let _ = writeln!(io::stderr(), "agent: {failure}");
            failure.code().into()
        },
        ExitCode::from,
    )
}

fn run() -> Result<u8, Failure> {
    if std::process::id() != 1 {
        return Err(Failure::NotInit);
    }
    sys::forbid_inspection()?;
    sys::inherit_nothing();
    let signals = Signals::take()?;
    let mut inbox = Inbox::new(channel(io::stdin().as_fd())?);
    let mut outbox = Outbox::new(channel(io::stdout().as_fd())?);
    let oom_kills = OomKills::count();
    outbox.say(Kind::Hello, &[frame::VERSION]);
    outbox.flush_all()?;

    let Some(start) = wait_for_start(&signals, &mut inbox)? else {
        return Ok(0);
    };
    let with_stdin = start.stdin;
    match Function::begin(start) {
        Ok(function) => {
            Supervisor::new(signals, inbox, outbox, oom_kills, function, with_stdin).run()
        }
        Err(refusal) => {
            outbox.say(Kind::Refused, &refusal.encode());
            outbox.flush_all()?;
            farewell::say(&signals, &mut inbox, &outbox)?;
            // As shells do.
            Ok(if refusal.errno == sys::ENOENT { 127 } else { 126 })
        }
    }
}

/// A standard stream of this process, under another number that no child has.
fn channel(stream: BorrowedFd<'_>) -> io::Result<File> {
    sys::set_nonblocking(stream)?;
    stream.try_clone_to_owned().map(File::from)
}

/// What to run; nothing where the daemon hangs up or the container is stopped.
fn wait_for_start(signals: &Signals, inbox: &mut Inbox) -> Result<Option<Start>, Failure> {
    loop {
        let mut polls = [Poll::on(signals, POLLIN), Poll::on(inbox, POLLIN)];
        sys::poll(&mut polls, None)?;
        // A container is stopped by whatever signal its image names, so each of them ends it. There
        // may be children of an earlier program in this process.
        if signals.next()?.is_some_and(|signal| signal.number != SIGCHLD) {
            return Ok(None);
        }
        if !polls[1].has(POLLIN | POLLHUP | POLLERR) {
            continue;
        }
        match inbox.read()? {
            Heard::Nothing => {}
            Heard::Gone => return Ok(None),
            Heard::Frame(Kind::Start) => {
                // The room is given back before the function runs.
                let start = Start::decode(&inbox.take_payload());
                return start.map(Some).map_err(Failure::Protocol);
            }
            Heard::Frame(_) => {
                return Err(Failure::Protocol(Malformed("a frame that is no start")));
            }
            Heard::Malformed(malformed) => return Err(Failure::Protocol(malformed)),
        }
    }
}
