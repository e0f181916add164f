//! worker-spawner runs containerised functions that are requested over NATS.
//!
//! Data flows one way, and a slot is taken before work is:
//!
//! ```text
//!             admission
//!              (slots)
//!                 │
//!  NATS ──▶ source ──▶ decode ──▶ claim ──▶ runner ──▶ decide ──▶ publish ──▶ settle ──▶ clean up
//!        (jetstream,  (protocol)  (state)    │ ▲      (state)
//!            core)                           ▼ │
//!                                     backend::Backend
//!                                (docker: image · spec · cold)
//! ```
//!
//! Without JetStream nothing is claimed or decided: there are no records.
//!
//! Every module below is ignorant of its neighbours; [`app`] alone wires them together.
//!
//! | module | owns |
//! |---|---|
//! | [`cli`] | the command line, and the daemon's clients on it |
//! | [`config`] | the settings: parsed, checked, redacted |
//! | [`reference`](mod@reference) | what names an image |
//! | [`job`] | the vocabulary: job, outcome, error codes |
//! | [`protocol`] | what travels over NATS: requests, records, outcomes, dead letters, subjects |
//! | [`nats`] | the connection and its state |
//! | [`topology`] | streams, consumers and buckets: made where they are missing, never changed |
//! | [`source`] | where requests come from: a stream, or plain NATS |
//! | [`intake`] | what is taken, when there is a slot for it; and cancellations |
//! | [`admission`] | slots |
//! | [`inquiry`] | what is answered to whoever asks for a job |
//! | [`service`] | the daemon as a NATS service that can be discovered |
//! | [`cancel`] | which jobs run here and can be cancelled |
//! | [`backend`] | what runs a job; [`backend::docker`] is the one there is |
//! | [`agent`] | the program that waits in a container, and how it is spoken to |
//! | [`health`] | whether the engine is there, and the reaper's hours |
//! | [`conditions`] | what must hold for the daemon to be ready |
//! | [`metrics`] | what is counted and measured, and how it is shown |
//! | [`http`] | where whoever watches the daemon asks |
//! | [`runner`] | one delivery to exactly one outcome |
//! | [`state`] | job records, and who has the right to change one |
//! | [`notify`] | what a service manager is told |
//! | [`objects`] | inputs and outputs that no message holds |
//! | [`capture`] | what a function prints, kept for its outcome |
//! | [`live`] | what a function prints, published while it runs |
//! | [`publish`] | outcomes, dead letters and events on their way out |
//! | [`undertaker`] | requests that were delivered for the last time and never settled |
//! | [`log`] | the log, and how much of it there is |
//! | [`orders`] | signals that have the daemon do something other than end |
//! | [`trace`](mod@trace) | the trace a job is part of |
//! | [`spans`] | jobs as spans of a trace, on their way to a collector |
//! | [`retry`] | growing delays |
//! | [`finding`] | what an examination of the surroundings found |
//! | [`shutdown`] | signals and the drain's deadline |
//! | [`failpoint`](mod@failpoint) | where a test can have the daemon die |
//! | [`stage`](mod@stage) | where a job's time goes |

pub mod admission;
pub mod agent;
pub mod app;
pub mod backend;
pub mod cancel;
pub mod capture;
pub mod cli;
pub mod conditions;
pub mod config;
pub mod failpoint;
pub mod finding;
pub mod health;
pub mod http;
pub mod inquiry;
pub mod intake;
pub mod job;
pub mod live;
pub mod log;
pub mod metrics;
pub mod nats;
pub mod notify;
pub mod objects;
pub mod orders;
pub mod protocol;
pub mod publish;
pub mod reference;
pub mod retry;
pub mod runner;
pub mod service;
pub mod shutdown;
pub mod source;
pub mod spans;
pub mod stage;
pub mod state;
pub mod topology;
pub mod trace;
pub mod undertaker;
