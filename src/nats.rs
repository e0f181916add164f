//! The connection to NATS: made for ever, reported once per change.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event, Request, ServerAddr, Subscriber};
use futures::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::task::unconstrained;

use crate::config;
use crate::retry::Backoff;

/// Delays between tries to connect.
const RECONNECT: Backoff =
    Backoff { first: Duration::from_millis(100), most: Duration::from_secs(5) };
/// A server that is silent for two of these is gone: noticed in half a minute where TCP alone
/// would take a quarter of an hour.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// How long a server may take to confirm. Longer than the client takes to notice that it is gone.
const CONFIRM_PATIENCE: Duration = Duration::from_secs(60);
/// How often the connection's state is looked at beside the client's events.
const STATE_CHECK: Duration = Duration::from_secs(1);
/// Behind how many messages more a subscription ends, and how long they may take to come. The first
/// is more than are on the wire at once, the second more than come in a moment where the first are
/// not reached.
const EXACT_ENDS: [(u64, Duration); 2] =
    [(1024, Duration::from_millis(300)), (64, Duration::from_millis(100))];
/// After how long without a message there is too little traffic to wait for a number of them.
const EMPTY_AFTER: Duration = Duration::from_millis(60);
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
    /// Set when the server does not let this client use inboxes: then nothing is confirmed.
    inbox_denied: Arc<AtomicBool>,
    /// Set when the server does not let this client use JetStream.
    api_denied: Arc<AtomicBool>,
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

/// A subscription that comes to its end.
struct Ending<'a, F> {
    subscriber: &'a mut Subscriber,
    /// How many messages it has yielded in all.
    received: u64,
    take: F,
}

impl<F: FnMut(async_nats::Message)> Ending<'_, F> {
    /// Takes what lies in the client's channel.
    fn take_waiting(&mut self) {
        // All of it: the runtime's budget would feign an empty channel after 128 messages.
        while let Some(Some(message)) = unconstrained(self.subscriber.next()).now_or_never() {
            self.take(message);
        }
    }

    /// Has the subscription end behind so many further messages. Returns whether it still can.
    async fn put_behind(&mut self, more: u64) -> bool {
        // The client counts what it has put into its channel, whether it is taken or not.
        self.take_waiting();
        self.subscriber.unsubscribe_after(self.received + more).await.is_ok()
    }

    /// Ends the subscription where it is.
    async fn now(&mut self) {
        if self.subscriber.drain().await.is_ok() {
            self.take_all().await;
        }
    }

    async fn take_all(&mut self) {
        while let Some(message) = self.subscriber.next().await {
            self.take(message);
        }
    }

    fn take(&mut self, message: async_nats::Message) {
        self.received += 1;
        (self.take)(message);
    }
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
            settings.servers.iter().filter_map(|url| url.parse().ok()).collect();
        let inbox_denied = Arc::new(AtomicBool::new(false));
        let api_denied = Arc::new(AtomicBool::new(false));
        let denied = [inbox_denied.clone(), api_denied.clone()];
        let log = StateLog::new(state, lost.clone(), denied, &servers);
        let log = Arc::new(log);
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
        options = identified(options, settings).await?;
        let client = options.connect(servers).await?;
        Ok(Self { client, connected, lost, inbox_denied, api_denied })
    }

    /// Waits until there is a server. Returns whether there was one all along.
    pub async fn connected(&self) -> bool {
        let mut connected = self.connected.clone();
        let all_along = self.client.connection_state() == State::Connected;
        while self.client.connection_state() != State::Connected {
            // The client may skip events when there are many; a look now and then makes up for it.
            let _ = tokio::time::timeout(STATE_CHECK, connected.changed()).await;
        }
        all_along
    }

    /// Which connection this is: how many there have been so far.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Waits until this is no longer connection number `epoch`, or no connection at all. Cancel-safe.
    pub async fn broken(&self, epoch: u64) {
        let mut connected = self.connected.clone();
        while self.epoch() == epoch && self.client.connection_state() == State::Connected {
            let _ = tokio::time::timeout(STATE_CHECK, connected.changed()).await;
        }
    }

    /// Whether the server has taken everything that was published since [`Connection::epoch`] was
    /// `epoch`; otherwise the connection broke, and nobody knows.
    ///
    /// Publishing alone ends in a buffer, and flushing at the socket. A message to an inbox of our
    /// own comes back from the server behind all that went before it.
    pub async fn confirmed(&self, epoch: u64) -> bool {
        let inbox = self.client.new_inbox();
        let request = Request::new().inbox(inbox.clone()).timeout(Some(CONFIRM_PATIENCE));
        let echo = self.client.send_request(inbox, request);
        let verdict = async {
            let mut connected = self.connected.clone();
            loop {
                if self.epoch() != epoch || self.client.connection_state() != State::Connected {
                    return false;
                }
                if self.inbox_denied.load(Ordering::Relaxed) {
                    return true;
                }
                let _ = tokio::time::timeout(STATE_CHECK, connected.changed()).await;
            }
        };
        tokio::select! {
            // Without an echo in all that time the connection lives all the same, says its own
            // heartbeat, and more cannot be known.
            _echo = echo => self.epoch() == epoch,
            verdict = verdict => verdict,
        }
    }

    /// Ends a subscription that has yielded `received` messages, and hands `take` what still
    /// arrives.
    ///
    /// The client library forgets a subscription before the server does, and drops what is on the
    /// wire in between. So the end is put at a number of messages to come, which both sides count
    /// alike: once it is reached, nothing is lost. Where messages are too rare for that, the end is
    /// put there and then: what is lost is what comes within that one round trip. Without a server
    /// there is nothing to wait for.
    pub async fn unsubscribe(
        &self,
        subscriber: &mut Subscriber,
        received: u64,
        take: impl FnMut(async_nats::Message),
    ) {
        let mut ending = Ending { subscriber, received, take };
        if *self.connected.borrow() {
            self.up_to_date().await;
            if self.exact_end(&mut ending).await {
                return;
            }
            if tokio::time::timeout(DRAIN_PATIENCE, ending.now()).await.is_err() {
                tracing::debug!("the server did not end the subscription in time");
            }
        }
        ending.take_waiting();
    }

    /// Whether the end came at a number of messages; not where the traffic is too thin for that.
    async fn exact_end<F: FnMut(async_nats::Message)>(&self, ending: &mut Ending<'_, F>) -> bool {
        for (more, patience) in EXACT_ENDS {
            if !ending.put_behind(more).await {
                return false;
            }
            let begun = Instant::now();
            while begun.elapsed() < patience {
                let before = ending.received;
                let a_while = async {
                    tokio::join!(self.up_to_date(), tokio::time::sleep(EMPTY_AFTER));
                };
                tokio::select! {
                    () = ending.take_all() => return true,
                    () = a_while => {}
                }
                ending.take_waiting();
                if ending.received == before {
                    return false;
                }
            }
        }
        false
    }

    /// Waits until what the server has sent so far is in the channels of the client.
    async fn up_to_date(&self) {
        let _ = tokio::time::timeout(DRAIN_PATIENCE, self.confirmed(self.epoch())).await;
    }

    /// Whether the server has said that this client may not use JetStream.
    #[must_use]
    pub fn api_denied(&self) -> bool {
        self.api_denied.load(Ordering::Relaxed)
    }

    /// How many messages the client dropped because a subscription's reader was too slow; at
    /// least, since the client reports each as it happens and may skip reports.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until the server has taken everything published so far, or `patience` is over.
    pub async fn settle(&self, patience: Duration) {
        if !*self.connected.borrow() {
            return;
        }
        let round_trip = async {
            // What fails here fails below as well.
            let _ = self.client.flush().await;
            self.confirmed(self.epoch()).await
        };
        if tokio::time::timeout(patience, round_trip).await.is_err() {
            tracing::warn!("NATS did not confirm the last messages");
        }
    }
}

