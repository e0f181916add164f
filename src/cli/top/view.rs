//! How it is drawn.

use std::time::{Duration, SystemTime};

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Row, Sparkline, Table};

use super::model::{Job, Model};
use crate::cli::print;
use crate::cli::result::state_name;
use crate::job::printable;
use crate::protocol::record::State;

/// The most of a text that is drawn, in bytes.
const MAX_TEXT: usize = 256;
/// Over how many turns the numbers beside the lines are.
pub(super) const WINDOW: usize = 60;
/// The most workers that have a line.
const MAX_WORKERS: usize = 5;
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// What is drawn beside the model.
pub(super) struct Frills<'a> {
    /// Where the messages come from.
    pub(super) from: &'a str,
    /// What is wrong with that, if anything.
    pub(super) note: Option<&'a str>,
    pub(super) now: SystemTime,
}

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, frills: &Frills<'_>) {
    let workers = model.workers().len();
    let lines = u16::try_from(workers.clamp(1, MAX_WORKERS + 1)).unwrap_or(1);
    let areas = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(2),
        Constraint::Length(5),
        Constraint::Length(2 + lines),
        Constraint::Min(3),
        Constraint::Length(u16::from(frills.note.is_some())),
    ]);
    let [head, summary, charts, workers, jobs, note] = areas.areas(frame.area());
    draw_head(frame, head, frills);
    frame.render_widget(Paragraph::new(summary_lines(model)), summary);
    draw_charts(frame, charts, model);
    draw_workers(frame, workers, model);
    draw_jobs(frame, jobs, model, frills.now);
    if let Some(text) = frills.note {
        let style = Style::new().fg(Color::Red);
        frame.render_widget(Paragraph::new(printable(text, MAX_TEXT)).style(style), note);
    }
}

fn draw_head(frame: &mut Frame<'_>, area: Rect, frills: &Frills<'_>) {
    let [left, right] = Layout::horizontal([Constraint::Min(1), Constraint::Length(7)]).areas(area);
    let line = Line::from(vec![
        Span::styled("worker-spawner top", BOLD),
        Span::raw("  "),
        Span::styled(printable(frills.from, MAX_TEXT), DIM),
    ]);
    frame.render_widget(Paragraph::new(line), left);
    frame.render_widget(Paragraph::new(Line::from("q quits").right_aligned()).style(DIM), right);
}

fn summary_lines(model: &Model) -> Vec<Line<'static>> {
    let (used, all) = model.slots();
    let mut first = vec![
        Span::raw("slots "),
        Span::styled(format!("{used} of {all}"), BOLD),
        Span::raw(" in use   queue "),
    ];
    match model.queue {
        Some(queue) => {
            first.push(Span::styled(format!("{} waiting", queue.waiting), BOLD));
            first.push(Span::raw(format!(", {} with workers", queue.taken)));
        }
        None => first.push(Span::styled("not known", DIM)),
    }
    let mut second = vec![Span::raw("ended ")];
    if model.ended.is_empty() {
        second.push(Span::styled("none yet", DIM));
    }
    for (at, (status, count)) in model.ended.iter().enumerate() {
        let colour = if *status == "succeeded" { Color::Green } else { Color::Red };
        let gap = if at > 0 { "  " } else { "" };
        second.push(Span::raw(format!("{gap}{status} ")));
        second.push(Span::styled(count.to_string(), Style::new().fg(colour)));
    }
    vec![Line::from(first), Line::from(second)]
}

