//! An upload as `multipart/form-data`: one `artifact` and at most one `manifest`, in any order, each bounded.
//!
//! Knows nothing of the server around it, so that the fuzz targets can have it alone.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, TryStreamExt};
use multer::{Constraints, Field, Multipart, SizeLimit};

/// The longest manifest.
const MAX_MANIFEST_BYTES: u64 = 1024 * 1024;

/// What the boundaries and headers of a multipart body may add to its parts.
const MULTIPART_OVERHEAD_BYTES: u64 = 64 * 1024;

/// What may stand before the first part, and in the headers of one. The library keeps it, and looks through all of it
/// whenever more comes.
const MAX_BETWEEN_BYTES: u64 = 16 * 1024;

/// A form whose parts come one after the other.
#[derive(Debug)]
pub(crate) struct Form {
    parts: Multipart<'static>,
    kept: Kept,
    artifact: bool,
    manifest: bool,
}

/// One part.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // there is one at a time, and it is taken apart at once
pub(crate) enum Part {
    /// The artifact, as it comes.
    Artifact(Box<Content>),
    /// The manifest.
    Manifest(Bytes),
}

/// A form that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormError {
    /// There is too much that belongs to no part.
    #[error("multipart: more than {MAX_BETWEEN_BYTES} bytes before a part, or in its headers")]
    Between,
    /// It is no form, breaks off, or is too long.
    #[error("multipart: {0}")]
    Broken(#[source] multer::Error),
    /// A part that does not belong, or one of them twice.
    #[error("multipart: the parts are one `artifact` and at most one `manifest`")]
    Parts,
}

impl From<multer::Error> for FormError {
    fn from(error: multer::Error) -> Self {
        match error {
            multer::Error::StreamReadFailed(source) if source.is::<Overfed>() => Self::Between,
            error => Self::Broken(error),
        }
    }
}

/// Bytes that the library has been given and has not given back. Cheap to clone.
#[derive(Clone, Debug, Default)]
struct Kept(Arc<AtomicU64>);

impl Kept {
    fn took(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn gave_back(&self, bytes: usize) {
        let less = |kept: u64| Some(kept.saturating_sub(bytes as u64));
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    fn nothing(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// The library asks for more than it may keep.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("too much between the parts")]
struct Overfed;

/// The content of a part.
#[derive(Debug)]
pub(crate) struct Content {
    field: Field<'static>,
    kept: Kept,
}

impl Stream for Content {
    type Item = Result<Bytes, multer::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = ready!(self.field.poll_next_unpin(cx));
        if let Some(Ok(bytes)) = &item {
            self.kept.gave_back(bytes.len());
        }
        Poll::Ready(item)
    }
}

/// The most bytes of a form around an artifact of at most `most`.
pub(crate) fn whole_bytes(most: u64) -> u64 {
    most.saturating_add(MAX_MANIFEST_BYTES + MULTIPART_OVERHEAD_BYTES)
}

impl Form {
    /// A form of this `Content-Type`, around an artifact of at most `most` bytes.
    pub(crate) fn new<S, E>(body: S, content_type: &str, most: u64) -> Result<Self, FormError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn Error + Send + Sync>> + 'static,
    {
        let boundary = multer::parse_boundary(content_type)?;
        let sizes = SizeLimit::new().whole_stream(whole_bytes(most)).for_field("manifest", MAX_MANIFEST_BYTES);
        let constraints = Constraints::new().allowed_fields(vec!["artifact", "manifest"]).size_limit(sizes);
        let kept = Kept::default();
        let fed = kept.clone();
        let body = body.map_err(Into::into).map(move |chunk: Result<Bytes, Box<dyn Error + Send + Sync>>| {
            if fed.0.load(Ordering::Relaxed) > MAX_BETWEEN_BYTES {
                return Err(Overfed.into());
            }
            chunk.inspect(|chunk| fed.took(chunk.len()))
        });
        let parts = Multipart::with_constraints(body, boundary, constraints);
        Ok(Self { parts, kept, artifact: false, manifest: false })
    }

    /// The next part. The one before must have been read, or is skipped.
    pub(crate) async fn next(&mut self) -> Result<Option<Part>, FormError> {
        let Some(part) = self.parts.next_field().await? else { return Ok(None) };
        // what is kept from now on is of its content, but for what has come along already
        self.kept.nothing();
        let seen = match part.name() {
            Some("artifact") => &mut self.artifact,
            Some("manifest") => &mut self.manifest,
            _ => return Err(FormError::Parts),
        };
        if std::mem::replace(seen, true) {
            return Err(FormError::Parts);
        }
        let is_artifact = part.name() == Some("artifact");
        let mut content = Content { field: part, kept: self.kept.clone() };
        if is_artifact {
            return Ok(Some(Part::Artifact(Box::new(content))));
        }
        let mut manifest = BytesMut::new();
        while let Some(bytes) = content.next().await {
            manifest.extend_from_slice(&bytes?);
        }
        Ok(Some(Part::Manifest(manifest.freeze())))
    }
}
