//! Faults without end, and a ledger in the end: what was accepted has an outcome or a dead letter,
//! what happened twice can be told, no more ran than may, and nothing is left.
//!
//! Three daemons on a NATS server and an engine of their own. While jobs are published, the servers
//! and the daemons are killed, frozen, cut off, filled up and started again, as a [`plan`] says that
//! follows from a seed. Then everything is healed, and once the queue is empty the [`ledger`] is
//! drawn up.
//!
//! WORKER_SPAWNER_CHAOS_SEED repeats a plan, WORKER_SPAWNER_CHAOS_SECONDS says how long the faults
//! last, WORKER_SPAWNER_CHAOS_NATS=current takes the current NATS server.

mod chronicle;
mod ledger;
#[cfg(test)]
mod ledger_tests;
mod load;
mod observe;
mod plan;
mod random;
mod rig;

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::chronicle::Chronicle;
use self::ledger::{CLEAN_END, History, Violation};
use self::load::{Jobs, Load};
use self::observe::Observer;
use self::plan::{Fault, Plan};
use self::random::Random;
use self::rig::{MAX_DELIVER, Rig};
use crate::support::fleet::server_version;
use crate::support::process::Signal;
use crate::support::streams::{ADVISORIES, QUEUE, RESULTS, Streams};

/// How long the queue may stand still in the end before it counts as stuck.
const STUCK: Duration = Duration::from_secs(120);
/// How long what is left over may take to go.
const CLEAN_UP: Duration = Duration::from_secs(90);
/// How long a shim may outlive its container.
const SHIM: Duration = Duration::from_secs(10);
/// Between two looks in the quiet period.
const LOOK: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_every_accepted_job_ends_once_or_is_buried_with_a_reason() {
    let seconds = number("WORKER_SPAWNER_CHAOS_SECONDS").unwrap_or(100);
    let seed = number("WORKER_SPAWNER_CHAOS_SEED")
        .unwrap_or_else(|| u64::from(uuid::Uuid::now_v7().as_u64_pair().1 as u32));
    let plan = Plan::new(seed, Duration::from_secs(seconds));
    println!(
        "{plan}\nagain: WORKER_SPAWNER_CHAOS_SEED={seed} WORKER_SPAWNER_CHAOS_SECONDS={seconds}"
    );
    // Each second leaves about half a dozen results, some of them large.
    let room = (96 << 20) + usize::try_from(seconds).unwrap() * (192 << 10);
    let chronicle = Chronicle::begin();
    let mut rig = Rig::start(&chronicle, server_version(), room).await;
    let history = run(&mut rig, &plan, &chronicle).await;
    let servers = rig.logs();
    // What the daemons print themselves when a test fails is here in better order.
    drop(rig);
    let violations = history.violations();
    println!("{}", summary(&plan, &history, &chronicle));
    if !violations.is_empty() {
        println!("{}", account(&plan, &violations, &chronicle, &servers));
    }
    assert!(violations.is_empty(), "{} violations, see above; seed {seed}", violations.len());
}

async fn run(rig: &mut Rig, plan: &Plan, chronicle: &Chronicle) -> History {
    let observer = Observer::begin(&rig.observed, &rig.streams, chronicle).await;
    let begun = chronicle.elapsed();
    let plan = plan.later_by(begun);
    let (healed, over) = (CancellationToken::new(), CancellationToken::new());
    let load = Load {
        streams: rig.streams.clone(),
        image: rig.image.clone(),
        chronicle: chronicle.clone(),
        jobs: Jobs::default(),
        enough: CancellationToken::new(),
        over: CancellationToken::new(),
    };
    let (jobs, enough, given_up) = (load.jobs.clone(), load.enough.clone(), load.over.clone());
    let publishing = tokio::spawn(load.run(Random::new(plan.seed).fork()));
    let streams = rig.streams.clone();
    let course = async {
        chronicle.sleep_until(begun + plan.duration).await;
        enough.cancel();
        healed.cancelled().await;
        chronicle.note("all is healed");
        // Those that are not accepted by a server that is well are not going to be.
        let publishing = async { publishing.await.unwrap() };
        tokio::pin!(publishing);
        if tokio::time::timeout(STUCK, &mut publishing).await.is_err() {
            given_up.cancel();
            publishing.await;
        }
        chronicle.note("all is published");
        let stuck = quiet(&streams).await;
        chronicle.note("the queue is at rest");
        over.cancel();
        stuck
    };
    let ((), stuck) = tokio::join!(rig.drive(&plan, &healed, &over), course);
    let mut history = History {
        max_deliver: MAX_DELIVER,
        jobs: jobs.all(),
        leftovers: stuck,
        ..History::default()
    };
    end(rig, &mut history, chronicle).await;
    history.stored = patiently("the results", || observe::outcomes(&rig.streams)).await;
    history.dead_letters = patiently("dead letters", || observe::dead_letters(&rig.streams)).await;
    history.records = patiently("records", || observe::records(&rig.streams, &history.jobs)).await;
    history.heard = observer.heard();
    history.containers = observer.runs.all();
    history.overruns = observer.overruns();
    history.deaths = chronicle.deaths();
    history
}

