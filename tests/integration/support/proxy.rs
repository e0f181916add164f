//! A TCP relay that can hold back what it carries, to make a server slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What passes towards the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    /// Everything.
    Open,
    /// About a kilobyte a second.
    Trickle,
    /// Nothing.
    Shut,
}

/// A relay on a loopback port of its own to another one.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    flow: watch::Sender<Flow>,
    connections: Arc<AtomicUsize>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(target: u16, flow: Flow) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (flow, watched) = watch::channel(flow);
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            let mut relays = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                relays.spawn(relay(client, target, watched.clone()));
            }
        });
        Self { port, flow, connections, accepting }
    }

    pub(crate) fn set(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }

    /// How many connections have been made so far.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn relay(client: TcpStream, target: u16, mut flow: watch::Receiver<Flow>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else {
        return;
    };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let upwards = async {
        // Either end may close at will; that is not this relay's failure.
        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
        let _ = to_server.shutdown().await;
    };
    let downwards = async {
        let mut buffer = vec![0u8; 16 * 1024];
        loop {
            if flow.wait_for(|flow| *flow != Flow::Shut).await.is_err() {
                return;
            }
            let trickling = *flow.borrow() == Flow::Trickle;
            let most = if trickling { 100 } else { buffer.len() };
            match from_server.read(&mut buffer[..most]).await {
                Ok(0) | Err(_) => break,
                Ok(read) => {
                    if to_client.write_all(&buffer[..read]).await.is_err() {
                        break;
                    }
                }
            }
            if trickling {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(100)) => {}
                    _ = flow.wait_for(|flow| *flow == Flow::Open) => {}
                }
            }
        }
        let _ = to_client.shutdown().await;
    };
    tokio::join!(upwards, downwards);
}
