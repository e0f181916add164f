//! `top`: workers, queue, outcomes and jobs, live.

mod feed;
mod model;
#[cfg(test)]
mod model_tests;
mod plain;
mod screen;
mod view;
#[cfg(test)]
mod view_tests;

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::StreamExt;
use tokio::time::MissedTickBehavior;

use super::client::Link;
use super::options::ConnectOptions;
use super::parse::duration;
use super::{exit, print};
use crate::shutdown::Signals;
use feed::Feed;
use model::Model;
use screen::{Screen, Wish};
use view::Frills;

/// How many messages of one kind may wait to be looked at.
const CAPACITY: usize = 1 << 16;
/// The shortest time between two looks.
const SHORTEST: Duration = Duration::from_millis(100);

/// The arguments of `top`.
#[derive(Args, Debug)]
pub struct Top {
    /// How long one look lasts, and one column of the charts.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration)]
    interval: Duration,
    /// Print one look as text, and end.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    connect: ConnectOptions,
}

impl Top {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        if self.interval < SHORTEST {
            bail!("--interval must be at least {}", humantime::format_duration(SHORTEST));
        }
        if !self.once && !std::io::stdout().is_terminal() {
            bail!(
                "standard output is no terminal; `top --once` prints one look as text, and `ps` lists the jobs"
            );
        }
        let link = Arc::new(Link::open(&self.connect, CAPACITY).await?);
        let feed = Feed::open(link.clone()).await?;
        let model = Model::new(link.subjects.prefix(), self.interval);
        let mut watch = Watch {
            queue: feed::queue(link.clone(), self.interval),
            records: feed::records(link.clone()),
            link,
            feed,
            model,
        };
        if self.once {
            watch.once(self.interval).await?;
            return Ok(exit::OK);
        }
        watch.live(self.interval).await
    }
}

/// The model, and what it is made of.
struct Watch {
    link: Arc<Link>,
    feed: Feed,
    queue: tokio::sync::mpsc::Receiver<Option<model::Queue>>,
    records: tokio::sync::mpsc::Receiver<crate::protocol::record::Record>,
    model: Model,
}

impl Watch {
    /// Takes in the next message. Cancel-safe.
    async fn next(&mut self) {
        let Self { feed, queue, records, model, .. } = self;
        tokio::select! {
            Some(event) = feed.events.next() => model.event(&event.payload, Instant::now()),
            Some(result) = feed.results.next() => {
                if let Some(headers) = &result.headers {
                    let (id, status, duration) = feed::of_result(headers);
                    model.result(id, status, duration);
                }
            }
            Some(answer) = feed.answers.next() => model.stats(&answer.payload, Instant::now()),
            Some(look) = queue.recv() => model.queue = look,
            Some(record) = records.recv() => model.record(record, Instant::now()),
            else => std::future::pending().await,
        }
    }

    /// One look.
    async fn once(&mut self, interval: Duration) -> anyhow::Result<()> {
        self.feed.ask().await;
        let over = tokio::time::sleep(interval);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = self.next() => {}
                () = &mut over => break,
            }
        }
        print::stdout(&plain::text(&self.model, SystemTime::now()))
    }

    /// Draws until it is told to end. Returns the exit code.
    async fn live(&mut self, interval: Duration) -> anyhow::Result<u8> {
        let mut signals = Signals::install().context("signals cannot be handled")?;
        let mut screen = Screen::take().context("the terminal cannot be drawn on")?;
        let mut wishes = screen::wishes();
        let mut turns = tokio::time::interval(interval);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut complaint = None;
        // The first turn is over at once: what it showed would be nothing.
        let mut first = true;
        loop {
            let redraw = tokio::select! {
                wish = wishes.recv() => match wish {
                    Some(Wish::Quit) | None => return Ok(exit::OK),
                    Some(Wish::Redraw) => true,
                },
                code = signals.next() => return Ok(code),
                _ = turns.tick() => {
                    if !std::mem::take(&mut first) {
                        self.model.turn(Instant::now());
                    }
                    self.feed.ask().await;
                    true
                }
                () = self.next() => false,
            };
            if redraw {
                complaint = self.link.news.complaints().pop().or(complaint);
                self.draw(&mut screen, complaint.as_deref()).context("the terminal is gone")?;
            }
        }
    }

    fn draw(&self, screen: &mut Screen, complaint: Option<&str>) -> std::io::Result<()> {
        let from = format!("{} at {}", self.link.subjects.prefix(), self.link.servers);
        let note = if self.link.news.away() {
            Some("the connection to NATS is lost; trying on")
        } else {
            complaint
        };
        let frills = Frills { from: &from, note, now: SystemTime::now() };
        screen.terminal.draw(|frame| view::draw(frame, &self.model, &frills))?;
        Ok(())
    }
}