/// `options` with what these settings say of who connects, and of TLS.
///
/// # Errors
/// The credentials' file holds none.
pub(crate) async fn identified(
    mut options: ConnectOptions,
    settings: &config::Nats,
) -> Result<ConnectOptions, ConnectError> {
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
    Ok(options)
}

/// Turns the client's events into one log line per change of state.
struct StateLog {
    /// Hosts and ports alone: the URLs may hold passwords.
    servers: String,
    state: watch::Sender<bool>,
    /// What was said since the last change.
    said: Mutex<HashSet<String>>,
    lost: Arc<AtomicU64>,
    inbox_denied: Arc<AtomicBool>,
    api_denied: Arc<AtomicBool>,
}

/// How many different errors are remembered as said.
const MAX_SAID: usize = 64;

impl StateLog {
    fn new(
        state: watch::Sender<bool>,
        lost: Arc<AtomicU64>,
        [inbox_denied, api_denied]: [Arc<AtomicBool>; 2],
        servers: &[ServerAddr],
    ) -> Self {
        let hosts: Vec<String> =
            servers.iter().map(|s| format!("{}:{}", s.host(), s.port())).collect();
        Self {
            servers: hosts.join(","),
            state,
            said: Mutex::default(),
            lost,
            inbox_denied,
            api_denied,
        }
    }

    fn observe(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.said.lock().unwrap_or_else(PoisonError::into_inner).clear();
                self.inbox_denied.store(false, Ordering::Relaxed);
                self.api_denied.store(false, Ordering::Relaxed);
                self.state.send_replace(true);
                tracing::info!(servers = self.servers, "connected to NATS");
            }
            Event::Disconnected => {
                if self.state.send_replace(false) {
                    tracing::warn!(
                        servers = self.servers,
                        "lost the connection to NATS; reconnecting"
                    );
                }
            }
            Event::ClientError(error) if !*self.state.borrow() => {
                if self.is_news(&error.to_string()) {
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

    fn error(&self, error: &str) {
        let is_denial = error.to_lowercase().contains("permissions violation");
        if is_denial && error.contains("\"$SRV.") {
            if self.is_news("$SRV") {
                tracing::warn!(
                    "this NATS user may not subscribe to $SRV.>: the service cannot be discovered"
                );
            }
        // The inbox in it is another one each time.
        } else if is_denial && error.contains("_INBOX") {
            if !self.inbox_denied.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    error,
                    "this NATS user may not use inboxes: outcomes are published without a confirmation, and some replies may be refused"
                );
            }
        } else {
            if is_denial && error.contains("$JS.API") {
                self.api_denied.store(true, Ordering::Relaxed);
            }
            if !self.is_news(error) {
                return;
            }
            tracing::error!(error, "NATS");
        }
    }

    /// What was said before is no news.
    fn is_news(&self, error: &str) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.len() < MAX_SAID && said.insert(error.to_owned())
    }
}
