//! The end of a conversation.

use std::time::{Duration, Instant};

use crate::Failure;
use crate::inbox::Inbox;
use crate::outbox::Outbox;
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, Poll, SIGCHLD, Signals};

/// How long the daemon may take to hang up once it was told of the end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits until the daemon hangs up, or somebody stops the container: engines were seen to drop what a
/// container said last when it ended at once. What the daemon still says is of no interest: input that
/// the function did not read.
pub fn say(signals: &Signals, inbox: &mut Inbox, outbox: &Outbox) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    let own = std::process::id();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut polls = [Poll::on(signals, POLLIN), Poll::on(inbox, POLLIN), Poll::on(outbox, 0)];
        sys::poll(&mut polls, Some(left))?;
        let [signalled, heard, told] = polls;
        let is_stopped = signalled.has(POLLIN)
            && signals.next()?.is_some_and(|s| s.number != SIGCHLD && s.sender != own);
        let has_hung_up =
            told.has(POLLERR) || heard.has(POLLIN | POLLHUP | POLLERR) && inbox.discard()?;
        if is_stopped || has_hung_up || left.is_zero() {
            return Ok(());
        }
    }
}
