//! The servers, the daemons, and what is done to them.
//!
//! Each server has a driver that owns it and works off its part of the plan. All drivers run on
//! the test's own thread: what they start is bound to it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::chronicle::Chronicle;
use super::plan::{DAEMONS, Fault, Plan, Step, Target};
use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::{Engine, PrivateEngine};
use crate::support::fleet::HASTY;
use crate::support::images::Image;
use crate::support::nats::{NatsOptions, NatsServer, NatsVersion, Store};
use crate::support::process::Signal;
use crate::support::proxy::{Flow, Proxy};
use crate::support::streams::{CONSUMERS, QUEUE, Streams};

/// How many functions may run at once in each daemon.
pub(crate) const SLOTS: usize = 3;
/// Attempts and deliveries a job may have.
pub(crate) const MAX_DELIVER: u32 = 10;

/// How long a daemon may take to end that was asked to, whatever else is going on.
const END: Duration = Duration::from_secs(60);

/// The fields are dropped in this order: the daemons go before what they need.
pub(crate) struct Rig {
    pub(crate) daemons: Vec<Kept>,
    links: Vec<Proxy>,
    nats: NatsServer,
    pub(crate) streams: Streams,
    engine: PrivateEngine,
    /// The way to the engine, which works whenever it runs.
    pub(crate) observed: Engine,
    pub(crate) image: String,
    chronicle: Chronicle,
}

/// A daemon that is started again whenever it ends.
pub(crate) struct Kept {
    number: usize,
    settings: Settings,
    pub(crate) daemon: Daemon,
    lives: usize,
    chronicle: Chronicle,
}

impl Rig {
    /// `room` is for the streams, in bytes.
    pub(crate) async fn start(chronicle: &Chronicle, version: NatsVersion, room: usize) -> Self {
        let engine = PrivateEngine::start().await;
        let observed = engine.engine().await;
        let image = observed.image(Image::Busybox).await;
        let options = NatsOptions { store: Store::Tmpfs(room), ..NatsOptions::durable(version) };
        let nats = NatsServer::with(options).await;
        let streams = Streams::new(&nats.client().await);
        let port = nats.url().rsplit(':').next().unwrap().parse().unwrap();
        let (mut links, mut daemons) = (Vec::new(), Vec::new());
        for number in 0..DAEMONS {
            let link = Proxy::to(port, Flow::Open).await;
            let settings = Settings::new().engine(&observed).set_all(&HASTY).set_all(&[
                ("NATS_URL", &format!("nats://127.0.0.1:{}", link.port)),
                ("MAX_CONTAINERS", &SLOTS.to_string()),
                ("MAX_DELIVER", &MAX_DELIVER.to_string()),
                ("RESULTS_MAX_BYTES", &(room / 2).to_string()),
            ]);
            links.push(link);
            daemons.push(Kept::start(number, settings, chronicle));
        }
        for kept in &mut daemons {
            kept.daemon.wait_ready().await;
        }
        let chronicle = chronicle.clone();
        Self { daemons, links, nats, streams, engine, observed, image, chronicle }
    }

    /// Works off the plan, and keeps the daemons alive until `over`. `healed` is cancelled when the
    /// last fault is over.
    pub(crate) async fn drive(
        &mut self,
        plan: &Plan,
        healed: &CancellationToken,
        over: &CancellationToken,
    ) {
        let Self { daemons, links, nats, streams, engine, chronicle, .. } = self;
        // One for each driver that is done.
        let done = Semaphore::new(0);
        let drivers = u32::try_from(daemons.len() + links.len() + 2).unwrap();
        let all_done = async {
            done.acquire_many(drivers).await.unwrap().forget();
            healed.cancel();
        };
        let daemons = daemons.iter_mut().map(|kept| {
            let steps = plan.of(Target::Daemon(kept.number));
            kept.suffer_all(steps, &done, over)
        });
        let links = links.iter().enumerate().map(|(number, link)| {
            let steps = plan.of(Target::Link(number));
            drive_link(link, number, steps, chronicle, &done)
        });
        tokio::join!(
            join_all(daemons),
            join_all(links),
            drive_nats(nats, streams, plan.of(Target::Nats), chronicle, &done),
            drive_engine(engine, plan.of(Target::Engine), chronicle, &done),
            all_done,
        );
    }

