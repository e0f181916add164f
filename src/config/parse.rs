//! From text to values, collecting what is wrong on the way.

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::settings;
use hyper::header::{HeaderName, HeaderValue};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{DockerTls, Secret};
use crate::protocol::subjects;
use crate::reference::Reference;

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

    pub(super) fn duration_of_at_least(
        &mut self,
        name: &'static str,
        given: Option<String>,
        least: Duration,
    ) -> Duration {
        let duration = self.duration(name, given);
        if duration < least {
            self.say(name, format!("must be at least {}", humantime::format_duration(least)));
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

    /// Checks a subject that streams, consumers and buckets are named after.
    pub(super) fn stream_name(&mut self, name: &'static str, subject: &str) {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !subject.chars().all(fits) {
            let why = format!(
                "streams are named after it: expected letters, digits, '_', '-' and dots, got {subject:?}; or set DELIVERY=core"
            );
            self.say(name, why);
        }
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

    pub(super) fn images(&mut self, name: &'static str, given: Option<String>) -> Vec<String> {
        self.parse(name, given, |text| {
            list(text)
                .map(|image| match image.parse::<Reference>() {
                    Ok(_) => Ok(image.to_owned()),
                    Err(e) => Err(format!("expected image references: {image:?}: {e}")),
                })
                .collect()
        })
    }

    pub(super) fn socket_addr(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Option<SocketAddr> {
        match given?.trim().parse() {
            Ok(addr) => Some(addr),
            Err(_) => {
                self.say(
                    name,
                    "expected an IP address and a port, such as 127.0.0.1:9464 or [::]:9464",
                );
                None
            }
        }
    }

    /// The address of an HTTP server. Nothing of a bad one is repeated: it may hold a password.
    pub(super) fn http_url(&mut self, name: &'static str, given: &str) -> String {
        let is_plain = |url: &url::Url| {
            let has_more = url.query().is_some() || url.fragment().is_some();
            let has_user = !url.username().is_empty() || url.password().is_some();
            matches!(url.scheme(), "http" | "https") && url.has_host() && !has_more && !has_user
        };
        match url::Url::parse(given.trim()).ok().filter(is_plain) {
            Some(url) => url.as_str().trim_end_matches('/').to_owned(),
            None => {
                self.say(
                    name,
                    "expected an address such as http://host:4318 or https://host, without user, password and query",
                );
                String::new()
            }
        }
    }

    /// HTTP headers, as OpenTelemetry has them in a variable. Nothing of them is repeated: they may be
    /// secrets.
    pub(super) fn headers(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Vec<(String, Secret)> {
        let header = |text: &str| {
            let (name, value) = text.split_once('=')?;
            let value = percent_encoding::percent_decode_str(value.trim()).decode_utf8().ok()?;
            HeaderValue::from_str(&value).ok()?;
            let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
            Some((name.to_string(), Secret::new(value)))
        };
        self.parse(name, given, |text| {
            let headers = list(text).zip(1..).map(|(text, at)| {
                header(text).ok_or_else(|| {
                    format!(
                        "expected headers such as name=value, joined by commas; number {at} is none"
                    )
                })
            });
            headers.collect()
        })
    }

    /// Any text, or the default.
    pub(super) fn text(&mut self, name: &'static str, given: Option<String>) -> String {
        self.parse(name, given, |text| Ok(text.to_owned()))
    }

    pub(super) fn share(&mut self, name: &'static str, given: Option<String>) -> f64 {
        self.parse(name, given, |text| {
            text.parse()
                .ok()
                .filter(|share| (0.0..=1.0).contains(share))
                .ok_or_else(|| format!("expected a number from 0 to 1, got {text:?}"))
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
    pub(super) fn servers(&mut self, name: &'static str, given: Option<String>) -> Servers {
        self.parse(name, given, |text| {
            let mut all = Servers::default();
            for (at, url) in list(text).enumerate() {
                let Some(server) = Servers::of(url) else {
                    return Err(format!(
                        "expected URLs such as nats://host:4222 or tls://host:4222, joined by commas; number {} is none",
                        at + 1
                    ));
                };
                let same = server.user == all.user && server.token == all.token;
                if at > 0 && !same {
                    return Err("the same user must stand in all of the URLs, or in none".to_owned());
                }
                all.servers.extend(server.servers);
                (all.user, all.token) = (server.user, server.token);
            }
            if all.servers.is_empty() {
                return Err("expected at least one server".to_owned());
            }
            Ok(all)
        })
    }

    pub(super) fn docker_host(&mut self, name: &'static str, given: Option<String>) -> String {
        self.parse(name, given, |host| {
            let known = match host.split_once("://") {
                Some(("unix", path)) => path.starts_with('/'),
                Some(("tcp" | "http" | "https", rest)) => {
                    url::Url::parse(&format!("http://{rest}")).is_ok_and(|url| url.has_host())
                }
                _ => false,
            };
            known.then(|| host.to_owned()).ok_or_else(|| {
                format!(
                    "expected an address such as unix:///var/run/docker.sock, tcp://host:2375 or https://host:2376, got {host:?}"
                )
            })
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

    pub(super) fn creds_file(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Option<PathBuf> {
        self.file(name, given, "holds no credentials of a NATS user", |text| {
            async_nats::ConnectOptions::with_credentials(text).is_ok()
        })
    }

    pub(super) fn certificates(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Option<PathBuf> {
        self.file(name, given, "holds no certificate in PEM", |text| {
            let mut certificates = CertificateDer::pem_slice_iter(text.as_bytes());
            certificates.next().is_some_and(|first| first.is_ok())
        })
    }

    pub(super) fn private_key(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Option<PathBuf> {
        self.file(name, given, "holds no private key in PEM", |text| {
            PrivateKeyDer::from_pem_slice(text.as_bytes()).is_ok()
        })
    }

    /// A file that is what it should be. Nothing of it is repeated.
    fn file(
        &mut self,
        name: &'static str,
        given: Option<String>,
        otherwise: &str,
        is_good: impl FnOnce(&str) -> bool,
    ) -> Option<PathBuf> {
        let path = PathBuf::from(given?.trim());
        let text = self.contents(name, &path)?;
        if is_good(&text) {
            return Some(path);
        }
        self.say(name, format!("{} {otherwise}", path.display()));
        None
    }

    pub(super) fn nkey_seed(
        &mut self,
        name: &'static str,
        given: Option<String>,
    ) -> Option<Secret> {
        let path = PathBuf::from(given?.trim());
        let text = self.contents(name, &path)?;
        let seed = text.lines().map(str::trim).find(|line| line.starts_with('S'));
        match seed.filter(|seed| nkeys::KeyPair::from_seed(seed).is_ok()) {
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

/// What `NATS_URL` says.
#[derive(Debug, Default)]
pub(super) struct Servers {
    /// The servers, without user and password.
    pub(super) servers: Vec<String>,
    /// The user and password before the host.
    pub(super) user: Option<(String, Secret)>,
    /// The token before the host: a user without a password.
    pub(super) token: Option<Secret>,
}

impl Servers {
    fn of(url: &str) -> Option<Self> {
        let full = if url.contains("://") { url.to_owned() } else { format!("nats://{url}") };
        let mut url = url::Url::parse(&full).ok()?;
        if !matches!(url.scheme(), "nats" | "tls") || !url.has_host() {
            return None;
        }
        let decode = |text: &str| {
            percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
        };
        let name = Some(decode(url.username())).filter(|name| !name.is_empty());
        let password = url.password().map(decode);
        url.set_username("").ok()?;
        url.set_password(None).ok()?;
        let server = url.to_string();
        server.parse::<async_nats::ServerAddr>().ok()?;
        let (user, token) = match (name, password) {
            (Some(user), Some(password)) => (Some((user, Secret::new(password))), None),
            (Some(token), None) => (None, Some(Secret::new(token))),
            (None, None) => (None, None),
            (None, Some(_)) => return None,
        };
        Some(Self { servers: vec![server], user, token })
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
