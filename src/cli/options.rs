//! How a client finds its server: flags, then a context, then the environment, then the defaults.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::bail;
use clap::Args;

use super::context::{self, NatsContext};
use super::parse::duration;
use crate::config::Nats;
use crate::config::settings::SETTINGS;
use crate::protocol::Subjects;

/// Where the server is, and who asks.
#[derive(Args, Clone)]
#[command(next_help_heading = "Connection")]
pub struct ConnectOptions {
    /// NATS servers, joined by commas [default: nats://localhost:4222] [env: NATS_URL].
    #[arg(short, long, value_name = "URL")]
    server: Option<String>,
    /// Take what no flag says from this context of the nats command-line tool.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Credentials file (JWT and seed) [env: NATS_CREDS_FILE].
    #[arg(long, value_name = "FILE")]
    creds: Option<String>,
    /// File with an nkey seed [env: NATS_NKEY_SEED_FILE].
    #[arg(long, value_name = "FILE")]
    nkey: Option<String>,
    /// User name [env: NATS_USER].
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Password; others on this machine can see it here, and not in the variable [env: NATS_PASSWORD].
    #[arg(long)]
    password: Option<String>,
    /// Token; others on this machine can see it here, and not in the variable [env: NATS_TOKEN].
    #[arg(long)]
    token: Option<String>,
    /// PEM file of certificate authorities, beside the system's [env: NATS_TLS_CA].
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<String>,
    /// PEM file of the client's certificate [env: NATS_TLS_CERT].
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<String>,
    /// PEM file of the client's key [env: NATS_TLS_KEY].
    #[arg(long, value_name = "FILE")]
    tls_key: Option<String>,
    /// First part of every subject [default: functions] [env: SUBJECT_PREFIX].
    #[arg(long, value_name = "SUBJECT")]
    subject_prefix: Option<String>,
    /// How long a server may take to answer.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    connect_timeout: Duration,
}

impl std::fmt::Debug for ConnectOptions {
    /// Some of them are secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectOptions").finish_non_exhaustive()
    }
}

/// How to connect, all said and checked.
pub(super) struct Target {
    pub(super) nats: Nats,
    pub(super) subjects: Subjects,
    pub(super) context: NatsContext,
    pub(super) timeout: Duration,
    /// Where the server's address comes from, for messages.
    pub(super) said_by: String,
}

/// The settings that say who asks: they are taken from one place, all of them.
const IDENTITY: [&str; 5] =
    ["NATS_CREDS_FILE", "NATS_NKEY_SEED_FILE", "NATS_USER", "NATS_PASSWORD", "NATS_TOKEN"];
/// The certificate and its key.
const CERTIFICATE: [&str; 2] = ["NATS_TLS_CERT", "NATS_TLS_KEY"];

/// One place that settings come from.
struct Layer {
    values: HashMap<&'static str, String>,
    /// What a setting is called there.
    called: Box<dyn Fn(&str) -> String>,
}

impl ConnectOptions {
    /// Puts together what flags, context and environment say, and checks it.
    ///
    /// # Errors
    /// Names what is wrong by where it was said. Never shows a secret.
    pub(super) fn resolve(&self) -> anyhow::Result<Target> {
        let context = match &self.context {
            Some(name) => context::load(name)?,
            None => NatsContext::default(),
        };
        let layers =
            [self.flags(), of_context(self.context.as_deref(), &context), of_environment()];
        let Chosen { vars, called } = choose(&layers);
        match Nats::from_vars(vars.into_iter().map(|(name, value)| (name.to_owned(), value))) {
            Ok((nats, subjects)) => {
                let said_by =
                    called.get("NATS_URL").cloned().unwrap_or_else(|| "the default".to_owned());
                Ok(Target { nats, subjects, context, timeout: self.connect_timeout, said_by })
            }
            Err(error) => {
                let lines: Vec<String> =
                    error.problems().iter().map(|line| renamed(line, &called)).collect();
                bail!("{}", lines.join("\n"))
            }
        }
    }

    fn flags(&self) -> Layer {
        let given = [
            ("NATS_URL", &self.server),
            ("NATS_CREDS_FILE", &self.creds),
            ("NATS_NKEY_SEED_FILE", &self.nkey),
            ("NATS_USER", &self.user),
            ("NATS_PASSWORD", &self.password),
            ("NATS_TOKEN", &self.token),
            ("NATS_TLS_CA", &self.tls_ca),
            ("NATS_TLS_CERT", &self.tls_cert),
            ("NATS_TLS_KEY", &self.tls_key),
            ("SUBJECT_PREFIX", &self.subject_prefix),
        ];
        let values = given.into_iter().filter_map(|(name, value)| Some((name, value.clone()?)));
        Layer { values: values.collect(), called: Box::new(|name| flag_of(name).to_owned()) }
    }
}

/// The flag of a setting.
fn flag_of(setting: &str) -> &'static str {
    match setting {
        "NATS_URL" => "--server",
        "NATS_CREDS_FILE" => "--creds",
        "NATS_NKEY_SEED_FILE" => "--nkey",
        "NATS_USER" => "--user",
        "NATS_PASSWORD" => "--password",
        "NATS_TOKEN" => "--token",
        "NATS_TLS_CA" => "--tls-ca",
        "NATS_TLS_CERT" => "--tls-cert",
        "NATS_TLS_KEY" => "--tls-key",
        _ => "--subject-prefix",
    }
}

fn of_context(name: Option<&str>, context: &NatsContext) -> Layer {
    let values = context.settings.iter().map(|(setting, _, value)| (*setting, value.clone()));
    let fields: HashMap<&str, &str> =
        context.settings.iter().map(|(setting, field, _)| (*setting, *field)).collect();
    let name = name.unwrap_or_default().to_owned();
    let called = move |setting: &str| match fields.get(setting) {
        Some(field) => format!("{field} in the context {name}"),
        None => format!("the context {name}"),
    };
    Layer { values: values.collect(), called: Box::new(called) }
}

