//! The command line: what the one binary can be told to do.
//!
//! Without a subcommand it is the daemon. The others are clients of it over NATS, and know of it
//! only what [`crate::protocol`] says.

use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};

mod generate;

/// Runs containerised functions that are requested over NATS.
#[derive(Debug, Parser)]
#[command(name = "worker-spawner", version, max_term_width = 100)]
#[command(
    after_help = "The daemon's settings are environment variables; .env.example names them all."
)]
pub struct Cli {
    /// What to do; the daemon where nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the binary does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Be the daemon: take requests and run them. The same as no subcommand.
    Serve,
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the specification of the messages: JSON Schemas, or an AsyncAPI document of all subjects.
    Schema {
        /// Of what.
        #[arg(value_enum)]
        of: generate::Specification,
        /// The first part of every subject.
        #[arg(long, default_value = "functions", env = "SUBJECT_PREFIX")]
        subject_prefix: String,
    },
    /// Write the manual pages.
    Man {
        /// The directory they go to. It must exist.
        directory: PathBuf,
    },
}

impl Command {
    /// Does it, and returns the exit code. [`Command::Serve`] is the caller's to do.
    ///
    /// # Errors
    /// It could not be done; the text is for whoever typed the command.
    pub fn run(self) -> anyhow::Result<u8> {
        match self {
            Self::Serve => anyhow::bail!("the daemon is not started from here"),
            Self::Completions { shell } => generate::completions(shell, &mut Cli::command()),
            Self::Schema { of, subject_prefix } => generate::specification(of, &subject_prefix),
            Self::Man { directory } => generate::manual(&Cli::command(), &directory),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn nothing_is_the_daemon() {
        let cli = Cli::try_parse_from(["worker-spawner"]);
        assert!(cli.is_ok_and(|cli| cli.command.is_none()));
    }
}
