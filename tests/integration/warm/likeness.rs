//! No function can tell in which of the two kinds of containers it runs, and no caller either.

use std::collections::BTreeMap;

use futures::StreamExt;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use super::{cold_world, is_warm, run_warm, warm_world};
use crate::support::wait::eventually;
use crate::support::world::{Ended, World};

/// How many commands are made up for one run of the test.
const CASES: usize = 32;
/// Fields of an outcome that no two runs share.
const PECULIAR: [&str; 9] = [
    "id",
    "worker",
    "start",
    "queued_at",
    "started_at",
    "finished_at",
    "updated_at",
    "timings_ms",
    "usage",
];

/// What an outcome says that another run of the same must say as well.
fn common(mut outcome: Value) -> Value {
    let fields = outcome.as_object_mut().unwrap();
    fields.retain(|name, _| !PECULIAR.contains(&name.as_str()));
    // The init process names itself by a number that two containers made for a job need not share.
    if let Some(stderr) = fields.get("stderr").and_then(Value::as_str)
        && let Some((number, rest)) =
            stderr.strip_prefix("[FATAL tini (").and_then(|rest| rest.split_once(')'))
        && number.parse::<u32>().is_ok()
    {
        fields["stderr"] = json!(format!("[FATAL tini (n){rest}"));
    }
    outcome
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("two words".to_string()),
        Just("'\"`$(x)\\\\\\n%s*?[a]~!#&|;<>".to_string()),
        Just("-n".to_string()),
        Just("a=b=c".to_string()),
        Just("\u{1}\u{7f}\r\n\t".to_string()),
        Just("grüße \u{1d11e} \u{feff}".to_string()),
        "[ -~]{1,20}",
        "x{1000,4000}",
    ]
}

/// Something a shell does, and how its standard output or error shows it.
fn step() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => Just("printf '<%s>' \"$@\"".to_string()),
        2 => Just("/bin/env | /bin/sed 's/^HOSTNAME=[0-9a-f]\\{12\\}$/HOSTNAME=its own/'".to_string()),
        1 => Just("echo \"$HOME\"; cd; /bin/pwd".to_string()),
        1 => Just("/bin/pwd; /bin/id; umask".to_string()),
        2 => Just("/bin/md5sum".to_string()),
        1 => Just("/bin/head -c 5".to_string()),
        1 => Just("exec <&-".to_string()),
        1 => Just("echo a; echo b >&2; echo c; echo d >&2".to_string()),
        1 => Just("/bin/cat /etc/every-byte; /bin/cat /etc/every-byte >&2".to_string()),
        1 => (1u32..70_000).prop_map(|n| format!("/bin/yes | /bin/head -c {n}")),
        1 => Just("/bin/sleep 1000 &".to_string()),
        1 => Just("(trap '' TERM HUP INT; while :; do /bin/sleep 1; done) & true".to_string()),
        1 => Just("(exec /bin/setsid /bin/sleep 1000) &".to_string()),
        1 => Just("no-such-program".to_string()),
        1 => Just("echo x >/tmp/x && /bin/cat /tmp/x; /bin/ls -a /tmp".to_string()),
        1 => Just("echo x >/planted".to_string()),
        // The engine puts its own first process there for those it starts.
        1 => Just("/bin/ls / | /bin/grep -v sbin".to_string()),
    ]
}

fn last_step() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => Just("true".to_string()),
        3 => any::<u8>().prop_map(|code| format!("exit {code}")),
        3 => prop_oneof![1..32u8, 34..=64u8]
            // These stop a process, or leave it as it is.
            .prop_filter("it ends", |n| ![17, 18, 19, 20, 21, 22, 23, 28].contains(n))
            .prop_map(|n| format!("kill -{n} $$; /bin/sleep 5")),
        1 => Just("exec >&- 2>&-; /bin/sleep 0.3; exit 3".to_string()),
        1 => Just("exec /bin/no-such-program".to_string()),
    ]
}

fn script() -> impl Strategy<Value = Value> {
    let steps = proptest::collection::vec(step(), 0..4);
    let args = proptest::collection::vec(text(), 0..5);
    (steps, last_step(), args).prop_map(|(steps, last, args)| {
        // A line each: some of them end in what no semicolon may follow.
        let script = steps.into_iter().chain([last]).collect::<Vec<_>>().join("\n");
        let mut argv = vec!["/bin/sh".to_string(), "-c".to_string(), script, "name".to_string()];
        argv.extend(args);
        json!(argv)
    })
}

