//! `check --run`: one small job on the way that all jobs go, from its request to its outcome.
//!
//! Nothing of this is done unless it is asked for: unlike the rest of `check` it hands in a request.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use async_nats::client::Request;
use async_nats::{HeaderMap, RequestErrorKind};
use bytes::Bytes;
use clap::Args;
use serde_json::{Value, json};

use super::nats::PATIENCE;
use crate::cli::answer::Answer;
use crate::cli::cancel::{self, Word};
use crate::cli::client::Link;
use crate::cli::context::NatsContext;
use crate::cli::hand_in::{self, Mode};
use crate::cli::options::Target;
use crate::cli::parse::duration;
use crate::cli::records;
use crate::config::Config;
use crate::finding::{Finding, Tell};
use crate::job::{JobId, Status, code};
use crate::protocol::record::State;
use crate::protocol::time::rfc3339;
use crate::shutdown::Signals;

const CHECK: &str = "run";
/// How things stand where a signal came early, and where a second one came.
const NOT_HANDED_IN: &str = "no job was handed in";
const LEFT: &str = "is left to its time limit";
/// How many messages of one kind may wait to be looked at: there are few.
const CAPACITY: usize = 64;

/// What is to be tried, if anything.
#[derive(Args, Debug)]
pub(super) struct Trial {
    /// Have a daemon run this image once, too, and say how long that took. It is pulled where it is
    /// missing, and must be one that IMAGE_ALLOWLIST allows.
    #[arg(long = "run", value_name = "IMAGE")]
    image: Option<String>,
    /// How long that may take, from the request to the outcome.
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = duration)]
    #[arg(requires = "image")]
    run_timeout: Duration,
    /// The command for --run and its arguments, after `--`; the image's own where there are none.
    #[arg(last = true, requires = "image")]
    command: Vec<String>,
}

/// What came of it.
struct Tried {
    finding: Finding,
    /// The exit code that a signal stands for, where one ended it.
    signalled: Option<u8>,
}

impl From<Finding> for Tried {
    fn from(finding: Finding) -> Self {
        Self { finding, signalled: None }
    }
}

impl Tried {
    /// Ended by the signal that `code` stands for; `what` says how things stand.
    fn interrupted(code: u8, what: &str) -> Self {
        let remedy = "try it again; --run-timeout says how long it may take";
        let finding = Finding::fail(CHECK, format!("interrupted: {what}"), remedy);
        Self { finding, signalled: Some(code) }
    }
}

impl Trial {
    /// Whether it is asked for.
    pub(super) fn is_wanted(&self) -> bool {
        self.image.is_some()
    }

    /// Makes it, if it is asked for. `durable` is whether the daemons take requests from a stream.
    /// Returns the exit code that a signal stands for, where one ended it.
    pub(super) async fn examine(
        &self,
        config: &Config,
        durable: bool,
        tell: Tell<'_>,
    ) -> Option<u8> {
        let image = self.image.as_ref()?;
        let tried = async {
            // From here on Ctrl-C takes the job along.
            let mut signals = Signals::install().context("signals cannot be handled")?;
            let link = tokio::select! {
                link = connect(config) => link?,
                code = signals.next() => return Ok(Tried::interrupted(code, NOT_HANDED_IN)),
            };
            let max_timeout = config.policy.max_timeout;
            let tried = self.on(&link, durable, image, max_timeout, &mut signals).await;
            link.close().await;
            tried
        };
        let Tried { finding, signalled } = tried.await.unwrap_or_else(|error: anyhow::Error| {
            let remedy = "mend what is named there; a user needs the rights of a caller for this, which the README lists";
            Finding::fail(CHECK, format!("{error:#}"), remedy).into()
        });
        tell(finding);
        signalled
    }

