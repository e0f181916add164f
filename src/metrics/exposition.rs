//! The metrics as text: every name, type and label there is.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::histogram::{Histogram, Snapshot};
use super::readings::Readers;
use super::{Counts, Metrics, Readings};
use crate::backend::WarmCounts;

/// What every name begins with.
const PREFIX: &str = "worker_spawner";

/// The form of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus' own, 0.0.4.
    Prometheus,
}

impl Format {
    /// What an HTTP answer in this form calls itself.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => prometheus_text::CONTENT_TYPE,
        }
    }
}

/// Shows metrics to whoever asks. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Exposition {
    readers: Arc<Readers>,
    registry: Arc<Registry>,
}

impl Exposition {
    /// Shows what `metrics` is told.
    #[must_use]
    pub fn new(metrics: &Metrics) -> Self {
        let readers = Arc::new(Readers::default());
        let mut registry = Registry::with_prefix(PREFIX);
        let all = All { counts: metrics.0.clone(), readers: readers.clone() };
        registry.register_collector(Box::new(all));
        Self { readers, registry: Arc::new(registry) }
    }

    /// Has `reader` fill in what it knows whenever somebody asks. It is called on the way to an answer and
    /// must not wait.
    pub fn observe(&self, reader: impl Fn(&mut Readings) + Send + Sync + 'static) {
        self.readers.add(reader);
    }

    /// All metrics as they are now.
    ///
    /// # Errors
    /// None is known: text is written into memory.
    pub fn render(&self, format: Format) -> Result<String, fmt::Error> {
        let mut text = String::new();
        match format {
            Format::OpenMetrics => text::encode(&mut text, &self.registry)?,
            Format::Prometheus => prometheus_text::encode(&mut text, &self.registry)?,
        }
        Ok(text)
    }
}

/// Everything, as the library asks for it.
#[derive(Debug)]
struct All {
    counts: Arc<Counts>,
    readers: Arc<Readers>,
}

impl Collector for All {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let mut build =
            page.0.encode_descriptor("build", "The program's version", None, MetricType::Info)?;
        build.encode_info(&version)?;
        let readings = self.readers.read();
        page.counts(&self.counts)?;
        page.stages(&self.counts)?;
        page.readings(&self.counts, &readings)?;
        match &readings.warm {
            Some(warm) => page.warm(warm),
            None => Ok(()),
        }
    }
}

