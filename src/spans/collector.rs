//! The way to the collector.

use std::error::Error;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};

use crate::config::Traces;

/// How long the collector may take to answer, and how long a batch is tried again.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest answer that is read, in bytes. It says nothing, or which spans were bad.
const MAX_ANSWER: usize = 64 << 10;

/// What takes spans to the collector.
///
/// # Errors
/// See [`super::Spans::start`].
pub(super) fn exporter(traces: &Traces) -> anyhow::Result<SpanExporter> {
    let collector = Collector {
        http: Client::builder(TokioExecutor::new()).build(connector(&traces.endpoint)?),
        is_failing: AtomicBool::new(false),
    };
    let headers = traces.headers.iter();
    let headers = headers.map(|(name, value)| (name.clone(), value.expose().to_owned()));
    SpanExporter::builder()
        .with_http()
        .with_http_client(collector)
        .with_endpoint(format!("{}/v1/traces", traces.endpoint))
        .with_protocol(Protocol::HttpBinary)
        .with_timeout(PATIENCE)
        .with_headers(headers.collect())
        .build()
        .context("traces cannot be exported")
}

/// Connections with TLS where the address asks for it, to whom the system's authorities vouch for.
fn connector(endpoint: &str) -> anyhow::Result<HttpsConnector<HttpConnector>> {
    let builder = HttpsConnectorBuilder::new();
    let builder = if endpoint.starts_with("https:") {
        let known = builder.with_native_roots();
        known.context("OTEL_EXPORTER_OTLP_ENDPOINT asks for TLS, and this system has no certificate authorities")?
    } else {
        let nobody = rustls::ClientConfig::builder()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        builder.with_tls_config(nobody)
    };
    Ok(builder.https_or_http().enable_http1().build())
}

/// The collector. That it fails is said when it begins, and when it is over.
#[derive(Debug)]
struct Collector {
    http: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    is_failing: AtomicBool,
}

impl Collector {
    async fn post(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = self.http.request(request.map(Full::new)).await?.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    }

    fn failed(&self, why: impl Display) {
        if !self.is_failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(%why, "the collector does not take spans; they are dropped until it does");
        }
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = tokio::time::timeout(PATIENCE, self.post(request)).await;
        let answer = answer.unwrap_or_else(|_| Err("it does not answer".into()));
        match &answer {
            Err(error) => self.failed(chain(error.as_ref())),
            Ok(answer) if !answer.status().is_success() => {
                self.failed(format_args!("it answers {}", answer.status()));
            }
            Ok(_) => {
                if self.is_failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("the collector takes spans again");
                }
            }
        }
        answer
    }
}

/// An error and what caused it, in a line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
