#![allow(clippy::unwrap_used)]

use std::cell::Cell;

use opentelemetry::Key;

use super::*;
use crate::job::{JobError, code};
use crate::trace::TraceContext;

const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn at(millis_after: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000) + millis(millis_after)
}

/// Received at 0, begun at 10, and known at 100.
fn outcome(status: Status) -> Outcome {
    Outcome {
        image: Some("busybox".to_owned()),
        finished_at: at(100),
        timings: Timings {
            queue: Some(millis(10)),
            total: Some(millis(100)),
            ..Timings::default()
        },
        ..Outcome::bare(status, at(0))
    }
}

pub(in crate::spans) fn ran(status: Status, start: StartKind) -> Outcome {
    let mut outcome = outcome(status);
    (outcome.start, outcome.started_at) = (Some(start), Some(at(60)));
    outcome.timings.pull = Some(millis(20));
    outcome.timings.create =
        Some(if start == StartKind::Cold { millis(10) } else { Duration::ZERO });
    outcome.timings.start = Some(millis(5));
    outcome.timings.run = Some(millis(35));
    outcome
}

fn made(outcome: &Outcome, caller: Option<u64>) -> Vec<SpanData> {
    let own = TraceContext::begin(TRACE, 1, true);
    let job = JobSpan { own, caller: caller.map(SpanId::from), run: 2 };
    let scope = InstrumentationScope::builder("test").build();
    let ids = Cell::new(2);
    let new_id = || {
        ids.set(ids.get() + 1);
        SpanId::from(ids.get())
    };
    spans(&job, outcome, "functions.execute", Some(millis(7)), &scope, new_id)
}

/// Each span's name, and when it begins and ends.
fn times(spans: &[SpanData]) -> Vec<(&str, u64, u64)> {
    let after =
        |time: SystemTime| u64::try_from(time.duration_since(at(0)).unwrap().as_millis()).unwrap();
    spans.iter().map(|s| (s.name.as_ref(), after(s.start_time), after(s.end_time))).collect()
}

fn value(span: &SpanData, name: &'static str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == Key::new(name));
    found.map(|attribute| attribute.value.to_string())
}

#[test]
fn every_stage_is_a_span_below_the_attempt() {
    let spans = made(&ran(Status::Succeeded, StartKind::Cold), Some(9));
    let wanted = [
        ("process functions.execute", 0, 107),
        ("queue", 0, 10),
        ("pull", 25, 45),
        ("create", 45, 55),
        ("start", 55, 60),
        ("run", 60, 95),
        ("publish", 100, 107),
    ];
    assert_eq!(times(&spans), wanted);
    let (whole, stages) = spans.split_first().unwrap();
    assert_eq!((whole.parent_span_id, whole.parent_span_is_remote), (SpanId::from(9), true));
    assert_eq!(whole.span_kind, SpanKind::Consumer);
    assert!(stages.iter().all(|stage| stage.parent_span_id == SpanId::from(1)));
    assert!(spans.iter().all(|span| span.span_context.trace_id() == TraceId::from(TRACE)));
    let ids: Vec<_> = spans.iter().map(|span| span.span_context.span_id()).collect();
    assert_eq!(ids, [1, 3, 4, 5, 6, 2, 7].map(SpanId::from), "the function knows its run's id");
    assert!(spans.iter().all(|span| span.status == trace::Status::Unset));
}

#[test]
fn a_container_that_waited_was_not_created() {
    let spans = made(&ran(Status::Succeeded, StartKind::Warm), None);
    let names: Vec<_> = spans.iter().skip(1).map(|span| span.name.as_ref()).collect();
    assert_eq!(names, ["queue", "pull", "start", "run", "publish"]);
    assert_eq!(spans.first().unwrap().parent_span_id, SpanId::INVALID);
}

#[test]
fn a_later_attempt_begins_when_its_turn_has_come() {
    let again = Outcome { attempt: 2, ..outcome(Status::Error) };
    let wanted = [("process functions.execute", 10, 107), ("publish", 100, 107)];
    assert_eq!(times(&made(&again, None)), wanted);
}

#[test]
fn a_clock_that_was_set_makes_no_nonsense() {
    for started in [at(0), at(3_600_000)] {
        let outcome =
            Outcome { started_at: Some(started), ..ran(Status::Succeeded, StartKind::Cold) };
        let spans = made(&outcome, None);
        let times = times(&spans);
        let stages = times.iter().skip(1);
        assert!(stages.clone().all(|(_, begun, ended)| begun <= ended && *ended <= 107));
        assert!(stages.clone().zip(stages.skip(1)).all(|(one, next)| one.2 <= next.1), "{times:?}");
    }
}

#[test]
fn failures_are_errors_and_cancellations_are_none() {
    for status in Status::ALL {
        let mut outcome = ran(status, StartKind::Cold);
        let is_bad = !matches!(status, Status::Succeeded | Status::Cancelled);
        let spans = made(&outcome, None);
        let errors = spans.iter().filter(|span| span.status != trace::Status::Unset);
        let errors: Vec<_> = errors.map(|span| span.name.as_ref()).collect();
        let wanted: &[&str] = if is_bad { &["process functions.execute", "run"] } else { &[] };
        assert_eq!(errors, wanted, "{status}");
        let whole = spans.first().unwrap();
        assert_eq!(value(whole, "error.type"), is_bad.then(|| status.to_string()));
        outcome.error = Some(JobError::new(code::BUSY, "no slot"));
        let spans = made(&outcome, None);
        let whole = spans.first().unwrap();
        assert_eq!(value(whole, "error.type").as_deref(), is_bad.then_some(code::BUSY));
        let wanted = if is_bad { trace::Status::error("no slot") } else { trace::Status::Unset };
        assert_eq!(whole.status, wanted);
    }
}

#[test]
fn what_is_told_of_an_attempt() {
    let outcome = Outcome { exit_code: Some(3), ..ran(Status::Failed, StartKind::Warm) };
    let spans = made(&outcome, None);
    let whole = spans.first().unwrap();
    for (name, wanted) in [
        ("messaging.system", "nats"),
        ("messaging.destination.name", "functions.execute"),
        ("messaging.operation.type", "process"),
        ("worker_spawner.job.id", "a-1"),
        ("worker_spawner.job.status", "failed"),
        ("worker_spawner.job.attempt", "1"),
        ("worker_spawner.worker", "w"),
        ("worker_spawner.job.start", "warm"),
        ("container.image.name", "busybox"),
        ("process.exit.code", "3"),
        ("error.type", "failed"),
    ] {
        assert_eq!(value(whole, name).as_deref(), Some(wanted), "{name}");
    }
    assert_eq!(whole.status, trace::Status::error("the function ended with exit code 3"));
}
