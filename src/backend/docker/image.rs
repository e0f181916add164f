//! Images: allowed or not, present or pulled, one pull at a time for one image.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use bollard::errors::Error;
use bollard::query_parameters::{CreateImageOptions, EventsOptions};
use futures::future::{BoxFuture, FutureExt, Shared};
use futures::{StreamExt, TryStreamExt};
use tokio::sync::{Notify, watch};

use super::allowlist::AllowList;
use super::credentials;
use super::engine::{CallError, Engine};
use super::progress::Layers;
use crate::backend::Progress;
use crate::config::{Images, PullPolicy};
use crate::job::{Failure, JobError, PullProgress, code};
use crate::reference::{Malformed, Reference};

/// What a container needs to know of its image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    /// The content's id: what is run, whatever becomes of the tag meanwhile.
    pub(super) id: String,
    /// Paths the image declares as volumes.
    pub(super) volumes: Vec<String>,
    /// Its entry point, to which arguments are added.
    pub(super) entrypoint: Vec<String>,
    /// The arguments where a request gives none.
    pub(super) cmd: Vec<String>,
}

impl Image {
    /// Whether it names an entry point or a command of its own.
    pub(super) fn has_command(&self) -> bool {
        !self.entrypoint.is_empty() || !self.cmd.is_empty()
    }

    /// The whole command line of a function that was given `args`, as an engine composes it.
    pub(super) fn command_line(&self, args: &[String]) -> Vec<String> {
        let args = if args.is_empty() { &self.cmd } else { args };
        self.entrypoint.iter().chain(args).cloned().collect()
    }
}

/// The engine's images, and the pulls under way.
pub(super) struct Store {
    engine: Engine,
    allowed: RwLock<AllowList>,
    policy: PullPolicy,
    pull_timeout: Duration,
    /// Where the registries' credentials are.
    config_dir: Option<PathBuf>,
    pulls: Arc<Mutex<HashMap<String, Pull>>>,
    known: Mutex<Known>,
}

/// What the engine said of images, for as long as it says when that changes.
#[derive(Default)]
struct Known {
    images: HashMap<String, Arc<Image>>,
    /// Whether changes are heard of.
    heard: bool,
    /// Counts the changes.
    generation: u64,
}

/// The most images that are remembered.
const MAX_KNOWN: usize = 1024;
/// How far back changes are asked for: the engine's clock may be another than ours.
const HINDSIGHT: Duration = Duration::from_secs(60);

/// A pull under way; all who wait for it get its result, and see how far it is.
#[derive(Clone)]
struct Pull {
    result: Shared<BoxFuture<'static, Result<(), Failure>>>,
    progress: watch::Receiver<PullProgress>,
}

