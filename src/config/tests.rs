#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use super::raw::Raw;
use super::settings::SETTINGS;
use super::*;

fn config(vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::from_vars(vars.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())))
}

fn problems(vars: &[(&str, &str)]) -> Vec<String> {
    config(vars).expect_err("these settings are wrong").problems
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let explicit: Vec<_> =
        SETTINGS.iter().filter(|s| !s.default.is_empty()).map(|s| (s.name, s.default)).collect();
    let (mut explicit, implicit) = (config(&explicit).unwrap(), config(&[]).unwrap());
    // But for this they are the same.
    explicit.given.clear();
    assert_eq!(format!("{explicit:?}"), format!("{implicit:?}"));
    assert_eq!(implicit.max_containers, 5);
    assert_eq!(implicit.policy.memory_bytes, 512 << 20);
    assert_eq!(implicit.policy.default_timeout, Duration::from_secs(300));
    assert_eq!(implicit.output_limit, 512 << 10);
    assert!(implicit.confinement.readonly_rootfs);
}

#[test]
fn every_field_read_is_a_documented_setting() {
    let raw = serde_json::to_value(Raw::default()).unwrap();
    let fields: BTreeSet<String> =
        raw.as_object().unwrap().keys().map(|k| k.to_uppercase()).filter(|k| k != "HOME").collect();
    let documented: BTreeSet<String> = SETTINGS.iter().map(|s| s.name.to_owned()).collect();
    assert_eq!(fields, documented);
}

#[test]
fn the_example_file_holds_every_setting_with_its_default() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/.env.example");
    let example = std::fs::read_to_string(path).unwrap();
    let wanted: String = SETTINGS
        .iter()
        .map(|s| {
            let comment = if s.default.is_empty() { "# " } else { "" };
            format!("\n# {}\n{comment}{}={}\n", s.help, s.name, s.default)
        })
        .collect();
    let (_, settings) = example.split_once("\n\n").unwrap();
    assert_eq!(format!("\n{settings}"), wanted, "\n.env.example should end with:\n{wanted}");
}

#[test]
fn the_readme_lists_every_setting_with_its_default() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    for s in SETTINGS {
        let default =
            if s.default.is_empty() { "–".to_owned() } else { format!("`{}`", s.default) };
        let row = format!("| `{}` | {default} | {} |", s.name, s.help.replace('|', "\\|"));
        assert!(readme.contains(&row), "README.md lacks the row\n{row}");
    }
}

#[test]
fn all_bad_values_are_named_at_once() {
    let found = problems(&[
        ("MAX_CONTAINERS", "zero"),
        ("MEMORY_LIMIT", "lots"),
        ("DEFAULT_TIMEOUT", "300"),
        ("PULL_POLICY", "sometimes"),
        ("READONLY_ROOTFS", "maybe"),
        ("SUBJECT_PREFIX", "a b"),
        ("NATS_TLS_CA", "/no/such/file"),
        ("DOCKER_HOST", "localhost"),
    ]);
    let named: BTreeSet<&str> = found.iter().map(|l| l.split(':').next().unwrap()).collect();
    let wanted = BTreeSet::from([
        "MAX_CONTAINERS",
        "MEMORY_LIMIT",
        "DEFAULT_TIMEOUT",
        "PULL_POLICY",
        "READONLY_ROOTFS",
        "SUBJECT_PREFIX",
        "NATS_TLS_CA",
        "DOCKER_HOST",
    ]);
    assert_eq!(named, wanted, "{found:#?}");
}

