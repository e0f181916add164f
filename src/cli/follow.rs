//! A job's live output, and at its end what of it did not come.

use std::time::Duration;

use anyhow::anyhow;
use async_nats::Subscriber;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::task::unconstrained;

use super::answer::{Answer, Output, name_of};
use super::client::Link;
use super::live::{Piece, Printed, Step};
use super::print;
use super::records;
use crate::capture::Stream;
use crate::job::JobId;

/// How long live output may pause, after the job's end, before it counts as over.
const PAUSE: Duration = Duration::from_secs(3);

/// What there is to show.
#[derive(Debug)]
pub(super) enum Shown {
    Bytes(Stream, Bytes),
    /// Something to be said, and then something of the output.
    Note(String, Option<(Stream, Bytes)>),
    Nothing,
}

/// Follows the live output of one job.
pub(super) struct Follower {
    /// Nothing where nobody asked for it.
    pieces: Option<Subscriber>,
    printed: Printed,
}

impl Follower {
    /// Subscribes to the live output of a job that is handed in later, if it is of `interest`.
    ///
    /// # Errors
    /// The connection is gone.
    pub(super) async fn new(link: &Link, id: &JobId, interest: bool) -> anyhow::Result<Self> {
        let pieces = if interest { Some(subscribe(link, id).await?) } else { None };
        Ok(Self { pieces, printed: Printed::default() })
    }

    /// Subscribes to the live output of a job that may be running.
    ///
    /// # Errors
    /// The connection is gone.
    pub(super) async fn joining(link: &Link, id: &JobId) -> anyhow::Result<Self> {
        Ok(Self { pieces: Some(subscribe(link, id).await?), printed: Printed::joining() })
    }

    /// Of a job that has ended: there is nothing to follow.
    pub(super) fn nothing() -> Self {
        Self { pieces: None, printed: Printed::default() }
    }

    /// What comes next. Never where there is nothing to follow. Cancel-safe.
    ///
    /// # Errors
    /// The connection is closed.
    pub(super) async fn next(&mut self) -> anyhow::Result<Shown> {
        let Some(pieces) = &mut self.pieces else { return std::future::pending().await };
        let message = pieces.next().await;
        let message = message.ok_or_else(|| anyhow!("the connection to NATS is closed"))?;
        Ok(Piece::of(&message).map_or(Shown::Nothing, |piece| self.take(&piece)))
    }

    fn take(&mut self, piece: &Piece) -> Shown {
        let stream = piece.stream;
        match self.printed.take(piece) {
            Step::Print(bytes) => Shown::Bytes(stream, bytes),
            Step::Anew(bytes) => {
                let text = format!(
                    "what was printed so far is an earlier attempt's; attempt {} begins",
                    piece.attempt
                );
                Shown::Note(text, Some((stream, bytes)))
            }
            Step::Joined(missed, bytes) => {
                let name = name_of(stream);
                let text =
                    format!("{missed} bytes of {name} came before; `result` has them in the end");
                Shown::Note(text, Some((stream, bytes)))
            }
            Step::Gap => {
                let name = name_of(stream);
                Shown::Note(format!("live {name} is incomplete; its rest comes at the end"), None)
            }
            Step::Nothing => Shown::Nothing,
        }
    }

    /// Prints the rest of the output of a job that has ended: what came live, then what only the
    /// outcome has.
    ///
    /// # Errors
    /// It cannot be printed, or the object store is in trouble.
    pub(super) async fn finish(&mut self, link: &Link, answer: &Answer) -> anyhow::Result<()> {
        // What is here already keeps the order between the two streams.
        while let Some(Some(message)) =
            self.pieces.as_mut().map(|pieces| unconstrained(pieces.next()).now_or_never())
        {
            let Some(message) = message else { break };
            if let Some(piece) = Piece::of(&message) {
                show(self.take(&piece)).await?;
            }
        }
        if self.printed.of_another(answer.attempt) {
            let attempt = answer.attempt;
            print::note(format!(
                "what was printed so far is not of attempt {attempt}, which counts"
            ));
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            let output = answer.output(stream);
            if output.truncated {
                self.wait_for_the_end(stream, answer).await?;
            }
            if self.printed.complete(stream, answer.attempt) {
                continue;
            }
            self.rest(link, answer, stream, &output).await?;
        }
        Ok(())
    }

    /// Takes live output as long as it comes: the outcome does not have all of it.
    async fn wait_for_the_end(&mut self, stream: Stream, answer: &Answer) -> anyhow::Result<()> {
        while self.pieces.is_some()
            && !self.printed.broken(stream)
            && !self.printed.complete(stream, answer.attempt)
        {
            match tokio::time::timeout(PAUSE, self.next()).await {
                Ok(shown) => show(shown?).await?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Prints what the outcome has beyond what came live.
    async fn rest(
        &self,
        link: &Link,
        answer: &Answer,
        stream: Stream,
        output: &Output,
    ) -> anyhow::Result<()> {
        let up_to = self.printed.up_to(stream, answer.attempt);
        let lost = match &output.object {
            Some((bucket, name)) => {
                records::copy_object(link, bucket, name, up_to, stream).await?;
                output.object_truncated
            }
            None => {
                let up_to = usize::try_from(up_to).unwrap_or(usize::MAX);
                if let Some(rest) = output.bytes.get(up_to..) {
                    print::write(stream, Bytes::copy_from_slice(rest)).await?;
                }
                output.truncated
            }
        };
        if lost {
            print::note(format!("the end of {} was not kept", name_of(stream)));
        }
        Ok(())
    }
}

async fn show(shown: Shown) -> anyhow::Result<()> {
    match shown {
        Shown::Bytes(stream, bytes) => print::write(stream, bytes).await,
        Shown::Note(text, bytes) => {
            print::note(text);
            match bytes {
                Some((stream, bytes)) => print::write(stream, bytes).await,
                None => Ok(()),
            }
        }
        Shown::Nothing => Ok(()),
    }
}

async fn subscribe(link: &Link, id: &JobId) -> anyhow::Result<Subscriber> {
    let subject = format!("{}.logs.{id}.*", link.subjects.prefix());
    Ok(link.client.subscribe(subject).await?)
}
