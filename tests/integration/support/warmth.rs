//! Jobs that start in containers which wait for them.
//!
//! With WORKER_SPAWNER_TEST_START=warm, worlds have such containers unless they say otherwise, and a
//! request is held back until one waits that can serve it: the tests then say of this way to start
//! what they say of the other. How many did start so is written to the file that
//! WORKER_SPAWNER_TEST_STARTS names, one line for each world.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

use bollard::models::ContainerSummary;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::daemon::Settings;
use super::world::{Ended, World};

/// How long a container may take to wait for a request. Then it goes without, and is counted.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a container runs before its daemon can be taken to know that it waits.
const SETTLED: SignedDuration = SignedDuration::from_millis(300);
/// How long a request may take to get the container that waits for it: all slots may be taken.
const TAKEN_PATIENCE: Duration = Duration::from_secs(3);
/// What ids of jobs begin with that were run so that their like start warm.
const PRIMER: &str = "primer-";

/// Whether jobs are to start warm where the tests do not say.
pub(crate) fn is_default() -> bool {
    std::env::var("WORKER_SPAWNER_TEST_START").is_ok_and(|value| value == "warm")
}

/// What a world's daemon is started with beside what its test says.
pub(crate) fn settings(image: &str) -> Vec<(&'static str, String)> {
    if is_default() {
        vec![("WARM_CONTAINERS", "4".to_string()), ("WARM_IMAGES", image.to_string())]
    } else {
        Vec::new()
    }
}

/// Whether this is the id of a job no test has asked for.
pub(crate) fn is_primer(id: &str) -> bool {
    id.starts_with(PRIMER)
}

/// An end that says whether and how the job had started.
pub(crate) trait Start {
    fn outcome(&self) -> &Value;
}

impl Start for Value {
    fn outcome(&self) -> &Value {
        self
    }
}

impl Start for Ended {
    fn outcome(&self) -> &Value {
        &self.outcome
    }
}

/// What is fixed when a container starts to wait.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    image: String,
    user: Option<String>,
}

/// A world's containers that wait, as far as its requests need them.
pub(crate) struct Warmth {
    /// How many there may be, where requests wait for one.
    capacity: Option<usize>,
    /// The kinds the daemon has been asked for.
    known: Mutex<BTreeSet<Kind>>,
    /// Of those who send a request, one at a time: each must get the container it has seen.
    turn: tokio::sync::Mutex<()>,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    warm: usize,
    eligible: usize,
    cold: Vec<String>,
}

impl Warmth {
    pub(crate) fn of(settings: &Settings, image: &str) -> Self {
        let capacity = settings.get("WARM_CONTAINERS").map(str::parse::<usize>);
        let capacity = capacity.and_then(Result::ok).filter(|capacity| *capacity > 0);
        let mut known = BTreeSet::new();
        if settings.get("WARM_IMAGES") == Some(image) {
            known.insert(Kind { image: image.to_string(), user: None });
        }
        Self {
            capacity: capacity.filter(|_| is_default()),
            known: known.into(),
            turn: tokio::sync::Mutex::default(),
            counts: Mutex::default(),
        }
    }

    /// Whether of so many containers without a job's name each can be one that waits.
    pub(crate) fn rests(&self, idle: usize) -> bool {
        self.capacity.is_none_or(|capacity| idle <= capacity)
    }

    /// Waits until a container does that can serve `request`, if there can be one.
    pub(crate) async fn wait_for(&self, world: &World, request: &Value) {
        if let Some(kind) = self.kind_of(request)
            && self.known.lock().unwrap().contains(&kind)
        {
            let _turn = self.turn.lock().await;
            self.fitting(world, &kind).await;
        }
    }

    /// Has `job` send `request` when a container waits that can serve it, if there can be one.
    pub(crate) async fn run<T: Start>(
        &self,
        world: &World,
        request: &Value,
        job: impl Future<Output = T>,
    ) -> T {
        let Some(kind) = self.kind_of(request) else { return job.await };
        let turn = self.turn.lock().await;
        // Who is not known to the engine would be pulled, and that is the test's business.
        if !self.known.lock().unwrap().contains(&kind)
            && world.engine.docker().inspect_image(&kind.image).await.is_ok()
        {
            self.prime(world, &kind).await;
        }
        let waiting = self.fitting(world, &kind).await;
        let mut job = std::pin::pin!(job);
        let ended = tokio::select! {
            biased;
            ended = &mut job => {
                if ended.outcome()["start"] == "warm" {
                    taken(world, &waiting).await;
                }
                drop(turn);
                ended
            }
            () = taken(world, &waiting) => {
                drop(turn);
                job.await
            }
        };
        self.count(request, ended.outcome());
        ended
    }

