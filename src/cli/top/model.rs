//! What `top` knows, put together from messages. Pure: nothing is asked, read or drawn here.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use serde::Deserialize;

use crate::job::Status;
use crate::protocol::record::{Record, State};

/// How many turns are remembered: more than a terminal is wide.
const TURNS: usize = 240;
/// The most durations that are remembered of one turn.
const MAX_DURATIONS: usize = 1024;
/// The most jobs that are remembered; more cannot be looked at.
const MAX_JOBS: usize = 10_000;
/// After how long without an answer a worker is gone.
const GONE_AFTER: Duration = Duration::from_secs(6);
/// After how long its jobs are.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// All that is known.
#[derive(Debug)]
pub(super) struct Model {
    /// The first part of the subjects: others' workers are none of ours.
    prefix: String,
    workers: BTreeMap<String, Worker>,
    jobs: BTreeMap<String, Job>,
    /// Jobs of which something newer than a record is known, while records may still be read.
    told: HashSet<String>,
    /// When a worker was last heard of.
    heard: BTreeMap<String, Instant>,
    /// How the jobs ended since the beginning.
    pub(super) ended: BTreeMap<&'static str, u64>,
    /// What waits in the stream, where that is known.
    pub(super) queue: Option<Queue>,
    /// What happened in each turn, the present one last.
    turns: VecDeque<Turn>,
    /// How long a turn is.
    interval: Duration,
}

/// An instance of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Worker {
    pub(super) id: String,
    pub(super) slots: u64,
    pub(super) jobs: u64,
    pub(super) version: String,
    pub(super) delivery: String,
    /// Requests of its endpoint `run`, and those of them that failed.
    pub(super) run: (u64, u64),
}

/// A job that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) image: String,
    pub(super) state: State,
    /// Since when it is in that state.
    pub(super) since: SystemTime,
    pub(super) worker: String,
}

/// Requests that a stream keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Queue {
    /// Nobody has them yet.
    pub(super) waiting: u64,
    /// A worker has them.
    pub(super) taken: u64,
}

/// What happened between two looks.
#[derive(Clone, Debug, Default)]
struct Turn {
    ended: u64,
    durations: Vec<u64>,
}

/// An instance's answer to `$SRV.STATS`: what matters of it.
#[derive(Deserialize)]
struct Stats {
    id: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    endpoints: Vec<Endpoint>,
}

#[derive(Deserialize)]
struct Endpoint {
    name: String,
    #[serde(default)]
    num_requests: u64,
    #[serde(default)]
    num_errors: u64,
    #[serde(default)]
    data: Data,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Data {
    max_containers: u64,
    jobs: u64,
}

impl Model {
    pub(super) fn new(prefix: &str, interval: Duration) -> Self {
        Self {
            prefix: prefix.to_owned(),
            workers: BTreeMap::new(),
            jobs: BTreeMap::new(),
            told: HashSet::new(),
            heard: BTreeMap::new(),
            ended: BTreeMap::new(),
            queue: None,
            turns: VecDeque::from([Turn::default()]),
            interval,
        }
    }

    /// An instance has said how it is.
    pub(super) fn stats(&mut self, answer: &[u8], now: Instant) {
        let Ok(stats) = serde_json::from_slice::<Stats>(answer) else { return };
        let metadata = |name: &str| stats.metadata.get(name).cloned().unwrap_or_default();
        if metadata("subject_prefix") != self.prefix {
            return;
        }
        let Some(run) = stats.endpoints.iter().find(|endpoint| endpoint.name == "run") else {
            return;
        };
        let worker = Worker {
            id: stats.id.clone(),
            slots: run.data.max_containers,
            jobs: run.data.jobs,
            delivery: metadata("delivery"),
            run: (run.num_requests, run.num_errors),
            version: stats.version,
        };
        self.heard.insert(stats.id.clone(), now);
        self.workers.insert(stats.id, worker);
    }

    /// A job's state has changed.
    pub(super) fn event(&mut self, record: &[u8], now: Instant) {
        if let Ok(record) = Record::decode(record) {
            self.tell(record.id.as_str());
            self.take(record, now);
        }
    }

    /// A job's record was read. It may be older than what was told meanwhile.
    pub(super) fn record(&mut self, record: Record, now: Instant) {
        if !self.told.contains(record.id.as_str()) {
            self.take(record, now);
        }
    }

    fn tell(&mut self, id: &str) {
        // Records are read for some seconds at the beginning: nobody remembers for longer.
        if self.turns.len() < TURNS && self.told.len() < MAX_JOBS {
            self.told.insert(id.to_owned());
        } else {
            self.told.clear();
        }
    }

