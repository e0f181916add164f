#![allow(clippy::unwrap_used)]

use super::*;
use serde_json::json;

/// What a worker with the default settings takes, and one network more.
pub(in crate::protocol) fn policy() -> Policy {
    Policy {
        default_timeout: Duration::from_secs(300),
        max_timeout: Duration::from_secs(3600),
        memory_bytes: 512 << 20,
        cpus: 1.0,
        pids: 256,
        network: "none".to_owned(),
        allowed_networks: vec!["none".to_owned(), "lan".to_owned()],
        reply_prefixes: vec![],
        max_attempts: 5,
    }
}

fn decode_with(payload: &[u8], message_id: Option<&str>) -> Result<Request, Box<Refusal>> {
    let outer_id = JobId::from_message_id(message_id.unwrap_or("fallback"));
    decode(payload, &outer_id, &policy(), &Subjects::new("functions"))
}

fn decoded(body: Value) -> Result<Request, Box<Refusal>> {
    decode_with(body.to_string().as_bytes(), None)
}

#[test]
fn the_smallest_request_gets_the_defaults() {
    let request = decoded(json!({"image_reference": "python"})).unwrap();
    let Request { job, reply_to, .. } = &request;
    assert_eq!((job.id.as_str(), job.image.as_str()), ("fallback", "python"));
    assert_eq!(job.limits.timeout, Duration::from_secs(300));
    assert_eq!((job.limits.memory_bytes, job.limits.pids), (512 << 20, 256));
    assert_eq!(job.network, "none");
    assert!(job.args.is_empty() && job.stdin.is_none() && reply_to.is_none());
    assert_eq!((request.priority, request.expires_at, request.retry), (None, None, None));
    assert_eq!((request.live_logs, request.stdin_object), (None, None));
}

#[test]
fn every_field_is_read() {
    let Request { job, reply_to, .. } = decoded(json!({
        "image_reference": "python:3.11-slim", "parameter": ["a b", ""], "id": "j-1",
        "env": {"A": "1"}, "stdin": "in", "working_dir": "/tmp", "user": "1000:1000",
        "timeout_ms": 1500, "memory_bytes": 16777216, "cpus": 0.5, "pids": 8,
        "network": "lan", "labels": {"team": "x"}, "reply_to": "_INBOX.a",
    }))
    .unwrap();
    assert_eq!(job.id.as_str(), "j-1");
    assert_eq!(job.args, ["a b", ""]);
    assert_eq!(job.env["A"], "1");
    assert_eq!(job.stdin.as_deref(), Some(&b"in"[..]));
    assert_eq!(job.working_dir.as_deref(), Some("/tmp"));
    assert_eq!(job.user.as_deref(), Some("1000:1000"));
    assert_eq!(job.limits.timeout, Duration::from_millis(1500));
    assert_eq!((job.limits.memory_bytes, job.limits.cpus, job.limits.pids), (16 << 20, 0.5, 8));
    assert_eq!((job.network.as_str(), job.labels["team"].as_str()), ("lan", "x"));
    assert_eq!(reply_to.as_deref(), Some("_INBOX.a"));
}

#[test]
fn how_a_job_is_delivered_is_read() {
    let request = decoded(json!({
        "image_reference": "x", "priority": "low", "expires_at": "2023-11-14T23:13:20.5+01:00",
        "retry": {"max_attempts": 5, "on": ["failed", "out_of_memory", "failed"]},
        "live_logs": false, "stdin_object": "inputs/a b.csv",
    }))
    .unwrap();
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
    let retry = Retry { max_attempts: 5, on: vec![Status::Failed, Status::OutOfMemory] };
    assert_eq!((request.priority, request.expires_at), (Some(Priority::Low), Some(at)));
    assert_eq!((request.retry, request.live_logs), (Some(retry), Some(false)));
    assert_eq!(request.stdin_object.as_deref(), Some("inputs/a b.csv"));
}

#[test]
fn standard_input_has_one_source() {
    let body = json!({"image_reference": "x", "stdin": "", "stdin_object": "a"});
    let message = decoded(body).unwrap_err().error.message;
    assert_eq!(message, "stdin_object: must not be given together with stdin");
}

#[test]
fn more_attempts_than_there_are_name_the_setting() {
    let retry = json!({"max_attempts": 6, "on": ["failed"]});
    let refusal = decoded(json!({"image_reference": "x", "retry": retry})).unwrap_err();
    let message = "retry: max_attempts: 6 is above this worker's MAX_DELIVER, 5";
    assert_eq!(refusal.error.message, message);
}

