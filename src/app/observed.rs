//! What the daemon shows of itself: which part says what.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_nats::connection::State;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::admission::Slots;
use crate::backend::Backend;
use crate::conditions::Conditions;
use crate::health::Health;
use crate::http::{Answers, BindError, Listener};
use crate::job::Priority;
use crate::metrics::{Exposition, Format, Metrics};
use crate::nats::Connection;
use crate::shutdown::Shutdown;
use crate::source::buffer::Buffer;
use crate::source::depth::Depth;
use crate::spans::Spans;

/// The daemon as seen from outside, until this is dropped.
pub(super) struct Observed {
    /// For the parts that have something to report.
    pub(super) metrics: Metrics,
    exposition: Exposition,
    /// Whether a restart would not mend anything.
    pub(super) alive: Conditions,
    /// Whether requests are taken and can be run.
    pub(super) ready: Conditions,
    started: Arc<AtomicBool>,
    listener: Option<AbortOnDropHandle<()>>,
}

impl Observed {
    /// Begins to answer, if there is an address to answer on. A daemon that is `broken` is not alive.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub(super) async fn open(
        addr: Option<SocketAddr>,
        shutdown: &Shutdown,
        broken: &CancellationToken,
    ) -> Result<Self, BindError> {
        let metrics = Metrics::default();
        let exposition = Exposition::new(&metrics);
        let (alive, ready) = (Conditions::default(), Conditions::default());
        let (broken, ending) = (broken.clone(), shutdown.draining.clone());
        alive.require(move || {
            // At the end every part of it ends, and that is no breakdown.
            let is_broken = broken.is_cancelled() && !ending.is_cancelled();
            is_broken.then_some("intake: a part of it broke down; see the log")
        });
        let draining = shutdown.draining.clone();
        ready.require(move || {
            draining.is_cancelled().then_some("draining: no more requests are taken")
        });
        let started = Arc::new(AtomicBool::new(false));
        let is_started = started.clone();
        ready.require(move || {
            (!is_started.load(Ordering::Relaxed)).then_some("starting: requests are not taken yet")
        });
        let conditions = ready.clone();
        exposition.observe(move |readings| readings.ready = conditions.failing().is_empty());
        let listener = match addr {
            None => None,
            Some(addr) => {
                let listener = Listener::bind(addr).await?;
                let addr = listener.addr;
                tracing::info!(%addr, "metrics and health are served");
                let (alive, ready, shown) = (alive.clone(), ready.clone(), exposition.clone());
                let answers = Answers {
                    alive: Box::new(move || alive.failing()),
                    ready: Box::new(move || ready.failing()),
                    metrics: Box::new(move |open_metrics| {
                        let format =
                            if open_metrics { Format::OpenMetrics } else { Format::Prometheus };
                        (format.content_type(), shown.render(format).unwrap_or_default())
                    }),
                };
                Some(AbortOnDropHandle::new(tokio::spawn(listener.serve(answers))))
            }
        };
        Ok(Self { metrics, exposition, alive, ready, started, listener })
    }

    /// Whether anybody can look.
    pub(super) fn is_open(&self) -> bool {
        self.listener.is_some()
    }

    /// Shows the engine, and what is kept in it.
    pub(super) fn engine(&self, backend: Arc<dyn Backend>, health: watch::Receiver<Health>) {
        let seen = health.clone();
        self.ready.require(move || match *seen.borrow() {
            Health::Up => None,
            Health::Unknown => Some("engine: it has not answered yet"),
            Health::Down => Some("engine: it does not answer"),
            Health::Unfit => Some("engine: it cannot do what the settings ask for; see the log"),
        });
        self.exposition.observe(move |readings| {
            readings.engine_up = Some(*health.borrow() == Health::Up);
            readings.warm = backend.warm_counts();
        });
    }

    /// Shows the connection to NATS.
    pub(super) fn connection(&self, connection: &Connection) {
        let is_up =
            |connection: &Connection| connection.client.connection_state() == State::Connected;
        let seen = connection.clone();
        self.ready.require(move || (!is_up(&seen)).then_some("nats: there is no connection"));
        let connection = connection.clone();
        self.exposition.observe(move |readings| {
            readings.nats_connected = Some(is_up(&connection));
            readings.nats_reconnects = Some(connection.epoch().saturating_sub(1));
            readings.nats_dropped = Some(connection.lost());
        });
    }

    /// Shows the slots.
    pub(super) fn slots(&self, slots: &Slots) {
        let slots = slots.clone();
        self.exposition.observe(move |readings| {
            readings.slots = Some(slots.total() as u64);
            readings.slots_used = Some(slots.used() as u64);
        });
    }

    /// Shows the requests that wait in memory.
    pub(super) fn buffer(&self, buffer: Arc<Buffer>) {
        self.exposition.observe(move |readings| readings.buffered = Some(buffer.len() as u64));
    }

    /// Shows the requests that wait in the stream.
    pub(super) fn queue(&self, depth: watch::Receiver<Option<Depth>>) {
        self.exposition.observe(move |readings| {
            readings.queued = depth
                .borrow()
                .map(|depth| Priority::ALL.into_iter().map(Priority::as_str).zip(depth).collect());
        });
    }

    /// Shows the spans.
    pub(super) fn spans(&self, spans: Arc<Spans>) {
        self.exposition.observe(move |readings| readings.spans = Some(spans.counts()));
    }

    /// What to call once requests are taken.
    pub(super) fn when_started(&self) -> impl FnOnce() + Send + use<> {
        let started = self.started.clone();
        move || started.store(true, Ordering::Relaxed)
    }
}
