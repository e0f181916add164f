//! A function from its beginning to its end: its streams, its signals, its children.

use std::io::{ErrorKind, Write};
use std::time::{Duration, Instant};

use crate::Failure;
use crate::farewell;
use crate::frame::{Exit, Kind, Malformed};
use crate::function::Function;
use crate::inbox::{Heard, Inbox};
use crate::memory::OomKills;
use crate::outbox::{Outbox, Relayed};
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, POLLOUT, Poll, Reaped, SIGCHLD, Signals};

/// How long killed processes may take to be gone: the kernel may be in the midst of something slow
/// for one of them. It sees to the rest when the agent itself ends.
const LINGER: Duration = Duration::from_secs(10);
/// How long the beginning waits to be told together with what comes first. Whoever asks whether a
/// function has begun can wait so long; meanwhile an interpreter that is starting has the processor.
const BEGINNING_WAITS: Duration = Duration::from_millis(50);
/// How long output waits for more of it, or for the end: that of most functions comes at once.
const OUTPUT_WAITS: Duration = Duration::from_millis(1);
/// Output of so many bytes waits for nothing.
const WORTH_TELLING: usize = 4 << 10;
/// Signals and children in one turn: a function that makes many must not keep the agent from all else.
const MAX_PER_TURN: usize = 256;

/// What the daemon may still send of standard input.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    /// More.
    Open,
    /// A frame of which so many bytes were delivered. The next is read when all were.
    Undelivered(usize),
    /// Nothing.
    Ended,
}

/// How the main process ended.
#[derive(Clone, Copy)]
struct Ended {
    code: u8,
    ran: Duration,
    /// When to stop waiting for the others.
    deadline: Instant,
}

pub struct Supervisor {
    signals: Signals,
    inbox: Inbox,
    outbox: Outbox,
    oom_kills: Option<OomKills>,
    function: Function,
    input: Input,
    ended: Option<Ended>,
    /// Whether some child may have ended that was not reaped.
    unreaped: bool,
    /// Whether every child has ended and was reaped.
    alone: bool,
    /// Whether the end was told. It is the daemon's once the outbox is empty.
    told: bool,
    /// When to tell what is in the outbox; absent where there is nothing that may wait.
    tell_at: Option<Instant>,
}

impl Supervisor {
    /// Of a function that has just begun.
    pub fn new(
        signals: Signals,
        inbox: Inbox,
        mut outbox: Outbox,
        oom_kills: Option<OomKills>,
        function: Function,
        with_stdin: bool,
    ) -> Self {
        let input = if with_stdin { Input::Open } else { Input::Ended };
        outbox.say(Kind::Started, &[]);
        Self {
            signals,
            inbox,
            outbox,
            oom_kills,
            function,
            input,
            ended: None,
            unreaped: false,
            alone: false,
            told: false,
            tell_at: Some(Instant::now() + BEGINNING_WAITS),
        }
    }

    /// Returns the function's exit code once the daemon knows it.
    pub fn run(mut self) -> Result<u8, Failure> {
        loop {
            self.tell()?;
            if let Some(ended) = self.ended
                && self.told
                && self.outbox.is_empty()
            {
                farewell::say(&self.signals, &mut self.inbox, &self.outbox)?;
                return Ok(ended.code);
            }
            self.turn()?;
        }
    }

    /// Writes what there is to tell, unless that may wait. Once in a turn, so that all that a turn has
    /// to say goes in one write: to the daemon it is a long way, on which many processes have to wake.
    fn tell(&mut self) -> Result<(), Failure> {
        if self.tell_at.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        self.tell_at = None;
        Ok(self.outbox.flush()?)
    }

    /// Has the outbox wait at most so long, whatever is said of it already.
    fn tell_within(&mut self, wait: Duration) {
        let at = Instant::now() + wait;
        self.tell_at = Some(self.tell_at.map_or(at, |before| before.min(at)));
    }

