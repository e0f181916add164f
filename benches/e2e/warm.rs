//! Containers that wait, in other ways than one `echo hi` after the other: under a steady load, with many images, with an
//! interpreter, with other limits; what they cost while nothing happens, and how fast an engine makes them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::daemon::{Batch, Daemon, Delivery, Function, Nats, Setup};
use crate::engine::{Engine, IMAGE};
use crate::images;
use crate::python;
use crate::stats::Samples;
use crate::waiting::{self, IdleCost, Waiting};

/// The daemon's default, of slots and of containers that wait.
pub(crate) const SLOTS: usize = 5;
/// Requests a second.
pub(crate) const RATES: [u32; 3] = [1, 5, 20];
/// How many images there are, and how many containers wait for all of them.
pub(crate) const IMAGES: usize = 50;
pub(crate) const POOL: usize = 10;
/// How many of them run at once where throughput is measured.
const MANY_PARALLEL: usize = 8;
/// How many creations are under way at once.
pub(crate) const CREATIONS: [usize; 5] = [1, 2, 3, 4, 8];

/// What came of it.
#[derive(Default)]
pub(crate) struct Warm {
    pub(crate) paced: Vec<Paced>,
    pub(crate) many: Vec<Many>,
    /// Or why there is none.
    pub(crate) python: Option<Result<Python, String>>,
    pub(crate) limits: Limits,
    pub(crate) idle: Option<IdleCost>,
    pub(crate) creations: Vec<Creations>,
    /// A byte to a container that waits and back.
    pub(crate) line: Samples,
    pub(crate) lost: usize,
    pub(crate) wrong: usize,
    /// Parts that could not be measured.
    pub(crate) failed: Vec<String>,
}

/// A load that does not wait for its answers.
pub(crate) struct Paced {
    pub(crate) rate: u32,
    pub(crate) latency: Samples,
    pub(crate) hits: usize,
}

/// Requests for many images in some order.
pub(crate) struct Many {
    pub(crate) order: Order,
    /// At a pace.
    pub(crate) paced: Paced,
    /// As fast as they come back, with containers that wait, and without, until the last is gone.
    pub(crate) warm: Closed,
    pub(crate) cold: Closed,
}

#[derive(Default)]
pub(crate) struct Closed {
    pub(crate) latency: Samples,
    pub(crate) per_second: f64,
    pub(crate) hits: usize,
}

#[derive(Default)]
pub(crate) struct Python {
    /// Publish to result, and the start in a container that runs already: of one round each.
    pub(crate) warm: Vec<Samples>,
    pub(crate) reference: Vec<Samples>,
    pub(crate) hits: usize,
}

/// Jobs that ask for other limits than the last: of one round each.
#[derive(Default)]
pub(crate) struct Limits {
    /// Publish to result.
    pub(crate) changed: Vec<Samples>,
    pub(crate) unchanged: Vec<Samples>,
    pub(crate) cold: Vec<Samples>,
    /// The engine's call alone.
    pub(crate) call: Samples,
    pub(crate) hits: usize,
    pub(crate) jobs: usize,
}

pub(crate) struct Creations {
    pub(crate) parallel: usize,
    /// A second, of one round each.
    pub(crate) rates: Vec<f64>,
    pub(crate) each: Samples,
}

/// In which order many images are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// The n-th image as often as 1/n: a few are asked for most of the time.
    Zipf,
    /// One after the other: the worst there is for who keeps what was asked for last.
    RoundRobin,
}

impl Order {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Zipf => "Zipf",
            Self::RoundRobin => "round robin",
        }
    }

    /// The same sequence in every run.
    fn sequence(self, jobs: usize, images: &[Arc<str>]) -> Vec<Function> {
        let total: f64 = (1..=images.len()).map(|n| 1.0 / n as f64).sum();
        let mut state = 42u64;
        let mut pick = |n: usize| match self {
            Self::RoundRobin => n % images.len(),
            Self::Zipf => {
                // Knuth's generator; the high bits are the good ones.
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let mut left = (state >> 11) as f64 / (1u64 << 53) as f64 * total;
                (0..images.len() - 1)
                    .find(|n| {
                        left -= 1.0 / (n + 1) as f64;
                        left < 0.0
                    })
                    .unwrap_or(images.len() - 1)
            }
        };
        (0..jobs).map(|n| Function::echo_in(&images[pick(n)])).collect()
    }
}

