//! The figures as Markdown: ratios and their verdicts first, the absolute times after them.

use std::fmt::Write;

use crate::durability::{self, Durability, Figures, Round};
use crate::stats::Samples;
use crate::{Block, Contender, DaemonFigures, Kind, Measured, warm_report};

/// What page-sized noise may add to the resident memory between two readings.
const MEMORY_NOISE_KIB: u64 = 512;

pub(crate) struct Ratio {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Ratio {
    pub(crate) fn over(rounds: impl Iterator<Item = f64>) -> Self {
        let all = Samples::from_values(rounds.collect());
        Self { median: all.median(), low: all.min(), high: all.max() }
    }
}

pub(crate) fn markdown(measured: &Measured) -> String {
    let mut out = String::new();
    let _ = write!(out, "Environment: {}.", measured.environment);
    if measured.rounds > 0 {
        let _ = write!(out, " {} rounds.", measured.rounds);
    }
    let _ = writeln!(out, "\n");
    for breakdown in &measured.breakdown {
        warm_report::breakdown(&mut out, breakdown);
    }
    if measured.breakdown.is_empty() {
        goals(&mut out, measured);
    }
    if !measured.blocks.is_empty() {
        table(&mut out, measured);
        ratios(&mut out, measured);
        daemon(&mut out, measured);
    }
    if let Some(warm) = &measured.warm {
        warm_report::tables(&mut out, warm);
    }
    if let Some(durability) = &measured.durability {
        deliveries(&mut out, durability);
    }
    let _ = writeln!(
        out,
        "Jobs lost: {}. Jobs with a wrong result: {}.",
        measured.lost, measured.wrong
    );
    out
}

fn goals(out: &mut String, m: &Measured) {
    let _ = writeln!(out, "| goal | limit | measured | verdict |\n|---|---|---|---|");
    let mut row = |goal: &str, limit: String, value: String, met: Option<bool>| {
        let verdict = match met {
            Some(true) => "met",
            Some(false) => "**not met**",
            None if limit == "reported" => "–",
            None => "not measured",
        };
        let _ = writeln!(out, "| {goal} | {limit} | {value} | {verdict} |");
    };
    if !m.blocks.is_empty() {
        contenders(m, &mut row);
    }
    if m.warm.is_some() {
        warm_report::goals(m, &mut row);
    }
    if let Some(d) = &m.durability {
        durable(d, &mut row);
    }
    let _ = writeln!(
        out,
        "\nA ratio is the median over the rounds of the ratio within one round; in brackets, the lowest and the \
         highest.\n"
    );
}

/// What takes a row of the goals: the goal, its limit, what was measured, and whether that is met.
pub(crate) type Row<'a> = &'a mut dyn FnMut(&str, String, String, Option<bool>);

fn contenders(m: &Measured, row: Row<'_>) {
    // Whole cycle against whole cycle: what a caller waits for, whichever way.
    let against = [
        ("`docker run --rm`", Contender::Run, 0.45),
        ("`docker run --rm --network none`", Contender::RunNoNetwork, 0.65),
        ("the floor", Contender::Bare, 1.05),
    ];
    for (other, contender, limit) in against {
        for (how, daemon) in [
            ("worker idle before each job", Contender::DaemonIdle),
            ("back to back", Contender::Daemon),
        ] {
            if !m.blocks.contains_key(&(contender, 1)) || !m.blocks.contains_key(&(daemon, 1)) {
                continue;
            }
            let ratio = latency_ratio(m, daemon, contender, 1);
            row(
                &format!("p50 against {other}, 1 in parallel, {how}"),
                format!("≤ {limit}"),
                show(ratio.as_ref()),
                ratio.map(|r| r.median <= limit),
            );
        }
    }
    if m.blocks.contains_key(&(Contender::RunNoNetwork, 8)) {
        let ratio = throughput_ratio(m, Contender::Daemon, Contender::RunNoNetwork, 8);
        row(
            "jobs/s against `docker run --rm --network none`, 8 in parallel",
            "≥ 1.45".to_owned(),
            show(ratio.as_ref()),
            ratio.map(|r| r.median >= 1.45),
        );
    }
    for d in &m.daemons {
        let is_cold = d.kind == Kind::Cold;
        row(
            &format!("the daemon's own CPU per job, {}", which(d)),
            if is_cold { "< 2 ms" } else { "reported" }.to_owned(),
            format!(
                "{:.2} ms over {} jobs; {:.1} ms a second when idle",
                d.cpu_ms_per_job, d.cpu_jobs, d.idle_cpu_ms
            ),
            is_cold.then_some(d.cpu_ms_per_job < 2.0),
        );
    }
    let memory: Vec<_> = m.daemons.iter().flat_map(|d| &d.memory).collect();
    if let Some((jobs, usage)) = memory.first() {
        row(
            &format!("resident after {jobs} jobs"),
            "< 30 MiB".to_owned(),
            mib(usage.resident_kib),
            Some(usage.resident_kib < 30 * 1024),
        );
    }
    if let (Some((early, first)), Some((late, last))) =
        (memory.first(), memory.get(1..).and_then(<[_]>::last))
    {
        row(
            &format!("resident after {late} jobs"),
            format!("no more than after {early} (+0.5 MiB)"),
            mib(last.resident_kib),
            Some(last.resident_kib <= first.resident_kib + MEMORY_NOISE_KIB),
        );
    }
    if let Some(b) = &m.burst {
        row(
            &format!("burst of {}, MAX_CONTAINERS={}", b.jobs, b.slots),
            "none lost".to_owned(),
            format!(
                "{} lost, {} wrong; {:.0} s, {:.1} jobs/s, resident {} (peak {})",
                b.lost,
                b.wrong,
                b.took.as_secs_f64(),
                (b.jobs - b.lost) as f64 / b.took.as_secs_f64(),
                mib(b.usage.resident_kib),
                mib(b.usage.peak_kib),
            ),
            Some(b.lost == 0 && b.wrong == 0),
        );
    }
}

fn durable(d: &Durability, row: Row<'_>) {
    let Durability { core, jetstream, .. } = d;
    let ratio = over_rounds(d, |core, jetstream| jetstream.jobs_per_second / core.jobs_per_second);
    row(
        &format!(
            "jobs/s with `DELIVERY=jetstream` against `core`, {} published at once, MAX_CONTAINERS={}",
            durability::BURST,
            durability::SLOTS
        ),
        "≥ 0.95".to_owned(),
        show(Some(&ratio)),
        Some(ratio.median >= 0.95),
    );
    let added = over_rounds(d, |core, jetstream| {
        jetstream.around_engine.median() - core.around_engine.median()
    });
    row(
        "p50 added by durability, publish to result without the engine's part, worker idle before each job",
        "reported".to_owned(),
        format!("{:.1} ms ({:.1}–{:.1})", added.median, added.low, added.high),
        None,
    );
    row(
        &format!(
            "the daemon's own CPU per job with `DELIVERY=jetstream`, MAX_CONTAINERS={}",
            durability::SLOTS
        ),
        "< 2 ms".to_owned(),
        format!(
            "{:.2} ms over {} jobs (core: {:.2} ms); {:.1} ms a second when idle (core: {:.1} ms)",
            jetstream.cpu_ms_per_job,
            jetstream.jobs,
            core.cpu_ms_per_job,
            jetstream.idle_cpu_ms,
            core.idle_cpu_ms,
        ),
        Some(jetstream.cpu_ms_per_job < 2.0),
    );
    row(
        &format!("resident after {} jobs with `DELIVERY=jetstream`", jetstream.jobs),
        "< 30 MiB".to_owned(),
        format!("{} (core: {})", mib(jetstream.usage.resident_kib), mib(core.usage.resident_kib)),
        Some(jetstream.usage.resident_kib < 30 * 1024),
    );
}

fn over_rounds(d: &Durability, of: impl Fn(&Round, &Round) -> f64) -> Ratio {
    let rounds = d.core.rounds.iter().zip(&d.jetstream.rounds);
    Ratio::over(rounds.map(|(core, jetstream)| of(core, jetstream)))
}

fn deliveries(out: &mut String, d: &Durability) {
    let _ = writeln!(
        out,
        "\nWhat durable delivery costs, {} rounds, streams on {}:\n\n\
         | `DELIVERY` | jobs/s, {} at once | jobs one at a time | p50 ms | p90 ms | p99 ms | without the engine's part, \
         p50 ms | p90 ms | request stored, p50 ms | p99 ms | nats-server's CPU per job |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        d.core.rounds.len(),
        d.file_system,
        durability::BURST,
    );
    for figures in [&d.core, &d.jetstream] {
        let Figures { rounds, confirmed, .. } = figures;
        let rates = Samples::from_values(rounds.iter().map(|r| r.jobs_per_second).collect());
        let (mut latency, mut around) = (Samples::default(), Samples::default());
        for round in rounds {
            latency.absorb(&round.latency);
            around.absorb(&round.around_engine);
        }
        let stored = |p| {
            if confirmed.len() > 0 {
                format!("{:.1}", confirmed.percentile(p))
            } else {
                "–".to_owned()
            }
        };
        let _ = writeln!(
            out,
            "| {} | {:.1} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {} | {} | {:.2} ms |",
            figures.delivery.name(),
            rates.median(),
            latency.len(),
            latency.percentile(50.0),
            latency.percentile(90.0),
            latency.percentile(99.0),
            around.percentile(50.0),
            around.percentile(90.0),
            stored(50.0),
            stored(99.0),
            figures.nats_cpu_ms_per_job,
        );
    }
    let _ = writeln!(out);
}

fn table(out: &mut String, m: &Measured) {
    let _ = writeln!(
        out,
        "| contender | in parallel | jobs | warm | p50 ms | p90 ms | p99 ms | jobs/s |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|"
    );
    for parallel in crate::PARALLEL {
        for contender in Contender::all() {
            let Some(blocks) = m.blocks.get(&(contender, parallel)) else {
                continue;
            };
            let latency = pooled(blocks, |b| &b.latency);
            let hits = contender.counts_hits().then(|| blocks.iter().map(|b| b.hits).sum());
            // Pausing between jobs is what the idle daemon is about: its rate says nothing.
            let rate = if contender.pauses(parallel) {
                "–".to_owned()
            } else {
                let rates = blocks.iter().map(rate).collect();
                format!("{:.1}", Samples::from_values(rates).median())
            };
            line(out, name(contender, parallel), parallel, &latency, hits, &rate);
            let to_result = pooled(blocks, |b| &b.to_result);
            if to_result.len() > 0 && contender != Contender::DaemonIdle {
                line(
                    out,
                    &format!("{}, to the result", name(contender, parallel)),
                    parallel,
                    &to_result,
                    None,
                    "–",
                );
            }
        }
    }
    let _ = writeln!(out);
}

fn line(
    out: &mut String,
    name: &str,
    parallel: usize,
    latency: &Samples,
    hits: Option<usize>,
    rate: &str,
) {
    let hits = hits.map_or_else(|| "–".to_owned(), |hits| hits.to_string());
    let _ = writeln!(
        out,
        "| {name} | {parallel} | {} | {hits} | {:.1} | {:.1} | {:.1} | {rate} |",
        latency.len(),
        latency.percentile(50.0),
        latency.percentile(90.0),
        latency.percentile(99.0),
    );
}

fn ratios(out: &mut String, m: &Measured) {
    if !m.blocks.contains_key(&(Contender::Bare, 1)) {
        return;
    }
    let _ =
        writeln!(out, "| the daemon against | in parallel | p50 | jobs/s |\n|---|---:|---:|---:|");
    for parallel in crate::PARALLEL {
        for other in
            [Contender::Run, Contender::RunNoNetwork, Contender::Bare, Contender::BareConfined]
        {
            let (Some(latency), Some(rate)) = (
                latency_ratio(m, Contender::Daemon, other, parallel),
                throughput_ratio(m, Contender::Daemon, other, parallel),
            ) else {
                continue;
            };
            let _ = writeln!(
                out,
                "| {} | {parallel} | {} | {} |",
                name(other, parallel),
                show(Some(&latency)),
                show(Some(&rate))
            );
        }
    }
    // Stricter than the goal, which takes the floor with its removal: what the daemon adds.
    for floor in [Contender::Bare, Contender::BareConfined] {
        let added = ratio(m, Contender::DaemonIdle, floor, 1, |b| b.to_result.median());
        if added.is_some() {
            let _ = writeln!(
                out,
                "| {}, to the result (worker idle) | 1 | {} | – |",
                name(floor, 1),
                show(added.as_ref())
            );
        }
    }
    let _ = writeln!(out);
    let confinement = ratio(m, Contender::BareConfined, Contender::Bare, 1, |b| b.latency.median());
    if confinement.is_some() {
        let _ = writeln!(
            out,
            "What confinement costs the bare sequence, p50: {}.\n",
            show(confinement.as_ref())
        );
    }
}

fn daemon(out: &mut String, m: &Measured) {
    for d in &m.daemons {
        for (jobs, usage) in &d.memory {
            let _ = writeln!(
                out,
                "Daemon with {} after {jobs} jobs: resident {}, peak {}, {} threads.",
                which(d),
                mib(usage.resident_kib),
                mib(usage.peak_kib),
                usage.threads
            );
        }
    }
}

fn which(d: &DaemonFigures) -> String {
    let slots = d.slots;
    match d.kind {
        Kind::Cold => format!("MAX_CONTAINERS={slots}"),
        Kind::Warm => format!("MAX_CONTAINERS={slots}, as many wait"),
        Kind::WarmJetStream => {
            format!("MAX_CONTAINERS={slots}, as many wait, `DELIVERY=jetstream`")
        }
    }
}

fn name(contender: Contender, parallel: usize) -> &'static str {
    match contender {
        Contender::Warm if parallel == 1 => "worker-spawner, warm, the pool full before each job",
        Contender::Warm => "worker-spawner, warm, publish to result",
        Contender::WarmJetStream => {
            "worker-spawner, warm, `DELIVERY=jetstream`, the pool full before each job"
        }
        Contender::WarmBurst => "worker-spawner, warm, 5 requests at once on a full pool",
        Contender::Daemon => "worker-spawner, publish to result",
        Contender::DaemonIdle => "worker-spawner, idle before each job",
        Contender::Run => "`docker run --rm`",
        Contender::RunNoNetwork => "`docker run --rm --network none`",
        Contender::Bare => "bare API sequence (the floor)",
        Contender::BareConfined => "bare API sequence, confined",
    }
}

