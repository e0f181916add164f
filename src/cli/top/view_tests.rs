#![allow(clippy::unwrap_used)]

use std::time::{Instant, SystemTime};

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::model::{Model, Queue};
use super::model_tests::{event, model, stats};
use super::plain;
use super::view::{Frills, draw};
use crate::protocol::time::parse_rfc3339;

fn now() -> SystemTime {
    parse_rfc3339("2030-01-01T00:01:00Z").unwrap()
}

/// What is drawn on so many columns and lines.
fn drawn(model: &Model, note: Option<&str>, columns: u16, lines: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    let frills = Frills { from: "functions at nats://localhost:4222", note, now: now() };
    terminal.draw(|frame| draw(frame, model, &frills)).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let line = |y: u16| -> String {
        let cells = (0..columns).map(|x| buffer[(x, y)].symbol());
        cells.collect::<String>().trim_end().to_owned()
    };
    (0..lines).map(line).collect()
}

fn busy() -> Model {
    let (mut model, at) = (model(), Instant::now());
    model.stats(&stats("host-a1", "functions", 2), at);
    model.stats(&stats("host-b2", "functions", 0), at);
    model.queue = Some(Queue { waiting: 12, taken: 2 });
    model.event(&event("order-17", "running", Some("host-a1"), "2030-01-01T00:00:30Z"), at);
    model.event(&event("order-18", "pulling", Some("host-a1"), "2030-01-01T00:00:59Z"), at);
    model.result(None, "succeeded", Some(120));
    model.result(None, "timed_out", Some(2500));
    model.turn(at);
    model
}

#[test]
fn it_fits_a_small_terminal() {
    let lines = drawn(&busy(), None, 80, 24);
    let text = lines.join("\n");
    assert!(lines[0].starts_with("worker-spawner top  functions at nats://localhost:4222"));
    assert!(lines[0].ends_with("q quits"), "{text}");
    assert_eq!(lines[1], "slots 2 of 10 in use   queue 12 waiting, 2 with workers");
    assert_eq!(lines[2], "ended succeeded 1  timed_out 1");
    assert!(lines[3].starts_with("outcomes 2.0/s"), "{text}");
    assert!(lines[3].contains("p50 120 ms") && lines[3].contains("p95 2.5 s"), "{text}");
    let line = |begin: &str| lines.iter().find(|line| line.starts_with(begin)).unwrap();
    let worker = line("host-a1").split_whitespace().collect::<Vec<_>>();
    assert_eq!(worker, ["host-a1", "2/5", "████░░░░░░", "jetstream", "12", "1", "0.1.0"]);
    let job = line("order-17").split_whitespace().collect::<Vec<_>>();
    assert_eq!(job, ["order-17", "busybox", "running", "30s", "host-a1"]);
    assert!(line("order-18").contains("pulling"), "{text}");
}

#[test]
fn any_size_is_drawn_on() {
    let mut model = busy();
    for number in 0..50 {
        let id = format!("job-{number}");
        let running = event(&id, "running", Some("host-a1"), "2030-01-01T00:00:40Z");
        model.event(&running, Instant::now());
        model.stats(&stats(&format!("worker-{number}"), "functions", 1), Instant::now());
    }
    for (columns, lines) in [(1, 1), (10, 3), (40, 10), (80, 24), (300, 100)] {
        drawn(&model, Some("a note"), columns, lines);
    }
    let text = drawn(&model, Some("a note"), 80, 24).join("\n");
    assert!(text.contains("and 47 more") && text.contains("not shown"), "{text}");
    assert!(text.ends_with("a note"), "{text}");
    let empty = drawn(&super::model_tests::model(), None, 80, 24).join("\n");
    assert!(empty.contains("no worker answers") && empty.contains("queue not known"), "{empty}");
}

#[test]
fn one_look_is_text() {
    let text = plain::text(&busy(), now());
    let wanted =
        "slots  2 of 10 in use\nqueue  12 waiting, 2 with workers\n\nWORKER   JOBS  DELIVERY";
    assert!(text.starts_with(wanted), "{text}");
    assert!(text.contains("\norder-17  busybox  running  30s  host-a1\n"), "{text}");
}
