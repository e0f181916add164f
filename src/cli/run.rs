//! `run`: one job, from its request to its end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{anyhow, bail};
use async_nats::Subscriber;
use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::answer::{Answer, ended};
use super::client::{ANSWER, Link};
use super::follow::Follower;
use super::hand_in::{self, Mode, Reply};
use super::interrupt::Interrupt;
use super::options::ConnectOptions;
use super::print::{self, Closed};
use super::progress::{Progress, Quiet};
use super::request::RequestOptions;
use super::{exit, input, records};
use crate::job::JobId;
use crate::protocol::record::Record;

/// How many messages of live output may wait while nobody reads what is printed.
const CAPACITY: usize = 1024;
/// How often the job's record is looked at beside what is told of it: what is told can be missed.
const LOOK: Duration = Duration::from_secs(3);

/// The arguments of `run`.
#[derive(Args, Debug)]
pub struct Run {
    #[command(flatten)]
    request: RequestOptions,
    /// Feed standard input to the command.
    #[arg(short, long)]
    interactive: bool,
    /// Print the job's id once it is accepted, and do not wait for its end.
    #[arg(short, long, conflicts_with = "json")]
    detach: bool,
    /// Publish output while the command runs, for `logs -f`; only with --detach, else it is.
    #[arg(long, requires = "detach")]
    live: bool,
    /// Print the outcome as one JSON document, and nothing else.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    quiet: Quiet,
    #[command(flatten)]
    connect: ConnectOptions,
}

/// What came of a job that was waited for.
enum End {
    Known(Box<Answer>),
    /// The user did not want to wait.
    Left(u8),
}

impl Run {
    pub(super) async fn run(self) -> u8 {
        match self.all().await {
            Ok(code) => code,
            Err(error) if error.is::<Closed>() => exit::BROKEN_PIPE,
            Err(error) => {
                print::note(format!("{error:#}"));
                exit::TROUBLE
            }
        }
    }

    async fn all(&self) -> anyhow::Result<u8> {
        let id = self.request.job_id();
        let mut request = self.request.json(&id)?;
        let link = Arc::new(Link::open(&self.connect, CAPACITY).await?);
        let interrupt = Interrupt::watch(link.clone(), id.clone())?;
        let input = if self.interactive {
            let attached = input::attach(&link, &id, &mut request, input::standard()?);
            tokio::select! {
                attached = attached => attached?,
                code = interrupt.first() => return Ok(code),
            }
        } else {
            None
        };
        if self.detach {
            return self.leave(&link, &id, request).await;
        }
        let (interest, inbox) = (!self.json, link.client.new_inbox());
        request.insert("live_logs".to_owned(), interest.into());
        if link.plain_inboxes && !request.contains_key("reply_to") {
            request.insert("reply_to".to_owned(), inbox.as_str().into());
        }
        let payload = serde_json::to_vec(&request)?.into();
        let mut progress = Progress::new(self.quiet.is_set(), &id, &self.request.image);
        let mut follower = Follower::new(&link, &id, interest).await?;
        let waited =
            self.wait(&link, &id, inbox, payload, &interrupt, &mut follower, &mut progress);
        let waited = match waited.await {
            Ok(End::Known(answer)) => {
                progress.make_room();
                let rest = self.conclude(&link, &answer, &mut follower);
                tokio::select! {
                    biased;
                    () = interrupt.leave() => Ok(interrupt.code().unwrap_or(exit::TROUBLE)),
                    code = rest => code.map(|()| exit::of(&answer, interrupt.code())),
                }
            }
            Ok(End::Left(code)) => {
                progress.warn(format!(
                    "job {id} is left to itself; `status {id}` says what becomes of it"
                ));
                return Ok(code);
            }
            Err(error) => Err(error),
        };
        drop(progress);
        match &waited {
            // What prints for nobody is of use to nobody.
            Err(error) if error.is::<Closed>() => interrupt.cancel().await,
            _ => {}
        }
        if let Some(name) = input {
            input::forget(&link, &name).await;
        }
        link.close().await;
        waited
    }

    /// Hands the request in, and prints the id once it is accepted.
    async fn leave(
        &self,
        link: &Link,
        id: &JobId,
        mut request: serde_json::Map<String, Value>,
    ) -> anyhow::Result<u8> {
        if self.live {
            request.insert("live_logs".to_owned(), true.into());
        }
        let subject = link.subjects.execute_at(self.request.priority());
        let mode = hand_in::mode(link, &subject).await;
        let payload = serde_json::to_vec(&request)?.into();
        let inbox = link.client.new_inbox();
        let mut sent = hand_in::send(link, &subject, inbox, hand_in::headers(), payload).await?;
        if let Some(answer) = sent.accepted(link, mode).await?
            && let Some(complaint) = answer.complaint()
        {
            bail!("{complaint}");
        }
        print::stdout(&format!("{id}\n"))?;
        link.close().await;
        Ok(exit::OK)
    }