/// Waits until everything is as it was before the jobs of this daemon. Returns how many of them began in a container that
/// waited.
pub(crate) async fn rest(engine: &Engine, daemon: &mut Daemon) -> Result<usize> {
    let hits = daemon.new_hits().await?;
    engine.taken(daemon.pid, hits);
    engine.drained().await?;
    Ok(hits)
}

/// Everything, for longer with `long`. What fails of it is noted, and costs none of the rest.
pub(crate) async fn measure(engine: &Engine, nats: &Nats, long: bool) -> Warm {
    let mut warm = Warm::default();
    let times = if long { 3 } else { 1 };
    let done = echoes(engine, nats, &mut warm, times).await;
    warm.note("steady load", done);
    let done = creations(engine, &mut warm, 3 * times).await;
    warm.note("creations", done);
    let done = interpreter(engine, nats, &mut warm, 6 * times).await;
    warm.note("an interpreter", done);
    let done = many_images(engine, nats, &mut warm, times).await;
    warm.note("many images", done);
    warm
}

/// What one daemon can be asked for with one image.
async fn echoes(engine: &Engine, nats: &Nats, warm: &mut Warm, times: u32) -> Result<()> {
    let mut daemon = Daemon::start(nats, Setup::warm(SLOTS, Delivery::Core, &IMAGE)).await?;
    engine.expect_pool(daemon.pid, Some(SLOTS));
    engine.drained().await?;

    eprintln!("bench: warm, nothing to do");
    warm.idle = waiting::idle_cost(engine, daemon.pid, Duration::from_secs(10) * times).await?;
    for rate in RATES {
        eprintln!("bench: warm, {rate} requests a second");
        let jobs = rate * if rate == 5 { 20 } else { 15 } * times;
        let functions = vec![Function::echo(); jobs as usize];
        let batch = daemon.run_paced(functions, Duration::from_secs(1) / rate).await?;
        let hits = rest(engine, &mut daemon).await?;
        warm.count(&batch);
        warm.paced.push(Paced { rate, latency: Samples::of(&batch.latencies), hits });
    }
    changed_limits(engine, nats, &mut daemon, warm, 3 * times).await?;
    engine.expect_no_pool(daemon.pid);
    daemon.stop().await;
    engine.drained().await
}

impl Warm {
    fn note(&mut self, part: &str, done: Result<()>) {
        if let Err(error) = done {
            eprintln!("bench: {part}: {error:#}");
            self.failed.push(format!("{part}: {error:#}"));
        }
    }

    fn count(&mut self, batch: &Batch) {
        self.lost += batch.lost;
        self.wrong += batch.wrong;
    }
}

/// Jobs with the pool's limits, with others, and in containers of their own, by turns.
async fn changed_limits(
    engine: &Engine,
    nats: &Nats,
    daemon: &mut Daemon,
    warm: &mut Warm,
    rounds: u32,
) -> Result<()> {
    eprintln!("bench: warm, other limits");
    let mut cold = Daemon::start(nats, Setup::cold(SLOTS, Delivery::Core)).await?;
    let mut memory = 64 << 20;
    for _ in 0..rounds {
        let [mut changed, mut unchanged, mut made] = [const { Vec::new() }; 3];
        for _ in 0..8 {
            // Never the limits that a container was just made with.
            memory += 1 << 20;
            let other = Function { memory_bytes: Some(memory), ..Function::echo() };
            let batch = daemon.run_each([other.clone()], 1).await?;
            warm.limits.hits += rest(engine, daemon).await?;
            warm.count(&batch);
            changed.extend(batch.latencies);
            let batch = cold.run_each([other], 1).await?;
            rest(engine, &mut cold).await?;
            warm.count(&batch);
            made.extend(batch.latencies);
            warm.limits.jobs += 1;
        }
        // Those that wait have the limits of the last job by now; all that come find them so.
        let same = Function { memory_bytes: Some(memory), ..Function::echo() };
        for n in 0..SLOTS + 8 {
            let batch = daemon.run_each([same.clone()], 1).await?;
            rest(engine, daemon).await?;
            warm.count(&batch);
            if n >= SLOTS {
                unchanged.extend(batch.latencies);
            }
        }
        warm.limits.changed.push(Samples::of(&changed));
        warm.limits.unchanged.push(Samples::of(&unchanged));
        warm.limits.cold.push(Samples::of(&made));
    }
    cold.stop().await;
    Ok(())
}

