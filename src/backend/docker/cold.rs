//! A run in a container created for it: create, attach, start, wait, remove.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bollard::container::LogOutput;
use bollard::errors::Error;
use bollard::models::ContainerCreateBody;
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio_util::task::AbortOnDropHandle;

use super::Shared;
use super::container::{Container, engine_lost, failure};
use super::image::Image;
use super::spec::{self, Marks};
use crate::backend::{CleanupError, Event, Signal};
use crate::capture::Stream;
use crate::job::{Failure, Job, JobError, code};

/// How long the output may stay open after the exit. The engine closes it within milliseconds.
const EOF_PATIENCE: Duration = Duration::from_secs(10);
/// The most of standard error that can be the init process' own last words.
const MAX_INIT_MESSAGE: usize = 8 << 10;

/// A run and its container.
pub(super) struct ColdRun {
    shared: Arc<Shared>,
    job: Job,
    image: Arc<Image>,
    container: Container,
    output: Option<BoxStream<'static, Result<LogOutput, Error>>>,
    exit: Option<BoxFuture<'static, Result<i64, Failure>>>,
    exit_code: Option<i64>,
    eof_deadline: Option<tokio::time::Instant>,
    /// What standard error began with, as long as it can be the init process' message alone.
    init_message: Option<Vec<u8>>,
    /// Feeds standard input; ends with the run.
    stdin: Option<AbortOnDropHandle<()>>,
}

impl ColdRun {
    pub(super) fn new(shared: Arc<Shared>, job: Job, image: Arc<Image>) -> Self {
        Self {
            container: Container::new(shared.clone(), job.id.as_str()),
            shared,
            job,
            image,
            output: None,
            exit: None,
            exit_code: None,
            eof_deadline: None,
            init_message: Some(Vec::new()),
            stdin: None,
        }
    }

    fn observe(&mut self, output: LogOutput) -> Option<Event> {
        let (stream, chunk) = match output {
            LogOutput::StdOut { message } => (Stream::Stdout, message),
            LogOutput::StdErr { message } => (Stream::Stderr, message),
            // Without a terminal there is no third stream: this is half a frame that a breaking
            // connection left behind. The exit, which cannot be known then either, decides.
            LogOutput::StdIn { .. } | LogOutput::Console { .. } => return None,
        };
        if let Some(message) = &mut self.init_message {
            if stream == Stream::Stderr && message.len() + chunk.len() <= MAX_INIT_MESSAGE {
                message.extend_from_slice(&chunk);
            } else {
                self.init_message = None;
            }
        }
        Some(Event::Output(stream, chunk))
    }

    /// Creates the container and starts the function. Returns how long each took.
    pub(super) async fn start(&mut self) -> Result<(Duration, Duration), Failure> {
        let begun = Instant::now();
        let body = self.body();
        let shared = self.shared.clone();
        let _starting = shared.turns.start();
        let turn = shared.turns.create();
        let created = self.container.create(body).await;
        drop(turn);
        let created_at = Instant::now();
        let started = async {
            created?;
            crate::stage!("created", self.job.id);
            crate::failpoint!("container.created");
            self.container.start(self.job.stdin.is_some()).await
        };
        let attached = started.await.map_err(|error| {
            if error.is_not_found() {
                // The image, or what was made of it, is gone, whatever was known of it.
                self.shared.images.forget();
            }
            failure(error, &self.job)
        })?;
        crate::stage!("begun", self.job.id);
        self.output = Some(attached.output);
        self.exit = Some(self.container.exit_code());
        self.stdin = self
            .job
            .stdin
            .take()
            .map(|stdin| AbortOnDropHandle::new(tokio::spawn(feed(attached.input, stdin))));
        Ok((created_at - begun, created_at.elapsed()))
    }

    fn body(&self) -> ContainerCreateBody {
        let options = &self.shared.options;
        let owner = self.shared.owner.labels();
        let marks = Marks {
            instance: &options.instance,
            owner: &owner,
            deadline: Container::create_deadline(&self.shared, self.job.limits.timeout),
        };
        spec::create_body(&self.job, &self.image, &options.confinement, marks)
    }

    /// As [`Run::next`](crate::backend::Run::next).
    pub(super) async fn next(&mut self) -> Result<Event, Failure> {
        loop {
            match (&mut self.output, self.exit_code) {
                (Some(output), Some(_)) => {
                    let deadline = *self
                        .eof_deadline
                        .get_or_insert_with(|| tokio::time::Instant::now() + EOF_PATIENCE);
                    match tokio::time::timeout_at(deadline, output.next()).await {
                        Ok(Some(Ok(output))) => {
                            if let Some(event) = self.observe(output) {
                                return Ok(event);
                            }
                        }
                        Ok(None) => self.output = None,
                        Ok(Some(Err(_))) => return Err(engine_lost()),
                        Err(_) => {
                            let message = "the function ended and its output stayed open";
                            return Err(Failure::Transient(JobError::new(
                                code::ENGINE_ERROR,
                                message,
                            )));
                        }
                    }
                }
                (Some(output), None) => {
                    let exit = self.exit.as_mut().ok_or_else(engine_lost)?;
                    tokio::select! {
                        biased;
                        item = output.next() => match item {
                            Some(Ok(output)) => {
                                if let Some(event) = self.observe(output) {
                                    return Ok(event);
                                }
                            }
                            Some(Err(_)) => return Err(engine_lost()),
                            None => self.output = None,
                        },
                        code = exit => self.exit_code = Some(code?),
                    }
                }
                (None, None) => {
                    // Not started, or a program that closed its output and goes on.
                    let exit = self.exit.as_mut().ok_or_else(engine_lost)?;
                    self.exit_code = Some(exit.await?);
                }
                (None, Some(code)) => {
                    crate::stage!("end heard", self.job.id);
                    let explained = self.container.explain(code, self.init_message.as_deref());
                    return explained.await.map(Event::Exited);
                }
            }
        }
    }

    pub(super) fn has_exited(&self) -> bool {
        self.exit_code.is_some()
    }

    pub(super) fn signal(&self, signal: Signal) -> BoxFuture<'static, Result<(), Failure>> {
        self.container.signal(signal)
    }

    pub(super) async fn cleanup(&mut self) -> Result<(), CleanupError> {
        // The attached stream first: an engine that cannot write to it holds on to the container.
        self.output = None;
        self.exit = None;
        self.stdin = None;
        self.container.remove().await
    }
}

/// Writes standard input and closes it. A function that does not read to the end, or ends, breaks
/// the pipe: its own affair.
async fn feed(mut input: Pin<Box<dyn AsyncWrite + Send>>, stdin: Bytes) {
    if let Err(error) = input.write_all(&stdin).await {
        tracing::debug!(%error, "standard input was not read to its end");
    }
    if let Err(error) = input.shutdown().await {
        tracing::debug!(%error, "standard input was closed already");
    }
}
