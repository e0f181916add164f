//! What durable delivery costs: two daemons that differ in `DELIVERY` alone, each with a NATS server of the same kind.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::daemon::{Batch, Daemon, Delivery, Nats, Setup, Usage};
use crate::engine::Engine;
use crate::stats::Samples;

/// The daemon's default.
pub(crate) const SLOTS: usize = 5;
/// Requests that are published at once: enough that most of them wait.
pub(crate) const BURST: usize = 40;
/// Jobs of each daemon in a round that are published one at a time.
const SINGLE: usize = 12;
/// How long the daemons are watched doing nothing: two of the times for which a pull waits.
const REST: Duration = Duration::from_secs(20);

/// One of the two daemons, and what it did.
pub(crate) struct Side {
    pub(crate) delivery: Delivery,
    daemon: Daemon,
    nats: Nats,
    /// Of one round each.
    pub(crate) rounds: Vec<Round>,
    /// Publish to the server's word that the request is stored.
    pub(crate) confirmed: Samples,
    jobs: usize,
    cpu_ms: f64,
    nats_cpu_ms: f64,
    /// Per second in which it had nothing to do.
    pub(crate) idle_cpu_ms: f64,
}

#[derive(Default)]
pub(crate) struct Round {
    /// Of a burst, until its last container is gone.
    pub(crate) jobs_per_second: f64,
    /// Publish to result, the worker idle before each job.
    pub(crate) latency: Samples,
    /// The same without what the engine took.
    pub(crate) around_engine: Samples,
}

/// What came of it.
pub(crate) struct Durability {
    pub(crate) core: Figures,
    pub(crate) jetstream: Figures,
    pub(crate) file_system: String,
    pub(crate) lost: usize,
    pub(crate) wrong: usize,
}

pub(crate) struct Figures {
    pub(crate) delivery: Delivery,
    pub(crate) rounds: Vec<Round>,
    pub(crate) confirmed: Samples,
    pub(crate) jobs: usize,
    pub(crate) cpu_ms_per_job: f64,
    pub(crate) nats_cpu_ms_per_job: f64,
    pub(crate) idle_cpu_ms: f64,
    pub(crate) usage: Usage,
}

/// Up to `rounds` rounds within `budget`: in each a burst of one and then of the other, and single jobs by turns.
pub(crate) async fn measure(
    engine: &Engine,
    rounds: usize,
    budget: Duration,
) -> Result<Durability> {
    let mut sides = [Side::start(Delivery::Core).await?, Side::start(Delivery::JetStream).await?];
    let (mut lost, mut wrong) = (0, 0);
    for side in &mut sides {
        side.burst(engine, 2 * SLOTS).await?;
        (side.jobs, side.cpu_ms, side.nats_cpu_ms) = (0, 0.0, 0.0);
        side.daemon.confirmations();
    }
    let mut count = |batch: &Batch| {
        lost += batch.lost;
        wrong += batch.wrong;
    };
    let began = Instant::now();
    for round in 0..rounds {
        if round >= 3 && began.elapsed() + began.elapsed() / u32::try_from(round)? > budget {
            eprintln!("bench: the time is up after {round} rounds");
            break;
        }
        eprintln!("bench: durability, round {} of {rounds}", round + 1);
        // Who comes second comes first the next time.
        sides.reverse();
        for side in &mut sides {
            let (batch, took) = side.burst(engine, BURST).await?;
            count(&batch);
            let jobs_per_second = batch.latencies.len() as f64 / took.as_secs_f64();
            side.rounds.push(Round { jobs_per_second, ..Round::default() });
            // They are of a burst: the next ones tell more.
            side.daemon.confirmations();
        }
        let mut singles = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        for _ in 0..SINGLE {
            for (side, (latency, around)) in sides.iter_mut().zip(&mut singles) {
                let (batch, engine_time) = side.single(engine).await?;
                count(&batch);
                for took in batch.latencies {
                    latency.push(took);
                    around.push(took.saturating_sub(engine_time));
                }
            }
        }
        for (side, (latency, around)) in sides.iter_mut().zip(&singles) {
            side.confirmed.absorb(&Samples::of(&side.daemon.confirmations()));
            let round = side.rounds.last_mut().unwrap();
            (round.latency, round.around_engine) = (Samples::of(latency), Samples::of(around));
        }
    }
    rest(&mut sides).await?;
    let mut figures = Vec::new();
    sides.sort_by_key(|side| side.delivery != Delivery::Core);
    let file_system = sides[1].nats.file_system();
    for side in sides {
        figures.push(side.end().await?);
    }
    let (Some(jetstream), Some(core)) = (figures.pop(), figures.pop()) else { unreachable!() };
    Ok(Durability { core, jetstream, file_system, lost, wrong })
}

