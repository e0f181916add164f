//! Containers that wait for jobs: started ahead of time, used once.
//!
//! Each is of a [`Key`]: an image, and everything else that is fixed when a container is created.
//! A job takes one that fits, or goes the long way; [`Pool::tend`] makes new ones beside that. What
//! is made for whom follows from what was asked for lately, see [`plan`].

mod counters;
mod creation;
mod line;
mod plan;
mod run;
mod volume;

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::image::Image;
use crate::agent::frame::{self, Kind as Frame, Start};
use crate::backend::WarmCounts;
use crate::config;
use crate::job::{Job, JobId, Limits};
use crate::retry::Backoff;
use counters::Counters;
pub(super) use counters::Miss;
use creation::CreateError;
use plan::{Step, View, budget, next_step};
pub(super) use run::{Begun, Idle, WarmRun};

/// How long after a job took a container the next one is begun: a short function has its result by
/// then.
const LINGER: Duration = Duration::from_millis(20);
/// How often the pool looks whether what it has still lives.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Over how long jobs are counted to tell how many of a kind come close together.
const BURST: Duration = Duration::from_secs(10);
/// How old a container may get: what waited for longer is made anew.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// The most kinds that are kept in mind.
const MAX_KINDS: usize = 256;
/// Delays after a container of a kind could not be made.
const TROUBLE: Backoff = Backoff { first: Duration::from_secs(1), most: Duration::from_secs(300) };
/// Delays while the engine is away.
const ABSENCE: Backoff =
    Backoff { first: Duration::from_millis(250), most: Duration::from_secs(5) };
/// How long after the agent was delivered again it may be so once more. An instance of the same build
/// that ends takes it along where it is not in use just then.
const DELIVERY_INTERVAL: Duration = Duration::from_secs(5);

/// What is fixed when a container is created, as far as jobs differ in it. Limits are not: an engine
/// changes them for a container that waits in a fraction of the time it takes to make one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// The image's id.
    image: String,
    user: Option<String>,
    network: String,
}

impl Key {
    fn of(job: &Job, image: &Image) -> Self {
        Self { image: image.id.clone(), user: job.user.clone(), network: job.network.clone() }
    }
}

/// The containers of one key, and what is known of the need for them.
struct Kind {
    /// A job of nobody's, from which the containers are made: with the limits of the last one.
    pattern: Job,
    image: Arc<Image>,
    waiting: VecDeque<Waiting>,
    creating: usize,
    /// How many there should be: as many as were asked for close together, and one.
    want: usize,
    /// Whether the settings ask for it.
    pinned: bool,
    uses: VecDeque<Instant>,
    last_used: Option<Instant>,
    failures: u32,
    /// When the next one may be made.
    not_before: Option<Instant>,
}

struct Waiting {
    idle: Idle,
    since: Instant,
}

impl Kind {
    fn new(pattern: Job, image: Arc<Image>) -> Self {
        Self {
            pattern,
            image,
            waiting: VecDeque::new(),
            creating: 0,
            want: 0,
            pinned: false,
            uses: VecDeque::new(),
            last_used: None,
            failures: 0,
            not_before: None,
        }
    }

    fn note_use(&mut self, limits: &Limits, now: Instant, capacity: usize) {
        self.pattern.limits = Limits { timeout: self.pattern.limits.timeout, ..limits.clone() };
        self.last_used = Some(now);
        self.uses.push_back(now);
        let is_old = |at: &Instant| now.saturating_duration_since(*at) > BURST;
        while self.uses.len() > capacity || self.uses.front().is_some_and(is_old) {
            self.uses.pop_front();
        }
        self.want = self.want.max(capacity.min(self.uses.len() + 1));
    }

    /// Takes one that waits, if possible with these limits.
    fn take(&mut self, limits: &Limits) -> Option<Idle> {
        let fits = |waiting: &Waiting| waiting.idle.fits(limits);
        let at = self.waiting.iter().position(fits).unwrap_or(0);
        self.waiting.remove(at).map(|waiting| waiting.idle)
    }

    /// Nobody gets one of these any more: the image's name stands for another by now.
    fn supersede(&mut self) {
        (self.pinned, self.want) = (false, 0);
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.creating == 0
    }

    fn view(&self, now: Instant) -> View {
        View {
            idle: self.waiting.len(),
            creating: self.creating,
            want: self.want,
            floor: usize::from(self.pinned),
            last_used: self.last_used,
            can_create: self.not_before.is_none_or(|at| at <= now),
        }
    }
}

