//! The images the tests run, made from the machine's static busybox without a network.
//!
//! All are named `worker-spawner-test/…` and labelled `worker-spawner-test`, so that a script can
//! remove what a run leaves cached: `docker image rm -f $(docker images -q -f
//! label=worker-spawner-test)`.

use std::fs::File;
use std::path::Path;
use std::sync::LazyLock;

use bollard::Docker;
use bollard::query_parameters::CreateImageOptionsBuilder;
use bytes::Bytes;
use futures::TryStreamExt;
use sha2::{Digest, Sha256};

use super::tar::{Entry, archive};

/// The label every test image carries.
pub(crate) const LABEL: &str = "worker-spawner-test";

/// An image and what is peculiar about it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Image {
    /// Every busybox program, a few files to stumble over, and a CMD of its own.
    Busybox,
    /// Neither CMD nor ENTRYPOINT.
    NoCommand,
    /// An ENTRYPOINT with a CMD behind it.
    Entrypoint,
    /// A VOLUME at /data.
    Volume,
    /// USER 1000:1000.
    User,
    /// WORKDIR and ENV.
    Environment,
    /// One static program and nothing else: no shell, no /tmp, no /etc.
    Scratch,
    /// A program that is none, and no shell to fall back on.
    Broken,
}

impl Image {
    /// The image's name on an engine, changed whenever its recipe changes.
    pub(crate) fn name(self) -> String {
        let (entries, changes) = self.recipe();
        let mut hash = Sha256::new();
        for entry in &entries {
            hash.update(entry.summary());
        }
        for change in &changes {
            hash.update(change);
        }
        let digest = hash.finalize();
        let tag: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        format!("worker-spawner-test/{}:{tag}", format!("{self:?}").to_lowercase())
    }

    fn recipe(self) -> (Vec<Entry>, Vec<String>) {
        let (entries, changes): (Vec<Entry>, &[&str]) = match self {
            Self::Busybox => (ROOT.clone(), &[r#"CMD ["echo", "the image's own command"]"#]),
            Self::NoCommand => (ROOT.clone(), &[]),
            Self::Entrypoint => (
                ROOT.clone(),
                &[r#"ENTRYPOINT ["echo", "entrypoint:"]"#, r#"CMD ["own", "command"]"#],
            ),
            Self::Volume => (ROOT.clone(), &["VOLUME /data", r#"CMD ["ls", "/data"]"#]),
            Self::User => (ROOT.clone(), &["USER 1000:1000", r#"CMD ["id"]"#]),
            Self::Environment => (
                ROOT.clone(),
                &["ENV COLOUR=green", "ENV SHAPE=round", "WORKDIR /data", r#"CMD ["pwd"]"#],
            ),
            Self::Scratch => (
                vec![Entry::file("echo", 0o755, BUSYBOX.clone())],
                &[r#"ENTRYPOINT ["/echo", "from", "scratch"]"#],
            ),
            Self::Broken => (
                vec![Entry::file("program", 0o755, "\u{1}\u{2}no shell will run this")],
                &[r#"CMD ["/program"]"#],
            ),
        };
        let mut changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        changes.push(format!("LABEL {LABEL}=1"));
        (entries, changes)
    }
}

/// A root file system of busybox's.
pub(crate) static ROOT: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    let mut entries = vec![
        Entry::dir("bin", 0o755),
        Entry::dir("etc", 0o755),
        Entry::dir("tmp", 0o1777),
        Entry::dir("root", 0o700),
        Entry::dir("data", 0o777),
        Entry::dir("proc", 0o755),
        Entry::dir("sys", 0o755),
        Entry::dir("dev", 0o755),
        Entry::file(
            "etc/passwd",
            0o644,
            "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/tmp:/bin/sh\n",
        ),
        Entry::file("etc/group", 0o644, "root:x:0:\napp:x:1000:\n"),
        Entry::file("etc/plain", 0o644, "not a program\n"),
        Entry::file("etc/garbage", 0o755, "\u{1}\u{2}not a program either"),
        Entry::file("etc/no-interpreter", 0o755, "#!/no/such/interpreter\n"),
        Entry::file("etc/every-byte", 0o644, every_byte()),
        Entry::file("data/seed", 0o644, "planted\n"),
        Entry::file("bin/busybox", 0o755, BUSYBOX.clone()),
        Entry::file("bin/setuid-busybox", 0o4755, BUSYBOX.clone()),
    ];
    entries.extend(applets().iter().map(|name| Entry::link(&format!("bin/{name}"), "busybox")));
    entries
});

static BUSYBOX: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let path =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    std::fs::read(path.expect("busybox-static is needed to make the test images")).unwrap()
});

fn applets() -> Vec<String> {
    let listed = std::process::Command::new("busybox").arg("--list").output().unwrap();
    String::from_utf8(listed.stdout)
        .unwrap()
        .lines()
        .filter(|name| *name != "busybox")
        .map(ToString::to_string)
        .collect()
}

/// All byte values in an order that no text decoder survives.
pub(crate) fn every_byte() -> Vec<u8> {
    (0..=255u8).rev().chain(0..=255).collect()
}

/// Makes `image` on `docker` unless it is there, and returns its name. Made once however many
/// tests and test processes ask.
pub(crate) async fn ensure(docker: &Docker, image: Image) -> String {
    let name = image.name();
    if docker.inspect_image(&name).await.is_ok() {
        return name;
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images.lock");
    let lock = tokio::task::spawn_blocking(move || {
        let file = File::create(path).unwrap();
        file.lock().unwrap();
        file
    })
    .await
    .unwrap();
    if docker.inspect_image(&name).await.is_err() {
        import(docker, image, &name).await;
    }
    drop(lock);
    name
}

async fn import(docker: &Docker, image: Image, name: &str) {
    let (repository, tag) = name.rsplit_once(':').unwrap();
    let (entries, changes) = image.recipe();
    let changes: Vec<&str> = changes.iter().map(String::as_str).collect();
    let mut options =
        CreateImageOptionsBuilder::default().from_src("-").repo(repository).tag(tag).build();
    options.changes = changes.iter().map(ToString::to_string).collect();
    let body = bollard::body_full(Bytes::from(archive(&entries)));
    docker.create_image(Some(options), Some(body), None).try_collect::<Vec<_>>().await.unwrap();
}