    fn count(&self, request: &Value, outcome: &Value) {
        let mut counts = self.counts.lock().unwrap();
        match outcome["start"].as_str() {
            Some("warm") => counts.warm += 1,
            Some(_) => counts.cold.push(format!("{request:.300}")),
            // It never ran.
            None => return,
        }
        counts.eligible += 1;
    }

    /// The kind of container that could serve `request`; nothing where none can.
    fn kind_of(&self, request: &Value) -> Option<Kind> {
        self.capacity?;
        let has_labels = request["labels"].as_object().is_some_and(|labels| !labels.is_empty());
        let has_network = request["network"].as_str().is_some_and(|network| network != "none");
        if has_labels || has_network {
            return None;
        }
        let text = |field: &str| request[field].as_str().map(ToString::to_string);
        Some(Kind { image: text("image_reference")?, user: text("user") })
    }

    /// Lets the daemon see a job of this kind, whatever comes of it.
    async fn prime(&self, world: &World, kind: &Kind) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let mut request = json!({"image_reference": kind.image});
            request["id"] = json!(format!("{PRIMER}{}", super::unique()));
            if let Some(user) = &kind.user {
                request["user"] = json!(user);
            }
            let outcome = world.run_complete(&request).await;
            if outcome["error"]["code"] != "busy" {
                self.known.lock().unwrap().insert(kind.clone());
                return;
            }
        }
    }

    /// Those that wait and can serve `kind`, once there is one, or it has taken too long.
    async fn fitting(&self, world: &World, kind: &Kind) -> Vec<String> {
        let known = self.known.lock().unwrap().contains(kind);
        let deadline = Instant::now() + PATIENCE;
        while known && Instant::now() < deadline {
            let fitting = self.fitting_now(world, kind).await;
            if !fitting.is_empty() {
                return fitting;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Vec::new()
    }

    async fn fitting_now(&self, world: &World, kind: &Kind) -> Vec<String> {
        let docker = world.engine.docker();
        let Ok(image) = docker.inspect_image(&kind.image).await else { return Vec::new() };
        let mut fitting = Vec::new();
        for container in world.idle().await {
            if container.image_id != image.id {
                continue;
            }
            let Some(id) = container.id else { continue };
            let Ok(inspected) = docker.inspect_container(&id, None).await else { continue };
            let runs = inspected.state.is_some_and(|state| {
                let since: Option<Timestamp> = state.started_at.and_then(|at| at.parse().ok());
                let for_long =
                    since.is_some_and(|at| Timestamp::now().duration_since(at) > SETTLED);
                state.running == Some(true) && for_long
            });
            let user = inspected.config.and_then(|config| config.user).unwrap_or_default();
            if runs && self.is_user(kind, &user) {
                fitting.push(id);
            }
        }
        fitting
    }

    /// Whether containers of `kind` have this user. Who names none has one that nobody has named.
    fn is_user(&self, kind: &Kind, user: &str) -> bool {
        match &kind.user {
            Some(wanted) => wanted == user,
            None => {
                self.known.lock().unwrap().iter().all(|kind| kind.user.as_deref() != Some(user))
            }
        }
    }
}

/// Waits until one of those that wait does not any more.
async fn taken(world: &World, waiting: &[String]) {
    let deadline = Instant::now() + TAKEN_PATIENCE;
    while !waiting.is_empty() && Instant::now() < deadline {
        let idle: Vec<ContainerSummary> = world.idle().await;
        let idle: BTreeSet<&str> = idle.iter().filter_map(|found| found.id.as_deref()).collect();
        if !waiting.iter().all(|id| idle.contains(id.as_str())) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Drop for Warmth {
    fn drop(&mut self) {
        if self.capacity.is_none() {
            return;
        }
        let counts = self.counts.get_mut().unwrap();
        let test = std::thread::current().name().unwrap_or("?").to_string();
        let line = format!("{} {} {test}", counts.warm, counts.eligible);
        eprintln!("started warm, of those that could have: {line}");
        for request in &counts.cold {
            eprintln!("started cold: {request}");
        }
        if let Ok(path) = std::env::var("WORKER_SPAWNER_TEST_STARTS") {
            let file = File::options().create(true).append(true).open(path);
            // In one write: other tests append as well.
            let written = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
            if let Err(error) = written {
                eprintln!("the starts are not counted: {error}");
            }
        }
    }
}
