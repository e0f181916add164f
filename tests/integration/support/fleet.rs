//! Several daemons on one NATS server that keeps streams, each behind a link of its own that can
//! be stalled and cut.

use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bollard::models::ContainerSummary;
use serde_json::{Value, json};

use super::daemon::{Daemon, Settings, message_of};
use super::engine::{Engine, INSTANCE_LABEL, job_of, label};
use super::images::Image;
use super::nats::{NatsOptions, NatsServer, NatsVersion};
use super::process::Signal;
use super::proxy::{Flow, Proxy};
use super::runs::Runs;
use super::streams::{EXECUTE, Streams, header};
use super::wait::{PATIENCE, eventually, within};
use super::world::{Held, held};

/// What makes faults show soon. Nothing is as large as its default: servers reserve what streams
/// may hold.
pub(crate) const HASTY: [(&str, &str); 12] = [
    ("DELIVERY", "jetstream"),
    ("MAX_CONTAINERS", "2"),
    ("ACK_WAIT", "3s"),
    ("REAP_INTERVAL", "1s"),
    ("STOP_GRACE", "1s"),
    ("SHUTDOWN_GRACE", "1s"),
    ("PUBLISH_TIMEOUT", "2s"),
    ("ENGINE_TIMEOUT", "5s"),
    ("QUEUE_MAX_BYTES", "16MiB"),
    ("RESULTS_MAX_BYTES", "16MiB"),
    ("OBJECT_LIMIT", "1MiB"),
    ("RUST_LOG", "info,worker_spawner=debug"),
];

/// The NATS server to hurt: the installed one, or the current one with
/// WORKER_SPAWNER_CHAOS_NATS=current.
pub(crate) fn server_version() -> NatsVersion {
    match std::env::var("WORKER_SPAWNER_CHAOS_NATS").as_deref() {
        Ok("current") => NatsVersion::Current,
        Ok(other) => panic!("WORKER_SPAWNER_CHAOS_NATS is current or nothing, not {other}"),
        Err(_) => NatsVersion::Installed,
    }
}

/// A daemon, how it was started, and its way to NATS.
pub(crate) struct Worker {
    pub(crate) daemon: Daemon,
    pub(crate) link: Proxy,
    pub(crate) settings: Settings,
}

impl Worker {
    pub(crate) async fn spawn(nats: &NatsServer, settings: &Settings) -> Self {
        let link = Proxy::to(port_of(nats), Flow::Open).await;
        let address = format!("nats://127.0.0.1:{}", link.port);
        let settings = settings.clone().set("NATS_URL", &address);
        Self { daemon: Daemon::spawn(&settings), link, settings }
    }

    /// Another daemon in the place of this one, which is killed if it still runs.
    pub(crate) fn respawn(&mut self) {
        self.daemon = Daemon::spawn(&self.settings);
    }

    /// Starts it so that it aborts at the `hit`th time a job comes past `point`.
    pub(crate) fn respawn_to_abort(&mut self, point: &str, hit: usize) {
        self.daemon = Daemon::spawn(&self.settings.clone().failpoint(point, hit));
    }

    /// Waits until it has aborted.
    pub(crate) async fn aborted(&mut self) {
        use std::os::unix::process::ExitStatusExt;
        let status = self.daemon.exit().await;
        let aborted = status.signal() == Some(Signal::ABORT.as_raw());
        assert!(aborted, "it ended with {status}: {}", self.daemon.log().text());
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn terminate(&mut self) -> ExitStatus {
        self.daemon.signal(Signal::TERM);
        self.daemon.exit().await
    }

    /// What it calls itself, once it is ready.
    pub(crate) async fn name(&self) -> String {
        let ready = self.daemon.log().wait_for("ready", |event| message_of(event) == "ready").await;
        ready["fields"]["worker"].as_str().unwrap().to_string()
    }
}

/// The only outcome of a job.
#[derive(Debug)]
pub(crate) struct Once {
    pub(crate) status: String,
    pub(crate) code: String,
    pub(crate) attempt: u32,
    /// What it printed.
    pub(crate) text: String,
    /// The daemon that the record names.
    pub(crate) worker: String,
}

/// The fields are dropped in this order: the daemons go before what they need.
pub(crate) struct Fleet {
    pub(crate) workers: Vec<Worker>,
    pub(crate) runs: Runs,
    pub(crate) streams: Streams,
    pub(crate) nats: NatsServer,
    pub(crate) engine: Engine,
    /// The name of the busybox image.
    pub(crate) image: String,
    settings: Settings,
    prefix: String,
    counter: AtomicUsize,
}

impl Fleet {
    /// So many daemons on the shared engine, with these settings beside the [`HASTY`] ones.
    pub(crate) async fn start(daemons: usize, settings: &[(&str, &str)]) -> Self {
        let engine = Engine::shared().await;
        let nats = NatsServer::with(NatsOptions::durable(server_version())).await;
        Self::on(nats, engine, daemons, settings).await
    }

    /// As [`start`](Self::start), on servers that exist already.
    pub(crate) async fn on(
        nats: NatsServer,
        engine: Engine,
        daemons: usize,
        settings: &[(&str, &str)],
    ) -> Self {
        let image = engine.image(Image::Busybox).await;
        let settings =
            Settings::new().nats(&nats).engine(&engine).set_all(&HASTY).set_all(settings);
        let mut fleet = Self {
            workers: Vec::new(),
            runs: Runs::watch(&engine),
            streams: Streams::new(&nats.client().await),
            nats,
            engine,
            image,
            settings,
            prefix: format!("f{}", super::unique()),
            counter: AtomicUsize::new(0),
        };
        for _ in 0..daemons {
            fleet.join().await;
        }
        fleet
    }

