//! The benchmark: from the publishing of a request to its result, against the ways of running one container by hand.
//!
//! All contenders run on one engine in one process's lifetime, in rounds (A B C A B C …, the order rotating), so that
//! drift and noise reach all of them alike; a warm-up round is thrown away. What counts is the ratio between two
//! contenders within a round: the absolute times say more about the machine than about the program.
//!
//! After them, what containers that wait are good for in other ways than that ([`warm`]), and what durable delivery costs:
//! two daemons that differ in it by turns.
//!
//! `scripts/bench.sh [--long] [--rounds N] [--budget SECONDS] [--without-daemon | --warm | --durability | --breakdown]`;
//! docs/BENCHMARKS.md has the method.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod breakdown;
mod daemon;
mod durability;
mod engine;
mod images;
mod python;
mod report;
mod stats;
mod waiting;
mod warm;
mod warm_report;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::panic::AssertUnwindSafe;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use futures::future::try_join_all;
use tokio::signal::unix::{SignalKind, signal};

use crate::daemon::{Batch, Daemon, Delivery, Nats, Setup, Usage};
use crate::durability::Durability;
use crate::engine::{COMMAND, Engine, IMAGE, PRINTED, Timing};
use crate::stats::Samples;
use crate::warm::Warm;

/// How many jobs are under way at once.
const PARALLEL: [usize; 2] = [1, 8];

/// The daemon's slots: its default, or as many as the jobs under way.
fn slots(parallel: usize) -> usize {
    parallel.max(5)
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Contender {
    /// The daemon, the next job published as soon as a result is in.
    Daemon,
    /// The daemon when it is idle: the next job is published when the container of the last is gone.
    DaemonIdle,
    Run,
    RunNoNetwork,
    /// Create, attach, start, wait, remove: the floor.
    Bare,
    /// The floor with the daemon's confinement.
    BareConfined,
    /// The daemon with containers that wait: one job at a time, each when the pool is full and everything else gone;
    /// or as many in parallel as there are slots, the next as soon as a result is in.
    Warm,
    /// The same, one at a time, with durable delivery.
    WarmJetStream,
    /// As many requests at once as containers wait.
    WarmBurst,
}

/// The daemons that take part: each contender is served by one of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Kind {
    Cold,
    Warm,
    WarmJetStream,
}

impl Kind {
    fn setup(self, parallel: usize) -> Setup {
        match self {
            Self::Cold => Setup::cold(slots(parallel), Delivery::Core),
            Self::Warm => Setup::warm(slots(parallel), Delivery::Core, &IMAGE),
            Self::WarmJetStream => Setup::warm(slots(parallel), Delivery::JetStream, &IMAGE),
        }
    }
}

impl Contender {
    pub(crate) fn all() -> [Self; 9] {
        [
            Self::Daemon,
            Self::Run,
            Self::Warm,
            Self::RunNoNetwork,
            Self::WarmJetStream,
            Self::Bare,
            Self::DaemonIdle,
            Self::WarmBurst,
            Self::BareConfined,
        ]
    }

    fn takes_part(self, parallel: usize, options: &Options) -> bool {
        let daemon = !options.without_daemon;
        match self {
            Self::Daemon => daemon && (parallel > 1 || options.part != Part::Warm),
            Self::Warm => daemon,
            Self::DaemonIdle | Self::WarmJetStream | Self::WarmBurst => daemon && parallel == 1,
            Self::Run => options.part != Part::Warm || parallel == 1,
            Self::RunNoNetwork | Self::Bare | Self::BareConfined => options.part != Part::Warm,
        }
    }

    /// Whether it waits between jobs, so that its rate says nothing.
    pub(crate) fn pauses(self, parallel: usize) -> bool {
        let alone = parallel == 1 && matches!(self, Self::Warm | Self::WarmJetStream);
        alone || matches!(self, Self::DaemonIdle | Self::WarmBurst)
    }

    /// Whether its jobs may find a container waiting.
    pub(crate) fn counts_hits(self) -> bool {
        matches!(self, Self::Warm | Self::WarmJetStream | Self::WarmBurst)
    }

