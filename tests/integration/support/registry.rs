//! A real image registry on loopback. Images are written straight into its storage, so that no
//! engine has to have seen them before.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::net::TcpStream;

use super::images::{LABEL, ROOT};
use super::process::{self, bound_to_this_thread, free_port};
use super::tar::{Entry, archive};
use super::wait::eventually;

/// Who may pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Anyone,
    /// Only [`USER`] with [`PASSWORD`].
    Password,
}

pub(crate) const USER: &str = "puller";
pub(crate) const PASSWORD: &str = "registry-secret-words";

/// A registry, gone when dropped.
pub(crate) struct Registry {
    dir: TempDir,
    pub(crate) port: u16,
    child: Child,
}

impl Registry {
    pub(crate) async fn start(access: Access) -> Self {
        for _ in 0..5 {
            if let Some(registry) = Self::try_start(access).await {
                return registry;
            }
        }
        panic!("docker-registry did not start; is it installed?");
    }

    async fn try_start(access: Access) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let mut config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n\
             http: {{addr: \"127.0.0.1:{port}\", secret: test}}\n",
            dir.path().join("storage").display()
        );
        if access == Access::Password {
            let made = Command::new("htpasswd").args(["-Bbn", USER, PASSWORD]).output();
            let made = made.expect("htpasswd is needed");
            let users = dir.path().join("users");
            std::fs::write(&users, made.stdout).unwrap();
            config.push_str(&format!(
                "auth: {{htpasswd: {{realm: test, path: \"{}\"}}}}\n",
                users.display()
            ));
        }
        let config_path = dir.path().join("config.yml");
        std::fs::write(&config_path, config).unwrap();
        let log = File::create(dir.path().join("registry.log")).unwrap();
        let mut child = bound_to_this_thread("docker-registry")
            .args(["serve", config_path.to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("setpriv and docker-registry are needed");
        let mut died = false;
        eventually("the registry accepts connections", || {
            died = child.try_wait().unwrap().is_some();
            async move { died || TcpStream::connect(("127.0.0.1", port)).await.is_ok() }
        })
        .await;
        if died { None } else { Some(Self { dir, port, child }) }
    }

    /// `repository:tag` as the engine must be asked for it.
    pub(crate) fn reference(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// Publishes a busybox image that prints `words` under `repository:tag`, and returns the
    /// manifest's digest. Its layer is like no other, so no engine has it.
    pub(crate) fn put(&self, repository: &str, tag: &str, words: &str) -> String {
        let mut entries = ROOT.clone();
        entries.push(Entry::file("etc/unlike-any-other", 0o644, noise(64 * 1024)));
        let layer = archive(&entries);
        let layer_digest = self.blob(&layer);
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Cmd": ["echo", words], "Env": ["PATH=/bin"], "Labels": {LABEL: "1"}},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
            "history": [{"created_by": "a test"}],
        })
        .to_string();
        let config_digest = self.blob(config.as_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json",
                "size": config.len(), "digest": config_digest},
            "layers": [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "size": layer.len(), "digest": layer_digest}],
        })
        .to_string();
        let digest = self.blob(manifest.as_bytes());
        for blob in [&layer_digest, &config_digest] {
            self.link(&format!("repositories/{repository}/_layers/sha256/{}", hex_of(blob)), blob);
        }
        let manifests = format!("repositories/{repository}/_manifests");
        self.link(&format!("{manifests}/revisions/sha256/{}", hex_of(&digest)), &digest);
        self.link(&format!("{manifests}/tags/{tag}/index/sha256/{}", hex_of(&digest)), &digest);
        self.link(&format!("{manifests}/tags/{tag}/current"), &digest);
        digest
    }

    /// How often anybody asked for a manifest of `repository`.
    pub(crate) fn manifest_requests(&self, repository: &str) -> usize {
        let wanted = format!("/v2/{repository}/manifests/");
        self.log()
            .lines()
            // The access log's own lines quote the request; the application's do not.
            .filter(|line| {
                line.contains(&format!("\"GET {wanted}"))
                    || line.contains(&format!("\"HEAD {wanted}"))
            })
            .count()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("registry.log")).unwrap_or_default()
    }

    fn storage(&self) -> std::path::PathBuf {
        self.dir.path().join("storage/docker/registry/v2")
    }

    fn blob(&self, content: &[u8]) -> String {
        let digest: String =
            Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        let place = self.storage().join(format!("blobs/sha256/{}/{digest}", &digest[..2]));
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("data"), content).unwrap();
        format!("sha256:{digest}")
    }

    fn link(&self, place: &str, digest: &str) {
        let place = self.storage().join(Path::new(place));
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("link"), digest).unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- registry log\n{}", self.log());
        }
        process::end(&mut self.child);
    }
}

fn hex_of(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap()
}

/// Bytes no compressor helps with and no other layer has.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 16);
    while bytes.len() < length {
        bytes.extend_from_slice(uuid::Uuid::now_v7().as_bytes());
    }
    bytes
}