fn draw_charts(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let thirds: [Rect; 3] = Layout::horizontal([Constraint::Ratio(1, 3); 3]).spacing(1).areas(area);
    let width = usize::from(thirds[0].width);
    let latency = |percent| match model.latency(percent, WINDOW) {
        Some(ms) => duration(ms),
        None => "-".to_owned(),
    };
    let charts = [
        (format!("outcomes {:.1}/s", model.rate(WINDOW)), model.outcomes(width), Color::Green),
        (format!("p50 {}", latency(50)), model.latencies(50, width), Color::Cyan),
        (format!("p95 {}", latency(95)), model.latencies(95, width), Color::Yellow),
    ];
    for ((title, data, colour), area) in charts.into_iter().zip(thirds) {
        // The latest is always at the right.
        let missing = width.saturating_sub(data.len());
        let data: Vec<u64> = std::iter::repeat_n(0, missing).chain(data).collect();
        let chart =
            Sparkline::default().block(titled(title)).data(&data).style(Style::new().fg(colour));
        frame.render_widget(chart, area);
    }
}

fn draw_workers(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let count = model.workers().len();
    let block = titled(format!("workers {count}"));
    if count == 0 {
        let text = Paragraph::new("no worker answers").style(DIM).block(block);
        frame.render_widget(text, area);
        return;
    }
    let mut rows: Vec<Row<'_>> = model
        .workers()
        .take(MAX_WORKERS)
        .map(|worker| {
            Row::new([
                printable(&worker.id, MAX_TEXT),
                format!("{}/{}", worker.jobs, worker.slots),
                bar(worker.jobs, worker.slots),
                worker.delivery.clone(),
                worker.run.0.to_string(),
                worker.run.1.to_string(),
                worker.version.clone(),
            ])
        })
        .collect();
    if count > MAX_WORKERS {
        rows.push(Row::new([format!("and {} more", count - MAX_WORKERS)]).style(DIM));
    }
    let widths = [
        Constraint::Min(16),
        Constraint::Length(9),
        Constraint::Length(10),
        Constraint::Length(9),
        Constraint::Length(7),
        Constraint::Length(6),
        Constraint::Length(8),
    ];
    let head = Row::new(["WORKER", "JOBS", "", "DELIVERY", "RUNS", "ERRORS", "VERSION"]).style(DIM);
    frame.render_widget(Table::new(rows, widths).header(head).block(block), area);
}

fn draw_jobs(frame: &mut Frame<'_>, area: Rect, model: &Model, now: SystemTime) {
    let jobs = model.jobs();
    let room = usize::from(area.height.saturating_sub(2));
    let hidden = jobs.len().saturating_sub(room);
    let more = if hidden > 0 { format!(", {hidden} not shown") } else { String::new() };
    let block = titled(format!("jobs {}{more}", jobs.len()));
    let rows = jobs.into_iter().take(room).map(|job| {
        let style = match job.state {
            State::Running => Style::new(),
            _ => DIM,
        };
        Row::new(cells(job, now)).style(style)
    });
    let widths = [
        Constraint::Fill(3),
        Constraint::Fill(3),
        Constraint::Length(8),
        Constraint::Length(5),
        Constraint::Fill(2),
    ];
    let head = Row::new(["JOB", "IMAGE", "STATE", "AGE", "WORKER"]).style(DIM);
    frame.render_widget(Table::new(rows, widths).header(head).block(block), area);
}

/// What is shown of a job.
pub(super) fn cells(job: &Job, now: SystemTime) -> [String; 5] {
    let age = now.duration_since(job.since).unwrap_or_default();
    [
        printable(&job.id, MAX_TEXT),
        printable(&job.image, MAX_TEXT),
        state_name(job.state).to_owned(),
        print::short(age),
        printable(&job.worker, MAX_TEXT),
    ]
}

fn titled(title: String) -> Block<'static> {
    Block::new().borders(Borders::TOP).border_style(DIM).title(Span::styled(title, BOLD))
}

/// How many of the slots are in use, in ten places.
fn bar(used: u64, all: u64) -> String {
    const PLACES: u64 = 10;
    let filled = (used.min(all) * PLACES).div_ceil(all.max(1));
    (0..PLACES).map(|place| if place < filled { '█' } else { '░' }).collect()
}

/// Milliseconds for people.
pub(super) fn duration(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{:.1} s", Duration::from_millis(ms).as_secs_f64()),
        _ => print::short(Duration::from_millis(ms)),
    }
}
