//! Contexts of the `nats` command-line tool: files that say how a server is reached.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value};

/// What this program understands of a context, and the setting it stands for.
const FIELDS: &[(&str, &str)] = &[
    ("url", "NATS_URL"),
    ("token", "NATS_TOKEN"),
    ("user", "NATS_USER"),
    ("password", "NATS_PASSWORD"),
    ("creds", "NATS_CREDS_FILE"),
    ("nkey", "NATS_NKEY_SEED_FILE"),
    ("ca", "NATS_TLS_CA"),
    ("cert", "NATS_TLS_CERT"),
    ("key", "NATS_TLS_KEY"),
];

/// Those that name a file.
const FILES: [&str; 5] = ["creds", "nkey", "ca", "cert", "key"];

/// What would have to be obeyed for the connection to be the one that is meant, and is not.
const NOT_UNDERSTOOD: [&str; 6] =
    ["nsc", "socks_proxy", "user_jwt", "user_seed", "windows_cert_store", "windows_cert_match"];

/// A context, as far as it is understood here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NatsContext {
    /// Settings by name, each with the context's own name for it.
    pub(super) settings: Vec<(&'static str, &'static str, String)>,
    /// What inboxes begin with, where it is not `_INBOX`.
    pub(super) inbox_prefix: Option<String>,
    /// What JetStream's API is reached under, where it is not `$JS.API`.
    pub(super) api_prefix: Option<String>,
    /// TLS comes before the server's first word.
    pub(super) tls_first: bool,
}

/// Reads the context `name` from where the `nats` tool keeps it.
///
/// # Errors
/// There is none of that name, or it asks for something that is not understood.
pub(super) fn load(name: &str) -> anyhow::Result<NatsContext> {
    let directory =
        directory(std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from), std::env::home_dir())
            .context("--context: neither XDG_CONFIG_HOME nor HOME says where contexts are")?;
    // The name becomes a part of a path.
    if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
        bail!("--context: {name:?} is no name of a context; `nats context ls` lists them");
    }
    let path = directory.join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).map_err(|error| {
        let known = known(&directory);
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        anyhow::anyhow!(
            "--context {name}: cannot read {}: {error}; contexts there: {known}",
            path.display()
        )
    })?;
    parse(&text, std::env::home_dir().as_deref())
        .with_context(|| format!("--context {name}: {}", path.display()))
}

/// Where the `nats` tool keeps contexts.
fn directory(config_home: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    let config = config_home
        .filter(|path| path.is_absolute())
        .or_else(|| home.map(|home| home.join(".config")))?;
    Some(config.join("nats").join("context"))
}

/// The names of the contexts there are.
fn known(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let name = |file: std::fs::DirEntry| {
        file.file_name().to_str()?.strip_suffix(".json").map(str::to_owned)
    };
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names
}

/// Reads a context. Nothing of what it holds is repeated in an error: it may be a secret.
fn parse(json: &str, home: Option<&Path>) -> anyhow::Result<NatsContext> {
    let fields: Map<String, Value> = serde_json::from_str(json)
        .map_err(|error| anyhow::anyhow!("is no JSON object (line {})", error.line()))?;
    let text = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.trim()).filter(|text| !text.is_empty())),
        Some(_) => Err(anyhow::anyhow!("{name}: must be a string")),
    };
    for name in NOT_UNDERSTOOD {
        if text(name)?.is_some() {
            bail!(
                "{name}: is not understood here; use creds, nkey, user and password, or token instead"
            );
        }
    }
    let mut context = NatsContext::default();
    for (name, setting) in FIELDS {
        let Some(value) = text(name)? else { continue };
        let value = match value.strip_prefix("~/").zip(home) {
            Some((rest, home)) if FILES.contains(name) => home.join(rest).display().to_string(),
            _ => value.to_owned(),
        };
        context.settings.push((setting, name, value));
    }
    context.inbox_prefix = text("inbox_prefix")?.map(str::to_owned);
    context.api_prefix = match (text("jetstream_api_prefix")?, text("jetstream_domain")?) {
        (Some(prefix), _) => Some(prefix.trim_end_matches('.').to_owned()),
        (None, Some(domain)) => Some(format!("$JS.{domain}.API")),
        (None, None) => None,
    };
    context.tls_first = fields.get("tls_first").and_then(Value::as_bool).unwrap_or_default();
    Ok(context)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_context_is_read_as_the_nats_tool_writes_it() {
        let json = r#"{
            "description": "somewhere", "url": "tls://nats.example.com:4222", "socks_proxy": "",
            "token": "", "user": "", "password": "", "creds": "~/keys/me.creds", "nkey": "",
            "cert": "/etc/cert.pem", "key": "/etc/key.pem", "ca": "", "nsc": "",
            "jetstream_domain": "hub", "jetstream_api_prefix": "", "inbox_prefix": "_INBOX.me",
            "user_jwt": "", "color_scheme": "", "tls_first": true
        }"#;
        let context = parse(json, Some(Path::new("/home/me"))).unwrap();
        let wanted = [
            ("NATS_URL", "url", "tls://nats.example.com:4222"),
            ("NATS_CREDS_FILE", "creds", "/home/me/keys/me.creds"),
            ("NATS_TLS_CERT", "cert", "/etc/cert.pem"),
            ("NATS_TLS_KEY", "key", "/etc/key.pem"),
        ]
        .map(|(setting, name, value)| (setting, name, value.to_owned()));
        assert_eq!(context.settings, wanted);
        assert_eq!(context.inbox_prefix.as_deref(), Some("_INBOX.me"));
        assert_eq!(context.api_prefix.as_deref(), Some("$JS.hub.API"));
        assert!(context.tls_first);
        assert_eq!(parse("{}", None).unwrap(), NatsContext::default());
    }

    #[test]
    fn what_is_not_understood_is_said_without_what_it_holds() {
        for (json, wanted) in [
            (r#"{"user_jwt": "s3cret"}"#, "user_jwt: is not understood here"),
            (r#"{"nsc": "nsc://s3cret"}"#, "nsc: is not understood here"),
            (r#"{"password": ["s3cret"]}"#, "password: must be a string"),
            (r#"{"password": "s3cret", }"#, "is no JSON object (line 1)"),
            ("[]", "is no JSON object"),
        ] {
            let error = format!("{:#}", parse(json, None).unwrap_err());
            assert!(error.starts_with(wanted), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn contexts_are_where_the_nats_tool_keeps_them() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(directory(path("/x"), path("/h")), path("/x/nats/context"));
        assert_eq!(directory(None, path("/h")), path("/h/.config/nats/context"));
        assert_eq!(directory(path("relative"), path("/h")), path("/h/.config/nats/context"));
        assert_eq!(directory(None, None), None);
    }
}
