//! Exit codes of clients: those users of containers know.

use crate::job::{Status, code};

use super::answer::Answer;

/// It went as asked.
pub(super) const OK: u8 = 0;
/// It did not.
pub(super) const FAILED: u8 = 1;
/// The function's time was over, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// It is not the function's fault.
pub(super) const TROUBLE: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// Killed for want of memory: 128 and KILL.
const OUT_OF_MEMORY: u8 = 137;
/// Nobody reads on: 128 and PIPE.
pub(super) const BROKEN_PIPE: u8 = 141;

/// The exit code of a job that came to this end. `interrupted` is the code of the signal by which
/// this client had it cancelled.
pub(super) fn of(answer: &Answer, interrupted: Option<u8>) -> u8 {
    let own = answer.exit_code.and_then(|code| u8::try_from(code).ok()).filter(|code| *code > 0);
    match answer.status {
        Some(Status::Succeeded) => OK,
        // An exit code that is none of a process' is a failure all the same.
        Some(Status::Failed) => own.unwrap_or(FAILED),
        Some(Status::TimedOut) => TIMED_OUT,
        Some(Status::OutOfMemory) => own.unwrap_or(OUT_OF_MEMORY),
        Some(Status::Cancelled) => interrupted.unwrap_or(TROUBLE),
        Some(Status::Rejected) => match answer.error.as_ref().map(|error| error.code.as_ref()) {
            Some(code::COMMAND_NOT_EXECUTABLE) => NOT_EXECUTABLE,
            Some(code::COMMAND_NOT_FOUND) => NOT_FOUND,
            _ => TROUBLE,
        },
        Some(Status::Error) | None => TROUBLE,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    #[test]
    fn every_end_has_its_code() {
        for (outcome, wanted) in [
            (json!({"status": "succeeded", "exit_code": 0}), 0),
            (json!({"status": "failed", "exit_code": 3}), 3),
            (json!({"status": "failed", "exit_code": 143, "signal": 15}), 143),
            (json!({"status": "failed", "exit_code": 1 << 20}), 1),
            (json!({"status": "timed_out", "exit_code": 143}), 124),
            (json!({"status": "out_of_memory", "exit_code": 137}), 137),
            (json!({"status": "out_of_memory"}), 137),
            (json!({"status": "cancelled"}), 125),
            (json!({"status": "rejected", "error": {"code": "command.not_found"}}), 127),
            (json!({"status": "rejected", "error": {"code": "command.not_executable"}}), 126),
            (json!({"status": "rejected", "error": {"code": "image.not_found"}}), 125),
            (json!({"status": "error", "error": {"code": "engine.unavailable"}}), 125),
            (json!({"status": "of a later version"}), 125),
        ] {
            let answer = Answer::of(outcome.clone()).unwrap();
            assert_eq!(of(&answer, None), wanted, "{outcome}");
        }
        let answer = Answer::of(json!({"status": "cancelled", "exit_code": 143})).unwrap();
        assert_eq!(of(&answer, Some(130)), 130);
        let answer = Answer::of(json!({"status": "succeeded", "exit_code": 0})).unwrap();
        assert_eq!(of(&answer, Some(130)), 0, "it was faster");
    }
}
