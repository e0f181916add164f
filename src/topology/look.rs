//! A look at what is there, which makes nothing.

use async_nats::jetstream::context::{GetStreamErrorKind, RequestErrorKind};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::State;
use async_nats::jetstream::{Context, ErrorCode, consumer, stream};

use super::difference::{Fault, Field, consumer_differences, differences};
use super::make::refused;
use super::{SetupError, Topology};

/// What is there of a topology.
#[derive(Clone, Debug, Default)]
pub struct Sight {
    /// The streams there are.
    pub present: Vec<Present>,
    /// The streams that a daemon would make, and the bytes each would reserve; zero for no bound.
    pub missing: Vec<(String, u64)>,
    /// What is there and not as wanted.
    pub faults: Vec<Fault>,
}

/// A stream that is there.
#[derive(Clone, Debug)]
pub struct Present {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub state: State,
    /// The most bytes that it holds; none where it has no such bound.
    pub max_bytes: Option<u64>,
}

impl Topology {
    /// Looks at what is there. Makes and changes nothing.
    ///
    /// # Errors
    /// JetStream does not say.
    pub async fn look(&self, jetstream: &Context) -> Result<Sight, SetupError> {
        let mut sight = Sight::default();
        for (wanted, fields) in &self.streams {
            self.look_at_stream(jetstream, wanted, fields, &mut sight).await?;
        }
        Ok(sight)
    }

    async fn look_at_stream(
        &self,
        jetstream: &Context,
        wanted: &stream::Config,
        fields: &[Field],
        sight: &mut Sight,
    ) -> Result<(), SetupError> {
        let name = &wanted.name;
        let info = match jetstream.get_stream(name).await {
            Ok(stream) => stream.cached_info().clone(),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(e)
                    if e.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    let bytes = u64::try_from(wanted.max_bytes).unwrap_or_default();
                    sight.missing.push((name.clone(), bytes * wanted.num_replicas as u64));
                    return Ok(());
                }
                GetStreamErrorKind::JetStream(e) => {
                    let what = format!("show the stream {name}");
                    return Err(refused(&what, e.code(), e.error_code(), &e));
                }
                _ => {
                    let why = format!("what the stream {name} is: {error}");
                    return Err(SetupError::Unavailable(why));
                }
            },
        };
        sight.faults.extend(differences(&info.config, wanted, fields));
        let mut ours = 0;
        for (_, wanted) in self.consumers.iter().filter(|(stream, _)| stream == name) {
            let consumer = wanted.durable_name.as_deref().unwrap_or_default();
            if let Some(found) = find_consumer(jetstream, name, consumer).await? {
                ours += 1;
                sight.faults.extend(consumer_differences(name, &found, wanted));
            }
        }
        if *name == self.names.queue && info.state.consumer_count > ours {
            let ours = self.names.consumer(crate::job::Priority::Normal);
            sight.faults.push(Fault {
                what: format!("stream {name}: it has consumers of other names than {ours}"),
                remedy: "instances on one SUBJECT_PREFIX share one QUEUE_GROUP: set it to the others', or delete the other consumers".to_owned(),
            });
        }
        sight.present.push(Present {
            name: name.clone(),
            state: info.state,
            max_bytes: u64::try_from(info.config.max_bytes).ok().filter(|bytes| *bytes > 0),
        });
        Ok(())
    }
}

/// The configuration of a consumer, where there is one.
async fn find_consumer(
    jetstream: &Context,
    stream: &str,
    name: &str,
) -> Result<Option<consumer::Config>, SetupError> {
    let subject = format!("CONSUMER.INFO.{stream}.{name}");
    let answer: Result<Response<consumer::Info>, _> =
        jetstream.request(subject, &serde_json::json!({})).await;
    match answer {
        Ok(Response::Ok(info)) => Ok(Some(info.config)),
        Ok(Response::Err { error }) if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => {
            Ok(None)
        }
        Ok(Response::Err { error }) => {
            let what = format!("show the consumer {name} of {stream}");
            Err(refused(&what, error.code(), error.error_code(), &error))
        }
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            Err(SetupError::Absent(error.to_string()))
        }
        Err(error) => Err(SetupError::Unavailable(format!("what the consumer {name} is: {error}"))),
    }
}
