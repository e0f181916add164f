//! How jobs ended: a count for each status and error code.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::job::{Status, code};

/// Every error code, with the status it comes with. What is in this list is exposed from the start, since
/// a count that appears with its first event hides that event from rates.
const CODES: [(&str, Status); 29] = [
    (code::INVALID_JSON, Status::Rejected),
    (code::INVALID_FIELD, Status::Rejected),
    (code::STDIN_NOT_FOUND, Status::Rejected),
    (code::IMAGE_NOT_ALLOWED, Status::Rejected),
    (code::IMAGE_NOT_FOUND, Status::Rejected),
    (code::IMAGE_UNAUTHORIZED, Status::Rejected),
    (code::IMAGE_PULL_FAILED, Status::Error),
    (code::IMAGE_PULL_TIMEOUT, Status::Error),
    (code::IMAGE_NO_COMMAND, Status::Rejected),
    (code::COMMAND_NOT_FOUND, Status::Rejected),
    (code::COMMAND_NOT_EXECUTABLE, Status::Rejected),
    (code::INVALID_USER, Status::Rejected),
    (code::INVALID_WORKING_DIR, Status::Rejected),
    (code::CONTAINER_REFUSED, Status::Error),
    (code::CONTAINER_VANISHED, Status::Error),
    (code::ENGINE_UNAVAILABLE, Status::Error),
    (code::ENGINE_TIMEOUT, Status::Error),
    (code::ENGINE_ERROR, Status::Error),
    (code::JOB_TIMED_OUT, Status::TimedOut),
    (code::JOB_OUT_OF_MEMORY, Status::OutOfMemory),
    (code::JOB_CANCELLED, Status::Cancelled),
    (code::JOB_EXPIRED, Status::Cancelled),
    (code::MAX_DELIVER, Status::Error),
    (code::JOB_STOPPED, Status::Error),
    (code::SHUTTING_DOWN, Status::Error),
    (code::JETSTREAM_UNAVAILABLE, Status::Error),
    (code::OBJECT_STORE, Status::Error),
    (code::BUSY, Status::Error),
    (code::BUFFER_FULL, Status::Error),
];

/// The label of an end without an error.
const NONE: &str = "none";
/// The label of a code that is in no list. There is none, but labels must be bounded.
const OTHER: &str = "other";

/// The counts.
#[derive(Debug)]
pub(super) struct Ends {
    /// For each status: without a code, with each code, with another one.
    by_status: [[AtomicU64; CODES.len() + 2]; Status::ALL.len()],
}

impl Default for Ends {
    fn default() -> Self {
        let counts = || std::array::from_fn(|_| AtomicU64::new(0));
        Self { by_status: std::array::from_fn(|_| counts()) }
    }
}

impl Ends {
    /// One more job ended so.
    pub(super) fn count(&self, status: Status, code: Option<&str>) {
        let place = match code {
            None => 0,
            Some(code) => {
                let known = CODES.iter().position(|(known, _)| *known == code);
                known.unwrap_or(CODES.len()) + 1
            }
        };
        let row = Status::ALL.iter().position(|known| *known == status);
        let row = row.and_then(|row| self.by_status.get(row));
        if let Some(count) = row.and_then(|row| row.get(place)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Every count that is expected or not zero, with its status and its code.
    pub(super) fn all(&self) -> Vec<(Status, &'static str, u64)> {
        let mut all = Vec::new();
        for (status, row) in Status::ALL.into_iter().zip(&self.by_status) {
            let plain = matches!(status, Status::Succeeded | Status::Failed);
            let codes = CODES.into_iter().map(|(code, usual)| (code, usual == status));
            let places = [(NONE, plain)].into_iter().chain(codes).chain([(OTHER, false)]);
            for ((code, expected), count) in places.zip(row) {
                let count = count.load(Ordering::Relaxed);
                if expected || count > 0 {
                    all.push((status, code, count));
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_an_outcome_is_known() {
        let source = include_str!("../job.rs");
        let codes = source.lines().filter_map(|line| {
            let (_, value) = line.trim().strip_prefix("pub const ")?.split_once(": &str = \"")?;
            value.strip_suffix("\";")
        });
        let mut named = 0;
        for code in codes {
            named += 1;
            assert!(CODES.iter().any(|(known, _)| *known == code), "{code} is missing in CODES");
        }
        assert_eq!(named, CODES.len(), "CODES has one that job::code does not have");
    }

    #[test]
    fn ends_are_counted_by_status_and_code() {
        let ends = Ends::default();
        let expected = ends.all();
        assert_eq!(expected.len(), CODES.len() + 2);
        assert!(expected.iter().all(|(_, _, count)| *count == 0));
        ends.count(Status::Succeeded, None);
        ends.count(Status::Failed, None);
        ends.count(Status::Failed, None);
        ends.count(Status::Error, Some(code::BUSY));
        ends.count(Status::Cancelled, Some("made.up"));
        let mut counted = ends.all();
        assert_eq!(counted.len(), CODES.len() + 3, "but for the one that is made up");
        counted.retain(|(_, _, count)| *count > 0);
        assert_eq!(
            counted,
            [
                (Status::Succeeded, NONE, 1),
                (Status::Failed, NONE, 2),
                (Status::Cancelled, OTHER, 1),
                (Status::Error, code::BUSY, 1),
            ]
        );
    }
}
