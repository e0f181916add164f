//! Jobs as spans of a trace, exported to a collector over OTLP.
//!
//! On a job's way only ids are made. Its spans are made of what is known of it once its outcome is
//! published, and wait in a bounded queue for a task that exports them: a collector that is away, slow or
//! wrong costs spans, and nothing else.

mod build;
mod collector;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{SpanId, SpanKind, TraceId};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, Sampler, SamplingDecision, ShouldSample, SpanData, SpanExporter,
};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::collector::{Complaint, PATIENCE};
use crate::config::Traces;
use crate::job::{JobId, Outcome};
use crate::trace::TraceContext;

/// Attempts whose spans may wait; each has at most seven.
const QUEUE: usize = 1024;
/// Spans after which a batch is exported at once.
const BATCH: usize = 512;
/// How long the first span of a batch waits for others.
const DELAY: Duration = Duration::from_secs(1);
/// How long the rest may take at the end.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// Where spans are told of, on their way to the collector.
#[derive(Debug)]
pub struct Spans {
    sampler: Sampler,
    ids: RandomIdGenerator,
    scope: InstrumentationScope,
    queue: mpsc::Sender<Vec<SpanData>>,
    counts: Arc<Counts>,
    ended: CancellationToken,
    task: TaskTracker,
}

/// The ids of a job's spans, made before there is anything to tell of them.
#[derive(Clone, Debug)]
pub struct JobSpan {
    /// The trace, with the span of the whole attempt as the parent.
    own: TraceContext,
    /// The caller's span.
    caller: Option<SpanId>,
    /// The span of the function.
    run: u64,
}

impl JobSpan {
    /// The trace as the function is to know it: with its run as the parent.
    #[must_use]
    pub fn for_function(&self) -> TraceContext {
        self.own.with_parent(self.run)
    }
}

/// What became of spans.
#[derive(Debug, Default)]
struct Counts {
    exported: AtomicU64,
    dropped: AtomicU64,
}

impl Spans {
    /// Begins to export. Does not wait for the collector.
    ///
    /// # Errors
    /// No authority is known that could vouch for the collector, or the exporter does not take its address.
    pub fn start(traces: &Traces, worker: &str) -> anyhow::Result<Self> {
        let (mut exporter, complaint) = collector::exporter(traces)?;
        let resource = Resource::builder_empty()
            .with_service_name(traces.service_name.clone())
            .with_attributes([
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", worker.to_owned()),
            ]);
        exporter.set_resource(&resource.build());
        let (queue, waiting) = mpsc::channel(QUEUE);
        let (counts, ended, task) = (Arc::default(), CancellationToken::new(), TaskTracker::new());
        task.spawn(export(exporter, complaint, waiting, Arc::clone(&counts), ended.clone()));
        Ok(Self {
            sampler: Sampler::TraceIdRatioBased(traces.ratio),
            ids: RandomIdGenerator::default(),
            scope: InstrumentationScope::builder("worker-spawner")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
            queue,
            counts,
            ended,
            task,
        })
    }

    /// Makes an attempt at a job a part of its caller's trace, or of one of its own. Returns the trace
    /// that is passed on, and the attempt's ids where its spans are to be recorded.
    ///
    /// What the caller does not record is not recorded here. All attempts at one request share a trace,
    /// whichever workers make them.
    #[must_use]
    pub fn begin(
        &self,
        caller: Option<TraceContext>,
        job: &JobId,
        received_at: SystemTime,
    ) -> (TraceContext, Option<JobSpan>) {
        let new_id = || u64::from_be_bytes(self.ids.new_span_id().to_bytes());
        let (own, caller) = match caller {
            Some(caller) if !caller.is_sampled() => return (caller, None),
            Some(caller) => {
                (caller.with_parent(new_id()), SpanId::from_hex(caller.parent_id()).ok())
            }
            None => {
                let trace_id = trace_id(job, received_at);
                let own = TraceContext::begin(trace_id, new_id(), self.samples(trace_id));
                if !own.is_sampled() {
                    return (own, None);
                }
                (own, None)
            }
        };
        let span = JobSpan { own: own.clone(), caller, run: new_id() };
        (own, Some(span))
    }

