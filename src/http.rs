//! The HTTP listener for those who watch the daemon: whether it lives, whether it is ready, and what it
//! counts. Nothing can be changed through it.
//!
//! It asks nobody who they are, so that everything about a connection is bounded: how many there are,
//! how long each may last, and how much is read of it. Each serves one request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// How many connections are served at once; others wait to be accepted.
const CONNECTIONS: usize = 64;
/// How long a connection may last, from its acceptance to its end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of a request is read, in bytes.
const MAX_REQUEST: usize = 16 << 10;
/// How long to wait when no connection can be accepted, for want of file descriptors, say.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

const PLAIN: &str = "text/plain; charset=utf-8";

/// An address that is listened on.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    /// The address, with the port that was found where any was asked for.
    pub addr: SocketAddr,
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("HTTP_ADDR: cannot listen on {addr}: {error}")]
pub struct BindError {
    addr: SocketAddr,
    error: io::Error,
}

/// Says why something is not so, in sentences; nothing where it is.
type Probe = Box<dyn Fn() -> Vec<&'static str> + Send + Sync>;

/// Where the answers come from. None of it may wait.
pub struct Answers {
    /// Why the daemon does not work.
    pub alive: Probe,
    /// Why it takes no requests, or cannot run them.
    pub ready: Probe,
    /// What it counts, and the type of that text; in OpenMetrics, if told so.
    pub metrics: Box<dyn Fn(bool) -> (&'static str, String) + Send + Sync>,
}

impl Listener {
    /// Listens on this address; a port of 0 stands for any that is free.
    ///
    /// # Errors
    /// The address is in use, not this machine's, or not for this user.
    pub async fn bind(addr: SocketAddr) -> Result<Self, BindError> {
        let bind = async {
            let listener = TcpListener::bind(addr).await?;
            let addr = listener.local_addr()?;
            Ok(Self { listener, addr })
        };
        bind.await.map_err(|error| BindError { addr, error })
    }

    /// Answers for ever.
    pub async fn serve(self, answers: Answers) {
        let router = router(answers);
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        // The semaphore is never closed.
        while let Ok(place) = places.clone().acquire_owned().await {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let router = router.clone();
                    tokio::spawn(async move {
                        // Whoever is too slow for the answer goes without.
                        let _ = tokio::time::timeout(PATIENCE, answer(stream, router)).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "could not accept an HTTP connection");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
}

/// Answers the one request of a connection.
async fn answer(stream: TcpStream, router: Router) {
    let connection = http1::Builder::new()
        .keep_alive(false)
        // The connection as a whole has its time.
        .header_read_timeout(None)
        .max_buf_size(MAX_REQUEST)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // What cannot be read, or not be written, is the other side's affair.
    if let Err(error) = connection.await {
        tracing::debug!(%error, "an HTTP connection broke");
    }
}

/// Other methods than GET and HEAD get 405, other paths 404.
fn router(answers: Answers) -> Router {
    let Answers { alive, ready, metrics } = answers;
    let (alive, ready, metrics) = (Arc::new(alive), Arc::new(ready), Arc::new(metrics));
    Router::new()
        .route("/healthz", get(move || async move { verdict(&alive()) }))
        .route("/readyz", get(move || async move { verdict(&ready()) }))
        .route(
            "/metrics",
            get(move |headers: HeaderMap| async move {
                let (content_type, text) = metrics(prefers_open_metrics(&headers));
                ([(CONTENT_TYPE, content_type), (CACHE_CONTROL, "no-store")], text).into_response()
            }),
        )
}

fn verdict(reasons: &[&'static str]) -> Response {
    let (status, text) = match reasons {
        [] => (StatusCode::OK, "ok\n".to_owned()),
        reasons => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n"),
    };
    (status, [(CONTENT_TYPE, PLAIN), (CACHE_CONTROL, "no-store")], text).into_response()
}

/// Whether OpenMetrics is welcome: always, but to those who name the older format and not this one.
fn prefers_open_metrics(headers: &HeaderMap) -> bool {
    let accepted: Vec<_> =
        headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let accepted = accepted.join(",").to_ascii_lowercase();
    accepted.contains("application/openmetrics-text") || !accepted.contains("text/plain")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn the_older_format_is_for_those_who_ask_for_it_alone() {
        for (accept, expected) in [
            (None, true),
            (Some("*/*"), true),
            (Some("text/plain"), false),
            (Some("text/plain;version=0.0.4;q=1,*/*;q=0.1"), false),
            (Some("application/openmetrics-text;version=1.0.0,text/plain;q=0.5"), true),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(ACCEPT, HeaderValue::from_static(accept));
            }
            assert_eq!(prefers_open_metrics(&headers), expected, "{accept:?}");
        }
    }

    #[tokio::test]
    async fn every_reason_is_a_line() {
        assert_eq!(verdict(&[]).status(), StatusCode::OK);
        assert_eq!(verdict(&["one", "two"]).status(), StatusCode::SERVICE_UNAVAILABLE);
        let body = axum::body::to_bytes(verdict(&["one", "two"]).into_body(), 99).await;
        assert_eq!(body.unwrap_or_default(), "one\ntwo\n");
    }
}
