//! The agent as it is embedded, in a PID namespace of its own instead of a container: what a function
//! sees, what becomes of what it does, and how the agent ends.
//!
//! Takes `unshare` and `setpriv`, and root or the right to make user namespaces.
#![allow(clippy::unwrap_used, clippy::panic)]

mod confinement;
mod endings;
mod functions;
mod streams;
mod support;
