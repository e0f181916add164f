//! Settings that are wrong, and secrets that stay secret.

use crate::support::daemon::{Daemon, Settings};
use crate::support::process::free_port;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_bad_setting_is_named_at_once() {
    let bad = [
        ("MAX_CONTAINERS", "none"),
        ("MEMORY_LIMIT", "512 parsecs"),
        ("DEFAULT_TIMEOUT", "soon"),
        ("PULL_POLICY", "sometimes"),
        ("DELIVERY", "pigeon"),
        ("LOG_FORMAT", "verse"),
        ("READONLY_ROOTFS", "perhaps"),
        ("OUTPUT_LIMIT", "-1"),
        ("NATS_URL", "not a url"),
        ("NATS_CREDS_FILE", "/no/such/file"),
    ];
    let mut daemon = Daemon::spawn(&Settings::new().set_all(&bad));
    let status = daemon.exit().await;
    let told = daemon.log().text();
    assert_eq!(status.code(), Some(78), "{told}");
    for (name, _) in bad {
        assert!(told.contains(name), "{name} is not named:\n{told}");
    }
    assert!(!told.contains("panicked"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_bad_setting_of_any_kind_is_a_refusal_to_start() {
    let cases = [
        ("MAX_CONTAINERS", "0"),
        ("MAX_CONTAINERS", "-1"),
        ("MAX_CONTAINERS", "1.5"),
        ("MAX_CONTAINERS", "99999999999999999999"),
        ("MAX_DELIVER", "0"),
        ("CPU_LIMIT", "0"),
        ("CPU_LIMIT", "NaN"),
        ("CPU_LIMIT", "inf"),
        ("PIDS_LIMIT", "0"),
        ("MEMORY_LIMIT", "1KiB"),
        ("MEMORY_LIMIT", "99999999999TiB"),
        ("DEFAULT_TIMEOUT", "0s"),
        ("DEFAULT_TIMEOUT", "2h"),
        ("STOP_GRACE", "-1s"),
        ("SUBJECT_PREFIX", "a b"),
        ("SUBJECT_PREFIX", "a.>"),
        ("SUBJECT_PREFIX", ".a"),
        ("QUEUE_GROUP", "a b"),
        ("CONTAINER_NETWORK", "a b"),
        ("IMAGE_ALLOWLIST", "docker.io/[a"),
        ("REPLY_PREFIXES", "$JS.>"),
        ("NATS_NKEY_SEED_FILE", "/no/such/seed"),
        ("NATS_TLS_CA", "/no/such/ca.pem"),
        ("NATS_TLS_CERT", "/no/such/cert.pem"),
    ];
    let mut wrong = Vec::new();
    for (name, value) in cases {
        let url = format!("nats://127.0.0.1:{}", free_port());
        let mut daemon = Daemon::spawn(&Settings::new().set("NATS_URL", &url).set(name, value));
        let status = tokio::time::timeout(std::time::Duration::from_secs(20), daemon.exit()).await;
        let told = daemon.log().text();
        if !status.as_ref().is_ok_and(|status| status.code() == Some(78)) || !told.contains(name) {
            wrong.push(format!("{name}={value}: {status:?}\n{told}"));
        }
    }
    assert!(wrong.is_empty(), "accepted, or refused without a name:\n{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_refusal_shows_no_secret() {
    let settings = Settings::new().set_all(&[
        ("RUST_LOG", "trace"),
        (
            "NATS_URL",
            "nats://somebody:secret-in-the-url@127.0.0.1:1,gopher://other:second-secret@h",
        ),
        ("NATS_PASSWORD", "secret-password"),
        ("NATS_TOKEN", "secret-token"),
        ("MAX_CONTAINERS", "many"),
    ]);
    let mut daemon = Daemon::spawn(&settings);
    let status = daemon.exit().await;
    let told = daemon.log().text();
    assert_eq!(status.code(), Some(78), "{told}");
    assert!(!told.to_lowercase().contains("secret"), "a secret is shown:\n{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_runtime_the_engine_lacks_is_no_reason_to_use_another() {
    let server = crate::support::nats::NatsServer::start().await;
    let settings = Settings::new().nats(&server).set("CONTAINER_RUNTIME", "no-such-runtime");
    let mut daemon = Daemon::spawn(&settings);
    let status = daemon.exit().await;
    let told = daemon.log().text();
    assert!(!status.success(), "{told}");
    assert!(told.contains("no-such-runtime"), "it says which:\n{told}");
}
