//! What to do, and for the daemon its life: settings, log, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use worker_spawner::app;
use worker_spawner::cli::{Cli, Command};
use worker_spawner::config::{Config, EX_CONFIG, LogFormat};
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
    start_log(&config);
    match serve(config) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(config: Config) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(async { app::run(config, Signals::install()?).await });
    // A credential helper that hangs must not keep the process.
    runtime.shutdown_background();
    code
}

fn start_log(config: &Config) {
    // The client library reports every try to connect; this program reports every change, and
    // what the library's events say. Who names the library in the filter gets its words, too.
    let quiet = if config.log_filter.contains("async_nats") { "" } else { ",async_nats=off" };
    let filter = format!("{}{quiet}", config.log_filter);
    // Checked with the other settings.
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => {
            log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init()
        }
        LogFormat::Json => log.json().init(),
    }
}
