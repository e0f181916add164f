//! The agent: a small program that waits inside a container for a function to run.
//!
//! It is a program of its own: `main.rs`, beside this file, and the modules that it names. The build
//! compiles it statically, so that it runs in any image, and this library carries it as [`BINARY`].
//! Both sides share [`frame`]; the daemon hears it through a [`dialogue`].

use std::fmt::Write as _;
use std::sync::LazyLock;

use sha2::{Digest as _, Sha256};

pub mod dialogue;
pub mod frame;

/// The agent's executable, for the architecture that the daemon itself was built for.
pub static BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent"));

/// The SHA-256 of [`BINARY`] in 64 hexadecimal digits: a name for whatever holds this very agent.
#[must_use]
pub fn digest() -> &'static str {
    static DIGEST: LazyLock<String> = LazyLock::new(|| {
        Sha256::digest(BINARY).iter().fold(String::with_capacity(64), |mut digits, byte| {
            // Writing to a string cannot fail.
            let _ = write!(digits, "{byte:02x}");
            digits
        })
    });
    &DIGEST
}
