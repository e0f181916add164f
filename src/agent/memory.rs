//! What the kernel says of the memory of this container.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Where a control group of version 2, and one of version 1, counts the processes that were killed for
/// want of memory.
const COUNTERS: [&str; 2] =
    ["/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"];

/// The processes that are killed for want of memory from now on.
///
/// The kernel counts each before it kills it, so none is missing once its end is known.
pub struct OomKills {
    counter: File,
    before: u32,
}

impl OomKills {
    /// Nothing where the container does not see the counter.
    pub fn count() -> Option<Self> {
        COUNTERS.iter().find_map(|path| {
            let counter = File::open(path).ok()?;
            let before = read(&counter)?;
            Some(Self { counter, before })
        })
    }

    pub fn so_far(&self) -> Option<u32> {
        Some(read(&self.counter)?.saturating_sub(self.before))
    }
}

fn read(counter: &File) -> Option<u32> {
    // Both files are a handful of short lines.
    let mut bytes = [0; 1024];
    let length = counter.read_at(&mut bytes, 0).ok()?;
    let mut lines = std::str::from_utf8(&bytes[..length]).ok()?.lines();
    lines.find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}