    fn take(&mut self, record: Record, now: Instant) {
        let id = record.id.to_string();
        if record.state == State::Ended {
            self.jobs.remove(&id);
            return;
        }
        if self.jobs.len() >= MAX_JOBS && !self.jobs.contains_key(&id) {
            return;
        }
        let since = match record.state {
            State::Running => record.running_at,
            State::Pulling => record.pulling_at,
            State::Queued => record.queued_at,
            State::Ending | State::Ended => None,
        };
        let worker = record.worker.unwrap_or_default();
        if !worker.is_empty() {
            self.heard.insert(worker.clone(), now);
        }
        let job = Job {
            id: id.clone(),
            image: record.image.unwrap_or_default(),
            state: record.state,
            since: since.unwrap_or(record.updated_at),
            worker,
        };
        self.jobs.insert(id, job);
    }

    /// A job has ended so, after so many milliseconds.
    pub(super) fn result(&mut self, id: Option<&str>, status: &str, duration_ms: Option<u64>) {
        let status = status.parse::<Status>().map_or("other", Status::as_str);
        *self.ended.entry(status).or_default() += 1;
        if let Some(turn) = self.turns.back_mut() {
            turn.ended += 1;
            if turn.durations.len() < MAX_DURATIONS {
                turn.durations.extend(duration_ms);
            }
        }
        // Its last event may be missed; its result says the same.
        if let Some(id) = id {
            self.tell(id);
            self.jobs.remove(id);
        }
    }

    /// A turn is over.
    pub(super) fn turn(&mut self, now: Instant) {
        self.turns.push_back(Turn::default());
        while self.turns.len() > TURNS {
            self.turns.pop_front();
        }
        let gone = GONE_AFTER.max(self.interval * 4);
        let silent = |heard: Option<&Instant>, longest: Duration| {
            heard.is_none_or(|heard| now.saturating_duration_since(*heard) > longest)
        };
        let Self { workers, jobs, heard, .. } = self;
        workers.retain(|id, _| !silent(heard.get(id), gone));
        // The job of a worker that died goes to another, which tells of it, or nobody ever does.
        jobs.retain(|_, job| {
            job.worker.is_empty() || !silent(heard.get(&job.worker), FORGOTTEN_AFTER.max(gone))
        });
        heard.retain(|_, at| now.saturating_duration_since(*at) <= FORGOTTEN_AFTER.max(gone));
    }

    /// The workers, by name.
    pub(super) fn workers(&self) -> impl ExactSizeIterator<Item = &Worker> {
        self.workers.values()
    }

    /// The jobs that have not ended: those that run first, and of these the oldest.
    pub(super) fn jobs(&self) -> Vec<&Job> {
        let mut jobs: Vec<&Job> = self.jobs.values().collect();
        let rank = |state: State| match state {
            State::Running => 0,
            State::Pulling => 1,
            State::Ending | State::Ended => 2,
            State::Queued => 3,
        };
        jobs.sort_by_key(|job| (rank(job.state), job.since));
        jobs
    }

    /// Slots in use, and all there are.
    pub(super) fn slots(&self) -> (u64, u64) {
        self.workers.values().fold((0, 0), |(used, all), worker| {
            (used + worker.jobs.min(worker.slots), all + worker.slots)
        })
    }

    /// How many jobs ended in each of the last turns that are over, the latest last.
    pub(super) fn outcomes(&self, last: usize) -> Vec<u64> {
        self.last(last).map(|turn| turn.ended).collect()
    }

    /// Outcomes a second, over the last turns.
    pub(super) fn rate(&self, last: usize) -> f64 {
        let (count, ended) = self.last(last).fold((0, 0), |(n, sum), t| (n + 1, sum + t.ended));
        let seconds = self.interval.as_secs_f64() * f64::from(count);
        if seconds > 0.0 { ended as f64 / seconds } else { 0.0 }
    }

    /// A percentile of the durations of each of the last turns, in milliseconds; zero where none
    /// ended.
    pub(super) fn latencies(&self, percent: usize, last: usize) -> Vec<u64> {
        let of = |turn: &Turn| percentile(turn.durations.clone(), percent).unwrap_or_default();
        self.last(last).map(of).collect()
    }

    /// A percentile of the durations of all of the last turns, in milliseconds.
    pub(super) fn latency(&self, percent: usize, last: usize) -> Option<u64> {
        let all = self.last(last).flat_map(|turn| turn.durations.iter().copied()).collect();
        percentile(all, percent)
    }

    /// The last turns that are over.
    fn last(&self, count: usize) -> impl Iterator<Item = &Turn> {
        let over = self.turns.len().saturating_sub(1);
        self.turns.iter().take(over).skip(over.saturating_sub(count))
    }
}

/// The smallest of the values that so many percent do not exceed.
fn percentile(mut values: Vec<u64>, percent: usize) -> Option<u64> {
    values.sort_unstable();
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied()
}
