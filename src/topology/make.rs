//! Making what is missing. What is there is never changed.

use std::fmt::Display;

use async_nats::jetstream::consumer::{self, pull};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind, RequestErrorKind};
use async_nats::jetstream::{self, Context, ErrorCode, stream};

use super::SetupError;
use super::difference::Field;

/// Whether the account has JetStream.
pub(super) async fn account(jetstream: &Context) -> Result<(), SetupError> {
    /// Of the answer nothing else counts; older servers leave fields out that the client library
    /// would insist on.
    #[derive(serde::Deserialize)]
    struct Answer {
        error: Option<ApiError>,
    }
    #[derive(serde::Deserialize)]
    struct ApiError {
        code: usize,
        err_code: u64,
        #[serde(default)]
        description: String,
    }
    match jetstream.request("INFO", &serde_json::json!({})).await {
        Ok(Answer { error: None }) => Ok(()),
        Ok(Answer { error: Some(ApiError { code, err_code, description }) }) => {
            let absent = [
                ErrorCode::JETSTREAM_NOT_ENABLED.0,
                ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT.0,
            ];
            Err(if absent.contains(&err_code) {
                SetupError::Absent(description)
            } else {
                SetupError::Unavailable(format!("{description} ({code})"))
            })
        }
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            Err(SetupError::Absent("nobody answers".to_owned()))
        }
        Err(error) => Err(SetupError::Unavailable(error.to_string())),
    }
}

/// The server's answer to a request it would not fulfil.
pub(super) fn refused(
    what: &str,
    status: usize,
    code: ErrorCode,
    error: &dyn Display,
) -> SetupError {
    match code {
        ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
            SetupError::Absent(error.to_string())
        }
        // 503: a cluster without a leader, a server that is about to stop.
        _ if status == 503 && code != ErrorCode::INSUFFICIENT_RESOURCES => {
            SetupError::Unavailable(format!("cannot {what}: {error}"))
        }
        _ => SetupError::Unfit(format!("JetStream does not {what}: {error}")),
    }
}

/// The stream's configuration where it was there already.
pub(super) async fn ensure_stream(
    jetstream: &Context,
    wanted: &stream::Config,
    fields: &[Field],
) -> Result<Option<stream::Config>, SetupError> {
    for last in [false, true] {
        match jetstream.get_stream(&wanted.name).await {
            Ok(stream) => return Ok(Some(stream.cached_info().config.clone())),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(e)
                    if e.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
                GetStreamErrorKind::JetStream(e) => {
                    return Err(refused(
                        &format!("show the stream {}", wanted.name),
                        e.code(),
                        e.error_code(),
                        &e,
                    ));
                }
                _ => return Err(SetupError::Unavailable(error.to_string())),
            },
        }
        match jetstream.create_stream(wanted.clone()).await {
            Ok(_) => {
                tracing::info!(stream = wanted.name, "created the stream");
                return Ok(None);
            }
            Err(error) => match error.kind() {
                // Another instance was faster; what it made is looked at.
                CreateStreamErrorKind::JetStream(e)
                    if e.error_code() == ErrorCode::STREAM_NAME_EXIST && !last => {}
                CreateStreamErrorKind::JetStream(e) => {
                    let bytes = fields.iter().find(|field| field.name == "max_bytes");
                    let bytes = bytes.map_or("its bytes", |field| field.setting);
                    let what = format!(
                        "create the stream {} with STREAM_REPLICAS={} and {bytes}={}",
                        wanted.name, wanted.num_replicas, wanted.max_bytes
                    );
                    return Err(refused(&what, e.code(), e.error_code(), &e));
                }
                _ => return Err(SetupError::Unavailable(error.to_string())),
            },
        }
    }
    Err(SetupError::Unavailable(format!("the stream {} comes and goes", wanted.name)))
}

/// The consumer's configuration where it was there already.
pub(super) async fn ensure_consumer(
    jetstream: &Context,
    stream: &str,
    wanted: &pull::Config,
) -> Result<Option<consumer::Config>, SetupError> {
    let name = wanted.durable_name.as_deref().unwrap_or_default();
    // No message of its own: creating a consumer that is there would change it on older servers.
    let subject = format!("CONSUMER.INFO.{stream}.{name}");
    let answer: Result<jetstream::response::Response<consumer::Info>, _> =
        jetstream.request(subject, &serde_json::json!({})).await;
    match answer {
        Ok(jetstream::response::Response::Ok(info)) => return Ok(Some(info.config)),
        Ok(jetstream::response::Response::Err { error })
            if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => {}
        Ok(jetstream::response::Response::Err { error }) => {
            return Err(refused(
                &format!("show the consumer {name} of {stream}"),
                error.code(),
                error.error_code(),
                &error,
            ));
        }
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            return Err(SetupError::Absent(error.to_string()));
        }
        Err(error) => return Err(SetupError::Unavailable(error.to_string())),
    }
    match jetstream.create_consumer_on_stream(wanted.clone(), stream).await {
        Ok(_) => Ok(None),
        Err(error) => Err(match error.kind() {
            jetstream::stream::ConsumerErrorKind::JetStream(e)
                if e.error_code() == ErrorCode::CONSUMER_WQ_CONSUMER_NOT_UNIQUE =>
            {
                SetupError::Unfit(format!(
                    "the stream {stream} has a consumer of another name than {name} already: instances on one SUBJECT_PREFIX share one QUEUE_GROUP; set it to that name, or delete the other consumer"
                ))
            }
            jetstream::stream::ConsumerErrorKind::JetStream(e) => refused(
                &format!("create the consumer {name} of {stream}"),
                e.code(),
                e.error_code(),
                &e,
            ),
            _ => SetupError::Unavailable(error.to_string()),
        }),
    }
}
