use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::*;
use crate::job::{JobId, Outcome, StartKind, Status, Timings};

fn outcome(start: Option<StartKind>) -> Outcome {
    let took = |millis| Some(Duration::from_millis(millis));
    let now = SystemTime::now();
    Outcome {
        id: JobId::new(),
        image: Some("secret/image:1".to_owned()),
        exit_code: Some(0),
        start,
        started_at: Some(now),
        timings: Timings {
            queue: took(1),
            pull: took(2),
            create: took(3),
            start: took(4),
            run: took(5),
            total: took(15),
        },
        ..Outcome::bare(Status::Succeeded, now)
    }
}

fn rendered(format: Format, tell: impl Fn(&Metrics)) -> String {
    let metrics = Metrics::default();
    let exposition = Exposition::new(&metrics);
    exposition.observe(|readings| {
        readings.ready = true;
        readings.slots = Some(5);
    });
    exposition.observe(|readings| readings.queued = Some(vec![("high", 7)]));
    tell(&metrics);
    exposition.render(format).unwrap_or_default()
}

fn assert_lines(text: &str, wanted: &[&str]) {
    let lines: BTreeSet<&str> = text.lines().collect();
    for line in wanted {
        assert!(lines.contains(line), "no line {line} in\n{text}");
    }
}

#[test]
fn what_is_told_and_what_is_read_is_shown() {
    let text = rendered(Format::OpenMetrics, |metrics| {
        metrics.ended(&outcome(Some(StartKind::Warm)));
        metrics.ended(&outcome(None));
        metrics.published(Duration::from_millis(6));
        metrics.retried();
        metrics.buried();
        std::mem::forget(metrics.running());
        drop(metrics.caller_waits());
    });
    assert_lines(
        &text,
        &[
            concat!("worker_spawner_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "# TYPE worker_spawner_jobs counter",
            "worker_spawner_jobs_total{status=\"succeeded\",code=\"none\"} 2",
            "worker_spawner_jobs_total{status=\"error\",code=\"busy\"} 0",
            "worker_spawner_starts_total{start=\"warm\"} 1",
            "worker_spawner_starts_total{start=\"cold\"} 0",
            "worker_spawner_retries_total 1",
            "worker_spawner_dead_letters_total 1",
            "# UNIT worker_spawner_run_seconds seconds",
            "worker_spawner_run_seconds_count 1",
            "worker_spawner_run_seconds_sum 0.005",
            "worker_spawner_run_seconds_bucket{le=\"0.0025\"} 0",
            "worker_spawner_run_seconds_bucket{le=\"0.005\"} 1",
            "worker_spawner_run_seconds_bucket{le=\"+Inf\"} 1",
            "worker_spawner_start_seconds_count{start=\"warm\"} 1",
            "worker_spawner_create_seconds_count 0",
            "worker_spawner_publish_seconds_count 1",
            "worker_spawner_jobs_running 1",
            "worker_spawner_requests_waiting{subject=\"run\"} 0",
            "worker_spawner_ready 1",
            "worker_spawner_slots 5",
            "worker_spawner_queue_requests{priority=\"high\"} 7",
            "# EOF",
        ],
    );
    assert!(!text.contains("secret"), "an image's name is no label:\n{text}");
    assert!(!text.contains("engine_up"), "what nobody reads is absent:\n{text}");
}

#[test]
fn the_older_form_has_no_words_of_the_newer_one() {
    let text = rendered(Format::Prometheus, |_| {});
    assert_lines(&text, &["# TYPE worker_spawner_jobs_total counter"]);
    assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
}

#[test]
fn nothing_is_shown_twice() {
    let text = rendered(Format::OpenMetrics, |metrics| metrics.ended(&outcome(None)));
    let mut seen = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let name = line.split(' ').next().unwrap_or_default();
        assert!(seen.insert(name), "{name} comes twice");
    }
    let mut seen = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let series = line.rsplit_once(' ').unwrap_or_default().0;
        assert!(seen.insert(series), "{series} comes twice");
    }
}
