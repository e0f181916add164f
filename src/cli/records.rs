//! Job records and stored objects, as clients read them.

use std::time::Duration;

use anyhow::{anyhow, bail};
use async_nats::jetstream::kv::{Operation, Store};
use bytes::Bytes;
use tokio::io::AsyncReadExt;

use super::client::Link;
use super::print;
use crate::capture::Stream;
use crate::job::JobId;
use crate::protocol::record::Record;

/// How long the object store may take for the next part of an object.
const PART_PATIENCE: Duration = Duration::from_secs(15);
/// Bytes of an object that are held at once.
const PART: usize = 64 << 10;

/// The record of a job, as far as anybody keeps one.
///
/// # Errors
/// It cannot be read.
pub(super) async fn look(link: &Link, id: &JobId) -> anyhow::Result<Option<Record>> {
    let bucket = link.jetstream.get_key_value(&link.names.jobs).await?;
    read(link, &bucket, id.as_str()).await
}

/// The record of a job.
///
/// # Errors
/// There is none, or it cannot be read; `command` is who asks.
pub(super) async fn find(link: &Link, command: &str, id: &JobId) -> anyhow::Result<Record> {
    let bucket = link.records(command).await?;
    match read(link, &bucket, id.as_str()).await? {
        Some(record) => Ok(record),
        None => bail!(
            "there is no record of {id}: it waits for its first worker, came by functions.run or without JetStream, or is long over"
        ),
    }
}

/// The record under a key; nothing where there is none, or none that is understood.
///
/// # Errors
/// It cannot be read.
pub(super) async fn read(link: &Link, bucket: &Store, key: &str) -> anyhow::Result<Option<Record>> {
    let entry = bucket.entry(key).await;
    let entry = entry
        .map_err(|error| link.news.explain(format!("the record {key} cannot be read: {error}")))?;
    let Some(entry) = entry.filter(|entry| entry.operation == Operation::Put) else {
        return Ok(None);
    };
    Ok(Record::decode(&entry.value).ok())
}

/// Prints an object from byte `skip` on.
///
/// # Errors
/// It cannot be read, or not be printed.
pub(super) async fn copy_object(
    link: &Link,
    bucket: &str,
    name: &str,
    skip: u64,
    stream: Stream,
) -> anyhow::Result<()> {
    let trouble =
        |why: &dyn std::fmt::Display| anyhow!("the object {bucket}/{name} cannot be read: {why}");
    let store = link.objects("result", bucket).await?;
    let mut object = store.get(name).await.map_err(|error| trouble(&error))?;
    let mut skip = skip;
    let mut part = vec![0; PART];
    loop {
        let length = match tokio::time::timeout(PART_PATIENCE, object.read(&mut part)).await {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(length)) => length,
            Ok(Err(error)) => return Err(trouble(&error)),
            Err(_) => return Err(trouble(&"the object store takes too long")),
        };
        let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(length);
        skip -= skipped as u64;
        print::write(stream, Bytes::copy_from_slice(&part[skipped..length])).await?;
    }
}