    async fn on(
        &self,
        link: &Link,
        durable: bool,
        image: &str,
        max_timeout: Duration,
        signals: &mut Signals,
    ) -> anyhow::Result<Tried> {
        let id = JobId::default();
        let is_deserted = tokio::select! {
            is_deserted = is_deserted(link, &id) => is_deserted,
            code = signals.next() => return Ok(Tried::interrupted(code, NOT_HANDED_IN)),
        };
        if is_deserted {
            return Ok(Finding::fail(
                CHECK,
                format!("no worker answers on {}", link.subjects.status),
                "start a daemon: worker-spawner, with these settings; of others SUBJECT_PREFIX must be the same",
            )
            .into());
        }
        let inbox = link.client.new_inbox();
        let request = serde_json::to_vec(&self.request(&id, image, &inbox, max_timeout))?.into();
        let begun = Instant::now();
        tokio::select! {
            // Handed in before a signal is looked at: then there is something to cancel.
            biased;
            answer = outcome(link, durable, &id, inbox, request) => {
                Ok(judge(&answer?, begun.elapsed()).into())
            }
            complaint = link.news.refused(&link.subjects.execute) => {
                bail!("the request is refused: {complaint}")
            }
            code = signals.next() => {
                let word = tokio::select! {
                    word = cancel::ask(link, &id) => {
                        word.map_or_else(|error| format!("{error:#}"), |word| word.text)
                    }
                    _ = signals.next() => format!("{id} {LEFT}"),
                };
                Ok(Tried::interrupted(code, &word))
            }
            () = tokio::time::sleep(self.run_timeout) => tokio::select! {
                finding = self.give_up(link, &id) => Ok(finding.into()),
                code = signals.next() => Ok(Tried::interrupted(code, &format!("{id} {LEFT}"))),
            },
        }
    }

    /// Has a job cancelled that took too long, and says what it did meanwhile.
    async fn give_up(&self, link: &Link, id: &JobId) -> Finding {
        let record = records::look(link, id).await;
        let word = cancel::ask(link, id).await;
        let place = match (&record, &word) {
            (Ok(Some(record)), _) => Place::Recorded(record.state),
            (_, Ok(Word { waits: true, .. })) => Place::Queue,
            (_, Ok(Word { followed: true, .. })) => Place::Worker,
            (Ok(None), _) => Place::Queue,
            _ => Place::Unknown,
        };
        late(place, self.run_timeout, word.err().as_ref())
    }

    fn request(&self, id: &JobId, image: &str, inbox: &str, max_timeout: Duration) -> Value {
        // Whatever becomes of this program, the function ends.
        let timeout = self.run_timeout.clamp(Duration::from_millis(1), max_timeout);
        let mut request = json!({
            "id": id.as_str(),
            "image_reference": image,
            "reply_to": inbox,
            "timeout_ms": u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        });
        if let Some(end) = SystemTime::now().checked_add(self.run_timeout) {
            request["expires_at"] = json!(rfc3339(end));
        }
        if !self.command.is_empty() {
            request["parameter"] = json!(self.command);
        }
        request
    }
}

/// Hands the request in, and waits for what becomes of it.
async fn outcome(
    link: &Link,
    durable: bool,
    id: &JobId,
    inbox: String,
    request: Bytes,
) -> anyhow::Result<Answer> {
    let mode = if durable { Mode::Stream } else { Mode::Plain };
    let subject = &link.subjects.execute;
    let mut sent = hand_in::send(link, subject, inbox, HeaderMap::new(), request).await?;
    match sent.accepted(link, mode).await? {
        Some(answer) => Ok(answer),
        None => sent.outcome(link, durable.then_some(id), true).await,
    }
}

/// A client's connection with the daemon's settings.
async fn connect(config: &Config) -> anyhow::Result<Link> {
    let target = Target {
        nats: config.nats.clone(),
        subjects: config.subjects.clone(),
        context: NatsContext::default(),
        timeout: PATIENCE,
        said_by: "NATS_URL".to_owned(),
    };
    Link::to(target, CAPACITY).await
}

/// Whether it is certain that no daemon is there: all of them are asked for a job that there is not.
async fn is_deserted(link: &Link, id: &JobId) -> bool {
    let request = Request::new().payload(id.to_string().into()).timeout(Some(PATIENCE));
    let deserted = tokio::select! {
        answer = link.client.send_request(link.subjects.status.clone(), request) => {
            answer.is_err_and(|error| error.kind() == RequestErrorKind::NoResponders)
        }
        // Who may not ask does not know.
        _ = link.news.refused(&link.subjects.status) => false,
    };
    link.news.complaints();
    deserted
}

