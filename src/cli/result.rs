//! `result`: what a job printed.

use std::time::{Duration, SystemTime};

use anyhow::bail;
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use clap::{Args, ValueEnum};
use futures::StreamExt;

use super::answer::{self, Answer};
use super::client::{ANSWER, Link};
use super::options::ConnectOptions;
use super::print;
use super::{exit, records};
use crate::capture::Stream;
use crate::job::JobId;
use crate::protocol::headers::{JOB_ID, JOB_STDERR_OBJECT, JOB_STDOUT_OBJECT};
use crate::protocol::record::{Record, State};
use crate::protocol::time::parse_rfc3339;
use crate::source::jetstream::{Place, Stored};

/// How much earlier than the outcome its message can have been stored, clocks being what they are.
const CLOCKS: Duration = Duration::from_secs(600);

/// The arguments of `result`.
#[derive(Args, Debug)]
pub struct ResultOf {
    /// The job's id.
    id: JobId,
    /// Only this stream.
    #[arg(long, value_enum)]
    stream: Option<Which>,
    #[command(flatten)]
    connect: ConnectOptions,
}

/// One of the two streams.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Which {
    Stdout,
    Stderr,
}

impl ResultOf {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        let link = Link::open(&self.connect, 256).await?;
        let bucket = link.records("result").await?;
        let record = records::read(&link, &bucket, self.id.as_str()).await?;
        let answer = record.as_ref().and_then(answer::ended);
        match (&answer, record) {
            (None, Some(record)) => {
                bail!("{} has not ended: it is {}", self.id, state_name(record.state))
            }
            (Some(answer), _) if self.stream.is_some() || has_object(answer) => {
                self.streams(&link, answer).await?;
            }
            (answer, record) => match self.stored(&link, record.as_ref()).await? {
                Some(stored) => self.message(&link, stored).await?,
                // The record is kept for longer than the message, or the other way round.
                None => match answer {
                    Some(answer) => self.streams(&link, answer).await?,
                    None => bail!(
                        "there is no result of {}: it has not ended, or that is long ago",
                        self.id
                    ),
                },
            },
        }
        Ok(exit::OK)
    }

    /// Prints streams from the outcome, and from where it says that they are.
    async fn streams(&self, link: &Link, answer: &Answer) -> anyhow::Result<()> {
        let mut nothing = true;
        for stream in self.wanted() {
            let output = answer.output(stream);
            nothing &= output.bytes.is_empty() && output.object.is_none();
            let lost = match &output.object {
                Some((bucket, name)) => {
                    records::copy_object(link, bucket, name, 0, Stream::Stdout).await?;
                    output.object_truncated
                }
                None => {
                    print::write(Stream::Stdout, output.bytes.into()).await?;
                    output.truncated
                }
            };
            if lost {
                print::note(format!("the end of {} was not kept", super::answer::name_of(stream)));
            }
        }
        if let (true, Some(complaint)) = (nothing, answer.complaint()) {
            print::note(complaint);
        }
        Ok(())
    }

    fn wanted(&self) -> Vec<Stream> {
        match self.stream {
            None => vec![Stream::Stdout, Stream::Stderr],
            Some(Which::Stdout) => vec![Stream::Stdout],
            Some(Which::Stderr) => vec![Stream::Stderr],
        }
    }

    /// Prints the body of a result, or the objects it names.
    async fn message(&self, link: &Link, stored: Stored) -> anyhow::Result<()> {
        let named = |header: &str| {
            let value = stored.headers.get(header)?.as_str();
            value.split_once('/').map(|(bucket, name)| (bucket.to_owned(), name.to_owned()))
        };
        let objects = [named(JOB_STDOUT_OBJECT), named(JOB_STDERR_OBJECT)];
        if objects.iter().all(Option::is_none) {
            if self.stream.is_some() {
                bail!("the record of {} is gone, and its result has both streams in one", self.id);
            }
            return print::write(Stream::Stdout, stored.payload).await;
        }
        for (bucket, name) in objects.into_iter().flatten() {
            records::copy_object(link, &bucket, &name, 0, Stream::Stdout).await?;
        }
        Ok(())
    }

    /// The message about the job in the results' stream. It has no index by job: the search begins
    /// where the record says that the job ended, and reads headers alone.
    async fn stored(&self, link: &Link, record: Option<&Record>) -> anyhow::Result<Option<Stored>> {
        let name = &link.names.results;
        let stream = link.stream("result", name).await?;
        let trouble = |why: &dyn std::fmt::Display| {
            link.news.explain(format!("results cannot be searched: {why}"))
        };
        let from = record.and_then(finished_at).and_then(|at| at.checked_sub(CLOCKS));
        let deliver_policy = match from {
            Some(at) => DeliverPolicy::ByStartTime { start_time: at.into() },
            None => DeliverPolicy::All,
        };
        let config = pull::OrderedConfig {
            // One with a name may be made by those who may make only those of this stream.
            name: Some(format!("cli-{}", uuid::Uuid::now_v7().simple())),
            deliver_policy,
            filter_subject: link.subjects.results.clone(),
            headers_only: true,
            ..pull::OrderedConfig::default()
        };
        let consumer = stream.create_consumer(config).await.map_err(|e| trouble(&e))?;
        let mut left = consumer.cached_info().num_pending;
        if left == 0 {
            return Ok(None);
        }
        let mut messages = consumer.messages().await.map_err(|e| trouble(&e))?;
        while left > 0 {
            let message = match tokio::time::timeout(ANSWER, messages.next()).await {
                Ok(Some(message)) => message
                    .map_err(|e| link.news.explain(format!("results cannot be searched: {e}")))?,
                Ok(None) => break,
                Err(_) => return Err(trouble(&"JetStream takes too long")),
            };
            let info = message.info().map_err(|e| anyhow::anyhow!("{e}"))?;
            left = info.pending;
            if is_about(message.headers.as_ref(), &self.id) {
                let place = Place { seq: info.stream_sequence, next_by_subj: None };
                let stored = Stored::read(&link.jetstream, name, place).await;
                return stored
                    .map_err(|e| link.news.explain(format!("the result cannot be read: {e}")));
            }
        }
        Ok(None)
    }
}

fn is_about(headers: Option<&HeaderMap>, id: &JobId) -> bool {
    headers.and_then(|headers| headers.get(JOB_ID)).is_some_and(|job| job.as_str() == id.as_str())
}

fn has_object(answer: &Answer) -> bool {
    let has = |stream| answer.output(stream).object.is_some();
    has(Stream::Stdout) || has(Stream::Stderr)
}

fn finished_at(record: &Record) -> Option<SystemTime> {
    parse_rfc3339(record.outcome.as_ref()?.get("finished_at")?.as_str()?)
}

/// The name of a state on the wire.
pub(super) fn state_name(state: State) -> &'static str {
    match state {
        State::Queued => "queued",
        State::Pulling => "pulling",
        State::Running => "running",
        State::Ending => "ending",
        State::Ended => "ended",
    }
}