#[test]
fn a_bad_value_says_what_was_expected() {
    for (name, value, expected) in [
        ("MAX_CONTAINERS", "0", "whole number from 1 to 10000"),
        ("CPU_LIMIT", "NaN", "number of processors"),
        ("MEMORY_LIMIT", "1KiB", "at least 6291456 bytes"),
        ("MAX_TIMEOUT", "9999y", "a year at most"),
        ("DEFAULT_TIMEOUT", "2h", "not be longer than MAX_TIMEOUT"),
        ("ENGINE_TIMEOUT", "0s", "longer than zero"),
        ("DELIVERY", "pigeon", "one of auto, jetstream, core"),
        ("SUBJECT_PREFIX", "functions.>", "without spaces"),
        ("SUBJECT_PREFIX", "fonctions-é", "streams are named after it"),
        ("QUEUE_GROUP", "a/b", "or set DELIVERY=core"),
        ("REPLY_PREFIXES", "$JS.API", "such as team.replies"),
        ("CONTAINER_NETWORK", "container:abc", "a network's name"),
        ("IMAGE_ALLOWLIST", "a[", "glob patterns"),
        ("ACK_WAIT", "10ms", "at least 1s"),
        ("STREAM_REPLICAS", "2", "one of 1, 3, 5"),
        ("RECORD_TTL", "1h", "shorter than QUEUE_MAX_AGE"),
        ("RESULTS_MAX_AGE", "1m", "shorter than DUPLICATE_WINDOW"),
        ("NATS_URL", ",", "at least one server"),
        ("NATS_USER", "me", "NATS_PASSWORD: must be set too"),
        ("NATS_TLS_KEY", "/k", "NATS_TLS_CERT: must be set too"),
        ("RUST_LOG", "worker_spawner=loud", "log filter"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318", "such as http://host:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://host/?a=b", "without user, password and query"),
        ("DOCKER_HOST", "https://engine:2376", "folder with ca.pem"),
        ("DOCKER_HOST", "tcp://[bad", "an address such as"),
        ("DEFAULT_TIMEOUT", "0s", "longer than zero"),
        ("NATS_URL", "a:b@one,c:d@two", "the same user"),
        ("NATS_URL", "nats://:pw@one", "number 1 is none"),
        ("NATS_TLS_CA", "/etc/hostname", "no certificate in PEM"),
        ("NATS_CREDS_FILE", "/etc/hostname", "no credentials"),
        ("NATS_NKEY_SEED_FILE", "/etc/hostname", "no nkey seed"),
    ] {
        let found = problems(&[(name, value)]);
        assert!(
            found.len() == 1 && found[0].contains(expected),
            "{name}={value}: expected {expected:?} in {found:?}"
        );
    }
}

#[test]
fn an_empty_value_is_an_unset_one() {
    let config = config(&[("MAX_CONTAINERS", ""), ("NATS_TOKEN", " "), ("CONTAINER_USER", "")]);
    let config = config.unwrap();
    assert_eq!(config.max_containers, 5);
    assert!(config.nats.token.is_none() && config.confinement.user.is_none());
}

#[test]
fn tls_to_the_engine_needs_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let vars = [
        ("DOCKER_HOST", "tcp://engine:2376"),
        ("DOCKER_TLS_VERIFY", "1"),
        ("DOCKER_CERT_PATH", path),
    ];
    assert_eq!(problems(&vars).len(), 3);
    for file in ["ca.pem", "cert.pem", "key.pem"] {
        std::fs::write(dir.path().join(file), "").unwrap();
    }
    assert!(config(&vars).unwrap().docker.tls.is_some());
    // An empty variable is an unset one, whatever the engine's own client makes of it.
    assert!(config(&[vars[0], ("DOCKER_TLS_VERIFY", "")]).unwrap().docker.tls.is_none());
}

#[test]
fn secrets_reach_no_debug_output_and_no_error() {
    for var in [("NATS_URL", "nats://me:hunter2@localhost:4222"), ("NATS_TOKEN", "hunter2")] {
        let shown = format!("{:?}", config(&[var]).unwrap());
        assert!(!shown.contains("hunter2") && shown.contains("[redacted]"), "{shown}");
    }
    let traces = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "key=hunter2"),
    ];
    assert!(!format!("{:?}", config(&traces).unwrap()).contains("hunter2"));
    let found = problems(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:hunter2@collector"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
        ("NATS_URL", "ftp://me:hunter2@[bad"),
        ("NATS_TOKEN", "hunter2"),
        ("NATS_USER", "me"),
        ("NATS_PASSWORD", "hunter2"),
    ]);
    assert!(found.len() == 4 && !format!("{found:?}").contains("hunter2"), "{found:?}");
}