/// A text that is being written. Counters get their `_total`, and units go into names, from the library.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn counts(&mut self, counts: &Counts) -> fmt::Result {
        let ends: Vec<_> = counts.ends.all();
        let ends = ends
            .iter()
            .map(|(status, code, count)| ([("status", status.as_str()), ("code", code)], *count));
        self.counters("jobs", "Jobs that have their outcome", ends)?;
        let starts = [
            ([("start", "cold")], get(&counts.cold_starts)),
            ([("start", "warm")], get(&counts.warm_starts)),
        ];
        self.counters("starts", "Jobs with an outcome whose function had begun", starts)?;
        self.counter("retries", "Attempts that another one follows", get(&counts.retries))?;
        let buried = get(&counts.dead_letters);
        self.counter("dead_letters", "Requests that became dead letters", buried)
    }

    fn stages(&mut self, counts: &Counts) -> fmt::Result {
        let none = |histogram| [(None, histogram)];
        self.histograms("queue", "From a request's receipt to a slot for it", none(&counts.queue))?;
        self.histograms("pull", "Finding the image, and pulling it", none(&counts.pull))?;
        let create = "Creating a container for a job that found none waiting";
        self.histograms("create", create, none(&counts.create))?;
        let starts = [
            (Some([("start", "cold")]), &counts.cold_start),
            (Some([("start", "warm")]), &counts.warm_start),
        ];
        self.histograms("start", "Starting the function", starts)?;
        self.histograms("run", "From a function's start to its end", none(&counts.run))?;
        let publish = "From an outcome to its confirmation by NATS";
        self.histograms("publish", publish, none(&counts.publish))?;
        let job = "From a request's receipt to its outcome";
        self.histograms("job", job, none(&counts.job))
    }

    fn readings(&mut self, counts: &Counts, readings: &Readings) -> fmt::Result {
        let ready = Some(u64::from(readings.ready));
        self.gauge("ready", "Whether requests are taken and can be run", ready)?;
        let engine_up = readings.engine_up.map(u64::from);
        self.gauge("engine_up", "Whether the container engine answers and is fit", engine_up)?;
        let connected = readings.nats_connected.map(u64::from);
        self.gauge("nats_connected", "Whether there is a connection to NATS", connected)?;
        if let Some(reconnects) = readings.nats_reconnects {
            let help = "Connections to NATS made after the first";
            self.counter("nats_reconnects", help, reconnects)?;
        }
        if let Some(dropped) = readings.nats_dropped {
            let help = "Messages the NATS client dropped since they came too fast";
            self.counter("nats_dropped_messages", help, dropped)?;
        }
        self.gauge("slots", "Functions that may run at once", readings.slots)?;
        let help = "Slots that a job has, until its container is gone";
        self.gauge("slots_used", help, readings.slots_used)?;
        let running = Some(get(&counts.running));
        self.gauge("jobs_running", "Functions that are being started or run", running)?;
        let buffered = readings.buffered.map(|count| ([("subject", "execute")], count));
        let callers = Some(([("subject", "run")], get(&counts.callers_waiting)));
        let help = "Requests that wait in memory for a slot";
        self.gauges("requests_waiting", help, buffered.into_iter().chain(callers))?;
        if let Some(queued) = &readings.queued {
            let queued = queued.iter().map(|(name, count)| ([("priority", *name)], *count));
            let help = "Requests that wait in the stream, for all instances together";
            self.gauges("queue_requests", help, queued)?;
        }
        if let Some((exported, dropped)) = readings.spans {
            self.counter("spans_exported", "Spans that the collector took", exported)?;
            let help = "Spans that the collector did not take, or not in time";
            self.counter("spans_dropped", help, dropped)?;
        }
        Ok(())
    }

    fn warm(&mut self, warm: &WarmCounts) -> fmt::Result {
        let waiting = Some(warm.waiting);
        self.gauge("warm_containers_waiting", "Containers that wait for jobs", waiting)?;
        self.counter("warm_hits", "Starts in a container that waited", warm.hits)?;
        let misses = warm.misses.iter().map(|(reason, count)| ([("reason", *reason)], *count));
        self.counters("warm_misses", "Starts that found no container that waited", misses)?;
        for (name, help, count) in [
            ("warm_containers_made", "Containers that were made to wait", warm.made),
            ("warm_containers_failed", "Containers that could not be made to wait", warm.failed),
            ("warm_containers_evicted", "Containers that gave way to another kind", warm.evicted),
            ("warm_containers_retired", "Containers that waited for too long", warm.retired),
            ("warm_containers_died", "Containers that ended while they waited", warm.died),
        ] {
            self.counter(name, help, count)?;
        }
        Ok(())
    }

    fn counter(&mut self, name: &str, help: &str, count: u64) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, f64>(&count, None)
    }

    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        counts: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, count) in counts {
            let mut labelled = metric.encode_family(&labels)?;
            labelled.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: Option<u64>) -> fmt::Result {
        let Some(value) = value else { return Ok(()) };
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        metric.encode_gauge(&value)
    }

    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn histograms<'h>(
        &mut self,
        name: &str,
        help: &str,
        of: impl IntoIterator<Item = (Option<[(&'static str, &'static str); 1]>, &'h Histogram)>,
    ) -> fmt::Result {
        let (unit, kind) = (Unit::Seconds, MetricType::Histogram);
        let mut metric = self.0.encode_descriptor(name, help, Some(&unit), kind)?;
        for (labels, histogram) in of {
            let Snapshot { sum, count, buckets } = histogram.snapshot();
            match labels {
                Some(labels) => metric
                    .encode_family(&labels)?
                    .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?,
                None => metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?,
            }
        }
        Ok(())
    }
}

fn get(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

#[cfg(test)]
#[path = "exposition_tests.rs"]
mod tests;