/// What came of the making of a container, and when that began.
type Creation = (Key, Instant, Result<Idle, CreateError>);

/// The pool of one backend.
pub(super) struct Pool {
    options: config::Warm,
    /// How many containers there may be: as `options` says, until that changes.
    size: AtomicUsize,
    kinds: Mutex<HashMap<Key, Kind>>,
    /// Told when there may be something to do.
    wake: Notify,
    /// Whether it was said that none could be made.
    failure_said: AtomicBool,
    pub(super) counters: Counters,
}

impl Pool {
    pub(super) fn new(options: config::Warm) -> Self {
        let counters = Counters::default();
        let (kinds, wake, failure_said) = (Mutex::default(), Notify::new(), AtomicBool::new(false));
        let size = AtomicUsize::new(options.containers);
        Self { options, size, kinds, wake, failure_said, counters }
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<Key, Kind>> {
        // A map is whole whatever its last holder did.
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed)
    }

    /// Has room for so many containers from now on. A pool that began without any has none.
    pub(super) fn resize(&self, containers: usize) {
        if self.options.containers > 0 {
            self.size.store(containers, Ordering::Relaxed);
            self.wake.notify_one();
        }
    }

    /// A container for `job`, and what to say to its agent.
    ///
    /// # Errors
    /// Says why there is none.
    pub(super) fn lease(&self, job: &Job, image: &Arc<Image>) -> Result<(Idle, Vec<u8>), Miss> {
        let size = self.size();
        if size == 0 {
            return Err(Miss::Off);
        }
        if !job.labels.is_empty() {
            return Err(Miss::Labels);
        }
        if job.env.get("HOME").is_some_and(String::is_empty) {
            return Err(Miss::Home);
        }
        let order = order(job, image).ok_or(Miss::Size)?;
        let mut dead = Vec::new();
        let idle = {
            let mut kinds = self.kinds();
            let kind = kind_of(&mut kinds, job, image, &self.options);
            kind.note_use(&job.limits, Instant::now(), size);
            loop {
                let Some(mut idle) = kind.take(&job.limits) else { break None };
                if idle.ear.is_silent() {
                    break Some(idle);
                }
                dead.push(idle);
            }
        };
        self.wake.notify_one();
        let miss = if dead.is_empty() { Miss::Empty } else { Miss::Died };
        self.counters.died(dead.len());
        dead.into_iter().for_each(discard);
        Ok((idle.ok_or(miss)?, order))
    }

    /// Keeps the pool as it should be until `enough`, and brings to an end what it has begun.
    pub(super) async fn tend(
        &self,
        shared: &Arc<Shared>,
        images_changed: &Notify,
        enough: &CancellationToken,
    ) {
        if self.options.containers == 0 {
            return enough.cancelled().await;
        }
        let mut creations = JoinSet::new();
        tokio::select! {
            never = self.pin(shared, images_changed) => match never {},
            never = self.keep(shared, &mut creations) => match never {},
            () = enough.cancelled() => {}
        }
        while let Some(created) = creations.join_next().await {
            self.finish(created, false);
        }
    }

    /// Keeps the settings' images among the kinds, as what their names stand for now.
    async fn pin(&self, shared: &Arc<Shared>, images_changed: &Notify) -> Infallible {
        let mut failures = 0;
        loop {
            let mut failed = false;
            for name in &self.options.images {
                match shared.images.provide(name).await {
                    Ok(image) => {
                        let job = pattern(name, &self.options.limits, &self.options);
                        let share = self.size() / self.options.images.len();
                        let mut kinds = self.kinds();
                        let kind = kind_of(&mut kinds, &job, &image, &self.options);
                        kind.pinned = true;
                        kind.want = kind.want.max(share.max(1));
                    }
                    Err(error) => {
                        failed = true;
                        if failures == 0 {
                            tracing::warn!(image = name, %error, "an image of WARM_IMAGES cannot be kept warm yet");
                        }
                    }
                }
            }
            self.wake.notify_one();
            failures = if failed { failures + 1 } else { 0 };
            let patience = if failed { TROUBLE.delay(failures) } else { MAX_AGE };
            // Whichever comes first: both lead to another look.
            let _ = tokio::time::timeout(patience, images_changed.notified()).await;
        }
    }

