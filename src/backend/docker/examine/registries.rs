//! The credentials for the registries: whether they can be had. Hosts and helpers are named, and
//! nothing else of them.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use crate::finding::{Finding, Tell};

const CHECK: &str = "registries";

/// Looks at the client's configuration in this directory.
pub(super) fn examine(config_dir: Option<&Path>, tell: Tell<'_>) {
    let Some(file) = config_dir.map(|dir| dir.join("config.json")) else {
        tell(Finding::ok(CHECK, "no credentials: neither DOCKER_CONFIG nor HOME is set"));
        return;
    };
    let shown = file.display();
    let config = match std::fs::read(&file) {
        Ok(config) => config,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            tell(Finding::ok(CHECK, format!("no credentials: there is no {shown}")));
            return;
        }
        Err(error) => {
            tell(Finding::fail(
                CHECK,
                format!("{shown} cannot be read: {error}"),
                "let the daemon's user read it, or point DOCKER_CONFIG at a directory it may read",
            ));
            return;
        }
    };
    match serde_json::from_slice::<Value>(&config) {
        Ok(Value::Object(config)) => of_config(&config, tell),
        Ok(_) => tell(Finding::fail(
            CHECK,
            format!("{shown} is no JSON object"),
            "write it anew: docker login, with DOCKER_CONFIG set to its directory",
        )),
        // The parser says where it stopped, and shows nothing of what is there.
        Err(error) => tell(Finding::fail(
            CHECK,
            format!("{shown} is no JSON: line {}, column {}", error.line(), error.column()),
            "correct it there, or write it anew: docker login, with DOCKER_CONFIG set to its directory",
        )),
    }
}

fn of_config(config: &Map<String, Value>, tell: Tell<'_>) {
    let object = |name: &str| config.get(name).and_then(Value::as_object);
    let store = config.get("credsStore").and_then(Value::as_str).filter(|name| !name.is_empty());
    let helpers = object("credHelpers").into_iter().flatten();
    let helpers: Vec<(&str, &str)> =
        helpers.filter_map(|(host, name)| Some((&**host, name.as_str()?))).collect();
    let mut fine = true;
    let needed: BTreeSet<&str> =
        store.into_iter().chain(helpers.iter().map(|(_, name)| *name)).collect();
    for name in needed.into_iter().filter(|name| !is_installed(name)) {
        fine = false;
        let hosts: Vec<&str> =
            helpers.iter().filter(|(_, helper)| *helper == name).map(|(host, _)| *host).collect();
        let whose = match hosts.is_empty() {
            true => "all registries".to_owned(),
            false => hosts.join(", "),
        };
        tell(Finding::fail(
            CHECK,
            format!(
                "the credential helper docker-credential-{name}, for {whose}, is not on the PATH"
            ),
            format!(
                "install docker-credential-{name} where the daemon's PATH finds it, or take it out of config.json and log in again"
            ),
        ));
    }
    for (host, entry) in object("auths").into_iter().flatten() {
        if !is_readable(entry) {
            fine = false;
            tell(Finding::fail(
                CHECK,
                format!("the credentials for {host} in config.json cannot be decoded"),
                format!("log in again: docker login {host}"),
            ));
        }
    }
    if fine {
        let hosts = object("auths").into_iter().flatten().map(|(host, _)| &**host);
        let hosts: BTreeSet<&str> = hosts.chain(helpers.iter().map(|(host, _)| *host)).collect();
        let hosts: Vec<&str> = hosts.into_iter().collect();
        let store = store.map(|name| format!("docker-credential-{name}"));
        let detail = match (hosts.is_empty(), store) {
            (true, None) => "no credentials".to_owned(),
            (false, None) => format!("credentials for {}", hosts.join(", ")),
            (true, Some(store)) => format!("credentials in {store}"),
            (false, Some(store)) => format!("credentials for {}, in {store}", hosts.join(", ")),
        };
        tell(Finding::ok(CHECK, detail));
    }
}

/// Whether an entry of `auths` is of a form that is used. An empty one says that a helper has it.
fn is_readable(entry: &Value) -> bool {
    let Some(entry) = entry.as_object() else { return false };
    let text = |name: &str| entry.get(name).and_then(Value::as_str).filter(|t| !t.is_empty());
    match text("auth") {
        None => true,
        Some(auth) => BASE64.decode(auth.trim()).is_ok_and(|auth| auth.contains(&b':')),
    }
}

/// Whether the PATH has such a credential helper.
fn is_installed(name: &str) -> bool {
    let program = format!("docker-credential-{name}");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(&program)).any(|file| {
        let metadata = std::fs::metadata(file);
        metadata.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::finding::Status;

    fn found(config: &str) -> Vec<Finding> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let mut all = Vec::new();
        examine(Some(dir.path()), &mut |finding| all.push(finding));
        all
    }

    #[test]
    fn hosts_are_named_and_secrets_are_not() {
        // user:s3cret
        let auth = r#"{"auths": {"a.example": {"auth": "dXNlcjpzM2NyZXQ="}, "b.example": {}}}"#;
        let all = found(auth);
        assert_eq!(all, [Finding::ok(CHECK, "credentials for a.example, b.example")]);
        let all = found(r#"{"auths": {"a.example": {"auth": "s3cret"}}}"#);
        assert_eq!(all[0].status, Status::Fail);
        assert!(!format!("{all:?}").contains("s3cret"), "{all:?}");
        let all = found(r#"{"auths": {"a.example": {"auth": "s3cret"}"#);
        assert!(all[0].detail.contains("is no JSON: line 1"), "{all:?}");
        assert!(!format!("{all:?}").contains("s3cret"), "{all:?}");
        assert_eq!(found("{}"), [Finding::ok(CHECK, "no credentials")]);
        assert_eq!(found("[]")[0].status, Status::Fail);
    }

    #[test]
    fn helpers_that_are_not_there_are_named() {
        let all = found(r#"{"credHelpers": {"a.example": "no-such", "b.example": "no-such"}}"#);
        assert_eq!(all.len(), 1);
        assert!(all[0].detail.contains("docker-credential-no-such, for a.example, b.example"));
    }
}
