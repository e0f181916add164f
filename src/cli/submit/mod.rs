//! `submit`: many jobs, a bounded number of them at once.

mod source;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use indicatif::ProgressBar;
use serde_json::{Map, Value};
use tokio::sync::mpsc;

use self::source::Item;
use super::answer::Answer;
use super::client::Link;
use super::hand_in::{self, Mode};
use super::options::ConnectOptions;
use super::progress::{self, Quiet};
use super::{exit, print};
use crate::job::{JobId, Priority, Status};

/// The arguments of `submit`.
#[derive(Args, Debug)]
pub struct Submit {
    /// The file with the requests; `-` for standard input.
    #[arg(default_value = "-")]
    file: String,
    /// How many requests may be under way: until they are accepted, or with --wait, have ended.
    #[arg(
        short = 'n',
        long,
        value_name = "NUMBER",
        default_value = "64",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024)
    )]
    in_flight: usize,
    /// Wait until the jobs have ended, and print how.
    #[arg(short, long)]
    wait: bool,
    /// Print the outcomes, each as a line of JSON; implies --wait.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    quiet: Quiet,
    #[command(flatten)]
    connect: ConnectOptions,
}

/// What became of one request.
enum Fate {
    Accepted(JobId),
    Ended(Box<Answer>),
    Bad(String),
}

/// What became of all.
#[derive(Debug, Default)]
struct Tally {
    accepted: u64,
    succeeded: u64,
    otherwise: u64,
    bad: u64,
}

impl Submit {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        let input = source::open(&self.file).await?;
        let link = Link::open(&self.connect, 64).await?;
        let mode = hand_in::mode(&link, &link.subjects.execute).await;
        let bar = progress::bar(self.quiet.is_set(), source::count(&self.file));
        let (to, mut items) = mpsc::channel(1);
        let reading = tokio::spawn(source::read(input, to));
        let (mut tally, mut more) = (Tally::default(), true);
        let mut under_way = FuturesUnordered::new();
        while more || !under_way.is_empty() {
            tokio::select! {
                item = items.recv(), if more && under_way.len() < self.in_flight => match item {
                    Some(item) => under_way.push(self.hand_in(&link, mode, item)),
                    None => more = false,
                },
                Some((place, fate)) = under_way.next() => {
                    let gone = matches!(fate, Fate::Bad(_)) && link.news.away();
                    self.tell(&place, fate, &mut tally, bar.as_ref())?;
                    if gone && more {
                        let text = "the connection to NATS is lost; the rest is not handed in";
                        aside(bar.as_ref(), || print::note(text));
                        tally.bad += 1;
                        more = false;
                        items.close();
                    }
                }
            }
        }
        drop(items);
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let read = if reading.is_finished() { reading.await? } else { Ok(()) };
        if let Err(error) = read {
            print::note(format!("{}: {error}", self.file));
            tally.bad += 1;
        }
        if !self.quiet.is_set() {
            print::note(tally.summary(self.waits()));
        }
        link.close().await;
        Ok(tally.code())
    }

    fn waits(&self) -> bool {
        self.wait || self.json
    }

    /// Brings one request as far as it is waited for.
    async fn hand_in(&self, link: &Link, mode: Mode, item: Item) -> (String, Fate) {
        let Item { place, request } = item;
        let fate = match request {
            Ok(request) => self.request(link, mode, request).await,
            Err(why) => Err(anyhow::Error::msg(why)),
        };
        (place, fate.unwrap_or_else(|error| Fate::Bad(format!("{error:#}"))))
    }

    async fn request(
        &self,
        link: &Link,
        mode: Mode,
        mut request: Map<String, Value>,
    ) -> anyhow::Result<Fate> {
        let id = name(&mut request);
        let inbox = link.client.new_inbox();
        let comes = link.plain_inboxes && !request.contains_key("reply_to");
        if self.waits() && comes {
            request.insert("reply_to".to_owned(), inbox.as_str().into());
        }
        let subject = link.subjects.execute_at(urgency(&request));
        let payload = serde_json::to_vec(&request)?.into();
        let mut sent = hand_in::send(link, &subject, inbox, hand_in::headers(), payload).await?;
        match sent.accepted(link, mode).await? {
            Some(answer) => Ok(Fate::Ended(Box::new(answer))),
            None if self.waits() => {
                let recorded = mode != Mode::Plain;
                let answer = sent.outcome(link, recorded.then_some(&id), comes).await?;
                Ok(Fate::Ended(Box::new(answer)))
            }
            None => Ok(Fate::Accepted(id)),
        }
    }

    /// Prints what became of a request.
    fn tell(
        &self,
        place: &str,
        fate: Fate,
        tally: &mut Tally,
        bar: Option<&ProgressBar>,
    ) -> anyhow::Result<()> {
        if let Some(bar) = bar {
            bar.inc(1);
        }
        match fate {
            Fate::Bad(why) => {
                tally.bad += 1;
                aside(bar, || print::note(format!("{place}: {why}")));
                Ok(())
            }
            Fate::Accepted(id) => {
                tally.accepted += 1;
                aside(bar, || print::stdout(&format!("{id}\n")))
            }
            Fate::Ended(answer) => {
                tally.accepted += 1;
                if answer.status == Some(Status::Succeeded) {
                    tally.succeeded += 1;
                } else {
                    tally.otherwise += 1;
                }
                let id = answer.json.get("id").and_then(Value::as_str).unwrap_or_default();
                let text = if self.json {
                    format!("{}\n", Value::Object(answer.json.clone()))
                } else {
                    format!("{id} {}\n", answer.status_name())
                };
                aside(bar, || {
                    print::stdout(&text)?;
                    // Of those in the JSON everything is said there.
                    if let (Some(complaint), false) = (answer.complaint(), self.json) {
                        print::note(format!("{place}: {complaint}"));
                    }
                    Ok(())
                })
            }
        }
    }
}

