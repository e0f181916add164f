//! Where the time of one job goes that finds a container waiting: the daemon's own log says when it passed which point
//! (`worker_spawner::stage`), by the clock that this process has as well.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::daemon::{Daemon, Delivery, Nats, Setup};
use crate::engine::{Engine, IMAGE};
use crate::stats::Samples;
use crate::warm;

const JOBS: usize = 60;
const SLOTS: usize = 5;

/// One kind of delivery.
pub(crate) struct Breakdown {
    pub(crate) delivery: Delivery,
    pub(crate) jobs: usize,
    /// Publish to result without the log, and with it.
    pub(crate) plain: Samples,
    pub(crate) logged: Samples,
    /// In the order in which they are passed.
    pub(crate) stages: Vec<Stage>,
}

pub(crate) struct Stage {
    pub(crate) name: String,
    /// Since the point before, in microseconds.
    pub(crate) took: Samples,
    /// Since the publishing, in microseconds.
    pub(crate) at: Samples,
}

/// One job at a time, the pool full and everything else gone.
pub(crate) async fn measure(engine: &Engine, nats: &Nats) -> Result<Vec<Breakdown>> {
    let mut all = Vec::new();
    for delivery in [Delivery::Core, Delivery::JetStream] {
        eprintln!("bench: breakdown, {}", delivery.name());
        all.push(of(engine, nats, delivery).await?);
    }
    Ok(all)
}

async fn of(engine: &Engine, nats: &Nats, delivery: Delivery) -> Result<Breakdown> {
    let setup = Setup::warm(SLOTS, delivery, &IMAGE);
    let logging = Setup { log: "info,worker_spawner::stage=trace", ..setup.clone() };
    let mut plain = Daemon::start(nats, setup).await?;
    let mut logging = Daemon::start(nats, logging).await?;
    engine.expect_pool(plain.pid, Some(SLOTS));
    engine.expect_pool(logging.pid, Some(SLOTS));
    engine.drained().await?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let mut stages: BTreeMap<String, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for job in 0..JOBS + 5 {
        let batch = plain.run(1, 1).await?;
        warm::rest(engine, &mut plain).await?;
        let published = jiff::Timestamp::now();
        let logged = logging.run(1, 1).await?;
        let hits = warm::rest(engine, &mut logging).await?;
        let passed = passed(&mut logging, published).await?;
        // The first few are the warm-up, and what starts cold has other points.
        if job < 5 || hits == 0 {
            continue;
        }
        without.extend(batch.latencies);
        let result = logged.latencies.first().map_or(f64::NAN, |l| l.as_secs_f64() * 1e6);
        with.extend(logged.latencies);
        let mut before = 0.0;
        for (name, at) in with_result(passed, result) {
            let (took, since) = stages.entry(name).or_default();
            took.push(at - before);
            since.push(at);
            before = at;
        }
    }
    for daemon in [plain, logging] {
        engine.expect_no_pool(daemon.pid);
        daemon.stop().await;
    }
    let mut stages: Vec<Stage> = stages
        .into_iter()
        // What few jobs pass is a matter of chance.
        .filter(|(_, (took, _))| took.len() > with.len() / 2)
        .map(|(name, (took, at))| Stage {
            name,
            took: Samples::from_values(took),
            at: Samples::from_values(at),
        })
        .collect();
    stages.sort_by(|a, b| a.at.median().total_cmp(&b.at.median()));
    Ok(Breakdown {
        delivery,
        jobs: with.len(),
        plain: Samples::of(&without),
        logged: Samples::of(&with),
        stages,
    })
}

/// The points one job passed, and when in microseconds since its publishing.
async fn passed(daemon: &mut Daemon, published: jiff::Timestamp) -> Result<Vec<(String, f64)>> {
    let mut passed: Vec<(String, f64)> = Vec::new();
    // Everything has been logged by now; the lines may still be on their way through the pipe.
    while let Ok(Some(line)) =
        tokio::time::timeout(Duration::from_millis(20), daemon.stages.recv()).await
    {
        let line: serde_json::Value = serde_json::from_str(&line)?;
        let at: jiff::Timestamp = line["timestamp"].as_str().context("timestamp")?.parse()?;
        let name = line["fields"]["message"].as_str().context("message")?;
        let at = (at.as_nanosecond() - published.as_nanosecond()) as f64 / 1e3;
        if at >= 0.0 && passed.iter().all(|(known, _)| known != name) {
            passed.push((name.to_owned(), at));
        }
    }
    Ok(passed)
}

/// The same with the result's arrival in its place.
fn with_result(mut passed: Vec<(String, f64)>, result: f64) -> Vec<(String, f64)> {
    passed.push(("**result received**".to_owned(), result));
    passed.sort_by(|a, b| a.1.total_cmp(&b.1));
    passed
}
