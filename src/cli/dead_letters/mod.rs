//! `dead-letters`: requests that could not be run.

mod letter;
mod redrive;

use anyhow::bail;
use clap::{Args, Subcommand};

use self::letter::{Letter, Letters};
use super::client::Link;
use super::options::ConnectOptions;
use super::{exit, print};
use crate::job::JobId;

/// The arguments of `dead-letters`.
#[derive(Args, Debug)]
pub struct DeadLetters {
    #[command(subcommand)]
    action: Action,
}

/// What is to be done about them.
#[derive(Debug, Subcommand)]
enum Action {
    /// List them, the oldest first.
    List {
        #[command(flatten)]
        choice: Choice,
        /// Print each as a line of JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connect: ConnectOptions,
    },
    /// Show one: its headers, an empty line, and the request as it came.
    Show {
        /// The job's id.
        id: JobId,
        /// The request alone.
        #[arg(long)]
        body: bool,
        #[command(flatten)]
        connect: ConnectOptions,
    },
    /// Hand their requests in again, each under a new id, and remove what was accepted.
    Redrive {
        #[command(flatten)]
        chosen: Chosen,
        /// Leave them where they are.
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        connect: ConnectOptions,
    },
    /// Remove them.
    Purge {
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        connect: ConnectOptions,
    },
}

/// Which of all.
#[derive(Args, Clone, Debug, Default)]
struct Choice {
    /// Only those with this error code, such as image.not_found.
    #[arg(long, value_name = "CODE")]
    reason: Option<String>,
}

/// Which, where it matters that it is said.
#[derive(Args, Clone, Debug)]
struct Chosen {
    /// Of the jobs with these ids.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<JobId>,
    /// All of them, or all with the reason.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    choice: Choice,
}

impl Choice {
    fn takes(&self, letter: &Letter) -> bool {
        self.reason.as_ref().is_none_or(|reason| *reason == letter.reason())
    }
}

impl Chosen {
    fn takes(&self, letter: &Letter) -> bool {
        let named = self.all || self.ids.iter().any(|id| id.as_str() == letter.id());
        named && self.choice.takes(letter)
    }

    /// Those of the ids of which there was no letter.
    fn missing(&self, found: &[String]) -> Vec<&JobId> {
        self.ids.iter().filter(|id| !found.iter().any(|found| found == id.as_str())).collect()
    }
}

impl DeadLetters {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        match self.action {
            Action::List { choice, json, connect } => {
                let link = Link::open(&connect, 64).await?;
                list(&link, &choice, json).await
            }
            Action::Show { id, body, connect } => {
                let link = Link::open(&connect, 64).await?;
                show(&link, &id, body).await
            }
            Action::Redrive { chosen, keep, connect } => {
                let link = Link::open(&connect, 64).await?;
                redrive::run(&link, &chosen, keep).await
            }
            Action::Purge { chosen, connect } => {
                let link = Link::open(&connect, 64).await?;
                purge(&link, &chosen).await
            }
        }
    }
}

async fn list(link: &Link, choice: &Choice, json: bool) -> anyhow::Result<u8> {
    let mut letters = Letters::open(link, "dead-letters list").await?;
    let mut rows = Vec::new();
    while let Some(letter) = letters.next().await? {
        if !choice.takes(&letter) {
            continue;
        }
        if json {
            print::stdout(&format!("{}\n", letter.json()))?;
        } else {
            rows.push(letter.cells());
        }
    }
    if !json {
        print::stdout(&print::table(&["ID", "AGE", "REASON", "IMAGE", "MESSAGE"], &rows))?;
    }
    Ok(exit::OK)
}

async fn show(link: &Link, id: &JobId, body: bool) -> anyhow::Result<u8> {
    let mut letters = Letters::open(link, "dead-letters show").await?;
    let mut found = None;
    // Of several with one id the last one counts.
    while let Some(letter) = letters.next().await? {
        if letter.id() == id.as_str() {
            found = Some(letter);
        }
    }
    let Some(letter) = found else { bail!("there is no dead letter of {id}") };
    if !body {
        print::stdout(&letter.headers())?;
    }
    print::write(crate::capture::Stream::Stdout, letter.body()).await?;
    if !body {
        print::stdout("\n")?;
    }
    Ok(exit::OK)
}

async fn purge(link: &Link, chosen: &Chosen) -> anyhow::Result<u8> {
    let mut letters = Letters::open(link, "dead-letters purge").await?;
    let mut found = Vec::new();
    while let Some(letter) = letters.next().await? {
        if chosen.takes(&letter) {
            letters.remove(&letter).await?;
            found.push(letter.id().to_owned());
        }
    }
    print::stdout(&format!("{} removed\n", found.len()))?;
    Ok(report_missing(chosen, &found))
}

/// Names the ids of which there was nothing.
fn report_missing(chosen: &Chosen, found: &[String]) -> u8 {
    let missing = chosen.missing(found);
    for id in &missing {
        print::note(format!("there is no dead letter of {id}"));
    }
    if missing.is_empty() { exit::OK } else { exit::FAILED }
}
