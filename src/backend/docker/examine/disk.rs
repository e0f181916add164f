//! How much room the engine has for images and containers.

use std::path::Path;

use bollard::models::SystemInfo;
use indicatif::BinaryBytes;

use crate::finding::{Finding, Tell};

const CHECK: &str = "disk";
/// Less than this is next to nothing: a middling image takes as much.
const LEAST_BYTES: u64 = 500_000_000;
/// Percent of the disk, below which there is too little.
const LEAST_PERCENT: u64 = 2;
/// Percent of the disk, below which there is soon too little.
const LOW_PERCENT: u64 = 10;

/// Looks at the engine's data root, where that is on this machine.
pub(super) fn examine(info: &SystemInfo, remote: bool, tell: Tell<'_>) {
    let root = info.docker_root_dir.as_deref().unwrap_or_default();
    if remote {
        tell(Finding::not_checked(CHECK, "the engine is on another machine"));
        return;
    }
    if root.is_empty() || !Path::new(root).is_dir() {
        tell(Finding::not_checked(
            CHECK,
            format!("the engine's data root {root:?} is not seen here"),
        ));
        return;
    }
    tell(match rustix::fs::statvfs(root) {
        Ok(found) => judge(
            root,
            found.f_bavail.saturating_mul(found.f_frsize),
            found.f_blocks.saturating_mul(found.f_frsize),
        ),
        Err(error) => Finding::not_checked(CHECK, format!("{root}: {error}")),
    });
}

fn judge(root: &str, free: u64, all: u64) -> Finding {
    const REMEDY: &str = "make room: docker system prune removes what is not used; or move the data root to a larger disk";
    let percent = free.saturating_mul(100).checked_div(all).unwrap_or_default();
    let detail =
        format!("{} of {} free at {root} ({percent} %)", BinaryBytes(free), BinaryBytes(all));
    if percent < LEAST_PERCENT || free < LEAST_BYTES {
        Finding::fail(CHECK, format!("{detail}: images and containers do not fit"), REMEDY)
    } else if percent < LOW_PERCENT {
        Finding::warn(CHECK, detail, REMEDY)
    } else {
        Finding::ok(CHECK, detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Status;

    #[test]
    fn little_room_is_a_warning_and_less_a_failure() {
        const GIB: u64 = 1 << 30;
        for (free, all, wanted) in [
            (50 * GIB, 100 * GIB, Status::Ok),
            (9 * GIB, 100 * GIB, Status::Warn),
            (GIB, 100 * GIB, Status::Fail),
            (GIB / 4, GIB, Status::Fail),
            (0, 0, Status::Fail),
        ] {
            assert_eq!(judge("/x", free, all).status, wanted, "{free} of {all}");
        }
    }
}