impl Store {
    pub(super) fn new(
        engine: Engine,
        settings: &Images,
        config_dir: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            engine,
            allowed: RwLock::new(AllowList::new(&settings.allowlist)?),
            policy: settings.pull_policy,
            pull_timeout: settings.pull_timeout,
            config_dir,
            pulls: Arc::default(),
            known: Mutex::default(),
        })
    }

    /// Allows these images from now on, and no others.
    pub(super) fn allow(&self, allowed: AllowList) {
        *self.allowed.write().unwrap_or_else(PoisonError::into_inner) = allowed;
    }

    fn allows(&self, reference: &str) -> bool {
        self.allowed.read().unwrap_or_else(PoisonError::into_inner).allows(reference)
    }

    /// The image `name`, pulled where the policy says so. A pull is told to `progress`.
    pub(super) async fn ensure(
        &self,
        name: &str,
        progress: &Progress,
    ) -> Result<Arc<Image>, Failure> {
        let reference: Reference = name.parse().map_err(|malformed: Malformed| {
            Failure::Rejected(JobError::new(
                code::INVALID_FIELD,
                format!("image_reference: {name:?} is no image reference: {malformed}"),
            ))
        })?;
        let full = reference.to_string();
        if !self.allows(&full) {
            return Err(rejected(
                code::IMAGE_NOT_ALLOWED,
                format!("{full} matches no pattern of this worker's IMAGE_ALLOWLIST"),
            ));
        }
        if self.policy == PullPolicy::Always {
            self.pull(&reference, progress).await?;
        } else if let Some(image) = self.known().images.get(&full) {
            return Ok(image.clone());
        }
        match self.inspect(&full).await {
            Err(e) if e.is_not_found() => {}
            found => return found.map_err(Failure::from),
        }
        if self.policy == PullPolicy::Never {
            return Err(rejected(
                code::IMAGE_NOT_FOUND,
                format!("the engine does not have {full}, and this worker's PULL_POLICY is never"),
            ));
        }
        self.pull(&reference, progress).await?;
        self.inspect(&full).await.map_err(Failure::from)
    }

    /// The image `name` as the engine has it, pulled only where it has none: whatever the policy, what
    /// is kept ready is looked at often, and pulled for those who ask for it.
    pub(super) async fn provide(&self, name: &str) -> Result<Arc<Image>, Failure> {
        let full = name.parse().ok().map(|reference: Reference| reference.to_string());
        let full = full.filter(|full| self.allows(full));
        if let Some(full) = full
            && let Ok(image) = self.inspect(&full).await
        {
            return Ok(image);
        }
        let (progress, _) = watch::channel(None);
        self.ensure(name, &progress).await
    }

    async fn inspect(&self, full: &str) -> Result<Arc<Image>, CallError> {
        let generation = self.known().generation;
        let image = self
            .engine
            .call("inspect the image", |d| async move { d.inspect_image(full).await })
            .await?;
        let config = image.config.unwrap_or_default();
        let image = Arc::new(Image {
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            volumes: config.volumes.unwrap_or_default(),
            // An engine that tells no id is asked for the reference again.
            id: image.id.unwrap_or_else(|| full.to_owned()),
        });
        let mut known = self.known();
        if known.heard && known.generation == generation && known.images.len() < MAX_KNOWN {
            known.images.insert(full.to_owned(), image.clone());
        }
        Ok(image)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // A map is whole whatever its last holder did.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what is known of images: one of them is not as it was.
    pub(super) fn forget(&self) {
        let mut known = self.known();
        known.images.clear();
        known.generation += 1;
    }

    /// Remembers images for as long as the engine tells of their changes, so that a job need not ask
    /// for its own. `changed` is told of each. Returns when the engine is not heard any more.
    pub(super) async fn listen(&self, changed: &Notify) -> CallError {
        let since = SystemTime::now().checked_sub(HINDSIGHT).unwrap_or(SystemTime::UNIX_EPOCH);
        let since = since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let options = EventsOptions {
            // What happens before the engine has answered is told as well.
            since: Some(since.as_secs().to_string()),
            filters: Some(HashMap::from([("type".to_owned(), vec!["image".to_owned()])])),
            ..EventsOptions::default()
        };
        let docker = match self.engine.docker() {
            Ok(docker) => docker,
            Err(error) => return error,
        };
        let mut events = std::pin::pin!(docker.events(Some(options)));
        let _deaf = OnDrop(|| {
            self.known().heard = false;
            self.forget();
        });
        self.known().heard = true;
        loop {
            match events.next().await {
                Some(Ok(_)) => {
                    self.forget();
                    changed.notify_one();
                }
                Some(Err(error)) => return CallError::from_bollard("tell of images", error),
                None => {
                    return CallError::Unreachable { why: "it tells no more".to_owned() };
                }
            }
        }
    }

    /// Joins the pull of this reference that is under way, or begins one.
    ///
    /// The pull is a task of its own: it goes on when those who wait for it give up.
    async fn pull(&self, reference: &Reference, progress: &Progress) -> Result<(), Failure> {
        let full = reference.to_string();
        let pull = {
            let mut pulls = self.pulls.lock().unwrap_or_else(PoisonError::into_inner);
            match pulls.get(&full) {
                Some(pull) => pull.clone(),
                None => {
                    let pull = self.begin(reference.clone());
                    pulls.insert(full, pull.clone());
                    pull
                }
            }
        };
        follow(pull, progress).await
    }

    fn begin(&self, reference: Reference) -> Pull {
        let (engine, timeout, pulls) = (self.engine.clone(), self.pull_timeout, self.pulls.clone());
        let config_dir = self.config_dir.clone();
        let (progress, followed) = watch::channel(PullProgress::default());
        let task = tokio::spawn(async move {
            let full = reference.to_string();
            // Also when the pull breaks down: a later job must be able to try again.
            let _forget = OnDrop(|| {
                pulls.lock().unwrap_or_else(PoisonError::into_inner).remove(&full);
            });
            tracing::info!(image = %full, "pulling image");
            let pull = pull(&engine, &reference, config_dir, timeout, &progress);
            let result = tokio::time::timeout(timeout, pull).await;
            let result = result.unwrap_or_else(|_| Err(timed_out(&full, timeout)));
            match &result {
                Ok(()) => tracing::info!(image = %full, "pulled image"),
                Err(failure) => tracing::warn!(image = %full, %failure, "could not pull image"),
            }
            result
        });
        let aborted = || JobError::new(code::IMAGE_PULL_FAILED, "the pull was abandoned");
        let result =
            async move { task.await.unwrap_or_else(|_| Err(Failure::Transient(aborted()))) };
        Pull { result: result.boxed().shared(), progress: followed }
    }
}