/// What the daemons need with nothing to do, both at once.
async fn rest(sides: &mut [Side]) -> Result<()> {
    eprintln!("bench: durability, {} s of rest", REST.as_secs());
    let mut before = Vec::new();
    for side in &*sides {
        before.push(side.daemon.cpu_now()?);
    }
    let began = Instant::now();
    tokio::time::sleep(REST).await;
    for (side, before) in sides.iter_mut().zip(before) {
        side.idle_cpu_ms = (side.daemon.cpu_now()? - before) / began.elapsed().as_secs_f64();
    }
    Ok(())
}

impl Side {
    async fn start(delivery: Delivery) -> Result<Self> {
        let nats = Nats::start().await?;
        let daemon = Daemon::start(&nats, Setup::cold(SLOTS, delivery)).await?;
        Ok(Self {
            delivery,
            daemon,
            nats,
            rounds: Vec::new(),
            confirmed: Samples::default(),
            jobs: 0,
            cpu_ms: 0.0,
            nats_cpu_ms: 0.0,
            idle_cpu_ms: 0.0,
        })
    }

    /// Publishes `jobs` at once, and waits until their last container is gone.
    async fn burst(&mut self, engine: &Engine, jobs: usize) -> Result<(Batch, Duration)> {
        let began = Instant::now();
        let (cpu, nats_cpu) = (self.daemon.cpu_now()?, self.nats.cpu_now()?);
        let (batch, _) = self.daemon.burst(jobs).await?;
        engine.drained().await?;
        let took = began.elapsed();
        self.settle(jobs, cpu, nats_cpu).await?;
        Ok((batch, took))
    }

    /// Publishes one job while there is nothing to do, and says what the engine had to do with the time.
    async fn single(&mut self, engine: &Engine) -> Result<(Batch, Duration)> {
        let mut events = self.daemon.events().await?;
        let (cpu, nats_cpu) = (self.daemon.cpu_now()?, self.nats.cpu_now()?);
        let batch = self.daemon.run(1, 1).await?;
        let engine_time = events.engine_time().await?;
        engine.drained().await?;
        self.settle(1, cpu, nats_cpu).await?;
        Ok((batch, engine_time))
    }

    /// Lets the last slot come back, and charges the jobs with what both processes took.
    async fn settle(&mut self, jobs: usize, cpu: f64, nats_cpu: f64) -> Result<()> {
        tokio::time::sleep(Duration::from_millis(10)).await;
        self.jobs += jobs;
        self.cpu_ms += self.daemon.cpu_now()? - cpu;
        self.nats_cpu_ms += self.nats.cpu_now()? - nats_cpu;
        Ok(())
    }

    async fn end(self) -> Result<Figures> {
        let per_job = |ms: f64| ms / self.jobs as f64;
        let figures = Figures {
            delivery: self.delivery,
            rounds: self.rounds,
            confirmed: self.confirmed,
            jobs: self.jobs,
            cpu_ms_per_job: per_job(self.cpu_ms),
            nats_cpu_ms_per_job: per_job(self.nats_cpu_ms),
            idle_cpu_ms: self.idle_cpu_ms,
            usage: self.daemon.usage()?,
        };
        self.daemon.stop().await;
        Ok(figures)
    }
}