fn of_environment() -> Layer {
    let value = |name: &'static str| {
        // One that is no Unicode is passed on with the bad bytes replaced, so that it is named.
        let value = std::env::var_os(name)?.to_string_lossy().into_owned();
        (!value.trim().is_empty()).then_some((name, value))
    };
    let ours = |name: &str| name.starts_with("NATS_") || name == "SUBJECT_PREFIX";
    let names = SETTINGS.iter().map(|setting| setting.name).filter(|name| ours(name));
    Layer { values: names.filter_map(value).collect(), called: Box::new(str::to_owned) }
}

/// What counts, and what each of it is called where it was said.
#[derive(Debug, Default, PartialEq)]
struct Chosen {
    vars: HashMap<&'static str, String>,
    called: HashMap<&'static str, String>,
}

/// Of each setting the first that is said. Who asks is taken from one layer alone: a token on the
/// command line is not to meet a password from the environment.
fn choose(layers: &[Layer]) -> Chosen {
    let mut chosen = Chosen::default();
    let mut take = |names: &[&'static str], layer: &Layer| {
        for name in names {
            chosen.called.insert(name, (layer.called)(name));
            if let Some(value) = layer.values.get(name) {
                chosen.vars.insert(name, value.clone());
            }
        }
    };
    let first = |names: &[&'static str]| {
        layers.iter().position(|layer| names.iter().any(|name| layer.values.contains_key(name)))
    };
    let groups: [&[&'static str]; 5] =
        [&["NATS_URL"], &IDENTITY, &["NATS_TLS_CA"], &CERTIFICATE, &["SUBJECT_PREFIX"]];
    for group in groups {
        if let Some(at) = first(group) {
            take(group, &layers[at]);
        }
    }
    // A user in an address that comes after whoever is named is not who asks.
    if first(&IDENTITY).is_some_and(|identity| Some(identity) < first(&["NATS_URL"]))
        && let Some(urls) = chosen.vars.get_mut("NATS_URL")
    {
        *urls = urls.split(',').map(without_user).collect::<Vec<_>>().join(",");
    }
    chosen
}

/// The address without a user, password or token.
fn without_user(url: &str) -> String {
    let url = url.trim();
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), url),
    };
    let end = rest.find('/').unwrap_or(rest.len());
    let begin = rest[..end].rfind('@').map_or(0, |at| at + 1);
    format!("{scheme}{}", &rest[begin..])
}

/// A problem with the settings' names replaced by what they are called where they were said.
fn renamed(line: &str, called: &HashMap<&'static str, String>) -> String {
    let mut line = line.to_owned();
    for (name, called) in called {
        line = line.replace(name, called);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(values: &[(&'static str, &str)], prefix: &'static str) -> Layer {
        let values = values.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Layer { values, called: Box::new(move |name| format!("{prefix}{name}")) }
    }

    fn chosen(layers: &[&[(&'static str, &str)]]) -> Vec<(&'static str, String)> {
        let layers: Vec<Layer> = layers.iter().map(|values| layer(values, "")).collect();
        let mut vars: Vec<_> = choose(&layers).vars.into_iter().collect();
        vars.sort();
        vars
    }

    #[test]
    fn the_first_that_is_said_counts() {
        let all = chosen(&[
            &[("NATS_URL", "nats://flag")],
            &[("NATS_URL", "nats://context"), ("NATS_TLS_CA", "ca")],
            &[("NATS_URL", "nats://env"), ("SUBJECT_PREFIX", "p"), ("NATS_TLS_CA", "other")],
        ]);
        let wanted = [("NATS_TLS_CA", "ca"), ("NATS_URL", "nats://flag"), ("SUBJECT_PREFIX", "p")];
        assert_eq!(all, wanted.map(|(name, value)| (name, value.to_owned())));
    }

    #[test]
    fn who_asks_comes_from_one_place() {
        let all = chosen(&[
            &[("NATS_TOKEN", "t")],
            &[],
            &[("NATS_USER", "u"), ("NATS_PASSWORD", "p"), ("NATS_URL", "nats://a:b@host:1,c@d")],
        ]);
        let wanted = [("NATS_TOKEN", "t"), ("NATS_URL", "nats://host:1,d")];
        assert_eq!(all, wanted.map(|(name, value)| (name, value.to_owned())));
        let same = chosen(&[&[], &[], &[("NATS_TOKEN", "t"), ("NATS_URL", "nats://a:b@host")]]);
        assert!(same.contains(&("NATS_URL", "nats://a:b@host".to_owned())), "{same:?}");
    }

    #[test]
    fn problems_are_named_by_where_they_were_said() {
        let layers = [
            layer(&[], "--"),
            layer(&[("NATS_USER", "u")], "context "),
            layer(&[("NATS_URL", "nats://x")], ""),
        ];
        let Chosen { called, .. } = choose(&layers);
        let line = "NATS_PASSWORD: must be set too, since NATS_USER is";
        let wanted = "context NATS_PASSWORD: must be set too, since context NATS_USER is";
        assert_eq!(renamed(line, &called), wanted);
    }

    #[test]
    fn users_are_taken_out_of_addresses() {
        for (url, wanted) in [
            ("nats://u:p@host:4222", "nats://host:4222"),
            ("token@host", "host"),
            ("nats://host:4222", "nats://host:4222"),
            (" nats://u:p@w@[::1]:4222/@x", "nats://[::1]:4222/@x"),
        ] {
            assert_eq!(without_user(url), wanted, "{url}");
        }
    }
}
