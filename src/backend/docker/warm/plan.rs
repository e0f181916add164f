//! What a pool does next. Pure: no engine, no clock of its own.

use std::time::{Duration, Instant};

/// How long after its last use a kind keeps what it has, whoever else wants the place. Images that
/// take turns faster than that would have each other's containers made for nothing.
const HOLD: Duration = Duration::from_secs(5);
/// After how long without a use a kind that has little gives it up to one that wants still more.
const QUIET: Duration = Duration::from_secs(60);
/// With how many creations at once the engine makes the most containers, see `docs/BENCHMARKS.md`.
const CREATIONS: usize = 4;

/// One kind of container, as far as a plan goes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct View {
    /// Those that wait for a job.
    pub(super) idle: usize,
    /// Those that are being made.
    pub(super) creating: usize,
    /// How many there should be.
    pub(super) want: usize,
    /// How many are not given up for others.
    pub(super) floor: usize,
    /// When a job last asked for one.
    pub(super) last_used: Option<Instant>,
    /// Whether one can be made now: not shortly after it could not.
    pub(super) can_create: bool,
}

impl View {
    fn have(&self) -> usize {
        self.idle + self.creating
    }

    fn unused_for(&self, now: Instant) -> Duration {
        self.last_used.map_or(Duration::MAX, |at| now.saturating_duration_since(at))
    }
}

/// What to do, to the kind at that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Make one.
    Create(usize),
    /// Remove one that waits.
    Evict(usize),
    /// Nothing.
    Rest,
}

/// How many containers may be on their way to a pool at once, with `starting` jobs that wait for one
/// of their own. Never none: what makes jobs start sooner is wanted most where they are many.
pub(super) fn budget(starting: usize) -> usize {
    CREATIONS.saturating_sub(starting).max(1)
}

