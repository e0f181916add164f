//! What goes into a function and what comes out.

use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use worker_spawner::agent::dialogue::Said;
use worker_spawner::agent::frame::{Kind, MAX_DATA, Start};

use crate::support::{Agent, run, run_with, sh, start};

#[test]
fn output_is_exact_and_told_apart() {
    let every_byte = r"for i in 0 1 2 3; do for j in 0 1 2 3 4 5 6 7; do
        for k in 0 1 2 3 4 5 6 7; do printf \\$i$j$k; done; done; done";
    let outcome = run(&sh(&format!("{every_byte}; printf 'e\\0\\377' >&2")));
    assert_eq!(outcome.stdout, (0..=255).collect::<Vec<u8>>());
    assert_eq!(outcome.stderr, b"e\0\xff");
}

#[test]
fn output_comes_while_the_function_runs() {
    let mut agent = Agent::new();
    let function = Start { stdin: true, ..sh("echo first; read line; echo $line") };
    agent.start_until(&function, "first\n");
    agent.say(Kind::Stdin, b"second\n");
    assert_eq!(agent.finish().text(), "second\n");
}

#[test]
fn floods_on_both_streams_arrive_whole() {
    let outcome = run(&sh("head -c 20000000 /dev/zero & head -c 10000001 /dev/zero >&2; wait"));
    assert_eq!((outcome.stdout.len(), outcome.stderr.len()), (20_000_000, 10_000_001));
}

#[test]
fn input_arrives_whole_and_ends() {
    let input: Vec<u8> = (0..5_000_000_u32).map(|i| (i % 251) as u8).collect();
    assert!(run_with(start(&["cat"]), &input).stdout == input);
    assert_eq!(run_with(start(&["cat"]), b"").stdout, b"");
    // A function of which no input was announced sees the end at once.
    assert_eq!(run(&sh("cat; echo end")).text(), "end\n");
}

#[test]
fn input_that_is_not_read_holds_nothing_up() {
    let input = vec![b'x'; 3_000_000];
    for (script, output) in [
        ("echo done", "done\n"),
        ("head -c 3", "xxx"),
        ("exec <&-; echo closed; i=0; while [ $i -lt 10000 ]; do i=$((i + 1)); done", "closed\n"),
        // Closed with a frame half delivered, then everything else is awaited.
        ("head -c 1; exec <&-; head -c 1000000 /dev/zero >&2", "x"),
    ] {
        let outcome = run_with(sh(script), &input);
        assert_eq!((outcome.text().as_str(), outcome.exit.code), (output, 0), "{script}");
    }
}

#[test]
fn input_may_come_with_the_start() {
    let mut agent = Agent::new();
    let function = Start { stdin: true, ..start(&["cat"]) };
    agent.say(Kind::Start, &function.encode().unwrap());
    agent.say(Kind::Stdin, b"words");
    agent.say(Kind::StdinEnd, &[]);
    assert_eq!(agent.hear(), Some(Said::Started));
    assert_eq!(agent.finish().text(), "words");
    // Where it does not come to a start as well.
    let mut agent = Agent::new();
    let function = Start { stdin: true, ..start(&["no-such-program"]) };
    agent.say(Kind::Start, &function.encode().unwrap());
    agent.say_too_much();
    assert!(matches!(agent.hear(), Some(Said::Refused(_))));
    for _ in 0..20 {
        agent.say_too_much();
    }
}

#[test]
fn a_function_may_close_everything_and_go_on() {
    let script = "exec <&- >&- 2>&-; i=0; while [ $i -lt 10000 ]; do i=$((i + 1)); done; exit 5";
    assert_eq!(run(&sh(script)).exit.code, 5);
}

#[test]
fn a_daemon_that_does_not_read_holds_up_no_signals() {
    let mut agent = Agent::new();
    agent.start(&start(&["yes"]));
    agent.signal(Signal::TERM);
    // Nothing is read before the kernel says that `yes` is a zombie no more.
    let outcome = agent.finish();
    assert_eq!(outcome.exit.code, 143);
}

/// Over a span in which nothing happens, next to no processor time is used.
#[test]
fn the_agent_waits_without_spinning() {
    let assert_rests = |agent: &Agent, when: &str| {
        let before = agent.cpu_ns();
        thread::sleep(Duration::from_millis(300));
        let used = agent.cpu_ns() - before;
        assert!(used < 30_000_000, "{when}: {used} ns");
    };
    let mut agent = Agent::new();
    assert_rests(&agent, "idle");
    let function = Start { stdin: true, ..sh("echo ready; exec >&- 2>&-; sleep 1000") };
    agent.start_until(&function, "ready\n");
    assert_rests(&agent, "a function that closed its output");
    agent.say_too_much();
    assert_rests(&agent, "input that is not read");

    let mut agent = Agent::new();
    agent.start(&Start { stdin: true, ..sh("exec <&-; echo ready; exec sleep 1000") });
    agent.say(Kind::Stdin, &[0; MAX_DATA]);
    agent.say(Kind::StdinEnd, &[]);
    assert!(matches!(agent.hear(), Some(Said::Stdout(_))));
    assert_rests(&agent, "a function that closed its input");

    let mut agent = Agent::new();
    agent.start(&start(&["true"]));
    assert!(matches!(agent.hear(), Some(Said::Exited(_))));
    assert_rests(&agent, "a daemon that does not hang up");

    let mut agent = Agent::new();
    agent.start(&start(&["yes"]));
    // Both pipes fill up in less.
    thread::sleep(Duration::from_millis(300));
    assert_rests(&agent, "a daemon that does not read");
}
