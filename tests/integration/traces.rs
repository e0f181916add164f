//! The trace a request is part of, on its way through the function and onto the result.

use async_nats::HeaderMap;
use serde_json::json;

use crate::support::engine::Engine;
use crate::support::nats::{NatsOptions, NatsVersion};
use crate::support::results::header;
use crate::support::wait::{PATIENCE, within};
use crate::support::world::World;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const STATE: &str = "vendor=value,other=1";

fn headers(parent: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", parent);
    headers.insert("tracestate", STATE);
    headers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_trace_reaches_the_function_and_the_result() {
    let mut worlds = vec![World::start(&[]).await];
    for version in NatsVersion::all() {
        let options = NatsOptions::durable(version);
        worlds.push(World::durable_with(options, Engine::shared().await, &[]).await);
    }
    for world in worlds {
        let print = json!({"parameter": ["sh", "-c", "echo $TRACEPARENT $TRACESTATE"]});
        let (_, request) = world.complete(print.clone());
        let ended = world.execute_raw(request.to_string().into(), headers(PARENT)).await;
        assert_eq!(ended.text(), format!("{PARENT} {STATE}\n"));
        assert_eq!(ended.header("traceparent").as_deref(), Some(PARENT));
        assert_eq!(ended.header("tracestate").as_deref(), Some(STATE));
        let log = world.daemon.log();
        log.wait_for("the job's end in the log", |event| {
            event["fields"]["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
        })
        .await;
        // A reply names it as well.
        let (_, request) = world.complete(print.clone());
        let (client, payload) = (&world.client, request.to_string());
        let asked = client.request_with_headers("functions.run", headers(PARENT), payload.into());
        let answer = within("an answer to functions.run", PATIENCE, asked).await.unwrap();
        assert_eq!(header(&answer, "traceparent").as_deref(), Some(PARENT));
        // The request's own word counts for more, and what is no trace for nothing.
        let mut own = print.clone();
        own["env"] = json!({"TRACEPARENT": "mine"});
        let (_, request) = world.complete(own);
        let ended = world.execute_raw(request.to_string().into(), headers(PARENT)).await;
        assert_eq!(ended.text(), format!("mine {STATE}\n"));
        let (_, request) = world.complete(print);
        let ended = world.execute_raw(request.to_string().into(), headers("00-0-0-0")).await;
        assert_eq!((ended.text().as_str(), ended.header("traceparent")), ("\n", None));
    }
}
