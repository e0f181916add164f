//! Images of the benchmark's own, made from what the machine has: nothing is pulled.

use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bollard::models::ContainerConfig;
use bollard::query_parameters::{
    CommitContainerOptionsBuilder, CreateContainerOptions, RemoveContainerOptionsBuilder,
    UploadToContainerOptionsBuilder,
};

use crate::engine::{self, Engine, IMAGES};

/// Makes `count` images, each the benchmark's and one file that no other has, so that no two have the same id. Returns
/// their names.
pub(crate) async fn make_many(engine: &Engine, count: usize) -> Result<Vec<Arc<str>>> {
    let docker = &engine.docker;
    let id = docker.create_container(None::<CreateContainerOptions>, engine::minimal()).await?.id;
    let mut names = Vec::new();
    for n in 0..count {
        let root = tempfile::tempdir()?;
        std::fs::write(root.path().join("which"), format!("{n}\n"))?;
        let upload = UploadToContainerOptionsBuilder::default().path("/").build();
        let archive = bollard::body_full(engine::pack(root.path())?.into());
        docker.upload_to_container(&id, Some(upload), archive).await?;
        let repo = format!("{}many", *IMAGES);
        let tag = n.to_string();
        let commit = CommitContainerOptionsBuilder::default()
            .container(&id)
            .repo(&repo)
            .tag(&tag)
            .pause(false)
            .build();
        let config =
            ContainerConfig { env: Some(vec!["PATH=/bin".to_owned()]), ..Default::default() };
        docker.commit_container(commit, config).await?;
        names.push(format!("{repo}:{tag}").into());
    }
    let remove = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    docker.remove_container(&id, Some(remove)).await?;
    Ok(names)
}

/// Imports a root directory as an image.
pub(crate) fn import(archive: &mut dyn std::io::Read, name: &str, path: &str) -> Result<()> {
    let mut import = Command::new("docker")
        .args(["import", "--change", &format!("ENV PATH={path}"), "-", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("docker: the command line client is one of the contenders")?;
    let mut stdin = import.stdin.take().context("no stdin")?;
    std::io::copy(archive, &mut stdin)?;
    drop(stdin);
    ensure!(import.wait()?.success(), "docker import failed");
    Ok(())
}
