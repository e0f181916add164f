//! How a function is begun, and what is said of its end.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use worker_spawner::agent::frame::{Refusal, Start, Step};

use crate::support::{refusal, run, sh, start};

const ENOENT: i32 = 2;
const E2BIG: i32 = 7;
const EACCES: i32 = 13;

#[test]
fn exit_codes_are_those_of_shells() {
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -KILL $$", 137),
        ("kill -TERM $$", 143),
        ("kill -SEGV $$", 139),
        ("sh -c 'kill -KILL $$'", 137),
    ] {
        let outcome = run(&sh(script));
        assert_eq!(outcome.exit.code, code, "{script}");
        assert_eq!(outcome.status.code(), Some(code.into()), "{script}");
    }
}

#[test]
fn what_a_function_used_is_told() {
    let outcome = run(&sh("i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done"));
    let exit = outcome.exit;
    assert!((1_000..60_000_000).contains(&exit.cpu_us), "{exit:?}");
    assert!((1_000..60_000_000).contains(&exit.ran_us), "{exit:?}");
    assert!((100 << 10..100 << 20).contains(&exit.peak_bytes), "{exit:?}");
    // Whether there is a counter is the machine's affair.
    assert!(matches!(exit.oom_kills, None | Some(_)), "{exit:?}");
}

#[test]
fn arguments_are_passed_as_they_are() {
    let arg = b" a'\"$\\\n\xff\xfe\xc3".to_vec();
    let mut start = start(&["printf", "<%s>"]);
    start.argv.push(arg.clone());
    start.argv.push(Vec::new());
    assert_eq!(run(&start).stdout, [b"<", &arg[..], b"><>"].concat());
    // Of many and long ones as well.
    let long = "x".repeat(100_000);
    let many = [long.as_str(); 10];
    let outcome = run(&self::start(&[&["printf", "%s"], &many[..]].concat()));
    assert_eq!(outcome.stdout.len(), 1_000_000);
}

#[test]
fn variables_are_where_an_engine_puts_them() {
    let with = |env: &[&[u8]]| {
        let env = env.iter().map(|variable| variable.to_vec()).collect();
        String::from_utf8_lossy(&run(&Start { env, ..start(&["env"]) }).stdout).into_owned()
    };
    let path = "PATH=/usr/bin:/bin\n";
    assert_eq!(with(&[]), format!("{path}FIRST=1\nHOME=/root\nSECOND=2\n"));
    assert_eq!(
        with(&[b"SECOND=two", "NEW=\u{e9}=".as_bytes(), b"FIRST=one", b"NEW=again", b"EMPTY="]),
        format!("{path}SECOND=two\nNEW=again\nFIRST=one\nEMPTY=\nHOME=/root\n")
    );
    assert_eq!(
        with(&[b"A=b", b"HOME=/tmp", b"PATH=/bin"]),
        "PATH=/bin\nA=b\nHOME=/tmp\nFIRST=1\nSECOND=2\n"
    );
    let env = vec![b"ODD=\xff".to_vec()];
    let odd = run(&Start { env, ..start(&["env"]) }).stdout;
    assert!(odd.starts_with(&[path.as_bytes(), b"ODD=\xff\n"].concat()));
}

#[test]
fn a_function_runs_where_it_is_to() {
    assert_eq!(run(&sh("pwd")).text(), "/\n");
    let dir = Some(b"/usr/bin".to_vec());
    assert_eq!(run(&Start { dir: dir.clone(), ..sh("pwd") }).text(), "/usr/bin\n");
    // Relative names are looked up there.
    assert_eq!(run(&Start { dir, ..start(&["./printf", "x"]) }).text(), "x");
}

#[test]
fn a_program_is_looked_for_where_its_own_path_says() {
    let dir = tempfile::tempdir().unwrap();
    for (name, mode) in [("first", 0o644), ("second", 0o755)] {
        let program = dir.path().join(name).join("program");
        fs::create_dir(program.parent().unwrap()).unwrap();
        // Without an interpreter: it is the shell's.
        fs::write(&program, format!("echo {name} $0 $#\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
    }
    let dir = dir.path().to_str().unwrap();
    let with_path = |path: &str| Start {
        env: vec![format!("PATH={path}").into_bytes()],
        ..start(&["program", "a", "b"])
    };
    // One that may not be executed does not hide one that may.
    let path = format!("/nosuch:/etc/passwd:{dir}/first:{dir}/second");
    let expected = format!("second {dir}/second/program 2\n");
    assert_eq!(run(&with_path(&path)).text(), expected);
    let denied = Refusal { step: Step::Exec, errno: EACCES };
    assert_eq!(refusal(&with_path(&format!("{dir}/first:/nosuch"))), denied);
    let missing = Refusal { step: Step::Exec, errno: ENOENT };
    assert_eq!(refusal(&with_path("/nosuch:/usr")), missing);
    // An empty place is the working directory.
    let here = Start { dir: Some(format!("{dir}/second").into()), ..with_path("/nosuch:") };
    assert_eq!(run(&here).text(), "second program 2\n");
}

#[test]
fn what_cannot_be_run_is_refused_with_the_reason() {
    let exec = |errno| Refusal { step: Step::Exec, errno };
    for (argv, expected) in [
        (&["nosuch"][..], exec(ENOENT)),
        (&["/nosuch/program"], exec(ENOENT)),
        (&[""], exec(ENOENT)),
        (&["/etc/passwd"], exec(EACCES)),
        (&["/etc"], exec(EACCES)),
        (&["echo", &"x".repeat(200_000)], exec(E2BIG)),
        (&["echo", "a\0b"], Refusal { step: Step::Other, errno: 0 }),
    ] {
        assert_eq!(refusal(&start(argv)), expected, "{:.20}", argv.join(" "));
    }
    let in_dir = |dir: &str| refusal(&Start { dir: Some(dir.into()), ..start(&["true"]) });
    assert_eq!(in_dir("/nosuch"), Refusal { step: Step::Dir, errno: ENOENT });
    assert_eq!(in_dir("/etc/passwd"), Refusal { step: Step::Dir, errno: 20 });
    let env = vec![b"A=\0".to_vec()];
    let nul = refusal(&Start { env, ..start(&["true"]) });
    assert_eq!(nul, Refusal { step: Step::Other, errno: 0 });
}
