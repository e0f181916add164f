#![allow(clippy::unwrap_used)]

use std::time::SystemTime;

use super::*;
use crate::capture::{Capture, Stream};
use crate::job::{Objects, StartKind, Timings, Usage, code};
use proptest::prelude::*;
use serde_json::Value;

fn outcome(stdout: &[u8], stderr: &[u8]) -> Outcome {
    let mut capture = Capture::new(1 << 20);
    capture.push(Stream::Stdout, stdout);
    capture.push(Stream::Stderr, stderr);
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
    Outcome {
        id: "job-1".parse().unwrap(),
        image: Some("python:3.11-slim".to_owned()),
        status: Status::Succeeded,
        exit_code: Some(0),
        error: None,
        output: capture.finish(),
        objects: Objects::default(),
        live_logs_dropped: 0,
        oom_killed: Some(false),
        attempt: 1,
        worker: "w".to_owned(),
        start: Some(StartKind::Cold),
        queued_at: at,
        started_at: Some(at),
        finished_at: at,
        timings: Timings { total: Some(Duration::from_micros(1_234_567)), ..Timings::default() },
        usage: Usage::default(),
        trace: None,
    }
}

fn value(outcome: &Outcome, limit: usize) -> Value {
    let encoded = json(outcome, limit).unwrap();
    assert!(encoded.len() <= limit, "{} > {limit}", encoded.len());
    serde_json::from_slice(&encoded).unwrap()
}

fn header<'a>(message: &'a ResultMessage, name: &str) -> Option<&'a str> {
    message.headers.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str())
}

#[test]
fn json_holds_what_is_known_and_nothing_else() {
    let v = value(&outcome(b"hi\n", b"\xff\0"), 1 << 20);
    assert_eq!(v["stdout"], "hi\n");
    assert_eq!((&v["stderr"], &v["stderr_encoding"]), (&"/wA=".into(), &"base64".into()));
    assert_eq!(v["queued_at"], "2023-11-14T22:13:20.250000Z");
    assert_eq!(v["timings_ms"]["total"], 1234.567);
    for absent in
        ["error", "signal", "usage", "stdout_object", "stderr_object", "live_logs_dropped_bytes"]
    {
        assert!(v.get(absent).is_none(), "{absent}");
    }
    assert!(v["timings_ms"].get("pull").is_none());
}

#[test]
fn a_character_cut_by_the_limit_leaves_a_text() {
    let mut capture = Capture::new(4);
    capture.push(Stream::Stdout, "abcé".as_bytes());
    let outcome = Outcome { output: capture.finish(), ..outcome(b"", b"") };
    let v = value(&outcome, 1 << 20);
    assert_eq!((&v["stdout"], &v["stdout_truncated"]), (&"abc".into(), &true.into()));
}

#[test]
fn output_is_cut_to_the_limit_and_flagged() {
    let v = value(&outcome(&[b'x'; 5000], b"small"), 2000);
    assert_eq!((&v["stdout_truncated"], &v["stderr_truncated"]), (&true.into(), &false.into()));
    assert_eq!(v["stderr"], "small");
    assert!(v["stdout"].as_str().unwrap().len() > 1000);
    let both = value(&outcome(&[1; 5000], &[0xff; 5000]), 2000);
    assert_eq!(both["stderr"].as_str().unwrap().len() % 4, 0);
    assert!(matches!(json(&outcome(b"", b""), 100), Err(EncodeError::TooLarge { .. })));
}

#[test]
fn a_reason_is_cut_rather_than_lost() {
    let error = Some(JobError::new(code::INVALID_FIELD, "x\"".repeat(700)));
    let v = value(&Outcome { error, started_at: None, ..outcome(b"", b"") }, 900);
    assert_eq!(v["error"]["code"], code::INVALID_FIELD);
    assert!(v["error"]["message"].as_str().unwrap().starts_with("x\"x\""));
}

#[test]
fn the_result_is_raw_output_with_facts_in_headers() {
    let message = result_message(&outcome(b"\0\xff\n", b""), 1 << 20);
    assert_eq!(&message.body[..], b"\0\xff\n");
    for (name, wanted) in [
        ("Job-Id", Some("job-1")),
        ("Job-Status", Some("succeeded")),
        ("Job-Exit-Code", Some("0")),
        ("Job-Image", Some("python:3.11-slim")),
        ("Job-Error", None),
        ("Job-Attempt", Some("1")),
        ("Job-Duration-Ms", Some("1234")),
        ("Job-Output-Truncated", Some("false")),
        ("Nats-Msg-Id", Some("job-1")),
    ] {
        assert_eq!(header(&message, name), wanted, "{name}");
    }
}

