//! From an outcome to its spans. Pure.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value, trace};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::JobSpan;
use crate::job::{Outcome, StartKind, Status, Timings};

/// The spans of an attempt: one of the whole, and below it one for each stage that it got to.
///
/// Nothing in them is the request's own but its id, the image and the subject; errors are told as the
/// outcome tells them.
pub(super) fn spans(
    job: &JobSpan,
    outcome: &Outcome,
    subject: &str,
    published: Option<Duration>,
    scope: &InstrumentationScope,
    new_id: impl Fn() -> SpanId,
) -> Vec<SpanData> {
    let trace_id = TraceId::from_hex(job.own.trace_id()).unwrap_or(TraceId::INVALID);
    let root = SpanId::from_hex(job.own.parent_id()).unwrap_or(SpanId::INVALID);
    let flags = TraceFlags::new(job.own.flags());
    let state: TraceState =
        job.own.state().and_then(|state| state.parse().ok()).unwrap_or_default();
    let span = |name: String, id, (start_time, end_time)| SpanData {
        span_context: SpanContext::new(trace_id, id, flags, false, state.clone()),
        parent_span_id: root,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time,
        end_time,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: trace::Status::Unset,
        instrumentation_scope: scope.clone(),
    };
    let (received, begun, ended) = moments(outcome);
    // A later attempt waited for nothing but its turn to be tried again.
    let first = if outcome.attempt == 1 { received } else { begun };
    let last = ended + published.unwrap_or_default();
    let whole = SpanData {
        parent_span_id: job.caller.unwrap_or(SpanId::INVALID),
        parent_span_is_remote: job.caller.is_some(),
        span_kind: SpanKind::Consumer,
        attributes: attributes(outcome, subject),
        status: status(outcome),
        ..span(format!("process {subject}"), root, (first, last))
    };
    let stages = stages(outcome, published).into_iter().map(|Stage { name, begun, ended }| {
        let is_run = name == RUN;
        let id = if is_run { SpanId::from(job.run) } else { new_id() };
        let status = if is_run { status(outcome) } else { trace::Status::Unset };
        SpanData { status, ..span(name.to_owned(), id, (begun, ended)) }
    });
    std::iter::once(whole).chain(stages).collect()
}

/// The stage in which the function runs.
const RUN: &str = "run";

/// A part of an attempt.
struct Stage {
    name: &'static str,
    begun: SystemTime,
    ended: SystemTime,
}

/// The stages that were reached, one after the other. What was measured by a clock that was set in
/// between is made to fit.
fn stages(outcome: &Outcome, published: Option<Duration>) -> Vec<Stage> {
    let Timings { pull, create, start, run, .. } = outcome.timings;
    // A container that waited was not created for the job.
    let create = create.filter(|_| outcome.start == Some(StartKind::Cold));
    let (received, begun, ended) = moments(outcome);
    let mut stages = Vec::new();
    if outcome.attempt == 1 {
        stages.push(Stage { name: "queue", begun: received, ended: begun });
    }
    let started = outcome.started_at.unwrap_or(ended);
    let before = |stages: [Option<Duration>; 3]| {
        let took: Duration = stages.into_iter().flatten().sum();
        started - took
    };
    let mut at = begun;
    for (name, begun, took) in [
        ("pull", before([pull, create, start]), pull),
        ("create", before([None, create, start]), create),
        ("start", before([None, None, start]), start),
        (RUN, started, run),
    ] {
        let Some(took) = took else { continue };
        let begun = begun.clamp(at, ended);
        at = (begun + took).min(ended);
        stages.push(Stage { name, begun, ended: at });
    }
    let publish = |took| Stage { name: "publish", begun: ended, ended: ended + took };
    stages.extend(published.map(publish));
    stages
}

/// When the request was received, when this attempt began, and when its outcome was known.
fn moments(outcome: &Outcome) -> (SystemTime, SystemTime, SystemTime) {
    let Timings { queue, total, .. } = outcome.timings;
    let ended = outcome.finished_at;
    let received = ended - total.unwrap_or_default();
    (received, (received + queue.unwrap_or_default()).min(ended), ended)
}

/// What is told of an attempt, by OpenTelemetry's conventions where there is one for it.
fn attributes(outcome: &Outcome, subject: &str) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("messaging.system", "nats"),
        KeyValue::new("messaging.operation.type", "process"),
        KeyValue::new("messaging.operation.name", "process"),
        KeyValue::new("messaging.destination.name", subject.to_owned()),
        KeyValue::new("worker_spawner.job.id", outcome.id.to_string()),
        KeyValue::new("worker_spawner.job.status", outcome.status.as_str()),
        KeyValue::new("worker_spawner.job.attempt", i64::from(outcome.attempt)),
        KeyValue::new("worker_spawner.worker", outcome.worker.clone()),
    ];
    let mut optional = |name, value: Option<Value>| {
        attributes.extend(value.map(|value| KeyValue::new(name, value)));
    };
    optional("container.image.name", outcome.image.clone().map(Value::from));
    optional("worker_spawner.job.start", outcome.start.map(|start| start.as_str().into()));
    optional("process.exit.code", outcome.exit_code.map(Value::from));
    let code = || match &outcome.error {
        Some(error) => error.code.clone().into(),
        None => outcome.status.as_str().into(),
    };
    optional("error.type", is_error(outcome.status).then(code));
    attributes
}

/// Whether this end is an error in a trace. That somebody did not want a job any more is none.
fn is_error(status: Status) -> bool {
    !matches!(status, Status::Succeeded | Status::Cancelled)
}

fn status(outcome: &Outcome) -> trace::Status {
    if !is_error(outcome.status) {
        return trace::Status::Unset;
    }
    let exit_code = outcome.exit_code.unwrap_or_default();
    trace::Status::error(match &outcome.error {
        Some(error) => error.message.clone(),
        None => format!("the function ended with exit code {exit_code}"),
    })
}

#[cfg(test)]
#[path = "build_tests.rs"]
pub(super) mod tests;