fn parameter() -> impl Strategy<Value = Value> {
    prop_oneof![
        8 => script(),
        1 => proptest::collection::vec(text(), 0..5)
            .prop_map(|args| json!([vec!["printf".to_string(), "<%s>".to_string()], args].concat())),
        1 => prop_oneof![
            Just(json!(["no-such-program"])),
            Just(json!(["/etc/plain", "x"])),
            Just(json!(["/etc/garbage"])),
            Just(json!(["/etc/no-interpreter"])),
            Just(json!(["/etc"])),
            Just(json!([""])),
            Just(json!([])),
        ],
    ]
}

fn environment() -> impl Strategy<Value = BTreeMap<String, String>> {
    let name = prop_oneof![
        2 => "[A-Za-z_][A-Za-z0-9_]{0,8}",
        1 => prop_oneof![Just("HOME"), Just("HOSTNAME"), Just("PATH"), Just("a.b-c"), Just("ENV")]
            .prop_map(ToString::to_string),
    ];
    proptest::collection::btree_map(name, text(), 0..4)
}

fn request() -> impl Strategy<Value = Value> {
    let stdin = proptest::option::of(prop_oneof![
        Just(String::new()),
        text(),
        (0usize..200 << 10).prop_map(|length| "0123456789abcde\n".repeat(length / 16 + 1)),
    ]);
    let dir = proptest::option::weighted(
        0.4,
        prop_oneof![Just("/"), Just("/tmp"), Just("/data"), Just("/root"), Just("/no/such")],
    );
    let user = proptest::option::weighted(0.3, prop_oneof![Just("1000"), Just("app")]);
    (parameter(), environment(), stdin, dir, user).prop_map(|(parameter, env, stdin, dir, user)| {
        let mut request = json!({"parameter": parameter, "env": env});
        for (name, value) in [
            ("stdin", stdin),
            ("working_dir", dir.map(ToString::to_string)),
            ("user", user.map(ToString::to_string)),
        ] {
            if let Some(value) = value {
                request[name] = json!(value);
            }
        }
        request
    })
}

/// Whether some of these may start cold wherever they run: only a container that was made for it
/// tells well why it could not begin.
fn may_be_refused(request: &Value) -> bool {
    let program = request["parameter"][0].as_str().unwrap_or_default();
    !["/bin/sh", "printf"].contains(&program)
        || request["env"].get("PATH").is_some()
        || request["env"]["HOME"] == ""
        || ["/no/such", "/root"].contains(&request["working_dir"].as_str().unwrap_or_default())
}

