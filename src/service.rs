//! The daemon as a NATS service: what it is, what it offers and how that fares, told to whoever asks.
//!
//! The protocol is ADR-32 of nats-architecture-and-design, the one `nats micro` and the client
//! libraries' service discovery speak. The client library's own implementation would also take the
//! requests themselves, and forgets a subscription before the server does; so only the questions
//! are answered here, and the requests stay with the intake.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_nats::{Message, SubscribeError};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde_json::Value;

use crate::job::JobError;
use crate::nats::Connection;
use crate::protocol::time::rfc3339;

/// The service's name. Instances of one name are of one kind.
pub const NAME: &str = env!("CARGO_PKG_NAME");
const VERSION: &str = env!("CARGO_PKG_VERSION");
const DESCRIPTION: &str = env!("CARGO_PKG_DESCRIPTION");

/// How many requests an endpoint has had, and how they fared.
#[derive(Debug, Default)]
pub struct Tally(Mutex<Numbers>);

#[derive(Clone, Debug, Default)]
struct Numbers {
    requests: u64,
    errors: u64,
    last_error: String,
    time: Duration,
}

impl Tally {
    /// Counts a request that was answered after so long; `error` is why it was refused, or why it
    /// failed for no fault of the function's.
    pub fn observe(&self, took: Duration, error: Option<&JobError>) {
        let mut numbers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.requests += 1;
        numbers.time += took;
        if let Some(error) = error {
            numbers.errors += 1;
            numbers.last_error = error.to_string();
        }
    }

    fn numbers(&self) -> Numbers {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Something that can be asked of the service.
pub struct Endpoint {
    /// Its name.
    pub name: &'static str,
    /// Where requests go.
    pub subject: String,
    /// The group whose members share the requests; nothing where each instance gets them all.
    pub queue_group: Option<String>,
    /// What is worth knowing of it, such as the schemas of its messages.
    pub metadata: BTreeMap<&'static str, String>,
    /// How it fares.
    pub tally: Arc<Tally>,
}

/// What an instance says of itself beside its endpoints' tallies, at the moment it is asked.
pub type State = Box<dyn Fn() -> Value + Send + Sync>;

/// One instance of the service.
pub struct Service {
    /// The instance's name.
    pub id: String,
    /// What is worth knowing of the instance.
    pub metadata: BTreeMap<&'static str, String>,
    /// What it offers.
    pub endpoints: Vec<Endpoint>,
    /// How the instance is.
    pub state: State,
    /// Since when it runs.
    pub started: SystemTime,
}

/// What can be asked.
#[derive(Clone, Copy)]
enum Question {
    Ping,
    Info,
    Stats,
}

impl Question {
    const ALL: [Self; 3] = [Self::Ping, Self::Info, Self::Stats];

    fn verb(self) -> &'static str {
        match self {
            Self::Ping => "PING",
            Self::Info => "INFO",
            Self::Stats => "STATS",
        }
    }

    /// Where it is asked of all services, of all of this name, and of this instance.
    fn subjects(self, id: &str) -> [String; 3] {
        let verb = self.verb();
        [format!("$SRV.{verb}"), format!("$SRV.{verb}.{NAME}"), format!("$SRV.{verb}.{NAME}.{id}")]
    }
}

impl Service {
    /// Answers until the connection is closed.
    ///
    /// # Errors
    /// The connection is closed already.
    pub async fn answer(self, connection: &Connection) -> Result<(), SubscribeError> {
        let subscriptions = Question::ALL.iter().flat_map(|question| {
            question.subjects(&self.id).map(|subject| async move {
                let asked = connection.client.subscribe(subject).await?;
                Ok::<_, SubscribeError>(asked.map(move |message| (*question, message)))
            })
        });
        let subscriptions: Vec<_> =
            stream::iter(subscriptions).then(|subscription| subscription).try_collect().await?;
        let mut asked = stream::select_all(subscriptions);
        while let Some((question, Message { reply, .. })) = asked.next().await {
            let Some(reply) = reply else { continue };
            let published = connection.client.publish(reply, self.reply(question)).await;
            if let Err(error) = published {
                tracing::debug!(%error, "could not say what this service is");
            }
        }
        Ok(())
    }

    fn reply(&self, question: Question) -> Bytes {
        let identity = Identity {
            kind: match question {
                Question::Ping => "io.nats.micro.v1.ping_response",
                Question::Info => "io.nats.micro.v1.info_response",
                Question::Stats => "io.nats.micro.v1.stats_response",
            },
            name: NAME,
            id: &self.id,
            version: VERSION,
            metadata: &self.metadata,
        };
        let reply = match question {
            Question::Ping => serde_json::to_vec(&identity),
            Question::Info => serde_json::to_vec(&Info {
                identity,
                description: DESCRIPTION,
                endpoints: self.endpoints.iter().map(EndpointInfo::of).collect(),
            }),
            Question::Stats => serde_json::to_vec(&Stats {
                identity,
                started: rfc3339(self.started),
                endpoints: self
                    .endpoints
                    .iter()
                    .map(|endpoint| EndpointStats::of(endpoint, (self.state)()))
                    .collect(),
            }),
        };
        reply.unwrap_or_default().into()
    }
}

#[derive(Serialize)]
struct Identity<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    name: &'static str,
    id: &'a str,
    version: &'static str,
    metadata: &'a BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
struct Info<'a> {
    #[serde(flatten)]
    identity: Identity<'a>,
    description: &'static str,
    endpoints: Vec<EndpointInfo<'a>>,
}

#[derive(Serialize)]
struct EndpointInfo<'a> {
    name: &'a str,
    subject: &'a str,
    queue_group: &'a str,
    metadata: &'a BTreeMap<&'static str, String>,
}

impl<'a> EndpointInfo<'a> {
    fn of(endpoint: &'a Endpoint) -> Self {
        Self {
            name: endpoint.name,
            subject: &endpoint.subject,
            queue_group: endpoint.queue_group.as_deref().unwrap_or_default(),
            metadata: &endpoint.metadata,
        }
    }
}

#[derive(Serialize)]
struct Stats<'a> {
    #[serde(flatten)]
    identity: Identity<'a>,
    started: String,
    endpoints: Vec<EndpointStats<'a>>,
}

#[derive(Serialize)]
struct EndpointStats<'a> {
    name: &'a str,
    subject: &'a str,
    queue_group: &'a str,
    num_requests: u64,
    num_errors: u64,
    last_error: String,
    /// In nanoseconds, as the next.
    processing_time: u64,
    average_processing_time: u64,
    data: Value,
}

impl<'a> EndpointStats<'a> {
    fn of(endpoint: &'a Endpoint, data: Value) -> Self {
        let Numbers { requests, errors, last_error, time } = endpoint.tally.numbers();
        let processing_time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            name: endpoint.name,
            subject: &endpoint.subject,
            queue_group: endpoint.queue_group.as_deref().unwrap_or_default(),
            num_requests: requests,
            num_errors: errors,
            last_error,
            processing_time,
            average_processing_time: processing_time.checked_div(requests).unwrap_or_default(),
            data,
        }
    }
}
