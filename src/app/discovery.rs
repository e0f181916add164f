//! The daemon as a NATS service.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::json;

use crate::config::Config;
use crate::intake::Intake;
use crate::protocol::schema;
use crate::service::{Endpoint, Service, Tally};

/// How the endpoints fare.
#[derive(Default)]
pub(super) struct Tallies {
    pub(super) run: Arc<Tally>,
    pub(super) cancel: Arc<Tally>,
    pub(super) status: Arc<Tally>,
}

/// What this instance is to whoever looks for NATS services.
pub(super) fn service(
    config: &Config,
    worker: &str,
    delivery: &str,
    tallies: &Tallies,
    intake: &Intake,
) -> Service {
    let subjects = &config.subjects;
    let endpoint =
        |name, subject: &str, group: Option<&str>, schemas, tally: &Arc<Tally>| Endpoint {
            name,
            subject: subject.to_owned(),
            queue_group: group.map(str::to_owned),
            metadata: schemas,
            tally: tally.clone(),
        };
    let group = Some(config.queue_group.as_str());
    let (max_containers, jobs) = (config.max_containers, intake.jobs.clone());
    Service {
        id: worker.to_owned(),
        metadata: BTreeMap::from([
            ("delivery", delivery.to_owned()),
            ("subject_prefix", subjects.prefix().to_owned()),
        ]),
        endpoints: vec![
            endpoint("run", &subjects.run, group, schema::of_run(), &tallies.run),
            endpoint("cancel", &subjects.cancel, None, schema::of_cancel(), &tallies.cancel),
            endpoint("status", &subjects.status, group, schema::of_status(), &tallies.status),
        ],
        state: Box::new(move || json!({"max_containers": max_containers, "jobs": jobs.len()})),
        started: SystemTime::now(),
    }
}