/// The next step of a pool of at most `capacity` containers.
///
/// What was used last comes first, what was not used for longest goes first. While the engine is
/// `busy` with jobs that wait for a container, only what is all but forgotten is thrown away: to
/// replace anything else takes as much as the job's own would.
pub(super) fn next_step(kinds: &[View], capacity: usize, busy: bool, now: Instant) -> Step {
    if let Some(at) = kinds.iter().position(|kind| kind.idle > 0 && kind.have() > kind.want) {
        return Step::Evict(at);
    }
    let have = kinds.iter().map(View::have).sum::<usize>();
    if have > capacity {
        // There is less room than there was.
        let idle = kinds.iter().enumerate().filter(|(_, kind)| kind.idle > 0);
        let oldest = idle.max_by_key(|(_, kind)| kind.unused_for(now));
        return oldest.map_or(Step::Rest, |(at, _)| Step::Evict(at));
    }
    let wanting = kinds.iter().enumerate().filter(|(_, k)| k.can_create && k.have() < k.want);
    let Some((at, newcomer)) =
        wanting.min_by_key(|(_, k)| (k.have() >= k.floor, k.unused_for(now)))
    else {
        return Step::Rest;
    };
    if have < capacity {
        return Step::Create(at);
    }
    let gives_way = |kind: &View| {
        let unused = kind.unused_for(now);
        let is_needier = newcomer.have() < newcomer.floor;
        let is_later = newcomer.unused_for(now) < unused && unused >= HOLD;
        let has_enough = kind.have() > newcomer.have() + 1 || newcomer.have() == 0;
        kind.idle > 0
            && kind.have() > kind.floor
            && (is_needier || (is_later && (unused >= QUIET || (!busy && has_enough))))
    };
    let victims = kinds.iter().enumerate().filter(|(i, kind)| *i != at && gives_way(kind));
    victims
        .max_by_key(|(_, kind)| kind.unused_for(now))
        .map_or(Step::Rest, |(at, _)| Step::Evict(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(idle: usize, want: usize, used_ago: u64, now: Instant) -> View {
        View {
            idle,
            want,
            last_used: now.checked_sub(Duration::from_secs(used_ago)),
            can_create: true,
            ..View::default()
        }
    }

    #[test]
    fn what_is_missing_is_made_the_latest_first() {
        let now = Instant::now() + Duration::from_secs(1000);
        assert_eq!(next_step(&[], 5, false, now), Step::Rest);
        assert_eq!(next_step(&[kind(1, 1, 0, now)], 5, false, now), Step::Rest);
        let two = [kind(0, 1, 3, now), kind(0, 1, 2, now)];
        assert_eq!(next_step(&two, 5, false, now), Step::Create(1));
        let making = View { creating: 1, ..two[1] };
        assert_eq!(next_step(&[two[0], making], 5, false, now), Step::Create(0));
        let pinned = View { floor: 1, last_used: None, ..two[0] };
        assert_eq!(next_step(&[two[1], pinned], 5, false, now), Step::Create(1));
        let failing = View { can_create: false, ..two[1] };
        assert_eq!(next_step(&[two[0], failing], 5, false, now), Step::Create(0));
    }

    #[test]
    fn jobs_that_wait_for_a_container_come_first() {
        for (starting, budget_left) in [(0, 4), (1, 3), (3, 1), (4, 1), (9, 1)] {
            assert_eq!(budget(starting), budget_left);
        }
    }

    #[test]
    fn no_more_are_made_than_there_is_room_for() {
        let now = Instant::now() + Duration::from_secs(1000);
        let full = View { creating: 1, ..kind(4, 9, 0, now) };
        assert_eq!(next_step(&[full], 5, false, now), Step::Rest);
        assert_eq!(next_step(&[full], 6, false, now), Step::Create(0));
    }

    #[test]
    fn a_pool_that_has_less_room_gives_up_what_was_not_used_for_longest() {
        let now = Instant::now() + Duration::from_secs(1000);
        let kinds = [kind(2, 2, 3, now), kind(1, 1, 9, now)];
        assert_eq!(next_step(&kinds, 3, false, now), Step::Rest);
        assert_eq!(next_step(&kinds, 2, true, now), Step::Evict(1));
        assert_eq!(next_step(&kinds[..1], 0, true, now), Step::Evict(0));
    }

    #[test]
    fn the_least_recently_used_gives_way() {
        let now = Instant::now() + Duration::from_secs(1000);
        let (old, older) = (kind(1, 1, 20, now), kind(1, 1, 30, now));
        assert_eq!(next_step(&[old, older, kind(0, 1, 0, now)], 2, false, now), Step::Evict(1));
        // Not while jobs wait for containers, but for an image that is kept warm.
        let newcomer = kind(0, 1, 0, now);
        assert_eq!(next_step(&[old, older, newcomer], 2, true, now), Step::Rest);
        let forgotten = kind(1, 1, 90, now);
        assert_eq!(next_step(&[old, forgotten, newcomer], 2, true, now), Step::Evict(1));
        let needy = View { floor: 1, ..newcomer };
        assert_eq!(next_step(&[old, older, needy], 2, true, now), Step::Evict(1));
        // Not one that is in use.
        let busy = kind(1, 1, 2, now);
        assert_eq!(next_step(&[busy, kind(0, 1, 0, now)], 1, false, now), Step::Rest);
        // Not the last one of an image that is kept warm.
        let pinned = View { floor: 1, ..older };
        assert_eq!(next_step(&[old, pinned, kind(0, 1, 0, now)], 2, false, now), Step::Evict(0));
        assert_eq!(next_step(&[pinned, kind(0, 1, 0, now)], 1, false, now), Step::Rest);
        let surplus = View { floor: 1, ..kind(3, 5, 30, now) };
        assert_eq!(next_step(&[surplus, kind(0, 1, 0, now)], 3, false, now), Step::Evict(0));
        // Not for a kind that has as much already, unless it is all but forgotten.
        assert_eq!(next_step(&[older, kind(1, 2, 0, now)], 2, false, now), Step::Rest);
        assert_eq!(
            next_step(&[kind(1, 1, 90, now), kind(1, 2, 0, now)], 2, false, now),
            Step::Evict(0)
        );
    }

    #[test]
    fn what_nobody_wants_any_more_goes() {
        let now = Instant::now() + Duration::from_secs(1000);
        assert_eq!(next_step(&[kind(1, 0, 1, now)], 5, false, now), Step::Evict(0));
        // One that is being made is looked at once it is there.
        let making = View { idle: 0, creating: 1, ..kind(0, 0, 1, now) };
        assert_eq!(next_step(&[making], 5, false, now), Step::Rest);
    }

    #[test]
    fn a_plan_comes_to_rest() {
        let mut now = Instant::now() + Duration::from_secs(1000);
        let mut kinds: Vec<View> =
            (0..50).map(|n| kind(0, 1 + n % 3, 100 - u64::try_from(n).unwrap_or(0), now)).collect();
        for _ in 0..100 {
            match next_step(&kinds, 10, false, now) {
                Step::Create(at) => kinds[at].idle += 1,
                Step::Evict(at) => kinds[at].idle -= 1,
                Step::Rest => break,
            }
            assert!(kinds.iter().map(View::have).sum::<usize>() <= 10);
        }
        assert_eq!(next_step(&kinds, 10, false, now), Step::Rest);
        assert_eq!(kinds.iter().map(View::have).sum::<usize>(), 10);
        now += Duration::from_secs(1);
        assert_eq!(next_step(&kinds, 10, false, now), Step::Rest);
    }
}
