//! `logs`: what a job prints, or printed.

use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::Args;
use futures::StreamExt;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::answer::{self, Answer};
use super::client::Link;
use super::follow::{Follower, Shown};
use super::options::ConnectOptions;
use super::result::state_name;
use super::{exit, print, records};
use crate::job::JobId;
use crate::protocol::record::Record;

/// How many messages of live output may wait while nobody reads what is printed.
const CAPACITY: usize = 1024;
/// How often the record is looked at beside what is told of the job.
const LOOK: Duration = Duration::from_secs(3);

/// The arguments of `logs`.
#[derive(Args, Debug)]
pub struct Logs {
    /// The job's id.
    id: JobId,
    /// Print what comes until the job has ended. What comes while it runs is what it publishes then:
    /// nothing unless its request has `live_logs`, or the daemon LIVE_LOGS.
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    connect: ConnectOptions,
}

impl Logs {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        let link = Link::open(&self.connect, CAPACITY).await?;
        let bucket = link.records("logs").await?;
        let id = &self.id;
        if !self.follow {
            let record = records::find(&link, "logs", id).await?;
            let answer = answer::ended(&record).ok_or_else(|| {
                anyhow!("{id} is {}; -f prints what comes from now on", state_name(record.state))
            })?;
            return self.end(&link, &answer, &mut Follower::nothing()).await;
        }
        let mut follower = Follower::joining(&link, id).await?;
        let mut events = link.client.subscribe(link.subjects.events(id)).await?;
        // What is told after this is heard; what was before, the record knows.
        link.round_trip().await?;
        let record = records::read(&link, &bucket, id.as_str()).await?;
        if let Some(answer) = record.as_ref().and_then(answer::ended) {
            return self.end(&link, &answer, &mut follower).await;
        }
        if record.is_none() {
            print::note(format!("there is no record of {id} yet; waiting for it to begin"));
        }
        let mut looks = interval_at(Instant::now() + LOOK, LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                event = events.next() => {
                    let Some(event) = event else { bail!("the connection to NATS is closed") };
                    let record = Record::decode(&event.payload).ok();
                    if let Some(answer) = record.as_ref().and_then(answer::ended) {
                        return self.end(&link, &answer, &mut follower).await;
                    }
                }
                shown = follower.next() => match shown? {
                    Shown::Bytes(stream, bytes) => print::write(stream, bytes).await?,
                    Shown::Note(text, bytes) => {
                        print::note(text);
                        if let Some((stream, bytes)) = bytes {
                            print::write(stream, bytes).await?;
                        }
                    }
                    Shown::Nothing => {}
                },
                _ = looks.tick() => {
                    if link.news.away() {
                        continue;
                    }
                    let record = records::look(&link, id).await.ok().flatten();
                    if let Some(answer) = record.as_ref().and_then(answer::ended) {
                        return self.end(&link, &answer, &mut follower).await;
                    }
                }
            }
        }
    }

    async fn end(
        &self,
        link: &Link,
        answer: &Answer,
        follower: &mut Follower,
    ) -> anyhow::Result<u8> {
        follower.finish(link, answer).await?;
        if let Some(complaint) = answer.complaint() {
            print::note(complaint);
        }
        Ok(exit::OK)
    }
}