#[test]
fn a_user_or_token_may_come_with_the_url() {
    let with_url = |url| config(&[("NATS_URL", url)]).unwrap().nats;
    let nats = with_url("nats://me:p%40ss@one:4222, tls://me:p%40ss@two");
    assert_eq!(nats.servers, ["nats://one:4222", "tls://two"]);
    assert_eq!(nats.user, Some(("me".to_owned(), Secret::new("p@ss"))));
    let nats = with_url("t0ken@one");
    assert_eq!(
        (nats.servers, nats.token),
        (vec!["nats://one".to_owned()], Some(Secret::new("t0ken")))
    );
    let found = problems(&[("NATS_URL", "me:x@one"), ("NATS_TOKEN", "y")]);
    assert!(found.len() == 1 && found[0].contains("only one of"), "{found:?}");
}

#[test]
fn what_is_wrong_with_traces_is_said_where_they_are_exported() {
    for (name, value, wanted) in [
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=b,c", "number 2 is none"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a b=c", "number 1 is none"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "a number from 0 to 1"),
    ] {
        let found = problems(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://host"), (name, value)]);
        assert_eq!(found.len(), 1, "{found:?}");
        let problem = &found[0];
        assert!(problem.starts_with(&format!("{name}: ")) && problem.contains(wanted), "{problem}");
        // It may be meant for another program.
        assert_eq!(config(&[(name, value)]).unwrap().traces, None);
    }
}

#[test]
fn traces_are_exported_where_that_is_asked_for() {
    assert_eq!(config(&[("OTEL_EXPORTER_OTLP_HEADERS", "a=b")]).unwrap().traces, None);
    let traces = config(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector/otlp/"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Basic%20YTpi, x-team = a=b"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
    ]);
    let headers = [("authorization", "Basic YTpi"), ("x-team", "a=b")];
    let wanted = Traces {
        endpoint: "https://collector/otlp".to_owned(),
        headers: headers.map(|(name, value)| (name.to_owned(), Secret::new(value))).into(),
        service_name: "worker-spawner".to_owned(),
        ratio: 0.25,
    };
    assert_eq!(traces.unwrap().traces, Some(wanted));
}

#[test]
fn reply_prefixes_end_between_tokens() {
    let config = config(&[("REPLY_PREFIXES", "a, b.c.>,d.")]).unwrap();
    assert_eq!(config.policy.reply_prefixes, ["a.", "b.c.", "d."]);
}

#[test]
fn what_has_changed_is_named_by_when_it_takes_effect() {
    let before =
        config(&[("PIDS_LIMIT", "9"), ("NATS_USER", "a"), ("NATS_PASSWORD", "b")]).unwrap();
    let vars = [("CPU_LIMIT", "2"), ("NATS_USER", "a"), ("NATS_PASSWORD", "c"), ("ACK_WAIT", "9s")];
    let after = config(&vars).unwrap();
    let changes = before.changes(&after);
    assert_eq!(changes.taken_up, ["CPU_LIMIT", "PIDS_LIMIT"]);
    assert_eq!(changes.left, ["ACK_WAIT", "NATS_PASSWORD"]);
    let now = before.with_reloaded(&after);
    assert_eq!((now.policy.cpus, now.policy.pids), (2.0, after.policy.pids));
    assert_eq!(now.streams.ack_wait, before.streams.ack_wait);
    assert_eq!(now.changes(&after).taken_up, Vec::<String>::new());
    assert_eq!(now.changes(&after).left, changes.left);
    assert_eq!(before.changes(&before), Changes::default());
    assert!(RELOADABLE.iter().all(|name| settings::is_setting(name)));
}