    /// The daemon it is, if it is one.
    fn kind(self) -> Option<Kind> {
        match self {
            Self::Daemon | Self::DaemonIdle => Some(Kind::Cold),
            Self::Warm | Self::WarmBurst => Some(Kind::Warm),
            Self::WarmJetStream => Some(Kind::WarmJetStream),
            Self::Run | Self::RunNoNetwork | Self::Bare | Self::BareConfined => None,
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    All,
    Warm,
    Durability,
    Breakdown,
}

struct Options {
    long: bool,
    rounds: usize,
    budget: Duration,
    without_daemon: bool,
    part: Part,
}

/// How long the rounds of [`durability`] may take.
const DURABILITY_BUDGET: Duration = Duration::from_secs(75);

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            long: false,
            rounds: 8,
            budget: Duration::from_secs(220),
            without_daemon: false,
            part: Part::All,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--long" => options.long = true,
                "--without-daemon" => options.without_daemon = true,
                "--warm" => options.part = Part::Warm,
                "--durability" => options.part = Part::Durability,
                "--breakdown" => options.part = Part::Breakdown,
                "--rounds" => options.rounds = args.next().context("--rounds N")?.parse()?,
                "--budget" => {
                    options.budget =
                        Duration::from_secs(args.next().context("--budget S")?.parse()?)
                }
                "--bench" => {} // cargo says so to every benchmark
                other => bail!("unknown argument {other}"),
            }
        }
        let daemon = options.part == Part::All || !options.without_daemon;
        ensure!(daemon, "--without-daemon leaves nothing of that part");
        Ok(options)
    }
}

/// What one contender did in one round at one degree of parallelism.
#[derive(Default)]
pub(crate) struct Block {
    /// Publish to result; for the others, start to the container's removal, which is when `docker run --rm` returns.
    pub(crate) latency: Samples,
    /// Start to known exit and output, where that can be told from the removal.
    pub(crate) to_result: Samples,
    pub(crate) wall: Duration,
    pub(crate) lost: usize,
    pub(crate) wrong: usize,
    /// Jobs that began in a container that waited.
    pub(crate) hits: usize,
}

pub(crate) struct Burst {
    pub(crate) jobs: usize,
    pub(crate) slots: usize,
    pub(crate) lost: usize,
    pub(crate) wrong: usize,
    pub(crate) took: Duration,
    pub(crate) usage: Usage,
}

pub(crate) struct DaemonFigures {
    pub(crate) kind: Kind,
    pub(crate) slots: usize,
    pub(crate) cpu_jobs: usize,
    pub(crate) cpu_ms_per_job: f64,
    /// Per second in which it had nothing to do.
    pub(crate) idle_cpu_ms: f64,
    /// Jobs done so far, and the process at that point.
    pub(crate) memory: Vec<(usize, Usage)>,
}