    async fn keep(&self, shared: &Arc<Shared>, creations: &mut JoinSet<Creation>) -> Infallible {
        self.deliver(shared, false).await;
        let mut delivered_again: Option<Instant> = None;
        loop {
            self.look_after();
            while creations.len() < budget(shared.turns.starting())
                && let Some((key, pattern, image)) = self.next_creation(shared.turns.starting() > 0)
            {
                let shared = shared.clone();
                creations.spawn(async move {
                    shared.turns.spare_moment().await;
                    let begun = Instant::now();
                    (key, begun, creation::create(&shared, &pattern, &image).await)
                });
            }
            tokio::select! {
                Some(created) = creations.join_next() => {
                    let missed_at = match &created {
                        Ok((_, begun, Err(CreateError::NoAgent))) => Some(*begun),
                        _ => None,
                    };
                    // It was delivered since, or is to be delivered again.
                    let is_cured = missed_at.is_some_and(|begun| delivered_again >= Some(begun));
                    let is_early = delivered_again.is_some_and(|at| at.elapsed() < DELIVERY_INTERVAL);
                    let is_due = missed_at.is_some() && !is_cured && !is_early;
                    self.finish(created, is_cured || is_due);
                    if is_due {
                        self.deliver(shared, true).await;
                        delivered_again = Some(Instant::now());
                    }
                }
                () = self.wake.notified() => tokio::time::sleep(LINGER).await,
                () = shared.turns.started() => {}
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    }

    /// Sees to it that the engine has the agent, for as long as that takes.
    async fn deliver(&self, shared: &Arc<Shared>, again: bool) {
        for failures in 1.. {
            let Err(error) = volume::deliver(shared, again).await else { break };
            // An engine that is away is told of elsewhere.
            if failures == 1 && error.is_refusal() {
                tracing::warn!(%error, "the engine does not take the agent for warm containers; jobs start cold");
            }
            let delays = if error.is_refusal() { TROUBLE } else { ABSENCE };
            tokio::time::sleep(delays.delay(failures)).await;
        }
    }

    /// Drops what has died, what has waited for too long, and what nobody asks for any more.
    fn look_after(&self) {
        let now = Instant::now();
        let (mut dead, mut old) = (Vec::new(), Vec::new());
        self.kinds().retain(|_, kind| {
            let unused = kind.last_used.is_none_or(|at| now - at > self.options.idle_timeout);
            if unused && !kind.pinned {
                kind.want = 0;
                old.extend(kind.waiting.drain(..));
            }
            for mut waiting in std::mem::take(&mut kind.waiting) {
                if !waiting.idle.ear.is_silent() {
                    dead.push(waiting);
                } else if now - waiting.since > MAX_AGE {
                    old.push(waiting);
                } else {
                    kind.waiting.push_back(waiting);
                }
            }
            kind.want > 0 || !kind.is_empty()
        });
        self.counters.died(dead.len());
        self.counters.retired(old.len());
        dead.into_iter().chain(old).for_each(|waiting| discard(waiting.idle));
    }

    /// What to make now, if there is anything to make. Makes room for it.
    fn next_creation(&self, busy: bool) -> Option<(Key, Job, Arc<Image>)> {
        let mut kinds = self.kinds();
        loop {
            let now = Instant::now();
            let keys: Vec<Key> = kinds.keys().cloned().collect();
            let views: Vec<View> =
                keys.iter().filter_map(|key| Some(kinds.get(key)?.view(now))).collect();
            match next_step(&views, self.size(), busy, now) {
                Step::Rest => return None,
                Step::Create(at) => {
                    let key = keys.get(at)?.clone();
                    let kind = kinds.get_mut(&key)?;
                    kind.creating += 1;
                    return Some((key, kind.pattern.clone(), kind.image.clone()));
                }
                Step::Evict(at) => {
                    let kind = kinds.get_mut(keys.get(at)?)?;
                    let evicted = kind.waiting.pop_front()?;
                    // It is not missed before it is asked for again.
                    kind.want = kind.want.min(kind.waiting.len() + kind.creating);
                    self.counters.evicted();
                    discard(evicted.idle);
                }
            }
        }
    }

    /// Takes in what came of a creation. A failure that is `excused` is none of its kind's.
    fn finish(&self, created: Result<Creation, JoinError>, excused: bool) {
        let (key, created) = match created {
            Ok((key, _, created)) => (key, created),
            Err(error) => {
                // A place less in the pool is better than a pool that ends.
                tracing::error!(%error, "the making of a warm container broke down");
                return;
            }
        };
        let mut kinds = self.kinds();
        let Some(kind) = kinds.get_mut(&key) else { return };
        kind.creating -= 1;
        match created {
            Ok(idle) => {
                kind.failures = 0;
                kind.waiting.push_back(Waiting { idle, since: Instant::now() });
                self.counters.created();
            }
            Err(_) if excused => self.counters.failed(),
            Err(error) => {
                self.counters.failed();
                let is_refusal = error.is_refusal();
                let delay = if is_refusal {
                    kind.failures += 1;
                    TROUBLE.delay(kind.failures)
                } else {
                    ABSENCE.most
                };
                kind.not_before = Some(Instant::now() + delay);
                // What a request names and the image does not have is told to whoever sent it.
                let is_ours = kind.pattern.user.is_none();
                if is_refusal && is_ours && kind.failures == 1 && self.is_news() {
                    let image = kind.pattern.image.as_str();
                    tracing::warn!(image, %error, "no warm container could be made of this image; its jobs start cold");
                }
            }
        }
    }

    /// Whether a failure is worth a word. Where none can be made at all, one image speaks for all.
    fn is_news(&self) -> bool {
        self.counters.has_created() || !self.failure_said.swap(true, Ordering::Relaxed)
    }

    /// What was counted, and what waits now.
    pub(super) fn counts(&self) -> WarmCounts {
        let waiting = self.kinds().values().map(|kind| kind.waiting.len() as u64).sum();
        WarmCounts { waiting, ..self.counters.snapshot() }
    }

    /// Removes everything from the engine, at the end.
    pub(super) async fn withdraw(&self, shared: &Shared) {
        if self.options.containers == 0 {
            return;
        }
        let kinds = std::mem::take(&mut *self.kinds());
        let waiting = kinds.into_values().flat_map(|kind| kind.waiting);
        futures::future::join_all(waiting.map(|waiting| remove(waiting.idle))).await;
        volume::withdraw(shared).await;
        tracing::info!(counters = %self.counters, "no containers wait any more");
    }
}

/// The kind that serves `job`.
fn kind_of<'a>(
    kinds: &'a mut HashMap<Key, Kind>,
    job: &Job,
    image: &Arc<Image>,
    options: &config::Warm,
) -> &'a mut Kind {
    let key = Key::of(job, image);
    if !kinds.contains_key(&key) {
        for (other, kind) in kinds.iter_mut() {
            if kind.pattern.image == job.image && other.image != key.image {
                kind.supersede();
            }
        }
        let empty = kinds.iter().filter(|(_, kind)| kind.is_empty() && !kind.pinned);
        if kinds.len() >= MAX_KINDS
            && let Some(oldest) = empty.min_by_key(|(_, kind)| kind.last_used)
        {
            let oldest = oldest.0.clone();
            kinds.remove(&oldest);
        }
    }
    let new = || {
        let pattern = Job {
            user: job.user.clone(),
            network: job.network.clone(),
            ..pattern(&job.image, &job.limits, options)
        };
        Kind::new(pattern, image.clone())
    };
    kinds.entry(key).or_insert_with(new)
}

