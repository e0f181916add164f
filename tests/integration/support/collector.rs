//! A collector of traces. It stands in for a real one, which fails when it likes and not when a test does:
//! what it is sent it reads with the types that are generated from OTLP's own definition.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use super::wait::eventually;

/// How it deals with what it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Takes it.
    Takes,
    /// Says that it is broken.
    Fails,
    /// Says nothing at all.
    Hangs,
}

/// A request to it.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) path: String,
    /// By their names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) request: ExportTraceServiceRequest,
}

pub(crate) struct Collector {
    pub(crate) url: String,
    received: Arc<Mutex<Vec<Received>>>,
    manner: Arc<Mutex<Manner>>,
    _task: AbortOnDropHandle<()>,
}

impl Collector {
    pub(crate) async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (received, manner) = (Arc::default(), Arc::new(Mutex::new(manner)));
        let (all, how) = (Arc::clone(&received), manner.clone());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&all), how.clone()));
            }
        });
        Self { url, received, manner, _task: AbortOnDropHandle::new(task) }
    }

    /// Deals otherwise with what comes from now on.
    pub(crate) fn set(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    /// Everything it was sent, whether it took that or not.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// The spans in it.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let all = self.received().into_iter().flat_map(|received| received.request.resource_spans);
        all.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }

    /// The attempts at a job, once there are so many, by their number.
    pub(crate) async fn attempts(&self, job: &str, count: usize) -> Vec<Attempt> {
        eventually(&format!("{count} attempts of {job} are with the collector"), || async {
            self.attempts_now(job).len() >= count
        })
        .await;
        let attempts = self.attempts_now(job);
        assert_eq!(attempts.len(), count);
        attempts
    }

    fn attempts_now(&self, job: &str) -> Vec<Attempt> {
        let all = self.spans();
        let of_job =
            |span: &&Span| text(&span.attributes, "worker_spawner.job.id").as_deref() == Some(job);
        let mut attempts: Vec<Attempt> = all
            .iter()
            .filter(of_job)
            .map(|whole| Attempt {
                whole: whole.clone(),
                stages: all
                    .iter()
                    .filter(|span| span.parent_span_id == whole.span_id)
                    .cloned()
                    .collect(),
            })
            .collect();
        attempts.sort_by_key(|attempt| attempt.get("worker_spawner.job.attempt"));
        attempts
    }
}

/// An attempt at a job: its span, and those below it.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) whole: Span,
    pub(crate) stages: Vec<Span>,
}

impl Attempt {
    pub(crate) fn get(&self, name: &str) -> Option<String> {
        text(&self.whole.attributes, name)
    }

    pub(crate) fn stage(&self, name: &str) -> &Span {
        self.stages.iter().find(|stage| stage.name == name).expect("there is such a stage")
    }

    /// The stages' names, which must be in order, one after the other and within the attempt.
    pub(crate) fn stages(&self) -> Vec<&str> {
        let mut at = self.whole.start_time_unix_nano;
        for stage in &self.stages {
            assert!(at <= stage.start_time_unix_nano, "{self:?}");
            assert!(stage.start_time_unix_nano <= stage.end_time_unix_nano, "{self:?}");
            assert_eq!(stage.trace_id, self.whole.trace_id);
            at = stage.end_time_unix_nano;
        }
        assert!(at <= self.whole.end_time_unix_nano, "{self:?}");
        self.stages.iter().map(|stage| stage.name.as_str()).collect()
    }
}

/// The value of an attribute, as text.
pub(crate) fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.clone() {
        Some(AnyValue { value: Some(any_value::Value::StringValue(text)) }) => Some(text),
        Some(AnyValue { value: Some(any_value::Value::IntValue(number)) }) => {
            Some(number.to_string())
        }
        other => panic!("{name}: {other:?}"),
    }
}

async fn serve(stream: TcpStream, all: Arc<Mutex<Vec<Received>>>, manner: Arc<Mutex<Manner>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.unwrap_or_default() == 0 {
                return;
            }
            match line.trim_end() {
                "" => break,
                line => head.push(line.to_owned()),
            }
        }
        let path = head[0].split(' ').nth(1).unwrap().to_owned();
        let headers = head[1..].iter().filter_map(|line| line.split_once(": "));
        let headers: BTreeMap<String, String> =
            headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        let mut body = vec![0; headers["content-length"].parse().unwrap()];
        if stream.read_exact(&mut body).await.is_err() {
            return;
        }
        let request = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
        all.lock().unwrap().push(Received { path, headers, request });
        let manner = *manner.lock().unwrap();
        let answer = match manner {
            Manner::Takes => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            Manner::Fails => "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
            Manner::Hangs => return std::future::pending().await,
        };
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}
