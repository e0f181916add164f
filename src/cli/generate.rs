//! What is made from definitions: of the command line, completions and manual pages; of the messages,
//! their specification.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;

use crate::protocol::{asyncapi, schema};

/// What of the messages is specified.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Specification {
    /// Requests.
    Request,
    /// Outcomes.
    Outcome,
    /// Events, which are job records.
    Event,
    /// All subjects and messages.
    Asyncapi,
}

/// Prints a specification.
pub(super) fn specification(of: Specification, prefix: &str) -> anyhow::Result<u8> {
    let specification = match of {
        Specification::Request => schema::request(),
        Specification::Outcome => schema::outcome(),
        Specification::Event => schema::event(),
        Specification::Asyncapi => asyncapi::document(prefix),
    };
    let text = format!("{specification:#}\n");
    std::io::stdout().write_all(text.as_bytes()).context("could not print it")?;
    Ok(0)
}

/// Prints a completion script.
pub(super) fn completions(shell: Shell, command: &mut Command) -> anyhow::Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "worker-spawner", &mut script);
    // `generate` itself panics when nobody reads on.
    std::io::stdout().write_all(&script).context("could not write the script")?;
    Ok(0)
}

/// Writes a manual page for the program, and one for each subcommand.
pub(super) fn manual(command: &Command, directory: &Path) -> anyhow::Result<u8> {
    clap_mangen::generate_to(command.clone(), directory)
        .with_context(|| format!("could not write manual pages to {}", directory.display()))?;
    Ok(0)
}
