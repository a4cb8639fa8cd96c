//! An upload as `multipart/form-data`: one `artifact` and at most one `manifest`, in any order, each bounded.
//!
//! Knows nothing of the server around it, so that the fuzz targets can have it alone.

use std::error::Error;

use bytes::Bytes;
use futures_util::Stream;
use multer::{Constraints, Field, Multipart, SizeLimit};

/// The longest manifest.
const MAX_MANIFEST_BYTES: u64 = 1024 * 1024;

/// What the boundaries and headers of a multipart body may add to its parts.
const MULTIPART_OVERHEAD_BYTES: u64 = 64 * 1024;

/// A form whose parts come one after the other.
#[derive(Debug)]
pub(crate) struct Form {
    parts: Multipart<'static>,
    artifact: bool,
    manifest: bool,
}

/// One part.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // there is one at a time, and it is taken apart at once
pub(crate) enum Part {
    /// The artifact, as it comes.
    Artifact(Box<Field<'static>>),
    /// The manifest.
    Manifest(Bytes),
}

/// A form that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormError {
    /// It is no form, breaks off, or is too long.
    #[error("multipart: {0}")]
    Broken(#[from] multer::Error),
    /// A part that does not belong, or one of them twice.
    #[error("multipart: the parts are one `artifact` and at most one `manifest`")]
    Parts,
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
        let parts = Multipart::with_constraints(body, boundary, constraints);
        Ok(Self { parts, artifact: false, manifest: false })
    }

    /// The next part. The one before must have been read, or is skipped.
    pub(crate) async fn next(&mut self) -> Result<Option<Part>, FormError> {
        let Some(part) = self.parts.next_field().await? else { return Ok(None) };
        let seen = match part.name() {
            Some("artifact") => &mut self.artifact,
            Some("manifest") => &mut self.manifest,
            _ => return Err(FormError::Parts),
        };
        if std::mem::replace(seen, true) {
            return Err(FormError::Parts);
        }
        Ok(Some(if part.name() == Some("artifact") {
            Part::Artifact(Box::new(part))
        } else {
            Part::Manifest(part.bytes().await?)
        }))
    }
}
