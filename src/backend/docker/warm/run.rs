//! A run in a container that was started ahead of time: write a frame, read frames.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::Miss;
use super::line::{self, Ear, Lost, Voice};
use crate::agent::dialogue::Said;
use crate::agent::frame::{self, Kind, MAX_DATA};
use crate::backend::docker::container::Container;
use crate::backend::docker::renaming::Renaming;
use crate::backend::{CleanupError, Event, Exit, Signal};
use crate::capture::Stream;
use crate::job::{Failure, Job, JobError, Limits, Usage, code};

/// How long an agent may take to take its order and to say that the function has begun, before it
/// counts as hung.
const START_PATIENCE: Duration = Duration::from_secs(2);
/// How long a container may take to be seen to have ended after its line did, or after it was hung up
/// on: longer than an agent waits for that.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Exit code of a process that SIGKILL ended.
const KILLED: i64 = 128 + 9;

/// A container that waits for its one job.
pub(in crate::backend::docker) struct Idle {
    pub(super) container: Container,
    /// The limits it has.
    pub(super) limits: Limits,
    pub(super) ear: Ear,
    pub(super) voice: Voice,
}

impl Idle {
    /// Whether it has these limits. How long a function may take is no limit of its container's.
    pub(super) fn fits(&self, limits: &Limits) -> bool {
        Limits { timeout: self.limits.timeout, ..limits.clone() } == self.limits
    }
}

/// When a function was told to begin.
pub(in crate::backend::docker) struct Begun {
    pub(in crate::backend::docker) at: SystemTime,
    pub(in crate::backend::docker) since: Instant,
}

/// A run in such a container.
pub(in crate::backend::docker) struct WarmRun {
    container: Arc<Container>,
    /// The limits it has yet to get.
    limits: Option<Limits>,
    ear: Option<Ear>,
    /// Kept until the end: an agent that is not spoken to any more ends its function.
    voice: Option<Voice>,
    exited: bool,
    /// Finds out how a function ended whose agent did not say.
    inquest: Option<BoxFuture<'static, Result<Exit, Failure>>>,
    /// Feeds standard input; ends with the run.
    feeding: Option<AbortOnDropHandle<()>>,
    renaming: Option<Renaming>,
}

impl WarmRun {
    /// Takes the container for `job`. Nothing has begun.
    pub(in crate::backend::docker) fn new(idle: Idle, job: &Job) -> Self {
        let limits = (!idle.fits(&job.limits)).then(|| job.limits.clone());
        let Idle { mut container, ear, voice, .. } = idle;
        let renaming = container.serve(&job.id);
        Self {
            container: Arc::new(container),
            limits,
            ear: Some(ear),
            voice: Some(voice),
            exited: false,
            inquest: None,
            feeding: None,
            renaming: Some(renaming),
        }
    }

    /// Has the agent begin what `order` says; `told` is set when it gets to know. Returns when that was:
    /// that the function has begun is heard later, maybe only with its end.
    ///
    /// # Errors
    /// Nothing came of it. The function may run until the container is gone.
    pub(in crate::backend::docker) async fn begin(
        &mut self,
        order: &[u8],
        stdin: Option<Bytes>,
        told: &watch::Sender<bool>,
    ) -> Result<Begun, Miss> {
        let (Some(ear), Some(mut voice)) = (&mut self.ear, self.voice.take()) else {
            return Err(Miss::Lost);
        };
        if let Some(limits) = self.limits.take()
            && let Err(error) = self.container.limit(&limits).await
        {
            tracing::warn!(%error, "a warm container did not take its job's limits");
            return Err(Miss::Limits);
        }
        told.send_replace(true);
        let deadline = tokio::time::Instant::now() + START_PATIENCE;
        let ordered = tokio::time::timeout_at(deadline, line::say(&mut voice, order)).await;
        ordered.map_err(|_| Miss::Hung)?.map_err(|_| Miss::Lost)?;
        let begun = Begun { at: SystemTime::now(), since: Instant::now() };
        crate::stage!("order written");
        match stdin {
            Some(stdin) => {
                let feeding = tokio::spawn(async move {
                    feed(&mut voice, &stdin).await;
                    // The line stays open: its end would be the function's.
                    std::future::pending::<()>().await;
                });
                self.feeding = Some(AbortOnDropHandle::new(feeding));
            }
            None => self.voice = Some(voice),
        }
        match tokio::time::timeout_at(deadline, ear.next()).await {
            Ok(Ok(Said::Started)) => {
                crate::stage!("begun");
                Ok(begun)
            }
            Ok(Ok(Said::Refused(refusal))) => {
                tracing::debug!(step = ?refusal.step, errno = refusal.errno, "a warm container refused its function");
                Err(Miss::Refused)
            }
            Ok(Ok(_) | Err(_)) => Err(Miss::Lost),
            Err(_) => Err(Miss::Hung),
        }
    }

