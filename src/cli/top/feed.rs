//! Where the messages come from.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::{HeaderMap, Subject, Subscriber};
use futures::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;

use super::model::Queue;
use crate::cli::client::Link;
use crate::cli::{queue, records};
use crate::protocol::headers::{JOB_DURATION_MS, JOB_ID, JOB_STATUS};
use crate::protocol::record::Record;
use crate::service::NAME;

/// How many records are read at the beginning at most, and how many at once.
const MAX_RECORDS: u64 = 5_000;
const AT_ONCE: usize = 16;
/// How long the reading of them may take.
const READING: Duration = Duration::from_secs(10);

/// The subscriptions.
pub(super) struct Feed {
    /// States of jobs.
    pub(super) events: Subscriber,
    /// Ends of jobs.
    pub(super) results: Subscriber,
    /// Answers of workers.
    pub(super) answers: Subscriber,
    inbox: Subject,
    link: Arc<Link>,
}

impl Feed {
    /// Subscribes to all of it.
    ///
    /// # Errors
    /// The connection is closed.
    pub(super) async fn open(link: Arc<Link>) -> anyhow::Result<Self> {
        let client = &link.client;
        let prefix = link.subjects.prefix();
        let gone = "the connection to NATS is closed";
        let events = client.subscribe(format!("{prefix}.events.*")).await.context(gone)?;
        let results = client.subscribe(link.subjects.results.clone()).await.context(gone)?;
        let inbox: Subject = client.new_inbox().into();
        let answers = client.subscribe(inbox.clone()).await.context(gone)?;
        Ok(Self { events, results, answers, inbox, link })
    }

    /// Asks all workers how they are.
    pub(super) async fn ask(&self) {
        let subject = format!("$SRV.STATS.{NAME}");
        let client = &self.link.client;
        // Without a connection nobody answers, which is seen.
        let _ = client.publish_with_reply(subject, self.inbox.clone(), "".into()).await;
    }
}

/// What a result's headers say: the job, its status, its duration.
pub(super) fn of_result(headers: &HeaderMap) -> (Option<&str>, &str, Option<u64>) {
    let text = |name: &str| headers.get(name).map(|value| value.as_str());
    let duration = text(JOB_DURATION_MS).and_then(|ms| ms.parse().ok());
    (text(JOB_ID), text(JOB_STATUS).unwrap_or_default(), duration)
}

/// Looks at the queue again and again, beside everything else: a server that does not answer is
/// not to stop the picture.
pub(super) fn queue(link: Arc<Link>, interval: Duration) -> mpsc::Receiver<Option<Queue>> {
    let (tell, looks) = mpsc::channel(1);
    tokio::spawn(async move {
        while tell.send(depth(&link).await).await.is_ok() {
            tokio::time::sleep(interval).await;
        }
    });
    looks
}

/// What the stream of requests holds; nothing where there is none, or no answer.
async fn depth(link: &Link) -> Option<Queue> {
    let queue = queue::look(link).await.ok()?;
    Some(Queue { waiting: queue.waiting, taken: queue.taken })
}

/// Reads the records there are, as long as they are not too many: of a job that began before,
/// nothing else may be heard for long.
pub(super) fn records(link: Arc<Link>) -> mpsc::Receiver<Record> {
    let (tell, records) = mpsc::channel(64);
    tokio::spawn(async move {
        // Without them the picture is complete a little later.
        let _ = tokio::time::timeout(READING, read(&link, &tell)).await;
    });
    records
}

async fn read(link: &Link, tell: &mpsc::Sender<Record>) -> anyhow::Result<()> {
    let bucket = &link.names.jobs;
    let mut stream = link.jetstream.get_stream(format!("KV_{bucket}")).await?;
    if stream.info().await?.state.messages > MAX_RECORDS {
        return Ok(());
    }
    let bucket = link.jetstream.get_key_value(bucket).await?;
    let keys = bucket.keys().await?;
    let mut records = keys
        .map(|key| async { records::read(link, &bucket, &key?).await })
        .buffer_unordered(AT_ONCE);
    while let Some(record) = records.try_next().await? {
        if let Some(record) = record {
            tell.send(record).await?;
        }
    }
    Ok(())
}
