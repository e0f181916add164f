//! `check`: each fault is found, and what to do about it is said.

mod trial;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::PrivateEngine;
use crate::support::nats::{Auth, NatsOptions, NatsServer, NatsVersion, PASSWORD};
use crate::support::process::{bound_to_this_thread, exit_of, free_port};
use crate::support::wait::PATIENCE;

const PROGRAM: &str = env!("CARGO_BIN_EXE_worker-spawner");

/// What `check` said.
struct Checked {
    code: Option<i32>,
    findings: Vec<Value>,
}

/// The program, with these settings and nothing else.
fn command(program: &[&str], settings: &Settings, home: &TempDir) -> Command {
    let mut command = bound_to_this_thread(program[0]);
    command.args(&program[1..]).env_clear().env("HOME", home.path()).envs(settings.vars());
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    command
}

/// Has it print its findings as JSON.
async fn check(settings: &Settings) -> Checked {
    check_with(settings, &[]).await
}

/// The same, with these arguments.
async fn check_with(settings: &Settings, arguments: &[&str]) -> Checked {
    check_as(&[PROGRAM], settings, arguments).await
}

async fn check_as(program: &[&str], settings: &Settings, arguments: &[&str]) -> Checked {
    Checking::begin(program, settings, arguments).end().await
}

/// A `check` under way.
struct Checking {
    child: Child,
    reading: JoinHandle<String>,
    _home: TempDir,
}

impl Checking {
    fn begin(program: &[&str], settings: &Settings, arguments: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let program = [program, &["check", "--json"], arguments].concat();
        let mut child = command(&program, settings, &home).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let reading = std::thread::spawn(move || {
            let mut printed = String::new();
            stdout.read_to_string(&mut printed).unwrap();
            printed
        });
        Self { child, reading, _home: home }
    }

    async fn end(mut self) -> Checked {
        let code = exit_of(&mut self.child, PATIENCE).await.expect("check ends").code();
        let printed = self.reading.join().unwrap();
        assert!(!printed.contains(PASSWORD), "{printed}");
        let findings =
            serde_json::from_str(&printed).unwrap_or_else(|_| panic!("no JSON: {printed}"));
        Checked { code, findings }
    }
}

impl Checked {
    fn of(&self, check: &str, status: &str) -> Vec<&Value> {
        let wanted = |f: &&Value| f["check"] == check && f["status"] == status;
        self.findings.iter().filter(wanted).collect()
    }

    /// Asserts that this is found, with this remedy, and that nothing but `check` is at fault.
    #[track_caller]
    fn finds(&self, status: &str, check: &str, detail: &str, remedy: &str) {
        let has = |f: &Value, field: &str, part: &str| {
            f[field].as_str().is_some_and(|text| text.contains(part))
        };
        let found = self.of(check, status);
        let found = found.iter().any(|f| has(f, "detail", detail) && has(f, "remedy", remedy));
        assert!(
            found,
            "no {status} of {check} with {detail:?} and {remedy:?}: {:#?}",
            self.findings
        );
        let others = self.findings.iter().filter(|f| f["status"] == "fail" && f["check"] != check);
        assert_eq!(others.count(), 0, "something else failed, too: {:#?}", self.findings);
        assert_eq!(self.code, Some(i32::from(status == "fail")), "{:#?}", self.findings);
    }

    /// What was listed, in this order.
    fn listed(&self) -> Vec<&str> {
        let mut names: Vec<&str> =
            self.findings.iter().map(|found| found["check"].as_str().unwrap()).collect();
        names.dedup();
        names
    }

    /// Asserts that it says why it did not look at these.
    #[track_caller]
    fn does_not_check(&self, checks: &[&str], why: &str) {
        for check in checks {
            let found = self.of(check, "not_checked");
            let details: Vec<&Value> = found.iter().map(|found| &found["detail"]).collect();
            assert_eq!(details, [&format!("not checked: {why}")], "{check}: {:#?}", self.findings);
        }
    }

    #[track_caller]
    fn is_ok(&self, check: &str) {
        assert_eq!(self.of(check, "ok").len(), 1, "{check}: {:#?}", self.findings);
    }
}

/// All that is listed, whatever is found.
const LISTED: [&str; 17] = [
    "settings",
    "nats",
    "max_payload",
    "inbox",
    "jetstream",
    "streams",
    "store",
    "subscribe",
    "publish",
    "engine",
    "runtime",
    "cgroups",
    "storage",
    "seccomp",
    "networks",
    "disk",
    "registries",
];

/// A directory with such a config.json.
fn docker_config(content: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), content).unwrap();
    dir
}