fn pooled(blocks: &[Block], of: impl Fn(&Block) -> &Samples) -> Samples {
    let mut all = Samples::default();
    for block in blocks {
        all.absorb(of(block));
    }
    all
}

fn rate(block: &Block) -> f64 {
    block.latency.len() as f64 / block.wall.as_secs_f64()
}

pub(crate) fn latency_ratio(
    m: &Measured,
    a: Contender,
    b: Contender,
    parallel: usize,
) -> Option<Ratio> {
    ratio(m, a, b, parallel, |block| block.latency.median())
}

pub(crate) fn throughput_ratio(
    m: &Measured,
    a: Contender,
    b: Contender,
    parallel: usize,
) -> Option<Ratio> {
    ratio(m, a, b, parallel, rate)
}

fn ratio(
    m: &Measured,
    a: Contender,
    b: Contender,
    parallel: usize,
    of: impl Fn(&Block) -> f64,
) -> Option<Ratio> {
    let (a, b) = (m.blocks.get(&(a, parallel))?, m.blocks.get(&(b, parallel))?);
    Some(Ratio::over(a.iter().zip(b).map(|(a, b)| of(a) / of(b))))
}

pub(crate) fn show(ratio: Option<&Ratio>) -> String {
    ratio
        .map_or_else(|| "–".to_owned(), |r| format!("{:.2} ({:.2}–{:.2})", r.median, r.low, r.high))
}

fn mib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}
