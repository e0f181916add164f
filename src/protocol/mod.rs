//! What travels over NATS: subjects, requests, records and outcomes on the wire.
//!
//! Pure functions from bytes to the shared vocabulary and back; no connection, no engine.

pub mod asyncapi;
pub mod by_id;
pub mod cancel;
pub mod dead_letter;
pub mod headers;
pub mod outcome;
pub mod record;
pub mod request;
pub mod schema;
pub mod subjects;
pub mod time;

pub use record::{Record, State};
pub use request::{Refusal, Request};
pub use subjects::Subjects;