    /// What the engine and the NATS server have printed.
    pub(crate) fn logs(&self) -> [(&'static str, String); 2] {
        [("engine", self.engine.log()), ("nats", self.nats.log())]
    }

    /// What runs in containers.
    pub(crate) fn processes(&self) -> Vec<String> {
        self.engine.processes()
    }

    /// What stands beside containers.
    pub(crate) fn shims(&self) -> Vec<String> {
        self.engine.shims()
    }
}

impl Kept {
    fn start(number: usize, settings: Settings, chronicle: &Chronicle) -> Self {
        let daemon = Daemon::spawn(&settings);
        let chronicle = chronicle.clone();
        let mut kept = Self { number, settings, daemon, lives: 0, chronicle };
        kept.born();
        kept
    }

    fn respawn(&mut self) {
        self.daemon = Daemon::spawn(&self.settings);
        self.born();
    }

    fn born(&mut self) {
        self.lives += 1;
        let name = format!("daemon-{}-life-{}", self.number, self.lives);
        self.chronicle.keep(name.clone(), self.daemon.log());
        self.chronicle.note(format!("{name} was started"));
    }

    async fn suffer_all(&mut self, steps: Vec<Step>, done: &Semaphore, over: &CancellationToken) {
        let chronicle = self.chronicle.clone();
        for step in steps {
            self.keep_until(chronicle.sleep_until(step.at)).await;
            self.suffer(step).await;
        }
        done.add_permits(1);
        self.keep_until(over.cancelled()).await;
    }

