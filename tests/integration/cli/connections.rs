//! How clients find their server, and what they say when they do not.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Client;
use crate::support::nats::{Auth, NatsOptions, NatsServer, NatsVersion, PASSWORD};
use crate::support::process::free_port;

/// Writes a context of the nats tool into the client's home.
fn context(client: &Client, name: &str, fields: &serde_json::Value) {
    let directory = client.home.path().join(".config/nats/context");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join(format!("{name}.json")), fields.to_string()).unwrap();
}

/// No daemon listens, so that one that is let in is told so.
fn is_let_in(ran: &super::Ran) -> bool {
    ran.stderr.contains("nobody takes requests")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_way_to_log_in_works_from_flags_variables_and_contexts() {
    for auth in [Auth::Open, Auth::UserPassword, Auth::Token, Auth::Nkey, Auth::Credentials] {
        let tls = auth == Auth::UserPassword;
        let options = NatsOptions { auth, tls, ..NatsOptions::default() };
        let server = NatsServer::with(options).await;
        let settings = server.settings();
        let flag = |name: &str| match name {
            "NATS_URL" => "--server",
            "NATS_USER" => "--user",
            "NATS_PASSWORD" => "--password",
            "NATS_TOKEN" => "--token",
            "NATS_NKEY_SEED_FILE" => "--nkey",
            "NATS_CREDS_FILE" => "--creds",
            "NATS_TLS_CA" => "--tls-ca",
            "NATS_TLS_CERT" => "--tls-cert",
            _ => "--tls-key",
        };
        let field = |name: &str| match flag(name) {
            "--server" => "url".to_string(),
            flag => flag.trim_start_matches("--").trim_start_matches("tls-").to_string(),
        };

        let by_variables = settings
            .iter()
            .fold(Client::new(&["run", "x"]), |client, (name, value)| client.set(name, value));
        let mut line = vec!["run", "x"];
        for (name, value) in &settings {
            line.extend([flag(name), value.as_str()]);
        }
        // What the environment says of who asks does not count beside the flags.
        let mut by_flags = Client::new(&line).set("NATS_URL", "nats://nobody:4");
        if auth != Auth::Open {
            by_flags = by_flags.set("NATS_TOKEN", "another");
        }
        let by_context =
            Client::new(&["run", "x", "--context", "here"]).set("NATS_URL", "nats://nobody:4");
        let fields: serde_json::Map<_, _> =
            settings.iter().map(|(name, value)| (field(name), json!(value))).collect();
        context(&by_context, "here", &json!(fields));
        for client in [by_variables, by_flags, by_context] {
            let ran = client.run().await;
            assert!(ran.code == 125 && is_let_in(&ran), "{auth:?}: {ran:?}");
        }

        if auth != Auth::Open {
            let mut stranger =
                Client::new(&["run", "x", "--user", "worker", "--password", "wr0ng-secret"])
                    .set("NATS_URL", &server.url());
            for (name, value) in &settings {
                if name.starts_with("NATS_TLS") {
                    stranger = stranger.set(name, value);
                }
            }
            let ran = stranger.run().await;
            assert_eq!(ran.code, 125);
            assert!(ran.stderr.contains("it refuses who asks"), "{auth:?}: {ran:?}");
            assert!(!ran.stderr.contains("wr0ng"), "{ran:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_secret_is_shown_and_what_is_wrong_is_named() {
    let with_secret = format!("nats://worker:{PASSWORD}@127.0.0.1:{}", free_port());
    for (line, wanted) in [
        (&["ps", "-s", &with_secret][..], "(--server): Connection refused"),
        (&["ps", "-s", &format!("htp://{PASSWORD}")], "--server: expected URLs such as"),
        (&["ps", "--user", "me"], "--password: must be set too, since --user is"),
        (&["ps", "--creds", "no-such-file"], "--creds: cannot read no-such-file"),
        (&["ps", "--context", "other"], "contexts there: here"),
        (&["ps", "--context", "../here"], "is no name of a context"),
        (&["ps", "--context", "here"], "nkey in the context here: cannot read no-such.nk"),
    ] {
        let client = Client::new(line);
        let fields = json!({"url": "nats://localhost:4", "nkey": "no-such.nk", "color_scheme": ""});
        context(&client, "here", &fields);
        // What is no concern of a client's is not looked at.
        let ran = client.set("MAX_CONTAINERS", "none at all").run().await;
        assert_eq!((ran.code, ran.text().as_str()), (1, ""), "{line:?}: {ran:?}");
        assert!(ran.stderr.contains(wanted), "{line:?}: {ran:?}");
        assert!(!ran.stderr.contains(PASSWORD), "{line:?}: {ran:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_does_not_answer_is_an_error_after_a_while() {
    // It takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("nats://{}", silent.local_addr().unwrap());
    let begun = Instant::now();
    let line = ["run", "busybox", "-s", &url, "--connect-timeout", "500ms"];
    let ran = Client::new(&line).run().await;
    assert_eq!(ran.code, 125);
    assert!(ran.stderr.contains("no answer within 500ms"), "{ran:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_the_server_refuses_is_told() {
    let options =
        NatsOptions { auth: Auth::NoStreams, ..NatsOptions::durable(NatsVersion::Installed) };
    let server = NatsServer::with(options).await;
    let client = server
        .settings()
        .into_iter()
        .fold(Client::new(&["ps"]), |client, (name, value)| client.set(name, &value));
    let ran = client.run().await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("Permissions Violation for Publish"), "{ran:?}");
}
