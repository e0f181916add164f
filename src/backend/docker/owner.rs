//! Whose a container is, and whether that instance still lives.
//!
//! An engine keeps no record of its clients, so a container's labels say who made it, in terms
//! that another instance can check:
//!
//! - the process: the kernel's boot id, the PID namespace, the PID and its start time. An observer
//!   in the same namespace of the same boot can tell for sure.
//! - the container the process runs in, where that is one of the same engine: the engine can tell
//!   for sure.
//! - on an engine that several machines share, a heartbeat: a volume whose label holds a number,
//!   replaced every [`HEARTBEAT_INTERVAL`]. Who sees it unchanged for [`HEARTBEAT_EXPIRY`] on a clock
//!   of its own knows that its owner is dead; no two clocks are compared.
//!
//! Where none of these can tell, a container is left alone until the deadline on its label.

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bollard::Docker;
use bollard::models::{ContainerInspectResponse, VolumeCreateRequest};
use bollard::query_parameters::{InspectContainerOptions, ListVolumesOptions, RemoveVolumeOptions};

use super::engine::Engine;

/// Label: the process that made the container.
pub(super) const LABEL_OWNER: &str = "worker-spawner.owner";
/// Label: the container of the process that made the container.
pub(super) const LABEL_OWNER_CONTAINER: &str = "worker-spawner.owner-container";
/// Label of a heartbeat: the owner, as in [`LABEL_OWNER`].
const LABEL_HEARTBEAT: &str = "worker-spawner.heartbeat";
/// Label of a heartbeat: a number that changes.
const LABEL_BEAT: &str = "worker-spawner.beat";

/// How often an instance on a shared engine says that it lives.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);
/// How long the heartbeat of a dead instance has not changed.
const HEARTBEAT_EXPIRY: Duration = Duration::from_secs(120);

/// A process, in terms another process of the same machine can check.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Process {
    boot_id: String,
    pid_namespace: String,
    pid: u32,
    start_ticks: u64,
}

/// What can be told of an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Alive,
    Dead,
    Unknown,
}

impl Process {
    fn this() -> Option<Self> {
        let pid = std::process::id();
        let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
        Some(Self {
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .ok()?
                .trim()
                .to_owned(),
            pid_namespace: namespace
                .to_string_lossy()
                .trim_matches(|c: char| !c.is_ascii_digit())
                .to_owned(),
            pid,
            start_ticks: start_ticks(pid)?,
        })
    }

    fn to_label(&self) -> String {
        let Self { boot_id, pid_namespace, pid, start_ticks } = self;
        format!("{boot_id}/{pid_namespace}/{pid}/{start_ticks}")
    }

    fn from_label(label: &str) -> Option<Self> {
        let mut parts = label.split('/');
        let process = Self {
            boot_id: parts.next()?.to_owned(),
            pid_namespace: parts.next()?.to_owned(),
            pid: parts.next()?.parse().ok()?,
            start_ticks: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(process)
    }

    /// Whether this process lives, as far as `observer` can tell.
    fn verdict(&self, observer: &Self) -> Verdict {
        if self.boot_id != observer.boot_id || self.pid_namespace != observer.pid_namespace {
            Verdict::Unknown
        } else if start_ticks(self.pid) == Some(self.start_ticks) {
            Verdict::Alive
        } else if sees_others() {
            Verdict::Dead
        } else {
            Verdict::Unknown
        }
    }
}

/// When a process started, in clock ticks since boot: field 22 of proc(5)'s stat. With the PID it
/// names a process for good, where a PID alone is used again. A zombie has ended.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses that may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let ended = matches!(fields.first(), Some(&"Z" | &"X"));
    fields.get(19).filter(|_| !ended)?.parse().ok()
}

/// Whether this process may see those of other users. A /proc mounted with `hidepid` hides them, and
/// what is hidden is not dead. Every PID namespace has a process 1, and it is seldom ours.
fn sees_others() -> bool {
    std::fs::read_to_string("/proc/1/stat").is_ok()
}

