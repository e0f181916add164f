//! The ledger against histories with known faults: one that objects to nothing shows nothing.

use std::time::Duration;

use super::ledger::{
    CLEAN_END, CancelReply, DeadLetter, EXIT_CODE, History, Job, Kind, LOUD, Outcome, Overrun,
    Record,
};

/// A run in which all went well, with a job of each kind.
fn good() -> History {
    let mut history = History { max_deliver: 10, ..History::default() };
    for kind in Kind::ALL {
        let id = id(kind);
        let cancel = match kind {
            Kind::CancelledBefore => Some(CancelReply::WillNotStart),
            Kind::Cancelled => Some(CancelReply::Stopping),
            _ => None,
        };
        let outcome = Outcome {
            id: id.clone(),
            message_id: id.clone(),
            attempt: 1,
            ..match kind {
                Kind::Echo | Kind::Sleep | Kind::Perishable => printed("succeeded", "0", &id, 0),
                Kind::Loud => printed("succeeded", "0", &id, LOUD),
                Kind::Fail | Kind::FailTwice => printed("failed", EXIT_CODE, &id, 0),
                Kind::Bad => failed("rejected", "request.invalid_field"),
                Kind::CancelledBefore | Kind::Cancelled => failed("cancelled", "job.cancelled"),
            }
        };
        history.jobs.insert(id.clone(), Job { kind, accepted: true, sent: 1, cancel });
        history.heard.insert(id.clone(), 1);
        history.stored.push(outcome);
        if kind != Kind::CancelledBefore {
            history.containers.insert(id, 1);
        }
    }
    history.outcome(Kind::FailTwice).attempt = 2;
    let records: Vec<_> = history
        .stored
        .iter()
        .map(|Outcome { id, status, attempt, .. }| {
            let (state, status) = ("ended".to_string(), status.clone());
            (id.clone(), Record { state, status, attempt: *attempt })
        })
        .collect();
    history.records = records.into_iter().collect();
    history.dead_letters.push(DeadLetter {
        id: id(Kind::Bad),
        reason: "request.invalid_field".into(),
        whole: true,
    });
    history.ends = (0..3).map(|daemon| (daemon, CLEAN_END.to_string())).collect();
    history
}

fn id(kind: Kind) -> String {
    format!("job-{kind:?}")
}

fn printed(status: &str, exit_code: &str, id: &str, rest: usize) -> Outcome {
    let body = [format!("{id}\n").into_bytes(), vec![b'x'; rest]].concat();
    Outcome { status: status.into(), exit_code: exit_code.into(), body, ..Outcome::default() }
}

fn failed(status: &str, error: &str) -> Outcome {
    Outcome { status: status.into(), error: error.into(), ..Outcome::default() }
}

impl History {
    fn outcome(&mut self, kind: Kind) -> &mut Outcome {
        self.stored.iter_mut().find(|outcome| outcome.id == id(kind)).unwrap()
    }

    fn job(&mut self, kind: Kind) -> &mut Job {
        self.jobs.get_mut(&id(kind)).unwrap()
    }

    fn record(&mut self, kind: Kind) -> &mut Record {
        self.records.get_mut(&id(kind)).unwrap()
    }
}

#[test]
fn a_run_in_which_all_went_well_is_accepted() {
    assert_eq!(good().violations(), []);
    for row in ["9 sent, 9 accepted", "succeeded 4", "job.cancelled 2", "1 8, 2 1"] {
        assert!(good().summary().contains(row), "{row} in\n{}", good().summary());
    }
}

