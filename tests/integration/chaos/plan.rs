//! What is done to the servers and when, all of it decided before the first fault.
//!
//! A plan is a pure function of the seed and the duration: a run that failed can be had again, as
//! far as the machine's own timing allows.

use std::fmt;
use std::time::Duration;

use super::random::Random;

/// How many daemons there are to be hurt.
pub(crate) const DAEMONS: usize = 3;

/// How many faults may last at the same time.
const AT_ONCE: usize = 2;

/// How long a server is left alone after a fault before it has the next one.
const REST: Duration = Duration::from_secs(2);

/// Where a daemon can be told to abort, in the order a job comes past.
pub(crate) const FAILPOINTS: [&str; 7] = [
    "job.claimed",
    "container.created",
    "function.ended",
    "outcome.decided",
    "result.published",
    "record.written",
    "delivery.acked",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// SIGKILL; started again when the fault is over.
    DaemonKilled,
    /// SIGSTOP for longer than its messages stay its own, then SIGCONT.
    DaemonFrozen,
    /// SIGTERM, and a new one.
    DaemonTerminated,
    /// Restarted so that it aborts at a named point, and then once more without.
    DaemonAborts(&'static str),
    /// What goes between a daemon and NATS stands still in both directions.
    LinkStalled,
    /// The daemon's connections to NATS break, and new ones are refused for as long as it lasts.
    LinkCut,
    /// SIGKILL; started again on what it stored.
    NatsKilled,
    NatsFrozen,
    /// Told to send its clients away and end; started again.
    NatsLameDuck,
    /// No space is left where the streams are.
    StoreFull,
    /// One of the queue's consumers is deleted behind the daemons' backs.
    ConsumerDeleted,
    /// SIGKILL; its containers live on. Started again.
    EngineKilled,
    /// SIGTERM, which ends its containers. Started again.
    EngineTerminated,
    EngineFrozen,
}

/// What a fault befalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    Daemon(usize),
    /// The connection of the daemon of that number to NATS.
    Link(usize),
    Nats,
    Engine,
}

impl Fault {
    /// Every one there is.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![
            Self::DaemonKilled,
            Self::DaemonFrozen,
            Self::DaemonTerminated,
            Self::LinkStalled,
            Self::LinkCut,
            Self::NatsKilled,
            Self::NatsFrozen,
            Self::NatsLameDuck,
            Self::StoreFull,
            Self::ConsumerDeleted,
            Self::EngineKilled,
            Self::EngineTerminated,
            Self::EngineFrozen,
        ];
        all.extend(FAILPOINTS.map(Self::DaemonAborts));
        all
    }

    /// Least and most time it lasts, in milliseconds.
    fn span(self) -> (u64, u64) {
        match self {
            Self::DaemonKilled | Self::NatsKilled => (200, 3_000),
            // Always longer than ACK_WAIT.
            Self::DaemonFrozen => (4_000, 9_000),
            Self::DaemonTerminated | Self::NatsLameDuck => (100, 2_000),
            // How long it may take to come past the point.
            Self::DaemonAborts(_) => (8_000, 12_000),
            // Sometimes longer than ACK_WAIT, sometimes not.
            Self::LinkStalled => (1_000, 8_000),
            Self::LinkCut => (10, 4_000),
            Self::NatsFrozen => (1_000, 6_000),
            Self::StoreFull => (2_000, 6_000),
            Self::ConsumerDeleted => (500, 1_000),
            Self::EngineKilled | Self::EngineTerminated => (300, 3_000),
            Self::EngineFrozen => (1_000, 6_000),
        }
    }

    fn target(self, random: &mut Random) -> Target {
        match self {
            Self::DaemonKilled
            | Self::DaemonFrozen
            | Self::DaemonTerminated
            | Self::DaemonAborts(_) => Target::Daemon(random.below(DAEMONS)),
            Self::LinkStalled | Self::LinkCut => Target::Link(random.below(DAEMONS)),
            Self::NatsKilled
            | Self::NatsFrozen
            | Self::NatsLameDuck
            | Self::StoreFull
            | Self::ConsumerDeleted => Target::Nats,
            Self::EngineKilled | Self::EngineTerminated | Self::EngineFrozen => Target::Engine,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DaemonKilled => "daemon killed",
            Self::DaemonFrozen => "daemon frozen",
            Self::DaemonTerminated => "daemon terminated",
            Self::DaemonAborts(point) => return write!(f, "daemon aborts at {point}"),
            Self::LinkStalled => "link stalled",
            Self::LinkCut => "link cut",
            Self::NatsKilled => "NATS killed",
            Self::NatsFrozen => "NATS frozen",
            Self::NatsLameDuck => "NATS lame duck",
            Self::StoreFull => "store full",
            Self::ConsumerDeleted => "consumer deleted",
            Self::EngineKilled => "engine killed",
            Self::EngineTerminated => "engine terminated",
            Self::EngineFrozen => "engine frozen",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Since the load began.
    pub(crate) at: Duration,
    pub(crate) lasts: Duration,
    pub(crate) fault: Fault,
    pub(crate) target: Target,
    /// A number for what else is to be chosen, such as which consumer or which hit of a point.
    pub(crate) die: usize,
}

impl Step {
    fn end(&self) -> Duration {
        self.at + self.lasts
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) duration: Duration,
    /// In the order of their beginnings.
    pub(crate) steps: Vec<Step>,
}

impl Plan {
    /// Every fault comes once before any comes twice.
    pub(crate) fn new(seed: u64, duration: Duration) -> Self {
        let mut random = Random::new(seed);
        let mut steps: Vec<Step> = Vec::new();
        let mut at = Duration::from_secs(2);
        'rounds: loop {
            let mut round = Fault::all();
            random.shuffle(&mut round);
            while !round.is_empty() {
                at += random.between(200, 3_000);
                // One that can begin soonest: waiting for the server whose turn it is would leave
                // the others in peace.
                let drawn: Vec<(Fault, Target)> =
                    round.iter().map(|fault| (*fault, fault.target(&mut random))).collect();
                let (place, begin) = drawn
                    .iter()
                    .map(|(_, target)| free_at(&steps, *target, at))
                    .enumerate()
                    .min_by_key(|(_, begin)| *begin)
                    .unwrap();
                let (fault, target) = drawn[place];
                round.remove(place);
                let (least, most) = fault.span();
                let lasts = random.between(least, most);
                if begin + lasts > duration {
                    break 'rounds;
                }
                steps.push(Step { at: begin, lasts, fault, target, die: random.below(1 << 16) });
                at = begin;
            }
        }
        Self { seed, duration, steps }
    }

    /// The same, begun only when the run has taken `begun`.
    pub(crate) fn later_by(&self, begun: Duration) -> Self {
        let steps = self.steps.iter().map(|step| Step { at: begun + step.at, ..*step });
        Self { steps: steps.collect(), ..*self }
    }

    /// The faults of `target`, in order.
    pub(crate) fn of(&self, target: Target) -> Vec<Step> {
        self.steps.iter().filter(|step| step.target == target).copied().collect()
    }
}

