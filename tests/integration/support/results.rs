//! Everything published on a subject, kept.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::{Client, Message};
use futures::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::nats::round_trip;
use super::wait::{PATIENCE, within};

/// A subscriber that forgets nothing.
pub(crate) struct Results {
    received: Arc<Mutex<Vec<Message>>>,
    count: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Results {
    /// Subscribes, and returns once the server knows.
    pub(crate) async fn subscribe(client: &Client, subject: &str) -> Self {
        let mut subscription = client.subscribe(subject.to_string()).await.unwrap();
        round_trip(client).await;
        let received = Arc::new(Mutex::new(Vec::new()));
        let (sender, count) = watch::channel(0);
        let kept = Arc::clone(&received);
        let task = tokio::spawn(async move {
            while let Some(message) = subscription.next().await {
                let total = {
                    let mut kept = kept.lock().unwrap();
                    kept.push(message);
                    kept.len()
                };
                sender.send_replace(total);
            }
        });
        Self { received, count, task }
    }

    /// All messages about the job `id` so far.
    pub(crate) fn of(&self, id: &str) -> Vec<Message> {
        let received = self.received.lock().unwrap();
        received
            .iter()
            .filter(|message| header(message, "Job-Id").as_deref() == Some(id))
            .cloned()
            .collect()
    }

    /// All messages so far.
    pub(crate) fn all(&self) -> Vec<Message> {
        self.received.lock().unwrap().clone()
    }

    /// Waits for the first message about the job `id`.
    pub(crate) async fn wait_for(&self, id: &str) -> Message {
        let mut count = self.count.clone();
        within(&format!("a result of {id}"), PATIENCE, async {
            loop {
                count.borrow_and_update();
                if let Some(message) = self.of(id).into_iter().next() {
                    return message;
                }
                count.changed().await.unwrap();
            }
        })
        .await
    }

    /// Waits until `wanted` messages have come.
    pub(crate) async fn wait_for_count(&self, wanted: usize, patience: Duration) {
        let mut count = self.count.clone();
        let waited = tokio::time::timeout(patience, count.wait_for(|count| *count >= wanted)).await;
        let arrived = *self.count.borrow();
        assert!(waited.is_ok(), "{arrived} of {wanted} messages arrived within {patience:?}");
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The value of `message`'s header `name`.
pub(crate) fn header(message: &Message, name: &str) -> Option<String> {
    message.headers.as_ref()?.get(name).map(|value| value.as_str().to_string())
}
