//! The connection to NATS: made for ever, reported once per change.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, ServerAddr, Subscriber};
use futures::{FutureExt, StreamExt};
use tokio::sync::watch;

use crate::config;
use crate::retry::Backoff;

/// Delays between tries to connect.
const RECONNECT: Backoff =
    Backoff { first: Duration::from_millis(100), most: Duration::from_secs(5) };
/// A server that is silent for two of these is gone: noticed in half a minute where TCP alone
/// would take a quarter of an hour.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// How long a server may take to end a subscription.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// How long one try to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that reconnects by itself.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The client. Publishing waits in its buffer while there is no server.
    pub client: Client,
    connected: watch::Receiver<bool>,
    lost: Arc<AtomicU64>,
}

/// Why there can be no connection, whatever the server does.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// `NATS_CREDS_FILE` holds no credentials.
    #[error("NATS_CREDS_FILE: {0}")]
    Credentials(std::io::Error),
    /// The client refuses the settings.
    #[error("NATS: {0}")]
    Client(#[from] async_nats::ConnectError),
}

impl Connection {
    /// Begins to connect, and returns without waiting for a server.
    ///
    /// `subscription_capacity` is the number of messages that may wait between the socket and the
    /// reader of each subscription.
    ///
    /// # Errors
    /// The settings cannot be used.
    pub async fn open(
        settings: &config::Nats,
        name: &str,
        subscription_capacity: usize,
    ) -> Result<Self, ConnectError> {
        let (state, connected) = watch::channel(false);
        let lost = Arc::new(AtomicU64::new(0));
        let servers: Vec<ServerAddr> =
            settings.servers.iter().filter_map(|url| url.expose().parse().ok()).collect();
        let log = Arc::new(StateLog::new(state, lost.clone(), &servers));
        let mut options = ConnectOptions::new()
            .name(name)
            .retry_on_initial_connect()
            .max_reconnects(None)
            .reconnect_delay_callback(|attempts| {
                RECONNECT.delay(u32::try_from(attempts).unwrap_or(u32::MAX))
            })
            .connection_timeout(CONNECT_TIMEOUT)
            .ping_interval(PING_INTERVAL)
            .subscription_capacity(subscription_capacity)
            .event_callback(move |event| {
                let log = log.clone();
                async move { log.observe(&event) }
            });
        if let Some(path) = &settings.creds_file {
            options = options.credentials_file(path).await.map_err(ConnectError::Credentials)?;
        }
        if let Some(seed) = &settings.nkey_seed {
            options = options.nkey(seed.expose().to_owned());
        }
        if let Some((user, password)) = &settings.user {
            options = options.user_and_password(user.clone(), password.expose().to_owned());
        }
        if let Some(token) = &settings.token {
            options = options.token(token.expose().to_owned());
        }
        if let Some(ca) = &settings.tls_ca {
            options = options.add_root_certificates(ca.clone()).require_tls(true);
        }
        if let Some((cert, key)) = &settings.tls_client {
            options = options.add_client_certificate(cert.clone(), key.clone()).require_tls(true);
        }
        let client = options.connect(servers).await?;
        Ok(Self { client, connected, lost })
    }

    /// Waits until there is a server.
    pub async fn connected(&self) {
        if self.connected.clone().wait_for(|up| *up).await.is_err() {
            // The client is gone, and with it any hope of a connection.
            std::future::pending::<()>().await;
        }
    }

    /// Ends a subscription and yields what the server had sent before it saw the end.
    ///
    /// Without a server there is nothing to wait for; one that does not answer is waited for only
    /// for a moment.
    pub async fn unsubscribe(&self, subscriber: &mut Subscriber) -> Vec<async_nats::Message> {
        let mut rest = Vec::new();
        let draining = async {
            if *self.connected.borrow() && subscriber.drain().await.is_ok() {
                while let Some(message) = subscriber.next().await {
                    rest.push(message);
                }
            }
        };
        if tokio::time::timeout(DRAIN_PATIENCE, draining).await.is_err() {
            tracing::debug!("the server did not end the subscription in time");
        }
        // Without a server, and after a timeout: what lies in the client's channel already.
        while let Some(Some(message)) = subscriber.next().now_or_never() {
            rest.push(message);
        }
        rest
    }

    /// How many messages the client dropped because a subscription's reader was too slow; at
    /// least, since the client reports each as it happens and may skip reports.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until the server has taken everything published so far, or `patience` is over.
    ///
    /// A flush alone ends at the socket. A request that nobody answers comes back from the server
    /// itself, behind all that went before it.
    pub async fn settle(&self, patience: Duration) {
        if !*self.connected.borrow() {
            return;
        }
        let round_trip = async {
            // Either failing shows in the timeout or in the lost connection; nothing is left to do.
            let _ = self.client.flush().await;
            let _ = self.client.request(self.client.new_inbox(), bytes::Bytes::new()).await;
        };
        if tokio::time::timeout(patience, round_trip).await.is_err() {
            tracing::warn!("NATS did not confirm the last messages");
        }
    }
}

/// Turns the client's events into one log line per change of state.
struct StateLog {
    /// Hosts and ports alone: the URLs may hold passwords.
    servers: String,
    state: watch::Sender<bool>,
    complained: AtomicBool,
    last_error: Mutex<String>,
    lost: Arc<AtomicU64>,
}

impl StateLog {
    fn new(state: watch::Sender<bool>, lost: Arc<AtomicU64>, servers: &[ServerAddr]) -> Self {
        let hosts: Vec<String> =
            servers.iter().map(|s| format!("{}:{}", s.host(), s.port())).collect();
        Self {
            servers: hosts.join(","),
            state,
            complained: false.into(),
            last_error: Mutex::default(),
            lost,
        }
    }

    fn observe(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.complained.store(false, Ordering::Relaxed);
                self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clear();
                self.state.send_replace(true);
                tracing::info!(servers = self.servers, "connected to NATS");
            }
            Event::Disconnected => {
                self.complained.store(true, Ordering::Relaxed);
                if self.state.send_replace(false) {
                    tracing::warn!(
                        servers = self.servers,
                        "lost the connection to NATS; reconnecting"
                    );
                }
            }
            Event::ClientError(error) if !*self.state.borrow() => {
                if !self.complained.swap(true, Ordering::Relaxed) {
                    tracing::warn!(servers = self.servers, %error, "cannot connect to NATS yet; trying on");
                }
            }
            Event::SlowConsumer(_) => {
                // The reader that is too slow reports the episode.
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
            Event::LameDuckMode => tracing::info!("the NATS server is about to stop"),
            Event::ServerError(_) | Event::ClientError(_) => self.error(&event.to_string()),
            Event::Draining | Event::Closed => tracing::debug!(%event, "NATS"),
        }
    }

    /// The same error again is no news.
    fn error(&self, error: &str) {
        let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != error {
            tracing::error!(error, "NATS");
            error.clone_into(&mut last);
        }
    }
}
