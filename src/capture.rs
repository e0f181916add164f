//! What a function prints: kept byte for byte up to a limit per stream, counted beyond it.

use bytes::Bytes;

/// One of a program's output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Collects a function's output as it arrives.
///
/// Memory is bounded: at most `limit` bytes per stream are kept, whatever arrives. Bytes past the
/// limit are dropped and counted, and the function goes on.
#[derive(Debug)]
pub struct Capture {
    limit: usize,
    captured: Captured,
}

/// What was kept of a function's output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// The first bytes of standard output.
    pub stdout: Vec<u8>,
    /// The first bytes of standard error.
    pub stderr: Vec<u8>,
    /// Bytes of standard output that were dropped.
    pub stdout_dropped: u64,
    /// Bytes of standard error that were dropped.
    pub stderr_dropped: u64,
    /// The order in which the kept bytes arrived: the lengths of runs of one stream, in turn, the
    /// first of standard output. Four bytes a run: a function that changes streams at every byte
    /// costs some ten times its output.
    runs: Vec<u32>,
}

impl Capture {
    /// A capture that keeps `limit` bytes of each stream.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, captured: Captured::default() }
    }

    /// Takes a chunk that arrived on `stream`.
    pub fn push(&mut self, stream: Stream, chunk: &[u8]) {
        let c = &mut self.captured;
        let (kept, dropped) = match stream {
            Stream::Stdout => (&mut c.stdout, &mut c.stdout_dropped),
            Stream::Stderr => (&mut c.stderr, &mut c.stderr_dropped),
        };
        let room = self.limit.saturating_sub(kept.len()).min(chunk.len());
        *dropped += (chunk.len() - room) as u64;
        if room == 0 {
            return;
        }
        kept.extend_from_slice(&chunk[..room]);
        // An odd number of runs ends with one of standard output.
        let last = if c.runs.len() % 2 == 1 { Stream::Stdout } else { Stream::Stderr };
        if c.runs.is_empty() && stream == Stream::Stderr {
            c.runs.push(0);
            c.runs.push(0);
        } else if last != stream {
            c.runs.push(0);
        }
        if let Some(length) = c.runs.last_mut() {
            // The limit keeps a run below 4 GiB.
            *length += u32::try_from(room).unwrap_or(u32::MAX);
        }
    }

    /// Ends the capture.
    #[must_use]
    pub fn finish(self) -> Captured {
        self.captured
    }
}

impl Captured {
    /// The order in which both streams arrived: the lengths of runs of one stream, in turn, the first
    /// of standard output.
    #[must_use]
    pub fn order(&self) -> &[u32] {
        &self.runs
    }

    /// Two streams in a known order. Where the order does not fit the streams, one follows the other.
    #[must_use]
    pub fn ordered(stdout: Vec<u8>, stderr: Vec<u8>, order: &[u32]) -> Self {
        let sum =
            |skip: usize| order.iter().skip(skip).step_by(2).map(|n| *n as usize).sum::<usize>();
        let fits = sum(0) == stdout.len() && sum(1) == stderr.len();
        let length = |stream: &Vec<u8>| u32::try_from(stream.len()).unwrap_or(u32::MAX);
        let runs = if fits { order.to_vec() } else { vec![length(&stdout), length(&stderr)] };
        Self { stdout, stderr, stdout_dropped: 0, stderr_dropped: 0, runs }
    }

    /// Keeps the first `limit` bytes of each stream and counts the rest as dropped.
    pub fn cut(&mut self, limit: usize) {
        for (kept, dropped) in [
            (&mut self.stdout, &mut self.stdout_dropped),
            (&mut self.stderr, &mut self.stderr_dropped),
        ] {
            *dropped += kept.len().saturating_sub(limit) as u64;
            kept.truncate(limit);
        }
        // The order is of what is left: each run as far as its stream goes.
        let mut left = [self.stdout.len(), self.stderr.len()];
        for (index, length) in self.runs.iter_mut().enumerate() {
            let left = &mut left[index % 2];
            *length = u32::try_from((*length as usize).min(*left)).unwrap_or(u32::MAX);
            *left -= *length as usize;
        }
    }

