//! What a function prints, published while it runs.
//!
//! The function never waits for it: what cannot be published in time is dropped and counted. Bytes
//! are copied into a queue that is bounded by them, and a task of its own takes them out again as
//! chunks that are worth a message each.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::capture::Stream;

/// The least time between two chunks, unless there is much to publish: a function that prints
/// byte by byte must not cost a message a byte.
const REST: Duration = Duration::from_millis(10);

/// The most bytes of a character that can be there without the character being complete.
const MAX_INCOMPLETE: usize = 3;

/// A part of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its number in the stream, from 1.
    pub seq: u64,
    /// Bytes of the stream before it, also those that were dropped.
    pub offset: u64,
    /// The bytes. Text is not cut within a character.
    pub bytes: Bytes,
    /// Set on the last chunk of a stream, which has no bytes.
    pub end: Option<End>,
}

/// The end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Bytes of the stream that were dropped.
    pub dropped: u64,
}

/// The live output of one function.
///
/// Dropped without [`LiveLog::finish`], it ends without a word.
#[derive(Debug)]
pub struct LiveLog {
    shared: Arc<Shared>,
    finish: oneshot::Sender<Duration>,
    task: JoinHandle<bool>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Notify,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LiveLog {
    /// Begins to publish by `publish`, one chunk at a time.
    ///
    /// At most `limit` bytes are held, those on their way included. A chunk has at most `max_chunk`
    /// bytes, or four where that is less: a character may need them.
    pub fn start<P>(publish: P, limit: usize, max_chunk: usize) -> Self
    where
        P: Fn(Stream, Chunk) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    {
        let queue = Mutex::new(Queue::new(limit, max_chunk));
        let shared = Arc::new(Shared { queue, wake: Notify::new() });
        let (finish, finished) = oneshot::channel();
        let pump = pump(publish, shared.clone());
        let task = tokio::spawn(async move {
            let end_of_patience = async {
                if let Ok(patience) = finished.await {
                    tokio::time::sleep(patience).await;
                }
            };
            tokio::select! {
                biased;
                () = pump => true,
                () = end_of_patience => false,
            }
        });
        Self { shared, finish, task }
    }

    /// Takes what arrived on `stream`, or drops and counts it. Never waits for anything but a lock
    /// that is held for moments.
    pub fn push(&self, stream: Stream, bytes: &Bytes) {
        if self.shared.queue().push(stream, bytes) {
            self.shared.wake.notify_one();
        }
    }

    /// Bytes of both streams that were dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.shared.queue().dropped()
    }

    /// Ends both streams. What is left of them, and their ends, are published in the background,
    /// for as long as `patience` allows. The handle need not be awaited; it says whether all was
    /// published.
    pub fn finish(self, patience: Duration) -> JoinHandle<bool> {
        self.shared.queue().finished = true;
        self.shared.wake.notify_one();
        // A task that is gone has nothing to publish any more.
        let _ = self.finish.send(patience);
        self.task
    }
}

/// Publishes until both streams have ended.
async fn pump<P>(publish: P, shared: Arc<Shared>)
where
    P: Fn(Stream, Chunk) -> BoxFuture<'static, ()>,
{
    let mut rested = Instant::now();
    loop {
        let next = shared.queue().next(Instant::now() >= rested);
        match next {
            Next::Chunk(stream, chunk) => {
                let length = chunk.bytes.len();
                publish(stream, chunk).await;
                shared.queue().release(length);
                rested = Instant::now() + REST;
            }
            Next::Little => tokio::select! {
                () = tokio::time::sleep_until(rested) => {}
                () = shared.wake.notified() => {}
            },
            Next::Nothing => shared.wake.notified().await,
            Next::Over => return,
        }
    }
}

/// What there is to publish.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Chunk(Stream, Chunk),
    /// Something, and more may come to make it worth a message.
    Little,
    Nothing,
    Over,
}

