//! A TCP relay that can hold back what it carries, or drop it, to make a server slow or far away.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What passes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    /// Everything.
    Open,
    /// About a kilobyte a second towards the client.
    Trickle,
    /// Nothing towards the client.
    Shut,
    /// Nothing in either direction; connections stay.
    Stalled,
    /// Connections break, and new ones do as soon as they are made.
    Cut,
}

impl Flow {
    fn reaches_server(self) -> bool {
        !matches!(self, Self::Stalled | Self::Cut)
    }

    fn reaches_client(self) -> bool {
        matches!(self, Self::Open | Self::Trickle)
    }
}

/// A relay on a loopback port of its own to another one.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

struct Shared {
    target: u16,
    flow: watch::Sender<Flow>,
    connections: AtomicUsize,
    trap: Mutex<Option<Trap>>,
}

/// What is done when a client sends certain bytes.
struct Trap {
    bytes: Vec<u8>,
    then: Flow,
}

impl Proxy {
    pub(crate) async fn to(target: u16, flow: Flow) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            target,
            flow: watch::channel(flow).0,
            connections: AtomicUsize::new(0),
            trap: Mutex::new(None),
        });
        let relay = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            let mut relays = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                relay.connections.fetch_add(1, Ordering::SeqCst);
                let relay = Arc::clone(&relay);
                relays.spawn(async move { relay.carry(client).await });
            }
        });
        Self { port, shared, accepting }
    }

    pub(crate) fn set(&self, flow: Flow) {
        self.shared.flow.send_replace(flow);
    }

    /// Changes the flow to `then` as soon as a client sends `bytes`, once. They wait
    /// as all that follows does, or are lost with the connection.
    pub(crate) fn set_when_sent(&self, bytes: &[u8], then: Flow) {
        *self.shared.trap.lock().unwrap() = Some(Trap { bytes: bytes.to_vec(), then });
    }

    /// Waits until the flow is `flow`.
    pub(crate) async fn becomes(&self, flow: Flow) {
        let mut watched = self.shared.flow.subscribe();
        watched.wait_for(|now| *now == flow).await.unwrap();
    }

    /// How many connections have been made so far.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    async fn carry(&self, client: TcpStream) {
        if *self.flow.borrow() == Flow::Cut {
            return;
        }
        let Ok(server) = TcpStream::connect(("127.0.0.1", self.target)).await else {
            return;
        };
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        let mut flow = self.flow.subscribe();
        tokio::select! {
            _ = flow.wait_for(|flow| *flow == Flow::Cut) => {}
            _ = async {
                tokio::join!(self.up(from_client, to_server), self.down(from_server, to_client))
            } => {}
        }
    }

    /// From the client to the server. Either end may close at will; that is not the relay's
    /// failure.
    async fn up(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut flow = self.flow.subscribe();
        let mut buffer = vec![0u8; 16 * 1024];
        let mut seen = Vec::new();
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            self.spring(&mut seen, &buffer[..read]);
            if !holds(&mut flow, Flow::reaches_server).await
                || to.write_all(&buffer[..read]).await.is_err()
            {
                return;
            }
        }
        let _ = to.shutdown().await;
    }

    /// Changes the flow when the trap's bytes end in `chunk`; `seen` holds what came before it, as
    /// far as that matters.
    fn spring(&self, seen: &mut Vec<u8>, chunk: &[u8]) {
        let mut trap = self.trap.lock().unwrap();
        let Some(Trap { bytes, then }) = trap.as_ref() else {
            return;
        };
        seen.extend_from_slice(chunk);
        if seen.windows(bytes.len()).any(|window| window == bytes) {
            self.flow.send_replace(*then);
            *trap = None;
            seen.clear();
        } else {
            let keep = seen.len().min(bytes.len() - 1);
            seen.drain(..seen.len() - keep);
        }
    }

    /// From the server to the client.
    async fn down(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut flow = self.flow.subscribe();
        let mut buffer = vec![0u8; 16 * 1024];
        loop {
            if !holds(&mut flow, Flow::reaches_client).await {
                return;
            }
            let trickling = *flow.borrow() == Flow::Trickle;
            let most = if trickling { 100 } else { buffer.len() };
            let Ok(read @ 1..) = from.read(&mut buffer[..most]).await else {
                break;
            };
            // What came after the flow was changed waits as well.
            if !holds(&mut flow, Flow::reaches_client).await
                || to.write_all(&buffer[..read]).await.is_err()
            {
                return;
            }
            if trickling {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(100)) => {}
                    _ = flow.wait_for(|flow| *flow == Flow::Open) => {}
                }
            }
        }
        let _ = to.shutdown().await;
    }
}

/// Waits until the flow is as `wanted`; false when the relay is no more.
async fn holds(flow: &mut watch::Receiver<Flow>, wanted: fn(Flow) -> bool) -> bool {
    flow.wait_for(|flow| wanted(*flow)).await.is_ok()
}