/// The result of this pull, which is told to `progress` while it is waited for.
async fn follow(pull: Pull, progress: &Progress) -> Result<(), Failure> {
    let Pull { result, progress: mut followed } = pull;
    let _over = OnDrop(|| {
        progress.send_replace(None);
    });
    let forward = async {
        loop {
            let now = *followed.borrow_and_update();
            progress.send_replace(Some(now));
            if followed.changed().await.is_err() {
                // The pull is over; its result says how it went.
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        biased;
        result = result => result,
        never = forward => never,
    }
}

/// Runs a closure when dropped.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn timed_out(full: &str, timeout: Duration) -> Failure {
    let limit = humantime::format_duration(timeout);
    let message = format!("{full} was not pulled within PULL_TIMEOUT, {limit}");
    Failure::Permanent(JobError::new(code::IMAGE_PULL_TIMEOUT, message))
}

async fn pull(
    engine: &Engine,
    reference: &Reference,
    config_dir: Option<PathBuf>,
    timeout: Duration,
    progress: &watch::Sender<PullProgress>,
) -> Result<(), Failure> {
    let full = reference.to_string();
    // A public image needs none: trouble with them is told where the registry wants them.
    let (credentials, trouble) = match credentials::lookup(reference.registry(), config_dir).await {
        Ok(credentials) => (credentials, None),
        Err(trouble) => {
            tracing::warn!(image = %full, trouble, "pulling without credentials");
            (None, Some(trouble))
        }
    };
    // The API takes the digest as a tag; where both are given, the digest decides.
    let options = CreateImageOptions {
        from_image: Some(format!("{}/{}", reference.registry(), reference.repository())),
        tag: reference.digest().or(reference.tag()).map(str::to_owned),
        ..CreateImageOptions::default()
    };
    let mut layers = Layers::default();
    engine
        .docker()?
        // The engine answers with the first progress, and that comes only with the manifest: a slow
        // registry must not look like a slow engine.
        .with_timeout(timeout + Duration::from_secs(1))
        .create_image(Some(options), None, credentials)
        .try_for_each(|said| {
            layers.observe(&said);
            let total = layers.total();
            progress.send_if_modified(|told| std::mem::replace(told, total) != total);
            futures::future::ok(())
        })
        .await
        .map_err(|error| classify(&full, error, trouble.as_deref()))
}

/// Engines tell registries' answers apart by their words alone. The words are those of the
/// distribution specification's error codes and of Docker's own pull code.
///
/// `trouble` is what went wrong with the credentials, should the registry want them.
fn classify(full: &str, error: Error, trouble: Option<&str>) -> Failure {
    let text = match error {
        Error::DockerResponseServerError { message, .. } => message,
        Error::DockerStreamError { error } => error,
        other => {
            return Failure::Transient(JobError::new(
                code::ENGINE_UNAVAILABLE,
                format!("the engine went away while it pulled {full}: {other}"),
            ));
        }
    };
    let lower = text.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let message = format!("{full}: {text}");
    // Engines with containerd's store say that both may be, and then which of them it is.
    let wants_password = says(&["no basic auth"]);
    // The default registry answers with the first of these for what it does not let us see, too.
    let is_unknown = says(&[
        "repository does not exist",
        "manifest unknown",
        "name unknown",
        "no such image",
        "no matching manifest",
        "invalid reference",
    ]) || lower.trim_end().ends_with(": not found");
    let is_denied = says(&[
        "unauthorized",
        "authentication required",
        "access denied",
        "denied: ",
        "access to the resource is denied",
        "incorrect username",
    ]) && !says(&["permission denied"]);
    if is_unknown && !wants_password {
        rejected(code::IMAGE_NOT_FOUND, message)
    } else if is_denied || wants_password {
        let trouble = trouble.map(|t| format!(" (and {t})")).unwrap_or_default();
        rejected(code::IMAGE_UNAUTHORIZED, format!("{message}{trouble}"))
    } else {
        Failure::Transient(JobError::new(code::IMAGE_PULL_FAILED, message))
    }
}

fn rejected(code: &'static str, message: impl AsRef<str>) -> Failure {
    Failure::Rejected(JobError::new(code, message))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tokio::sync::oneshot;

    /// A pull that ends when it is told to, and what tells how far it is.
    fn pull_under_way() -> (Pull, oneshot::Sender<()>, watch::Sender<PullProgress>) {
        let (end, ended) = oneshot::channel();
        let (told, progress) = watch::channel(PullProgress::default());
        let result = async move { ended.await.map_err(|_| rejected(code::IMAGE_NOT_FOUND, "")) };
        (Pull { result: result.boxed().shared(), progress }, end, told)
    }

    #[tokio::test]
    async fn all_who_wait_for_a_pull_see_how_far_it_is() {
        let (pull, end, told) = pull_under_way();
        let (first, mut seen_by_first) = watch::channel(None);
        let (second, mut seen_by_second) = watch::channel(None);
        let joined = pull.clone();
        let first = tokio::spawn(async move { follow(pull, &first).await });
        seen_by_first.wait_for(Option::is_some).await.unwrap();
        let half = PullProgress { layers: 2, layers_done: 1, bytes: 10, bytes_done: 5 };
        told.send_replace(half);
        let second = tokio::spawn(async move {
            let result = follow(joined, &second).await;
            // Its end is told before it is returned.
            assert_eq!(*second.borrow(), None);
            result
        });
        seen_by_first.wait_for(|seen| *seen == Some(half)).await.unwrap();
        seen_by_second.wait_for(|seen| *seen == Some(half)).await.unwrap();
        drop(told);
        end.send(()).unwrap();
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (Ok(()), Ok(())));
    }

    #[tokio::test]
    async fn a_pull_that_nobody_waits_for_any_more_is_none() {
        let (pull, _end, _told) = pull_under_way();
        let (progress, mut seen) = watch::channel(None);
        {
            let followed = follow(pull, &progress);
            tokio::pin!(followed);
            assert!(futures::poll!(followed.as_mut()).is_pending());
            assert_eq!(*seen.borrow_and_update(), Some(PullProgress::default()));
        }
        assert_eq!(*seen.borrow_and_update(), None);
    }

    #[test]
    fn answers_of_registries_are_told_apart() {
        for (text, code) in [
            (
                "manifest for x:1 not found: manifest unknown: manifest unknown",
                code::IMAGE_NOT_FOUND,
            ),
            (
                "pull access denied for x, repository does not exist or may require 'docker login'",
                code::IMAGE_NOT_FOUND,
            ),
            ("Head \"http://x/v2/\": no basic auth credentials", code::IMAGE_UNAUTHORIZED),
            (
                "failed to resolve reference \"x:1\": pull access denied, repository does not exist or may \
                 require authorization: authorization failed: no basic auth credentials",
                code::IMAGE_UNAUTHORIZED,
            ),
            (
                "failed to resolve reference \"x:1\": unexpected status from HEAD request to http://x: \
                 401 Unauthorized",
                code::IMAGE_UNAUTHORIZED,
            ),
            ("failed to resolve reference \"x:1\": x:1: not found", code::IMAGE_NOT_FOUND),
            (
                "Head \"http://x/v2/\": unauthorized: authentication required",
                code::IMAGE_UNAUTHORIZED,
            ),
            ("docker.io/library/x:1: not found", code::IMAGE_NOT_FOUND),
            ("denied: requested access to the resource is denied", code::IMAGE_UNAUTHORIZED),
            ("open /var/lib/docker/tmp/x: permission denied", code::IMAGE_PULL_FAILED),
            ("unexpected status from HEAD request: 404 Not Found", code::IMAGE_PULL_FAILED),
            ("dial tcp 127.0.0.1:1: connect: connection refused", code::IMAGE_PULL_FAILED),
            ("received unexpected HTTP status: 503 Service Unavailable", code::IMAGE_PULL_FAILED),
        ] {
            let error =
                Error::DockerResponseServerError { status_code: 500, message: text.to_owned() };
            assert_eq!(classify("x:1", error, None).error().code, code, "{text}");
        }
    }
}