    /// Hands the request in, and prints what is told of the job until it has ended.
    #[expect(clippy::too_many_arguments, reason = "each is one part of what is waited with")]
    async fn wait(
        &self,
        link: &Link,
        id: &JobId,
        inbox: String,
        payload: Bytes,
        interrupt: &Interrupt,
        follower: &mut Follower,
        progress: &mut Progress,
    ) -> anyhow::Result<End> {
        let mut events = link.client.subscribe(link.subjects.events(id)).await?;
        // Plain NATS keeps nothing for who comes late.
        link.round_trip().await?;
        let subject = link.subjects.execute_at(self.request.priority());
        let sent = hand_in::send(link, &subject, inbox, hand_in::headers(), payload).await?;
        interrupt.published();
        let mut replies = sent.replies;
        let mut looks = interval_at(Instant::now() + LOOK, LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let doubt = Instant::now() + ANSWER;
        let (mut recorded, mut heard, mut away) = (false, false, false);
        loop {
            tokio::select! {
                biased;
                text = interrupt.news() => progress.warn(text),
                () = interrupt.leave() => {
                    return Ok(End::Left(interrupt.code().unwrap_or(exit::TROUBLE)));
                }
                message = next(&mut replies) => match Reply::of(&message?) {
                    Reply::Outcome(answer) => return Ok(End::Known(Box::new(answer))),
                    Reply::Refused(why) => bail!("{why}"),
                    Reply::Stored => {
                        (recorded, heard) = (true, true);
                        progress.queued();
                    }
                    Reply::Unknown => {}
                },
                event = next(&mut events) => {
                    heard = true;
                    if let Ok(record) = Record::decode(&event?.payload) {
                        if let Some(answer) = ended(&record) {
                            return Ok(End::Known(Box::new(answer)));
                        }
                        progress.record(&record);
                    }
                }
                step = follower.next() => {
                    heard = true;
                    let shown = async {
                        follower_step(step?, progress).await
                    };
                    tokio::select! {
                        biased;
                        () = interrupt.leave() => {
                            return Ok(End::Left(interrupt.code().unwrap_or(exit::TROUBLE)));
                        }
                        shown = shown => shown?,
                    }
                }
                () = sleep_until(doubt), if !heard => {
                    heard = true;
                    if hand_in::mode(link, &subject).await == Mode::Stream {
                        progress.warn("NATS has not confirmed the request yet; Ctrl-C leaves");
                    }
                }
                _ = looks.tick() => {
                    for complaint in link.news.complaints() {
                        progress.warn(format!("the server said: {complaint}"));
                    }
                    if away != link.news.away() {
                        away = !away;
                        let what = if away { "is lost; trying on" } else { "is back" };
                        progress.warn(format!("the connection to NATS {what}"));
                    }
                    if recorded && !away {
                        match records::look(link, id).await {
                            Ok(record) => if let Some(answer) = record.as_ref().and_then(ended) {
                                return Ok(End::Known(Box::new(answer)));
                            },
                            // Some may not read records; they hear of the end all the same.
                            Err(_) => { link.news.complaints(); }
                        }
                    }
                }
            }
        }
    }

    /// Prints what is not printed yet, and how it ended.
    async fn conclude(
        &self,
        link: &Link,
        answer: &Answer,
        follower: &mut Follower,
    ) -> anyhow::Result<()> {
        if self.json {
            return print::stdout(&format!("{}\n", Value::Object(answer.json.clone())));
        }
        follower.finish(link, answer).await?;
        // That the function failed by itself, it says itself.
        if let (Some(complaint), false) = (answer.complaint(), answer.error.is_none()) {
            print::note(complaint);
        }
        Ok(())
    }
}

async fn follower_step(step: super::follow::Shown, progress: &mut Progress) -> anyhow::Result<()> {
    use super::follow::Shown;
    match step {
        Shown::Bytes(stream, bytes) => {
            progress.make_room();
            print::write(stream, bytes).await
        }
        Shown::Note(text, bytes) => {
            progress.warn(text);
            match bytes {
                Some((stream, bytes)) => {
                    progress.make_room();
                    print::write(stream, bytes).await
                }
                None => Ok(()),
            }
        }
        Shown::Nothing => Ok(()),
    }
}

async fn next(subscriber: &mut Subscriber) -> anyhow::Result<async_nats::Message> {
    subscriber.next().await.ok_or_else(|| anyhow!("the connection to NATS is closed"))
}
