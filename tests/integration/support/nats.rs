//! A real NATS server per test, on a port of its own.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use async_nats::{Client, ConnectOptions};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::process::{self, Signal, bound_to_this_thread, free_port};
use super::wait::{PATIENCE, eventually, within};

/// How clients prove who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Auth {
    Open,
    UserPassword,
    Token,
    Nkey,
    Credentials,
}

/// What to start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NatsOptions {
    pub(crate) auth: Auth,
    /// Encrypted, with client certificates demanded.
    pub(crate) tls: bool,
    pub(crate) max_payload: Option<usize>,
    /// With storage for streams.
    pub(crate) jetstream: bool,
}

impl Default for NatsOptions {
    fn default() -> Self {
        Self { auth: Auth::Open, tls: false, max_payload: None, jetstream: false }
    }
}

/// The secrets the servers are started with; a log that shows one of them leaks.
pub(crate) const PASSWORD: &str = "correct-horse-battery";
pub(crate) const TOKEN: &str = "token-nobody-may-read";

/// A server, gone when dropped.
pub(crate) struct NatsServer {
    dir: TempDir,
    port: u16,
    options: NatsOptions,
    child: Option<Child>,
}

impl NatsServer {
    pub(crate) async fn start() -> Self {
        Self::with(NatsOptions::default()).await
    }

    pub(crate) async fn with(options: NatsOptions) -> Self {
        // Another process can take the port between the choice and the start: choose again then.
        for _ in 0..5 {
            let mut server = Self::absent(options);
            if server.try_start().await {
                return server;
            }
        }
        panic!("nats-server did not start; is it installed?");
    }

    /// All of a server but its process.
    pub(crate) fn absent(options: NatsOptions) -> Self {
        let server =
            Self { dir: tempfile::tempdir().unwrap(), port: free_port(), options, child: None };
        server.write_files();
        server
    }

    /// Stands in for the absent server until it has hung up on so many tries to connect.
    pub(crate) async fn hang_up(&self, tries: usize) {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
        for _ in 0..tries {
            let attempt = tokio::time::timeout(PATIENCE, listener.accept());
            drop(attempt.await.expect("the client tries on").unwrap());
        }
    }

    /// Starts it, or starts it again, on the port it has.
    pub(crate) async fn restart(&mut self) {
        self.stop();
        assert!(self.try_start().await, "nats-server did not start again: {}", self.log());
    }

