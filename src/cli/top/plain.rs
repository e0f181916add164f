//! One look, as text.

use std::time::SystemTime;

use super::model::Model;
use super::view::cells;
use crate::cli::print::table;

/// All of it, for a pipe or a file.
pub(super) fn text(model: &Model, now: SystemTime) -> String {
    let (used, all) = model.slots();
    let queue = model.queue.map_or_else(
        || "not known".to_owned(),
        |queue| format!("{} waiting, {} with workers", queue.waiting, queue.taken),
    );
    let workers: Vec<Vec<String>> = model
        .workers()
        .map(|worker| {
            let (requests, errors) = worker.run;
            vec![
                worker.id.clone(),
                format!("{}/{}", worker.jobs, worker.slots),
                worker.delivery.clone(),
                requests.to_string(),
                errors.to_string(),
                worker.version.clone(),
            ]
        })
        .collect();
    let jobs: Vec<Vec<String>> = model.jobs().iter().map(|job| cells(job, now).to_vec()).collect();
    format!(
        "slots  {used} of {all} in use\nqueue  {queue}\n\n{}\n{}",
        table(&["WORKER", "JOBS", "DELIVERY", "RUNS", "ERRORS", "VERSION"], &workers),
        table(&["JOB", "IMAGE", "STATE", "AGE", "WORKER"], &jobs),
    )
}
