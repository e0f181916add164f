#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;
use crate::capture::{Capture, Captured, Stream};
use crate::job::{JobError, ObjectRef, Objects, Outcome, StartKind, Timings, Usage, code};
use crate::protocol::outcome;
use proptest::prelude::*;
use serde_json::json;

fn at(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_000 + millis)
}

fn running() -> Record {
    Record {
        image: Some("python".to_owned()),
        attempt: 2,
        worker: Some("w".to_owned()),
        queued_at: Some(at(1)),
        pulling_at: Some(at(2)),
        running_at: Some(at(3)),
        retry_at: Some(at(4)),
        cancel_requested_at: Some(at(5)),
        pull: Some(PullProgress { layers: 4, layers_done: 1, bytes: 100, bytes_done: 7 }),
        sequence: Some(9),
        claim: Some("c".to_owned()),
        ..Record::new("job-1".parse().unwrap(), State::Running, at(6))
    }
}

fn cancelled() -> Outcome {
    Outcome {
        id: "job-1".parse().unwrap(),
        error: Some(JobError::new(code::JOB_CANCELLED, "the job was cancelled")),
        finished_at: at(1),
        ..Outcome::bare(Status::Cancelled, at(0))
    }
}

fn value(json: &[u8]) -> Value {
    serde_json::from_slice(json).unwrap()
}

#[test]
fn all_that_is_known_is_on_the_wire() {
    let record = running();
    assert_eq!(
        value(&record.encode()),
        json!({
            "id": "job-1", "state": "running", "image": "python", "attempt": 2, "worker": "w",
            "queued_at": "2023-11-14T22:13:20.001000Z", "pulling_at": "2023-11-14T22:13:20.002000Z",
            "running_at": "2023-11-14T22:13:20.003000Z", "updated_at": "2023-11-14T22:13:20.006000Z",
            "retry_at": "2023-11-14T22:13:20.004000Z",
            "cancel_requested_at": "2023-11-14T22:13:20.005000Z",
            "pull": {"layers": 4, "layers_done": 1, "bytes": 100, "bytes_done": 7},
            "sequence": 9, "claim": "c",
        })
    );
    assert_eq!(Record::decode(&record.encode()).unwrap(), record);
    assert_eq!((record.status(), record.outcome_json()), (None, None));
}

#[test]
fn nothing_that_is_not_known_is_on_the_wire() {
    let record = Record::new("job-1".parse().unwrap(), State::Queued, at(0));
    let wanted =
        json!({"id": "job-1", "state": "queued", "updated_at": "2023-11-14T22:13:20.000000Z"});
    assert_eq!(value(&record.encode()), wanted);
    assert_eq!(Record::decode(&record.encode()).unwrap(), record);
}

#[test]
fn a_later_versions_fields_are_no_error() {
    let mut json = value(&running().encode());
    json["colour"] = "blue".into();
    json["image"] = Value::Null;
    let record = Record::decode(json.to_string().as_bytes()).unwrap();
    assert_eq!(record, Record { image: None, ..running() });
}

