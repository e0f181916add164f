//! Frames from the daemon.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};

use crate::frame::{self, HEADER, Kind, Malformed};

/// What was heard.
pub enum Heard {
    /// A whole frame; its payload is the inbox's until the next is asked for.
    Frame(Kind),
    /// No whole frame yet.
    Nothing,
    /// The daemon has hung up.
    Gone,
    /// Something that is no frame.
    Malformed(Malformed),
}

/// One frame at a time. It reads no byte beyond the frame, so that what is not asked for stays in the
/// channel, and the daemon waits.
pub struct Inbox {
    channel: File,
    header: [u8; HEADER],
    payload: Vec<u8>,
    /// Bytes that have come, of header and payload together.
    length: usize,
}

impl Inbox {
    pub fn new(channel: File) -> Self {
        Self { channel, header: [0; HEADER], payload: Vec::new(), length: 0 }
    }

    /// The next frame, or the reason why there is none.
    pub fn read(&mut self) -> io::Result<Heard> {
        loop {
            let place = match self.length.checked_sub(HEADER) {
                None => &mut self.header[self.length..],
                Some(read) => &mut self.payload[read..],
            };
            match self.channel.read(place) {
                Ok(0) => return Ok(Heard::Gone),
                Ok(length) => self.length += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Heard::Nothing),
                Err(error) => return Err(error),
            }
            if self.length < HEADER {
                continue;
            }
            let (kind, length) = match frame::parse_header(self.header) {
                Ok(parsed) => parsed,
                Err(malformed) => return Ok(Heard::Malformed(malformed)),
            };
            if self.length == HEADER {
                self.payload.resize(length, 0);
            }
            if self.length == HEADER + length {
                self.length = 0;
                return Ok(Heard::Frame(kind));
            }
        }
    }

    /// Throws away some of what has come, whatever it is. Returns whether the daemon has hung up.
    pub fn discard(&mut self) -> io::Result<bool> {
        match self.channel.read(&mut [0; 4096]) {
            Ok(length) => Ok(length == 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The payload of the frame that was heard last.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The same, to be kept.
    pub fn take_payload(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.payload)
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
