//! How the agent gets into an engine: into a volume, once, named by its content.
//!
//! A bind mount would name a file on the engine's host, where the daemon may not be: it may run in a
//! container itself, or on another machine. A volume is filled through the API.

use std::collections::HashMap;
use std::sync::OnceLock;

use bollard::Docker;
use bollard::models::{ContainerCreateBody, HostConfig, Mount, MountType, VolumeCreateRequest};
use bollard::query_parameters::{
    CreateImageOptions, ListVolumesOptions, RemoveImageOptions, RemoveVolumeOptions,
    UploadToContainerOptions,
};
use futures::TryStreamExt;

use crate::agent;
use crate::backend::docker::Shared;
use crate::backend::docker::container::Container;
use crate::backend::docker::engine::CallError;
use crate::backend::docker::spec::{AGENT_DIR, LABEL_INSTANCE};

/// What the names of all such volumes begin with.
const PREFIX: &str = "worker-spawner-agent-";
/// What the agent's file is called in its volume.
const FILE: &str = "agent";

/// The name of the volume with this build's agent.
pub(super) fn name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| format!("{PREFIX}{}", &agent::digest()[..16]))
}

/// Sees to it that the engine has the agent. With `again`, whatever it seems to have.
pub(super) async fn deliver(shared: &std::sync::Arc<Shared>, again: bool) -> Result<(), CallError> {
    let engine = &shared.engine;
    let found = engine
        .call("look for the agent's volume", |d| async move { d.inspect_volume(name()).await });
    match found.await {
        Ok(_) if !again => return Ok(()),
        Ok(_) => {}
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    let request = VolumeCreateRequest {
        name: Some(name().to_owned()),
        labels: Some(HashMap::from([("worker-spawner.agent".to_owned(), String::new())])),
        ..VolumeCreateRequest::default()
    };
    engine
        .call("create the agent's volume", |d| async move { d.create_volume(request).await })
        .await?;
    // A volume is reached through a container, and a container has an image. Neither lives for long.
    let image = import_empty_image(shared).await?;
    let container = Container::new(shared.clone(), "agent");
    let filled = fill(shared, &container, &image).await;
    if let Err(error) = container.remove().await {
        tracing::warn!(%error, "the container that carried the agent is left to the reaper");
    }
    let query = None::<RemoveImageOptions>;
    let removed = engine
        .call("remove an image", |d| async move { d.remove_image(&image, query, None).await });
    if let Err(error) = removed.await {
        // Another instance is just doing the same.
        tracing::debug!(%error, "the image that carried the agent stays for now");
    }
    filled?;
    tracing::info!(volume = name(), "the engine has the agent for warm containers");
    remove_others(shared).await;
    Ok(())
}

/// An image with nothing in it but a directory. Returns its id.
async fn import_empty_image(shared: &Shared) -> Result<String, CallError> {
    let options = CreateImageOptions { from_src: Some("-".to_owned()), ..Default::default() };
    let layer = archive(|tar| tar.append_data(&mut header(0, 0o755, true), "empty/", &[][..]));
    let import = |d: Docker| async move {
        d.create_image(Some(options), Some(bollard::body_full(layer.into())), None)
            .try_fold(None, |id, said| futures::future::ok(said.status.or(id)))
            .await
    };
    let id = shared.engine.call("import an empty image", import).await?;
    id.ok_or_else(|| CallError::Unreachable { why: "it names no image it imported".to_owned() })
}

async fn fill(shared: &Shared, container: &Container, image: &str) -> Result<(), CallError> {
    let mount = Mount {
        typ: Some(MountType::VOLUME),
        source: Some(name().to_owned()),
        target: Some(AGENT_DIR.to_owned()),
        ..Mount::default()
    };
    let owner = shared.owner.labels().into_iter().map(|(name, value)| (name.to_owned(), value));
    let instance = (LABEL_INSTANCE.to_owned(), shared.options.instance.clone());
    let body = ContainerCreateBody {
        image: Some(image.to_owned()),
        // Never started.
        cmd: Some(vec![FILE.to_owned()]),
        labels: Some(owner.chain([instance]).collect()),
        network_disabled: Some(true),
        host_config: Some(HostConfig { mounts: Some(vec![mount]), ..HostConfig::default() }),
        ..ContainerCreateBody::default()
    };
    container.create(body).await?;
    let size = agent::BINARY.len() as u64;
    let tar = archive(|tar| tar.append_data(&mut header(size, 0o755, false), FILE, agent::BINARY));
    let options = UploadToContainerOptions { path: AGENT_DIR.to_owned(), ..Default::default() };
    let handle = container.handle();
    shared
        .engine
        .call("take the agent", |d| async move {
            d.upload_to_container(&handle, Some(options), bollard::body_full(tar.into())).await
        })
        .await
}

fn header(size: u64, mode: u32, is_dir: bool) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    header.set_entry_type(if is_dir { tar::EntryType::Directory } else { tar::EntryType::Regular });
    header
}

/// An archive of what is added to it. What is written to memory does not fail.
fn archive(add: impl FnOnce(&mut tar::Builder<Vec<u8>>) -> std::io::Result<()>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    match add(&mut tar).and_then(|()| tar.into_inner()) {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::error!(%error, "an archive could not be made");
            Vec::new()
        }
    }
}

/// Removes the volumes of other builds' agents, unless they are in use.
async fn remove_others(shared: &Shared) {
    let query = ListVolumesOptions {
        filters: Some(HashMap::from([("name".to_owned(), vec![PREFIX.to_owned()])])),
    };
    let list = |d: Docker| async move { d.list_volumes(Some(query)).await };
    let Ok(found) = shared.engine.call("list volumes", list).await else { return };
    for volume in found.volumes.unwrap_or_default() {
        if volume.name.starts_with(PREFIX) && volume.name != name() {
            remove(shared, &volume.name).await;
        }
    }
}

/// Removes this build's volume, unless it is in use: another instance may share it.
pub(super) async fn withdraw(shared: &Shared) {
    remove(shared, name()).await;
}

async fn remove(shared: &Shared, name: &str) {
    let query = None::<RemoveVolumeOptions>;
    let remove = |d: Docker| async move { d.remove_volume(name, query).await };
    match shared.engine.call("remove a volume", remove).await {
        Ok(()) => tracing::debug!(volume = name, "removed an agent's volume"),
        Err(error) if error.is_not_found() || error.is_conflict() => {}
        Err(error) => tracing::debug!(volume = name, %error, "an agent's volume stays"),
    }
}
