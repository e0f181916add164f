#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::protocol::request::tests::policy;
use crate::protocol::{Subjects, asyncapi, request};

fn properties(schema: &Value) -> BTreeSet<String> {
    schema["properties"].as_object().unwrap().keys().cloned().collect()
}

#[test]
fn a_request_has_the_fields_the_decoder_takes() {
    let fields: BTreeSet<String> = FIELDS.iter().map(ToString::to_string).collect();
    assert_eq!(properties(&super::request()), fields);
    assert_eq!(super::request()["required"], json!(["image_reference"]));
    assert_eq!(super::request()["additionalProperties"], false);
}

#[test]
fn what_is_not_known_is_absent() {
    for schema in [super::request(), outcome(), event()] {
        assert!(!schema.to_string().contains("\"null\""), "{schema:#}");
    }
    let outcome = outcome();
    let required: Vec<_> = outcome["required"].as_array().unwrap().iter().collect();
    assert!(required.contains(&&json!("status")) && !required.contains(&&json!("exit_code")));
}

/// The decoder and the schema are two descriptions of one thing.
#[test]
fn the_schema_takes_what_the_decoder_takes() {
    let validator = jsonschema::validator_for(&super::request()).unwrap();
    let subjects = Subjects::new("functions");
    let policy = policy();
    for (request, is_right) in [
        (json!({"image_reference": "busybox"}), true),
        (json!({"image_reference": "busybox", "parameter": "echo 1"}), true),
        (json!({"image_reference": "busybox", "parameter": ["echo", "1"]}), true),
        (json!({"image_reference": "busybox", "id": "a-b_7", "stdin": "", "cpus": 0.5}), true),
        (json!({"image_reference": "busybox", "env": {"A": "b"}, "labels": {"c": "d"}}), true),
        (json!({"image_reference": "busybox", "working_dir": "/tmp", "user": "1:1"}), true),
        (json!({"image_reference": "busybox", "timeout_ms": 1, "pids": 1}), true),
        (json!({"image_reference": "busybox", "memory_bytes": 6_291_456}), true),
        (json!({"image_reference": "busybox", "priority": "low", "live_logs": true}), true),
        (
            json!({"image_reference": "busybox", "retry": {"max_attempts": 2, "on": ["failed"]}}),
            true,
        ),
        (json!({"image_reference": "busybox", "expires_at": "2030-01-31T12:00:00Z"}), true),
        (json!({}), false),
        (json!({"image_reference": ""}), false),
        (json!({"image_reference": 7}), false),
        (json!({"image_reference": "busybox", "parameter": 7}), false),
        (json!({"image_reference": "busybox", "parameter": [7]}), false),
        (json!({"image_reference": "busybox", "id": "a b"}), false),
        (json!({"image_reference": "busybox", "id": "x".repeat(65)}), false),
        (json!({"image_reference": "busybox", "env": {"A": 1}}), false),
        (json!({"image_reference": "busybox", "working_dir": "tmp"}), false),
        (json!({"image_reference": "busybox", "user": ":1"}), false),
        (json!({"image_reference": "busybox", "timeout_ms": 0}), false),
        (json!({"image_reference": "busybox", "timeout_ms": 1.5}), false),
        (json!({"image_reference": "busybox", "memory_bytes": 1}), false),
        (json!({"image_reference": "busybox", "cpus": 0}), false),
        (json!({"image_reference": "busybox", "priority": "urgent"}), false),
        (
            json!({"image_reference": "busybox", "retry": {"max_attempts": 2, "on": ["rejected"]}}),
            false,
        ),
        (json!({"image_reference": "busybox", "retry": {"max_attempts": 2}}), false),
        (json!({"image_reference": "busybox", "live_logs": "yes"}), false),
        (json!({"image_reference": "busybox", "imagereference": "busybox"}), false),
    ] {
        let decoded =
            request::decode(request.to_string().as_bytes(), &JobId::new(), &policy, &subjects);
        assert_eq!(decoded.is_ok(), is_right, "the decoder: {request}: {decoded:?}");
        assert_eq!(validator.is_valid(&request), is_right, "the schema: {request}");
    }
}

#[test]
fn the_examples_are_what_they_are_examples_of() {
    let document = asyncapi::document("functions");
    let subjects = Subjects::new("functions");
    let messages = document["components"]["messages"].as_object().unwrap();
    let mut examples = 0;
    for (name, message) in messages {
        let validator = jsonschema::validator_for(&message["payload"]).unwrap();
        for example in message["examples"].as_array().into_iter().flatten() {
            examples += 1;
            let payload = &example["payload"];
            assert!(validator.is_valid(payload), "{name}: {payload}");
            if name == "request" {
                let policy = policy();
                let text = payload.to_string();
                request::decode(text.as_bytes(), &JobId::new(), &policy, &subjects).unwrap();
            }
        }
    }
    assert!(examples >= 3);
}

/// `make specifications` writes them anew.
#[test]
fn the_published_specifications_are_those_of_this_code() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/specifications");
    for (name, wanted) in [
        ("request.schema.json", super::request()),
        ("outcome.schema.json", outcome()),
        ("event.schema.json", event()),
        ("asyncapi.json", asyncapi::document("functions")),
    ] {
        let text = std::fs::read_to_string(directory.join(name)).unwrap();
        assert!(
            text == format!("{wanted:#}\n"),
            "docs/specifications/{name} is not what the code says: run `make specifications`"
        );
    }
}