/// What one world says of `request` and another does not; nothing where they agree.
async fn difference(cold: &World, warm: &World, request: Value) -> Option<String> {
    let a = cold.execute(request.clone()).await;
    assert!(!is_warm(&a), "{}", a.outcome);
    let b = if may_be_refused(&request) {
        warm.execute(request.clone()).await
    } else {
        run_warm(warm, &request).await
    };
    let (a, b) = (common(a.outcome), common(b.outcome));
    (a != b).then(|| format!("--- request {request:.3000}\n--- cold {a:.1500}\n--- warm {b:.1500}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn whatever_runs_has_the_same_outcome_in_both() {
    let (cold, warm) = tokio::join!(cold_world(&[]), warm_world(6, &[]));
    let mut runner = TestRunner::default();
    let requests: Vec<Value> =
        (0..CASES).map(|_| request().new_tree(&mut runner).unwrap().current()).collect();
    let differences: Vec<String> = futures::stream::iter(requests)
        .map(|request| difference(&cold, &warm, request))
        .buffer_unordered(3)
        .filter_map(|difference| async { difference })
        .collect()
        .await;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    warm.clean().await;
}

/// What the kernel tells a process of itself, one question in each line.
const QUESTIONS: [(&str, &[&str]); 9] = [
    ("status", &["cat", "/proc/self/status"]),
    (
        "itself",
        &[
            "head",
            "-n",
            "100",
            "/proc/self/limits",
            "/proc/self/oom_score_adj",
            "/proc/self/coredump_filter",
            "/proc/self/personality",
            "/proc/self/loginuid",
            "/proc/self/attr/current",
            "/proc/self/timerslack_ns",
        ],
    ),
    ("environment", &["cat", "/proc/self/environ"]),
    ("stat", &["cat", "/proc/self/stat"]),
    ("descriptors", &["ls", "-l", "/proc/self/fd"]),
    (
        "directory",
        &[
            "sh",
            "-c",
            "pwd; readlink /proc/self/cwd /proc/self/root; id; umask; tty; hostname | wc -c; cat /etc/hosts | grep -v '[0-9a-f]\\{12\\}$'; stat -c '%A %u %g %t %T %n' /tmp /dev /dev/* /dev/shm /data /root /etc/hosts /etc/resolv.conf",
        ],
    ),
    ("mounts", &["cat", "/proc/self/mountinfo"]),
    (
        "groups",
        &[
            "sh",
            "-c",
            "cd /sys/fs/cgroup; grep -H . memory/memory.limit_in_bytes \
            memory/memory.memsw.limit_in_bytes memory/memory.swappiness \
            memory/memory.oom_control memory/memory.soft_limit_in_bytes cpu/cpu.cfs_quota_us \
            cpu/cpu.cfs_period_us cpu/cpu.shares pids/pids.max cpuset/cpuset.cpus memory.max \
            memory.swap.max cpu.max pids.max devices/devices.list 2>/dev/null; cat /proc/self/cgroup",
        ],
    ),
    ("signals", &["sh", "-c", "trap; kill -USR1 $$; echo not reached"]),
];

/// An answer without what differs from container to container and from run to run.
fn normal(question: &str, answer: &str) -> Vec<String> {
    let ids = |line: &str| {
        let is_id = |word: &str| word.len() >= 12 && word.bytes().all(|b| b.is_ascii_hexdigit());
        let words = line.split_inclusive(|c: char| !c.is_ascii_alphanumeric());
        words
            .map(|word| {
                let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
                if is_id(bare) { word.replace(bare, "ID") } else { word.to_string() }
            })
            .collect::<String>()
    };
    let lines = answer.split(['\n', '\0']).map(ids);
    match question {
        // Counters, numbers of processes, and what the moment brings.
        "status" => lines
            .filter(|line| {
                let name = line.split(':').next().unwrap_or_default();
                name.starts_with("Sig")
                    || name.starts_with("Cap")
                    || [
                        "Name",
                        "Umask",
                        "State",
                        "Tgid",
                        "TracerPid",
                        "Uid",
                        "Gid",
                        "FDSize",
                        "Groups",
                        "ShdPnd",
                        "NoNewPrivs",
                        "Seccomp",
                        "Seccomp_filters",
                        "Threads",
                        "Speculation_Store_Bypass",
                        "CoreDumping",
                        "Cpus_allowed",
                        "Mems_allowed",
                        "THP_enabled",
                    ]
                    .contains(&name)
            })
            // How many signals may be queued and are, over all processes of the user.
            .filter(|line| !line.starts_with("SigQ") && !line.starts_with("Tgid"))
            .collect(),
        "stat" => {
            let after = answer.rsplit_once(')').unwrap().1;
            let fields: Vec<&str> = after.split_whitespace().collect();
            let pid = answer.split(' ').next().unwrap();
            let own_group = fields[2] == pid;
            // Parent, session, terminal, its group, flags, priority, nice, threads.
            let shown = [1, 3, 4, 5, 15, 16, 17].map(|at| format!("{at}: {}", fields[at]));
            shown.into_iter().chain([format!("its own group: {own_group}")]).collect()
        }
        "descriptors" => lines
            .filter_map(|line| line.split_once(":").map(|(_, rest)| rest[3..].to_string()))
            .map(|line| {
                line.chars().filter(|c| !c.is_ascii_digit() || line.contains("dev")).collect()
            })
            .collect(),
        "mounts" => {
            let mut mounts: Vec<String> = lines
                .filter(|line| !line.is_empty() && !line.contains(" /.worker-spawner "))
                .map(|line| {
                    let (mount, system) = line.split_once(" - ").unwrap();
                    let mount: Vec<&str> = mount.split(' ').collect();
                    let system: Vec<&str> = system.split(' ').collect();
                    // The number of a group of mounts is each container's own.
                    let flags = mount[5..].iter().map(|flag| flag.split(':').next().unwrap());
                    let flags: Vec<&str> = flags.collect();
                    let options: Vec<&str> =
                        system[2].split(',').filter(|option| !option.contains("dir=")).collect();
                    format!("{} {} {} {}", mount[4], flags.join(" "), system[0], options.join(","))
                })
                .collect();
            mounts.retain(|mount| !mount.contains("docker-init"));
            mounts.sort();
            mounts
        }
        _ => lines.collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_function_finds_the_same_around_it_in_both() {
    let (cold, warm) = tokio::join!(cold_world(&[]), warm_world(4, &[]));
    let limits = json!({"memory_bytes": 48 << 20, "cpus": 0.5, "pids": 33});
    let variants = [
        json!({}),
        json!({"user": "1000"}),
        json!({"stdin": "words", "working_dir": "/data", "env": {"A": "b", "PATH": "/bin"}}),
        json!({"env": {"A": "b", "HOME": "/data", "Z": "z"}}),
        json!({"env": {"A": "b", "HOSTNAME": "here", "Z": "z"}, "user": "1000"}),
        limits,
    ];
    let mut differences = Vec::new();
    for variant in variants {
        for (question, argv) in QUESTIONS {
            let mut request = variant.clone();
            request["parameter"] = json!(argv);
            let (a, b) = tokio::join!(cold.execute(request.clone()), run_warm(&warm, &request));
            assert!(!is_warm(&a), "{}", a.outcome);
            let show = |ended: &Ended| {
                let mut said = normal(question, &String::from_utf8_lossy(&ended.stdout()));
                said.push(format!("errors: {}", String::from_utf8_lossy(&ended.stderr())));
                said.push(format!("exit: {:?}", ended.exit_code()));
                said
            };
            let (a, b) = (show(&a), show(&b));
            let only = |these: &[String], those: &[String]| -> Vec<String> {
                these.iter().filter(|line| !those.contains(line)).cloned().collect()
            };
            if a != b {
                differences.push(format!(
                    "{question} of {variant}: cold alone {:#?}, warm alone {:#?}",
                    only(&a, &b),
                    only(&b, &a)
                ));
            }
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    warm.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_deadline_and_a_cancellation_are_the_same_in_both() {
    let settings = [("STOP_GRACE", "1s")];
    let (cold, warm) = tokio::join!(cold_world(&settings), warm_world(4, &settings));
    for script in [
        "trap 'echo bye; exit 7' TERM; echo hello; touch /tmp/ready; while :; do sleep 0.1; done",
        "trap '' TERM; echo hello; touch /tmp/ready; while :; do sleep 0.1; done",
        "echo hello; touch /tmp/ready; sleep 1000",
        "echo hello; touch /tmp/ready; exec >&- 2>&-; sleep 1000",
        "trap 'echo child' TERM; echo hello; touch /tmp/ready; sleep 1000 & wait; echo woken; exit 3",
    ] {
        let mut request = super::shell(script);
        request["timeout_ms"] = json!(4000);
        let (a, b) = tokio::join!(cold.execute(request.clone()), run_warm(&warm, &request));
        assert_eq!(a.status(), "timed_out", "{}", a.outcome);
        assert_eq!(common(a.outcome), common(b.outcome), "{script}");
        let mut outcomes = Vec::new();
        for world in [&cold, &warm] {
            run_warm_if(world, &warm).await;
            let mut request = super::shell(script);
            let id = world.id();
            request["id"] = json!(id);
            let events = world.events(&id).await;
            world.submit(request).await;
            let container = world.engine.running(&id).await;
            eventually("the function listens", || async {
                world.engine.exec(&container, &["ls", "/tmp"]).await.contains("ready")
            })
            .await;
            let asked = world.client.request("functions.cancel", id.clone().into()).await.unwrap();
            let answer: Value = serde_json::from_slice(&asked.payload).unwrap();
            assert_eq!(answer["result"], "stopping", "{answer}");
            outcomes.push(events.wait_for("ended").await);
        }
        assert_eq!(outcomes[0]["status"], "cancelled", "{}", outcomes[0]);
        assert_eq!(common(outcomes[0].clone()), common(outcomes[1].clone()), "{script}");
    }
    warm.clean().await;
}

/// Waits until a container waits, where the world is the one that has some.
async fn run_warm_if(world: &World, warm: &World) {
    if std::ptr::eq(world, warm) {
        super::wait_for_waiting(world, 4).await;
    }
}
