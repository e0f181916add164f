//! What waits in memory between a pushing server and a free slot: bounded in messages and bytes.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::{Closed, Message, order};
use crate::job::Priority;

/// What a waiting message takes beside what arrived, in bytes: its own fields and its place here.
const OVERHEAD: usize = std::mem::size_of::<Message>() + 64;

/// A bounded queue of messages, some of which wait for their time.
#[derive(Debug)]
pub struct Buffer {
    limits: Limits,
    state: Mutex<State>,
    changed: Notify,
}

/// How much may wait.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Messages.
    pub messages: usize,
    /// Bytes of them.
    pub bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    /// By priority, the highest first.
    ready: [VecDeque<Message>; 3],
    picks: u32,
    /// Messages for another attempt, and when it is due.
    delayed: Vec<(Instant, Message)>,
    bytes: usize,
    closed: bool,
}

impl State {
    fn len(&self) -> usize {
        self.ready.iter().map(VecDeque::len).sum::<usize>() + self.delayed.len()
    }

    /// The next message that is due. Those that waited for another attempt come first: they are
    /// the oldest.
    fn pop(&mut self) -> Option<Message> {
        let message = match self.first_due() {
            Some(index) => Some(self.delayed.swap_remove(index).1),
            None => {
                self.picks = self.picks.wrapping_add(1);
                order(self.picks).into_iter().find_map(|level| self.ready[level].pop_front())
            }
        }?;
        self.bytes -= size(&message);
        Some(message)
    }

    fn first_due(&self) -> Option<usize> {
        let now = Instant::now();
        self.delayed.iter().position(|(at, _)| *at <= now)
    }

    fn has_due(&self) -> bool {
        self.ready.iter().any(|level| !level.is_empty()) || self.first_due().is_some()
    }

    /// When the first of the delayed messages will be due.
    fn next_due(&self) -> Option<Instant> {
        self.delayed.iter().map(|(at, _)| *at).min()
    }
}

