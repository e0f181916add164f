//! The way to the collector.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
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
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// The longest answer that is read, in bytes. It says nothing, or which spans were bad.
const MAX_ANSWER: usize = 64 << 10;

/// What the collector said, or its connection, where it last took no spans: the exporter's own error
/// does not say.
#[derive(Clone, Debug, Default)]
pub(super) struct Complaint(Arc<Mutex<String>>);

impl Complaint {
    fn note(&self, why: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub(super) fn last(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What takes spans to the collector, and why it did not.
///
/// # Errors
/// See [`super::Spans::start`].
pub(super) fn exporter(traces: &Traces) -> anyhow::Result<(SpanExporter, Complaint)> {
    let complaint = Complaint::default();
    let collector = Collector {
        http: Client::builder(TokioExecutor::new()).build(connector(&traces.endpoint)?),
        complaint: complaint.clone(),
    };
    // The exporter decodes them as it does those of its own variable, and they are decoded already.
    let encoded = |value: &str| value.replace('%', "%25");
    let headers = traces.headers.iter();
    let headers = headers.map(|(name, value)| (name.clone(), encoded(value.expose())));
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(collector)
        .with_endpoint(format!("{}/v1/traces", traces.endpoint))
        .with_protocol(Protocol::HttpBinary)
        .with_timeout(PATIENCE)
        .with_headers(headers.collect())
        .build()
        .context("traces cannot be exported")?;
    Ok((exporter, complaint))
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

/// The collector.
#[derive(Debug)]
struct Collector {
    http: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    complaint: Complaint,
}

impl Collector {
    async fn post(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = self.http.request(request.map(Full::new)).await?.into_parts();
        let body = match Limited::new(body, MAX_ANSWER).collect().await {
            Ok(body) => body.to_bytes(),
            // It has the spans, whatever else it had to say.
            Err(_) if head.status.is_success() => Bytes::new(),
            Err(error) => return Err(error),
        };
        Ok(Response::from_parts(head, body))
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        self.complaint.note("it does not answer".to_owned());
        let answer = self.post(request).await;
        match &answer {
            Err(error) => self.complaint.note(chain(error.as_ref())),
            Ok(answer) => self.complaint.note(format!("it answers {}", answer.status())),
        }
        answer
    }
}

/// An error and what caused it, in a line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