/// When a fault of `target` may begin, at `earliest` or later.
fn free_at(steps: &[Step], target: Target, earliest: Duration) -> Duration {
    let rested = steps
        .iter()
        .filter(|step| step.target == target)
        .map(|step| step.end() + REST)
        .fold(earliest, Duration::max);
    let mut ends: Vec<Duration> = steps.iter().map(Step::end).collect();
    ends.sort_unstable();
    // With all but so many over, there is room for one more.
    let room = ends.len().checked_sub(AT_ONCE).map(|last| ends[last]);
    rested.max(room.unwrap_or_default())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "plan of seed {} for {:?}:", self.seed, self.duration)?;
        for Step { at, lasts, fault, target, .. } in &self.steps {
            let whom = match target {
                Target::Daemon(n) | Target::Link(n) => format!(" {n}"),
                Target::Nats | Target::Engine => String::new(),
            };
            let (at, lasts) = (at.as_secs_f32(), lasts.as_secs_f32());
            writeln!(f, "  {at:8.1} s  {fault}{whom} for {lasts:.1} s")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(100);

    #[test]
    fn a_plan_follows_from_seed_and_duration_alone() {
        for seed in 0..20 {
            assert_eq!(Plan::new(seed, SHORT), Plan::new(seed, SHORT));
            assert_ne!(Plan::new(seed, SHORT).steps, Plan::new(seed + 1, SHORT).steps);
        }
    }

    #[test]
    fn a_longer_plan_begins_like_a_shorter_one() {
        let (short, long) = (Plan::new(7, SHORT), Plan::new(7, SHORT * 10));
        assert_eq!(short.steps[..], long.steps[..short.steps.len()]);
        assert!(long.steps.len() > 5 * short.steps.len());
    }

    #[test]
    fn the_short_form_has_every_fault_whatever_the_seed() {
        for seed in 0..500 {
            let plan = Plan::new(seed, SHORT);
            for fault in Fault::all() {
                assert!(
                    plan.steps.iter().any(|step| step.fault == fault),
                    "{fault} is missing: {plan}"
                );
            }
        }
    }

    #[test]
    fn no_server_has_two_faults_at_once_and_no_moment_more_than_two() {
        for seed in 0..100 {
            let plan = Plan::new(seed, SHORT * 3);
            assert!(plan.steps.is_sorted_by_key(|step| step.at), "{plan}");
            for (n, step) in plan.steps.iter().enumerate() {
                assert!(step.end() <= plan.duration, "it is over in time: {step:?}\n{plan}");
                let beside: Vec<&Step> =
                    plan.steps[..n].iter().filter(|earlier| earlier.end() > step.at).collect();
                assert!(beside.len() < AT_ONCE, "{step:?}\n{plan}");
                for earlier in &plan.steps[..n] {
                    let apart = earlier.target != step.target || earlier.end() + REST <= step.at;
                    assert!(apart, "{earlier:?} and {step:?}\n{plan}");
                }
            }
        }
    }
}