#[test]
fn output_kept_elsewhere_is_named() {
    let objects = Objects {
        stdout: Some(ObjectRef {
            bucket: "functions_objects".to_owned(),
            name: "job-1/stdout".to_owned(),
            size: 5000,
            digest: "SHA-256=abc".to_owned(),
            truncated: true,
        }),
        stderr: None,
    };
    let outcome = Outcome { objects, live_logs_dropped: 7, ..outcome(&[b'x'; 5000], b"") };
    let v = value(&outcome, 2000);
    assert_eq!(
        v["stdout_object"],
        serde_json::json!({
            "bucket": "functions_objects", "name": "job-1/stdout", "size": 5000,
            "digest": "SHA-256=abc",
            "truncated": true,
        })
    );
    assert_eq!((&v["stdout_truncated"], &v["live_logs_dropped_bytes"]), (&true.into(), &7.into()));
    assert!(v.get("stderr_object").is_none());
    let message = result_message(&outcome, 2000);
    assert_eq!(header(&message, "Job-Stdout-Object"), Some("functions_objects/job-1/stdout"));
    assert_eq!(header(&message, "Job-Stderr-Object"), None);
}

#[test]
fn the_result_of_a_job_that_never_ran_is_the_message() {
    let rejected = Outcome {
        status: Status::Rejected,
        image: Some("evil\r\nimage".to_owned()),
        exit_code: None,
        started_at: None,
        error: Some(JobError::new(code::INVALID_FIELD, "cpus: must be a number")),
        ..outcome(b"", b"")
    };
    let message = result_message(&rejected, 1 << 20);
    assert_eq!(&message.body[..], b"cpus: must be a number");
    assert_eq!(header(&message, "Job-Error"), Some(code::INVALID_FIELD));
    assert_eq!(header(&message, "Job-Exit-Code"), None);
    assert_eq!(header(&message, "Job-Image"), Some("evil??image"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_message_is_larger_than_its_limit(
        stdout in proptest::collection::vec(any::<u8>(), 0..4000),
        stderr in "\\PC{0,800}|[\\x00-\\x7f]{0,2000}",
        limit in 700_usize..6000,
    ) {
        let outcome = outcome(&stdout, stderr.as_bytes());
        let encoded = json(&outcome, limit).unwrap();
        prop_assert!(encoded.len() <= limit);
        let v: Value = serde_json::from_slice(&encoded).unwrap();
        if v["stdout_encoding"] == "base64" {
            let kept = BASE64.decode(v["stdout"].as_str().unwrap()).unwrap();
            prop_assert!(stdout.starts_with(&kept));
            prop_assert_eq!(v["stdout_truncated"].as_bool().unwrap(), kept.len() < stdout.len());
        }
        prop_assert!(stderr.starts_with(v["stderr"].as_str().unwrap()));
        let message = result_message(&outcome, limit);
        let length = headers::encoded_length(&message.headers) + message.body.len();
        prop_assert!(length <= limit);
        let whole = stdout.len() + stderr.len() == message.body.len();
        prop_assert_eq!(header(&message, "Job-Output-Truncated").unwrap(), (!whole).to_string());
    }
}

#[test]
fn a_result_can_be_made_of_the_outcomes_json() {
    let mut mixed = outcome(b"out", b"");
    let mut capture = Capture::new(1 << 20);
    for (stream, chunk) in
        [(Stream::Stderr, &b"e1\xff"[..]), (Stream::Stdout, b"o1"), (Stream::Stderr, b"e2")]
    {
        capture.push(stream, chunk);
    }
    mixed.output = capture.finish();
    let failed = Outcome {
        status: Status::Failed,
        exit_code: Some(3),
        objects: crate::job::Objects {
            stdout: Some(ObjectRef {
                bucket: "b".to_owned(),
                name: "n/1/stdout".to_owned(),
                size: 9,
                digest: "d".to_owned(),
                truncated: false,
            }),
            stderr: None,
        },
        ..outcome(b"x", b"y")
    };
    let rejected = Outcome {
        status: Status::Rejected,
        exit_code: None,
        started_at: None,
        error: Some(JobError::new(code::IMAGE_NOT_FOUND, "no such image")),
        ..outcome(b"", b"")
    };
    for outcome in [mixed, failed, rejected] {
        let json = json(&outcome, 1 << 20).unwrap();
        let made =
            result_of_json(&json, outcome.output.order(), outcome.trace.as_ref(), 1 << 20).unwrap();
        let direct = result_message(&outcome, 1 << 20);
        assert_eq!(made.body, direct.body);
        let sorted = |message: &ResultMessage| {
            let mut headers = message.headers.clone();
            headers.sort_unstable();
            headers
        };
        assert_eq!(sorted(&made), sorted(&direct));
    }
    assert_eq!(result_of_json(b"{}", &[], None, 100), None);
}
