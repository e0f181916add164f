//! Frames on their way to the daemon.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use crate::frame::{self, HEADER, Kind, MAX_DATA};
use crate::sys::{self, POLLOUT, Poll};

/// Room for one full frame of either stream, and for what is said beside them.
const CAPACITY: usize = 2 * (HEADER + MAX_DATA) + 256;
/// Less room than this is not worth a read.
const LEAST_ROOM: usize = 4 << 10;

/// What came of a look at a stream.
#[derive(PartialEq, Eq)]
pub enum Relayed {
    Some,
    /// There is nothing in it now.
    Nothing,
    /// There will be nothing in it any more.
    Ended,
    /// There may be something, and no room for it.
    NoRoom,
}

/// Frames that were not written yet. It never waits for the daemon, and holds what fits: as long as
/// the daemon does not read, neither is the function's output read.
pub struct Outbox {
    channel: File,
    frames: Vec<u8>,
    written: usize,
}

impl Outbox {
    pub fn new(channel: File) -> Self {
        Self { channel, frames: Vec::with_capacity(CAPACITY), written: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes of the frames that were not written, or not all of them.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    pub fn has_room(&self) -> bool {
        self.room() >= LEAST_ROOM
    }

    fn room(&self) -> usize {
        // The rest is for the frames that are not a stream's.
        (CAPACITY - 256).saturating_sub(self.frames.len() + HEADER)
    }

    /// Adds a frame that is not a stream's.
    pub fn say(&mut self, kind: Kind, payload: &[u8]) {
        frame::push(&mut self.frames, kind, payload);
    }

    /// Adds what a stream has now, as one frame.
    pub fn relay(&mut self, kind: Kind, mut stream: impl Read) -> io::Result<Relayed> {
        if !self.has_room() {
            return Ok(Relayed::NoRoom);
        }
        let begin = self.frames.len();
        let data = begin + HEADER;
        self.frames.resize(data + self.room().min(MAX_DATA), 0);
        let read = stream.read(&mut self.frames[data..]);
        let length = *read.as_ref().unwrap_or(&0);
        if length == 0 {
            self.frames.truncate(begin);
        } else {
            self.frames.truncate(data + length);
            self.frames[begin..data].copy_from_slice(&frame::header(kind, length));
        }
        match read {
            Ok(0) => Ok(Relayed::Ended),
            Ok(_) => Ok(Relayed::Some),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Relayed::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Writes as much as the channel takes.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.written < self.frames.len() {
            match self.channel.write(&self.frames[self.written..]) {
                Ok(length) => self.written += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.frames.clear();
        self.written = 0;
        Ok(())
    }

    /// Writes everything, however long that takes.
    pub fn flush_all(&mut self) -> io::Result<()> {
        self.flush()?;
        while !self.is_empty() {
            sys::poll(&mut [Poll::on(self, POLLOUT)], None)?;
            self.flush()?;
        }
        Ok(())
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
