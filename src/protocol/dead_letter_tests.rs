#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;
use crate::job::code;
use proptest::prelude::*;

/// What is given up, with a message of this length.
struct Given {
    payload: Bytes,
    headers: Vec<(String, String)>,
    error: JobError,
}

impl Given {
    fn new(payload: usize, message: usize, headers: &[(&str, &str)]) -> Self {
        let error = JobError::new(code::INVALID_FIELD, "m".repeat(message));
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        Self {
            payload: vec![b'x'; payload].into(),
            headers: headers.iter().map(owned).collect(),
            error,
        }
    }

    fn letter(&self, limit: usize) -> DeadLetter {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let request = Undelivered {
            payload: &self.payload,
            headers: &self.headers,
            id: &"job-1".parse().unwrap(),
            image: Some("python:3"),
            error: &self.error,
            attempts: 3,
            subject: "functions.execute",
            queued_at: at,
        };
        let letter = dead_letter(&request, at + Duration::from_secs(1), limit);
        let length = encoded_length(&letter.headers) + letter.body.len();
        assert!(length <= limit, "{length} > {limit}");
        assert!(self.payload.starts_with(&letter.body));
        assert_eq!(letter.truncated, letter.body.len() < self.payload.len());
        assert_eq!(letter.truncated, values(&letter, TRUNCATED) == ["true"]);
        letter
    }
}

fn values<'a>(letter: &'a DeadLetter, name: &str) -> Vec<&'a str> {
    let named = |(n, v): &'a (String, String)| (n == name).then_some(v.as_str());
    letter.headers.iter().filter_map(named).collect()
}

#[test]
fn the_request_is_whole_and_the_reason_in_headers() {
    let letter =
        Given::new(5, 4, &[("Trace", "1"), ("Other", "x"), ("Trace", "2")]).letter(1 << 20);
    assert_eq!(letter.body, "xxxxx");
    let wanted = [
        ("Nats-Msg-Id", "job-1-dead"),
        ("Job-Id", "job-1"),
        ("Dead-Letter-Reason", "request.invalid_field"),
        ("Dead-Letter-Attempts", "3"),
        ("Dead-Letter-At", "2023-11-14T22:13:21.000000Z"),
        ("Dead-Letter-Queued-At", "2023-11-14T22:13:20.000000Z"),
        ("Dead-Letter-Subject", "functions.execute"),
        ("Job-Image", "python:3"),
        ("Dead-Letter-Message", "mmmm"),
        ("Trace", "1"),
        ("Other", "x"),
        ("Trace", "2"),
    ];
    let headers: Vec<_> = letter.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(headers, wanted);
}

#[test]
fn headers_that_mean_something_elsewhere_are_renamed() {
    let given = Given::new(
        0,
        0,
        &[
            ("Nats-Msg-Id", "m"),
            ("nats-rollup", "all"),
            ("Dead-Letter-Reason", "busy"),
            ("JOB-ID", "j"),
            ("Natsy", "n"),
            ("Multi", "a\r\nNats-Rollup: all"),
        ],
    );
    let letter = given.letter(1 << 20);
    for (name, wanted) in [
        ("Nats-Msg-Id", "job-1-dead"),
        ("Original-Nats-Msg-Id", "m"),
        ("Original-nats-rollup", "all"),
        ("Dead-Letter-Reason", "request.invalid_field"),
        ("Original-Dead-Letter-Reason", "busy"),
        ("Job-Id", "job-1"),
        ("Original-JOB-ID", "j"),
        ("Natsy", "n"),
        ("Multi", "a??Nats-Rollup: all"),
    ] {
        assert_eq!(values(&letter, name), [wanted], "{name}");
    }
    assert!(values(&letter, HEADERS_DROPPED).is_empty());
}

#[test]
fn what_cannot_be_sent_as_a_header_is_dropped_and_told() {
    let letter = Given::new(0, 0, &[("a b", "1"), ("", "2"), ("é", "3"), ("c:", "4"), ("ok", "5")])
        .letter(1 << 20);
    assert_eq!((values(&letter, "ok"), letter.headers.len()), (vec!["5"], 11));
    assert_eq!(values(&letter, HEADERS_DROPPED), ["true"]);
}

#[test]
fn room_is_taken_from_the_message_then_the_headers_then_the_body() {
    let given = Given::new(5000, 1000, &[("First", "1"), ("Second", &"2".repeat(50))]);
    let whole = encoded_length(&given.letter(1 << 20).headers) + 5000;

    let exact = given.letter(whole);
    assert_eq!(values(&exact, MESSAGE)[0].len(), 1000);

    let shorter = given.letter(whole - 100);
    let message = values(&shorter, MESSAGE)[0].to_owned();
    assert!(message.len() <= 900 && message.ends_with('…'), "{message}");
    assert_eq!(values(&shorter, "Second").len(), 1);

    let dropped = given.letter(whole - 1000 - 10);
    assert_eq!(values(&dropped, HEADERS_DROPPED), ["true"]);
    assert!(values(&dropped, "Second").is_empty() && !dropped.truncated);
    assert_eq!(values(&dropped, "First"), ["1"]);

    let cut = given.letter(3000);
    assert!(cut.truncated && !cut.body.is_empty());
    assert_eq!(values(&cut, HEADERS_DROPPED), ["true"]);
    assert_eq!(values(&cut, MESSAGE)[0].len(), 1000);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_letter_is_larger_than_its_limit(
        payload in 0_usize..3000,
        message in 0_usize..2500,
        limit in 200_usize..6000,
        headers in proptest::collection::vec(("[A-Za-z -]{0,20}", "\\PC{0,200}|[\\x00-\\x7f]{0,20}"), 0..20),
    ) {
        let letter = Given { headers, ..Given::new(payload, message, &[]) }.letter(limit);
        prop_assert_eq!(values(&letter, NATS_MSG_ID), ["job-1-dead"]);
        for (name, value) in &letter.headers {
            prop_assert!(!name.is_empty() && !value.chars().any(char::is_control));
        }
        if limit > payload + 500 {
            prop_assert!(!letter.truncated);
        }
    }
}
