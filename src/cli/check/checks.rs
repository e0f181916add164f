//! What is checked, in the order in which it is listed, and what each check depends on.

/// A check by the name that its findings bear.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) name: &'static str,
    /// The check without which there is nothing to look at; it comes before.
    needs: Option<&'static str>,
    /// Why those that need this one are not checked where it stands in the way.
    blocks: &'static str,
}

/// All that there are. The last one is made where it is asked for.
const CHECKS: &[Check] = &[
    Check { name: "settings", needs: None, blocks: "the settings cannot be used" },
    Check { name: "nats", needs: Some("settings"), blocks: "NATS cannot be reached" },
    leaf("max_payload", "nats"),
    Check { name: "inbox", needs: Some("nats"), blocks: "its answers would come to an inbox" },
    Check { name: "jetstream", needs: Some("inbox"), blocks: "there is no JetStream to look at" },
    Check { name: "streams", needs: Some("jetstream"), blocks: "it is not known what they need" },
    leaf("store", "streams"),
    leaf("subscribe", "nats"),
    leaf("publish", "nats"),
    Check { name: "engine", needs: Some("settings"), blocks: "the engine cannot be used" },
    leaf("runtime", "engine"),
    leaf("cgroups", "engine"),
    leaf("storage", "engine"),
    leaf("seccomp", "engine"),
    leaf("networks", "engine"),
    leaf("disk", "engine"),
    leaf("registries", "settings"),
    leaf("run", "nats"),
];

/// Those that are listed, with the trial or without.
pub(super) fn listed(with_trial: bool) -> &'static [Check] {
    match CHECKS {
        [always @ .., _] if !with_trial => always,
        all => all,
    }
}

/// A check that no other needs.
const fn leaf(name: &'static str, needs: &'static str) -> Check {
    Check { name, needs: Some(needs), blocks: "" }
}

/// Why there is nothing to say of a check: the nearest of what it needs that was looked at stands in
/// the way.
pub(super) fn reason(check: &Check, was_looked_at: impl Fn(&str) -> bool) -> &'static str {
    let needed = |check: &Check| CHECKS.iter().find(|other| Some(other.name) == check.needs);
    let mut all = std::iter::successors(needed(check), |other| needed(other));
    all.find(|other| was_looked_at(other.name)).map_or("it was not come to", |other| other.blocks)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_check_comes_after_what_it_needs() {
        for (at, check) in CHECKS.iter().enumerate() {
            let Some(needs) = check.needs else { continue };
            let needed = CHECKS[..at].iter().find(|other| other.name == needs);
            assert!(needed.is_some_and(|other| !other.blocks.is_empty()), "{check:?}");
        }
    }

    #[test]
    fn the_nearest_obstacle_is_named() {
        let check = |name: &str| CHECKS.iter().find(|check| check.name == name).unwrap();
        for (name, looked_at, wanted) in [
            ("store", &["settings", "nats"][..], "NATS cannot be reached"),
            (
                "store",
                &["settings", "nats", "inbox", "jetstream"],
                "there is no JetStream to look at",
            ),
            ("publish", &["settings"], "the settings cannot be used"),
            ("disk", &["settings", "nats", "engine"], "the engine cannot be used"),
        ] {
            let found = reason(check(name), |other| looked_at.contains(&other));
            assert_eq!(found, wanted, "{name} after {looked_at:?}");
        }
    }
}
