//! What went in, what came out, and whether the one follows from the other.
//!
//! Knows no servers: a history is plain data, and the checks are held against histories with known
//! faults below.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// What a job is made to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Prints its id.
    Echo,
    /// Prints its id after a while.
    Sleep,
    /// Prints its id and fails.
    Fail,
    /// The same, and asks to be tried again.
    FailTwice,
    /// Prints its id and [`LOUD`] bytes.
    Loud,
    /// Asks for what no request may.
    Bad,
    /// Cancelled before it was published.
    CancelledBefore,
    /// Cancelled at some time; would run for longer than anybody waits for an answer.
    Cancelled,
    /// Would print its id, unless it has waited for too long.
    Perishable,
}

/// How much a loud job prints beside its id.
pub(crate) const LOUD: usize = 100_000;
/// The exit code of the jobs that fail.
pub(crate) const EXIT_CODE: &str = "7";

impl Kind {
    pub(crate) const ALL: [Self; 9] = [
        Self::Echo,
        Self::Sleep,
        Self::Fail,
        Self::FailTwice,
        Self::Loud,
        Self::Bad,
        Self::CancelledBefore,
        Self::Cancelled,
        Self::Perishable,
    ];
}

/// What a canceller was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CancelReply {
    Stopping,
    WillNotStart,
    /// With the status it had ended with.
    AlreadyEnded(String),
}

/// A job as its publisher knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) kind: Kind,
    /// The server said that it has it. Else it may have it or not.
    pub(crate) accepted: bool,
    /// How often it was sent.
    pub(crate) sent: u32,
    pub(crate) cancel: Option<CancelReply>,
}

/// A message on the subject of the results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) id: String,
    pub(crate) message_id: String,
    pub(crate) status: String,
    pub(crate) error: String,
    pub(crate) exit_code: String,
    pub(crate) attempt: u32,
    pub(crate) truncated: bool,
    pub(crate) body: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeadLetter {
    pub(crate) id: String,
    pub(crate) reason: String,
    /// Whether its body is what was published.
    pub(crate) whole: bool,
}

/// What the bucket says of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) state: String,
    pub(crate) status: String,
    pub(crate) attempt: u32,
}

/// More ran than may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Overrun {
    pub(crate) at: Duration,
    pub(crate) instance: String,
    pub(crate) running: usize,
}

/// All that is known of a run when it is over.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) max_deliver: u32,
    pub(crate) jobs: BTreeMap<String, Job>,
    /// As the stream holds them, in its order.
    pub(crate) stored: Vec<Outcome>,
    /// How often a plain subscriber saw a result of each job; it misses some.
    pub(crate) heard: BTreeMap<String, usize>,
    pub(crate) dead_letters: Vec<DeadLetter>,
    pub(crate) records: BTreeMap<String, Record>,
    /// How many containers each job was seen to have; some are missed.
    pub(crate) containers: BTreeMap<String, usize>,
    pub(crate) overruns: Vec<Overrun>,
    /// What was still there in the end.
    pub(crate) leftovers: Vec<String>,
    /// What a killed engine does not know any more, and nobody but it could have removed.
    pub(crate) forgotten: Vec<String>,
    /// Daemons that ended, or did not, in a way nobody asked for.
    pub(crate) deaths: Vec<String>,
    /// How the daemons ended that were asked to when all was well: number and exit.
    pub(crate) ends: Vec<(usize, String)>,
}

