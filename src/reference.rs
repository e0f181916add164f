//! Image references: what is one, and its full form.
//!
//! The grammar is that of the [distribution project][grammar], without hosts that are IPv6 addresses, and
//! the digests are those that [engines know][digests]. Taken apart by hand: as one regular expression
//! it costs a daemon 5 MiB for good and 20 MiB for a moment, and all that it tells of a mistake is that
//! there is one.
//!
//! [grammar]: https://github.com/distribution/reference/blob/v0.6.0/reference.go
//! [digests]: https://github.com/opencontainers/go-digest/blob/v1.0.0/algorithm.go

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The registry of a reference that names none.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// What the default registry was called before.
const LEGACY_REGISTRY: &str = "index.docker.io";
/// Where the default registry keeps what stands there without a name before it.
const OFFICIAL: &str = "library";
const DEFAULT_TAG: &str = "latest";

/// The longest repository, in bytes.
pub const MAX_REPOSITORY: usize = 255;
/// The longest tag, in bytes.
pub const MAX_TAG: usize = 128;

/// A reference in its full form, as [`Display`](fmt::Display) shows it: `python` is
/// `docker.io/library/python:latest`. It has a tag or a digest or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

/// Why something is no reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// What stands before the first `/` is not part of a repository, and no registry either.
    #[error(
        "a registry is a host name, with a port where it has one, such as registry.example:5000"
    )]
    Registry,
    /// The repository has capitals.
    #[error("a repository's name is in lower case")]
    UpperCase,
    /// The repository is empty, or has a character that may not be in it or not there.
    #[error(
        "a repository's name is made of a-z and 0-9, with '.', '_', '__' or '-' between them, in \
         parts between single '/'"
    )]
    Repository,
    /// The repository is longer than [`MAX_REPOSITORY`].
    #[error("a repository's name has at most {MAX_REPOSITORY} bytes")]
    TooLong,
    /// The tag is empty, too long, or has a character that may not be in it or not there.
    #[error(
        "a tag has 1 to {MAX_TAG} of a-z, A-Z, 0-9, '_', '.' and '-', and does not begin with '.' or '-'"
    )]
    Tag,
    /// The digest is of no registered algorithm, or has not as many digits as its algorithm gives.
    #[error(
        "a digest is 'sha256:' and 64 of 0-9 and a-f, or 'sha384:' and 96, or 'sha512:' and 128"
    )]
    Digest,
}

impl Reference {
    /// The registry's host, with its port where that is named.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; nothing where there is a digest alone.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, with its algorithm, where there is one.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { registry, repository, tag, digest } = self;
        write!(f, "{registry}/{repository}")?;
        if let Some(tag) = tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let (tagged, digest) = match text.split_once('@') {
            Some((tagged, digest)) => (tagged, Some(digest)),
            None => (text, None),
        };
        // What a ':' before a '/' sets off is a port.
        let last = tagged.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match tagged[last..].split_once(':') {
            Some((end, tag)) => (&tagged[..last + end.len()], Some(tag)),
            None => (tagged, None),
        };
        let (registry, repository) = split(name)?;
        if repository.len() > MAX_REPOSITORY {
            return Err(Malformed::TooLong);
        }
        if !tag.is_none_or(is_tag) {
            return Err(Malformed::Tag);
        }
        if !digest.is_none_or(is_digest) {
            return Err(Malformed::Digest);
        }
        let tag = tag.or(if digest.is_none() { Some(DEFAULT_TAG) } else { None });
        let [tag, digest] = [tag, digest].map(|part| part.map(str::to_owned));
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }
}

/// Registry and repository of a name.
fn split(name: &str) -> Result<(&str, String), Malformed> {
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            // That it could be part of a repository as well is enough: of old, a host's name may have a
            // '_' in it.
            if !is_host(first) && !is_path(first) {
                return Err(Malformed::Registry);
            }
            (if first == LEGACY_REGISTRY { DEFAULT_REGISTRY } else { first }, rest)
        }
        _ => (DEFAULT_REGISTRY, name),
    };
    if !is_path(repository) {
        let lower = repository.to_ascii_lowercase();
        return Err(if is_path(&lower) { Malformed::UpperCase } else { Malformed::Repository });
    }
    let is_official = registry == DEFAULT_REGISTRY && !repository.contains('/');
    let prefix = if is_official { format!("{OFFICIAL}/") } else { String::new() };
    Ok((registry, prefix + repository))
}

fn is_host(text: &str) -> bool {
    let (name, port) = text.split_once(':').unwrap_or((text, "0"));
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.split('.').all(is_label) && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
}

/// Whether every part begins and ends with a letter or digit, and has between them nothing but these
/// and, one at a time, separators.
fn is_path(text: &str) -> bool {
    let is_word = |b: char| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_part = |part: &str| {
        let is_separator = |between: &str| {
            matches!(between, "" | "." | "_" | "__") || between.bytes().all(|b| b == b'-')
        };
        part.starts_with(is_word)
            && part.ends_with(is_word)
            && part.split(is_word).all(is_separator)
    };
    text.split('/').all(is_part)
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|b| is_word(b) || matches!(b, b'.' | b'-'))
}

fn is_digest(text: &str) -> bool {
    let Some((algorithm, digits)) = text.split_once(':') else { return false };
    let length = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return false,
    };
    digits.len() == length && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
