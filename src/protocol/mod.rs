//! What travels over NATS: subjects, requests and outcomes on the wire.
//!
//! Pure functions from bytes to the shared vocabulary and back; no connection, no engine.

pub mod headers;
pub mod outcome;
pub mod request;
pub mod subjects;
pub mod time;

pub use request::{Refusal, Request};
pub use subjects::Subjects;