/// The end of a daemon that ended as it should.
pub(crate) const CLEAN_END: &str = "exit code 0";

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    /// The job it is about.
    pub(crate) id: Option<String>,
    pub(crate) what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.id {
            Some(id) => write!(f, "{id}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl History {
    /// All that must not be.
    pub(crate) fn violations(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        let mut outcomes: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
        for outcome in &self.stored {
            outcomes.entry(&outcome.id).or_default().push(outcome);
        }
        for (id, job) in &self.jobs {
            let outcomes = outcomes.remove(id.as_str()).unwrap_or_default();
            let of_job = self.check_job(id, job, &outcomes);
            found.extend(of_job.into_iter().map(|what| Violation { id: Some(id.clone()), what }));
        }
        found.extend(self.check_strangers());
        let general = |what: String| Violation { id: None, what };
        found.extend(self.overruns.iter().map(|Overrun { at, instance, running }| {
            let at = at.as_secs_f32();
            general(format!("{running} functions of {instance} ran at once at {at:.1} s"))
        }));
        found.extend(self.leftovers.iter().map(|what| general(format!("left behind: {what}"))));
        found.extend(self.deaths.iter().map(|what| general(what.clone())));
        found.extend(self.ends.iter().filter(|(_, end)| end != CLEAN_END).map(|(daemon, end)| {
            general(format!("daemon {daemon} was asked to end, and ended with {end}"))
        }));
        found
    }

    fn check_job(&self, id: &str, job: &Job, outcomes: &[&Outcome]) -> Vec<String> {
        let mut wrong = Vec::new();
        let dead: Vec<&DeadLetter> =
            self.dead_letters.iter().filter(|letter| letter.id == id).collect();
        if job.accepted && outcomes.is_empty() && dead.is_empty() {
            wrong
                .push("lost: it was accepted, and there is neither outcome nor dead letter".into());
        }
        if outcomes.is_empty() && !dead.is_empty() {
            wrong.push("a dead letter without an outcome".into());
        }
        for outcome in outcomes {
            if outcome.message_id != id {
                wrong.push(format!(
                    "not recognisable as a duplicate: Nats-Msg-Id is {:?}",
                    outcome.message_id
                ));
            }
            if let Err(why) = self.right(id, job, outcome) {
                wrong.push(why);
            }
            let buried = matches!(outcome.status.as_str(), "rejected" | "error");
            if buried && !dead.iter().any(|letter| letter.reason == outcome.error) {
                let Outcome { status, error, .. } = outcome;
                wrong.push(format!("{status}, and no dead letter says {error}"));
            }
        }
        if dead.iter().any(|letter| !letter.whole) {
            wrong.push("its dead letter does not hold what was published".into());
        }
        if job.kind == Kind::CancelledBefore
            && job.cancel == Some(CancelReply::WillNotStart)
            && let Some(containers) = self.containers.get(id)
        {
            wrong.push(format!(
                "cancelled before it was published, and had {containers} containers"
            ));
        }
        wrong.extend(self.check_record(id, outcomes));
        wrong
    }

    /// Whether `outcome` is one that a job like `job` can have.
    fn right(&self, id: &str, job: &Job, outcome: &Outcome) -> Result<(), String> {
        let Outcome { status, error, exit_code, attempt, .. } = outcome;
        let ended = (status.as_str(), exit_code.as_str());
        if status == "error" {
            // The infrastructure may give a job up, once it has tried all it may.
            let exhausted = error == "job.max_deliver" || *attempt >= self.max_deliver;
            return exhausted.then_some(()).ok_or(format!(
                "given up as {error} at attempt {attempt} of {}",
                self.max_deliver
            ));
        }
        if outcome.truncated {
            return Err("its output was cut".into());
        }
        let printed = |rest: usize| {
            let body = &outcome.body;
            let line = format!("{id}\n");
            let whole = body.starts_with(line.as_bytes())
                && body.len() == line.len() + rest
                && body[line.len()..].iter().all(|byte| *byte == b'x');
            let shown = String::from_utf8_lossy(&body[..body.len().min(100)]).into_owned();
            whole.then_some(()).ok_or(format!("printed {} bytes: {shown:?}", body.len()))
        };
        let otherwise = Err(format!("{:?} ended as {status} {exit_code} {error}", job.kind));
        match job.kind {
            Kind::Echo | Kind::Sleep if ended == ("succeeded", "0") => printed(0),
            Kind::Loud if ended == ("succeeded", "0") => printed(LOUD),
            Kind::Fail if ended == ("failed", EXIT_CODE) => printed(0),
            Kind::FailTwice if ended == ("failed", EXIT_CODE) => match attempt {
                1 => Err("was to be tried again, and was not".into()),
                _ => printed(0),
            },
            Kind::Bad if status == "rejected" && error.starts_with("request.") => Ok(()),
            Kind::Perishable if ended == ("succeeded", "0") => printed(0),
            Kind::Perishable
                if (status.as_str(), error.as_str()) == ("cancelled", "job.expired") =>
            {
                Ok(())
            }
            Kind::Cancelled | Kind::CancelledBefore
                if (status.as_str(), error.as_str()) == ("cancelled", "job.cancelled") =>
            {
                Ok(())
            }
            Kind::Cancelled | Kind::CancelledBefore if ended == ("succeeded", "0") => {
                match &job.cancel {
                    // Nobody was told that it would not run to its end.
                    None => printed(0),
                    Some(CancelReply::AlreadyEnded(told)) if told == status => printed(0),
                    Some(reply) => Err(format!("a canceller was told {reply:?}, and it succeeded")),
                }
            }
            _ => otherwise,
        }
    }

    fn check_record(&self, id: &str, outcomes: &[&Outcome]) -> Option<String> {
        if outcomes.is_empty() {
            return None;
        }
        let Some(record) = self.records.get(id) else {
            return Some("it ended, and has no record".into());
        };
        let Record { state, status, attempt } = record;
        if state != "ended" {
            return Some(format!("it ended, and its record says {state} (attempt {attempt})"));
        }
        let agrees =
            outcomes.iter().any(|outcome| outcome.status == *status && outcome.attempt == *attempt);
        (!agrees).then(|| {
            let stored: Vec<String> = outcomes
                .iter()
                .map(|outcome| format!("{} of attempt {}", outcome.status, outcome.attempt))
                .collect();
            format!("its record says {status} of attempt {attempt}, the stream {stored:?}")
        })
    }

    /// What is about jobs nobody published.
    fn check_strangers(&self) -> Vec<Violation> {
        let outcomes = self.stored.iter().map(|outcome| (&outcome.id, "outcome"));
        let letters = self.dead_letters.iter().map(|letter| (&letter.id, "dead letter"));
        outcomes
            .chain(letters)
            .filter(|(id, _)| !self.jobs.contains_key(*id))
            .map(|(id, what)| Violation {
                id: Some(id.clone()),
                what: format!("an {what} of a job nobody published").replace("an dead", "a dead"),
            })
            .collect()
    }

    /// The run in figures.
    pub(crate) fn summary(&self) -> String {
        let mut lines = Vec::new();
        let mut row = |name: &str, value: String| lines.push(format!("  {name:<28}{value}"));
        let accepted = self.jobs.values().filter(|job| job.accepted).count();
        row("jobs", format!("{} sent, {accepted} accepted", self.jobs.len()));
        row("jobs by kind", tally(self.jobs.values().map(|job| format!("{:?}", job.kind))));
        let again: u32 = self.jobs.values().map(|job| job.sent.saturating_sub(1)).sum();
        row("sent again", again.to_string());
        let ids: BTreeSet<&String> = self.stored.iter().map(|outcome| &outcome.id).collect();
        row("outcomes", format!("{} of {} jobs", self.stored.len(), ids.len()));
        row("outcomes by status", tally(self.stored.iter().map(|outcome| outcome.status.clone())));
        let errors = self.stored.iter().filter(|outcome| !outcome.error.is_empty());
        row("outcomes by error", tally(errors.map(|outcome| outcome.error.clone())));
        row("outcomes by attempt", tally(self.stored.iter().map(|o| format!("{:>2}", o.attempt))));
        row("duplicates in the stream", (self.stored.len() - ids.len()).to_string());
        let heard_again: usize = self.heard.values().map(|times| times.saturating_sub(1)).sum();
        row("duplicates heard", heard_again.to_string());
        row("containers of a job", tally(self.containers.values().map(|n| format!("{n:>2}"))));
        row("dead letters by reason", tally(self.dead_letters.iter().map(|l| l.reason.clone())));
        let replies = self.jobs.values().filter_map(|job| job.cancel.as_ref());
        row("answers to cancels", tally(replies.map(|reply| format!("{reply:?}"))));
        row("overruns", self.overruns.len().to_string());
        row("left behind", self.leftovers.len().to_string());
        row("forgotten by the engine", self.forgotten.len().to_string());
        lines.join("\n")
    }
}

/// How often each is there: `a 3, b 1`.
pub(crate) fn tally(items: impl Iterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for item in items {
        *counts.entry(item).or_default() += 1;
    }
    if counts.is_empty() {
        return "none".into();
    }
    let counts: Vec<String> =
        counts.iter().map(|(item, count)| format!("{} {count}", item.trim())).collect();
    counts.join(", ")
}