/// Prints with the bar out of the way.
fn aside<T>(bar: Option<&ProgressBar>, print: impl FnOnce() -> T) -> T {
    match bar {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// The job's id; a request without one gets one, so that it can be told which it is. One that is
/// none is left for the daemon to refuse.
fn name(request: &mut Map<String, Value>) -> JobId {
    let given = request.get("id").filter(|id| !id.is_null());
    let known = given.and_then(|id| id.as_str()?.parse::<JobId>().ok());
    let id = known.unwrap_or_default();
    if given.is_none() {
        request.insert("id".to_owned(), id.as_str().into());
    }
    id
}

/// Which of the subjects a request asks for.
fn urgency(request: &Map<String, Value>) -> Priority {
    let named = request.get("priority").and_then(Value::as_str);
    named.and_then(|name| name.parse().ok()).unwrap_or_default()
}

impl Tally {
    fn summary(&self, waited: bool) -> String {
        let Self { accepted, succeeded, otherwise, bad } = self;
        let ended = if waited {
            format!(", {succeeded} succeeded, {otherwise} did not")
        } else {
            String::new()
        };
        format!("{accepted} accepted{ended}, {bad} not accepted")
    }

    fn code(&self) -> u8 {
        if self.otherwise + self.bad == 0 { exit::OK } else { exit::FAILED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_without_a_name_get_one() {
        for (given, kept) in
            [(json!("a-1"), true), (json!(7), true), (json!("a.b"), true), (Value::Null, false)]
        {
            let mut request = Map::new();
            request.insert("id".to_owned(), given.clone());
            let id = name(&mut request);
            let wanted = if kept { given } else { json!(id.as_str()) };
            assert_eq!(request.get("id"), Some(&wanted));
        }
        assert_eq!(
            urgency(&Map::from_iter([("priority".to_owned(), json!("low"))])),
            Priority::Low
        );
        assert_eq!(urgency(&Map::from_iter([("priority".to_owned(), json!(1))])), Priority::Normal);
    }

    #[test]
    fn the_exit_code_tells() {
        let good = Tally { accepted: 2, succeeded: 2, ..Tally::default() };
        assert_eq!(good.code(), 0);
        assert_eq!(good.summary(true), "2 accepted, 2 succeeded, 0 did not, 0 not accepted");
        assert_eq!(Tally { bad: 1, ..Tally::default() }.code(), 1);
        assert_eq!(Tally { otherwise: 1, ..Tally::default() }.code(), 1);
    }
}