fn path(dir: &TempDir) -> &str {
    dir.path().to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn all_is_well_where_all_is_there() {
    for version in NatsVersion::all() {
        let nats = NatsServer::with(NatsOptions::durable(version)).await;
        let settings = Settings::jetstream().nats(&nats);
        let before = check(&settings).await;
        assert_eq!(before.code, Some(0), "{:#?}", before.findings);
        let client = async_nats::jetstream::new(nats.client().await);
        let made = client.get_stream("functions_queue").await;
        assert!(made.is_err(), "it makes nothing");
        let mut daemon = Daemon::spawn(&settings);
        daemon.wait_ready().await;
        let checked = check(&settings).await;
        assert_eq!(checked.code, Some(0), "{:#?}", checked.findings);
        for name in ["settings", "nats", "max_payload", "inbox", "jetstream", "streams"] {
            checked.is_ok(name);
        }
        for name in ["subscribe", "engine", "runtime", "storage", "networks", "registries"] {
            checked.is_ok(name);
        }
        assert_eq!(checked.of("streams", "ok")[0]["detail"], "6, as the settings want them");
        assert_eq!(before.listed(), LISTED);
        assert_eq!(checked.listed(), LISTED);
        let store = |checked: &Checked| checked.of("store", "not_checked")[0]["detail"].to_string();
        assert!(!store(&before).contains("the streams hold"), "{}", store(&before));
        assert!(store(&checked).contains("; the streams hold "), "{}", store(&checked));
        // An older server does not tell.
        let status = if version == NatsVersion::Current { "ok" } else { "not_checked" };
        assert_eq!(checked.of("publish", status).len(), 1, "{:#?}", checked.findings);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_cannot_be_looked_at_is_listed_all_the_same() {
    let away = format!("nats://127.0.0.1:{}", free_port());
    let nothing =
        Settings::new().set_all(&[("NATS_URL", &away), ("DOCKER_HOST", "unix:///no/such.sock")]);
    let checked = check(&nothing).await;
    assert_eq!(checked.listed(), LISTED);
    checked.does_not_check(&LISTED[2..9], "NATS cannot be reached");
    checked.does_not_check(&LISTED[10..16], "the engine cannot be used");

    let wrong = check(&nothing.set("MAX_CONTAINERS", "none")).await;
    assert_eq!(wrong.listed(), LISTED);
    wrong.does_not_check(&LISTED[1..], "the settings cannot be used");

    let nats = NatsServer::start().await;
    let without = Settings::new().nats(&nats);
    for (delivery, found) in [("auto", "warn"), ("core", "ok")] {
        let checked = check(&without.clone().set("DELIVERY", delivery)).await;
        assert_eq!(checked.listed(), LISTED);
        assert_eq!(checked.of("jetstream", found).len(), 1, "{:#?}", checked.findings);
        checked.does_not_check(&["streams", "store"], "there is no JetStream to look at");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn for_people_it_is_a_line_each() {
    let nats = NatsServer::start().await;
    let settings = Settings::new().nats(&nats).set("DOCKER_HOST", "unix:///no/such.sock");
    let home = tempfile::tempdir().unwrap();
    let program = [env!("CARGO_BIN_EXE_worker-spawner"), "check"];
    let output = command(&program, &settings, &home).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("ok    settings     all of them can be used\nok    nats  "), "{text}");
    let wanted = "\nfail  engine       there is no socket /no/such.sock\n                   → start the engine";
    assert!(text.contains(wanted), "{text}");
    assert!(!text.contains('\u{1b}'), "no colours where nobody sees them: {text}");
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn bad_settings_are_all_named() {
    let bad = [("MAX_CONTAINERS", "none"), ("DELIVERY", "pigeon"), ("NATS_URL", "not a url")];
    let checked = check(&Settings::new().set_all(&bad)).await;
    assert_eq!(checked.code, Some(78));
    for (name, _) in bad {
        let named = |f: &&Value| f["detail"].as_str().unwrap().starts_with(name);
        let found = checked.of("settings", "fail").into_iter().find(named);
        assert!(found.is_some_and(|f| f["remedy"].is_string()), "{:#?}", checked.findings);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nats_that_does_not_let_the_daemon_in_is_told_apart() {
    let away = format!("nats://127.0.0.1:{}", free_port());
    let checked = check(&Settings::new().set("NATS_URL", &away)).await;
    checked.finds("fail", "nats", "nobody listens there", "start a NATS server");

    let nats =
        NatsServer::with(NatsOptions { auth: Auth::UserPassword, ..Default::default() }).await;
    let wrong = Settings::new().nats(&nats).set("NATS_PASSWORD", "another");
    let checked = check(&wrong).await;
    checked.finds("fail", "nats", "refuses the login", "correct NATS_USER and NATS_PASSWORD");
    let nobody = Settings::new().set("NATS_URL", &nats.url());
    let checked = check(&nobody).await;
    checked.finds("fail", "nats", "refuses the login", "set one of NATS_CREDS_FILE");
    // One that lets the daemon in is enough.
    let both = Settings::new().nats(&nats).set("NATS_URL", &format!("{away},{}", nats.url()));
    check(&both).await.finds("warn", "nats", "nobody listens there", "correct NATS_URL");

    let nats = NatsServer::with(NatsOptions { tls: true, ..Default::default() }).await;
    let checked = check(&Settings::new().set("NATS_URL", &nats.url())).await;
    checked.finds("fail", "nats", "TLS: ", "set NATS_TLS_CA");
    check(&Settings::new().nats(&nats)).await.is_ok("nats");

    let nats = NatsServer::start().await;
    nats.pause();
    let checked = check(&Settings::new().nats(&nats)).await;
    nats.resume();
    checked.finds("fail", "nats", "no answer within 5s", "whether the server hangs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn jetstream_is_missed_where_it_is_asked_for() {
    let nats = NatsServer::start().await;
    let settings = Settings::jetstream().nats(&nats);
    let checked = check(&settings).await;
    checked.finds("fail", "jetstream", "and DELIVERY is jetstream", "nats-server -js");
    let checked = check(&settings.set("DELIVERY", "auto")).await;
    checked.finds("warn", "jetstream", "are lost with it", "nats-server -js");

    for (auth, detail, remedy) in [
        (Auth::NoStreamsAccount, "this account has none", "enable JetStream for this account"),
        (Auth::NoStreams, "Permissions Violation", "allow this user to publish to $JS.API.>"),
    ] {
        let nats =
            NatsServer::with(NatsOptions { auth, jetstream: true, ..Default::default() }).await;
        check(&Settings::jetstream().nats(&nats)).await.finds("fail", "jetstream", detail, remedy);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stream_with_other_settings_is_found() {
    for version in NatsVersion::all() {
        let nats = NatsServer::with(NatsOptions::durable(version)).await;
        let settings = Settings::jetstream().nats(&nats);
        let mut daemon = Daemon::spawn(&settings);
        daemon.wait_ready().await;
        let more = settings.clone().set("QUEUE_MAX_MESSAGES", "7").set("ACK_WAIT", "77s");
        let checked = check(&more).await;
        checked.finds(
            "fail",
            "streams",
            "stream functions_queue: max_msgs is 1000000 and should be 7",
            "set QUEUE_MAX_MESSAGES to match, or run: nats stream edit functions_queue --max-msgs=7",
        );
        checked.finds("fail", "streams", "ack_wait is 30s", "set ACK_WAIT to match");
        let checked = check(&settings.set("QUEUE_GROUP", "others")).await;
        checked.finds("fail", "streams", "consumers of other names than others", "QUEUE_GROUP");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_the_nats_user_may_not_do_is_named() {
    for version in NatsVersion::all() {
        let options = NatsOptions { auth: Auth::Narrow, version, ..Default::default() };
        let nats = NatsServer::with(options).await;
        // Nothing is said on any of the daemon's subjects meanwhile.
        let client = nats.client().await;
        let mut heard = client.subscribe("functions.>").await.unwrap();
        client.flush().await.unwrap();
        let checked = check(&Settings::new().nats(&nats)).await;
        let denied = checked.of("subscribe", "fail");
        let text = |field: &str| denied[0][field].as_str().unwrap_or_default().to_owned();
        assert!(text("detail").ends_with("subscribe to functions.cancel"), "{denied:?}");
        assert!(text("remedy").starts_with("allow this user to subscribe to functions.cancel"));
        assert_eq!(checked.code, Some(1));
        if version == NatsVersion::Current {
            let denied = checked.of("publish", "fail");
            let remedy = denied[0]["remedy"].as_str().unwrap();
            assert!(remedy.starts_with("allow this user to publish to functions.results"));
        } else {
            assert_eq!(checked.of("publish", "not_checked").len(), 1, "{:#?}", checked.findings);
        }
        use futures::{FutureExt as _, StreamExt as _};
        assert!(heard.next().now_or_never().is_none(), "it publishes nothing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_documented_permissions_are_enough() {
    for version in NatsVersion::all() {
        let options = NatsOptions { auth: Auth::Documented, ..NatsOptions::durable(version) };
        let nats = NatsServer::with(options).await;
        let settings = Settings::jetstream().nats(&nats);
        let mut daemon = Daemon::spawn(&settings);
        daemon.wait_ready().await;
        let checked = check(&settings).await;
        assert_eq!(checked.code, Some(0), "{:#?}", checked.findings);
        for name in ["inbox", "jetstream", "streams", "subscribe"] {
            checked.is_ok(name);
        }
        if version == NatsVersion::Current {
            checked.is_ok("publish");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_engine_that_is_not_there_or_not_for_us_is_found() {
    let nats = NatsServer::start().await;
    let at =
        |socket: &str| Settings::new().nats(&nats).set("DOCKER_HOST", &format!("unix://{socket}"));
    let checked = check(&at("/no/such.sock")).await;
    checked.finds("fail", "engine", "there is no socket /no/such.sock", "systemctl start docker");

    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let checked = check(&at(file.to_str().unwrap())).await;
    checked.finds("fail", "engine", "is no socket", "point DOCKER_HOST at the engine's socket");

    let socket = dir.path().join("socket");
    let shown = socket.to_str().unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o660)).unwrap();
    // Where root's files cannot be read the program is not found either.
    let program = dir.path().join("program");
    std::fs::copy(env!("CARGO_BIN_EXE_worker-spawner"), &program).unwrap();
    let as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let program = [&as_nobody[..], &[program.to_str().unwrap()]].concat();
    let settings = at(shown).set("DOCKER_CONFIG", "/no/such/directory");
    let checked = check_as(&program, &settings, &[]).await;
    checked.finds("fail", "engine", "belongs to the group root", "usermod -aG root");

    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            // What it is asked is no matter.
            let _ = client.write_all(b"SSH-2.0-OpenSSH_9.2\r\n");
        }
    });
    let checked = check(&at(shown)).await;
    checked.finds("fail", "engine", "is no engine", "point DOCKER_HOST at the engine's socket");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_engine_that_hangs_and_one_that_has_ended_are_found() {
    let nats = NatsServer::start().await;
    let mut engine = PrivateEngine::start().await;
    let settings = Settings::new().nats(&nats).set("DOCKER_HOST", &engine.host());
    engine.freeze();
    let begun = std::time::Instant::now();
    let checked = check(&settings).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "it waits for ever");
    checked.finds("fail", "engine", "does not answer within 5s", "systemctl restart docker");
    engine.thaw();
    engine.kill().await;
    let checked = check(&settings).await;
    checked.finds("fail", "engine", "nobody listens on the socket", "systemctl start docker");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_disk_is_found() {
    let nats = NatsServer::start().await;
    let engine = PrivateEngine::start_on_disk(64 << 20).await;
    let settings = Settings::new().nats(&nats).set("DOCKER_HOST", &engine.host());
    let checked = check(&settings).await;
    checked.finds("fail", "disk", "images and containers do not fit", "docker system prune");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_the_engine_lacks_is_named() {
    let nats = NatsServer::start().await;
    let settings = Settings::new().nats(&nats);
    let checked = check(&settings.clone().set("CONTAINER_RUNTIME", "no-such-runtime")).await;
    checked.finds(
        "fail",
        "runtime",
        "no runtime \"no-such-runtime\"; it has",
        "install no-such-runtime",
    );
    let missing = [("CONTAINER_NETWORK", "no-such-network"), ("ALLOWED_NETWORKS", "none,nor-this")];
    let checked = check(&settings.set_all(&missing)).await;
    let network = "docker network create no-such-network";
    checked.finds("fail", "networks", "which CONTAINER_NETWORK names", network);
    checked.finds("fail", "networks", "which ALLOWED_NETWORKS names", "correct ALLOWED_NETWORKS");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn credentials_that_cannot_be_had_are_found() {
    let nats = NatsServer::start().await;
    let settings = Settings::new().nats(&nats);
    let broken = docker_config("{\"auths\": {\"registry.example\": {\"auth\": \"c2VjcmV0\"");
    let checked = check(&settings.clone().set("DOCKER_CONFIG", path(&broken))).await;
    checked.finds("fail", "registries", "is no JSON: line 1", "docker login");
    assert!(!format!("{:?}", checked.findings).contains("c2VjcmV0"));

    let helper = docker_config(r#"{"credHelpers": {"registry.example": "of-no-kind"}}"#);
    let checked = check(&settings.clone().set("DOCKER_CONFIG", path(&helper))).await;
    let install = "install docker-credential-of-no-kind";
    checked.finds("fail", "registries", "for registry.example, is not on the PATH", install);

    // user:secret
    let fine = docker_config(r#"{"auths": {"registry.example": {"auth": "dXNlcjpzZWNyZXQ="}}}"#);
    let checked = check(&settings.set("DOCKER_CONFIG", path(&fine))).await;
    assert_eq!(checked.of("registries", "ok")[0]["detail"], "credentials for registry.example");
}