/// Waits until the queue is empty; if nothing moves for too long, says what is left in it.
async fn quiet(streams: &Streams) -> Vec<String> {
    let mut last = None;
    let mut moved = Instant::now();
    loop {
        let counts =
            tokio::join!(streams.count(QUEUE), streams.count(ADVISORIES), streams.count(RESULTS));
        if let (Ok(0), Ok(0), _) = counts {
            return Vec::new();
        }
        if last.as_ref() != Some(&counts) {
            moved = Instant::now();
            last = Some(counts);
        } else if moved.elapsed() > STUCK {
            return observe::stuck(streams).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Ends the daemons, and looks at what is left.
async fn end(rig: &mut Rig, history: &mut History, chronicle: &Chronicle) {
    let with_daemons = settled(|| async {
        let left = observe::left_in(&rig.observed).await;
        // What an instance keeps for itself is no job's.
        left.map(|left| left.into_iter().filter(|what| what.starts_with("container")).collect())
    })
    .await;
    history
        .leftovers
        .extend(with_daemons.into_iter().map(|what| format!("{what}, by the daemons")));
    for (number, kept) in rig.daemons.iter_mut().enumerate() {
        kept.daemon.signal(Signal::TERM);
        let status = kept.daemon.exit().await;
        let end = if status.code() == Some(0) { CLEAN_END.to_string() } else { status.to_string() };
        history.ends.push((number, end));
    }
    let after = settled(|| async {
        let mut left = observe::left_in(&rig.observed).await?;
        left.extend(rig.processes());
        Ok(left)
    })
    .await;
    let shims = settled_within(SHIM, || async { Ok(rig.shims()) }).await;
    // An engine that is killed while it makes a container forgets what it had begun, and neither the
    // engine nor anybody else knows of it any more: the shim stays, with nothing in it, or with the
    // process that waits for the word to become the function and will never get it.
    let engine_was_killed = chronicle.faults().contains_key(&Fault::EngineKilled.to_string());
    let (begun, after): (Vec<_>, Vec<_>) =
        after.into_iter().partition(|what| engine_was_killed && what.ends_with(": runc init"));
    history.leftovers.extend(after);
    if engine_was_killed {
        history.forgotten = shims.into_iter().chain(begun).collect();
    } else {
        history.leftovers.extend(shims);
    }
}

/// What is left when nothing more goes.
async fn settled<F: Future<Output = Result<Vec<String>, String>>>(
    look: impl Fn() -> F,
) -> Vec<String> {
    settled_within(CLEAN_UP, look).await
}

async fn settled_within<F: Future<Output = Result<Vec<String>, String>>>(
    patience: Duration,
    look: impl Fn() -> F,
) -> Vec<String> {
    let deadline = Instant::now() + patience;
    loop {
        let left = look().await;
        match left {
            Ok(left) if left.is_empty() || Instant::now() > deadline => return left,
            Err(trouble) if Instant::now() > deadline => return vec![trouble],
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Asks a server that is well until it answers.
async fn patiently<T, F: Future<Output = Result<T, String>>>(what: &str, ask: impl Fn() -> F) -> T {
    let mut trouble = String::new();
    for _ in 0..20 {
        match ask().await {
            Ok(answer) => return answer,
            Err(why) => trouble = why,
        }
        tokio::time::sleep(LOOK).await;
    }
    panic!("{what} cannot be read: {trouble}");
}

fn summary(plan: &Plan, history: &History, chronicle: &Chronicle) -> String {
    let faults: Vec<String> = chronicle
        .faults()
        .into_iter()
        .map(|(fault, times)| format!("    {fault:<44}{times:>4}"))
        .collect();
    let took = chronicle.elapsed().as_secs();
    format!(
        "ledger of seed {}, {} s of load, {took} s in all\n{}\n  faults\n{}",
        plan.seed,
        plan.duration.as_secs(),
        history.summary(),
        faults.join("\n")
    )
}

/// All that is known of what went wrong. The whole story goes to files.
fn account(
    plan: &Plan,
    violations: &[Violation],
    chronicle: &Chronicle,
    servers: &[(&str, String)],
) -> String {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{}", plan.seed));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("chronicle"), format!("{plan}\n{}", chronicle.text())).unwrap();
    for (whose, log) in chronicle.logs() {
        std::fs::write(dir.join(whose), log).unwrap();
    }
    for (whose, log) in servers {
        std::fs::write(dir.join(whose), log).unwrap();
    }
    let mut text = format!("{} violations; logs are in {}\n", violations.len(), dir.display());
    for (n, violation) in violations.iter().enumerate() {
        text.push_str(&format!("- {violation}\n"));
        // The first few show what there is to see.
        if let Some(id) = violation.id.as_ref().filter(|_| n < 10) {
            text.push_str(&chronicle.of(id));
        }
    }
    text
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is no number: {value}")))
}
