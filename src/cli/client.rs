//! The connection of a client: made within a bounded time, and honest about what the server said.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use async_nats::client::Request;
use async_nats::jetstream::context::{
    ContextBuilder, GetStreamErrorKind, RequestError, RequestErrorKind,
};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{Context, ErrorCode};
use async_nats::{Client, ConnectErrorKind, Event, ServerAddr};
use tokio::sync::Notify;

use super::options::{ConnectOptions, Target};
use crate::nats::identified;
use crate::protocol::Subjects;
use crate::topology::{API_TIMEOUT, Names};

/// How long a round trip to the server may take, and an answer of a daemon.
pub(super) const ANSWER: Duration = Duration::from_secs(5);
/// How often the connection is tried for signs of life.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// The most complaints of the server that are remembered.
const MAX_COMPLAINTS: usize = 16;

/// A client's connection, and the names of what it looks for there.
pub(super) struct Link {
    pub(super) client: Client,
    pub(super) jetstream: Context,
    pub(super) subjects: Subjects,
    pub(super) names: Names,
    /// What the connection itself has to say.
    pub(super) news: Arc<News>,
    /// The servers, without any secret.
    pub(super) servers: String,
    /// Whether replies may be asked for in a request's `reply_to`.
    pub(super) plain_inboxes: bool,
}

/// What is known of the connection beside its messages.
#[derive(Default)]
pub(super) struct News {
    away: AtomicBool,
    /// How often a message to an inbox of this client's own was sent, and how often it was refused.
    echoes: AtomicU64,
    denied: AtomicU64,
    complaints: Mutex<Vec<String>>,
    changed: Notify,
}

impl News {
    fn observe(&self, event: &Event, inbox_prefix: &str) {
        match event {
            Event::Connected => self.away.store(false, Ordering::Relaxed),
            Event::Disconnected => self.away.store(true, Ordering::Relaxed),
            Event::ServerError(error) => {
                let error = error.to_string();
                // Some may not publish to inboxes, not even their own: that is no matter, and the
                // answer is a sign of life like any other.
                if error.to_lowercase().contains("publish") && error.contains(inbox_prefix) {
                    self.denied.fetch_add(1, Ordering::Relaxed);
                } else {
                    let mut complaints =
                        self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
                    if complaints.len() < MAX_COMPLAINTS && !complaints.contains(&error) {
                        complaints.push(error);
                    }
                }
            }
            _ => return,
        }
        self.changed.notify_waiters();
    }

    /// Whether there is no server just now.
    pub(super) fn away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// What the server refused since this was last asked.
    pub(super) fn complaints(&self) -> Vec<String> {
        std::mem::take(&mut self.complaints.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the server refuses something that has to do with `subject`, and returns its
    /// words. Cancel-safe.
    pub(super) async fn refused(&self, subject: &str) -> String {
        loop {
            let changed = self.changed.notified();
            let complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(complaint) = complaints.into_iter().find(|text| text.contains(subject)) {
                return complaint;
            }
            changed.await;
        }
    }

    /// `text`, and what the server refused beside it: that is often the reason.
    pub(super) fn explain(&self, text: impl std::fmt::Display) -> anyhow::Error {
        let complaints = self.complaints();
        if complaints.is_empty() {
            return anyhow!("{text}");
        }
        anyhow!("{text}; the server said: {}", complaints.join("; "))
    }
}

impl Link {
    /// Connects. `capacity` is how many messages of a subscription may wait for their reader.
    ///
    /// # Errors
    /// Says which server, who named it, and what would help.
    pub(super) async fn open(options: &ConnectOptions, capacity: usize) -> anyhow::Result<Self> {
        Self::to(options.resolve()?, capacity).await
    }

    /// As [`open`](Self::open), to what is known already.
    ///
    /// # Errors
    /// Says which server, who named it, and what would help.
    pub(super) async fn to(target: Target, capacity: usize) -> anyhow::Result<Self> {
        let Target { nats, subjects, context, timeout, said_by } = target;
        let servers = nats.servers.join(",");
        let addresses: Vec<ServerAddr> =
            nats.servers.iter().filter_map(|url| url.parse().ok()).collect();
        let inbox_prefix = context.inbox_prefix.unwrap_or_else(|| "_INBOX".to_owned());
        let news = Arc::new(News::default());
        let (seen, own_inbox) = (news.clone(), inbox_prefix.clone());
        let mut connect = async_nats::ConnectOptions::new()
            .name("worker-spawner client")
            .connection_timeout(timeout)
            .request_timeout(Some(ANSWER))
            .ping_interval(PING_INTERVAL)
            .subscription_capacity(capacity)
            .custom_inbox_prefix(&inbox_prefix)
            .event_callback(move |event| {
                seen.observe(&event, &own_inbox);
                std::future::ready(())
            });
        if context.tls_first {
            connect = connect.tls_first();
        }
        let connect = identified(connect, &nats).await?;
        // Each of several servers has its time.
        let patience = timeout * u32::try_from(addresses.len().max(1)).unwrap_or(1);
        let failed =
            |why: String| anyhow!("cannot connect to NATS at {servers} ({said_by}): {why}");
        let client = match tokio::time::timeout(patience, connect.connect(addresses)).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return Err(failed(reason(&error, timeout))),
            Err(_) => return Err(failed(no_answer(timeout))),
        };
        let jetstream = match context.api_prefix {
            Some(prefix) => {
                ContextBuilder::new().api_prefix(prefix).timeout(API_TIMEOUT).build(client.clone())
            }
            None => ContextBuilder::new().timeout(API_TIMEOUT).build(client.clone()),
        };
        let names = Names::new(&subjects, "");
        // Others a daemon refuses as a `reply_to`.
        let plain_inboxes = format!("{inbox_prefix}.").starts_with("_INBOX.");
        Ok(Self { client, jetstream, subjects, names, news, servers, plain_inboxes })
    }

    /// Waits until the server has seen all that was sent to it.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn round_trip(&self) -> anyhow::Result<()> {
        let inbox = self.client.new_inbox();
        let request = Request::new().inbox(inbox.clone()).timeout(Some(ANSWER));
        let own = self.news.echoes.fetch_add(1, Ordering::Relaxed) + 1;
        // The server answers in the order in which it was asked.
        let denied = async {
            while self.news.denied.load(Ordering::Relaxed) < own {
                self.news.changed.notified().await;
            }
        };
        let answered = tokio::select! {
            echo = self.client.send_request(inbox, request) => echo.is_ok(),
            () = denied => true,
        };
        // Of an earlier connection's refusals some never came.
        if answered || self.news.denied.load(Ordering::Relaxed) > 0 {
            return Ok(());
        }
        Err(self.news.explain(format!("NATS at {} does not answer", self.servers)))
    }

