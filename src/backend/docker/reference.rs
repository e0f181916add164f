//! Image references: their full form, and which of them may run.

use globset::{Glob, GlobSet, GlobSetBuilder};
use oci_spec::distribution::Reference;

/// The registry of a reference that names none.
const DEFAULT_REGISTRY: &str = "docker.io";

/// The full form of a reference: registry, repository, and tag or digest or both.
/// `python` is `docker.io/library/python:latest`.
pub(super) fn normalise(image: &str) -> Option<Reference> {
    image.parse().ok()
}

/// The operator's list of images that may run.
#[derive(Clone, Debug)]
pub struct AllowList {
    globs: Option<GlobSet>,
}

impl AllowList {
    /// A list of glob patterns; an empty one allows everything.
    ///
    /// `*` stands for any characters, `/` included. A pattern is completed as a reference is:
    /// `python:3.*` means `docker.io/library/python:3.*`, and `python` means its `latest`.
    ///
    /// # Errors
    /// A pattern is no glob.
    pub fn new(patterns: &[String]) -> Result<Self, globset::Error> {
        if patterns.is_empty() {
            return Ok(Self { globs: None });
        }
        let mut globs = GlobSetBuilder::new();
        for pattern in patterns {
            globs.add(Glob::new(&complete(pattern))?);
        }
        Ok(Self { globs: Some(globs.build()?) })
    }

    /// Whether `reference`, in its full form, may run.
    #[must_use]
    pub fn allows(&self, reference: &str) -> bool {
        self.globs.as_ref().is_none_or(|globs| globs.is_match(reference))
    }
}

/// A pattern's full form. What a wildcard may stand for is left alone.
fn complete(pattern: &str) -> String {
    let wild = |part: &str| part.contains(['*', '?', '[', '{']);
    let full = match pattern.split_once('/') {
        None if pattern.starts_with(['*', '?', '[', '{']) => pattern.to_owned(),
        None => format!("{DEFAULT_REGISTRY}/library/{pattern}"),
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" || wild(first) => {
            pattern.to_owned()
        }
        Some(_) => format!("{DEFAULT_REGISTRY}/{pattern}"),
    };
    let last = full.rsplit('/').next().unwrap_or_default();
    if last.contains([':', '@']) || wild(last) { full } else { format!("{full}:latest") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn references_are_completed() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (short, full) in [
            ("python", "docker.io/library/python:latest".to_owned()),
            ("python:3.11-slim", "docker.io/library/python:3.11-slim".to_owned()),
            ("team/tool", "docker.io/team/tool:latest".to_owned()),
            ("ghcr.io/team/tool:1", "ghcr.io/team/tool:1".to_owned()),
            ("localhost/tool", "localhost/tool:latest".to_owned()),
            ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest".to_owned()),
            (&format!("python@{digest}"), format!("docker.io/library/python@{digest}")),
            (&format!("python:3@{digest}"), format!("docker.io/library/python:3@{digest}")),
        ] {
            assert_eq!(normalise(short).unwrap().whole(), full, "{short}");
        }
    }

    #[test]
    fn patterns_match_the_full_form() {
        for (pattern, image, allowed) in [
            ("python", "python", true),
            ("python", "docker.io/library/python:latest", true),
            ("python", "python:3", false),
            ("python:*", "python:3.11-slim", true),
            ("python:*", "evil/python:3", false),
            ("python:*", "evil.io/library/python:3", false),
            ("docker.io/library/*", "busybox", true),
            ("docker.io/library/*", "team/busybox", false),
            ("ghcr.io/acme/*", "ghcr.io/acme/a/b:1", true),
            ("ghcr.io/acme/*", "ghcr.io/acme-evil/a:1", false),
            ("team/*", "team/tool", true),
            ("*", "anything.io/at/all:1", true),
            ("*/tool:1", "ghcr.io/acme/tool:1", true),
            ("127.0.0.1:5000/*", "127.0.0.1:5000/x", true),
            ("127.0.0.1:5000/*", "127.0.0.1:5001/x", false),
        ] {
            let list = AllowList::new(&[pattern.to_owned()]).unwrap();
            let full = normalise(image).unwrap().whole();
            assert_eq!(list.allows(&full), allowed, "{pattern} on {full}");
        }
        assert!(AllowList::new(&[]).unwrap().allows("docker.io/library/x:1"));
    }
}
