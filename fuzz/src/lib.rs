//! The parts of the daemon that take apart what comes out of a container, without the daemon: they
//! need little, and are compiled with instruments in seconds.

#[path = "../../src/agent/dialogue.rs"]
pub mod dialogue;
#[path = "../../src/agent/frame.rs"]
pub mod frame;