#[test]
fn what_is_no_record_is_an_error() {
    let mut bad = vec![String::new(), "{}".to_owned(), "[]".to_owned(), "\u{0}".to_owned()];
    for (field, wrong) in [
        ("id", json!("a b")),
        ("state", json!("lost")),
        ("updated_at", json!("now")),
        ("queued_at", json!(1)),
        ("attempt", json!(-1)),
        ("pull", json!({"layers": 1})),
    ] {
        let mut json = value(&running().encode());
        json[field] = wrong;
        bad.push(json.to_string());
    }
    for bad in bad {
        assert!(Record::decode(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn an_ended_record_is_its_outcome_and_a_little_more() {
    let outcome = outcome::json(&cancelled(), 1 << 20).unwrap();
    let record = Record::ended(&outcome, Some(7), at(2)).unwrap();
    let mut wanted = value(&outcome);
    wanted["state"] = "ended".into();
    wanted["updated_at"] = "2023-11-14T22:13:20.002000Z".into();
    wanted["sequence"] = 7.into();
    assert_eq!(value(&record.encode()), wanted);
    assert_eq!((record.state, record.status()), (State::Ended, Some(Status::Cancelled)));
    assert_eq!((record.attempt, record.worker.as_deref()), (1, Some("w")));
    assert_eq!((record.image.as_deref(), record.queued_at), (None, Some(at(0))));
}

#[test]
fn what_has_no_status_is_no_outcome() {
    let json = json!({"id": "job-1", "attempt": 1, "worker": "w"}).to_string();
    assert!(Record::ended(json.as_bytes(), None, at(0)).is_err());
    assert!(Record::ended(b"[]", None, at(0)).is_err());
}

#[test]
fn an_ended_records_own_fields_are_not_its_outcomes() {
    let outcome = outcome::json(&cancelled(), 1 << 20).unwrap();
    let record = Record {
        claim: Some("c".to_owned()),
        cancel_requested_at: Some(at(1)),
        pulling_at: Some(at(1)),
        running_at: Some(at(1)),
        ..Record::ended(&outcome, None, at(2)).unwrap()
    };
    let back = Record::decode(&record.encode()).unwrap();
    assert_eq!(back, record);
    assert_eq!(value(&back.outcome_json().unwrap()), value(&outcome));
}

/// A whole number of microseconds, as far as the wire goes.
fn some_time() -> impl Strategy<Value = SystemTime> {
    (0_u64..4_000_000_000_000_000).prop_map(|us| SystemTime::UNIX_EPOCH + Duration::from_micros(us))
}

fn some_duration() -> impl Strategy<Value = Option<Duration>> {
    proptest::option::of((0_u64..1 << 50).prop_map(Duration::from_nanos))
}

prop_compose! {
    fn some_end()(
        stdout in proptest::collection::vec(any::<u8>(), 0..300),
        stderr in "\\PC{0,100}|[\\x00-\\x7f]{0,100}",
        limit in 0_usize..300,
        error in proptest::option::of("\\PC{0,40}"),
        object in proptest::option::of((any::<u64>(), "\\PC{0,20}")),
    ) -> (Captured, Option<JobError>, Objects) {
        let mut capture = Capture::new(limit);
        capture.push(Stream::Stdout, &stdout);
        capture.push(Stream::Stderr, stderr.as_bytes());
        let object = object.map(|(size, name)| {
            ObjectRef { bucket: "b".to_owned(), name, size, digest: "SHA-256=x".to_owned(), truncated: false }
        });
        let error = error.map(|message| JobError::new(code::ENGINE_ERROR, message));
        (capture.finish(), error, Objects { stdout: object.clone(), stderr: object })
    }
}

prop_compose! {
    fn some_outcome()(
        (output, error, objects) in some_end(),
        image in proptest::option::of("\\PC{0,40}"),
        status in 0..Status::ALL.len(),
        exit_code in proptest::option::of(any::<i64>()),
        oom_killed in any::<Option<bool>>(),
        attempt in 1_u32..,
        worker in "\\PC{0,20}",
        times in (some_time(), proptest::option::of(some_time()), some_time()),
        durations in proptest::array::uniform7(some_duration()),
        memory_peak_bytes in any::<Option<u64>>(),
        live_logs_dropped in any::<u64>(),
    ) -> Outcome {
        let [queue, pull, create, start, run, total, cpu] = durations;
        Outcome {
            id: "job-1".parse().unwrap(),
            image,
            status: Status::ALL[status],
            exit_code,
            error,
            output,
            objects,
            live_logs_dropped,
            oom_killed,
            attempt,
            worker,
            start: oom_killed.map(|_| StartKind::Cold),
            queued_at: times.0,
            started_at: times.1,
            finished_at: times.2,
            timings: Timings { queue, pull, create, start, run, total },
            usage: Usage { cpu, memory_peak_bytes },
            trace: None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_outcome_comes_back_as_it_was(
        outcome in some_outcome(),
        sequence in any::<Option<u64>>(),
        now in some_time(),
    ) {
        let json = outcome::json(&outcome, 1 << 20).unwrap();
        let record = Record::ended(&json, sequence, now).unwrap();
        let encoded = record.encode();
        prop_assert!(encoded.len() <= json.len() + ENDED_OVERHEAD);
        let back = Record::decode(&encoded).unwrap();
        prop_assert_eq!(&back, &record);
        prop_assert_eq!((back.sequence, back.status()), (sequence, Some(outcome.status)));
        let returned = back.outcome_json().unwrap();
        prop_assert_eq!(value(&returned), value(&json));
        prop_assert_eq!(returned.len(), json.len());
    }
}
