//! Whether somebody is at the engine's address, and whether that is an engine.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use tokio::net::UnixStream;

use super::ENGINE;
use crate::backend::docker::engine::{CallError, PING_TIMEOUT};
use crate::finding::Finding;

/// Tries the socket itself, whose errors say more than the engine's library does.
///
/// # Errors
/// What is wrong with it.
pub(super) async fn examine(path: &Path) -> Result<(), Finding> {
    let shown = path.display();
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(Finding::fail(
                ENGINE,
                format!("there is no socket {shown}"),
                "start the engine (systemctl start docker), or point DOCKER_HOST at its socket",
            ));
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Err(Finding::fail(
                ENGINE,
                format!("permission denied on the way to {shown}"),
                "give the daemon's user access to the directories above the socket",
            ));
        }
        Err(error) => {
            return Err(Finding::fail(ENGINE, format!("{shown}: {error}"), "correct DOCKER_HOST"));
        }
    };
    if !metadata.file_type().is_socket() {
        return Err(Finding::fail(
            ENGINE,
            format!("{shown} is no socket"),
            "point DOCKER_HOST at the engine's socket",
        ));
    }
    match tokio::time::timeout(PING_TIMEOUT, UnixStream::connect(path)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == ErrorKind::PermissionDenied => {
            let group = group_name(metadata.gid());
            Err(Finding::fail(
                ENGINE,
                format!(
                    "permission denied on the socket {shown}, which belongs to the group {group}"
                ),
                format!(
                    "add the daemon's user to the group (usermod -aG {group} USER), and start the daemon anew"
                ),
            ))
        }
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Err(Finding::fail(
            ENGINE,
            format!("nobody listens on the socket {shown}: its engine has ended"),
            "start the engine (systemctl start docker), or point DOCKER_HOST at another socket",
        )),
        Ok(Err(error)) => {
            Err(Finding::fail(ENGINE, format!("{shown}: {error}"), "correct DOCKER_HOST"))
        }
        Err(_) => Err(frozen(&format!("unix://{shown}"))),
    }
}

/// Somebody is there, and does not answer as an engine does.
pub(super) fn silent(host: &str, error: &CallError) -> Finding {
    match error {
        CallError::Timeout { .. } => frozen(host),
        CallError::Unreachable { why } if !host.starts_with("unix://") && !is_nonsense(why) => {
            Finding::fail(
                ENGINE,
                format!("{host}: {why}"),
                "start the engine there, correct DOCKER_HOST, or look for a firewall on the way; TLS takes DOCKER_TLS_VERIFY and DOCKER_CERT_PATH",
            )
        }
        CallError::Unreachable { why } => Finding::fail(
            ENGINE,
            format!("what listens at {host} is no engine: {why}"),
            "point DOCKER_HOST at the engine's socket or port",
        ),
        CallError::Refused { status, message, .. } => Finding::fail(
            ENGINE,
            format!("what listens at {host} answers a ping with {status}: {message}"),
            "point DOCKER_HOST at the engine's socket or port; if it is the engine, look at its log",
        ),
    }
}

fn frozen(host: &str) -> Finding {
    Finding::fail(
        ENGINE,
        format!(
            "{host} takes connections, and does not answer within {}",
            humantime::format_duration(PING_TIMEOUT)
        ),
        "the engine hangs: look at its log and at the host's load and disk (journalctl -u docker), and restart it (systemctl restart docker)",
    )
}

/// Whether the library complains of an answer, and not of a connection.
fn is_nonsense(why: &str) -> bool {
    ["invalid HTTP", "message completed", "IncompleteMessage", "parsed"]
        .iter()
        .any(|words| why.contains(words))
}

/// The group's name, else its number.
fn group_name(gid: u32) -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let found = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    });
    found.unwrap_or_else(|| gid.to_string())
}