    fn samples(&self, trace_id: u128) -> bool {
        let kind = SpanKind::Consumer;
        let sampled =
            self.sampler.should_sample(None, TraceId::from(trace_id), "", &kind, &[], &[]);
        sampled.decision == SamplingDecision::RecordAndSample
    }

    /// Hands over the spans of an attempt whose request came on `subject`, and whose outcome took
    /// `published` until it was confirmed, where it was published. Does not wait: where too many wait
    /// already they are dropped.
    pub fn tell(
        &self,
        span: &JobSpan,
        outcome: &Outcome,
        subject: &str,
        published: Option<Duration>,
    ) {
        let new_id = || self.ids.new_span_id();
        let spans = build::spans(span, outcome, subject, published, &self.scope, new_id);
        let count = spans.len();
        if self.queue.try_send(spans).is_err() {
            self.counts.dropped.fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    /// How many spans the collector took, and how many never got there.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (get(&self.counts.exported), get(&self.counts.dropped))
    }

    /// Exports what still waits, within a few seconds. Nothing is exported after it.
    pub async fn finish(&self) {
        self.ended.cancel();
        self.task.close();
        if tokio::time::timeout(LAST_PATIENCE, self.task.wait()).await.is_err() {
            tracing::warn!(
                "the spans of the last jobs are lost: the collector did not take them in time"
            );
        }
    }
}

/// The trace of a request that came without one: known to whichever worker gets it, and another one
/// where an id is used again.
fn trace_id(job: &JobId, received_at: SystemTime) -> u128 {
    let at = received_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let digest = Sha256::new().chain_update(job.as_str()).chain_update(at.to_be_bytes()).finalize();
    digest.iter().take(16).fold(0, |id, byte| id << 8 | u128::from(*byte))
}

/// Exports what comes, in batches, until all of it is exported that came before the end. That the
/// collector takes nothing is said when it begins, and when it is over.
async fn export(
    exporter: impl SpanExporter,
    complaint: Complaint,
    mut waiting: mpsc::Receiver<Vec<SpanData>>,
    counts: Arc<Counts>,
    ended: CancellationToken,
) {
    let mut is_failing = false;
    loop {
        let first = tokio::select! {
            first = waiting.recv() => first,
            () = ended.cancelled(), if !waiting.is_closed() => {
                waiting.close();
                continue;
            }
        };
        let Some(mut batch) = first else { return };
        let others = async {
            while batch.len() < BATCH
                && let Some(spans) = waiting.recv().await
            {
                batch.extend(spans);
            }
        };
        tokio::select! {
            biased;
            () = others => {}
            () = tokio::time::sleep(DELAY) => {}
            () = ended.cancelled() => {}
        }
        let size = batch.len() as u64;
        let exported = tokio::time::timeout(PATIENCE, exporter.export(batch)).await;
        let failed = !matches!(exported, Ok(Ok(())));
        let count = if failed { &counts.dropped } else { &counts.exported };
        count.fetch_add(size, Ordering::Relaxed);
        match (is_failing, failed) {
            (false, true) => {
                let why = complaint.last();
                tracing::warn!(%why, "the collector does not take spans; they are dropped until it does");
            }
            (true, false) => tracing::info!("the collector takes spans again"),
            _ => {}
        }
        is_failing = failed;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Mutex;

    use opentelemetry_sdk::error::OTelSdkResult;

    use super::*;
    use crate::job::{StartKind, Status};
    use crate::trace::{TRACEPARENT, TRACESTATE};

    const CALLER: &str = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";

    fn caller(flags: &str) -> Option<TraceContext> {
        let parent = format!("00-{CALLER}-{flags}");
        TraceContext::of(|name| match name {
            TRACEPARENT => Some(&parent),
            TRACESTATE => Some("a=b"),
            _ => None,
        })
    }

    fn spans(ratio: f64) -> Spans {
        let traces = Traces {
            endpoint: "http://127.0.0.1:1".to_owned(),
            headers: Vec::new(),
            service_name: "test".to_owned(),
            ratio,
        };
        Spans::start(&traces, "w").unwrap()
    }

    #[tokio::test]
    async fn the_caller_says_whether_its_trace_is_recorded() {
        for ratio in [0.0, 1.0] {
            let (spans, id) = (spans(ratio), JobId::new());
            let (own, span) = spans.begin(caller("01"), &id, UNIX_EPOCH);
            let span = span.unwrap();
            assert_eq!(own.trace_id(), &CALLER[..32]);
            assert_eq!((own.state(), own.is_sampled()), (Some("a=b"), true));
            assert_ne!(own.parent_id(), &CALLER[33..]);
            assert_eq!(span.caller, SpanId::from_hex(&CALLER[33..]).ok());
            let function = span.for_function();
            assert_eq!((function.trace_id(), function.state()), (own.trace_id(), Some("a=b")));
            assert_ne!(function.parent_id(), own.parent_id());

            let (own, span) = spans.begin(caller("00"), &id, UNIX_EPOCH);
            assert_eq!((Some(own), span.is_none()), (caller("00"), true), "as it came");
        }
    }

    #[tokio::test]
    async fn of_other_jobs_a_share_is_recorded() {
        let (none, half, all) = (spans(0.0), spans(0.5), spans(1.0));
        let sampled = |spans: &Spans| {
            let begin = |_| spans.begin(None, &JobId::new(), UNIX_EPOCH);
            let begun = (0..1000).map(begin);
            begun.filter(|(own, span)| own.is_sampled() && span.is_some()).count()
        };
        assert_eq!((sampled(&none), sampled(&all)), (0, 1000));
        assert!((400..600).contains(&sampled(&half)));
        // Whoever has the next attempt comes to the same.
        let id = JobId::new();
        let trace = |spans: &Spans, at| spans.begin(None, &id, at).0.trace_id().to_owned();
        assert_eq!(trace(&half, UNIX_EPOCH), trace(&all, UNIX_EPOCH));
        assert_ne!(trace(&all, UNIX_EPOCH), trace(&all, UNIX_EPOCH + Duration::from_nanos(1)));
    }

    /// Keeps what it is given.
    #[derive(Clone, Debug, Default)]
    struct Kept(Arc<Mutex<Vec<Vec<SpanData>>>>);

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().push(batch);
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_at_the_end_is_exported_at_once_and_what_is_too_much_never() {
        let (kept, id) = (Kept::default(), JobId::new());
        let (queue, waiting) = mpsc::channel(2);
        let spans = Spans { queue, ..spans(1.0) };
        let span = spans.begin(None, &id, UNIX_EPOCH).1.unwrap();
        let outcome = build::tests::ran(Status::Succeeded, StartKind::Cold);
        for _ in 0..3 {
            spans.tell(&span, &outcome, "functions.execute", None);
        }
        let each = spans.counts().1;
        assert!(each > 0, "there is room for two");

        let (begun, ended) = (tokio::time::Instant::now(), spans.ended.clone());
        let counts = Arc::clone(&spans.counts);
        let task = export(kept.clone(), Complaint::default(), waiting, counts, ended);
        spans.task.spawn(task);
        spans.finish().await;
        assert!(begun.elapsed() < DELAY);
        assert_eq!(spans.counts(), (2 * each, each));
        let batches = kept.0.lock().unwrap();
        assert_eq!(batches.iter().map(Vec::len).sum::<usize>() as u64, 2 * each);
    }
}