/// What an outcome says of the way to it.
fn judge(answer: &Answer, took: Duration) -> Finding {
    let text = |name: &str| answer.json.get(name).and_then(Value::as_str);
    let worker = text("worker").unwrap_or("a worker");
    let start = text("start").map(|start| format!(" {start}")).unwrap_or_default();
    let took =
        format!("started{start} on {worker}, outcome after {:.0} ms", took.as_secs_f64() * 1000.0);
    let complaint = answer.complaint().unwrap_or_default();
    match answer.status {
        Some(Status::Succeeded) => Finding::ok(CHECK, took),
        Some(Status::Failed | Status::TimedOut | Status::OutOfMemory) => Finding::warn(
            CHECK,
            format!("{took}: {complaint}"),
            "jobs come through, and this one failed by itself: name a command that succeeds, after --",
        ),
        _ => {
            let code = answer.error.as_ref().map_or("", |error| error.code.as_ref());
            Finding::fail(CHECK, complaint, remedy(code))
        }
    }
}

/// What to do about a job that was not run.
fn remedy(code: &str) -> &'static str {
    match code {
        code::IMAGE_NOT_ALLOWED => {
            "name an image that IMAGE_ALLOWLIST allows, or add this one to it"
        }
        code::IMAGE_NOT_FOUND => {
            "check name and tag, and the credentials where the image is private; with PULL_POLICY=never pull it by hand"
        }
        code::IMAGE_UNAUTHORIZED => {
            "log in for the daemon's user: docker login, with DOCKER_CONFIG set as the daemon has it"
        }
        code::IMAGE_PULL_FAILED | code::IMAGE_PULL_TIMEOUT => {
            "look at the registry and the way to it; or pull the image by hand first"
        }
        code::IMAGE_NO_COMMAND | code::COMMAND_NOT_FOUND | code::COMMAND_NOT_EXECUTABLE => {
            "name a command that the image has, after --"
        }
        code::ENGINE_UNAVAILABLE | code::ENGINE_TIMEOUT | code::ENGINE_ERROR => {
            "look at that worker's engine: worker-spawner check, where it runs"
        }
        _ => "look at the worker's log; the README lists what codes mean",
    }
}

/// Where a job is that there is no outcome of.
#[derive(Clone, Copy)]
enum Place {
    /// Its record says so.
    Recorded(State),
    /// Before all workers, or in one that has no slot for it.
    Queue,
    /// In a worker, which keeps no records.
    Worker,
    Unknown,
}

/// There was no outcome in time, and the job could perhaps not be cancelled either.
fn late(place: Place, waited: Duration, uncancelled: Option<&anyhow::Error>) -> Finding {
    let (what, remedy) = match place {
        Place::Unknown => (
            "it is not known where it is",
            "look at the workers' logs, and at worker-spawner top; this user cannot read the jobs' records",
        ),
        Place::Queue => (
            "no worker took it up",
            "start a daemon where none runs; worker-spawner top shows whether all slots are in use",
        ),
        Place::Recorded(State::Queued) => (
            "it waits for another attempt",
            "look at the workers' logs for why the first one failed",
        ),
        Place::Recorded(State::Pulling) => (
            "its image is still being pulled",
            "allow more with --run-timeout, or pull it by hand first",
        ),
        Place::Recorded(State::Running) | Place::Worker => (
            "it still ran",
            "name a command that ends soon, after --; or allow more with --run-timeout",
        ),
        Place::Recorded(State::Ending | State::Ended) => {
            ("its end was not told", "look at the worker's log, and at the server's")
        }
    };
    let waited = humantime::format_duration(waited);
    let uncancelled = uncancelled.map(|error| format!("; {error:#}")).unwrap_or_default();
    Finding::fail(CHECK, format!("no outcome within {waited}: {what}{uncancelled}"), remedy)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::finding::Status as Found;

    #[test]
    fn an_outcome_tells_of_the_way_to_it() {
        for (outcome, status, detail) in [
            (
                json!({"status": "succeeded", "start": "warm", "worker": "w-1"}),
                Found::Ok,
                "started warm on w-1, outcome after 12 ms",
            ),
            (
                json!({"status": "failed", "exit_code": 3, "start": "cold", "worker": "w-1"}),
                Found::Warn,
                "started cold on w-1, outcome after 12 ms: failed with exit code 3",
            ),
            (
                json!({"status": "rejected", "error": {"code": "image.not_allowed", "message": "no"}}),
                Found::Fail,
                "rejected: image.not_allowed: no",
            ),
            (json!({"status": "of a later version"}), Found::Fail, "of a later version"),
        ] {
            let found = judge(&Answer::of(outcome).unwrap(), Duration::from_millis(12));
            assert_eq!((found.status, found.detail.as_str()), (status, detail));
            assert_eq!(found.remedy.is_none(), status == Found::Ok, "{found:?}");
        }
    }
}
