//! Subjects: the ones the daemon uses, and the ones it may be asked to publish to.

use crate::capture::Stream;
use crate::job::{JobId, Priority};

/// The daemon's subjects under one prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subjects {
    prefix: String,
    /// Requests, fire and forget.
    pub execute: String,
    /// Requests that wait for their outcome.
    pub run: String,
    /// One message per job.
    pub results: String,
    /// Ids of jobs to stop.
    pub cancel: String,
    /// Ids of jobs to tell of.
    pub status: String,
    /// What could not be run.
    pub dead_letters: String,
}

/// Why the daemon does not publish to a subject it was asked to publish to.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReplyRefused {
    /// It is no subject one can publish to.
    #[error("is not a subject one can publish to")]
    NotLiteral,
    /// It belongs to the server or to the daemon itself.
    #[error("belongs to the NATS system or to this service")]
    Reserved,
    /// It is under none of the allowed prefixes.
    #[error("is neither under _INBOX nor under one of REPLY_PREFIXES")]
    NotAllowed,
}

impl Subjects {
    /// The subjects under `prefix`.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let subject = |name: &str| format!("{prefix}.{name}");
        Self {
            prefix: prefix.to_owned(),
            execute: subject("execute"),
            run: subject("run"),
            results: subject("results"),
            cancel: subject("cancel"),
            status: subject("status"),
            dead_letters: subject("dead_letters"),
        }
    }

    /// What all subjects begin with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Requests of this priority, fire and forget.
    #[must_use]
    pub fn execute_at(&self, priority: Priority) -> String {
        match priority {
            Priority::Normal => self.execute.clone(),
            other => format!("{}.{}", self.execute, other.as_str()),
        }
    }

    /// The states of one job.
    #[must_use]
    pub fn events(&self, id: &JobId) -> String {
        format!("{}.events.{id}", self.prefix)
    }

    /// What one job prints, as it prints it.
    #[must_use]
    pub fn logs(&self, id: &JobId, stream: Stream) -> String {
        let stream = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        format!("{}.logs.{id}.{stream}", self.prefix)
    }

    /// Checks the reply subject of a message.
    ///
    /// The daemon may publish where its callers may not, so a reply to the server's own API, or
    /// back into the daemon's subjects, would lend them its rights.
    ///
    /// # Errors
    /// Says why the daemon does not publish there.
    pub fn check_reply(&self, subject: &str) -> Result<(), ReplyRefused> {
        if !is_literal(subject) {
            return Err(ReplyRefused::NotLiteral);
        }
        let own = subject.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with('.'));
        if subject.starts_with('$') || own {
            return Err(ReplyRefused::Reserved);
        }
        Ok(())
    }

    /// Checks a `reply_to` field: as strict as [`Self::check_reply`], and under an inbox or one of
    /// the operator's `prefixes`, each of which ends with a dot.
    ///
    /// # Errors
    /// Says why the daemon does not publish there.
    pub fn check_reply_to(&self, subject: &str, prefixes: &[String]) -> Result<(), ReplyRefused> {
        self.check_reply(subject)?;
        let allowed = subject.starts_with("_INBOX.")
            || prefixes.iter().any(|prefix| subject.starts_with(prefix.as_str()));
        if allowed { Ok(()) } else { Err(ReplyRefused::NotAllowed) }
    }
}

/// Whether `subject` is one to publish to: non-empty tokens joined by dots, no wildcard, no white
/// space, no control character, and at most 256 bytes.
#[must_use]
pub fn is_literal(subject: &str) -> bool {
    let token = |t: &str| !t.is_empty() && t != "*" && t != ">";
    let clean = |c: char| !c.is_whitespace() && !c.is_control();
    subject.len() <= 256 && subject.split('.').all(token) && subject.chars().all(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_checked() {
        let subjects = Subjects::new("functions");
        let prefixes = ["team.replies.".to_owned()];
        for (subject, wanted) in [
            ("_INBOX.abc.1", Ok(())),
            ("team.replies.7", Ok(())),
            ("team.replies", Err(ReplyRefused::NotAllowed)),
            ("team.repliesevil", Err(ReplyRefused::NotAllowed)),
            ("elsewhere", Err(ReplyRefused::NotAllowed)),
            ("_INBOXevil.a", Err(ReplyRefused::NotAllowed)),
            ("$JS.API.STREAM.DELETE.X", Err(ReplyRefused::Reserved)),
            ("$SYS.REQ.SERVER.PING", Err(ReplyRefused::Reserved)),
            ("functions.execute", Err(ReplyRefused::Reserved)),
            ("functions", Err(ReplyRefused::NotAllowed)),
            ("_INBOX.*", Err(ReplyRefused::NotLiteral)),
            ("_INBOX.>", Err(ReplyRefused::NotLiteral)),
            ("_INBOX..a", Err(ReplyRefused::NotLiteral)),
            ("_INBOX.a b", Err(ReplyRefused::NotLiteral)),
            ("_INBOX.a\r\nPUB x 0", Err(ReplyRefused::NotLiteral)),
            ("", Err(ReplyRefused::NotLiteral)),
        ] {
            assert_eq!(subjects.check_reply_to(subject, &prefixes), wanted, "{subject:?}");
        }
        assert_eq!(subjects.check_reply("elsewhere"), Ok(()));
    }
}