/// What waits to be published. Pure.
#[derive(Debug)]
struct Queue {
    limit: usize,
    /// The most bytes of a block: together with the beginning of a character before it, a chunk.
    max_block: usize,
    /// Bytes in blocks, in beginnings of characters, and on their way.
    held: usize,
    /// How many blocks there have been: tells which of two is the older.
    blocks: u64,
    stdout: Lane,
    stderr: Lane,
    finished: bool,
}

/// One stream.
#[derive(Debug, Default)]
struct Lane {
    /// Bytes that arrived.
    arrived: u64,
    dropped: u64,
    blocks: VecDeque<Block>,
    /// The beginning of a character whose rest has not arrived, and which is not published yet.
    begun: Vec<u8>,
    /// Bytes up to the end of what was taken out of the blocks.
    taken: u64,
    /// How many bytes may still belong to a character whose beginning was dropped.
    torn: usize,
    seq: u64,
    ended: bool,
}

/// Bytes that follow one another in a stream.
#[derive(Debug)]
struct Block {
    number: u64,
    offset: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }
}

impl Queue {
    fn new(limit: usize, max_chunk: usize) -> Self {
        Self {
            limit,
            max_block: max_chunk.saturating_sub(MAX_INCOMPLETE).max(1),
            held: 0,
            blocks: 0,
            stdout: Lane::default(),
            stderr: Lane::default(),
            finished: false,
        }
    }

    fn lane(&mut self, stream: Stream) -> &mut Lane {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    fn dropped(&self) -> u64 {
        self.stdout.dropped + self.stderr.dropped
    }

    /// Takes what fits, and says whether that is a reason to look for something to publish.
    fn push(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        let (max_block, room) = (self.max_block, self.limit.saturating_sub(self.held));
        let (mut blocks, nothing_before) = (self.blocks, !self.has_blocks());
        let lane = self.lane(stream);
        let begin = lane.arrived;
        lane.arrived += bytes.len() as u64;
        // The rest of a character whose beginning is lost would make binary of a text.
        let torn = bytes.iter().take(lane.torn).take_while(|byte| is_continuation(**byte)).count();
        lane.torn = if torn < bytes.len() { 0 } else { lane.torn - torn };
        let fits = room.min(bytes.len() - torn);
        if torn + fits < bytes.len() {
            lane.torn = MAX_INCOMPLETE;
        }
        lane.dropped += (bytes.len() - fits) as u64;

        let mut offset = begin + torn as u64;
        let mut rest = &bytes[torn..torn + fits];
        while !rest.is_empty() {
            let open = lane
                .blocks
                .back()
                .is_some_and(|last| last.end() == offset && last.bytes.len() < max_block);
            if !open {
                lane.blocks.push_back(Block { number: blocks, offset, bytes: Vec::new() });
                blocks += 1;
            }
            let Some(last) = lane.blocks.back_mut() else { break };
            let (now, later) = rest.split_at(rest.len().min(max_block - last.bytes.len()));
            last.bytes.extend_from_slice(now);
            offset += now.len() as u64;
            rest = later;
        }
        // What is dropped is counted when it is: an outcome does not wait for the rest to be published.
        let torn = if torn + fits < bytes.len() { lane.drop_torn() } else { 0 };
        self.blocks = blocks;
        self.held = self.held + fits - torn;
        fits > 0 && (nothing_before || self.has_much())
    }

    fn has_blocks(&self) -> bool {
        !(self.stdout.blocks.is_empty() && self.stderr.blocks.is_empty())
    }

    /// Whether there is enough for a message without waiting for more.
    fn has_much(&self) -> bool {
        let full = |lane: &Lane| {
            lane.blocks.len() > 1
                || lane.blocks.front().is_some_and(|block| block.bytes.len() >= self.max_block)
        };
        self.held >= self.limit / 2 || full(&self.stdout) || full(&self.stderr)
    }

    /// The next chunk, the older stream's first. A little is kept back unless `rested`.
    ///
    /// The bytes are held until they are released.
    fn next(&mut self, rested: bool) -> Next {
        while self.has_blocks() {
            if !(rested || self.finished || self.has_much()) {
                return Next::Little;
            }
            let number = |lane: &Lane| lane.blocks.front().map_or(u64::MAX, |block| block.number);
            let stdout_first = number(&self.stdout) < number(&self.stderr);
            let stream = if stdout_first { Stream::Stdout } else { Stream::Stderr };
            let (chunk, dropped) = self.lane(stream).next();
            self.held -= dropped;
            if let Some(chunk) = chunk {
                return Next::Chunk(stream, chunk);
            }
        }
        if !self.finished {
            return Next::Nothing;
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            let (chunk, dropped) = self.lane(stream).last();
            self.held -= dropped;
            if let Some(chunk) = chunk {
                return Next::Chunk(stream, chunk);
            }
        }
        Next::Over
    }

    fn release(&mut self, bytes: usize) {
        self.held -= bytes;
    }
}

impl Lane {
    /// The next chunk from the blocks, unless all there is is the beginning of a character; and
    /// how many bytes were dropped.
    fn next(&mut self) -> (Option<Chunk>, usize) {
        let Some(block) = self.blocks.pop_front() else { return (None, 0) };
        let dropped = self.forget_torn(block.offset);
        self.taken = block.end();
        let mut bytes = block.bytes;
        if !self.begun.is_empty() {
            bytes.splice(..0, self.begun.drain(..));
        }
        let complete = complete_length(&bytes);
        self.begun.extend_from_slice(&bytes[complete..]);
        bytes.truncate(complete);
        let chunk = (!bytes.is_empty()).then(|| self.chunk(bytes));
        (chunk, dropped)
    }

