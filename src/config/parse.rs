//! From text to values, collecting what is wrong on the way.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::settings;
use super::{DockerTls, Secret};
use crate::protocol::subjects;

/// What is wrong with the settings so far.
#[derive(Debug, Default)]
pub(super) struct Problems {
    lines: Vec<String>,
}

/// The longest duration accepted: timers beyond it mean a slip, and arithmetic stays far from any
/// overflow.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 3600);

impl Problems {
    pub(super) fn into_lines(self) -> Vec<String> {
        self.lines
    }

    /// Notes that `name` is wrong, and why.
    pub(super) fn say(&mut self, name: &str, why: impl Display) {
        self.lines.push(format!("{name}: {why}"));
    }

    /// Parses the given text, or the setting's default where there is none.
    ///
    /// Where the given text is wrong, the problem is noted and the default returned.
    fn parse<T>(
        &mut self,
        name: &'static str,
        given: Option<String>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> T {
        if let Some(given) = given {
            match parse(given.trim()) {
                Ok(value) => return value,
                Err(why) => self.say(name, why),
            }
        }
        let default = settings::default_of(name);
        match parse(default) {
            Ok(value) => value,
            // A test parses every default; there is no environment in which this is reached.
            Err(why) => unreachable!("the default of {name} is wrong: {why}"),
        }
    }

    pub(super) fn number<T>(
        &mut self,
        name: &'static str,
        given: Option<String>,
        range: RangeInclusive<T>,
    ) -> T
    where
        T: FromStr + PartialOrd + Display,
    {
        self.parse(name, given, |text| {
            text.parse().ok().filter(|n| range.contains(n)).ok_or_else(|| {
                format!(
                    "expected a whole number from {} to {}, got {text:?}",
                    range.start(),
                    range.end()
                )
            })
        })
    }

    pub(super) fn cpus(&mut self, name: &'static str, given: Option<String>) -> f64 {
        self.parse(name, given, |text| {
            text.parse().ok().filter(|n| (0.01..=1024.0).contains(n)).ok_or_else(|| {
                format!("expected a number of processors from 0.01 to 1024, got {text:?}")
            })
        })
    }

    pub(super) fn size<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        given: Option<String>,
        least: u64,
    ) -> T {
        self.parse(name, given, |text| {
            // 1 EiB: beyond what any engine takes, and within every integer used for sizes.
            let bytes = parse_size::parse_size(text).ok().filter(|n| (least..=1 << 60).contains(n));
            bytes.and_then(|n| T::try_from(n).ok()).ok_or_else(|| {
                format!("expected a size of at least {least} bytes such as 512MiB, got {text:?}")
            })
        })
    }

    pub(super) fn duration(&mut self, name: &'static str, given: Option<String>) -> Duration {
        self.parse(name, given, |text| {
            humantime::parse_duration(text).ok().filter(|d| *d <= MAX_DURATION).ok_or_else(|| {
                format!(
                    "expected a duration such as 500ms, 30s or 10m, a year at most, got {text:?}"
                )
            })
        })
    }

