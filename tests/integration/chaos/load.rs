//! Jobs without end, each known by an id, and what their publisher learns of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::HeaderMap;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::chronicle::Chronicle;
use super::ledger::{CancelReply, EXIT_CODE, Job, Kind, LOUD};
use super::random::Random;
use crate::support::streams::Streams;

/// Between two jobs.
const PACE: (u64, u64) = (50, 400);
/// No further jobs while so many wait: what is tested is not how long a queue can be.
const BACKLOG: u64 = 100;
/// Before a request without an answer is sent again.
const AGAIN: (u64, u64) = (200, 1_000);

/// What the generator needs to know.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) streams: Streams,
    pub(crate) image: String,
    pub(crate) chronicle: Chronicle,
    pub(crate) jobs: Jobs,
    /// No further jobs.
    pub(crate) enough: CancellationToken,
    /// Not even those that were not accepted yet are sent again.
    pub(crate) over: CancellationToken,
}

/// All jobs so far.
#[derive(Clone, Default)]
pub(crate) struct Jobs(Arc<Mutex<BTreeMap<String, Job>>>);

impl Jobs {
    pub(crate) fn all(&self) -> BTreeMap<String, Job> {
        self.0.lock().unwrap().clone()
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Job)) {
        change(self.0.lock().unwrap().get_mut(id).unwrap());
    }
}

/// Of twenty jobs, so many are of each kind.
const MIX: [(Kind, usize); 9] = [
    (Kind::Echo, 6),
    (Kind::Sleep, 4),
    (Kind::Fail, 2),
    (Kind::FailTwice, 1),
    (Kind::Loud, 2),
    (Kind::Bad, 1),
    (Kind::CancelledBefore, 1),
    (Kind::Cancelled, 2),
    (Kind::Perishable, 1),
];

impl Load {
    /// Publishes until it is enough, and returns when each job was accepted or given up.
    pub(crate) async fn run(self, mut random: Random) {
        let mut under_way = JoinSet::new();
        let waiting = self.watch_backlog();
        for n in 0.. {
            let pause = random.between(PACE.0, PACE.1);
            let kind = draw(&mut random);
            let own = random.fork();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.enough.cancelled() => break,
            }
            let mut room = waiting.clone();
            tokio::select! {
                _ = room.wait_for(|waiting| *waiting < BACKLOG) => {}
                () = self.enough.cancelled() => break,
            }
            let id = format!("{}-{n}", format!("{kind:?}").to_lowercase());
            under_way.spawn(self.clone().one(id, kind, own));
        }
        while let Some(ended) = under_way.join_next().await {
            ended.unwrap();
        }
    }

    /// How many requests wait; as many as may while nobody can tell.
    fn watch_backlog(&self) -> tokio::sync::watch::Receiver<u64> {
        let (sender, receiver) = tokio::sync::watch::channel(0);
        let (streams, enough) = (self.streams.clone(), self.enough.clone());
        tokio::spawn(async move {
            while !enough.is_cancelled() {
                sender.send_replace(streams.backlog().await.unwrap_or(BACKLOG));
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
        receiver
    }

    async fn one(self, id: String, kind: Kind, mut random: Random) {
        let cancel = if kind == Kind::CancelledBefore {
            let reply = self.cancel(&id, &mut random).await;
            // Nothing is known of a job that nobody agreed to cancel: it stays unpublished.
            let Some(reply) = reply else { return };
            Some(reply)
        } else {
            None
        };
        let job = Job { kind, accepted: false, sent: 0, cancel };
        self.jobs.0.lock().unwrap().insert(id.clone(), job);
        self.publish(&id, kind, &mut random).await;
        if kind == Kind::Cancelled {
            tokio::time::sleep(random.between(0, 4_000)).await;
            let reply = self.cancel(&id, &mut random).await;
            self.jobs.change(&id, |job| job.cancel = reply);
        }
    }

    async fn publish(&self, id: &str, kind: Kind, random: &mut Random) {
        let (subject, request) = request(id, kind, &self.image, random);
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id);
        if kind == Kind::Perishable {
            headers.insert("Job-TTL", "3s");
        }
        while !self.over.is_cancelled() {
            self.jobs.change(id, |job| job.sent += 1);
            let body = request.to_string().into();
            match self.streams.publish(subject, headers.clone(), body).await {
                Ok(stored) => {
                    self.chronicle.note(format!("{id} was accepted: {stored:?}"));
                    self.jobs.change(id, |job| job.accepted = true);
                    return;
                }
                Err(trouble) => {
                    self.chronicle.note(format!("{id} was not accepted: {trouble}"));
                    tokio::time::sleep(random.between(AGAIN.0, AGAIN.1)).await;
                }
            }
        }
    }

    /// Asks until there is an answer.
    async fn cancel(&self, id: &str, random: &mut Random) -> Option<CancelReply> {
        while !self.over.is_cancelled() {
            let answer = self.streams.cancel(id).await;
            self.chronicle.note(format!("cancelling {id}: {answer:?}"));
            if let Some(reply) = answer.ok().as_ref().and_then(understand) {
                return Some(reply);
            }
            tokio::time::sleep(random.between(AGAIN.0, AGAIN.1)).await;
        }
        None
    }
}

fn understand(answer: &Value) -> Option<CancelReply> {
    match answer["result"].as_str()? {
        "stopping" => Some(CancelReply::Stopping),
        "will_not_start" => Some(CancelReply::WillNotStart),
        "already_ended" => Some(CancelReply::AlreadyEnded(answer["status"].as_str()?.to_string())),
        _ => None,
    }
}

fn draw(random: &mut Random) -> Kind {
    let mut at = random.below(MIX.iter().map(|(_, weight)| weight).sum());
    for (kind, weight) in MIX {
        if at < weight {
            return kind;
        }
        at -= weight;
    }
    unreachable!("the weights were added up")
}

/// Where a job of this kind is published, and as what.
fn request(id: &str, kind: Kind, image: &str, random: &mut Random) -> (&'static str, Value) {
    let shell = |script: String| json!(["sh", "-c", script]);
    let seconds = random.between(0, 3_000).as_secs_f32();
    let parameter = match kind {
        Kind::Echo | Kind::Perishable | Kind::Bad => json!(["echo", id]),
        Kind::Sleep => shell(format!("sleep {seconds:.2}; echo {id}")),
        Kind::Fail | Kind::FailTwice => shell(format!("echo {id}; exit {EXIT_CODE}")),
        Kind::Loud => shell(format!("echo {id}; head -c {LOUD} /dev/zero | tr '\\0' x")),
        // Longer than any canceller waits, and not for ever should nobody cancel it.
        Kind::Cancelled | Kind::CancelledBefore => shell(format!("sleep 45; echo {id}")),
    };
    let mut request = json!({"id": id, "image_reference": image, "parameter": parameter});
    match kind {
        Kind::Bad => request["timeout_ms"] = json!(-1),
        Kind::FailTwice => request["retry"] = json!({"max_attempts": 2, "on": ["failed"]}),
        _ => {}
    }
    let subject = match random.below(10) {
        0 => "functions.execute.high",
        1 => "functions.execute.low",
        2 => {
            request["priority"] = json!("low");
            "functions.execute"
        }
        _ => "functions.execute",
    };
    (subject, request)
}