    fn turn(&mut self) -> Result<(), Failure> {
        let [signals, inbox, outbox, stdin, stdout, stderr] = self.wait()?;
        let broken = POLLERR | POLLHUP;
        if inbox.has(broken) || outbox.has(broken) {
            return Err(Failure::HungUp);
        }
        if inbox.has(POLLIN) {
            self.hear()?;
        }
        if stdin.has(POLLOUT | broken) {
            self.feed()?;
        }
        if stdout.has(POLLIN | broken) {
            self.relay(Kind::Stdout)?;
        }
        if stderr.has(POLLIN | broken) {
            self.relay(Kind::Stderr)?;
        }
        // Last, so that the end of a short function is told together with what it printed. Not by
        // what the wait said alone: it may have ended since.
        if signals.has(POLLIN) || stdout.has(POLLIN | broken) || self.unreaped {
            self.heed_signals()?;
        }
        self.conclude()
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Result<[Poll; 6], Failure> {
        // A hang-up is noticed even where nothing is read. The function's input is left out instead:
        // that nobody reads it is of no interest while there is none, and would be said all the time.
        let hear = if matches!(self.input, Input::Undelivered(_)) { 0 } else { POLLIN };
        let tell = if self.outbox.is_empty() || self.tell_at.is_some() { 0 } else { POLLOUT };
        let relay = self.outbox.has_room();
        let function = &self.function;
        let undelivered = matches!(self.input, Input::Undelivered(_));
        let stdin = function.stdin.as_ref().filter(|_| undelivered);
        let stdout = function.stdout.as_ref().filter(|_| relay);
        let stderr = function.stderr.as_ref().filter(|_| relay);
        let mut polls = [
            Poll::on(&self.signals, POLLIN),
            Poll::on(&self.inbox, hear),
            Poll::on(&self.outbox, tell),
            stdin.map_or(Poll::NEVER, |pipe| Poll::on(pipe, POLLOUT)),
            stdout.map_or(Poll::NEVER, |pipe| Poll::on(pipe, POLLIN)),
            stderr.map_or(Poll::NEVER, |pipe| Poll::on(pipe, POLLIN)),
        ];
        let until = match self.ended {
            _ if self.unreaped => Some(Instant::now()),
            // With nobody left, what there is to tell waits for nothing but room.
            Some(_) if self.alone && !self.told => relay.then(Instant::now),
            Some(ended) if !self.told => Some(ended.deadline),
            _ => None,
        };
        let until = until.into_iter().chain(self.tell_at).min();
        sys::poll(&mut polls, until.map(|at| at.saturating_duration_since(Instant::now())))?;
        Ok(polls)
    }

    /// Takes one frame from the daemon.
    fn hear(&mut self) -> Result<(), Failure> {
        match (self.inbox.read()?, self.input) {
            (Heard::Nothing, _) => Ok(()),
            (Heard::Gone, _) => Err(Failure::HungUp),
            (Heard::Frame(Kind::Stdin), Input::Open) => {
                self.input = Input::Undelivered(0);
                self.feed()
            }
            (Heard::Frame(Kind::StdinEnd), Input::Open) => {
                self.input = Input::Ended;
                self.function.stdin = None;
                Ok(())
            }
            (Heard::Frame(_), _) => Err(Failure::Protocol(Malformed("a frame out of turn"))),
            (Heard::Malformed(malformed), _) => Err(Failure::Protocol(malformed)),
        }
    }

    /// Gives the function as much of its input as it takes now. What it will not take because it
    /// closed its end goes nowhere.
    fn feed(&mut self) -> Result<(), Failure> {
        let Input::Undelivered(delivered) = &mut self.input else {
            return Ok(());
        };
        while let Some(pipe) = &mut self.function.stdin {
            let rest = &self.inbox.payload()[*delivered..];
            if rest.is_empty() {
                break;
            }
            match pipe.write(rest) {
                Ok(length) => *delivered += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::BrokenPipe => self.function.stdin = None,
                Err(error) => return Err(error.into()),
            }
        }
        self.input = Input::Open;
        Ok(())
    }

    /// Takes what a stream has, once.
    fn relay(&mut self, kind: Kind) -> Result<Relayed, Failure> {
        let stdout = kind == Kind::Stdout;
        let stream = if stdout { &mut self.function.stdout } else { &mut self.function.stderr };
        let Some(pipe) = stream else {
            return Ok(Relayed::Ended);
        };
        let relayed = self.outbox.relay(kind, pipe)?;
        match relayed {
            Relayed::Ended => *stream = None,
            Relayed::Some if self.outbox.len() < WORTH_TELLING => self.tell_within(OUTPUT_WAITS),
            Relayed::Some | Relayed::NoRoom => self.tell_at = None,
            Relayed::Nothing => {}
        }
        Ok(relayed)
    }

    /// Reaps children, and hands every other signal on to the function, as tini does.
    fn heed_signals(&mut self) -> Result<(), Failure> {
        let own = std::process::id();
        for _ in 0..MAX_PER_TURN {
            let Some(signal) = self.signals.next()? else { break };
            if signal.number == SIGCHLD {
                self.unreaped = true;
            // What comes from the agent itself is a SIGPIPE, of which it has heard already.
            } else if signal.sender != own && self.ended.is_none() {
                sys::kill(self.function.pid, signal.number);
            }
        }
        if self.unreaped {
            self.reap();
        }
        Ok(())
    }

    fn reap(&mut self) {
        for _ in 0..MAX_PER_TURN {
            match sys::reap() {
                Reaped::Child(pid, code) if pid == self.function.pid && self.ended.is_none() => {
                    let now = Instant::now();
                    let ran = now - self.function.began;
                    self.ended = Some(Ended { code, ran, deadline: now + LINGER });
                    sys::kill_all_others();
                }
                Reaped::Child(..) => {}
                Reaped::NoneYet => {
                    self.unreaped = false;
                    return;
                }
                Reaped::NoneLeft => {
                    (self.unreaped, self.alone) = (false, true);
                    return;
                }
            }
        }
    }

    /// Tells how the function ended, once that is all there is left to tell.
    ///
    /// With all processes gone, what is in the pipes now is all there will ever be in them: their end
    /// need not be waited for, which somebody outside the container could hold back.
    fn conclude(&mut self) -> Result<(), Failure> {
        let Some(ended) = self.ended else { return Ok(()) };
        if self.told || !(self.alone || Instant::now() >= ended.deadline) {
            return Ok(());
        }
        for kind in [Kind::Stdout, Kind::Stderr] {
            // Of what others still write there is no end.
            while self.alone {
                match self.relay(kind)? {
                    Relayed::Some => {}
                    Relayed::Nothing | Relayed::Ended => break,
                    Relayed::NoRoom => return Ok(()),
                }
            }
        }
        let (cpu_us, peak_bytes) = sys::usage_of_children();
        let exit = Exit {
            code: ended.code,
            oom_kills: self.oom_kills.as_ref().and_then(OomKills::so_far),
            ran_us: u64::try_from(ended.ran.as_micros()).unwrap_or(u64::MAX),
            cpu_us,
            peak_bytes,
        };
        self.outbox.say(Kind::Exit, &exit.encode());
        (self.told, self.tell_at) = (true, None);
        Ok(())
    }
}
