//! Whether NATS is there and lets the daemon in.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::client::Request;
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use indicatif::BinaryBytes;

use crate::config::{self, Config};
use crate::finding::{Finding, Tell};
use crate::nats::identified;

/// How long one try to connect may take, and one answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How often the server's complaints are looked at while an answer is waited for.
const LOOK: Duration = Duration::from_millis(20);
/// Complaints come by another way than messages, and may be a little later.
const BEHIND: Duration = Duration::from_millis(150);

/// A connection to look around with.
pub(super) struct Link {
    pub(super) client: Client,
    complaints: Arc<Mutex<Vec<String>>>,
}

/// What became of a message to an inbox of one's own.
pub(super) enum Echo {
    /// It came back, after so long.
    Came(Duration),
    /// The server refused, and said this.
    Refused(String),
    /// Nothing came.
    Silence,
}

impl Link {
    /// What the server complained of so far.
    pub(super) fn complaints(&self) -> Vec<String> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The complaint that names all of these.
    pub(super) fn complaint_of(&self, words: &[&str]) -> Option<String> {
        let names = |complaint: &String| words.iter().all(|word| complaint.contains(word));
        self.complaints().into_iter().find(names)
    }

    /// Waits until a complaint names all of these.
    pub(super) async fn complained_of(&self, words: &[&str]) -> String {
        loop {
            if let Some(complaint) = self.complaint_of(words) {
                return complaint;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Sends a message to an inbox of its own. When it is back, the server has seen all before it.
    pub(super) async fn echo(&self) -> Echo {
        let inbox = self.client.new_inbox();
        let request = Request::new().inbox(inbox.clone()).timeout(Some(PATIENCE));
        let begun = Instant::now();
        let echo = tokio::select! {
            echo = self.client.send_request(inbox, request) => match echo {
                Ok(_) => Echo::Came(begun.elapsed()),
                Err(_) => Echo::Silence,
            },
            complaint = self.complained_of(&["_INBOX"]) => Echo::Refused(complaint),
        };
        tokio::time::sleep(BEHIND).await;
        echo
    }
}

/// Tries each of the servers. Returns a connection to the first that lets the daemon in.
pub(super) async fn connect(config: &Config, tell: Tell<'_>) -> Option<Link> {
    let tries = config.nats.servers.iter().map(|url| open(&config.nats, url));
    let tried = futures::future::join_all(tries).await;
    let any = tried.iter().any(Result::is_ok);
    let mut first = None;
    for (url, tried) in config.nats.servers.iter().zip(tried) {
        match tried {
            Ok((link, took)) => {
                let info = link.client.server_info();
                tell(Finding::ok(
                    "nats",
                    format!("{url}: nats-server {}, logged in in {}", info.version, ms(took)),
                ));
                first.get_or_insert(link);
            }
            Err((detail, remedy)) => {
                let detail = format!("{url}: {detail}");
                // The daemon takes whichever lets it in.
                tell(if any {
                    Finding::warn("nats", detail, remedy)
                } else {
                    Finding::fail("nats", detail, remedy)
                });
            }
        }
    }
    first
}

type Refusal = (String, String);

async fn open(settings: &config::Nats, url: &str) -> Result<(Link, Duration), Refusal> {
    let address: ServerAddr =
        url.parse().map_err(|_| ("no address".to_owned(), "correct NATS_URL".to_owned()))?;
    let complaints = Arc::new(Mutex::new(Vec::new()));
    let heard = complaints.clone();
    let options = ConnectOptions::new()
        .name("worker-spawner check")
        .connection_timeout(PATIENCE)
        .request_timeout(Some(PATIENCE))
        .event_callback(move |event| {
            if let Event::ServerError(error) = &event {
                let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                heard.push(error.to_string());
            }
            std::future::ready(())
        });
    let options = identified(options, settings).await.map_err(|error| {
        (error.to_string(), "correct the file, or name another one in NATS_CREDS_FILE".to_owned())
    })?;
    let begun = Instant::now();
    match tokio::time::timeout(PATIENCE * 2, options.connect(address)).await {
        Ok(Ok(client)) => Ok((Link { client, complaints }, begun.elapsed())),
        Ok(Err(error)) => Err(explain(&error, settings)),
        Err(_) => Err(silent()),
    }
}

/// What is wrong, and what to do.
fn explain(error: &ConnectError, settings: &config::Nats) -> Refusal {
    let causes = std::iter::successors(std::error::Error::source(error), |e| e.source());
    let cause = causes.last().map_or_else(|| error.kind().to_string(), ToString::to_string);
    let lower = cause.to_lowercase();
    let by_tls = ["certificate", "tls", "alert", "handshake"].iter().any(|w| lower.contains(w));
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => (
            "the server refuses the login".to_owned(),
            match who(settings) {
                Some(setting) => format!(
                    "correct {setting}: the server does not know this user, or has another secret for it"
                ),
                None => "set one of NATS_CREDS_FILE, NATS_NKEY_SEED_FILE, NATS_USER with NATS_PASSWORD, or NATS_TOKEN: the server wants to know who connects".to_owned(),
            },
        ),
        ConnectErrorKind::TimedOut => silent(),
        ConnectErrorKind::Dns => (
            format!("there is no such host: {cause}"),
            "correct the host in NATS_URL, or its name's entry".to_owned(),
        ),
        _ if error.kind() == ConnectErrorKind::Tls || by_tls => (
            format!("TLS: {cause}"),
            if settings.tls_ca.is_none() && settings.tls_client.is_none() {
                "set NATS_TLS_CA to the authority of the server's certificate, and NATS_TLS_CERT and NATS_TLS_KEY where it asks for the client's".to_owned()
            } else {
                "correct NATS_TLS_CA, NATS_TLS_CERT and NATS_TLS_KEY; the host in NATS_URL must be one that the server's certificate names".to_owned()
            },
        ),
        _ if lower.contains("refused") => (
            "nobody listens there".to_owned(),
            "start a NATS server there, or correct NATS_URL".to_owned(),
        ),
        _ => (
            format!("no connection: {cause}"),
            "check that NATS_URL is the address of a NATS server's client port, and look at the server's log".to_owned(),
        ),
    }
}

fn silent() -> Refusal {
    (
        format!("no answer within {}", humantime::format_duration(PATIENCE)),
        "correct NATS_URL; look for a firewall on the way, and whether the server hangs".to_owned(),
    )
}

/// The setting that says who connects.
fn who(settings: &config::Nats) -> Option<&'static str> {
    if settings.creds_file.is_some() {
        Some("NATS_CREDS_FILE")
    } else if settings.nkey_seed.is_some() {
        Some("NATS_NKEY_SEED_FILE")
    } else if settings.user.is_some() {
        Some("NATS_USER and NATS_PASSWORD")
    } else if settings.token.is_some() {
        Some("NATS_TOKEN")
    } else {
        None
    }
}

/// Whether messages may be as large as outputs.
pub(super) fn max_payload(config: &Config, link: &Link, tell: Tell<'_>) {
    const CHECK: &str = "max_payload";
    let most = link.client.server_info().max_payload;
    let detail = format!("messages of up to {}", BinaryBytes(most as u64));
    let limit = config.output_limit;
    tell(if most < limit {
        let limit = BinaryBytes(limit as u64);
        Finding::warn(
            CHECK,
            format!(
                "{detail}, and outputs of up to {limit} by OUTPUT_LIMIT: what does not fit is cut, or becomes an object"
            ),
            "raise max_payload in the server's configuration, or lower OUTPUT_LIMIT",
        )
    } else {
        Finding::ok(CHECK, detail)
    });
}

/// Milliseconds for people.
pub(super) fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}