#[derive(Default)]
pub(crate) struct Measured {
    pub(crate) environment: String,
    pub(crate) rounds: usize,
    pub(crate) blocks: HashMap<(Contender, usize), Vec<Block>>,
    pub(crate) daemons: Vec<DaemonFigures>,
    pub(crate) burst: Option<Burst>,
    pub(crate) durability: Option<Durability>,
    pub(crate) warm: Option<Warm>,
    pub(crate) breakdown: Vec<breakdown::Breakdown>,
    pub(crate) lost: usize,
    pub(crate) wrong: usize,
}

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("bench: {error:#}");
            return ExitCode::from(64);
        }
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outcome = runtime.block_on(guarded(&options));
    runtime.shutdown_timeout(Duration::from_secs(2));
    match outcome {
        Ok(measured) => {
            println!("{}", report::markdown(&measured));
            let failed = measured.warm.iter().any(|warm| !warm.failed.is_empty());
            if failed || measured.lost > 0 || measured.wrong > 0 {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            }
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures, and leaves neither container nor image nor process, whether it ends well, fails, panics or is told to stop.
async fn guarded(options: &Options) -> Result<Measured> {
    let engine = Engine::connect().await?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let outcome = tokio::select! {
        done = AssertUnwindSafe(measure(options, &engine)).catch_unwind() =>
            done.unwrap_or_else(|_| Err(anyhow::anyhow!("a panic"))),
        _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    if outcome.is_err() {
        // The engine may still be busy with the last request of a process that was killed.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    engine.sweep().await;
    outcome
}

async fn measure(options: &Options, engine: &Engine) -> Result<Measured> {
    Engine::import_image()?;
    let nats = Nats::start().await?;
    let mut measured = Measured {
        environment: format!(
            "{}, nats-server {}, load average {} at the start",
            engine.describe().await?,
            nats.version,
            load_average()
        ),
        ..Measured::default()
    };
    if options.part == Part::Breakdown {
        measured.breakdown = breakdown::measure(engine, &nats).await?;
        return Ok(measured);
    }
    if options.part != Part::Durability && options.rounds > 0 {
        contend(options, engine, &nats, &mut measured).await?;
    }
    if !options.without_daemon && options.part != Part::Durability {
        let warm = warm::measure(engine, &nats, options.long).await;
        measured.lost += warm.lost;
        measured.wrong += warm.wrong;
        measured.warm = Some(warm);
    }
    if !options.without_daemon && options.part != Part::Warm {
        let rounds = if options.long { 3 } else { 1 } * options.rounds * 3 / 2;
        let budget = if options.long { 3 } else { 1 } * DURABILITY_BUDGET;
        let durability = durability::measure(engine, rounds, budget).await?;
        measured.lost += durability.lost;
        measured.wrong += durability.wrong;
        measured.durability = Some(durability);
    }
    Ok(measured)
}

type Daemons = HashMap<(Kind, usize), Daemon>;

/// The contenders by turns, then the daemons alone.
async fn contend(
    options: &Options,
    engine: &Engine,
    nats: &Nats,
    measured: &mut Measured,
) -> Result<()> {
    let mut daemons = Daemons::new();
    for parallel in PARALLEL {
        for contender in Contender::all().into_iter().filter(|c| c.takes_part(parallel, options)) {
            let Some(kind) = contender.kind() else { continue };
            let Entry::Vacant(place) = daemons.entry((kind, parallel)) else { continue };
            let daemon = Daemon::start(nats, kind.setup(parallel)).await?;
            if kind != Kind::Cold {
                engine.expect_pool(daemon.pid, Some(daemon.setup.warm));
            }
            place.insert(daemon);
        }
    }
    engine.drained().await?;
    eprintln!("bench: warm-up");
    for parallel in PARALLEL {
        for contender in Contender::all().into_iter().filter(|c| c.takes_part(parallel, options)) {
            block(engine, &mut daemons, contender, parallel, 2 * parallel).await?;
        }
    }
    let mut before = HashMap::new();
    for (key, daemon) in &daemons {
        before.insert(*key, daemon.usage()?.cpu_ms);
    }

    // Of each daemon in its own turns: jobs, CPU time, and how long they took.
    let mut busy: HashMap<(Kind, usize), (usize, f64, Duration)> = HashMap::new();
    let began = Instant::now();
    for round in 0..options.rounds {
        if round >= 3 && began.elapsed() + began.elapsed() / u32::try_from(round)? > options.budget
        {
            eprintln!("bench: the time is up after {round} rounds");
            break;
        }
        eprintln!("bench: round {} of {}", round + 1, options.rounds);
        for (parallel, jobs) in PARALLEL.into_iter().zip([10, 32]) {
            let mut order = Contender::all();
            let by = round % order.len();
            order.rotate_left(by);
            for contender in order.into_iter().filter(|c| c.takes_part(parallel, options)) {
                let turn = Instant::now();
                let key = contender.kind().map(|kind| (kind, parallel));
                let cpu_now = |daemons: &Daemons| {
                    key.and_then(|key| daemons.get(&key)).map(Daemon::cpu_now).transpose()
                };
                let cpu = cpu_now(&daemons)?;
                let block = block(engine, &mut daemons, contender, parallel, jobs).await?;
                if let (Some(key), Some(before), Some(now)) = (key, cpu, cpu_now(&daemons)?) {
                    let total = busy.entry(key).or_default();
                    total.0 += block.latency.len();
                    total.1 += now - before;
                    total.2 += turn.elapsed();
                }
                measured.lost += block.lost;
                measured.wrong += block.wrong;
                measured.blocks.entry((contender, parallel)).or_default().push(block);
            }
        }
        measured.rounds += 1;
    }

    let took = began.elapsed();

    for (kind, parallel) in [
        (Kind::Cold, 1),
        (Kind::Cold, 8),
        (Kind::Warm, 1),
        (Kind::Warm, 8),
        (Kind::WarmJetStream, 1),
    ] {
        let key = (kind, parallel);
        let (Some(daemon), Some(&(jobs, cpu_ms, turns))) = (daemons.get_mut(&key), busy.get(&key))
        else {
            continue;
        };
        let cpu_in_all = daemon.usage()?.cpu_ms - before[&key];
        let mut figures = DaemonFigures {
            kind,
            slots: slots(parallel),
            cpu_jobs: jobs,
            cpu_ms_per_job: cpu_ms / jobs as f64,
            idle_cpu_ms: (cpu_in_all - cpu_ms).max(0.0) / (took - turns).as_secs_f64(),
            memory: Vec::new(),
        };
        if kind == Kind::Cold && parallel > 1 && options.part == Part::All {
            // The same daemon goes on, so that the figures are points on one line.
            for mark in if options.long { &[200, 1000, 2000][..] } else { &[200][..] } {
                let missing = mark.max(&daemon.jobs_done) - daemon.jobs_done;
                eprintln!("bench: up to {mark} jobs, {missing} to go");
                let batch = daemon.run(missing, parallel).await?;
                engine.drained().await?;
                measured.lost += batch.lost;
                measured.wrong += batch.wrong;
                figures.memory.push((daemon.jobs_done, daemon.usage()?));
            }
        }
        measured.daemons.push(figures);
    }
    for (_, daemon) in daemons {
        engine.expect_no_pool(daemon.pid);
        daemon.stop().await;
    }
    engine.drained().await?;
    if options.long && !options.without_daemon && options.part == Part::All {
        let (jobs, slots) = (10_000, 5);
        let mut daemon = Daemon::start(nats, Setup::cold(slots, Delivery::Core)).await?;
        eprintln!("bench: burst of {jobs}");
        let (batch, took) = daemon.burst(jobs).await?;
        measured.lost += batch.lost;
        measured.wrong += batch.wrong;
        measured.burst = Some(Burst {
            jobs,
            slots,
            lost: batch.lost,
            wrong: batch.wrong,
            took,
            usage: daemon.usage()?,
        });
        engine.drained().await?;
        daemon.stop().await;
    }
    Ok(())
}

/// Runs one block and waits until its last container is gone, which is part of its time: a contender that answers
/// first and cleans up later does not get the cleaning for nothing.
async fn block(
    engine: &Engine,
    daemons: &mut Daemons,
    contender: Contender,
    parallel: usize,
    jobs: usize,
) -> Result<Block> {
    let started = Instant::now();
    let mut block = Block::default();
    if let Some(kind) = contender.kind() {
        let daemon = daemons.get_mut(&(kind, parallel)).context("no daemon")?;
        let mut batch = Batch::default();
        match contender {
            Contender::WarmBurst => {
                let at_once = daemon.setup.warm;
                for _ in 0..jobs.div_ceil(at_once) {
                    batch.absorb(daemon.burst(at_once).await?.0);
                    block.hits += warm::rest(engine, daemon).await?;
                }
            }
            Contender::DaemonIdle | Contender::Warm | Contender::WarmJetStream if parallel == 1 => {
                for _ in 0..jobs {
                    batch.absorb(daemon.run(1, 1).await?);
                    block.hits += warm::rest(engine, daemon).await?;
                    // The slot comes back just after the container is gone.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            _ => {
                batch = daemon.run(jobs, parallel).await?;
                block.hits += warm::rest(engine, daemon).await?;
            }
        }
        block.latency = Samples::of(&batch.latencies);
        (block.lost, block.wrong) = (batch.lost, batch.wrong);
        if contender == Contender::DaemonIdle {
            block.to_result = block.latency.clone();
        }
    }
    match contender {
        Contender::Run => {
            block.latency = removed(&each(jobs, parallel, || command_line(&[])).await?)
        }
        Contender::RunNoNetwork => {
            block.latency =
                removed(&each(jobs, parallel, || command_line(&["--network", "none"])).await?);
        }
        Contender::Bare | Contender::BareConfined => {
            let body =
                if contender == Contender::Bare { engine::minimal() } else { engine::confined() };
            let timings = each(jobs, parallel, || engine.run_bare(body.clone())).await?;
            block.latency = removed(&timings);
            block.to_result = Samples::of(&timings.iter().map(|t| t.to_result).collect::<Vec<_>>());
        }
        _ => {}
    }
    engine.drained().await?;
    block.wall = started.elapsed();
    Ok(block)
}

fn removed(timings: &[Timing]) -> Samples {
    Samples::of(&timings.iter().map(|t| t.to_removed).collect::<Vec<_>>())
}

/// Runs `jobs` jobs, `parallel` at a time, each line starting its next as soon as its last is done.
async fn each<F, Fut>(jobs: usize, parallel: usize, job: F) -> Result<Vec<Timing>>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<Timing>>,
{
    let taken = Arc::new(AtomicUsize::new(0));
    let lines = (0..parallel).map(|_| async {
        let mut timings = Vec::new();
        while taken.fetch_add(1, Ordering::Relaxed) < jobs {
            timings.push(job().await?);
        }
        Ok::<_, anyhow::Error>(timings)
    });
    Ok(try_join_all(lines).await?.into_iter().flatten().collect())
}

/// `docker run --rm` as anyone would type it. It returns when the container is gone.
async fn command_line(options: &[&str]) -> Result<Timing> {
    let started = Instant::now();
    let run = tokio::process::Command::new("docker")
        .args(["run", "--rm"])
        .args(options)
        .arg(IMAGE.as_str())
        .args(COMMAND)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let took = started.elapsed();
    ensure!(
        run.status.success() && run.stdout == PRINTED.as_bytes(),
        "docker run: {}, {:?}",
        run.status,
        String::from_utf8_lossy(&run.stderr)
    );
    Ok(Timing { to_result: took, to_removed: took })
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|l| l.split_whitespace().next().map(str::to_owned))
        .unwrap_or_default()
}