    pub(super) fn nonzero_duration(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Duration {
        let duration = self.duration(name, given);
        if duration.is_zero() {
            self.say(name, "must be longer than zero");
        }
        duration
    }

    pub(super) fn boolean(&mut self, name: &'static str, given: Option<String>) -> bool {
        self.choice(name, given, &[("true", true), ("false", false)])
    }

    pub(super) fn choice<T: Copy>(
        &mut self,
        name: &'static str,
        given: Option<String>,
        choices: &[(&str, T)],
    ) -> T {
        self.parse(name, given, |text| {
            let found = choices.iter().find(|(word, _)| word.eq_ignore_ascii_case(text));
            found.map(|(_, value)| *value).ok_or_else(|| {
                let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
                format!("expected one of {}, got {text:?}", words.join(", "))
            })
        })
    }

    /// One or more tokens of a NATS subject, without wildcards.
    pub(super) fn subject(&mut self, name: &'static str, given: Option<String>) -> String {
        self.parse(name, given, |text| {
            if subjects::is_literal(text) && !text.starts_with('$') {
                Ok(text.to_owned())
            } else {
                Err(format!(
                    "expected words joined by dots, without spaces, '*', '>' or a leading '$', got {text:?}"
                ))
            }
        })
    }

    pub(super) fn reply_prefixes(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Vec<String> {
        self.parse(name, given, |text| {
            list(text)
                .map(|prefix| {
                    // `team.replies.>` and `team.replies.` mean the same; what counts is that a
                    // prefix ends between two tokens.
                    let bare =
                        prefix.strip_suffix(".>").or(prefix.strip_suffix('.')).unwrap_or(prefix);
                    if subjects::is_literal(bare) && !bare.starts_with('$') {
                        Ok(format!("{bare}."))
                    } else {
                        Err(format!("expected subjects such as team.replies, got {prefix:?}"))
                    }
                })
                .collect()
        })
    }

    pub(super) fn network(&mut self, name: &'static str, given: Option<String>) -> String {
        self.parse(name, given, network)
    }

    pub(super) fn networks(&mut self, name: &'static str, given: Option<String>) -> Vec<String> {
        self.parse(name, given, |text| list(text).map(network).collect())
    }

    pub(super) fn globs(&mut self, name: &'static str, given: Option<String>) -> Vec<String> {
        self.parse(name, given, |text| {
            list(text)
                .map(|glob| match globset::Glob::new(glob) {
                    Ok(_) => Ok(glob.to_owned()),
                    Err(e) => Err(format!("expected glob patterns: {e}")),
                })
                .collect()
        })
    }

    pub(super) fn log_filter(&mut self, name: &'static str, given: Option<String>) -> String {
        self.parse(name, given, |text| match tracing_subscriber::EnvFilter::builder().parse(text) {
            Ok(_) => Ok(text.to_owned()),
            Err(e) => {
                Err(format!("expected a log filter such as info or worker_spawner=debug: {e}"))
            }
        })
    }

    /// NATS servers. Nothing of a bad URL is repeated: it may hold a password.
    pub(super) fn servers(&mut self, name: &'static str, given: Option<String>) -> Vec<Secret> {
        self.parse(name, given, |text| {
            let mut servers = Vec::new();
            for (at, url) in list(text).enumerate() {
                let known = url.split_once("://").is_none_or(|(scheme, _)| {
                    matches!(scheme, "nats" | "tls")
                });
                if !known || url.parse::<async_nats::ServerAddr>().is_err() {
                    return Err(format!(
                        "expected URLs such as nats://host:4222 or tls://host:4222, joined by commas; number {} is none",
                        at + 1
                    ));
                }
                servers.push(Secret::new(url));
            }
            if servers.is_empty() {
                return Err("expected at least one server".to_owned());
            }
            Ok(servers)
        })
    }

    pub(super) fn docker_host(&mut self, name: &'static str, given: Option<String>) -> String {
        const SCHEMES: [&str; 4] = ["unix://", "tcp://", "http://", "https://"];
        self.parse(name, given, |host| {
            let known = |scheme: &&str| host.starts_with(*scheme) && host.len() > scheme.len();
            if SCHEMES.iter().any(known) {
                Ok(host.to_owned())
            } else {
                Err(format!("expected an address that begins with one of {}", SCHEMES.join(", ")))
            }
        })
    }

    pub(super) fn docker_tls(
        &mut self,
        name: &'static str,
        dir: Option<PathBuf>,
    ) -> Option<DockerTls> {
        let Some(dir) = dir else {
            self.say(name, "must name the folder with ca.pem, cert.pem and key.pem");
            return None;
        };
        let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|file| dir.join(file));
        let readable = [&ca, &cert, &key].map(|file| self.contents(name, file).is_some());
        readable.iter().all(|ok| *ok).then_some(DockerTls { ca, cert, key })
    }

    pub(super) fn readable_file(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Option<PathBuf> {
        let path = PathBuf::from(given?.trim());
        self.contents(name, &path).map(|_| path)
    }

    pub(super) fn nkey_seed(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Option<Secret> {
        let path = PathBuf::from(given?.trim());
        let text = self.contents(name, &path)?;
        let seed = text.lines().map(str::trim).find(|line| line.starts_with('S'));
        match seed {
            Some(seed) => Some(Secret::new(seed)),
            None => {
                self.say(name, format!("{} holds no nkey seed", path.display()));
                None
            }
        }
    }

    fn contents(&mut self, name: &str, path: &Path) -> Option<String> {
        match std::fs::read_to_string(path) {
            Ok(text) => Some(text),
            Err(e) => {
                self.say(name, format!("cannot read {}: {e}", path.display()));
                None
            }
        }
    }

    /// Two settings that make sense only together.
    pub(super) fn pair(
        &mut self,
        one: &'static str,
        first: Option<String>,
        other: &'static str,
        second: Option<String>,
    ) -> Option<(String, String)> {
        match (first, second) {
            (Some(first), Some(second)) => return Some((first, second)),
            (Some(_), None) => self.say(other, format!("must be set too, since {one} is")),
            (None, Some(_)) => self.say(one, format!("must be set too, since {other} is")),
            (None, None) => {}
        }
        None
    }

    pub(super) fn at_most_one(&mut self, settings: &[(&str, bool)]) {
        let given: Vec<&str> =
            settings.iter().filter(|(_, is_set)| *is_set).map(|(name, _)| *name).collect();
        if let [first, _, ..] = given.as_slice() {
            self.say(first, format!("only one of {} may be set", given.join(", ")));
        }
    }
}

/// The parts of a comma-separated list, without empty ones.
fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// A network's name, as the engine's API spells it. Another container's network is never one.
fn network(text: &str) -> Result<String, String> {
    let clean = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if clean && !text.is_empty() {
        Ok(text.to_owned())
    } else {
        Err(format!("expected a network's name, such as none or bridge, got {text:?}"))
    }
}