/// The container this process runs in, by the files the engine mounts into it.
fn own_container() -> Option<String> {
    container_in(&std::fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// The container that a process with these mounts runs in: proc(5)'s mountinfo names for each mount
/// its source in field 4 and its place in field 5. Mounts in other places are not looked at: where
/// an engine shares its mounts with the host, the host sees those of every container.
fn container_in(mountinfo: &str) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (source, place) = (fields.nth(3)?, fields.next()?);
        if !matches!(place, "/etc/hostname" | "/etc/hosts" | "/etc/resolv.conf") {
            return None;
        }
        let (_, rest) = source.rsplit_once("/containers/")?;
        let (id, _) = rest.split_once('/')?;
        let is_id = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
        is_id.then(|| id.to_owned())
    })
}

/// Who this instance is, for the labels of its containers.
pub(super) struct Identity {
    process: Option<Process>,
    /// This process' container, once the engine has confirmed that it is one of its own.
    container: OnceLock<String>,
    /// Names of the two volumes that serve as heartbeats in turn.
    heartbeats: [String; 2],
    /// When the last beat was written, in seconds since the epoch.
    last_beat: AtomicU64,
}

impl Identity {
    pub(super) fn of_this_process() -> Self {
        let id = uuid::Uuid::now_v7().simple().to_string();
        Self {
            process: Process::this(),
            container: OnceLock::new(),
            heartbeats: [0, 1].map(|n| format!("worker-spawner-heartbeat-{id}-{n}")),
            last_beat: AtomicU64::new(0),
        }
    }

    /// Asks the engine whether this process runs in one of its containers.
    pub(super) async fn locate(&self, engine: &Engine) {
        let Some(id) = own_container().filter(|_| self.container.get().is_none()) else {
            return;
        };
        let query = None::<InspectContainerOptions>;
        let own = id.as_str();
        let inspect = |d: Docker| async move { d.inspect_container(own, query).await };
        if engine.call("inspect the daemon's own container", inspect).await.is_ok() {
            // Set by another preflight meanwhile, it is the same.
            let _ = self.container.set(id);
        }
    }

    pub(super) fn labels(&self) -> Vec<(&'static str, String)> {
        let process = self.process.as_ref().map(Process::to_label).unwrap_or_default();
        // Set even where there is none: an image's own labels must not speak for the owner.
        let container = self.container.get().cloned().unwrap_or_default();
        vec![(LABEL_OWNER, process), (LABEL_OWNER_CONTAINER, container)]
    }

    /// Says on a shared engine that this instance lives, if it is time. Elsewhere the kernel or the
    /// engine knows.
    pub(super) async fn beat(&self, engine: &Engine) {
        let Some(process) = self.process.as_ref().filter(|_| engine.is_remote()) else {
            return;
        };
        let now = seconds(SystemTime::now());
        if now.saturating_sub(self.last_beat.load(Ordering::Relaxed)) < HEARTBEAT_INTERVAL.as_secs()
        {
            return;
        }
        let turn = usize::from((now / HEARTBEAT_INTERVAL.as_secs()) % 2 == 1);
        // The older of the two is replaced while the other still stands.
        self.remove_heartbeat(engine, turn).await;
        let request = VolumeCreateRequest {
            name: Some(self.heartbeats[turn].clone()),
            labels: Some(HashMap::from([
                (LABEL_HEARTBEAT.to_owned(), process.to_label()),
                (LABEL_BEAT.to_owned(), now.to_string()),
            ])),
            ..VolumeCreateRequest::default()
        };
        let created = engine
            .call("write a heartbeat", |d| async move { d.create_volume(request).await })
            .await;
        self.last_beat.store(now, Ordering::Relaxed);
        if let Err(error) = created {
            tracing::warn!(%error, "no heartbeat: neighbours may take this instance for dead");
        }
    }

    /// Takes the heartbeat back at the end of the instance's life.
    pub(super) async fn withdraw(&self, engine: &Engine) {
        if engine.is_remote() {
            self.remove_heartbeat(engine, 0).await;
            self.remove_heartbeat(engine, 1).await;
        }
    }

    async fn remove_heartbeat(&self, engine: &Engine, turn: usize) {
        remove_volume(engine, &self.heartbeats[turn]).await;
    }

