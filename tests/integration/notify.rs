//! What the daemon tells a service manager such as systemd.

use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::net::UnixDatagram;

use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::PrivateEngine;
use crate::support::nats::{NatsOptions, NatsServer};
use crate::support::process::Signal;
use crate::support::wait::{PATIENCE, within};
use crate::support::world::World;

/// The service manager's end of the socket.
struct Manager {
    socket: UnixDatagram,
    dir: TempDir,
    /// What was told so far, line by line.
    told: Vec<String>,
}

impl Manager {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        Self { socket, dir, told: Vec::new() }
    }

    fn path(&self) -> String {
        self.dir.path().join("notify").to_str().unwrap().to_owned()
    }

    /// Waits for a message with a line that begins so, and returns its lines.
    async fn hears(&mut self, beginning: &str) -> Vec<String> {
        within(&format!("the daemon tells {beginning}"), PATIENCE, async {
            loop {
                let lines = self.next().await;
                if lines.iter().any(|line| line.starts_with(beginning)) {
                    return lines;
                }
            }
        })
        .await
    }

    async fn next(&mut self) -> Vec<String> {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).await.unwrap();
        let text = std::str::from_utf8(&message[..length]).unwrap();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        self.told.extend_from_slice(&lines);
        lines
    }

    /// Takes what has been told already.
    fn catch_up(&mut self) {
        let mut message = [0; 4096];
        while self.socket.try_recv(&mut message).is_ok() {}
    }

    fn was_told(&self, line: &str) -> usize {
        self.told.iter().filter(|told| *told == line).count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_service_manager_knows_how_the_daemon_is() {
    let mut manager = Manager::new();
    let mut world = World::start(&[("NOTIFY_SOCKET", &manager.path())]).await;
    let start = manager.hears("READY=1").await;
    assert_eq!(start, ["READY=1", "STATUS=ready; 0 jobs running"]);
    let held = world.hold().await;
    manager.hears("STATUS=ready; 1 job running").await;
    world.nats.stop();
    manager.hears("STATUS=nats: there is no connection; 1 job running").await;
    world.nats.restart().await;
    manager.hears("STATUS=ready; 1 job running").await;

    world.daemon.signal(Signal::TERM);
    let end = manager.hears("STOPPING=1").await;
    let wanted = ["STOPPING=1", "EXTEND_TIMEOUT_USEC=", "STATUS=draining"];
    assert!(end.iter().zip(wanted).all(|(line, wanted)| line.starts_with(wanted)), "{end:?}");
    let patience = end[1].split_once('=').unwrap().1.parse::<u64>().unwrap();
    assert!(patience > 30_000_000, "more than SHUTDOWN_GRACE: {patience}");
    world.release(&held).await;
    assert!(world.daemon.exit().await.success());
    assert_eq!((manager.was_told("READY=1"), manager.was_told("STOPPING=1")), (1, 1));
    assert_eq!(manager.was_told("WATCHDOG=1"), 0, "nobody asked for it: {:?}", manager.told);
}

/// A service manager that waited for ever for NATS would hold up the machine's start, and one that
/// gave up would kill a daemon whose only fault is to wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_start_ends_without_nats_and_without_an_engine() {
    let mut manager = Manager::new();
    let mut nats = NatsServer::absent(NatsOptions::default());
    let engine = PrivateEngine::absent().await;
    let settings = Settings::new().nats(&nats).set("DOCKER_HOST", &engine.host());
    let mut daemon = Daemon::spawn(&settings.set("NOTIFY_SOCKET", &manager.path()));
    let status = manager.hears("STATUS=starting").await;
    assert!(!status.contains(&"READY=1".to_owned()), "not at once: {status:?}");
    manager.hears("READY=1").await;
    let told = manager.told.join("\n");
    assert!(told.contains("engine: it does not answer; nats: there is no connection"), "{told}");

    nats.restart().await;
    manager.hears("STATUS=engine: it does not answer; 0 jobs running").await;
    daemon.signal(Signal::TERM);
    manager.hears("STOPPING=1").await;
    assert!(daemon.exit().await.success());
    assert_eq!(manager.was_told("READY=1"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_watchdog_is_fed_by_a_daemon_that_works() {
    const LIMIT: Duration = Duration::from_secs(1);
    let mut manager = Manager::new();
    let nats = NatsServer::absent(NatsOptions::default());
    let settings = Settings::new().nats(&nats).set("NOTIFY_SOCKET", &manager.path());
    let limit = LIMIT.as_micros().to_string();
    let daemon = Daemon::spawn(&settings.set("WATCHDOG_USEC", &limit));
    // Whether NATS is there does not matter: no restart would bring it back.
    manager.hears("WATCHDOG=1").await;
    let first = Instant::now();
    for _ in 0..5 {
        manager.hears("WATCHDOG=1").await;
    }
    // A message may be late, and the next one not.
    assert!(first.elapsed() >= LIMIT * 2, "at half of the limit: {:?}", first.elapsed());

    daemon.freeze();
    manager.catch_up();
    let heard = tokio::time::timeout(LIMIT * 2, manager.next()).await;
    assert!(heard.is_err(), "a daemon that stands still told {heard:?}");
    daemon.thaw();
    manager.hears("WATCHDOG=1").await;
}
