//! Live output put together: each byte once, in order, and the rest from the outcome.

use std::collections::HashMap;

use async_nats::Message;
use bytes::Bytes;

use crate::capture::Stream;
use crate::protocol::headers;

/// A piece of live output as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) stream: Stream,
    pub(super) attempt: u64,
    pub(super) seq: u64,
    pub(super) offset: u64,
    pub(super) end: bool,
    pub(super) bytes: Bytes,
}

impl Piece {
    /// Reads a message on a subject of live output. Nothing where it is none.
    pub(super) fn of(message: &Message) -> Option<Self> {
        let stream = match message.subject.rsplit('.').next()? {
            "stdout" => Stream::Stdout,
            "stderr" => Stream::Stderr,
            _ => return None,
        };
        let headers = message.headers.as_ref()?;
        let number = |name: &str| headers.get(name)?.as_str().parse().ok();
        Some(Self {
            stream,
            attempt: number(headers::JOB_ATTEMPT).unwrap_or(1),
            seq: number(headers::SEQ)?,
            offset: number(headers::OFFSET)?,
            end: headers.get(headers::END).is_some(),
            bytes: message.payload.clone(),
        })
    }
}

/// What is to be done about a piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Print this.
    Print(Bytes),
    /// Another attempt has begun, and this is its beginning: what was printed is an earlier one's.
    Anew(Bytes),
    /// Print this; so many bytes came before anybody listened.
    Joined(u64, Bytes),
    /// Bytes are missing before it: nothing of this stream is printed until the outcome is there.
    Gap,
    /// Nothing.
    Nothing,
}

/// How far the streams of a job are printed. Pure.
#[derive(Debug, Default)]
pub(super) struct Printed {
    attempt: u64,
    streams: HashMap<Stream, Progress>,
    /// Whoever comes late takes up the stream where it is.
    joins: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Bytes up to the end of what is printed.
    up_to: u64,
    /// The last piece's number.
    seq: u64,
    /// Bytes were missing.
    broken: bool,
    ended: bool,
}

impl Printed {
    /// Of a job that may have printed before anybody listened.
    pub(super) fn joining() -> Self {
        Self { joins: true, ..Self::default() }
    }

    /// Takes note of a piece.
    pub(super) fn take(&mut self, piece: &Piece) -> Step {
        if piece.attempt < self.attempt {
            return Step::Nothing;
        }
        let anew = piece.attempt > self.attempt && self.any();
        if piece.attempt > self.attempt {
            self.attempt = piece.attempt;
            self.streams.clear();
            // Of a later attempt nothing came before.
            self.joins &= !anew;
        }
        let first = !self.streams.contains_key(&piece.stream);
        let progress = self.streams.entry(piece.stream).or_default();
        let joined = first && self.joins && piece.offset > 0;
        if joined {
            progress.up_to = piece.offset;
        }
        if progress.broken || piece.seq <= progress.seq {
            return Step::Nothing;
        }
        progress.seq = piece.seq;
        if piece.offset != progress.up_to {
            progress.broken = true;
            return Step::Gap;
        }
        progress.up_to += piece.bytes.len() as u64;
        progress.ended = piece.end;
        let bytes = piece.bytes.clone();
        match (joined, anew) {
            (true, _) => Step::Joined(piece.offset, bytes),
            _ if bytes.is_empty() => Step::Nothing,
            (false, true) => Step::Anew(bytes),
            (false, false) => Step::Print(bytes),
        }
    }

    /// Whether anything was printed.
    fn any(&self) -> bool {
        self.streams.values().any(|progress| progress.up_to > 0)
    }

    /// Whether something was printed, and not of this attempt.
    pub(super) fn of_another(&self, attempt: u64) -> bool {
        attempt != self.attempt && self.any()
    }

    /// Whether the stream was printed to its end, as far as this attempt goes.
    pub(super) fn complete(&self, stream: Stream, attempt: u64) -> bool {
        attempt == self.attempt && self.streams.get(&stream).is_some_and(|progress| progress.ended)
    }

    /// Whether nothing more of the stream can be printed before the outcome is.
    pub(super) fn broken(&self, stream: Stream) -> bool {
        self.streams.get(&stream).is_some_and(|progress| progress.broken)
    }

    /// Bytes of the stream, from its beginning, that need not be printed any more.
    pub(super) fn up_to(&self, stream: Stream, attempt: u64) -> u64 {
        match self.streams.get(&stream) {
            Some(progress) if attempt == self.attempt => progress.up_to,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(attempt: u64, seq: u64, offset: u64, text: &'static str) -> Piece {
        let bytes = Bytes::from_static(text.as_bytes());
        Piece { stream: Stream::Stdout, attempt, seq, offset, end: false, bytes }
    }

    fn print(text: &'static str) -> Step {
        Step::Print(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn each_byte_is_printed_once() {
        let mut printed = Printed::default();
        assert_eq!(printed.take(&piece(1, 1, 0, "ab")), print("ab"));
        assert_eq!(printed.take(&piece(1, 1, 0, "ab")), Step::Nothing);
        assert_eq!(printed.take(&piece(1, 2, 2, "c")), print("c"));
        assert_eq!(printed.up_to(Stream::Stdout, 1), 3);
        assert_eq!(printed.up_to(Stream::Stderr, 1), 0);
        assert!(!printed.complete(Stream::Stdout, 1));
        let end = Piece { end: true, ..piece(1, 3, 3, "") };
        assert_eq!(printed.take(&end), Step::Nothing);
        assert!(printed.complete(Stream::Stdout, 1));
    }

    #[test]
    fn behind_a_gap_nothing_is_printed() {
        let mut printed = Printed::default();
        assert_eq!(printed.take(&piece(1, 1, 0, "ab")), print("ab"));
        assert_eq!(printed.take(&piece(1, 3, 4, "e")), Step::Gap);
        assert_eq!(printed.take(&piece(1, 4, 5, "f")), Step::Nothing);
        assert_eq!(printed.up_to(Stream::Stdout, 1), 2);
        assert!(printed.broken(Stream::Stdout) && !printed.complete(Stream::Stdout, 1));
    }

    #[test]
    fn a_missed_beginning_is_a_gap_but_for_who_joins() {
        assert_eq!(Printed::default().take(&piece(1, 2, 2, "c")), Step::Gap);
        let mut joined = Printed::joining();
        let late = Step::Joined(2, Bytes::from_static(b"c"));
        assert_eq!(joined.take(&piece(2, 2, 2, "c")), late);
        assert_eq!(joined.up_to(Stream::Stdout, 2), 3);
        assert_eq!(joined.take(&piece(2, 4, 9, "e")), Step::Gap);
    }

    #[test]
    fn another_attempt_begins_anew() {
        let mut printed = Printed::default();
        assert_eq!(printed.take(&piece(1, 1, 0, "ab")), print("ab"));
        assert_eq!(printed.take(&piece(2, 1, 0, "xy")), Step::Anew(Bytes::from_static(b"xy")));
        assert_eq!(printed.take(&piece(1, 2, 2, "c")), Step::Nothing, "it comes late");
        assert_eq!(printed.up_to(Stream::Stdout, 2), 2);
        assert_eq!(printed.up_to(Stream::Stdout, 3), 0, "of an attempt that was not heard");
        assert!(printed.of_another(3) && !printed.of_another(2));
    }
}