    /// Whether the owner of a container with these labels still lives.
    pub(super) async fn verdict(
        &self,
        engine: &Engine,
        labels: &HashMap<String, String>,
        created: SystemTime,
        heartbeats: &Heartbeats,
    ) -> Verdict {
        let owner = labels.get(LABEL_OWNER).and_then(|l| Process::from_label(l));
        if let (Some(owner), Some(observer)) = (&owner, &self.process) {
            match owner.verdict(observer) {
                Verdict::Unknown => {}
                told => return told,
            }
        }
        if let Some(id) = labels.get(LABEL_OWNER_CONTAINER).filter(|id| !id.is_empty()) {
            // A former life of this very container, however short the time between.
            let former = owner.as_ref().zip(self.process.as_ref());
            if self.container.get() == Some(id)
                && former.is_some_and(|(owner, own)| owner.pid_namespace != own.pid_namespace)
            {
                return Verdict::Dead;
            }
            let query = None::<InspectContainerOptions>;
            let inspect = |d: Docker| async move { d.inspect_container(id, query).await };
            match engine.call("inspect an owner's container", inspect).await {
                Ok(inspected) => return container_verdict(&inspected, created),
                // It was one of this engine's when the label was written.
                Err(e) if e.is_not_found() => return Verdict::Dead,
                Err(_) => return Verdict::Unknown,
            }
        }
        owner.map_or(Verdict::Unknown, |owner| heartbeats.verdict(&owner, Instant::now()))
    }
}

/// An owner whose container stopped, or was started again after the job's was made, is dead. The
/// engine tells the latter in whole seconds.
fn container_verdict(inspected: &ContainerInspectResponse, created: SystemTime) -> Verdict {
    let state = inspected.state.as_ref();
    let running = state.and_then(|s| s.running).unwrap_or(false);
    let started: Option<jiff::Timestamp> =
        state.and_then(|s| s.started_at.as_deref()).and_then(|at| at.parse().ok());
    match started {
        _ if !running => Verdict::Dead,
        Some(started) if SystemTime::from(started) > created + Duration::from_secs(1) => {
            Verdict::Dead
        }
        _ => Verdict::Alive,
    }
}

/// The heartbeats on an engine, and since when each has not changed.
#[derive(Debug, Default)]
pub(super) struct Heartbeats {
    seen: HashMap<Process, Seen>,
}

#[derive(Debug)]
struct Seen {
    beat: u64,
    since: Instant,
    volumes: Vec<String>,
}

impl Heartbeats {
    /// Looks at the engine's heartbeats.
    pub(super) async fn observe(&mut self, engine: &Engine) {
        let filters = HashMap::from([("label".to_owned(), vec![LABEL_HEARTBEAT.to_owned()])]);
        let query = ListVolumesOptions { filters: Some(filters) };
        let list = |d: Docker| async move { d.list_volumes(Some(query)).await };
        // What cannot be seen now has not changed.
        let Ok(listed) = engine.call("list heartbeats", list).await else { return };
        let mut found: HashMap<Process, (u64, Vec<String>)> = HashMap::new();
        for volume in listed.volumes.unwrap_or_default() {
            let owner = volume.labels.get(LABEL_HEARTBEAT).and_then(|l| Process::from_label(l));
            let beat = volume.labels.get(LABEL_BEAT).and_then(|b| b.parse::<u64>().ok());
            let Some((owner, beat)) = owner.zip(beat) else { continue };
            let (last, volumes) = found.entry(owner).or_default();
            *last = beat.max(*last);
            volumes.push(volume.name);
        }
        self.update(found, Instant::now());
    }

    fn update(&mut self, found: HashMap<Process, (u64, Vec<String>)>, now: Instant) {
        let mut before = std::mem::take(&mut self.seen);
        self.seen = found
            .into_iter()
            .map(|(owner, (beat, volumes))| {
                let since = match before.remove(&owner) {
                    Some(seen) if seen.beat == beat => seen.since,
                    _ => now,
                };
                (owner, Seen { beat, since, volumes })
            })
            .collect();
    }

    fn verdict(&self, owner: &Process, now: Instant) -> Verdict {
        match self.seen.get(owner) {
            None => Verdict::Unknown,
            Some(seen) if now.duration_since(seen.since) > HEARTBEAT_EXPIRY => Verdict::Dead,
            Some(_) => Verdict::Alive,
        }
    }

    /// Removes the heartbeats of the dead, once no container is left to be judged by them.
    pub(super) async fn clear(&self, engine: &Engine, still_named: &HashSet<String>) {
        for (owner, seen) in &self.seen {
            let dead = self.verdict(owner, Instant::now()) == Verdict::Dead;
            if dead && !still_named.contains(&owner.to_label()) {
                for volume in &seen.volumes {
                    remove_volume(engine, volume).await;
                }
            }
        }
    }
}