    /// Starts it again whenever it ends by itself.
    async fn keep_until(&mut self, until: impl Future<Output = ()>) {
        let mut until = std::pin::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => return,
                status = self.ended() => {
                    self.chronicle.died(format!("daemon {} ended by itself: {status}", self.number));
                    // As whatever looks after a service would.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    self.respawn();
                }
            }
        }
    }

    async fn ended(&mut self) -> ExitStatus {
        loop {
            if let Some(status) = self.daemon.ended() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn suffer(&mut self, step: Step) {
        let Step { fault, lasts, die, .. } = step;
        let number = self.number;
        self.chronicle.note(format!("{fault}: daemon {number}"));
        match fault {
            Fault::DaemonKilled => {
                self.daemon.signal(Signal::KILL);
                self.ended().await;
                tokio::time::sleep(lasts).await;
                self.respawn();
            }
            Fault::DaemonFrozen => {
                self.daemon.freeze();
                tokio::time::sleep(lasts).await;
                self.daemon.thaw();
                self.chronicle.note(format!("daemon {number} goes on"));
            }
            Fault::DaemonTerminated => {
                self.daemon.signal(Signal::TERM);
                let ended = tokio::time::timeout(END, self.ended()).await;
                match ended {
                    Ok(status) => {
                        self.chronicle.note(format!("daemon {number} ended: {status}"));
                        self.chronicle.count(&format!("(terminated daemon ended with {status})"));
                    }
                    Err(_) => {
                        self.chronicle.died(format!("daemon {number} did not end in {END:?}"));
                    }
                }
                tokio::time::sleep(lasts).await;
                self.respawn();
            }
            Fault::DaemonAborts(point) => {
                self.daemon.signal(Signal::KILL);
                self.ended().await;
                let hit = die % 3 + 1;
                self.daemon = Daemon::spawn(&self.settings.clone().failpoint(point, hit));
                self.born();
                let ended = tokio::time::timeout(lasts, self.ended()).await;
                let what = match ended {
                    Ok(status) if status.signal() == Some(Signal::ABORT.as_raw()) => "aborted",
                    Ok(status) => {
                        self.chronicle.died(format!("daemon {number} ended by itself: {status}"));
                        "ended otherwise"
                    }
                    Err(_) => {
                        self.daemon.signal(Signal::KILL);
                        self.ended().await;
                        "did not come there"
                    }
                };
                self.chronicle.note(format!("{fault}: daemon {number} {what}"));
                self.chronicle.count(&format!("{fault}: {what}"));
                self.respawn();
                return;
            }
            other => unreachable!("{other} is not a daemon's"),
        }
        self.chronicle.count(&fault.to_string());
    }
}

async fn drive_link(
    link: &Proxy,
    number: usize,
    steps: Vec<Step>,
    chronicle: &Chronicle,
    done: &Semaphore,
) {
    for Step { at, lasts, fault, .. } in steps {
        chronicle.sleep_until(at).await;
        chronicle.note(format!("{fault}: daemon {number}"));
        link.set(match fault {
            Fault::LinkStalled => Flow::Stalled,
            Fault::LinkCut => Flow::Cut,
            other => unreachable!("{other} is not a link's"),
        });
        tokio::time::sleep(lasts).await;
        link.set(Flow::Open);
        chronicle.note(format!("over: {fault}: daemon {number}"));
        chronicle.count(&fault.to_string());
    }
    done.add_permits(1);
}

async fn drive_nats(
    nats: &mut NatsServer,
    streams: &Streams,
    steps: Vec<Step>,
    chronicle: &Chronicle,
    done: &Semaphore,
) {
    for Step { at, lasts, fault, die, .. } in steps {
        chronicle.sleep_until(at).await;
        chronicle.note(fault.to_string());
        match fault {
            Fault::NatsKilled => {
                nats.stop();
                tokio::time::sleep(lasts).await;
                nats.restart().await;
            }
            Fault::NatsFrozen => {
                nats.pause();
                tokio::time::sleep(lasts).await;
                nats.resume();
            }
            Fault::NatsLameDuck => {
                nats.lame_duck();
                nats.ended().await;
                tokio::time::sleep(lasts).await;
                nats.restart().await;
            }
            Fault::StoreFull => {
                nats.fill_disk();
                tokio::time::sleep(lasts).await;
                nats.free_disk();
                // A server that could not write does not try again by itself, and an older one does
                // not even end when it is asked to.
                nats.restart().await;
            }
            Fault::ConsumerDeleted => {
                let consumer = CONSUMERS[die % CONSUMERS.len()];
                let deleted = streams.delete_consumer(QUEUE, consumer).await;
                chronicle.note(format!("deleting {consumer}: {deleted:?}"));
                tokio::time::sleep(lasts).await;
            }
            other => unreachable!("{other} is not NATS'"),
        }
        chronicle.note(format!("over: {fault}"));
        chronicle.count(&fault.to_string());
    }
    done.add_permits(1);
}

async fn drive_engine(
    engine: &mut PrivateEngine,
    steps: Vec<Step>,
    chronicle: &Chronicle,
    done: &Semaphore,
) {
    for Step { at, lasts, fault, .. } in steps {
        chronicle.sleep_until(at).await;
        chronicle.note(fault.to_string());
        match fault {
            Fault::EngineKilled => {
                engine.kill().await;
                tokio::time::sleep(lasts).await;
                engine.restart().await;
            }
            Fault::EngineTerminated => {
                engine.stop().await;
                tokio::time::sleep(lasts).await;
                engine.restart().await;
            }
            Fault::EngineFrozen => {
                engine.freeze();
                tokio::time::sleep(lasts).await;
                engine.thaw();
            }
            other => unreachable!("{other} is not the engine's"),
        }
        chronicle.note(format!("over: {fault}"));
        chronicle.count(&fault.to_string());
    }
    done.add_permits(1);
}
