//! What is made from the definition of the command line: completions and manual pages.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;

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
