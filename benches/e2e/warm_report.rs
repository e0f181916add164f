//! What containers that wait are good for, as Markdown.

use std::fmt::Write;

use crate::breakdown::Breakdown;
use crate::report::{self, Ratio, Row, show};
use crate::stats::Samples;
use crate::warm::{self, Closed, Paced, Python, Warm};
use crate::{Contender, Measured};

pub(crate) fn goals(m: &Measured, row: Row<'_>) {
    let warm = Contender::Warm;
    let against = [
        ("`docker run --rm`", Contender::Run, 60.0),
        ("the daemon's own cold path, worker idle before each job", Contender::DaemonIdle, 40.0),
        ("the daemon's own cold path, worker idle before each job", Contender::DaemonIdle, 100.0),
    ];
    for (other, contender, times) in against {
        let Some(ratio) = report::latency_ratio(m, warm, contender, 1) else { continue };
        row(
            &format!("p50 of a warm start against {other}, 1 in parallel"),
            format!("≤ 1/{times}"),
            inverse(Some(&ratio)),
            Some(ratio.median <= 1.0 / times),
        );
    }
    if let Some(ratio) = report::throughput_ratio(m, warm, Contender::Daemon, 8) {
        row(
            "jobs/s with containers that wait against without, 8 in parallel",
            "≥ 1".to_owned(),
            show(Some(&ratio)),
            Some(ratio.median >= 1.0),
        );
    }
    let Some(measured) = &m.warm else { return };
    if let Some(Paced { latency, .. }) = measured.paced.iter().find(|paced| paced.rate == 5) {
        let times = latency.percentile(99.0) / latency.median();
        row(
            "p99 against p50, 5 requests a second",
            "≤ 4".to_owned(),
            format!("{times:.1}"),
            Some(times <= 4.0),
        );
    }
    match &measured.python {
        Some(Ok(python)) => {
            let ratio = python_ratio(python);
            row(
                "p50 of `python3 -c 'print(1)'` against its start in a container that runs",
                "≤ 1.15".to_owned(),
                show(Some(&ratio)),
                Some(ratio.median <= 1.15),
            );
        }
        Some(Err(why)) => {
            row("an interpreter", "≤ 1.15".to_owned(), format!("skipped: {why}"), None);
        }
        None => {}
    }
}

pub(crate) fn tables(out: &mut String, warm: &Warm) {
    for failed in &warm.failed {
        let _ = writeln!(out, "**Not measured**: {failed}.\n");
    }
    paced(out, warm);
    many(out, warm);
    if let Some(Ok(python)) = &warm.python {
        let (function, reference) = (pooled(&python.warm), pooled(&python.reference));
        let _ = writeln!(
            out,
            "`python3 -c 'print(1)'`, publish to result: p50 {:.1} ms, p99 {:.1} ms ({} jobs, {} warm). The same start in \
             a container that runs: p50 {:.1} ms, p99 {:.1} ms. Ratio {}.\n",
            function.median(),
            function.percentile(99.0),
            function.len(),
            python.hits,
            reference.median(),
            reference.percentile(99.0),
            show(Some(&python_ratio(python))),
        );
    }
    limits(out, warm);
    idle(out, warm);
    creations(out, warm);
}

fn paced(out: &mut String, warm: &Warm) {
    let _ = writeln!(
        out,
        "A steady load, {} containers wait, each request's clock running from when it was due:\n\n\
         | requests/s | jobs | warm | p50 ms | p90 ms | p99 ms | most ms |\n|---:|---:|---:|---:|---:|---:|---:|",
        warm::SLOTS,
    );
    for paced in &warm.paced {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {:.1} |",
            paced.rate,
            paced.latency.len(),
            share(paced.hits, paced.latency.len()),
            percentiles(&paced.latency),
            paced.latency.max(),
        );
    }
    let _ = writeln!(out);
}

fn many(out: &mut String, warm: &Warm) {
    let _ = writeln!(
        out,
        "{} images, at most {} containers wait:\n\n\
         | order | load | jobs | warm | p50 ms | p90 ms | p99 ms | jobs/s |\n|---|---|---:|---:|---:|---:|---:|---:|",
        warm::IMAGES,
        warm::POOL,
    );
    for many in &warm.many {
        let order = many.order.name();
        let Paced { rate, latency, hits } = &many.paced;
        let _ = writeln!(
            out,
            "| {order} | {rate} a second | {} | {} | {} | – |",
            latency.len(),
            share(*hits, latency.len()),
            percentiles(latency),
        );
        for (name, closed) in
            [("8 in parallel", &many.warm), ("8 in parallel, none wait", &many.cold)]
        {
            let Closed { latency, per_second, hits } = closed;
            let _ = writeln!(
                out,
                "| {order} | {name} | {} | {} | {} | {per_second:.1} |",
                latency.len(),
                share(*hits, latency.len()),
                percentiles(latency),
            );
        }
    }
    let _ = writeln!(out);
}

