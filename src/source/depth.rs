//! How many requests wait in the stream, for those who watch.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use tokio::sync::watch;

use crate::job::Priority;
use crate::nats::Connection;
use crate::topology::Topology;

/// How often the server is asked: three small requests each time.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// Requests that no instance has taken yet, by the places of [`Priority::ALL`].
pub type Depth = [u64; Priority::ALL.len()];

/// Keeps asking how many requests wait; tells nothing where the server does not say. Never returns.
pub async fn watch_depth(
    connection: Connection,
    jetstream: Context,
    topology: Arc<Topology>,
    depth: watch::Sender<Option<Depth>>,
) {
    loop {
        connection.connected().await;
        let keep_looking = async {
            loop {
                depth.send_replace(look(&jetstream, &topology).await);
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        };
        tokio::select! {
            () = keep_looking => {}
            () = connection.broken(connection.epoch()) => {}
        }
        // What was known then is no news any more.
        depth.send_replace(None);
    }
}

async fn look(jetstream: &Context, topology: &Topology) -> Option<Depth> {
    let names = &topology.names;
    let queue = jetstream.get_stream_no_info(&names.queue).await.ok()?;
    let mut depth = Depth::default();
    for (waiting, priority) in depth.iter_mut().zip(Priority::ALL) {
        *waiting = queue.consumer_info(names.consumer(priority)).await.ok()?.num_pending;
    }
    Some(depth)
}