/// What is done to a good history, and a word of the one objection there must be to it.
#[test]
fn every_fault_is_objected_to() {
    type Spoil = fn(&mut History);
    let table: &[(&str, Spoil)] = &[
        ("lost", |history| {
            history.stored.retain(|outcome| outcome.id != id(Kind::Echo));
            history.records.remove(&id(Kind::Echo));
        }),
        ("without an outcome", |history| {
            history.stored.retain(|outcome| outcome.id != id(Kind::Bad));
        }),
        ("not recognisable", |history| {
            let second =
                Outcome { message_id: "other".into(), ..history.outcome(Kind::Echo).clone() };
            history.stored.push(second);
        }),
        ("Echo ended as failed", |history| {
            let second = history.outcome(Kind::Echo).clone();
            history.stored.push(second);
            history.outcome(Kind::Echo).status = "failed".into();
        }),
        ("printed", |history| history.outcome(Kind::Echo).body.clear()),
        ("printed", |history| history.outcome(Kind::Sleep).body = b"job-Echo\n".to_vec()),
        ("printed", |history| _ = history.outcome(Kind::Loud).body.pop()),
        ("printed", |history| history.outcome(Kind::Fail).body.push(b'x')),
        ("cut", |history| history.outcome(Kind::Loud).truncated = true),
        ("Sleep ended as failed 137", |history| {
            let outcome = history.outcome(Kind::Sleep);
            (outcome.status, outcome.exit_code) = ("failed".into(), "137".into());
            history.record(Kind::Sleep).status = "failed".into();
        }),
        ("Fail ended as succeeded", |history| {
            history.outcome(Kind::Fail).status = "succeeded".into();
            history.record(Kind::Fail).status = "succeeded".into();
        }),
        ("was not", |history| {
            history.outcome(Kind::FailTwice).attempt = 1;
            history.record(Kind::FailTwice).attempt = 1;
        }),
        ("Bad ended as succeeded", |history| {
            history.outcome(Kind::Bad).status = "succeeded".into();
            history.record(Kind::Bad).status = "succeeded".into();
        }),
        ("no dead letter says", |history| history.dead_letters.clear()),
        ("no dead letter says", |history| history.dead_letters[0].reason = "other".into()),
        ("does not hold", |history| history.dead_letters[0].whole = false),
        ("had 1 containers", |history| {
            history.containers.insert(id(Kind::CancelledBefore), 1);
        }),
        ("told WillNotStart", |history| {
            *history.outcome(Kind::CancelledBefore) = Outcome {
                id: id(Kind::CancelledBefore),
                message_id: id(Kind::CancelledBefore),
                attempt: 1,
                ..printed("succeeded", "0", &id(Kind::CancelledBefore), 0)
            };
            history.record(Kind::CancelledBefore).status = "succeeded".into();
        }),
        ("told AlreadyEnded", |history| {
            *history.outcome(Kind::Cancelled) = Outcome {
                id: id(Kind::Cancelled),
                message_id: id(Kind::Cancelled),
                attempt: 1,
                ..printed("succeeded", "0", &id(Kind::Cancelled), 0)
            };
            history.record(Kind::Cancelled).status = "succeeded".into();
            history.job(Kind::Cancelled).cancel = Some(CancelReply::AlreadyEnded("failed".into()));
        }),
        ("no record", |history| _ = history.records.remove(&id(Kind::Echo))),
        ("its record says running", |history| history.record(Kind::Echo).state = "running".into()),
        ("its record says failed", |history| history.record(Kind::Echo).status = "failed".into()),
        ("of attempt 2, the stream", |history| history.record(Kind::Echo).attempt = 2),
        ("nobody published", |history| {
            let stranger = Outcome { id: "stranger".into(), ..history.outcome(Kind::Echo).clone() };
            history.stored.push(stranger);
        }),
        ("nobody published", |history| {
            let stranger = DeadLetter { id: "stranger".into(), ..history.dead_letters[0].clone() };
            history.dead_letters.push(stranger);
        }),
        ("given up as engine.unavailable at attempt 3 of 10", |history| {
            give_up(history, "engine.unavailable", 3);
        }),
        ("4 functions of worker-a ran at once", |history| {
            let instance = "worker-a".to_string();
            history.overruns.push(Overrun { at: Duration::from_secs(1), instance, running: 4 });
        }),
        ("left behind: a container", |history| history.leftovers.push("a container".into())),
        ("daemon 1 ended by itself", |history| {
            history.deaths.push("daemon 1 ended by itself: signal: 6".into());
        }),
        ("ended with exit code 1", |history| history.ends[1].1 = "exit code 1".into()),
    ];
    for (word, spoil) in table {
        let mut history = good();
        spoil(&mut history);
        let found = history.violations();
        assert_eq!(found.len(), 1, "{word}: {found:#?}");
        assert!(found[0].to_string().contains(word), "{word}: {found:#?}");
    }
}

fn give_up(history: &mut History, error: &str, attempt: u32) {
    let id = id(Kind::Echo);
    let outcome =
        Outcome { id: id.clone(), message_id: id.clone(), attempt, ..failed("error", error) };
    *history.outcome(Kind::Echo) = outcome;
    *history.record(Kind::Echo) = Record { state: "ended".into(), status: "error".into(), attempt };
    history.dead_letters.push(DeadLetter { id, reason: error.into(), whole: true });
}

#[test]
fn what_may_be_is_not_objected_to() {
    type Change = fn(&mut History);
    let table: &[(&str, Change)] = &[
        ("a job that may not have been accepted, and has nothing", |history| {
            history.job(Kind::Echo).accepted = false;
            history.stored.retain(|outcome| outcome.id != id(Kind::Echo));
            history.records.remove(&id(Kind::Echo));
        }),
        ("a job that may not have been accepted, and ran", |history| {
            history.job(Kind::Echo).accepted = false;
        }),
        ("a duplicate that is recognisable as one", |history| {
            let second = history.outcome(Kind::Echo).clone();
            history.stored.push(second);
            history.heard.insert(id(Kind::Echo), 2);
        }),
        ("a job the infrastructure failed as often as it may", |history| {
            give_up(history, "engine.unavailable", 10);
        }),
        ("a job that was delivered as often as it may be", |history| {
            give_up(history, "job.max_deliver", 4);
        }),
        ("a job that expired", |history| {
            let outcome = history.outcome(Kind::Perishable);
            (outcome.status, outcome.error) = ("cancelled".into(), "job.expired".into());
            history.record(Kind::Perishable).status = "cancelled".into();
        }),
        ("a job that ended before it could be cancelled", |history| {
            *history.outcome(Kind::Cancelled) = Outcome {
                id: id(Kind::Cancelled),
                message_id: id(Kind::Cancelled),
                attempt: 1,
                ..printed("succeeded", "0", &id(Kind::Cancelled), 0)
            };
            history.record(Kind::Cancelled).status = "succeeded".into();
            history.job(Kind::Cancelled).cancel =
                Some(CancelReply::AlreadyEnded("succeeded".into()));
        }),
        ("a job that ran more than once", |history| {
            history.containers.insert(id(Kind::Echo), 3);
            history.outcome(Kind::Echo).attempt = 3;
            history.record(Kind::Echo).attempt = 3;
        }),
    ];
    for (what, change) in table {
        let mut history = good();
        change(&mut history);
        assert_eq!(history.violations(), [], "{what}");
    }
    let mut history = good();
    let second = history.outcome(Kind::Echo).clone();
    history.stored.push(second);
    assert!(history.summary().contains("10 of 9 jobs"), "{}", history.summary());
}
