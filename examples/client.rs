//! Runs a command in a container, twice: with `functions.run` and with `functions.execute`.
//!
//! ```text
//! cargo run --example client -- IMAGE [ARGUMENT ...]
//! ```
//!
//! `NATS_URL` names the server, `nats://localhost:4222` by default.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use async_nats::client::{Request, RequestErrorKind};
use async_nats::{Client, Message};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

/// How long an outcome is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let mut args = std::env::args().skip(1);
    let Some(image) = args.next() else {
        eprintln!("usage: client IMAGE [ARGUMENT ...]");
        return Ok(ExitCode::from(2));
    };
    let request = json!({ "image_reference": image, "parameter": args.collect::<Vec<_>>() });
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".to_owned());
    let client = async_nats::connect(url).await?;
    let mut stdout = std::io::stdout();

    let outcome = run(&client, &request).await?;
    writeln!(stdout, "run: {} {}", text(&outcome["status"]), code(&outcome))?;
    stdout.write_all(&stream(&outcome, "stdout")?)?;
    std::io::stderr().write_all(&stream(&outcome, "stderr")?)?;
    if let Some(error) = outcome.get("error") {
        eprintln!("{} {}", text(&error["code"]), text(&error["message"]));
    }

    let message = execute(&client, request).await?;
    let header = |name| {
        let headers = message.headers.as_ref();
        headers.and_then(|h| h.get(name)).map_or("-", |v| v.as_str())
    };
    writeln!(stdout, "execute: {} {}", header("Job-Status"), header("Job-Exit-Code"))?;
    stdout.write_all(&message.payload)?;

    let exit_code = outcome["exit_code"].as_u64().and_then(|c| u8::try_from(c).ok());
    Ok(ExitCode::from(exit_code.unwrap_or(1)))
}

/// Asks for a run and waits for its outcome; comes back later while all slots are taken.
async fn run(client: &Client, request: &Value) -> anyhow::Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    let mut delay = Duration::from_millis(100);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let asked = Request::new().payload(request.to_string().into()).timeout(Some(left));
        let reply = match client.send_request("functions.run", asked).await {
            Err(e) if e.kind() == RequestErrorKind::NoResponders => {
                anyhow::bail!("nobody listens on functions.run: is worker-spawner running?")
            }
            reply => reply?,
        };
        let outcome: Value = serde_json::from_slice(&reply.payload)?;
        let busy = outcome["error"]["code"] == "busy";
        if !busy || left < delay {
            return Ok(outcome);
        }
        sleep(delay).await;
        delay = (2 * delay).min(Duration::from_secs(2));
    }
}

/// Hands in a request and waits for the message about it on `functions.results`.
///
/// A service would keep one subscription open for all its jobs and tell them apart by `Job-Id`.
async fn execute(client: &Client, mut request: Value) -> anyhow::Result<Message> {
    let id = uuid::Uuid::now_v7().to_string();
    request["id"] = id.clone().into();
    // First listen, then ask: NATS keeps nothing for those who come late. Both travel on one
    // connection, in this order.
    let mut results = client.subscribe("functions.results").await?;
    let asked = Request::new().payload(request.to_string().into()).timeout(Some(PATIENCE));
    let reply = client.send_request("functions.execute", asked).await?;
    let reply: Value = serde_json::from_slice(&reply.payload)?;
    // Where a stream keeps the requests, the reply is the server's: it has this one, or why not.
    // Where none does, the reply is the outcome, which has a status.
    if reply.get("error").is_some() && reply.get("status").is_none() {
        anyhow::bail!("not accepted: {}", text(&reply["error"]["description"]));
    }
    let mine = async {
        while let Some(message) = results.next().await {
            let headers = message.headers.as_ref();
            let job = headers.and_then(|h| h.get("Job-Id"));
            if job.is_some_and(|job| job.as_str() == id) {
                return Ok(message);
            }
        }
        anyhow::bail!("the connection was closed")
    };
    timeout(PATIENCE, mine).await.context("no result in time")?
}

/// One of the outcome's streams; bytes that are not UTF-8 come in base64.
fn stream(outcome: &Value, name: &str) -> anyhow::Result<Vec<u8>> {
    let output = text(&outcome[name]);
    Ok(if outcome[format!("{name}_encoding")] == "base64" {
        BASE64.decode(output)?
    } else {
        output.as_bytes().to_vec()
    })
}

fn code(outcome: &Value) -> String {
    outcome["exit_code"].as_i64().map_or_else(|| "-".to_owned(), |code| code.to_string())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
