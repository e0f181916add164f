//! A job's record: where it is, and in the end what became of it. The value in the key-value
//! bucket and the event are the same JSON.

use std::time::SystemTime;

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::outcome::Wire;
use super::schema::Timestamp;
use super::time::rfc3339;
use crate::job::{JobError, JobId, PullProgress, Status};

/// The most bytes by which a record is longer than the outcome in it, as long as what it says of the
/// streams' order is short.
pub const ENDED_OVERHEAD: usize = 1024;

/// The fields an outcome does not have. All others of a record that ended are its outcome's.
const OWN_FIELDS: [&str; 12] = [
    "state",
    "pulling_at",
    "running_at",
    "updated_at",
    "retry_at",
    "cancel_requested_at",
    "pull",
    "sequence",
    "claim",
    "delivery",
    "interleaving",
    "handed_over",
];

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It waits.
    Queued,
    /// A worker has it, and makes its image available.
    Pulling,
    /// The function runs.
    Running,
    /// Its outcome is known, and is being published.
    Ending,
    /// Its outcome is published.
    Ended,
}

/// What is known of a job. What is not known is absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// The job's id.
    #[serde(with = "as_text")]
    #[schemars(with = "JobId")]
    pub id: JobId,
    /// Where it is.
    pub state: State,
    /// The image, as the request named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The attempt under way, or the last one, from 1. Zero where there was none: absent on the
    /// wire.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attempt: u32,
    /// The instance that has it, or had it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// When the request was received.
    #[serde(default, with = "as_time_if_known", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Timestamp>")]
    pub queued_at: Option<SystemTime>,
    /// When this attempt began to make the image available.
    #[serde(default, with = "as_time_if_known", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Timestamp>")]
    pub pulling_at: Option<SystemTime>,
    /// When this attempt's function started.
    #[serde(default, with = "as_time_if_known", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Timestamp>")]
    pub running_at: Option<SystemTime>,
    /// When this was written.
    #[serde(with = "as_time")]
    #[schemars(with = "Timestamp")]
    pub updated_at: SystemTime,
    /// When the next attempt is due.
    #[serde(default, with = "as_time_if_known", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Timestamp>")]
    pub retry_at: Option<SystemTime>,
    /// When somebody asked for it to be cancelled.
    #[serde(default, with = "as_time_if_known", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Timestamp>")]
    pub cancel_requested_at: Option<SystemTime>,
    /// How far the pull is that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull: Option<PullProgress>,
    /// The request's sequence number in its stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// What tells this holder of the job from any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    /// Which delivery of the request its holder has: of two holders, the one with the later delivery
    /// is right. When the consumer was made, in microseconds since 1970, and the consumer's count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivery: Option<(u64, u64)>,
    /// How many of the attempts ended because their worker was told to stop: they do not count towards
    /// the most there may be.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub handed_over: u32,
    /// The order of the two output streams, as [`crate::capture::Captured::order`] has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interleaving: Vec<u32>,
    /// What became of the job: the outcome's fields, but for those that this has itself.
    #[serde(flatten, deserialize_with = "outcome_fields")]
    #[schemars(with = "Option<Wire<'static>>")]
    pub outcome: Option<Map<String, Value>>,
}

/// Why bytes are no record.
#[derive(Debug, thiserror::Error)]
#[error("no record of a job: {0}")]
pub struct RecordError(#[from] serde_json::Error);

impl Record {
    /// A record of which nothing more is known.
    #[must_use]
    pub fn new(id: JobId, state: State, now: SystemTime) -> Self {
        Self {
            id,
            state,
            image: None,
            attempt: 0,
            worker: None,
            queued_at: None,
            pulling_at: None,
            running_at: None,
            updated_at: now,
            retry_at: None,
            cancel_requested_at: None,
            pull: None,
            sequence: None,
            claim: None,
            delivery: None,
            handed_over: 0,
            interleaving: Vec::new(),
            outcome: None,
        }
    }

    /// The record of a job that ended with this outcome, as [`super::outcome::json`] encodes it.
    ///
    /// # Errors
    /// The JSON is no outcome.
    pub fn ended(
        outcome_json: &[u8],
        sequence: Option<u64>,
        now: SystemTime,
    ) -> Result<Self, RecordError> {
        let mut fields: Map<String, Value> = serde_json::from_slice(outcome_json)?;
        for name in OWN_FIELDS {
            fields.remove(name);
        }
        fields.insert("state".to_owned(), "ended".into());
        fields.insert("updated_at".to_owned(), rfc3339(now).into());
        let record: Self = serde_json::from_value(Value::Object(fields))?;
        if record.outcome.is_none() {
            let missing = serde::de::Error::missing_field("status");
            return Err(RecordError(missing));
        }
        Ok(Self { sequence, ..record })
    }

    /// The JSON of it.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        // Text and numbers under names that are text: there is nothing that could be no JSON.
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    /// Reads it back. Fields that are not known are a later version's, and no error.
    ///
    /// # Errors
    /// It is no record.
    pub fn decode(json: &[u8]) -> Result<Self, RecordError> {
        Ok(serde_json::from_slice(json)?)
    }

    /// What became of the job, where that is known.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        self.outcome.as_ref()?.get("status")?.as_str()?.parse().ok()
    }

    /// Why the job did not succeed, where that is known.
    #[must_use]
    pub fn error(&self) -> Option<JobError> {
        let error = self.outcome.as_ref()?.get("error")?;
        let text = |name: &str| error.get(name).and_then(Value::as_str);
        let code = text("code")?.to_owned().into();
        Some(JobError { code, message: text("message").unwrap_or_default().to_owned() })
    }

    /// The outcome without what a record adds to it, where the job has ended.
    #[must_use]
    pub fn outcome_json(&self) -> Option<Bytes> {
        self.outcome.as_ref()?;
        let Ok(Value::Object(mut fields)) = serde_json::to_value(self) else { return None };
        for name in OWN_FIELDS {
            fields.remove(name);
        }
        Some(serde_json::to_vec(&fields).ok()?.into())
    }
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// The fields that are left over. They are an outcome only with the one field every outcome has.
fn outcome_fields<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Map<String, Value>>, D::Error> {
    let fields = Map::deserialize(deserializer)?;
    Ok(fields.contains_key("status").then_some(fields))
}

/// A job's id as a string.
mod as_text {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    use crate::job::JobId;

    pub(super) fn serialize<S: Serializer>(id: &JobId, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(id.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<JobId, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// A point in time as RFC 3339.
mod as_time {
    use std::time::SystemTime;

    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    use crate::protocol::time::{parse_rfc3339, rfc3339};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&rfc3339(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(d)?;
        parse_rfc3339(&text).ok_or_else(|| D::Error::custom("a time is not of RFC 3339"))
    }
}

/// A point in time, or none.
mod as_time_if_known {
    use std::time::SystemTime;

    use serde::de::{Deserialize, Deserializer};
    use serde::ser::Serializer;

    use super::as_time;

    pub(super) fn serialize<S: Serializer>(
        time: &Option<SystemTime>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => as_time::serialize(time, s),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        #[derive(serde::Deserialize)]
        struct Time(#[serde(with = "as_time")] SystemTime);
        Ok(Option::<Time>::deserialize(d)?.map(|Time(time)| time))
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
