//! Durable delivery: set up from its parts, where there is to be any.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;

use crate::config::{Config, Delivery};
use crate::nats::Connection;
use crate::objects::Objects;
use crate::retry::Backoff;
use crate::source::jetstream::SPARE_DELIVERIES;
use crate::state::Records;
use crate::topology::{self, SetupError, Topology};

/// Delays between tries to set up durable delivery.
const SETUP_RETRY: Backoff =
    Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };

/// What durable delivery is made of.
pub(super) struct Durable {
    pub(super) jetstream: jetstream::Context,
    pub(super) topology: Arc<Topology>,
    pub(super) records: Records,
    pub(super) objects: Option<Objects>,
}

/// Sets up durable delivery, or nothing where there is to be none. Waits for a server as long as it
/// takes: what it offers decides.
///
/// # Errors
/// The settings ask for what the server does not have.
pub(super) async fn durable(
    connection: &Connection,
    config: &Config,
    worker: &str,
) -> Result<Option<Durable>, SetupError> {
    if config.delivery == Delivery::Core {
        return Ok(None);
    }
    let jetstream = jetstream::context::ContextBuilder::new()
        .timeout(topology::API_TIMEOUT)
        .build(connection.client.clone());
    let topology = Arc::new(Topology::new(
        &config.subjects,
        &config.queue_group,
        &config.streams,
        config.max_attempts + SPARE_DELIVERIES,
        config.object_limit > 0,
    ));
    let mut failures = 0;
    loop {
        connection.connected().await;
        match set_up(connection, config, worker, &jetstream, &topology).await {
            Ok(durable) => return Ok(Some(durable)),
            Err(SetupError::Unavailable(why)) if !connection.api_denied() => {
                failures += 1;
                if failures == 1 {
                    tracing::warn!(why, "JetStream does not answer yet; trying on");
                }
                tokio::time::sleep(SETUP_RETRY.delay(failures)).await;
            }
            Err(SetupError::Unavailable(_)) if config.delivery == Delivery::JetStream => {
                let why =
                    "this NATS user may not publish to $JS.API.>: grant it, or connect as another";
                return Err(SetupError::Absent(why.to_owned()));
            }
            Err(error @ SetupError::Unfit(_)) => return Err(error),
            Err(error) if config.delivery == Delivery::JetStream => return Err(error),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "no JetStream: requests are delivered by plain NATS, and those that wait in this daemon are lost with it"
                );
                return Ok(None);
            }
        }
    }
}

async fn set_up(
    connection: &Connection,
    config: &Config,
    worker: &str,
    jetstream: &jetstream::Context,
    topology: &Arc<Topology>,
) -> Result<Durable, SetupError> {
    topology.ensure(jetstream).await?;
    let records =
        Records::new(connection.clone(), jetstream.clone(), topology.clone(), worker.to_owned());
    let records = records.await?;
    let objects = if config.object_limit > 0 {
        let bucket = &topology.names.objects;
        let store = jetstream.get_object_store(bucket).await;
        let store = store.map_err(|e| SetupError::Unavailable(e.to_string()))?;
        Some(Objects::new(jetstream.clone(), store, bucket.clone(), config.object_limit))
    } else {
        None
    };
    Ok(Durable { jetstream: jetstream.clone(), topology: topology.clone(), records, objects })
}
