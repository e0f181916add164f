//! worker-spawner runs containerised functions that are requested over NATS.
//!
//! Data flows one way, and a slot is taken before work is:
//!
//! ```text
//!  NATS ──▶ source ──▶ decode ──▶ admission ──▶ runner ──▶ publish ──▶ settle ──▶ clean up
//!           (core)    (protocol)   (slots)        │ ▲
//!                                                 ▼ │
//!                                          backend::Backend
//!                                     (docker: image · spec · cold)
//! ```
//!
//! Every module below is ignorant of its neighbours; [`app`] alone wires them together.
//!
//! | module | owns |
//! |---|---|
//! | [`config`] | the settings: parsed, checked, redacted |
//! | [`job`] | the vocabulary: job, outcome, error codes |
//! | [`protocol`] | what travels over NATS: requests, records, outcomes, dead letters, subjects |
//! | [`nats`] | the connection and its state |
//! | [`source`] | where requests come from |
//! | [`admission`] | slots |
//! | [`backend`] | what runs a job; [`backend::docker`] is the one there is |
//! | [`health`] | whether the engine is there, and the reaper's hours |
//! | [`runner`] | one delivery to exactly one outcome |
//! | [`live`] | what a function prints, published while it runs |
//! | [`publish`] | outcomes on their way out |
//! | [`shutdown`] | signals and the drain's deadline |

pub mod admission;
pub mod app;
pub mod backend;
pub mod cancel;
pub mod capture;
pub mod config;
pub mod failpoint;
pub mod health;
pub mod intake;
pub mod job;
pub mod live;
pub mod nats;
pub mod objects;
pub mod protocol;
pub mod publish;
pub mod retry;
pub mod runner;
pub mod shutdown;
pub mod source;
pub mod state;
pub mod topology;
pub mod undertaker;