    /// Ends it at once, without a goodbye to its clients.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::end(&mut child);
        }
    }

    /// Suspends it: connections stay, nothing answers.
    pub(crate) fn pause(&self) {
        process::send(self.child.as_ref().unwrap().id(), Signal::STOP);
    }

    pub(crate) fn resume(&self) {
        process::send(self.child.as_ref().unwrap().id(), Signal::CONT);
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.options.tls { "tls" } else { "nats" };
        format!("{scheme}://localhost:{}", self.port)
    }

    /// The server's own log.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("nats.log")).unwrap_or_default()
    }

    /// The daemon's settings to get in.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        let mut settings = vec![("NATS_URL", self.url())];
        match self.options.auth {
            Auth::Open => {}
            Auth::UserPassword => {
                settings.push(("NATS_USER", "worker".into()));
                settings.push(("NATS_PASSWORD", PASSWORD.into()));
            }
            Auth::Token => settings.push(("NATS_TOKEN", TOKEN.into())),
            Auth::Nkey => settings.push(("NATS_NKEY_SEED_FILE", self.text_path("user.seed"))),
            Auth::Credentials => settings.push(("NATS_CREDS_FILE", self.text_path("user.creds"))),
        }
        if self.options.tls {
            settings.push(("NATS_TLS_CA", self.text_path("ca.pem")));
            settings.push(("NATS_TLS_CERT", self.text_path("client.pem")));
            settings.push(("NATS_TLS_KEY", self.text_path("client.key")));
        }
        settings
    }

    /// What a leak would show: secrets of this server that no log may hold.
    pub(crate) fn secrets(&self) -> Vec<String> {
        let mut secrets = vec![PASSWORD.to_string(), TOKEN.to_string()];
        if matches!(self.options.auth, Auth::Nkey | Auth::Credentials) {
            secrets
                .push(std::fs::read_to_string(self.path("user.seed")).unwrap().trim().to_string());
        }
        secrets
    }

    /// A client for the test. It sees every message: its buffers hold more than any test sends.
    pub(crate) async fn client(&self) -> Client {
        let mut options = ConnectOptions::new()
            .subscription_capacity(1 << 20)
            .client_capacity(1 << 16)
            .reconnect_delay_callback(|_| Duration::from_millis(100))
            .connection_timeout(Duration::from_secs(30))
            .request_timeout(None);
        match self.options.auth {
            Auth::Open => {}
            Auth::UserPassword => {
                options = options.user_and_password("worker".into(), PASSWORD.into())
            }
            Auth::Token => options = options.token(TOKEN.into()),
            Auth::Nkey => {
                let seed = std::fs::read_to_string(self.path("user.seed")).unwrap();
                options = options.nkey(seed.trim().into());
            }
            Auth::Credentials => {
                let credentials = std::fs::read_to_string(self.path("user.creds")).unwrap();
                options = options.credentials(&credentials).unwrap();
            }
        }
        if self.options.tls {
            options = options
                .add_root_certificates(self.path("ca.pem"))
                .add_client_certificate(self.path("client.pem"), self.path("client.key"));
        }
        options.connect(self.url()).await.unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text_path(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    async fn try_start(&mut self) -> bool {
        let child = bound_to_this_thread("nats-server")
            .args(["--config", &self.text_path("nats.conf")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv and nats-server are needed");
        self.child = Some(child);
        let port = self.port;
        let mut died = false;
        let child = self.child.as_mut().unwrap();
        eventually("nats-server accepts connections", || {
            died = child.try_wait().unwrap().is_some();
            async move { died || greets(port).await }
        })
        .await;
        let died = self.child.as_mut().unwrap().try_wait().unwrap().is_some();
        if died {
            self.child = None;
        }
        !died
    }

    fn write_files(&self) {
        let mut config = format!(
            "listen: \"127.0.0.1:{}\"\nlog_file: \"{}\"\nmax_pending: 512MB\n",
            self.port,
            self.text_path("nats.log")
        );
        if let Some(most) = self.options.max_payload {
            config.push_str(&format!("max_payload: {most}\n"));
        }
        if self.options.jetstream {
            config
                .push_str(&format!("jetstream {{ store_dir: \"{}\" }}\n", self.text_path("store")));
        }
        match self.options.auth {
            Auth::Open => {}
            Auth::UserPassword => {
                config.push_str(&format!(
                    "authorization {{ user: worker, password: \"{PASSWORD}\" }}\n"
                ));
            }
            Auth::Token => config.push_str(&format!("authorization {{ token: \"{TOKEN}\" }}\n")),
            Auth::Nkey => {
                let user = KeyPair::new_user();
                self.write("user.seed", &user.seed().unwrap());
                config.push_str(&format!(
                    "authorization {{ users: [ {{ nkey: {} }} ] }}\n",
                    user.public_key()
                ));
            }
            Auth::Credentials => config.push_str(&self.write_credentials()),
        }
        if self.options.tls {
            config.push_str(&self.write_certificates());
        }
        self.write("nats.conf", &config);
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), content).unwrap();
    }

    /// An operator, an account and a user, each vouched for by the one before.
    fn write_credentials(&self) -> String {
        let (operator, account, user) =
            (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_user());
        let unlimited = json!({"subs": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1,
            "data": -1, "payload": -1, "wildcards": true});
        let operator_token =
            token(&operator, &operator, "operator", json!({"type": "operator", "version": 2}));
        let account_token = token(
            &operator,
            &account,
            "account",
            json!({"type": "account", "version": 2, "limits": unlimited}),
        );
        let user_token = token(
            &account,
            &user,
            "worker",
            json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}),
        );
        let seed = user.seed().unwrap();
        self.write("user.seed", &seed);
        self.write(
            "user.creds",
            &format!(
                "-----BEGIN NATS USER JWT-----\n{user_token}\n------END NATS USER JWT------\n\n\
                 -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
            ),
        );
        format!(
            "operator: \"{operator_token}\"\nresolver: MEMORY\nresolver_preload: {{ {}: \"{account_token}\" }}\n",
            account.public_key()
        )
    }

    fn write_certificates(&self) -> String {
        use rcgen::{
            BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
        };
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().unwrap();
        self.write("ca.pem", &authority.self_signed(&authority_key).unwrap().pem());
        let issuer = Issuer::new(authority, authority_key);
        for (name, usage) in [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ] {
            let mut leaf =
                CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
            leaf.extended_key_usages.push(usage);
            let key = KeyPair::generate().unwrap();
            self.write(&format!("{name}.pem"), &leaf.signed_by(&key, &issuer).unwrap().pem());
            self.write(&format!("{name}.key"), &key.serialize_pem());
        }
        format!(
            "tls {{ cert_file: \"{}\", key_file: \"{}\", ca_file: \"{}\", verify: true, timeout: 30 }}\n",
            self.text_path("server.pem"),
            self.text_path("server.key"),
            self.text_path("ca.pem")
        )
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Returns when the server has seen everything `client` sent: an answer comes back only after it.
pub(crate) async fn round_trip(client: &Client) {
    let asked = client.request("test.nobody.listens.here", "".into());
    let refused = within("a round trip to the NATS server", PATIENCE, asked).await.unwrap_err();
    assert_eq!(refused.kind(), async_nats::RequestErrorKind::NoResponders);
}

/// Whether a NATS server on `port` says hello.
async fn greets(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)).await else {
        return false;
    };
    let mut hello = [0u8; 4];
    stream.read_exact(&mut hello).await.is_ok() && &hello == b"INFO"
}

fn token(issuer: &KeyPair, subject: &KeyPair, name: &str, claims: Value) -> String {
    let header = URL_SAFE_NO_PAD.encode(json!({"typ": "JWT", "alg": "ed25519-nkey"}).to_string());
    let body = json!({"jti": super::unique(), "iat": 1_700_000_000, "iss": issuer.public_key(), "name": name,
        "sub": subject.public_key(), "nats": claims});
    let body = URL_SAFE_NO_PAD.encode(body.to_string());
    let signed = format!("{header}.{body}");
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}
