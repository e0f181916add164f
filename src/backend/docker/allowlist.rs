//! Which images may run.

use globset::{Glob, GlobMatcher};

use crate::reference::DEFAULT_REGISTRY;

/// The operator's list of images that may run.
#[derive(Clone, Debug)]
pub struct AllowList {
    /// Nothing: everything may.
    patterns: Option<Vec<Pattern>>,
}

#[derive(Clone, Debug)]
struct Pattern {
    glob: GlobMatcher,
    /// Whether it says something of the tag and nothing of the digest. What a digest names is the
    /// content, whatever tag stands beside it, so such a pattern allows no reference with a digest.
    is_about_tags: bool,
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
        let compile = |pattern: &String| {
            let full = complete(pattern);
            let last = full.rsplit('/').next().unwrap_or_default();
            let tag = last.split_once(':').map(|(_, tag)| tag);
            let is_about_tags = !full.contains('@') && tag.is_some_and(|tag| tag != "*");
            Ok(Pattern { glob: Glob::new(&full)?.compile_matcher(), is_about_tags })
        };
        let patterns = patterns.iter().map(compile).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { patterns: Some(patterns).filter(|p| !p.is_empty()) })
    }

    /// Whether `reference`, in its full form, may run.
    #[must_use]
    pub fn allows(&self, reference: &str) -> bool {
        let has_digest = reference.contains('@');
        // `:*` is any tag, none included.
        let matches = |p: &Pattern| {
            !(has_digest && p.is_about_tags)
                && (p.glob.is_match(reference) || {
                    let (name, digest) = reference.split_once('@').unwrap_or((reference, ""));
                    let tagless = !name.rsplit('/').next().unwrap_or_default().contains(':');
                    has_digest && tagless && p.glob.is_match(format!("{name}:@{digest}"))
                })
        };
        self.patterns.as_ref().is_none_or(|patterns| patterns.iter().any(matches))
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
    use crate::reference::Reference;

    fn full(image: &str) -> String {
        image.parse::<Reference>().unwrap().to_string()
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
            let full = self::full(image);
            assert_eq!(list.allows(&full), allowed, "{pattern} on {full}");
        }
        let digest = format!("@sha256:{}", "a".repeat(64));
        for (pattern, image, allowed) in [
            ("python:3.*", format!("python:3.1{digest}"), false),
            ("python", format!("python{digest}"), false),
            ("python:*", format!("python:3.1{digest}"), true),
            ("python:*", format!("python{digest}"), true),
            ("docker.io/library/*", format!("python{digest}"), true),
            ("python@sha256:*", format!("python{digest}"), true),
            (&format!("python{digest}"), format!("python{digest}"), true),
            ("127.0.0.1:5000/*", format!("127.0.0.1:5000/x{digest}"), true),
        ] {
            let list = AllowList::new(&[pattern.to_owned()]).unwrap();
            let full = self::full(&image);
            assert_eq!(list.allows(&full), allowed, "{pattern} on {full}");
        }
        assert!(AllowList::new(&[]).unwrap().allows("docker.io/library/x:1"));
    }
}
