//! The trace a request is part of, on its way through the function and onto the result; and the daemon's
//! own part of it, at a collector.

use async_nats::HeaderMap;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::Client;
use crate::support::collector::{Collector, Manner, text};
use crate::support::daemon::message_of;
use crate::support::engine::Engine;
use crate::support::http::{self, Metrics};
use crate::support::images::Image;
use crate::support::nats::{NatsOptions, NatsVersion};
use crate::support::process::{Signal, free_port};
use crate::support::results::header;
use crate::support::wait::{PATIENCE, eventually, within};
use crate::support::world::{Ended, World};

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

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
/// What a secret header for the collector holds.
const SECRET: &str = "hunter2-hunter2";

/// What exports to `collector`, with a secret.
fn exporting(collector: &Collector) -> [(&'static str, String); 2] {
    let headers = format!("x-key={SECRET},x-team=a%20b");
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.clone()),
        ("OTEL_EXPORTER_OTLP_HEADERS", headers),
    ]
}

async fn world(collector: &Collector, settings: &[(&str, &str)]) -> World {
    let exporting = exporting(collector);
    let exporting: Vec<_> = exporting.iter().map(|(name, value)| (*name, value.as_str())).collect();
    World::start(&[&exporting, settings].concat()).await
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs a request that has this trace as its parent.
async fn traced(world: &World, request: Value, parent: &str) -> (String, Ended) {
    let (id, request) = world.complete(request);
    let ended = world.execute_raw(request.to_string().into(), headers(parent)).await;
    (id, ended)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_stage_of_a_job_is_a_span_below_its_callers() {
    let collector = Collector::start(Manner::Takes).await;
    let world = world(&collector, &[("OTEL_SERVICE_NAME", "jobs"), ("WARM_CONTAINERS", "0")]).await;
    let print = json!({"parameter": ["sh", "-c", "echo $TRACEPARENT $TRACESTATE"]});
    let (id, ended) = traced(&world, print, PARENT).await;
    let attempts = collector.attempts(&id, 1).await;
    let attempt = &attempts[0];
    assert_eq!(hex(&attempt.whole.trace_id), TRACE);
    assert_eq!(hex(&attempt.whole.parent_span_id), CALLER);
    assert_eq!(attempt.whole.trace_state, STATE);
    assert_eq!(attempt.whole.name, "process functions.execute");
    assert_eq!(attempt.whole.kind, SpanKind::Consumer as i32);
    assert_eq!(attempt.whole.status.clone().unwrap().code, StatusCode::Unset as i32);
    assert_eq!(attempt.stages(), ["queue", "pull", "create", "start", "run", "publish"]);
    for (name, value) in [
        ("messaging.system", "nats"),
        ("messaging.destination.name", "functions.execute"),
        ("worker_spawner.job.status", "succeeded"),
        ("worker_spawner.job.attempt", "1"),
        ("worker_spawner.job.start", "cold"),
        ("process.exit.code", "0"),
        ("container.image.name", &world.image),
    ] {
        assert_eq!(attempt.get(name).as_deref(), Some(value), "{name}");
    }
    // What follows is below its spans.
    let run = hex(&attempt.stage("run").span_id);
    assert_eq!(ended.text(), format!("00-{TRACE}-{run}-01 {STATE}\n"));
    let whole = format!("00-{TRACE}-{}-01", hex(&attempt.whole.span_id));
    assert_eq!(ended.header("traceparent"), Some(whole));
    assert_eq!(ended.header("tracestate").as_deref(), Some(STATE));

    let received = &collector.received()[0];
    assert_eq!(received.path, "/v1/traces");
    assert_eq!(received.headers["x-key"], SECRET);
    assert_eq!(received.headers["x-team"], "a b");
    assert_eq!(received.headers["content-type"], "application/x-protobuf");
    let resource = received.request.resource_spans[0].resource.clone().unwrap();
    assert_eq!(text(&resource.attributes, "service.name").as_deref(), Some("jobs"));
    let worker = ended.outcome["worker"].as_str();
    assert_eq!(text(&resource.attributes, "service.instance.id").as_deref(), worker);

    // One without a trace has its own, and the log names it.
    let ended = world.execute(json!({"parameter": "false"})).await;
    let id = ended.outcome["id"].as_str().unwrap();
    let attempts = collector.attempts(id, 1).await;
    let attempt = &attempts[0];
    assert!(attempt.whole.parent_span_id.is_empty());
    assert_ne!(hex(&attempt.whole.trace_id), TRACE);
    assert_eq!(attempt.whole.status.clone().unwrap().code, StatusCode::Error as i32);
    assert_eq!(attempt.get("error.type").as_deref(), Some("failed"));
    let trace = hex(&attempt.whole.trace_id);
    let log = world.daemon.log();
    log.wait_for("the trace in the log", |event| event["fields"]["trace_id"] == trace).await;
    assert!(!world.daemon.log().text().contains(SECRET));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_warm_start_creates_nothing_and_a_refusal_starts_nothing() {
    let collector = Collector::start(Manner::Takes).await;
    let image = Image::Busybox.name();
    let pool = [("WARM_CONTAINERS", "1"), ("WARM_IMAGES", image.as_str())];
    let world = world(&collector, &pool).await;
    let id = within("a job starts warm", PATIENCE, async {
        loop {
            let print = json!({"parameter": ["sh", "-c", "echo $TRACEPARENT"]});
            let (id, ended) = traced(&world, print, PARENT).await;
            if ended.outcome["start"] == "warm" {
                let attempts = collector.attempts(&id, 1).await;
                let run = hex(&attempts[0].stage("run").span_id);
                assert_eq!(ended.text(), format!("00-{TRACE}-{run}-01\n"));
                return id;
            }
        }
    });
    let attempts = collector.attempts(&id.await, 1).await;
    assert_eq!(attempts[0].stages(), ["queue", "pull", "start", "run", "publish"]);
    assert_eq!(attempts[0].get("worker_spawner.job.start").as_deref(), Some("warm"));

    let (id, _) = traced(&world, json!({"parameter": 1}), PARENT).await;
    let attempts = collector.attempts(&id, 1).await;
    assert_eq!(attempts[0].stages(), ["queue", "publish"]);
    assert_eq!(hex(&attempts[0].whole.parent_span_id), CALLER);
    assert_eq!(attempts[0].get("error.type").as_deref(), Some("request.invalid_field"));
    let status = attempts[0].whole.status.clone().unwrap();
    assert_eq!(status.code, StatusCode::Error as i32);
    assert!(status.message.contains("parameter"), "{status:?}");
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_attempt_is_a_span_of_one_trace() {
    let collector = Collector::start(Manner::Takes).await;
    let exporting = exporting(&collector);
    let exporting: Vec<_> = exporting.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let options = NatsOptions::durable(NatsVersion::Installed);
    let durable = World::durable_with(options, Engine::shared().await, &exporting).await;
    for world in [World::start(&exporting).await, durable] {
        let retry = json!({"max_attempts": 2, "on": ["failed"]});
        let request = json!({"parameter": "false", "retry": retry});
        let ended = world.execute(request).await;
        let id = ended.outcome["id"].as_str().unwrap().to_owned();
        let (both, outcome) = (collector.attempts(&id, 2).await, &ended.outcome);
        assert_eq!((&outcome["status"], &outcome["attempt"]), (&json!("failed"), &json!(2)));
        let [first, second] = both.as_slice() else { panic!("{both:?}") };
        assert_eq!(first.stages()[0], "queue");
        assert_eq!(first.stages().last(), Some(&"run"), "nothing was published");
        assert_eq!(second.stages()[0], "pull");
        assert_eq!(second.stages().last(), Some(&"publish"));
        assert_eq!(first.whole.trace_id, second.whole.trace_id);
        assert!(first.whole.end_time_unix_nano <= second.whole.start_time_unix_nano);
        for (attempt, number) in [(first, "1"), (second, "2")] {
            assert!(attempt.whole.parent_span_id.is_empty());
            assert_eq!(attempt.get("worker_spawner.job.attempt").as_deref(), Some(number));
            assert_eq!(attempt.whole.status.clone().unwrap().code, StatusCode::Error as i32);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_not_sampled_is_passed_on_and_not_exported() {
    let collector = Collector::start(Manner::Takes).await;
    let world = world(&collector, &[("OTEL_TRACES_SAMPLER_ARG", "0")]).await;
    let print = json!({"parameter": ["sh", "-c", "echo $TRACEPARENT"]});
    let unsampled = PARENT.replace("-01", "-00");
    let (_, ended) = traced(&world, print.clone(), &unsampled).await;
    assert_eq!(ended.text(), format!("{unsampled}\n"));
    assert_eq!(ended.header("traceparent"), Some(unsampled));
    // The share of those that do not say is none: the function is told so.
    let ended = world.execute(print.clone()).await;
    assert!(ended.text().ends_with("-00\n"), "{}", ended.text());
    // The caller's word counts for more, and what is exported comes in order.
    let (id, _) = traced(&world, print, PARENT).await;
    collector.attempts(&id, 1).await;
    assert!(collector.spans().iter().all(|span| hex(&span.trace_id) == TRACE));
    assert_eq!(collector.spans().iter().filter(|span| span.name.starts_with("process")).count(), 1);
}

/// How often the log speaks of a collector that fails.
fn complaints(world: &World) -> usize {
    let events = world.daemon.log().events();
    events.iter().filter(|event| message_of(event).starts_with("the collector does not")).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_collector_that_fails_costs_spans_and_nothing_else() {
    let collector = Collector::start(Manner::Fails).await;
    let world = world(&collector, &[("HTTP_ADDR", "127.0.0.1:0")]).await;
    let metrics = http::address(&world.daemon).await;
    let dropped = || async { Metrics::of(metrics).await.get("spans_dropped_total").unwrap() };
    world.works(2).await;
    eventually("spans are dropped", || async { dropped().await > 0.0 }).await;
    // A second batch fails as well.
    let before = dropped().await;
    world.works(2).await;
    eventually("more spans are dropped", || async { dropped().await > before }).await;
    assert_eq!(complaints(&world), 1, "{}", world.daemon.log().text());
    assert!(!world.daemon.log().text().contains(SECRET));

    collector.set(Manner::Takes);
    let ended = world.execute(json!({"parameter": "true"})).await;
    collector.attempts(ended.outcome["id"].as_str().unwrap(), 1).await;
    let again = |event: &_| message_of(event) == "the collector takes spans again";
    world.daemon.log().wait_for("that it is well again", again).await;
    assert!(Metrics::of(metrics).await.get("spans_exported_total").unwrap() > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_collector_that_is_away_or_never_answers_delays_nothing() {
    for manner in [None, Some(Manner::Hangs)] {
        let mut collector = Collector::start(manner.unwrap_or(Manner::Takes)).await;
        if manner.is_none() {
            collector.url = format!("http://127.0.0.1:{}", free_port());
        }
        let mut world = world(&collector, &[]).await;
        world.works(3).await;
        if manner.is_none() {
            let complains = |event: &_| message_of(event).starts_with("the collector does not");
            let event = world.daemon.log().wait_for("a complaint", complains).await;
            assert!(event["fields"]["why"].as_str().unwrap().contains("refused"), "{event}");
        } else {
            eventually("a batch is with the collector", || async {
                !collector.received().is_empty()
            })
            .await;
        }
        world.works(3).await;
        // What the collector does not take at the end it does not get.
        world.daemon.signal(Signal::TERM);
        assert_eq!(world.daemon.exit().await.code(), Some(0));
        assert!(complaints(&world) <= 1, "{}", world.daemon.log().text());
        if manner.is_some() {
            let text = world.daemon.log().text();
            assert!(text.contains("the spans of the last jobs are lost"), "{text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_end_of_the_daemon_exports_what_waits() {
    let collector = Collector::start(Manner::Takes).await;
    let mut world = world(&collector, &[]).await;
    let ids: Vec<_> = {
        let jobs = (0..3).map(|_| world.execute(json!({"parameter": "true"})));
        let ended = futures::future::join_all(jobs).await;
        ended.iter().map(|ended| ended.outcome["id"].as_str().unwrap().to_owned()).collect()
    };
    world.daemon.signal(Signal::TERM);
    assert_eq!(world.daemon.exit().await.code(), Some(0));
    for id in ids {
        collector.attempts(&id, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn headers_from_a_file_are_sent_as_they_are_meant() {
    let collector = Collector::start(Manner::Takes).await;
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("worker-spawner.env");
    let url = &collector.url;
    let lines = format!(
        "OTEL_EXPORTER_OTLP_ENDPOINT={url}\nOTEL_EXPORTER_OTLP_HEADERS=x-key=a%2541,x-team=b%20c\n"
    );
    std::fs::write(&file, lines).unwrap();
    let world = World::start(&[("CONFIG_FILE", file.to_str().unwrap())]).await;
    world.works(1).await;
    eventually("spans are with the collector", || async { !collector.received().is_empty() }).await;
    let received = &collector.received()[0];
    assert_eq!((&*received.headers["x-key"], &*received.headers["x-team"]), ("a%41", "b c"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_passes_on_the_trace_it_is_run_in() {
    let world = World::start(&[]).await;
    for command in ["run", "submit"] {
        let id = world.id();
        let (_, request) = world.complete(json!({"id": id, "parameter": "true"}));
        let line = request.to_string();
        let (arguments, input) = match command {
            "run" => (vec!["run", "--id", &id, &world.image, "--", "true"], ""),
            _ => (vec!["submit", "--wait"], line.as_str()),
        };
        let client = Client::of(&world, &arguments);
        let client = client.set("TRACEPARENT", PARENT).set("TRACESTATE", STATE);
        let ran = client.run_with(input.as_bytes()).await;
        let result = world.results.wait_for(&id).await;
        assert_eq!(header(&result, "traceparent").as_deref(), Some(PARENT), "{}", ran.text());
        assert_eq!(header(&result, "tracestate").as_deref(), Some(STATE));
    }
}
