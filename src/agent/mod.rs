//! The agent: a small program that waits inside a container for a function to run.
//!
//! `main.rs` beside this file is that program; the build compiles it on its own, for it shares nothing
//! with the daemon but [`frame`].

pub mod frame;