fn limits(out: &mut String, warm: &Warm) {
    let limits = &warm.limits;
    if limits.jobs == 0 {
        return;
    }
    let (changed, unchanged, cold) =
        (pooled(&limits.changed), pooled(&limits.unchanged), pooled(&limits.cold));
    let ratio = over(&limits.changed, &limits.cold);
    let _ = writeln!(
        out,
        "Other limits than a container has: p50 {:.1} ms ({} warm), against {:.1} ms where it has them and {:.1} ms where \
         it is made for the job, which is {}. The engine's call alone: p50 {:.1} ms, p99 {:.1} ms.\n",
        changed.median(),
        share(limits.hits, limits.jobs),
        unchanged.median(),
        cold.median(),
        inverse(Some(&ratio)),
        limits.call.median(),
        limits.call.percentile(99.0),
    );
}

fn idle(out: &mut String, warm: &Warm) {
    let Some(idle) = &warm.idle else {
        let _ =
            writeln!(out, "What a container costs that waits: not to be seen from this machine.\n");
        return;
    };
    let _ = writeln!(
        out,
        "What each of {} containers costs that wait, medians:\n\n\
         | process | resident | of that its own | CPU ms a second |\n|---|---:|---:|---:|\n\
         | the agent | {} | {} | {:.3} |\n| the engine's shim | {} | {} | {:.3} |\n\n\
         The daemon's own CPU, with all of them waiting: {:.2} ms a second.\n",
        idle.containers,
        kib(&idle.agent_resident_kib),
        kib(&idle.agent_own_kib),
        idle.agent_cpu_ms.median(),
        kib(&idle.shim_resident_kib),
        kib(&idle.shim_own_kib),
        idle.shim_cpu_ms.median(),
        idle.daemon_cpu_ms,
    );
}

fn creations(out: &mut String, warm: &Warm) {
    let _ = writeln!(
        out,
        "Containers that wait, made by the engine, some at once:\n\n\
         | at once | a second | each, p50 ms | p90 ms |\n|---:|---:|---:|---:|"
    );
    for creations in &warm.creations {
        let rates = Samples::from_values(creations.rates.clone());
        let _ = writeln!(
            out,
            "| {} | {:.1} ({:.1}–{:.1}) | {:.0} | {:.0} |",
            creations.parallel,
            rates.median(),
            rates.min(),
            rates.max(),
            creations.each.median(),
            creations.each.percentile(90.0),
        );
    }
    let _ = writeln!(
        out,
        "\nA byte to a container that waits, and back: p50 {:.2} ms, p99 {:.2} ms.\n",
        warm.line.median(),
        warm.line.percentile(99.0),
    );
}

pub(crate) fn breakdown(out: &mut String, breakdown: &Breakdown) {
    let Breakdown { delivery, jobs, plain, logged, stages } = breakdown;
    let _ = writeln!(
        out,
        "One warm start with `DELIVERY={}`, medians over {jobs} jobs. Publish to result: p50 {:.2} ms, with these points \
         logged {:.2} ms.\n\n\
         | point | since the one before, µs | p90 | since the publishing, µs |\n|---|---:|---:|---:|",
        delivery.name(),
        plain.median(),
        logged.median(),
    );
    for stage in stages {
        let _ = writeln!(
            out,
            "| {} | {:.0} | {:.0} | {:.0} |",
            stage.name,
            stage.took.median(),
            stage.took.percentile(90.0),
            stage.at.median(),
        );
    }
    let _ = writeln!(out);
}

fn python_ratio(python: &Python) -> Ratio {
    over(&python.warm, &python.reference)
}

/// The ratio of the medians within each round.
fn over(a: &[Samples], b: &[Samples]) -> Ratio {
    Ratio::over(a.iter().zip(b).map(|(a, b)| a.median() / b.median()))
}

fn pooled(rounds: &[Samples]) -> Samples {
    let mut all = Samples::default();
    rounds.iter().for_each(|round| all.absorb(round));
    all
}

fn percentiles(samples: &Samples) -> String {
    let [p50, p90, p99] = [50.0, 90.0, 99.0].map(|p| samples.percentile(p));
    format!("{p50:.1} | {p90:.1} | {p99:.1}")
}

fn share(hits: usize, jobs: usize) -> String {
    format!("{:.0} %", 100.0 * hits as f64 / jobs as f64)
}

fn kib(samples: &Samples) -> String {
    format!("{:.0} KiB", samples.median())
}

/// A small ratio, as one over how much.
fn inverse(ratio: Option<&Ratio>) -> String {
    ratio.map_or_else(
        || "–".to_owned(),
        |r| format!("1/{:.0} (1/{:.0}–1/{:.0})", 1.0 / r.median, 1.0 / r.low, 1.0 / r.high),
    )
}