    /// As [`Run::next`](crate::backend::Run::next).
    pub(in crate::backend::docker) async fn next(&mut self) -> Result<Event, Failure> {
        if let Some(ear) = &mut self.ear {
            match ear.next().await {
                Ok(Said::Stdout(chunk)) => {
                    crate::stage!("output heard");
                    return Ok(Event::Output(Stream::Stdout, chunk));
                }
                Ok(Said::Stderr(chunk)) => return Ok(Event::Output(Stream::Stderr, chunk)),
                Ok(Said::Exited(exit)) => {
                    crate::stage!("end heard");
                    self.exited = true;
                    // What the function did not read, nobody will.
                    self.feeding = None;
                    if exit.oom_kills.is_some() || i64::from(exit.code) != KILLED {
                        return Ok(Event::Exited(told(exit)));
                    }
                    // The container does not see its own control group; the engine does, once it has ended.
                    self.hang_up();
                    self.inquest = Some(ask_engine(self.container.clone(), exit).boxed());
                }
                Ok(Said::Ready | Said::Started | Said::Refused(_)) => {
                    return Err(broken("it says what it has said before"));
                }
                Err(Lost::Violated(violation)) => return Err(broken(&violation.to_string())),
                Err(Lost::Ended) => self.ear = None,
            }
        }
        let container = &self.container;
        let inquest = self.inquest.get_or_insert_with(|| inquest(container.clone()).boxed());
        let exit = inquest.await?;
        self.exited = true;
        Ok(Event::Exited(exit))
    }

    pub(in crate::backend::docker) fn has_exited(&self) -> bool {
        self.exited
    }

    /// The agent hands signals on to its function; KILL ends both.
    pub(in crate::backend::docker) fn signal(
        &self,
        signal: Signal,
    ) -> BoxFuture<'static, Result<(), Failure>> {
        self.container.signal(signal)
    }

    /// Has the container end where the function has.
    fn hang_up(&mut self) {
        (self.ear, self.voice, self.feeding) = (None, None, None);
    }

    pub(in crate::backend::docker) async fn cleanup(&mut self) -> Result<(), CleanupError> {
        // The line first: an engine that cannot write to it holds on to the container.
        self.hang_up();
        self.inquest = None;
        if let Some(renaming) = &mut self.renaming {
            renaming.end().await;
            self.renaming = None;
        }
        self.container.remove().await
    }
}

/// What an agent said of its function's end.
fn told(exit: frame::Exit) -> Exit {
    Exit {
        code: i64::from(exit.code),
        oom_killed: exit.oom_kills.is_some_and(|kills| kills > 0),
        not_started: None,
        ran: Some(Duration::from_micros(exit.ran_us)),
        usage: Usage {
            cpu: Some(Duration::from_micros(exit.cpu_us)),
            memory_peak_bytes: Some(exit.peak_bytes),
        },
    }
}

/// The same, of one that was killed, with what the engine knows of the reason.
async fn ask_engine(container: Arc<Container>, exit: frame::Exit) -> Result<Exit, Failure> {
    let told = told(exit);
    let _ = tokio::time::timeout(END_PATIENCE, container.exit_code()).await;
    let oom_killed = container.explain(told.code, None).await?.oom_killed;
    Ok(Exit { oom_killed, ..told })
}

/// How a function ended whose agent is gone: by a signal that nobody survives, or not so that
/// anything can be said of it.
async fn inquest(container: Arc<Container>) -> Result<Exit, Failure> {
    let ended = tokio::time::timeout(END_PATIENCE, container.exit_code()).await;
    let code = ended.unwrap_or_else(|_| Err(broken("it closed its line and goes on")))?;
    if code != KILLED {
        return Err(broken(&format!("it ended with {code} and did not say how its function did")));
    }
    container.explain(code, None).await
}

fn broken(why: &str) -> Failure {
    let message = format!("the container's agent failed: {why}");
    Failure::Transient(JobError::new(code::ENGINE_ERROR, message))
}

/// Writes standard input and its end. A function that ends before it has read all of it breaks the
/// line: its own affair.
async fn feed(voice: &mut Voice, stdin: &Bytes) {
    let mut frames = Vec::with_capacity(MAX_DATA.min(stdin.len()) + frame::HEADER);
    for chunk in stdin.chunks(MAX_DATA) {
        frames.clear();
        frame::push(&mut frames, Kind::Stdin, chunk);
        if let Err(error) = line::say(voice, &frames).await {
            tracing::debug!(%error, "standard input was not read to its end");
            return;
        }
    }
    if let Err(error) = line::say(voice, &frame::header(Kind::StdinEnd, 0)).await {
        tracing::debug!(%error, "standard input was closed already");
    }
}