impl Buffer {
    /// An empty buffer.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can leave the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a message at the end of its priority's queue once more. It was accepted before, so there
    /// is always room.
    ///
    /// # Errors
    /// The buffer is closed: the message itself.
    pub fn requeue(&self, message: Message) -> Result<(), Box<Message>> {
        let mut state = self.state();
        if state.closed {
            return Err(Box::new(message));
        }
        state.bytes += size(&message);
        let level = level(&message);
        state.ready[level].push_back(message);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Adds a message at the end of its priority's queue; hands it back where there is no room, or the buffer is closed.
    ///
    /// # Errors
    /// The message itself.
    pub fn push(&self, message: Message) -> Result<(), Box<Message>> {
        let mut state = self.state();
        let full =
            state.len() >= self.limits.messages || state.bytes + size(&message) > self.limits.bytes;
        if full || state.closed {
            return Err(Box::new(message));
        }
        state.bytes += size(&message);
        let level = level(&message);
        state.ready[level].push_back(message);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Puts a message back for another attempt `after` a while. It was accepted before, so there
    /// is always room.
    ///
    /// # Errors
    /// The buffer is closed.
    pub fn put_back(&self, message: Message, after: Duration) -> Result<(), Closed> {
        let mut state = self.state();
        if state.closed {
            return Err(Closed);
        }
        state.bytes += size(&message);
        state.delayed.push((Instant::now() + after, message));
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// The next message that is due. Cancel-safe. For one reader.
    pub async fn pop(&self) -> Message {
        loop {
            if let Some(message) = self.state().pop() {
                return message;
            }
            self.ready().await;
        }
    }

    /// Waits until there is a message that is due. Cancel-safe. For the one reader.
    pub async fn ready(&self) {
        loop {
            let next_due = {
                let state = self.state();
                if state.has_due() {
                    return;
                }
                state.next_due()
            };
            // One reader, and a notice that comes before it waits is kept for it.
            let changed = self.changed.notified();
            match next_due {
                None => changed.await,
                // Whichever comes first: both lead to another look.
                Some(due) => drop(tokio::time::timeout_at(due, changed).await),
            }
        }
    }

    /// How many messages wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state().len()
    }

    /// Whether no message waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether at least half of either limit is free.
    #[must_use]
    pub fn has_relaxed(&self) -> bool {
        let state = self.state();
        state.len() <= self.limits.messages / 2 && state.bytes <= self.limits.bytes / 2
    }

    /// Takes no more messages.
    pub fn close(&self) {
        self.state().closed = true;
    }

    /// Takes out all that wait, due or not, the oldest attempts first.
    #[must_use]
    pub fn drain(&self) -> Vec<Message> {
        let mut state = self.state();
        state.bytes = 0;
        let delayed = std::mem::take(&mut state.delayed).into_iter().map(|(_, message)| message);
        delayed.chain(std::mem::take(&mut state.ready).into_iter().flatten()).collect()
    }
}

/// Which of the queues a message waits in.
fn level(message: &Message) -> usize {
    let priority = message.priority.unwrap_or_default();
    Priority::ALL.iter().position(|p| *p == priority).unwrap_or(0)
}

fn size(message: &Message) -> usize {
    message.size + OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use futures::FutureExt;
    use std::time::SystemTime;

    fn message(payload: &'static str) -> Message {
        Message {
            payload: Bytes::from_static(payload.as_bytes()),
            headers: async_nats::HeaderMap::new(),
            subject: "functions.execute".to_owned(),
            id: crate::job::JobId::new(),
            size: payload.len(),
            reply: None,
            received_at: SystemTime::now(),
            received: std::time::Instant::now(),
            attempt: 1,
            sequence: None,
            delivery: None,
            priority: None,
            expires_at: None,
        }
    }

    fn popped(buffer: &Buffer) -> Option<Bytes> {
        buffer.pop().now_or_never().map(|m| m.payload)
    }

    #[tokio::test]
    async fn messages_and_bytes_are_bounded() {
        let buffer = Buffer::new(Limits { messages: 2, bytes: usize::MAX });
        assert!(buffer.push(message("a")).is_ok() && buffer.push(message("b")).is_ok());
        assert!(buffer.push(message("c")).is_err());
        assert!(buffer.ready().now_or_never().is_some());
        assert_eq!(popped(&buffer).as_deref(), Some(&b"a"[..]));
        assert!(buffer.push(message("c")).is_ok());

        let buffer = Buffer::new(Limits { messages: 9, bytes: 2 * OVERHEAD + 3 });
        assert!(buffer.push(message("abc")).is_ok());
        assert!(buffer.push(message("d")).is_err());
        assert!(buffer.push(message("")).is_ok());
        assert!(!buffer.has_relaxed());
        assert!(popped(&buffer).is_some() && buffer.has_relaxed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_put_back_comes_when_it_is_due_and_first() {
        let buffer = Buffer::new(Limits { messages: 9, bytes: 9000 });
        assert!(buffer.put_back(message("late"), Duration::from_secs(60)).is_ok());
        assert!(buffer.put_back(message("soon"), Duration::from_secs(1)).is_ok());
        assert_eq!(popped(&buffer), None);
        let begun = Instant::now();
        assert_eq!(&buffer.pop().await.payload[..], b"soon");
        assert_eq!(begun.elapsed().as_secs(), 1);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(buffer.push(message("new")).is_ok());
        assert_eq!(popped(&buffer).as_deref(), Some(&b"late"[..]));
        assert_eq!(popped(&buffer).as_deref(), Some(&b"new"[..]));
    }

    #[tokio::test]
    async fn higher_priorities_come_first_and_the_lowest_comes_too() {
        let buffer = Buffer::new(Limits { messages: 99, bytes: 99_000 });
        for (priority, payload) in [(Priority::Low, "low"), (Priority::High, "high")] {
            for _ in 0..32 {
                let message = Message { priority: Some(priority), ..message(payload) };
                assert!(buffer.push(message).is_ok());
            }
        }
        let order: Vec<_> = (0..16).filter_map(|_| popped(&buffer)).collect();
        assert_eq!(order.iter().filter(|payload| *payload == "low").count(), 1, "{order:?}");
        let moved = Message { priority: Some(Priority::High), ..message("moved") };
        assert!(buffer.requeue(moved).is_ok());
        assert_eq!(buffer.drain().len(), 49);
    }

    #[tokio::test]
    async fn a_closed_buffer_gives_back_everything() {
        let buffer = Buffer::new(Limits { messages: 9, bytes: 9000 });
        assert!(buffer.push(message("a")).is_ok());
        assert!(buffer.put_back(message("b"), Duration::from_secs(60)).is_ok());
        buffer.close();
        assert!(buffer.push(message("c")).is_err());
        assert_eq!(buffer.put_back(message("d"), Duration::ZERO), Err(Closed));
        let rest: Vec<_> = buffer.drain().into_iter().map(|m| m.payload).collect();
        assert_eq!(rest, ["b", "a"]);
        assert!(buffer.is_empty());
    }
}
