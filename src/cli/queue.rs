//! What waits in the stream of requests, as clients are told.

use anyhow::{anyhow, bail};
use serde::Deserialize;
use serde_json::json;

use super::client::Link;
use crate::job::Priority;
use crate::protocol::Subjects;

/// How many requests of a kind there are, by the places of [`Priority::ALL`].
type Counts = [u64; Priority::ALL.len()];

/// The requests that the stream keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Queue {
    /// All of them.
    held: Counts,
    /// Of all those that were never delivered.
    pub(super) waiting: u64,
    /// Those that were: a worker has them, or has given them back.
    pub(super) taken: u64,
}

/// What the server says of the stream's consumers: of each what matters here.
#[derive(Deserialize)]
struct Consumers {
    consumers: Option<Vec<Consumer>>,
}

#[derive(Deserialize)]
struct Consumer {
    config: Filter,
    num_pending: u64,
    num_ack_pending: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Filter {
    filter_subject: String,
}

/// Asks the server.
///
/// # Errors
/// There is no queue, this user may not ask, or nobody answers.
pub(super) async fn look(link: &Link) -> anyhow::Result<Queue> {
    let subject = format!("CONSUMER.LIST.{}", link.names.queue);
    let question = json!({"offset": 0});
    let answer: Consumers = tokio::select! {
        answer = link.jetstream.request(subject.clone(), &question) => answer?,
        complaint = link.news.refused(&subject) => bail!("{complaint}"),
    };
    let consumers = answer.consumers.ok_or_else(|| anyhow!("there is no {}", link.names.queue))?;
    Ok(Queue::of(&consumers, &link.subjects))
}

impl Queue {
    fn of(consumers: &[Consumer], subjects: &Subjects) -> Self {
        let mut queue = Self::default();
        for consumer in consumers {
            queue.waiting += consumer.num_pending;
            queue.taken += consumer.num_ack_pending;
            for (held, priority) in queue.held.iter_mut().zip(Priority::ALL) {
                if consumer.config.filter_subject == subjects.execute_at(priority) {
                    *held += consumer.num_pending + consumer.num_ack_pending;
                }
            }
        }
        queue
    }

    /// How many there are in all.
    pub(super) fn held(&self) -> u64 {
        self.waiting + self.taken
    }

    /// How many of each priority there are, for people.
    pub(super) fn by_priority(&self) -> String {
        let each = self.held.iter().zip(Priority::ALL);
        let each = each.map(|(held, priority)| format!("{priority} {held}"));
        each.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_priority_is_counted_for_itself() {
        let consumer = |subject: &str, pending: u64, taken: u64| {
            json!({
                "name": "c", "config": {"filter_subject": subject, "ack_policy": "explicit"},
                "num_pending": pending, "num_ack_pending": taken,
            })
        };
        let answer = json!({"total": 3, "consumers": [
            consumer("team.x.execute", 940, 3),
            consumer("team.x.execute.low", 7, 1),
            consumer("team.x.execute.high", 0, 0),
        ]});
        let answer: Consumers = serde_json::from_value(answer).unwrap();
        let queue = Queue::of(&answer.consumers.unwrap(), &Subjects::new("team.x"));
        assert_eq!((queue.waiting, queue.taken, queue.held()), (947, 4, 951));
        assert_eq!(queue.by_priority(), "high 0, normal 943, low 8");
    }
}
