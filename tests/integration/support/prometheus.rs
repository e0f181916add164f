//! A real Prometheus, and its tool that checks what others have written.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

use super::http::get;
use super::process::{self, bound_to_this_thread, free_port};
use super::wait::eventually;

/// A server that scrapes what it is told to, gone when dropped.
pub(crate) struct Prometheus {
    child: Child,
    addr: SocketAddr,
    dir: TempDir,
}

impl Prometheus {
    /// Starts one that looks at `target` every second, with the project's rules.
    pub(crate) async fn watching(target: SocketAddr) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus/alerts.yml");
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\n\
             rule_files: ['{}']\n\
             scrape_configs:\n- job_name: worker-spawner\n  static_configs: [{{targets: ['{target}']}}]\n",
            rules.display()
        );
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
        std::fs::write(path("prometheus.yml"), config).unwrap();
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let log = std::fs::File::create(path("log")).unwrap();
        let child = bound_to_this_thread("prometheus")
            .args([format!("--config.file={}", path("prometheus.yml"))])
            .args([format!("--storage.tsdb.path={}", path("data"))])
            .args([format!("--web.listen-address={addr}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("setpriv and prometheus are needed");
        let server = Self { child, addr, dir };
        eventually("Prometheus is ready", || async {
            let stream = tokio::net::TcpStream::connect(addr).await;
            stream.is_ok() && server.answer("/-/ready").await.0 == 200
        })
        .await;
        server
    }

    /// The value of the one series that `query` yields.
    pub(crate) async fn value(&self, query: &str) -> Option<f64> {
        let query = utf8_percent_encode(query, NON_ALPHANUMERIC);
        let found = self.json(&format!("/api/v1/query?query={query}")).await;
        let series = found["data"]["result"].as_array().unwrap();
        assert!(series.len() <= 1, "more than one series: {found}");
        Some(series.first()?["value"][1].as_str().unwrap().parse().unwrap())
    }

    /// Waits until the one series that `query` yields has such a value.
    pub(crate) async fn finds(&self, query: &str, fits: impl Fn(f64) -> bool) {
        eventually(&format!("Prometheus finds {query}"), || async {
            self.value(query).await.is_some_and(&fits)
        })
        .await;
    }

    /// What it says at this path of its API.
    pub(crate) async fn json(&self, path: &str) -> Value {
        let (status, body) = self.answer(path).await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    async fn answer(&self, path: &str) -> (u16, String) {
        // It keeps connections open and sends what is long in chunks, unless it is spoken to in HTTP/1.0.
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        let answer = super::http::exchange(self.addr, request.as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        process::end(&mut self.child);
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            eprintln!("--- log of Prometheus\n{log}");
        }
    }
}

/// Has promtool check the project's file `path`, relative to its root.
pub(crate) fn promtool(check: &[&str], path: &str) {
    let checked = Command::new("promtool")
        .args(check)
        .arg(path)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("promtool is needed");
    let said = [checked.stdout, checked.stderr].map(|said| String::from_utf8(said).unwrap());
    assert!(checked.status.success(), "promtool {check:?} {path}: {}", said.concat());
}

/// Has promtool check metrics in the text format of Prometheus.
pub(crate) async fn check_metrics(addr: SocketAddr) {
    let metrics = super::http::ask(addr, "GET", "/metrics", "Accept: text/plain\r\n").await;
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let mut child = tokio::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is needed");
    child.stdin.take().unwrap().write_all(metrics.body.as_bytes()).await.unwrap();
    let checked = child.wait_with_output().await.unwrap();
    let said = [checked.stdout, checked.stderr].map(|said| String::from_utf8(said).unwrap());
    assert!(checked.status.success(), "{}\n{}", said.concat(), metrics.body);
    assert_eq!(said.concat(), "", "promtool has nothing to say against them");
    // What it must not be taken for.
    assert!(get(addr, "/metrics").await.headers["content-type"].contains("openmetrics"));
}
