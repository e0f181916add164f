//! Big inputs and outputs: what does not fit into a message goes through JetStream's object store.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::object_store::{GetErrorKind, ObjectStore};
use tokio::io::AsyncReadExt;

use crate::job::{Failure, JobError, ObjectRef, Outcome, code};
use crate::protocol::outcome::encoded_lengths;

/// How long the store may take for one object.
const PATIENCE: Duration = Duration::from_secs(60);

/// The bucket of big inputs and outputs. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    store: Arc<ObjectStore>,
    bucket: String,
    limit: usize,
}

impl Objects {
    /// The bucket `bucket`, for objects of at most `limit` bytes.
    #[must_use]
    pub fn new(store: ObjectStore, bucket: String, limit: usize) -> Self {
        Self { store: Arc::new(store), bucket, limit }
    }

    /// The most bytes of an object.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Stores the streams of `outcome` that a message of `room` bytes cannot hold, and cuts what it
    /// keeps of them to `inline` bytes each. A stream that cannot be stored is cut all the same.
    pub async fn offload(&self, outcome: &mut Outcome, inline: usize, room: usize) {
        // In JSON, where bytes may take more room than their own.
        let (out, err) = encoded_lengths(outcome);
        let half = room / 2;
        let too_big = |this: usize, other: usize| {
            this > inline || (this + other > room && (this > half || other <= half))
        };
        let (big_out, big_err) = (too_big(out, err), too_big(err, out));
        if big_out {
            outcome.objects.stdout = self
                .put(outcome, "stdout", &outcome.output.stdout, outcome.output.stdout_dropped > 0)
                .await;
        }
        if big_err {
            outcome.objects.stderr = self
                .put(outcome, "stderr", &outcome.output.stderr, outcome.output.stderr_dropped > 0)
                .await;
        }
        outcome.output.cut(inline);
    }

    async fn put(
        &self,
        outcome: &Outcome,
        stream: &str,
        bytes: &[u8],
        truncated: bool,
    ) -> Option<ObjectRef> {
        let id = &outcome.id;
        // An attempt that lost its job must not replace what belongs to the one that counts.
        let name = format!("{id}/{}/{stream}", outcome.attempt);
        let mut reader = bytes;
        let put = self.store.put(name.as_str(), &mut reader);
        let error = match tokio::time::timeout(PATIENCE, put).await {
            Ok(Ok(info)) => {
                return Some(ObjectRef {
                    bucket: self.bucket.clone(),
                    name,
                    size: info.size as u64,
                    digest: info.digest.unwrap_or_default(),
                    truncated,
                });
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the object store took too long".to_owned(),
        };
        tracing::warn!(job = %id, stream, error, "the output could not be stored; it is cut");
        None
    }

    /// The object `name`, whole.
    ///
    /// # Errors
    /// There is none, it is too big, or the store is in trouble.
    pub async fn fetch(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let rejected = |why: String| {
            let message = format!("stdin_object: {why}");
            Failure::Rejected(JobError::new(code::STDIN_NOT_FOUND, message))
        };
        let trouble = |why: &dyn std::fmt::Display| {
            let message = format!("stdin_object {name:?} could not be read: {why}");
            Failure::Transient(JobError::new(code::OBJECT_STORE, message))
        };
        let fetch = async {
            let object = self.store.get(name).await.map_err(|e| match e.kind() {
                GetErrorKind::NotFound => {
                    rejected(format!("bucket {} has no object {name:?}", self.bucket))
                }
                GetErrorKind::InvalidName => rejected(format!("{name:?} is no object's name")),
                _ => trouble(&e),
            })?;
            // The daemon may read buckets that whoever made a link to them may not.
            if object.info().bucket != self.bucket || object.info().name != name {
                return Err(rejected(format!("{name:?} is a link to another object")));
            }
            let size = object.info().size;
            if size > self.limit {
                return Err(rejected(format!(
                    "{name:?} has {size} bytes, and OBJECT_LIMIT is {}",
                    self.limit
                )));
            }
            let mut bytes = Vec::with_capacity(size);
            let mut object = object.take(self.limit as u64 + 1);
            object.read_to_end(&mut bytes).await.map_err(|e| trouble(&e))?;
            if bytes.len() == size {
                Ok(bytes)
            } else {
                Err(trouble(&"it is not as long as its description says"))
            }
        };
        let fetched = tokio::time::timeout(PATIENCE, fetch).await;
        fetched.unwrap_or_else(|_| Err(trouble(&"the object store took too long")))
    }
}