    /// Both streams in the order they arrived, at most `limit` bytes, and whether anything was
    /// cut off here.
    #[must_use]
    pub fn interleaved(&self, limit: usize) -> (Bytes, bool) {
        let total = self.stdout.len() + self.stderr.len();
        let mut body = Vec::with_capacity(total.min(limit));
        let (mut out, mut err) = (self.stdout.as_slice(), self.stderr.as_slice());
        for (index, &length) in self.runs.iter().enumerate() {
            let rest = if index % 2 == 0 { &mut out } else { &mut err };
            let (run, tail) = rest.split_at(length as usize);
            *rest = tail;
            let room = limit - body.len();
            body.extend_from_slice(&run[..run.len().min(room)]);
            if run.len() > room {
                break;
            }
        }
        (Bytes::from(body), total > limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(limit: usize, chunks: &[(Stream, &str)]) -> Captured {
        let mut capture = Capture::new(limit);
        for (stream, chunk) in chunks {
            capture.push(*stream, chunk.as_bytes());
        }
        capture.finish()
    }

    #[test]
    fn streams_are_kept_apart_and_in_order() {
        let c = capture(
            100,
            &[
                (Stream::Stdout, "a"),
                (Stream::Stderr, "B"),
                (Stream::Stdout, "c"),
                (Stream::Stdout, "d"),
            ],
        );
        assert_eq!((c.stdout.as_slice(), c.stderr.as_slice()), (&b"acd"[..], &b"B"[..]));
        assert_eq!(c.interleaved(100), (Bytes::from_static(b"aBcd"), false));
        assert_eq!(c.interleaved(3), (Bytes::from_static(b"aBc"), true));
        assert_eq!(c.interleaved(4), (Bytes::from_static(b"aBcd"), false));
    }

    #[test]
    fn what_is_past_the_limit_is_counted_per_stream() {
        let c =
            capture(3, &[(Stream::Stdout, "abcd"), (Stream::Stderr, "xy"), (Stream::Stdout, "e")]);
        assert_eq!((c.stdout.as_slice(), c.stdout_dropped), (&b"abc"[..], 2));
        assert_eq!((c.stderr.as_slice(), c.stderr_dropped), (&b"xy"[..], 0));
        assert_eq!(c.interleaved(9), (Bytes::from_static(b"abcxy"), false));
    }

    #[test]
    fn either_stream_may_come_first() {
        let c = capture(9, &[(Stream::Stderr, "E"), (Stream::Stderr, "F"), (Stream::Stdout, "o")]);
        assert_eq!(c.interleaved(9).0, "EFo");
        assert_eq!(c.interleaved(2), (Bytes::from_static(b"EF"), true));
    }

    #[test]
    fn what_is_cut_later_is_as_if_it_had_never_been_kept() {
        let chunks = [
            (Stream::Stderr, "ab"),
            (Stream::Stdout, "cdef"),
            (Stream::Stderr, "ghij"),
            (Stream::Stdout, "k"),
        ];
        for limit in 0..8 {
            let mut cut = capture(100, &chunks);
            cut.cut(limit);
            let kept = capture(limit, &chunks);
            assert_eq!((&cut.stdout, &cut.stderr), (&kept.stdout, &kept.stderr));
            assert_eq!(
                (cut.stdout_dropped, cut.stderr_dropped),
                (kept.stdout_dropped, kept.stderr_dropped)
            );
            assert_eq!(cut.interleaved(100), kept.interleaved(100));
        }
    }

    #[test]
    fn an_order_is_taken_up_again_where_it_fits() {
        let c = capture(9, &[(Stream::Stderr, "ab"), (Stream::Stdout, "c"), (Stream::Stderr, "d")]);
        let again = Captured::ordered(c.stdout.clone(), c.stderr.clone(), c.order());
        assert_eq!(again, c);
        let unfit = Captured::ordered(b"xyz".to_vec(), b"ab".to_vec(), c.order());
        assert_eq!(unfit.interleaved(9).0, "xyzab");
    }

    #[test]
    fn nothing_printed_is_an_empty_body() {
        assert_eq!(capture(3, &[]).interleaved(0), (Bytes::new(), false));
    }
}
