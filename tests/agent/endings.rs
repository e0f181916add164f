//! What remains of a function when it ends, and what ends the agent.

use std::process::{Command, Stdio};

use rustix::process::Signal;
use worker_spawner::agent::dialogue::Said;
use worker_spawner::agent::frame::{Kind, Start};

use crate::support::{Agent, program, run, sh, start};

/// As if by SIGHUP.
const HUNG_UP: Option<i32> = Some(129);

#[test]
fn what_a_function_leaves_behind_is_killed_and_does_not_delay_its_end() {
    for script in [
        "sleep 1000 & echo done",
        "setsid sh -c 'trap \"\" TERM HUP INT; while :; do sleep 1000; done' & echo done",
        "(setsid sleep 1000 &) & wait; echo done",
        "sh -c 'kill -STOP $$' & echo done",
    ] {
        let outcome = run(&sh(script));
        assert_eq!((outcome.text().as_str(), outcome.exit.code), ("done\n", 0), "{script}");
        assert!(outcome.exit.ran_us < 60_000_000);
    }
    // What one of them wrote before is kept, though the writer is dead.
    let script = "trap 'exit 3' USR1; sh -c 'echo left; kill -USR1 $PPID; sleep 1000' & wait";
    let outcome = run(&sh(script));
    assert_eq!((outcome.text().as_str(), outcome.exit.code), ("left\n", 3));
}

#[test]
fn a_function_that_kills_everything_it_can_spares_the_agent() {
    let outcome = run(&sh("sleep 1000 & kill -KILL -1; kill -KILL 1; kill -STOP 1; echo alive"));
    assert_eq!(outcome.text(), "alive\n");
    assert_eq!(run(&sh("trap '' TERM; kill -TERM 0; kill -TERM -1; exit 4")).exit.code, 4);
}

#[test]
fn orphans_are_reaped() {
    let script = "i=0; while [ $i -lt 300 ]; do (true &); i=$((i + 1)); done
        while grep -qs '^State:.Z' /proc/[0-9]*/status; do :; done; echo none";
    assert_eq!(run(&sh(script)).text(), "none\n");
}

#[test]
fn signals_reach_the_function() {
    let script = "trap 'echo usr1' USR1; trap 'echo term; exit 9' TERM; echo ready
        while :; do sleep 0.01; done";
    let mut agent = Agent::new();
    agent.start_until(&sh(script), "ready\n");
    agent.signal(Signal::USR1);
    assert_eq!(agent.hear(), Some(Said::Stdout("usr1\n".into())));
    agent.signal(Signal::TERM);
    let outcome = agent.finish();
    assert_eq!((outcome.text().as_str(), outcome.exit.code), ("term\n", 9));
    // From itself, too.
    let outcome =
        run(&sh("trap 'echo usr2; exit 8' USR2; kill -USR2 1; while :; do sleep 0.01; done"));
    assert_eq!((outcome.text().as_str(), outcome.exit.code), ("usr2\n", 8));
}

#[test]
fn an_idle_agent_ends_when_it_is_stopped_or_left() {
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT, Signal::WINCH] {
        let mut agent = Agent::new();
        agent.signal(signal);
        assert_eq!(agent.wait().code(), Some(0), "{signal:?}");
    }
    let mut agent = Agent::new();
    agent.channel = None;
    assert_eq!(agent.wait().code(), Some(0));
}

#[test]
fn a_function_ends_when_the_daemon_is_gone() {
    let mut agent = Agent::new();
    agent.start(&start(&["sleep", "1000"]));
    agent.channel = None;
    assert_eq!(agent.wait().code(), HUNG_UP);

    // Even while there is input that was not read.
    let mut agent = Agent::new();
    agent.start(&Start { stdin: true, ..start(&["sleep", "1000"]) });
    agent.say_too_much();
    agent.channel = None;
    assert_eq!(agent.wait().code(), HUNG_UP);

    // Even while there is output that nobody takes.
    let mut agent = Agent::new();
    agent.start(&start(&["yes"]));
    agent.stop_listening();
    assert_eq!(agent.wait().code(), HUNG_UP);
}

#[test]
fn an_agent_that_has_told_the_end_stays_until_it_is_hung_up_on() {
    let ended = || {
        let mut agent = Agent::new();
        agent.start(&sh("exit 3"));
        assert!(matches!(agent.hear(), Some(Said::Exited(_))));
        // It takes what no pipe holds.
        for _ in 0..20 {
            agent.say_too_much();
        }
        agent
    };
    let mut hung_up_on = ended();
    hung_up_on.channel = None;
    assert_eq!(hung_up_on.wait().code(), Some(3));
    let mut unheard = ended();
    unheard.stop_listening();
    assert_eq!(unheard.wait().code(), Some(3));
    let mut stopped = ended();
    stopped.signal(Signal::TERM);
    assert_eq!(stopped.wait().code(), Some(3));
    // Not for ever: it may be that nobody tells it.
    assert_eq!(ended().wait().code(), Some(3));
}

#[test]
fn what_is_no_part_of_the_protocol_ends_the_agent() {
    let no_start = Start { argv: Vec::new(), ..Start::default() }.encode().unwrap();
    for (kind, payload, complaint) in [
        (Kind::Stdin, &b"x"[..], "a frame that is no start"),
        (Kind::Hello, b"x", "a frame that is no start"),
        (Kind::Start, b"x", "a flag that is neither 0 nor 1"),
        (Kind::Start, &no_start, "a start of no program"),
        (Kind::StdinEnd, b"x", "a frame of a length its kind cannot have"),
    ] {
        let mut agent = Agent::new();
        agent.say(kind, payload);
        assert_eq!(agent.complaint(), format!("agent: was sent {complaint}\n"));
        assert_eq!(agent.wait().code(), Some(65));
    }
    for (stdin, kind, payload) in [
        (false, Kind::Stdin, &b"x"[..]),
        (false, Kind::StdinEnd, b""),
        (true, Kind::Started, b""),
        (true, Kind::Start, b"x"),
    ] {
        let mut agent = Agent::new();
        agent.start(&Start { stdin, ..start(&["sleep", "1000"]) });
        agent.say(kind, payload);
        assert_eq!(agent.complaint(), "agent: was sent a frame out of turn\n");
        assert_eq!(agent.wait().code(), Some(65));
    }
}

#[test]
fn it_runs_as_the_first_process_alone() {
    let output = Command::new(program()).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(complaint, "agent: runs only as the first process of a container\n");
    assert!(output.stdout.is_empty());
}
