//! What a function has of the agent: nothing.

use rustix::process::geteuid;

use crate::support::{Agent, run, sh, start};

/// Looks into the process $1 in all ways there are, and names those that the kernel let it.
const LOOK: &str = r#"
    look() {
        for way in fd/0 fd/1 mem environ maps; do
            (: <"/proc/$1/$way") 2>/dev/null && printf '%s ' "$way"
        done
        for way in exe cwd root fd/0; do
            readlink "/proc/$1/$way" >/dev/null && printf '%s ' "$way"
        done
        # To attach; to take a descriptor; to read the memory.
        perl -e '
            my ($attach, $open, $take) = `uname -m` eq "x86_64\n" ? (101, 434, 438) : (117, 434, 438);
            my $pid = $ARGV[0] + 0;
            print "pidfd_getfd " if syscall($take, syscall($open, $pid, 0), 1, 0) >= 0;
            print "ptrace " if syscall($attach, 16, $pid, 0, 0) >= 0;
        ' "$1"
    }
    sleep 1000 & sibling=$!
    while ! [ "$(cat /proc/$sibling/comm)" = sleep ]; do :; done
    look "$sibling"; echo; look 1; echo
"#;
const ALL: &str = "fd/0 fd/1 mem environ maps exe cwd root fd/0 pidfd_getfd ptrace ";

#[test]
fn a_function_cannot_look_into_the_agent() {
    // As root without capabilities. That it can look into another of its own shows that the ways are
    // ways.
    assert_eq!(run(&sh(LOOK)).text(), format!("{ALL}\n\n"));
}

#[test]
fn a_function_of_another_user_cannot_either() {
    if !geteuid().is_root() {
        eprintln!("not tested: another user, which takes root");
        return;
    }
    let mut agent = Agent::through(&[]);
    let user =
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"];
    agent.start(&start(&[&user, &["sh", "-c", LOOK][..]].concat()));
    // A pipe of another user's cannot be opened by its name, whosever process it is.
    assert_eq!(agent.finish().text(), format!("{}\n\n", ALL.replace("fd/1 ", "")));
}

#[test]
fn a_function_has_no_descriptor_but_its_own() {
    // The last is the one that `ls` looks through.
    assert_eq!(run(&start(&["ls", "/proc/self/fd"])).text(), "0\n1\n2\n3\n");
    let outcome = run(&sh("readlink /proc/self/fd/0; [ -p /proc/self/fd/1 ] && echo pipe"));
    assert_eq!(outcome.text(), "/dev/null\npipe\n");
}

#[test]
fn a_function_has_signals_as_by_default() {
    // Started by somebody who ignores some, one of which the C library keeps for itself.
    let ignoring = r#"
        my ($call, $none) = (`uname -m` eq "x86_64\n" ? 13 : 134, 0);
        my $ignore = pack "Q4", 1, 0, 0, 0;
        for my $signal (1, 13, 15, 32, 64) {
            my $number = $signal;
            syscall $call, $number, $ignore, $none, 8;
        }
        exec @ARGV
    "#;
    let mut agent = Agent::through(&["perl", "-e", ignoring, "--"]);
    agent.start(&start(&["cat", "/proc/self/status"]));
    let status = agent.finish().text();
    for field in ["SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"] {
        assert!(status.contains(&format!("{field}:\t0000000000000000\n")), "{field}: {status}");
    }
}

#[test]
fn a_function_leads_a_process_group_of_its_own() {
    // Number, name, state, parent, group.
    let stat = run(&start(&["cat", "/proc/self/stat"])).text();
    let fields: Vec<&str> = stat.split(' ').collect();
    assert_eq!(fields[3], "1", "{stat}");
    assert_eq!(fields[4], fields[0], "{stat}");
}
