//! Publishes one request, waits for its result and prints both: what `make demo` shows.
//!
//! ```text
//! cargo run --example demo -- busybox "echo 'Hello, World!'"
//! ```
//! NATS_URL and SUBJECT_PREFIX mean what they mean to the daemon.

use std::{
    env,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use async_nats::{Client, client::RequestErrorKind};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

/// How long a daemon that is still starting is waited for.
const NOBODY_LISTENS: Duration = Duration::from_secs(30);
/// How long the result may take; an image may have to be pulled first.
const NO_RESULT: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = env::args().skip(1);
    let (Some(image), Some(parameter)) = (args.next(), args.next()) else {
        bail!("usage: demo IMAGE COMMAND");
    };
    let server = env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let prefix = env::var("SUBJECT_PREFIX").unwrap_or_else(|_| "functions".into());
    let client = async_nats::connect(&server)
        .await
        .with_context(|| format!("no NATS server at {server}"))?;

    // Subscribed and known to the server before the request goes out: core NATS keeps nothing for those who come late.
    let mut results = client.subscribe(format!("{prefix}.results")).await?;
    client.flush().await?;

    let id = format!("demo-{}", client.new_inbox().rsplit('.').next().unwrap_or_default());
    let request = json!({"id": id, "image_reference": image, "parameter": parameter}).to_string();
    println!("--> {prefix}.execute\n{request}\n");
    publish(&client, format!("{prefix}.execute"), request).await?;

    let result = timeout(NO_RESULT, async {
        while let Some(message) = results.next().await {
            let job = message.headers.as_ref().and_then(|headers| headers.get("Job-Id"));
            if job.is_some_and(|job| job.as_str() == id) {
                return Some(message);
            }
        }
        None
    })
    .await
    .context("no result in time")?
    .context("the connection ended before the result came")?;

    println!("<-- {}", result.subject);
    for (name, values) in result.headers.unwrap_or_default().iter() {
        for value in values {
            println!("{name}: {value}");
        }
    }
    println!("\n{}", String::from_utf8_lossy(&result.payload));
    Ok(())
}

/// Publishes as a request, since a server tells a requester that nobody listens yet, and tries again until somebody
/// does. Where a stream keeps the requests, the reply is the server's and says that it has this one. Where none does,
/// the reply is the outcome, which is not needed: the result comes on a subject of its own.
async fn publish(client: &Client, subject: String, request: String) -> Result<()> {
    let start = Instant::now();
    loop {
        match client.request(subject.clone(), request.clone().into()).await {
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                if start.elapsed() > NOBODY_LISTENS {
                    bail!("nobody listens on {subject}: is the daemon running, on this server?");
                }
                sleep(Duration::from_millis(100)).await;
            }
            // Delivered; the job takes longer than a request waits for its reply.
            Err(error) if error.kind() == RequestErrorKind::TimedOut => return Ok(()),
            reply => return accepted(&reply.context("the request was not delivered")?.payload),
        }
    }
}

fn accepted(reply: &[u8]) -> Result<()> {
    let reply: Value =
        serde_json::from_slice(reply).context("the reply to the request is no JSON")?;
    if let Some(stream) = reply["stream"].as_str() {
        match reply["error"]["description"].as_str() {
            Some(reason) => bail!("the stream {stream} does not take the request: {reason}"),
            None => println!("kept in the stream {stream}, as number {}\n", reply["seq"]),
        }
    }
    Ok(())
}
