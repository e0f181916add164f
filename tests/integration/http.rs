//! What the daemon says of itself over HTTP.

use std::collections::BTreeSet;
use std::net::TcpListener;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::{Engine, PrivateEngine};
use crate::support::http::{Metrics, address, ask, exchange, get, readiness};
use crate::support::nats::{NatsOptions, NatsServer};
use crate::support::process::Signal;
use crate::support::prometheus::{Prometheus, check_metrics, promtool};
use crate::support::wait::eventually;
use crate::support::world::World;

const ANY_PORT: (&str, &str) = ("HTTP_ADDR", "127.0.0.1:0");
/// Traces are exported. No collector is needed to count what does not get there.
const EXPORTING: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_address_that_cannot_be_had_is_named() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    // The last is reserved for documentation, and so nobody's.
    for addr in [taken.as_str(), "localhost", "127.0.0.1", "[::1:80", "192.0.2.1:80"] {
        let mut daemon = Daemon::spawn(&Settings::new().set("HTTP_ADDR", addr));
        let status = daemon.exit().await;
        let told = daemon.log().text();
        assert_eq!(status.code(), Some(78), "{addr}: {told}");
        assert!(told.contains("HTTP_ADDR"), "{addr}: {told}");
        assert!(!addr.contains(".1:") || told.contains(addr), "it says which: {told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn each_reason_not_to_be_ready_is_named() {
    let mut nats = NatsServer::absent(NatsOptions::default());
    let mut engine = PrivateEngine::absent().await;
    let settings = Settings::new().nats(&nats).set("DOCKER_HOST", &engine.host());
    let mut daemon = Daemon::spawn(&settings.set(ANY_PORT.0, ANY_PORT.1));
    let addr = address(&daemon).await;
    readiness(addr, &["starting", "engine: it does not answer", "nats"]).await;
    assert_eq!(get(addr, "/healthz").await.status, 200, "it lives all the same");
    let wanted = [("ready", 0.0), ("engine_up", 0.0), ("nats_connected", 0.0)];
    Metrics::become_these(addr, &wanted).await;

    nats.restart().await;
    readiness(addr, &["engine: it does not answer"]).await;
    engine.restart().await;
    daemon.wait_ready().await;
    readiness(addr, &[]).await;
    let wanted = [("ready", 1.0), ("engine_up", 1.0), ("nats_connected", 1.0)];
    Metrics::become_these(addr, &wanted).await;
    let before = Metrics::of(addr).await.get("nats_reconnects_total").unwrap();

    nats.stop();
    readiness(addr, &["nats: there is no connection"]).await;
    engine.freeze();
    readiness(addr, &["engine: it does not answer", "nats: there is no connection"]).await;
    assert_eq!(get(addr, "/healthz").await.status, 200, "it lives all the same");
    engine.thaw();
    readiness(addr, &["nats: there is no connection"]).await;
    nats.restart().await;
    readiness(addr, &[]).await;
    let now = Metrics::of(addr).await.get("nats_reconnects_total");
    assert!(now > Some(before), "{now:?} reconnects, and {before} before");
    engine.kill().await;
    readiness(addr, &["engine: it does not answer"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn it_answers_while_it_drains() {
    let mut world = World::start(&[ANY_PORT]).await;
    let addr = address(&world.daemon).await;
    let held = world.hold().await;
    let wanted = [("jobs_running", 1.0), ("slots_used", 1.0), ("slots", 5.0)];
    Metrics::become_these(addr, &wanted).await;
    world.daemon.signal(Signal::TERM);
    readiness(addr, &["draining"]).await;
    assert_eq!(get(addr, "/healthz").await.status, 200, "a drain is no breakdown");
    Metrics::become_these(addr, &[("ready", 0.0), ("jobs_running", 1.0)]).await;
    world.release(&held).await;
    assert!(world.daemon.exit().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn strangers_get_little_and_not_for_long() {
    let world = World::start(&[ANY_PORT]).await;
    let addr = address(&world.daemon).await;
    assert_eq!(get(addr, "/").await.status, 404);
    assert_eq!(get(addr, "/metrics/more").await.status, 404);
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        assert_eq!(ask(addr, method, "/metrics", "").await.status, 405, "{method}");
    }
    let head = ask(addr, "HEAD", "/readyz", "").await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    let metrics = get(addr, "/metrics").await;
    let open_metrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(metrics.headers["content-type"], open_metrics);
    assert!(metrics.body.ends_with("# EOF\n"), "{}", metrics.body);

    let endless = format!("GET /healthz HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    assert!(!exchange(addr, endless.as_bytes()).await.contains("200 OK"));
    // Those who say nothing take no place for ever: there are fewer places than they are.
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(tokio::net::TcpStream::connect(addr).await.unwrap());
    }
    let slow = exchange(addr, b"GET /healthz HTTP/1.1\r\n").await;
    assert_eq!(slow, "", "half a request has no answer");
    assert_eq!(get(addr, "/healthz").await.status, 200);
    world.works(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn jobs_of_each_kind_are_counted() {
    let world =
        World::start(&[ANY_PORT, ("MAX_CONTAINERS", "1"), ("RUN_SLOT_TIMEOUT", "0s")]).await;
    let addr = address(&world.daemon).await;
    let metrics = Metrics::of(addr).await;
    assert_eq!(metrics.get("jobs_total{status=\"succeeded\",code=\"none\"}"), Some(0.0));
    assert_eq!(metrics.get("requests_waiting{subject=\"execute\"}"), Some(0.0));
    let version = format!("build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(metrics.get(&version), Some(1.0));

    for (request, status) in [
        (json!({"parameter": "echo hello"}), "succeeded"),
        (json!({"parameter": "sh -c 'exit 3'"}), "failed"),
        (json!({"parameter": "sleep 60", "timeout_ms": 300}), "timed_out"),
        (json!({"parameter": "no-such-command"}), "rejected"),
        (json!({"parameter": "echo", "unknown": 1}), "rejected"),
        (json!({"parameter": "echo", "expires_at": "2001-01-01T00:00:00Z"}), "cancelled"),
    ] {
        assert_eq!(world.execute(request).await.status(), status);
    }
    let held = world.hold().await;
    let waiting = world.submit(json!({"parameter": "echo waited"})).await;
    let busy = world.run(json!({"parameter": "echo"})).await;
    assert_eq!(busy["error"]["code"], "busy", "{busy}");
    let wanted = [
        ("jobs_total{status=\"succeeded\",code=\"none\"}", 1.0),
        ("jobs_total{status=\"failed\",code=\"none\"}", 1.0),
        ("jobs_total{status=\"timed_out\",code=\"job.timed_out\"}", 1.0),
        ("jobs_total{status=\"rejected\",code=\"command.not_found\"}", 1.0),
        ("jobs_total{status=\"rejected\",code=\"request.invalid_field\"}", 1.0),
        ("jobs_total{status=\"cancelled\",code=\"job.expired\"}", 1.0),
        ("jobs_total{status=\"error\",code=\"busy\"}", 1.0),
        ("jobs_total{status=\"error\",code=\"engine.unavailable\"}", 0.0),
        ("dead_letters_total", 2.0),
        ("retries_total", 0.0),
        ("starts_total{start=\"cold\"}", 3.0),
        ("starts_total{start=\"warm\"}", 0.0),
        ("queue_seconds_count", 3.0),
        ("pull_seconds_count", 3.0),
        ("create_seconds_count", 3.0),
        ("start_seconds_count{start=\"cold\"}", 3.0),
        ("run_seconds_count", 3.0),
        ("run_seconds_bucket{le=\"+Inf\"}", 3.0),
        ("job_seconds_count", 3.0),
        ("publish_seconds_count", 6.0),
        ("jobs_running", 1.0),
        ("requests_waiting{subject=\"execute\"}", 1.0),
        ("warm_hits_total", 0.0),
        ("warm_misses_total{reason=\"off\"}", 5.0),
    ];
    Metrics::become_these(addr, &wanted).await;
    world.release(&held).await;
    for id in [&held.id, &waiting] {
        world.results.wait_for(id).await;
    }
    let wanted = [
        ("jobs_total{status=\"succeeded\",code=\"none\"}", 3.0),
        ("jobs_running", 0.0),
        ("slots_used", 0.0),
        ("requests_waiting{subject=\"execute\"}", 0.0),
    ];
    Metrics::become_these(addr, &wanted).await;
    let metrics = Metrics::of(addr).await;
    for name in [world.image.as_str(), held.id.as_str()] {
        assert!(!metrics.text().contains(name), "{name} is nobody's label:\n{}", metrics.text());
    }
    check_metrics(addr).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn containers_that_wait_are_counted() {
    let world = {
        let engine = Engine::shared().await;
        let image = engine.image(crate::support::images::Image::Busybox).await;
        let settings = [ANY_PORT, ("WARM_CONTAINERS", "1"), ("WARM_IMAGES", image.as_str())];
        World::with(NatsOptions::default(), engine, &settings).await
    };
    let addr = address(&world.daemon).await;
    let wanted = [("warm_containers_waiting", 1.0), ("warm_containers_made_total", 1.0)];
    Metrics::become_these(addr, &wanted).await;
    let ended = world.execute(json!({"parameter": "true"})).await;
    assert_eq!(ended.outcome["start"], "warm", "{}", ended.outcome);
    world.execute(json!({"parameter": "true", "labels": {"a": "b"}})).await;
    let wanted = [
        ("warm_hits_total", 1.0),
        ("warm_misses_total{reason=\"labels\"}", 1.0),
        ("starts_total{start=\"warm\"}", 1.0),
        ("start_seconds_count{start=\"warm\"}", 1.0),
        ("starts_total{start=\"cold\"}", 1.0),
        ("create_seconds_count", 1.0),
        ("warm_containers_waiting", 1.0),
        ("warm_containers_made_total", 2.0),
    ];
    Metrics::become_these(addr, &wanted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_that_wait_in_the_stream_are_counted() {
    let world = World::durable(&[ANY_PORT, ("MAX_CONTAINERS", "1")]).await;
    let addr = address(&world.daemon).await;
    let held = world.hold().await;
    for _ in 0..5 {
        world.submit(json!({"parameter": "true"})).await;
    }
    // One of them may have been fetched before the slot was taken.
    eventually("the depth of the queue is known", || async {
        let depth = Metrics::of(addr).await.get("queue_requests{priority=\"normal\"}");
        depth.is_some_and(|depth| (4.0..=5.0).contains(&depth))
    })
    .await;
    world.release(&held).await;
    let wanted = [
        ("queue_requests{priority=\"normal\"}", 0.0),
        ("queue_requests{priority=\"low\"}", 0.0),
        ("jobs_total{status=\"succeeded\",code=\"none\"}", 6.0),
        ("publish_seconds_count", 6.0),
    ];
    Metrics::become_these(addr, &wanted).await;
}

/// The words in `text` that are names of the daemon's metrics, or look like them.
fn named_in(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_part(c));
    words.filter(|word| word.starts_with("worker_spawner_")).map(ToString::to_string).collect()
}

fn file(path: &str) -> String {
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_written_of_metrics_is_what_there_is() {
    let world = World::durable(&[ANY_PORT, EXPORTING]).await;
    let addr = address(&world.daemon).await;
    eventually("the depth of the queue is known", || async {
        Metrics::of(addr).await.get("queue_requests{priority=\"high\"}").is_some()
    })
    .await;
    let metrics = Metrics::of(addr).await;
    let names = metrics.names();
    for path in [
        "deploy/prometheus/alerts.yml",
        "deploy/prometheus/alerts_test.yml",
        "deploy/grafana/worker-spawner.json",
        "docs/OPERATING.md",
    ] {
        let unknown: Vec<_> = named_in(&file(path)).difference(&names).cloned().collect();
        assert!(unknown.is_empty(), "{path} names what there is not: {unknown:?}");
    }
    let documented = named_in(&file("docs/OPERATING.md"));
    let is_documented = |family: &String| {
        ["", "_total", "_info"].iter().any(|end| documented.contains(&format!("{family}{end}")))
    };
    let missing: Vec<_> = metrics.families().into_iter().filter(|f| !is_documented(f)).collect();
    assert!(missing.is_empty(), "docs/OPERATING.md does not explain {missing:?}");
}

/// The queries of a dashboard, wherever they are in it.
fn queries(dashboard: &Value, found: &mut Vec<String>) {
    match dashboard {
        Value::Object(fields) => {
            found.extend(fields.get("expr").and_then(Value::as_str).map(ToString::to_string));
            fields.values().for_each(|value| queries(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_has_a_place_for_each_panel() {
    let dashboard: Value =
        serde_json::from_str(&file("deploy/grafana/worker-spawner.json")).unwrap();
    let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(!title.is_empty() && ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{title} is too wide");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(places.insert((x, y)), "{title} covers another panel");
            }
        }
        // Whoever imports it chooses where the figures come from.
        let is_row = panel["type"] == "row";
        assert!(is_row || panel["datasource"]["uid"] == "${datasource}", "{panel}");
    }
}

#[test]
fn promtool_accepts_the_rules_and_the_configuration() {
    promtool(&["check", "rules"], "deploy/prometheus/alerts.yml");
    promtool(&["test", "rules"], "deploy/prometheus/alerts_test.yml");
    promtool(&["check", "config"], "deploy/prometheus/prometheus.yml");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn prometheus_scrapes_a_daemon_under_load() {
    let world = World::durable(&[ANY_PORT, EXPORTING, ("MAX_CONTAINERS", "3")]).await;
    let addr = address(&world.daemon).await;
    let prometheus = Prometheus::watching(addr).await;
    prometheus.finds("up{job=\"worker-spawner\"}", |up| up == 1.0).await;
    const JOBS: usize = 24;
    let jobs = (0..JOBS).map(|_| world.execute(json!({"parameter": "sleep 0.3"})));
    let busy = prometheus.finds("max_over_time(worker_spawner_slots_used[5m])", |used| used == 3.0);
    let (ended, ()) = tokio::join!(join_all(jobs), busy);
    assert!(ended.iter().all(|ended| ended.status() == "succeeded"));
    let all = |count: f64| count == JOBS as f64;
    for query in [
        "sum by (status) (worker_spawner_jobs_total{code=\"none\", status=\"succeeded\"})",
        "worker_spawner_run_seconds_count",
        "worker_spawner_run_seconds_bucket{le=\"+Inf\"}",
        "worker_spawner_publish_seconds_count",
        "sum(worker_spawner_starts_total)",
    ] {
        prometheus.finds(query, all).await;
    }
    let median = "histogram_quantile(0.5, rate(worker_spawner_run_seconds_bucket[5m]))";
    prometheus.finds(median, |seconds| (0.25..60.0).contains(&seconds)).await;
    // It took every scrape for what it is: a counter is known as one, with its explanation.
    let about = prometheus.json("/api/v1/metadata?metric=worker_spawner_run_seconds").await;
    let about = &about["data"]["worker_spawner_run_seconds"][0];
    assert_eq!(
        (about["type"].as_str(), about["unit"].as_str()),
        (Some("histogram"), Some("seconds"))
    );
    // Few scrapes failed, if any: the machine may be busier than a second allows for.
    prometheus.finds("avg_over_time(up{job=\"worker-spawner\"}[5m])", |up| up > 0.5).await;

    // The rules hold against what is there, and so do the dashboard's queries.
    let rules = prometheus.json("/api/v1/rules").await;
    let rules = rules["data"]["groups"][0]["rules"].as_array().unwrap();
    eventually("all rules were evaluated", || async {
        let rules = prometheus.json("/api/v1/rules").await;
        let rules = rules["data"]["groups"][0]["rules"].as_array().unwrap().clone();
        rules.iter().all(|rule| rule["health"] == "ok")
    })
    .await;
    assert!(rules.len() > 10, "{rules:?}");
    let dashboard: Value =
        serde_json::from_str(&file("deploy/grafana/worker-spawner.json")).unwrap();
    let mut asked = Vec::new();
    queries(&dashboard, &mut asked);
    assert!(asked.len() > 10, "{asked:?}");
    for query in asked {
        let query = query
            .replace("$__rate_interval", "1m")
            .replace("$job", "worker-spawner")
            .replace("$instance", ".*");
        let path =
            percent_encoding::utf8_percent_encode(&query, percent_encoding::NON_ALPHANUMERIC);
        let found = prometheus.json(&format!("/api/v1/query?query={path}")).await;
        assert_eq!(found["status"], "success", "{query}: {found}");
        let series = found["data"]["result"].as_array().unwrap();
        // There are no warm containers here.
        assert!(!series.is_empty() || query.contains("_warm_"), "{query} finds nothing");
    }
}
