//! `check`: whether the daemon would find what it needs, and what to do where it would not.

mod checks;
mod jetstream;
mod nats;
mod permissions;
mod report;
mod trial;

use clap::Args;

use super::exit;
use crate::backend::docker::examine;
use crate::config::{Config, EX_CONFIG};
use crate::finding::{Finding, Tell};
use report::Report;
use trial::Trial;

/// The arguments of `check`.
#[derive(Args, Debug)]
pub struct Check {
    /// Print a JSON array of what was found, at the end.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    trial: Trial,
}

impl Check {
    pub(super) async fn run(self) -> anyhow::Result<u8> {
        let mut report = Report::new(checks::listed(self.trial.is_wanted()), self.json);
        let config = match Config::from_env() {
            Ok(config) => config,
            Err(error) => {
                for problem in error.problems() {
                    report.add(Finding::fail(
                        "settings",
                        problem,
                        "correct this environment variable; .env.example names them all",
                    ));
                }
                report.finish()?;
                return Ok(EX_CONFIG);
            }
        };
        let mut tell = |finding| report.add(finding);
        tell(Finding::ok("settings", "all of them can be used"));
        let durable = of_nats(&config, &mut tell).await;
        examine::examine(&config.docker, &config.confinement, &config.policy, &mut tell).await;
        let signalled = match durable {
            Some(durable) => self.trial.examine(&config, durable, &mut tell).await,
            None => None,
        };
        let failed = report.finish()?;
        Ok(signalled.unwrap_or(if failed { exit::FAILED } else { exit::OK }))
    }
}

/// Returns whether the daemon would take requests from a stream, where NATS is there.
async fn of_nats(config: &Config, tell: Tell<'_>) -> Option<bool> {
    let link = nats::connect(config, tell).await?;
    nats::max_payload(config, &link, tell);
    let has_inboxes = permissions::inbox(config, &link, tell).await;
    let durable = has_inboxes && jetstream::examine(config, &link, tell).await;
    permissions::subscribe(config, &link, durable, tell).await;
    permissions::publish(config, &link, durable, tell).await;
    Some(durable)
}
