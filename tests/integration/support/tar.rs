//! A tar archive of a handful of files, enough to be an image's layer.

/// One member of an archive.
#[derive(Clone)]
pub(crate) struct Entry {
    path: String,
    mode: u32,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Dir,
    File(Vec<u8>),
    Link(String),
}

impl Entry {
    pub(crate) fn dir(path: &str, mode: u32) -> Self {
        Self { path: path.into(), mode, kind: Kind::Dir }
    }

    pub(crate) fn file(path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), mode, kind: Kind::File(content.into()) }
    }

    pub(crate) fn link(path: &str, target: &str) -> Self {
        Self { path: path.into(), mode: 0o777, kind: Kind::Link(target.into()) }
    }

    /// What tells this member from another without hashing megabytes.
    pub(crate) fn summary(&self) -> String {
        let kind = match &self.kind {
            Kind::Dir => "dir".to_string(),
            Kind::File(content) if content.len() < 4096 => format!("file {content:?}"),
            Kind::File(content) => format!("file of {}", content.len()),
            Kind::Link(target) => format!("link to {target}"),
        };
        format!("{} {:o} {kind}", self.path, self.mode)
    }
}

/// The archive of `entries`, all owned by root.
pub(crate) fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let (flag, target, content): (u8, &str, &[u8]) = match &entry.kind {
            Kind::Dir => (b'5', "", &[]),
            Kind::File(content) => (b'0', "", content),
            Kind::Link(target) => (b'2', target, &[]),
        };
        out.extend_from_slice(&header(&entry.path, entry.mode, flag, target, content.len()));
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn header(path: &str, mode: u32, flag: u8, target: &str, size: usize) -> [u8; 512] {
    let mut block = [0u8; 512];
    put(&mut block, 0, path);
    put(&mut block, 100, &format!("{mode:07o}"));
    put(&mut block, 108, "0000000");
    put(&mut block, 116, "0000000");
    put(&mut block, 124, &format!("{size:011o}"));
    put(&mut block, 136, "00000000000");
    put(&mut block, 148, "        ");
    block[156] = flag;
    put(&mut block, 157, target);
    put(&mut block, 257, "ustar");
    put(&mut block, 263, "00");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut block, 148, &format!("{sum:06o}\0"));
    block
}

fn put(block: &mut [u8; 512], at: usize, text: &str) {
    block[at..at + text.len()].copy_from_slice(text.as_bytes());
}
