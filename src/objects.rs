//! Big inputs and outputs: what does not fit into a message goes through JetStream's object store.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use async_nats::jetstream::object_store::{InfoErrorKind, ObjectInfo, ObjectOptions, ObjectStore};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::job::{Failure, JobError, ObjectRef, Outcome, code};
use crate::protocol::outcome::encoded_lengths;
use crate::source::jetstream::{Place, Stored};

/// How long the store may take for one object.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of one part of an object, as client libraries choose it.
const PART: usize = 128 << 10;

/// The bucket of big inputs and outputs. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    jetstream: Context,
    store: Arc<ObjectStore>,
    bucket: String,
    limit: usize,
}

impl Objects {
    /// The bucket `bucket`, for objects of at most `limit` bytes.
    #[must_use]
    pub fn new(jetstream: Context, store: ObjectStore, bucket: String, limit: usize) -> Self {
        Self { jetstream, store: Arc::new(store), bucket, limit }
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
        let nuid = uuid::Uuid::now_v7().simple().to_string();
        let put = self.put_parts(&name, &nuid, bytes);
        let error = match tokio::time::timeout(PATIENCE, put).await {
            Ok(Ok(digest)) => {
                return Some(ObjectRef {
                    bucket: self.bucket.clone(),
                    name,
                    size: bytes.len() as u64,
                    digest,
                    truncated,
                });
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the object store took too long".to_owned(),
        };
        tracing::warn!(job = %id, stream, error, "the output could not be stored; it is cut");
        self.forget_parts(&nuid).await;
        None
    }

    /// Stores an object as the object store's specification has it (ADR-20): its parts, then its
    /// description. The client library does the same, and does not say what it leaves when it fails.
    /// Returns the digest.
    async fn put_parts(
        &self,
        name: &str,
        nuid: &str,
        bytes: &[u8],
    ) -> Result<String, async_nats::Error> {
        let parts = self.parts(nuid);
        for part in bytes.chunks(PART) {
            let part = Bytes::copy_from_slice(part);
            self.jetstream.publish(parts.clone(), part).await?.await?;
        }
        let digest = format!("SHA-256={}", URL_SAFE.encode(Sha256::digest(bytes)));
        let info = ObjectInfo {
            name: name.to_owned(),
            description: None,
            metadata: HashMap::new(),
            headers: None,
            options: Some(ObjectOptions { link: None, max_chunk_size: Some(PART) }),
            bucket: self.bucket.clone(),
            nuid: nuid.to_owned(),
            size: bytes.len(),
            chunks: bytes.len().div_ceil(PART),
            modified: None,
            digest: Some(digest.clone()),
            deleted: false,
        };
        let subject = format!("$O.{}.M.{}", self.bucket, URL_SAFE.encode(name));
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Rollup", "sub");
        let info = serde_json::to_vec(&info)?.into();
        self.jetstream.publish_with_headers(subject, headers, info).await?.await?;
        Ok(digest)
    }

    /// Gives back the room that the parts of an object take which could not be stored whole.
    async fn forget_parts(&self, nuid: &str) {
        let subject = format!("STREAM.PURGE.OBJ_{}", self.bucket);
        let purge = serde_json::json!({"filter": self.parts(nuid)});
        let purged: Result<serde_json::Value, _> = self.jetstream.request(subject, &purge).await;
        if let Err(error) = purged {
            tracing::debug!(%error, "the parts of an object stay until their time is over");
        }
    }

    fn parts(&self, nuid: &str) -> String {
        format!("$O.{}.C.{nuid}", self.bucket)
    }

    /// The object `name`, whole; `what` is what asked for it.
    ///
    /// # Errors
    /// There is none, it is too big, or the store is in trouble.
    pub async fn fetch(&self, what: &str, name: &str) -> Result<Vec<u8>, Failure> {
        let rejected = |why: String| {
            let message = format!("{what}: {why}");
            Failure::Rejected(JobError::new(code::STDIN_NOT_FOUND, message))
        };
        let trouble = |why: &dyn std::fmt::Display| {
            let message = format!("{what} {name:?} could not be read: {why}");
            Failure::Transient(JobError::new(code::OBJECT_STORE, message))
        };
        // The client library would follow a link, be it to a bucket that those who made it may not read,
        // or to itself: so the parts are read here.
        let fetch = async {
            let info = self.store.info(name).await.map_err(|e| match e.kind() {
                InfoErrorKind::NotFound => {
                    rejected(format!("bucket {} has no object {name:?}", self.bucket))
                }
                InfoErrorKind::InvalidName => rejected(format!("{name:?} is no object's name")),
                _ => trouble(&e),
            })?;
            let links = info.options.is_some_and(|options| options.link.is_some());
            if links || !info.nuid.bytes().all(|b| b.is_ascii_alphanumeric()) {
                return Err(rejected(format!("{name:?} is a link to another object")));
            }
            if info.deleted {
                return Err(rejected(format!("{name:?} was deleted")));
            }
            if info.size > self.limit {
                return Err(rejected(format!(
                    "{name:?} has {} bytes, and OBJECT_LIMIT is {}",
                    info.size, self.limit
                )));
            }
            let (stream, parts) = (format!("OBJ_{}", self.bucket), self.parts(&info.nuid));
            let mut bytes = Vec::with_capacity(info.size);
            let mut next = 1;
            while bytes.len() < info.size {
                let place = Place { seq: next, next_by_subj: Some(&parts) };
                let part = Stored::read(&self.jetstream, &stream, place).await;
                let Some(part) = part.map_err(|e| trouble(&e))? else { break };
                bytes.extend_from_slice(&part.payload);
                next = part.sequence + 1;
            }
            let digest = format!("SHA-256={}", URL_SAFE.encode(Sha256::digest(&bytes)));
            if bytes.len() == info.size && info.digest.is_none_or(|given| given == digest) {
                Ok(bytes)
            } else {
                Err(trouble(&"it is not what its description says"))
            }
        };
        let fetched = tokio::time::timeout(PATIENCE, fetch).await;
        fetched.unwrap_or_else(|_| Err(trouble(&"the object store took too long")))
    }
}
