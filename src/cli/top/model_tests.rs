#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::model::Model;
use crate::protocol::record::Record;

const TURN: Duration = Duration::from_secs(1);

pub(super) fn stats(id: &str, prefix: &str, jobs: u64) -> Vec<u8> {
    let endpoint = |name: &str| {
        json!({"name": name, "subject": name, "num_requests": 12, "num_errors": 1,
            "data": {"max_containers": 5, "jobs": jobs}})
    };
    let stats = json!({"type": "io.nats.micro.v1.stats_response", "name": "worker-spawner",
        "id": id, "version": "0.1.0", "started": "2030-01-01T00:00:00Z",
        "metadata": {"subject_prefix": prefix, "delivery": "jetstream"},
        "endpoints": [endpoint("run"), endpoint("cancel")]});
    stats.to_string().into_bytes()
}

pub(super) fn event(id: &str, state: &str, worker: Option<&str>, at: &str) -> Vec<u8> {
    let mut record = json!({"id": id, "state": state, "image": "busybox", "attempt": 1,
        "queued_at": "2030-01-01T00:00:00Z", "updated_at": at});
    if let Some(worker) = worker {
        record["worker"] = Value::from(worker);
    }
    if state == "running" {
        record["running_at"] = Value::from(at);
    }
    record.to_string().into_bytes()
}

pub(super) fn model() -> Model {
    Model::new("functions", TURN)
}

#[test]
fn workers_come_and_go() {
    let (mut model, now) = (model(), Instant::now());
    model.stats(&stats("a", "functions", 2), now);
    model.stats(&stats("b", "functions", 7), now);
    model.stats(&stats("c", "others", 1), now);
    model.stats(b"no answer", now);
    assert_eq!(model.workers().len(), 2);
    assert_eq!(model.slots(), (7, 10), "more jobs than slots are no more slots");
    model.stats(&stats("b", "functions", 0), now + TURN * 5);
    model.turn(now + TURN * 7);
    assert_eq!(model.workers().map(|worker| worker.id.as_str()).collect::<Vec<_>>(), ["b"]);
    assert_eq!(model.slots(), (0, 5));
}

#[test]
fn jobs_are_followed_until_they_end() {
    let (mut model, now) = (model(), Instant::now());
    model.event(&event("waits", "queued", None, "2030-01-01T00:00:00Z"), now);
    model.event(&event("late", "running", Some("a"), "2030-01-01T00:00:09Z"), now);
    model.event(&event("early", "running", Some("a"), "2030-01-01T00:00:01Z"), now);
    model.event(&event("pulls", "pulling", Some("a"), "2030-01-01T00:00:01Z"), now);
    let ids =
        |model: &Model| -> Vec<String> { model.jobs().iter().map(|job| job.id.clone()).collect() };
    assert_eq!(ids(&model), ["early", "late", "pulls", "waits"]);
    model.event(&event("early", "ended", Some("a"), "2030-01-01T00:00:10Z"), now);
    model.result(Some("late"), "failed", Some(7));
    assert_eq!(ids(&model), ["pulls", "waits"]);
    assert_eq!(model.ended.get("failed"), Some(&1));
    // A record that was read before that and comes later counts for nothing.
    let old = event("late", "running", Some("a"), "2030-01-01T00:00:09Z");
    model.record(Record::decode(&old).unwrap(), now);
    assert_eq!(ids(&model), ["pulls", "waits"]);
    // Of a worker that is never heard of again nothing is expected.
    model.turn(now + Duration::from_secs(61));
    assert_eq!(ids(&model), ["waits"]);
}

#[test]
fn rates_and_latencies_are_of_the_turns_that_are_over() {
    let (mut model, now) = (model(), Instant::now());
    assert_eq!((model.rate(60), model.latency(95, 60)), (0.0, None));
    for ms in 1..=100 {
        model.result(None, "succeeded", Some(ms));
    }
    model.result(None, "of a later version", None);
    assert_eq!(model.outcomes(10), Vec::<u64>::new());
    model.turn(now);
    model.turn(now);
    assert_eq!(model.outcomes(10), [101, 0]);
    assert_eq!(model.rate(10), 50.5);
    assert_eq!((model.latency(50, 10), model.latency(95, 10)), (Some(50), Some(95)));
    assert_eq!(model.latencies(95, 10), [95, 0]);
    assert_eq!(model.ended.get("other"), Some(&1));
    for _ in 0..1000 {
        model.turn(now);
    }
    assert_eq!(model.outcomes(1000).len(), 239, "memory is bounded");
}
