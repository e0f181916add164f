//! What is answered to requests to cancel a job.

use bytes::Bytes;
use serde_json::json;

use crate::job::JobId;

/// What becomes of a job that is to be cancelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It runs, here or elsewhere, and is being stopped.
    Stopping,
    /// It does not run, and will not.
    WillNotStart,
    /// It had ended already, with this status.
    AlreadyEnded(String),
}

/// What is answered of this job.
#[must_use]
pub fn answer(id: &JobId, answer: &Answer) -> Bytes {
    let id = id.as_str();
    let reply = match answer {
        Answer::Stopping => json!({"id": id, "result": "stopping"}),
        Answer::WillNotStart => json!({"id": id, "result": "will_not_start"}),
        Answer::AlreadyEnded(status) => {
            json!({"id": id, "result": "already_ended", "status": status})
        }
    };
    reply.to_string().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::Value;

    use super::*;

    #[test]
    fn answers_say_what_becomes_of_the_job() {
        let id: JobId = "job-1".parse().unwrap();
        for (given, wanted) in [
            (Answer::Stopping, json!({"id": "job-1", "result": "stopping"})),
            (Answer::WillNotStart, json!({"id": "job-1", "result": "will_not_start"})),
            (
                Answer::AlreadyEnded("failed".to_owned()),
                json!({"id": "job-1", "result": "already_ended", "status": "failed"}),
            ),
        ] {
            let encoded: Value = serde_json::from_slice(&answer(&id, &given)).unwrap();
            assert_eq!(encoded, wanted);
        }
    }
}
