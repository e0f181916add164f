//! What the daemon says over HTTP: a client as plain as can be, and the metrics it is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::daemon::{Daemon, message_of};
use super::wait::{PATIENCE, eventually, within};

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// By their names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

/// Where the daemon listens, once it does.
pub(crate) async fn address(daemon: &Daemon) -> SocketAddr {
    let listens = |event: &_| message_of(event) == "metrics and health are served";
    let event = daemon.log().wait_for("the daemon listens", listens).await;
    event["fields"]["addr"].as_str().unwrap().parse().unwrap()
}

/// Sends `request` as it is, and returns all that comes back until the other side hangs up.
pub(crate) async fn exchange(addr: SocketAddr, request: &[u8]) -> String {
    within("an answer over HTTP", PATIENCE, async {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        // A server that has seen enough hangs up before the end.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    })
    .await
}

/// Asks with these header lines.
pub(crate) async fn ask(addr: SocketAddr, method: &str, path: &str, headers: &str) -> Answer {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {addr}\r\n{headers}\r\n");
    let answer = exchange(addr, request.as_bytes()).await;
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_string())).collect();
    Answer { status, headers, body: body.to_string() }
}

pub(crate) async fn get(addr: SocketAddr, path: &str) -> Answer {
    ask(addr, "GET", path, "").await
}

/// Waits until `/readyz` gives these reasons, by what each line begins with; none for ready.
pub(crate) async fn readiness(addr: SocketAddr, reasons: &[&str]) {
    let status = if reasons.is_empty() { 200 } else { 503 };
    let reasons = if reasons.is_empty() { &["ok"] } else { reasons };
    eventually(&format!("/readyz says {reasons:?}"), || async {
        let answer = get(addr, "/readyz").await;
        let lines: Vec<&str> = answer.body.lines().collect();
        let fits = |(line, reason): (&&str, &&str)| line.starts_with(reason);
        answer.status == status
            && lines.len() == reasons.len()
            && lines.iter().zip(reasons).all(fits)
    })
    .await;
}

/// All series with their values.
pub(crate) struct Metrics(String);

impl Metrics {
    pub(crate) async fn of(addr: SocketAddr) -> Self {
        let answer = get(addr, "/metrics").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        Self(answer.body)
    }

    /// The value of a series, named as in the text without the prefix of all.
    pub(crate) fn get(&self, series: &str) -> Option<f64> {
        self.0.lines().find_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            let is_it = name.strip_prefix("worker_spawner_")? == series;
            is_it.then(|| value.parse().unwrap())
        })
    }

    pub(crate) fn text(&self) -> &str {
        &self.0
    }

    /// The names of all families, and of all series without their labels.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        let series = self.0.lines().filter(|line| !line.starts_with('#'));
        let series = series.filter_map(|line| line.split(['{', ' ']).next());
        let families = self.families();
        series.map(ToString::to_string).chain(families).collect()
    }

    /// The names of all families.
    pub(crate) fn families(&self) -> BTreeSet<String> {
        let types = self.0.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        types.filter_map(|line| line.split(' ').next()).map(ToString::to_string).collect()
    }

    /// Waits until each of these series has its value.
    pub(crate) async fn become_these(addr: SocketAddr, wanted: &[(&str, f64)]) {
        eventually(&format!("the metrics are {wanted:?}"), || async {
            let metrics = Self::of(addr).await;
            wanted.iter().all(|(series, value)| metrics.get(series) == Some(*value))
        })
        .await;
    }
}
