//! Outcomes on their way out.

use std::time::Duration;

use async_nats::HeaderMap;
use tokio_util::sync::CancellationToken;

use crate::job::Outcome;
use crate::nats::Connection;
use crate::protocol::{Subjects, outcome};

/// Publishes outcomes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher {
    connection: Connection,
    results: String,
}

/// How long subscribers may take to come back after an outage: NATS' client libraries wait up to two
/// seconds between their tries by default.
const SUBSCRIBERS_RETURN: Duration = Duration::from_secs(3);

/// Where an outcome goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// To the results subject, raw with headers.
    pub results: bool,
    /// To these subjects, as JSON. Checked before they get here.
    pub replies: Vec<String>,
}

impl Publisher {
    /// A publisher under these subjects.
    #[must_use]
    pub fn new(connection: Connection, subjects: &Subjects) -> Self {
        Self { connection, results: subjects.results.clone() }
    }

    /// Publishes `outcome` along `route`, again where the connection broke before the server
    /// confirmed it: the receiver can tell by the id. Waits for a server where there is none, for
    /// as long as it takes; the caller bounds the wait.
    ///
    /// What cannot be sent at all is logged with the job's id: there is nobody else to tell.
    ///
    /// Once `hurry` is cancelled, subscribers are no longer waited for.
    pub async fn publish(&self, outcome: &Outcome, route: &Route, hurry: &CancellationToken) {
        let mut unbroken = true;
        loop {
            unbroken &= self.connection.connected().await;
            if !unbroken {
                // Those who wait for it were cut off as well, and plain NATS keeps nothing.
                tokio::select! {
                    () = tokio::time::sleep(SUBSCRIBERS_RETURN) => {}
                    () = hurry.cancelled() => {}
                }
                if !self.connection.connected().await {
                    continue;
                }
            }
            unbroken = false;
            let epoch = self.connection.epoch();
            self.send(outcome, route).await;
            if self.connection.confirmed(epoch).await {
                return;
            }
            tracing::warn!(job = %outcome.id, "the connection broke before the outcome was confirmed; it is sent again");
        }
    }

    async fn send(&self, outcome: &Outcome, route: &Route) {
        let client = &self.connection.client;
        // The server closes the connection of who sends more, and everybody's results with it.
        let limit = client.max_payload();
        let job = &outcome.id;
        for reply in &route.replies {
            match outcome::json(outcome, limit) {
                Ok(json) => {
                    if let Err(error) = client.publish(reply.clone(), json).await {
                        tracing::error!(%job, reply, %error, "could not reply");
                    }
                }
                Err(error) => tracing::error!(%job, reply, %error, "could not reply"),
            }
        }
        if route.results {
            let message = outcome::result_message(outcome, limit);
            let mut headers = HeaderMap::new();
            for (name, value) in message.headers {
                headers.insert(name, value);
            }
            let published =
                client.publish_with_headers(self.results.clone(), headers, message.body).await;
            if let Err(error) = published {
                tracing::error!(%job, %error, "could not publish the result");
            }
        }
    }
}
