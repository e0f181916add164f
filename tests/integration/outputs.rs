//! What programs print: nothing, everything, far too much.

use serde_json::{Value, json};

use crate::support::engine::Engine;
use crate::support::images::every_byte;
use crate::support::nats::NatsOptions;
use crate::support::world::{Ended, World, decoded};

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_of_every_kind_comes_back_byte_for_byte() {
    let world = World::start(&[]).await;
    let many = (0..20_000).map(|n| format!("line {n}\n")).collect::<String>();
    let cases: Vec<(&str, Value, Vec<u8>, Vec<u8>)> = vec![
        ("nothing", json!("true"), vec![], vec![]),
        ("no line break", json!("printf x"), b"x".to_vec(), vec![]),
        ("only errors", json!("sh -c 'echo e >&2'"), vec![], b"e\n".to_vec()),
        ("both", json!("sh -c 'echo o; echo e >&2'"), b"o\n".to_vec(), b"e\n".to_vec()),
        ("NULs", json!(["printf", "a\\0b\\0\\0"]), b"a\0b\0\0".to_vec(), vec![]),
        ("not UTF-8", json!(["printf", "\\377\\376x"]), b"\xff\xfex".to_vec(), vec![]),
        ("every byte", json!("cat /etc/every-byte"), every_byte(), vec![]),
        ("every byte, as errors", json!("sh -c 'cat /etc/every-byte >&2'"), vec![], every_byte()),
        ("carriage returns", json!(["printf", "a\\r\\nb\\r"]), b"a\r\nb\r".to_vec(), vec![]),
        (
            "terminal codes",
            json!(["printf", "\\033[31mred\\033[0m"]),
            b"\x1b[31mred\x1b[0m".to_vec(),
            vec![],
        ),
        (
            "many lines",
            json!("sh -c 'i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done'"),
            many.into_bytes(),
            vec![],
        ),
        (
            "what looks like a frame",
            json!(["printf", "\\001\\000\\000\\000\\000\\000\\000\\005hello"]),
            b"\x01\0\0\0\0\0\0\x05hello".to_vec(),
            vec![],
        ),
    ];
    let jobs = cases.into_iter().map(|(what, parameter, out, err)| {
        let world = &world;
        async move {
            let ended = world.execute(json!({"parameter": parameter})).await;
            assert_eq!(ended.status(), "succeeded", "{what}: {}", ended.outcome);
            assert!(ended.stdout() == out, "{what}: standard output differs: {}", ended.outcome);
            assert!(ended.stderr() == err, "{what}: standard error differs: {}", ended.outcome);
            assert_eq!(
                ended.result.payload.len(),
                out.len() + err.len(),
                "{what}: the body is both"
            );
            if err.is_empty() || out.is_empty() {
                assert!(
                    ended.result.payload == [out.clone(), err.clone()].concat(),
                    "{what}: the body differs"
                );
            }
            for (name, bytes) in [("stdout_encoding", &out), ("stderr_encoding", &err)] {
                let encoding = ended.outcome[name].as_str();
                let wanted = if std::str::from_utf8(bytes).is_ok() { "utf8" } else { "base64" };
                assert!(
                    encoding == Some(wanted) || (encoding.is_none() && bytes.is_empty()),
                    "{what}: {encoding:?}"
                );
            }
            assert!(!is_cut(&ended), "{what}: {}", ended.outcome);
        }
    });
    futures::future::join_all(jobs).await;
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_end_of_the_output_is_not_the_end_of_the_function() {
    let world = World::start(&[]).await;
    let script = "echo before; exec >&- 2>&-; sleep 2; exit 5";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
    assert_eq!((ended.status(), ended.exit_code()), ("failed", Some(5)), "{}", ended.outcome);
    assert_eq!(ended.text(), "before\n");
    let run = ended.outcome["timings_ms"]["run"].as_f64().unwrap();
    assert!(run >= 1500.0, "it was waited for: {}", ended.outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_body_holds_both_streams_as_they_came() {
    let world = World::start(&[]).await;
    // The pauses make the order one that can be relied on; without them the kernel may merge.
    let script = "for i in 1 2 3; do echo out $i; sleep 0.3; echo err $i >&2; sleep 0.3; done";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
    assert_eq!(ended.result.payload, "out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n");
    assert_eq!(ended.text(), "out 1\nout 2\nout 3\n");
    assert_eq!(ended.stderr(), b"err 1\nerr 2\nerr 3\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_past_the_limit_is_dropped_and_said_to_be() {
    let world = World::start(&[("OUTPUT_LIMIT", "1000B")]).await;
    let count =
        |n: usize, stream: &str| json!(["sh", "-c", format!("yes abcdefg | head -c {n} {stream}")]);
    let yes: Vec<u8> = b"abcdefg\n".iter().copied().cycle().take(5000).collect();

    let ended = world.execute(json!({"parameter": count(1000, "")})).await;
    assert!(
        ended.stdout() == yes[..1000] && !is_cut(&ended),
        "exactly the limit: {}",
        ended.outcome
    );

    let ended = world.execute(json!({"parameter": count(1001, "")})).await;
    assert!(ended.stdout() == yes[..1000], "one too many: {}", ended.outcome);
    assert_eq!(ended.outcome["stdout_truncated"], true);
    assert_ne!(ended.outcome["stderr_truncated"], true);
    assert_eq!(ended.header("Job-Output-Truncated").as_deref(), Some("true"));
    assert!(ended.result.payload == yes[..1000]);
    assert_eq!(ended.status(), "succeeded", "too much output is no failure");

    let ended = world.execute(json!({"parameter": count(5000, ">&2")})).await;
    assert!(ended.stderr() == yes[..1000], "errors: {}", ended.outcome);
    assert_eq!(ended.outcome["stderr_truncated"], true);
    assert_ne!(ended.outcome["stdout_truncated"], true);

    // Each stream has its own limit: a talkative one does not silence the other.
    let script = "yes abcdefg | head -c 5000; echo the reason >&2; exit 9";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
    assert_eq!(ended.stderr(), b"the reason\n", "{}", ended.outcome);
    assert_eq!(ended.exit_code(), Some(9), "the container goes on past the limit");

    // The limit falls within a character of two bytes.
    let script = "printf x; yes é | tr -d '\\n' | head -c 3000";
    let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
    let full = format!("x{}", "é".repeat(1500)).into_bytes();
    let out = ended.stdout();
    assert!(full.starts_with(&out) && (999..=1000).contains(&out.len()), "{}", ended.outcome);
    assert!(is_cut(&ended));
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_gigabyte_without_a_line_break_neither_fills_the_memory_nor_blocks() {
    let world = World::start(&[]).await;
    let ended = world.execute(json!({"parameter": "head -c 1073741824 /dev/zero"})).await;
    assert_eq!(ended.status(), "succeeded", "it ran to its end: {}", ended.outcome["error"]);
    assert_eq!(ended.outcome["stdout_truncated"], true);
    assert_eq!(ended.header("Job-Output-Truncated").as_deref(), Some("true"));
    let out = ended.stdout();
    assert!(!out.is_empty() && out.len() <= 512 * 1024, "{} bytes kept", out.len());
    assert!(out.iter().all(|byte| *byte == 0));
    let peak = world.daemon.peak_memory();
    assert!(peak < 128 << 20, "{peak} bytes of memory for one job's output");
    world.engine.gone(ended.outcome["id"].as_str().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_server_would_refuse_is_cut_and_the_connection_stays() {
    for max_payload in [4096, 65_536] {
        let nats = NatsOptions { max_payload: Some(max_payload), ..NatsOptions::default() };
        let world = World::with(nats, Engine::shared().await, &[]).await;
        let cases = [
            ("text", "yes abcdefg | head -c 300000"),
            ("bytes JSON has to spell out", "head -c 300000 /dev/zero"),
            ("bytes that are no text", "yes | tr y '\\377' | head -c 300000"),
            ("errors", "yes abcdefg | head -c 300000 >&2"),
            ("both", "yes abcdefg | head -c 300000; yes abcdefg | head -c 300000 >&2"),
            ("quotes", "yes '\"' | tr -d '\\n' | head -c 300000"),
        ];
        for (what, script) in cases {
            let ended = world.execute(json!({"parameter": ["sh", "-c", script]})).await;
            assert_eq!(ended.status(), "succeeded", "{what}: {}", ended.outcome);
            assert!(is_cut(&ended), "{what}: it says so: {}", ended.outcome);
            assert_eq!(ended.header("Job-Output-Truncated").as_deref(), Some("true"), "{what}");
            assert!(
                ended.result.payload.len() > max_payload / 4,
                "{what}: as much as fits is kept"
            );
            assert!(
                !ended.stdout().is_empty() || !ended.stderr().is_empty(),
                "{what}: {}",
                ended.outcome
            );
        }
        let outcome = world.run(json!({"parameter": "sh -c 'yes | head -c 300000'"})).await;
        assert_eq!(outcome["stdout_truncated"], true);
        assert!(!decoded(&outcome, "stdout").is_empty());
        let log = world.nats.log();
        assert!(!log.to_lowercase().contains("maximum payload"), "the server saw too much:\n{log}");
        let clients = world.daemon.log().text();
        assert!(
            !clients.to_lowercase().contains("disconnected"),
            "the connection was lost:\n{clients}"
        );
        world.clean().await;
    }
}

/// Whether the outcome says that output is missing, and the result as well.
fn is_cut(ended: &Ended) -> bool {
    let said =
        ended.outcome["stdout_truncated"] == true || ended.outcome["stderr_truncated"] == true;
    assert_eq!(
        said,
        ended.header("Job-Output-Truncated").as_deref() == Some("true"),
        "{}",
        ended.outcome
    );
    said
}
