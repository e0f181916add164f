//! The command line: what the one binary can be told to do.
//!
//! Without a subcommand it is the daemon. The others are clients of it over NATS, and know of it
//! only what [`crate::protocol`] says; `check` alone looks at what the daemon would find.

use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};

mod answer;
mod cancel;
mod check;
mod client;
mod context;
mod dead_letters;
mod exit;
mod follow;
mod generate;
mod hand_in;
mod input;
mod interrupt;
mod live;
mod logs;
mod options;
mod parse;
mod print;
mod progress;
mod ps;
mod queue;
mod records;
mod request;
mod result;
mod run;
mod status;
mod submit;
mod top;

pub use cancel::Cancel;
pub use check::Check;
pub use dead_letters::DeadLetters;
pub use logs::Logs;
pub use options::ConnectOptions;
pub use ps::Ps;
pub use result::ResultOf;
pub use run::Run;
pub use status::Status;
pub use submit::Submit;
pub use top::Top;

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
    /// Run a command in a container, and end as it ends.
    ///
    /// Its output comes while it runs. The exit code is the command's own; 124 when its time was
    /// over, 125 when it could not be run, 126 when the command cannot be executed, 127 when it is
    /// not there, 130 after Ctrl-C, which cancels the job. Ctrl-C again leaves at once.
    Run(Box<Run>),
    /// Hand in many requests: a JSON object a line, or one JSON document.
    ///
    /// The id of each is printed once it is accepted. A line that cannot be handed in is reported
    /// with its number, and the rest still goes. The exit code is 0 if all were accepted, and with
    /// --wait, if all succeeded.
    Submit(Submit),
    /// List the jobs of which there is a record, those that have ended with --all.
    ///
    /// A request that waits for its first worker has no record yet; how many of those there are is
    /// said on standard error.
    Ps(Ps),
    /// Say where a job is, and what became of it.
    Status(Status),
    /// Print what a job printed.
    ///
    /// Both streams together, as they arrived; where one of them is too big for a message, all of
    /// standard output and then all of standard error.
    Result(ResultOf),
    /// Print what a job printed, its standard error to standard error; with -f what it prints.
    Logs(Logs),
    /// Stop jobs, queued or running.
    ///
    /// The exit code is 0 if each of them is being stopped or will not start.
    Cancel(Cancel),
    /// Look after requests that could not be run.
    DeadLetters(DeadLetters),
    /// Watch workers, queue, outcomes and jobs live, on a terminal.
    Top(Top),
    /// Examine what the daemon needs, and say what to do about what is wrong.
    ///
    /// Reads the settings as the daemon would, and looks at NATS, the streams, the permissions, the
    /// engine, the registries' credentials and the disk. Changes nothing. With --run it hands in one
    /// job, too, and waits for its end; Ctrl-C has it cancelled. The exit code is 0 when nothing
    /// failed, 1 when something did, 78 when the settings are wrong, and with --run 130 or 143 after
    /// SIGINT or SIGTERM.
    Check(Check),
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
            Self::Run(command) => client(async { Ok(command.run().await) }),
            Self::Status(command) => client(command.run()),
            Self::Result(command) => client(command.run()),
            Self::Cancel(command) => client(command.run()),
            Self::Submit(command) => client(command.run()),
            Self::Ps(command) => client(command.run()),
            Self::Logs(command) => client(command.run()),
            Self::DeadLetters(command) => client(command.run()),
            Self::Top(command) => client(command.run()),
            Self::Check(command) => client(command.run()),
        }
    }
}

/// Does what takes a connection.
fn client(command: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(command);
    // Somebody may still be asked for input, or for a host's address: nobody waits for that.
    runtime.shutdown_background();
    match code {
        // Whoever read what was printed has enough.
        Err(error) if error.is::<print::Closed>() => Ok(exit::BROKEN_PIPE),
        code => code,
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
