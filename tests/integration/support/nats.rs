//! A real NATS server per test, on a port of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use async_nats::{Client, ConnectOptions};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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
    /// The daemon's user may do everything but ask JetStream for anything; the test's may.
    NoStreams,
    /// The daemon's user may not listen to what is to be cancelled, nor publish results; the test's may.
    Narrow,
    /// The users and the permissions that the README gives the daemon and its callers.
    Documented,
    /// The user is of an account without JetStream, on a server where another has it.
    NoStreamsAccount,
}

/// Which program: servers keep streams differently from version to version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NatsVersion {
    /// The one on the PATH; Debian 12 has 2.9.10.
    Installed,
    /// 2.10.23 or newer, see scripts/nats-current.sh.
    Current,
}

impl NatsVersion {
    /// Those there are on this machine.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Installed];
        all.extend(Self::current());
        all
    }

    /// The current one, where there is one; for the tests that need it, and do nothing without.
    pub(crate) fn current() -> Option<Self> {
        let is_here = Self::Current.program().is_file();
        if !is_here {
            eprintln!("NOT TESTED on a current NATS server: {NO_CURRENT}");
        }
        is_here.then_some(Self::Current)
    }

    fn program(self) -> PathBuf {
        match (self, std::env::var_os("NATS_SERVER_CURRENT")) {
            (Self::Installed, _) => "nats-server".into(),
            (Self::Current, Some(named)) => named.into(),
            (Self::Current, None) => {
                Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/nats-server-current")
            }
        }
    }
}

const NO_CURRENT: &str = "run scripts/nats-current.sh, or set NATS_SERVER_CURRENT to a program";

/// Where streams are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    /// In the server's directory.
    Disk,
    /// On a file system of its own, of so many bytes, which can be full. Mounting takes root.
    Tmpfs(usize),
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
    pub(crate) version: NatsVersion,
    pub(crate) store: Store,
    /// Each write reaches the disk before it is acknowledged. Only a current server knows how.
    pub(crate) sync_always: bool,
    /// With [`NatsServer::monitored`].
    pub(crate) monitor: bool,
}

impl Default for NatsOptions {
    fn default() -> Self {
        Self {
            auth: Auth::Open,
            tls: false,
            max_payload: None,
            jetstream: false,
            version: NatsVersion::Installed,
            store: Store::Disk,
            sync_always: false,
            monitor: false,
        }
    }
}

impl NatsOptions {
    /// A server that keeps streams.
    pub(crate) fn durable(version: NatsVersion) -> Self {
        Self { jetstream: true, version, ..Self::default() }
    }
}

/// The secrets the servers are started with; a log that shows one of them leaks.
pub(crate) const PASSWORD: &str = "correct-horse-battery";
pub(crate) const TOKEN: &str = "token-nobody-may-read";

/// A server, gone when dropped.
pub(crate) struct NatsServer {
    /// Goes before the directory it is mounted in.
    tmpfs: Option<Tmpfs>,
    dir: TempDir,
    port: u16,
    monitor_port: u16,
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
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let tmpfs = match options.store {
            Store::Disk => None,
            Store::Tmpfs(size) => Some(Tmpfs::mount(store, size)),
        };
        let (port, monitor_port) = (free_port(), free_port());
        let server = Self { tmpfs, dir, port, monitor_port, options, child: None };
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

    /// Ends it as an operator does: it says goodbye and writes down what it has.
    pub(crate) async fn terminate(&mut self) {
        self.signal(Signal::TERM);
        self.ended().await;
    }

    /// Asks it to leave, as before maintenance: it tells its clients, hangs up on one after the other
    /// from a second later on, and ends. A current one closes its streams at once.
    pub(crate) fn lame_duck(&self) {
        self.signal(Signal::USR2);
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn ended(&mut self) {
        let ended = process::exit_of(self.child.as_mut().unwrap(), PATIENCE).await;
        assert!(ended.is_some(), "nats-server does not end: {}", self.log());
        self.child = None;
    }

    /// Copies the messages of `stream`, as they are on the disk now.
    pub(crate) fn copy_messages(&self, stream: &str) {
        copy_files(&self.messages(stream), &self.path("copy"));
    }

    /// Puts the copy in the place of the messages of `stream`, while the server is stopped. What was
    /// removed since is there again, and the consumers have it as acknowledged.
    pub(crate) fn put_messages_back(&self, stream: &str) {
        assert!(self.child.is_none(), "it would write over them");
        let messages = self.messages(stream);
        std::fs::remove_dir_all(&messages).unwrap();
        copy_files(&self.path("copy"), &messages);
    }

    fn messages(&self, stream: &str) -> PathBuf {
        self.path("store/jetstream/$G/streams").join(stream).join("msgs")
    }

    /// Suspends it: connections stay, nothing answers.
    pub(crate) fn pause(&self) {
        process::suspend(self.child.as_ref().unwrap().id());
    }

    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        process::send(self.child.as_ref().unwrap().id(), signal);
    }

    /// Leaves the streams no room, on a [`Store::Tmpfs`].
    pub(crate) fn fill_disk(&self) {
        self.tmpfs.as_ref().expect("only a disk of its own is filled").fill();
    }