/// Containers made by the engine, some at once, by turns; and the line to one of them.
async fn creations(engine: &Engine, warm: &mut Warm, rounds: u32) -> Result<()> {
    eprintln!("bench: warm, creations");
    warm.creations = CREATIONS
        .map(|parallel| Creations { parallel, rates: Vec::new(), each: Samples::default() })
        .into();
    for round in 0..rounds as usize {
        warm.creations.rotate_left(round % CREATIONS.len());
        for creations in &mut warm.creations {
            let (rate, each) = waiting::creations(engine, creations.parallel, 16).await?;
            creations.rates.push(rate);
            creations.each.absorb(&each);
        }
    }
    warm.creations.sort_by_key(|creations| creations.parallel);
    let mut waiting = Waiting::make(engine).await?;
    waiting.echo().await?;
    let (mut line, mut calls) = (Vec::new(), Vec::new());
    for n in 0..100 {
        line.push(waiting.echo().await?);
        tokio::time::sleep(Duration::from_millis(5)).await;
        if n % 4 == 0 {
            calls.push(waiting.limit((64 + n) << 20).await?);
        }
    }
    waiting.remove().await?;
    (warm.line, warm.limits.call) = (Samples::of(&line), Samples::of(&calls));
    engine.drained().await
}

async fn interpreter(engine: &Engine, nats: &Nats, warm: &mut Warm, rounds: u32) -> Result<()> {
    eprintln!("bench: warm, an interpreter");
    if let Err(why) = python::make_image() {
        eprintln!("bench: without an interpreter: {why:#}");
        warm.python = Some(Err(format!("{why:#}")));
        return Ok(());
    }
    let mut daemon =
        Daemon::start(nats, Setup::warm(SLOTS, Delivery::Core, &python::IMAGE)).await?;
    engine.expect_pool(daemon.pid, Some(SLOTS));
    let mut reference = python::Reference::start().await?;
    engine.drained().await?;
    let mut measured = Python::default();
    for round in 0..=rounds {
        let mut latencies = Vec::new();
        let mut starts = Samples::default();
        for _ in 0..10 {
            let batch = daemon.run_each([python::function()], 1).await?;
            let hits = rest(engine, &mut daemon).await?;
            warm.count(&batch);
            starts.absorb(&reference.run(1).await?);
            // The first round is the warm-up.
            if round > 0 {
                measured.hits += hits;
                latencies.extend(batch.latencies);
            }
        }
        if round > 0 {
            measured.warm.push(Samples::of(&latencies));
            measured.reference.push(starts);
        }
    }
    warm.python = Some(Ok(measured));
    engine.expect_no_pool(daemon.pid);
    daemon.stop().await;
    drop(reference);
    Ok(())
}

/// Fewer containers wait than there are images.
async fn many_images(engine: &Engine, nats: &Nats, warm: &mut Warm, times: u32) -> Result<()> {
    eprintln!("bench: warm, {IMAGES} images");
    let images = images::make_many(engine, IMAGES).await?;
    let mut cold = Daemon::start(nats, Setup::cold(POOL, Delivery::Core)).await?;
    for order in [Order::Zipf, Order::RoundRobin] {
        eprintln!("bench: warm, {IMAGES} images, {}", order.name());
        // One that knows nothing yet.
        let mut daemon = Daemon::start(nats, Setup::warm(POOL, Delivery::Core, "")).await?;
        engine.expect_pool(daemon.pid, None);
        let (rate, jobs) = (5, 100 * times as usize);
        let functions = order.sequence(jobs, &images);
        let batch = daemon.run_paced(functions.clone(), Duration::from_secs(1) / rate).await?;
        warm.count(&batch);
        let latency = Samples::of(&batch.latencies);
        let paced = Paced { rate, latency, hits: rest(engine, &mut daemon).await? };
        let with = closed(engine, &mut daemon, &functions, warm).await?;
        engine.expect_no_pool(daemon.pid);
        daemon.stop().await;
        engine.drained().await?;
        let without = closed(engine, &mut cold, &functions, warm).await?;
        warm.many.push(Many { order, paced, warm: with, cold: without });
    }
    cold.stop().await;
    Ok(())
}

async fn closed(
    engine: &Engine,
    daemon: &mut Daemon,
    functions: &[Function],
    warm: &mut Warm,
) -> Result<Closed> {
    let began = Instant::now();
    let batch = daemon.run_each(functions.to_vec(), MANY_PARALLEL).await?;
    let hits = rest(engine, daemon).await?;
    warm.count(&batch);
    Ok(Closed {
        latency: Samples::of(&batch.latencies),
        per_second: functions.len() as f64 / began.elapsed().as_secs_f64(),
        hits,
    })
}
