//! The registries' credentials, from the Docker client's configuration and its helpers.

use std::path::{Path, PathBuf};

use bollard::auth::DockerCredentials;
use docker_credential::{CredentialRetrievalError, DockerCredential};

/// The key of the default registry in the configuration file, for historical reasons.
const DEFAULT_REGISTRY_KEY: &str = "https://index.docker.io/v1/";

/// The credentials for `registry`; none where none are configured.
///
/// Reads the file anew, so that a new login needs no restart. A credential helper is a program of
/// the operator's: it runs on a thread of its own, and the pull's deadline bounds the wait.
///
/// # Errors
/// Says what is wrong with the configuration. No secret is part of it.
pub(super) async fn lookup(
    registry: &str,
    config_dir: Option<PathBuf>,
) -> Result<Option<DockerCredentials>, String> {
    let Some(file) = config_dir.map(|dir| dir.join("config.json")) else { return Ok(None) };
    let registry = registry.to_owned();
    let found = tokio::task::spawn_blocking(move || find(&registry, &file)).await;
    found.unwrap_or_else(|_| Err("looking for the registry's credentials failed".to_owned()))
}

fn find(registry: &str, file: &Path) -> Result<Option<DockerCredentials>, String> {
    let config = match std::fs::read(file) {
        Ok(config) => config,
        // Most hosts have none, and a registry that needs credentials will say so itself.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("cannot read {}: {e}", file.display())),
    };
    let keys = match registry {
        "docker.io" => vec![DEFAULT_REGISTRY_KEY.to_owned()],
        other => vec![other.to_owned(), format!("https://{other}"), format!("http://{other}")],
    };
    for key in keys {
        match docker_credential::get_credential_from_reader(config.as_slice(), &key) {
            Ok(DockerCredential::IdentityToken(token)) => {
                return Ok(Some(DockerCredentials {
                    identitytoken: Some(token),
                    serveraddress: Some(key),
                    ..DockerCredentials::default()
                }));
            }
            Ok(DockerCredential::UsernamePassword(username, password)) => {
                return Ok(Some(DockerCredentials {
                    username: Some(username),
                    password: Some(password),
                    serveraddress: Some(key),
                    ..DockerCredentials::default()
                }));
            }
            Err(CredentialRetrievalError::NoCredentialConfigured) => {}
            // Helpers say so when they know no credentials for a server: no error for a public
            // image. Their words may hold a secret and are not repeated.
            Err(CredentialRetrievalError::HelperFailure { helper, stdout, .. }) => {
                if !stdout.contains("credentials not found") {
                    return Err(format!("{helper} failed for {registry}"));
                }
            }
            Err(CredentialRetrievalError::HelperCommunicationError) => {
                return Err(format!("the credential helper for {registry} cannot be run"));
            }
            Err(other) => return Err(format!("{}: {other}", file.display())),
        }
    }
    Ok(None)
}
