//! Standard input on its way to a function.

use std::io::Cursor;
use std::os::fd::AsFd;

use anyhow::Context as _;
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::client::Link;
use crate::job::JobId;

/// Standard input, so that nothing else waits for it.
///
/// # Errors
/// There is none.
pub(super) fn standard() -> anyhow::Result<tokio::fs::File> {
    let input = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    Ok(tokio::fs::File::from_std(input.into()))
}

/// Reads all of `input` and puts it into the request: into the message where it is text and fits,
/// else into an object. Returns the object's name.
///
/// # Errors
/// It cannot be read, or needs an object and there is no store for it.
pub(super) async fn attach(
    link: &Link,
    id: &JobId,
    request: &mut Map<String, Value>,
    mut input: impl AsyncRead + Unpin,
) -> anyhow::Result<Option<String>> {
    let limit = link.client.max_payload();
    let mut begun = Vec::new();
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    (&mut input).take(most).read_to_end(&mut begun).await.context("standard input")?;
    let begun = match String::from_utf8(begun) {
        Ok(text) if text.len() <= limit => {
            request.insert("stdin".to_owned(), text.into());
            let size = serde_json::to_vec(&request).map(|json| json.len())?;
            if size <= limit {
                return Ok(None);
            }
            match request.remove("stdin") {
                Some(Value::String(text)) => text.into_bytes(),
                _ => Vec::new(),
            }
        }
        Ok(text) => text.into_bytes(),
        Err(error) => error.into_bytes(),
    };
    let store = link.objects("run -i", &link.names.objects).await.context(
        "standard input is not UTF-8, or does not fit into a message, and so needs an object store",
    )?;
    let name = format!("stdin/{id}");
    let mut all = Cursor::new(begun).chain(input);
    let stored = store.put(name.as_str(), &mut all).await;
    stored.map_err(|error| anyhow::anyhow!("standard input cannot be stored: {error}"))?;
    request.insert("stdin_object".to_owned(), name.as_str().into());
    Ok(Some(name))
}

/// Removes an input whose job has ended. Else it goes when its time is over.
pub(super) async fn forget(link: &Link, name: &str) {
    if let Ok(store) = link.objects("run -i", &link.names.objects).await {
        let _ = store.delete(name).await;
    }
}