    /// One daemon more, ready for work.
    pub(crate) async fn join(&mut self) -> &mut Worker {
        let mut worker = Worker::spawn(&self.nats, &self.settings).await;
        worker.daemon.wait_ready().await;
        self.workers.push(worker);
        self.workers.last_mut().unwrap()
    }

    /// A job id of this fleet's.
    pub(crate) fn id(&self) -> String {
        format!("{}-{}", self.prefix, self.counter.fetch_add(1, Ordering::SeqCst))
    }

    /// Has a request accepted, and returns its id.
    pub(crate) async fn submit(&self, request: Value) -> String {
        self.submit_at(EXECUTE, request).await
    }

    async fn submit_at(&self, subject: &str, mut request: Value) -> String {
        let id = self.id();
        request["id"] = json!(id);
        if request.get("image_reference").is_none() {
            request["image_reference"] = json!(self.image);
        }
        self.streams.submit(subject, &id, &request).await;
        id
    }

    /// Starts a job that runs until [`release`](Self::release), and waits until it does.
    pub(crate) async fn hold(&self) -> Held {
        self.hold_at(EXECUTE).await
    }

    /// The same, published on `subject`.
    pub(crate) async fn hold_at(&self, subject: &str) -> Held {
        let id = self.submit_at(subject, held(json!({}))).await;
        let container = self.engine.running(&id).await;
        Held { id, container }
    }

    /// Waits until a container other than `held`'s runs its job.
    pub(crate) async fn taken_over(&self, held: &Held) -> Held {
        let what = format!("{} runs once more", held.id);
        let container = within(&what, PATIENCE, async {
            loop {
                let all = self.engine.running_all(&held.id).await;
                if let Some(other) = all.into_iter().find(|other| *other != held.container) {
                    return other;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Held { id: held.id.clone(), container: container.await }
    }

    /// Lets a held job end by itself, with success.
    pub(crate) async fn release(&self, held: &Held) {
        self.engine.exec(&held.container, &["touch", "/tmp/go"]).await;
    }

    /// Waits until the engine has told of all runs so far: it tells of one more after them.
    pub(crate) async fn told(&self) {
        let id = self.submit(json!({"parameter": "true"})).await;
        self.streams.result(&id).await;
        eventually("the engine tells of the last run", || async { self.runs.of(&id) > 0 }).await;
    }

    /// Which of the daemons a job is held by.
    pub(crate) async fn holder(&self, held: &Held) -> usize {
        let all = self.engine.containers().await;
        let same = |other: &&ContainerSummary| other.id.as_deref() == Some(&held.container);
        let name = label(all.iter().find(same).unwrap(), INSTANCE_LABEL).unwrap();
        for (n, worker) in self.workers.iter().enumerate() {
            if worker.name().await == name {
                return n;
            }
        }
        panic!("no daemon is called {name}");
    }

    /// Lets the held job `id` end wherever it runs, now or later, and returns its only outcome.
    pub(crate) async fn finish(&self, id: &str) -> Once {
        let releasing = async {
            loop {
                for container in self.engine.running_all(id).await {
                    // It may have ended meanwhile.
                    let _ = self.engine.try_exec(&container, &["touch", "/tmp/go"]).await;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            once = self.ended_once(id) => once,
            () = releasing => unreachable!("it goes on for ever"),
        }
    }

    /// Waits until the job `id` has ended and is settled. There must be one outcome of it then,
    /// and a record that says the same.
    pub(crate) async fn ended_once(&self, id: &str) -> Once {
        self.streams.result(id).await;
        let record = self.streams.recorded(id, |record| record["state"] == "ended").await;
        self.streams.settled().await;
        let outcomes = self.streams.results_of(id).await.unwrap();
        let shown: Vec<_> = outcomes.iter().map(|outcome| &outcome.headers).collect();
        assert_eq!(outcomes.len(), 1, "one outcome of {id}: {shown:?}");
        let header = |name| header(&outcomes[0], name);
        let once = Once {
            status: header("Job-Status"),
            code: header("Job-Error"),
            attempt: header("Job-Attempt").parse().unwrap(),
            text: String::from_utf8_lossy(&outcomes[0].payload).into_owned(),
            worker: record["worker"].as_str().unwrap_or_default().to_string(),
        };
        assert_eq!(header("Nats-Msg-Id"), id, "its duplicates are recognised");
        assert_eq!(record["status"], json!(once.status), "{record} and {shown:?}");
        assert_eq!(record["attempt"], json!(once.attempt), "{record} and {shown:?}");
        once
    }

    /// Waits until nothing is left of this fleet's jobs, in the queue or the engine.
    pub(crate) async fn clean(&self) {
        self.streams.settled().await;
        eventually("no container of this test is left", || async {
            !self.engine.containers().await.iter().any(|container| self.is_ours(container))
        })
        .await;
    }

    fn is_ours(&self, container: &ContainerSummary) -> bool {
        job_of(container).is_some_and(|id| id.starts_with(&self.prefix))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Before the containers, or they would start further ones.
        for worker in &self.workers {
            worker.daemon.signal(Signal::KILL);
        }
        let prefix = self.prefix.clone();
        self.engine.remove_containers_blocking(move |container| {
            job_of(container).is_some_and(|id| id.starts_with(&prefix))
        });
    }
}

fn port_of(nats: &NatsServer) -> u16 {
    nats.url().rsplit(':').next().unwrap().parse().unwrap()
}
