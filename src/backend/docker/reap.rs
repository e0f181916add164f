//! Removes containers whose owner is dead, and this instance's own that it lost track of.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use bollard::models::ContainerSummary;
use bollard::query_parameters::ListContainersOptions;

use super::Shared;
use super::owner::{Heartbeats, LABEL_OWNER, Verdict};
use super::spec::{LABEL_DEADLINE, LABEL_INSTANCE, LABEL_JOB_ID};

/// One look at every container that an instance of this program made.
pub(super) async fn sweep(shared: &Shared) -> anyhow::Result<()> {
    let query = ListContainersOptions {
        // Failed starts leave containers that never ran.
        all: true,
        filters: Some(HashMap::from([("label".to_owned(), vec![LABEL_INSTANCE.to_owned()])])),
        ..ListContainersOptions::default()
    };
    let engine = &shared.engine;
    let containers = engine
        .call("list containers", |d| async move { d.list_containers(Some(query)).await })
        .await?;
    let mut heartbeats = shared.heartbeats.lock().await;
    if engine.is_remote() {
        heartbeats.observe(engine).await;
    }
    let owner = |c: &ContainerSummary| c.labels.as_ref()?.get(LABEL_OWNER).cloned();
    let owners = containers.iter().filter_map(owner).collect();
    heartbeats.clear(engine, &owners).await;
    let mut failures = 0;
    for container in containers {
        let Some(id) = container.id.clone() else {
            continue;
        };
        let Some(why) = dead(shared, &container, &heartbeats).await else {
            continue;
        };
        let labels = container.labels.unwrap_or_default();
        let job = labels.get(LABEL_JOB_ID).map_or("", String::as_str);
        match shared.remove(&id).await {
            Ok(()) => tracing::info!(job, container = %id, why, "removed a stray container"),
            Err(error) => {
                failures += 1;
                tracing::warn!(job, container = %id, why, %error, "could not remove a stray container");
            }
        }
    }
    anyhow::ensure!(failures == 0, "{failures} stray container(s) could not be removed");
    Ok(())
}

/// Why the container may go; nothing where it must stay.
async fn dead(
    shared: &Shared,
    container: &ContainerSummary,
    heartbeats: &Heartbeats,
) -> Option<&'static str> {
    let labels = container.labels.as_ref()?;
    // An engine may go on listing what it has removed, but not by name: there is nothing to remove.
    if container.names.as_ref().is_some_and(Vec::is_empty) {
        return None;
    }
    if labels.get(LABEL_INSTANCE) == Some(&shared.options.instance) {
        let names = container.names.as_deref().unwrap_or_default();
        let live = shared.live();
        let ours = names.iter().any(|name| live.contains(name.trim_start_matches('/')));
        return (!ours).then_some("no job of this instance needs it");
    }
    let created = container.created.and_then(|s| u64::try_from(s).ok());
    let created = SystemTime::UNIX_EPOCH + Duration::from_secs(created.unwrap_or(0));
    match shared.owner.verdict(&shared.engine, labels, created, heartbeats).await {
        Verdict::Alive => None,
        Verdict::Dead => Some("its instance is dead"),
        Verdict::Unknown => {
            let deadline: jiff::Timestamp = labels.get(LABEL_DEADLINE)?.parse().ok()?;
            (SystemTime::now() > SystemTime::from(deadline)).then_some("its deadline has passed")
        }
    }
}
