//! What to do, and for the daemon its life: settings, log, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use worker_spawner::app;
use worker_spawner::cli::{Cli, Command};
use worker_spawner::config::{Config, EX_CONFIG};
use worker_spawner::log::Log;
use worker_spawner::orders::Orders;
use worker_spawner::shutdown::Signals;

fn main() -> ExitCode {
    let command = Cli::parse().command.unwrap_or(Command::Serve);
    // Two libraries bring TLS along; both are to use this implementation of its ciphers.
    // Nothing else has installed one before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if matches!(command, Command::Serve) {
        return daemon();
    }
    match command.run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("worker-spawner: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn daemon() -> ExitCode {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("worker-spawner: {error}");
            return ExitCode::from(EX_CONFIG);
        }
    };
    let log = Log::start(&config);
    match serve(config, log) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(config: Config, log: Log) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime
        .block_on(async { app::run(config, log, Signals::install()?, Orders::install()?).await });
    // A credential helper that hangs must not keep the process.
    runtime.shutdown_background();
    code
}