/// A job of nobody's: `image` with these limits, and what the settings say else.
fn pattern(image: &str, limits: &Limits, options: &config::Warm) -> Job {
    Job {
        id: JobId::new(),
        image: image.to_owned(),
        args: Vec::new(),
        env: Default::default(),
        stdin: None,
        working_dir: None,
        user: None,
        network: options.network.clone(),
        labels: Default::default(),
        limits: Limits { timeout: options.limits.timeout, ..limits.clone() },
    }
}

/// The frame that has an agent begin `job`; nothing where no frame holds it.
fn order(job: &Job, image: &Image) -> Option<Vec<u8>> {
    let start = Start {
        argv: image.command_line(&job.args).into_iter().map(String::into_bytes).collect(),
        env: job.env.iter().map(|(name, value)| format!("{name}={value}").into_bytes()).collect(),
        dir: job.working_dir.clone().map(String::into_bytes),
        stdin: job.stdin.is_some(),
    };
    let payload = start.encode()?;
    let mut frames = Vec::with_capacity(frame::HEADER + payload.len());
    frame::push(&mut frames, Frame::Start, &payload);
    Some(frames)
}

/// Has a container removed that is of no use. What cannot be removed is the reaper's.
fn discard(idle: Idle) {
    tokio::spawn(remove(idle));
}

async fn remove(Idle { container, ear, voice, .. }: Idle) {
    drop((ear, voice));
    if let Err(error) = container.remove().await {
        tracing::debug!(%error, "a warm container is left to the reaper");
    }
}