    /// Gives back what [`fill_disk`](Self::fill_disk) took.
    pub(crate) fn free_disk(&self) {
        std::fs::remove_file(self.tmpfs.as_ref().unwrap().ballast()).unwrap();
    }

    /// What its monitoring says at `path`, such as `varz`, `connz` or `jsz`.
    pub(crate) async fn monitored(&self, path: &str) -> Value {
        let mut stream = TcpStream::connect(("127.0.0.1", self.monitor_port)).await.unwrap();
        stream.write_all(format!("GET /{path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        within("an answer of the monitoring", PATIENCE, stream.read_to_string(&mut answer))
            .await
            .unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap()
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
            Auth::UserPassword
            | Auth::NoStreams
            | Auth::NoStreamsAccount
            | Auth::Narrow
            | Auth::Documented => {
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
            Auth::UserPassword | Auth::NoStreamsAccount => {
                options = options.user_and_password("worker".into(), PASSWORD.into())
            }
            Auth::NoStreams | Auth::Narrow => {
                options = options.user_and_password("observer".into(), PASSWORD.into())
            }
            Auth::Documented => {
                options = options.user_and_password("caller".into(), PASSWORD.into())
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
        let program = self.options.version.program();
        // The one on the PATH is looked for there, and its absence is told below.
        let is_here = self.options.version == NatsVersion::Installed || program.is_file();
        assert!(is_here, "no {}: {NO_CURRENT}", program.display());
        let child = bound_to_this_thread(program.to_str().unwrap())
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
            "listen: \"127.0.0.1:{}\"\nlog_file: \"{}\"\nmax_pending: 512MB\n\
             lame_duck_duration: \"30s\"\nlame_duck_grace_period: \"1s\"\n",
            self.port,
            self.text_path("nats.log")
        );
        if self.options.monitor {
            config.push_str(&format!("http: \"127.0.0.1:{}\"\n", self.monitor_port));
        }
        if let Some(most) = self.options.max_payload {
            config.push_str(&format!("max_payload: {most}\n"));
        }
        if self.options.jetstream {
            // By default a server promises no more than three quarters of what the disk has now,
            // so that neither a small disk nor a full one could be tried.
            let sync = if self.options.sync_always { ", sync_interval: always" } else { "" };
            config.push_str(&format!(
                "jetstream {{ store_dir: \"{}\", max_file_store: 64GB{sync} }}\n",
                self.text_path("store")
            ));
        }
        match self.options.auth {
            Auth::Open => {}
            Auth::UserPassword => {
                config.push_str(&format!(
                    "authorization {{ user: worker, password: \"{PASSWORD}\" }}\n"
                ));
            }
            Auth::NoStreamsAccount => {
                config.push_str(&format!(
                    "accounts {{ poor: {{ users: [ {{ user: worker, password: \"{PASSWORD}\" }} ] }}, \
                     rich: {{ jetstream: enabled, users: [ {{ user: other, password: other }} ] }} }}\n"
                ));
            }
            Auth::NoStreams => {
                config.push_str(&format!(
                    "authorization {{ users: [ {{ user: observer, password: \"{PASSWORD}\" }}, \
                     {{ user: worker, password: \"{PASSWORD}\", \
                     permissions: {{ publish: {{ deny: [\"$JS.API.>\"] }} }} }} ] }}\n"
                ));
            }
            Auth::Narrow => {
                config.push_str(&format!(
                    "authorization {{ users: [ {{ user: observer, password: \"{PASSWORD}\" }}, \
                     {{ user: worker, password: \"{PASSWORD}\", permissions: {{ \
                     subscribe: {{ deny: [\"functions.cancel\"] }}, \
                     publish: {{ deny: [\"functions.results\"] }} }} }} ] }}\n"
                ));
            }
            Auth::Documented => {
                let readme = include_str!("../../../README.md");
                let (_, block) = readme.split_once("```text\nauthorization {").unwrap();
                let (block, _) = block.split_once("```").unwrap();
                let quoted = format!("\"{PASSWORD}\"");
                let block = block.replace("$WORKER_PASSWORD", &quoted);
                let block = block.replace("$CALLER_PASSWORD", &quoted);
                config.push_str(&format!("authorization {{{block}"));
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

/// Makes the folder `to` with the files of `from`.
fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// A file system in memory, gone when dropped.
pub(crate) struct Tmpfs {
    at: PathBuf,
}

impl Tmpfs {
    pub(crate) fn mount(at: PathBuf, size: usize) -> Self {
        std::fs::create_dir(&at).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        mount("worker-spawner-test", &at, "tmpfs", MountFlags::empty(), options.as_c_str())
            .unwrap_or_else(|error| panic!("a tmpfs cannot be mounted, which takes root: {error}"));
        Self { at }
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }

    fn fill(&self) {
        use std::io::Write as _;
        let mut ballast = std::fs::File::create(self.ballast()).unwrap();
        let error = loop {
            if let Err(error) = ballast.write_all(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.at, UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {error}", self.at.display());
        }
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
