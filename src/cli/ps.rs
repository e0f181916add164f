//! `ps`: the jobs of which there is a record.

use std::time::SystemTime;

use clap::Args;
use futures::{StreamExt, TryStreamExt};
use serde_json::{Map, Value, json};

use super::client::Link;
use super::options::ConnectOptions;
use super::queue::{self, Queue};
use super::result::state_name;
use super::{exit, print, records};
use crate::protocol::record::{Record, State};
use crate::protocol::time::rfc3339;

/// How many records are read at once.
const AT_ONCE: usize = 32;

/// The arguments of `ps`.
#[derive(Args, Debug)]
pub struct Ps {
    /// Those that have ended, too.
    #[arg(short, long)]
    all: bool,
    /// Only those of this state or status, such as running, failed or timed_out. May be given again.
    #[arg(long, value_name = "NAME", value_parser = name)]
    status: Vec<String>,
    /// Print each job as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: ConnectOptions,
}

/// What a table shows of a job. Its output may be large, and many jobs are held at once.
#[derive(Debug, PartialEq)]
struct Row {
    id: String,
    image: Option<String>,
    state: &'static str,
    status: Option<String>,
    attempt: u32,
    worker: Option<String>,
    since: Option<SystemTime>,
    updated_at: SystemTime,
}

/// A state or a status by name.
fn name(text: &str) -> Result<String, String> {
    let states = [State::Queued, State::Pulling, State::Running, State::Ending, State::Ended]
        .map(state_name);
    let statuses = crate::job::Status::ALL.map(crate::job::Status::as_str);
    let mut known = states.into_iter().chain(statuses);
    if known.clone().any(|known| known == text) {
        return Ok(text.to_owned());
    }
    let last = known.next_back().unwrap_or_default();
    Err(format!("expected {} or {last}", known.collect::<Vec<_>>().join(", ")))
}

impl Ps {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        let link = Link::open(&self.connect, 4096).await?;
        let bucket = link.records("ps").await?;
        let asked = SystemTime::now();
        let keys = bucket.keys().await;
        let keys = keys.map_err(|e| link.news.explain(format!("records cannot be listed: {e}")))?;
        let rows = keys
            .map_err(|e| anyhow::anyhow!("records cannot be listed: {e}"))
            .map(|key| {
                let (link, bucket) = (&link, &bucket);
                async move { records::read(link, bucket, &key?).await }
            })
            .buffer_unordered(AT_ONCE)
            .try_filter_map(|record| std::future::ready(Ok(record)))
            .try_fold((Vec::new(), 0), |(mut rows, recorded), record| {
                rows.extend(self.row(&record));
                std::future::ready(Ok((
                    rows,
                    recorded + u64::from(was_in_the_queue(&record, asked)),
                )))
            });
        let (read, queue) = tokio::join!(rows, queue::look(&link));
        let (mut rows, recorded): (Vec<Row>, u64) = read?;
        rows.sort_by(|a, b| a.since.cmp(&b.since).then_with(|| a.id.cmp(&b.id)));
        let text = if self.json {
            rows.iter().map(|row| format!("{}\n", row.json())).collect()
        } else {
            let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
            print::table(&["ID", "IMAGE", "STATE", "AGE", "WORKER"], &cells)
        };
        print::stdout(&text)?;
        if let Some(rest) = self.rest(queue, recorded) {
            print::note(rest);
        }
        Ok(exit::OK)
    }

    /// What there is to say of requests without a record, where those that are queued were asked for.
    /// `recorded` is how many of those in the queue have one.
    fn rest(&self, queue: anyhow::Result<Queue>, recorded: u64) -> Option<String> {
        let queued = state_name(State::Queued);
        if !self.status.is_empty() && !self.status.iter().any(|name| name == queued) {
            return None;
        }
        match queue {
            Ok(queue) => match queue.held().saturating_sub(recorded) {
                0 => None,
                rest => Some(format!(
                    "and {rest} more wait in the queue, which holds {} in all ({})",
                    queue.held(),
                    queue.by_priority()
                )),
            },
            Err(error) => Some(format!("how many more wait in the queue is not known: {error:#}")),
        }
    }

    /// What is shown of a job, if it is.
    fn row(&self, record: &Record) -> Option<Row> {
        let status = record.status().map(|status| status.as_str().to_owned());
        let state = state_name(record.state);
        let wanted = if self.status.is_empty() {
            self.all || record.state != State::Ended
        } else {
            let named = |name: &String| name == state || Some(name) == status.as_ref();
            self.status.iter().any(named)
        };
        wanted.then(|| Row {
            id: record.id.to_string(),
            image: record.image.clone(),
            state,
            status: status.filter(|_| record.state == State::Ended),
            attempt: record.attempt,
            worker: record.worker.clone(),
            since: record.queued_at,
            updated_at: record.updated_at,
        })
    }
}

/// Whether the record is of a request that the stream still kept at that time: the queue is looked at
/// once, and records may take longer to be read.
fn was_in_the_queue(record: &Record, at: SystemTime) -> bool {
    record.sequence.is_some() && (record.state != State::Ended || record.updated_at >= at)
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        vec![
            self.id.clone(),
            or_none(&self.image),
            self.status.clone().unwrap_or_else(|| self.state.to_owned()),
            print::age(self.since.or(Some(self.updated_at))),
            or_none(&self.worker),
        ]
    }

    fn json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("id".to_owned(), json!(self.id));
        fields.insert("state".to_owned(), json!(self.state));
        fields.insert("updated_at".to_owned(), json!(rfc3339(self.updated_at)));
        let known = [
            ("image", self.image.as_ref().map(|image| json!(image))),
            ("status", self.status.as_ref().map(|status| json!(status))),
            ("attempt", (self.attempt > 0).then(|| json!(self.attempt))),
            ("worker", self.worker.as_ref().map(|worker| json!(worker))),
            ("queued_at", self.since.map(|at| json!(rfc3339(at)))),
        ];
        let known = known.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        fields.extend(known);
        Value::Object(fields)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        ps: Ps,
    }

    fn shown(line: &[&str], record: &str) -> Option<Row> {
        let line = Line::try_parse_from(std::iter::once(&"ps").chain(line)).unwrap();
        line.ps.row(&Record::decode(record.as_bytes()).unwrap())
    }

    #[test]
    fn jobs_are_chosen_by_state_and_status() {
        let running = r#"{"id": "a", "state": "running", "updated_at": "2030-01-01T00:00:00Z"}"#;
        let failed = r#"{"id": "b", "state": "ended", "updated_at": "2030-01-01T00:00:00Z",
            "status": "failed", "exit_code": 1}"#;
        for (line, wanted) in [
            (&[][..], (true, false)),
            (&["--all"], (true, true)),
            (&["--status", "running"], (true, false)),
            (&["--status", "failed"], (false, true)),
            (&["--status", "ended"], (false, true)),
            (&["--status", "succeeded", "--status", "running"], (true, false)),
        ] {
            let found = (shown(line, running).is_some(), shown(line, failed).is_some());
            assert_eq!(found, wanted, "{line:?}");
        }
        assert!(Line::try_parse_from(["ps", "--status", "broken"]).is_err());
        let row = shown(&["--all"], failed).unwrap();
        assert_eq!(row.cells()[..3], ["b", "-", "failed"]);
        assert_eq!(row.json()["status"], "failed");
    }
}