    /// What is left when there are no blocks: what never became a character, then the end.
    fn last(&mut self) -> (Option<Chunk>, usize) {
        let dropped = self.forget_torn(self.arrived);
        if !self.begun.is_empty() {
            let bytes = std::mem::take(&mut self.begun);
            return (Some(self.chunk(bytes)), dropped);
        }
        if self.ended {
            return (None, dropped);
        }
        self.ended = true;
        self.seq += 1;
        let end = Some(End { dropped: self.dropped });
        (Some(Chunk { seq: self.seq, offset: self.arrived, bytes: Bytes::new(), end }), dropped)
    }

    /// Drops the beginning of a character whose rest is dropped just now. Returns how many bytes.
    fn drop_torn(&mut self) -> usize {
        let torn = match self.blocks.back_mut() {
            Some(last) => {
                let complete = complete_length(&last.bytes);
                let torn = last.bytes.len() - complete;
                last.bytes.truncate(complete);
                torn
            }
            None => std::mem::take(&mut self.begun).len(),
        };
        self.dropped += torn as u64;
        torn
    }

    /// Drops the beginning of a character whose rest was dropped before `next`.
    fn forget_torn(&mut self, next: u64) -> usize {
        if self.taken == next {
            return 0;
        }
        let torn = self.begun.len();
        self.begun.clear();
        self.dropped += torn as u64;
        torn
    }

    /// These bytes as a chunk. What is begun follows them.
    fn chunk(&mut self, bytes: Vec<u8>) -> Chunk {
        self.seq += 1;
        let offset = self.taken - (self.begun.len() + bytes.len()) as u64;
        Chunk { seq: self.seq, offset, bytes: bytes.into(), end: None }
    }
}

fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

/// The length of `bytes` without a character at their end whose rest is still to come. Bytes that
/// are no text are complete.
fn complete_length(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(MAX_INCOMPLETE);
    let Some(begin) = bytes[tail..].iter().rposition(|byte| !is_continuation(*byte)) else {
        return bytes.len();
    };
    match std::str::from_utf8(&bytes[tail + begin..]) {
        Err(e) if e.error_len().is_none() => tail + begin + e.valid_up_to(),
        _ => bytes.len(),
    }
}

#[cfg(test)]
#[path = "live_tests.rs"]
mod tests;