async fn remove_volume(engine: &Engine, name: &str) {
    let query = None::<RemoveVolumeOptions>;
    let remove = |d: Docker| async move { d.remove_volume(name, query).await };
    if let Err(error) = engine.call("remove a heartbeat", remove).await
        && !error.is_not_found()
    {
        tracing::debug!(%error, "a heartbeat stays behind");
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_label_names_a_process() {
        let this = Process::this().unwrap();
        assert_eq!(Process::from_label(&this.to_label()), Some(this));
        for bad in ["", "a/b/c/d", "a/b/1", "a/b/1/2/3"] {
            assert_eq!(Process::from_label(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_process_is_judged_by_start_time_and_namespace() {
        let this = Process::this().unwrap();
        assert_eq!(this.verdict(&this), Verdict::Alive);
        let reused = Process { start_ticks: this.start_ticks + 1, ..this.clone() };
        assert_eq!(reused.verdict(&this), Verdict::Dead);
        for other in [
            Process { boot_id: "other".to_owned(), ..this.clone() },
            Process { pid_namespace: "1".to_owned(), ..this.clone() },
        ] {
            assert_eq!(other.verdict(&this), Verdict::Unknown);
        }
    }

    #[test]
    fn a_dead_process_is_dead() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let this = Process::this().unwrap();
        let owner = Process {
            pid: child.id(),
            start_ticks: start_ticks(child.id()).unwrap(),
            ..this.clone()
        };
        assert_eq!(owner.verdict(&this), Verdict::Alive);
        child.kill().unwrap();
        // Dead already as a zombie, before anybody waits for it.
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while owner.verdict(&this) == Verdict::Alive && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(owner.verdict(&this), Verdict::Dead);
        child.wait().unwrap();
        assert_eq!(owner.verdict(&this), Verdict::Dead);
    }

    #[test]
    fn a_heartbeat_that_does_not_change_is_a_dead_instances() {
        let owner = Process::this().unwrap();
        let mut beats = Heartbeats::default();
        let begun = Instant::now();
        assert_eq!(beats.verdict(&owner, begun), Verdict::Unknown);
        for (beat, at, verdict) in [
            (7, 0, Verdict::Alive),
            (7, HEARTBEAT_EXPIRY.as_secs(), Verdict::Alive),
            (7, HEARTBEAT_EXPIRY.as_secs() + 1, Verdict::Dead),
            (8, HEARTBEAT_EXPIRY.as_secs() + 2, Verdict::Alive),
        ] {
            let now = begun + Duration::from_secs(at);
            beats.update(HashMap::from([(owner.clone(), (beat, vec![]))]), now);
            assert_eq!(beats.verdict(&owner, now), verdict, "beat {beat} after {at} s");
        }
        beats.update(HashMap::new(), begun);
        assert_eq!(beats.verdict(&owner, begun), Verdict::Unknown);
    }

    #[test]
    fn the_own_container_is_known_by_the_engines_mounts() {
        let id = "0123456789abcdef".repeat(4);
        let inside = format!(
            "700 680 0:50 / / rw - overlay overlay rw\n\
             710 700 8:1 /srv/containers/docker/containers/{id}/hostname /etc/hostname rw - ext4 x rw"
        );
        assert_eq!(container_in(&inside), Some(id.clone()));
        let host = format!(
            "90 24 0:60 / /var/lib/docker/containers/{id}/mounts/shm rw - tmpfs shm rw\n\
             91 24 8:1 /etc/hostname /etc/hostname rw - ext4 x rw"
        );
        assert_eq!(container_in(&host), None);
    }

    #[test]
    fn an_owner_whose_container_ended_or_began_anew_is_dead() {
        let created = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        for (running, started_at, verdict) in [
            (true, "2023-11-14T22:13:19Z", Verdict::Alive),
            (true, "2023-11-14T22:13:20.9Z", Verdict::Alive),
            (true, "2023-11-14T22:13:22Z", Verdict::Dead),
            (false, "2023-11-14T22:13:19Z", Verdict::Dead),
        ] {
            let state = bollard::models::ContainerState {
                running: Some(running),
                started_at: Some(started_at.to_owned()),
                ..Default::default()
            };
            let inspected = ContainerInspectResponse { state: Some(state), ..Default::default() };
            assert_eq!(container_verdict(&inspected, created), verdict, "{running} {started_at}");
        }
    }
}