#[test]
fn a_command_line_is_split_as_a_shell_quotes() {
    for (line, words) in [
        ("", vec![]),
        ("  ", vec![]),
        ("echo hi", vec!["echo", "hi"]),
        (r#"python3 -c "print('Hello, World!')""#, vec!["python3", "-c", "print('Hello, World!')"]),
        (r"a\ b 'c  d' e''f", vec!["a b", "c  d", "ef"]),
        ("''", vec![""]),
        (r#""\$HOME" $HOME *"#, vec!["$HOME", "$HOME", "*"]),
        ("echo #1 '#2' \"a #b\" c#", vec!["echo", "#1", "#2", "a #b", "c#"]),
        ("a\nb", vec!["a", "b"]),
        ("naïve 😀", vec!["naïve", "😀"]),
    ] {
        let request = decoded(json!({"image_reference": "x", "parameter": line}));
        assert_eq!(request.unwrap().job.args, words, "{line:?}");
    }
}

#[test]
fn an_id_comes_from_the_body_then_the_header() {
    let body = br#"{"image_reference": "x", "id": "body"}"#;
    assert_eq!(decode_with(body, Some("header")).unwrap().job.id.as_str(), "body");
    let body = br#"{"image_reference": "x"}"#;
    assert_eq!(decode_with(body, Some("header")).unwrap().job.id.as_str(), "header");
    assert_eq!(decode_with(b"{", Some("header")).unwrap_err().id.as_str(), "header");
}

#[test]
fn null_is_absent() {
    let request = decoded(json!({"image_reference": "x", "parameter": null, "stdin": null}));
    assert!(request.unwrap().job.args.is_empty());
}

#[test]
fn what_is_no_object_is_invalid_json() {
    for bad in [&b""[..], b"{", b"[]", b"\"x\"", b"null", b"\xff\xfe", b"{} {}", b"{'a':1}"] {
        let refusal = decode_with(bad, None).unwrap_err();
        assert_eq!(refusal.error.code, code::INVALID_JSON, "{:?}", String::from_utf8_lossy(bad));
    }
}

#[test]
fn a_wrong_field_is_named() {
    let cases = [
        ("image_reference", json!("")),
        ("image_reference", json!(5)),
        ("image_reference", json!(null)),
        ("image_reference", json!("UPPER CASE")),
        ("image_reference", json!("x".repeat(600))),
        ("parameter", json!(5)),
        ("parameter", json!("echo 'unclosed")),
        ("parameter", json!(["a", 1])),
        ("parameter", json!("nul\0")),
        ("id", json!("a b")),
        ("id", json!("")),
        ("id", json!(7)),
        ("env", json!(["A=1"])),
        ("env", json!({"A": 1})),
        ("env", json!({"A=B": "1"})),
        ("env", json!({"": "1"})),
        ("stdin", json!(["x"])),
        ("working_dir", json!("relative")),
        ("user", json!("a:b:c")),
        ("user", json!("")),
        ("timeout_ms", json!(0)),
        ("timeout_ms", json!(-1)),
        ("timeout_ms", json!(1.5)),
        ("timeout_ms", json!("5s")),
        ("timeout_ms", json!(3_600_001)),
        ("memory_bytes", json!(1024)),
        ("memory_bytes", json!(1_u64 << 40)),
        ("cpus", json!(0)),
        ("cpus", json!(2)),
        ("cpus", json!("1")),
        ("pids", json!(0)),
        ("pids", json!(257)),
        ("network", json!("host")),
        ("labels", json!({"worker-spawner.job-id": "x"})),
        ("labels", json!("x")),
        ("reply_to", json!("$JS.API.STREAM.DELETE.X")),
        ("reply_to", json!("elsewhere")),
        ("priority", json!("urgent")),
        ("priority", json!("High")),
        ("priority", json!(1)),
        ("expires_at", json!("tomorrow")),
        ("expires_at", json!(1_700_000_000)),
        ("expires_at", json!("2023-11-14T22:13:20")),
        ("retry", json!(3)),
        ("retry", json!({})),
        ("retry", json!({"max_attempts": 2})),
        ("retry", json!({"on": ["failed"]})),
        ("retry", json!({"max_attempts": 2, "on": []})),
        ("retry", json!({"max_attempts": 2, "on": "failed"})),
        ("retry", json!({"max_attempts": 2, "on": [1]})),
        ("retry", json!({"max_attempts": 2, "on": ["succeeded"]})),
        ("retry", json!({"max_attempts": 2, "on": ["failed", "error"]})),
        ("retry", json!({"max_attempts": 0, "on": ["failed"]})),
        ("retry", json!({"max_attempts": 6, "on": ["failed"]})),
        ("retry", json!({"max_attempts": 2, "on": ["failed"], "delay": 1})),
        ("live_logs", json!("true")),
        ("live_logs", json!(1)),
        ("stdin_object", json!("")),
        ("stdin_object", json!("x".repeat(513))),
        ("stdin_object", json!({"name": "x"})),
        ("host_config", json!({"Privileged": true})),
        ("Image_reference", json!("x")),
    ];
    for (field, value) in cases {
        let mut body = json!({"image_reference": "python", "id": "good"});
        body[field] = value.clone();
        let refusal = decoded(body).unwrap_err();
        assert_eq!(refusal.error.code, code::INVALID_FIELD, "{field} = {value}");
        assert!(
            refusal.error.message.starts_with(&format!("{field}: ")),
            "{field} = {value}: {}",
            refusal.error.message
        );
        if field != "id" {
            assert_eq!(refusal.id.as_str(), "good");
        }
    }
}

#[test]
fn a_field_given_twice_is_wrong() {
    let body = br#"{"image_reference": "good", "image_reference": "evil"}"#;
    let refusal = decode_with(body, None).unwrap_err();
    assert_eq!(refusal.error.message, "image_reference: is given twice");
}

#[test]
fn errors_quote_little_and_nothing_unprintable() {
    let long = "\"\u{1b}".repeat(100_000);
    for field in ["working_dir", "reply_to", "network", &long] {
        let mut body = json!({"image_reference": "python"});
        body[field] = long.clone().into();
        let message = decoded(body).unwrap_err().error.message;
        assert!(message.len() < 1000 && !message.contains('\u{1b}'), "{field}: {message}");
    }
}

#[test]
fn all_wrong_fields_are_named_at_once() {
    let message = decoded(json!({"cpus": 9, "pids": 0})).unwrap_err().error.message;
    for field in ["image_reference", "cpus", "pids"] {
        assert!(message.contains(&format!("{field}: ")), "{message}");
    }
}