    /// The stream `name`, which holds `what`.
    ///
    /// # Errors
    /// There is none, and without it `command` cannot work.
    pub(super) async fn stream(&self, command: &str, name: &str) -> anyhow::Result<Stream> {
        let error = match self.jetstream.get_stream(name).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let needs = format!("`{command}` needs JetStream");
        let none = [ErrorCode::JETSTREAM_NOT_ENABLED, ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT];
        match error.kind() {
            GetStreamErrorKind::JetStream(e) if none.contains(&e.error_code()) => {
                bail!("{needs}, and this NATS account has none")
            }
            GetStreamErrorKind::JetStream(e) if e.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                bail!(
                    "{needs} and a daemon that uses it: there is no stream {name}; check --subject-prefix, now {:?}",
                    self.subjects.prefix()
                )
            }
            _ => {}
        }
        let source = std::error::Error::source(&error);
        let nobody = source
            .and_then(|source| source.downcast_ref::<RequestError>())
            .is_some_and(|error| error.kind() == RequestErrorKind::NoResponders);
        if nobody {
            bail!("{needs}, and NATS at {} has none", self.servers)
        }
        Err(self.news.explain(format!("JetStream does not say what the stream {name} is: {error}")))
    }

    /// The job records.
    ///
    /// # Errors
    /// There are none.
    pub(super) async fn records(
        &self,
        command: &str,
    ) -> anyhow::Result<async_nats::jetstream::kv::Store> {
        let bucket = &self.names.jobs;
        self.stream(command, &format!("KV_{bucket}")).await?;
        self.jetstream.get_key_value(bucket).await.context("the job records cannot be read")
    }

    /// The bucket of big inputs and outputs.
    ///
    /// # Errors
    /// There is none.
    pub(super) async fn objects(
        &self,
        command: &str,
        bucket: &str,
    ) -> anyhow::Result<async_nats::jetstream::object_store::ObjectStore> {
        self.stream(command, &format!("OBJ_{bucket}")).await?;
        self.jetstream.get_object_store(bucket).await.context("the object store cannot be read")
    }

    /// Sends what is still under way, and says goodbye.
    pub(super) async fn close(&self) {
        // Whoever leaves has waited for all that matters.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.client.flush()).await;
    }
}

/// Why there is no connection, and what to do about it.
fn reason(error: &async_nats::ConnectError, timeout: Duration) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    let cause = source.unwrap_or_else(|| error.kind().to_string());
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            "it refuses who asks; check the user, token, credentials or nkey".to_owned()
        }
        ConnectErrorKind::TimedOut => no_answer(timeout),
        ConnectErrorKind::Tls => format!("TLS: {cause}; check --tls-ca, --tls-cert and --tls-key"),
        ConnectErrorKind::Dns => format!("no such host: {cause}"),
        _ => format!("{cause}; is a server running there?"),
    }
}

fn no_answer(timeout: Duration) -> String {
    format!(
        "no answer within {}; --connect-timeout allows more",
        humantime::format_duration(timeout)
    )
}
