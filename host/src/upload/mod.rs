//! From a stream of bytes to a revision that can run: received, inspected, then compiled if it has to be.

mod compile;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use holm_runtime::artifact::{Format, FormatError, inspect};
use holm_runtime::invocation::Exports;
use object::ReadCache;
use tokio::io::AsyncWriteExt;

pub use self::compile::{CompileError, CompileLimits, Compiler};
use crate::limit::Runtime;
use crate::plugin::{Hasher, Revision};
use crate::store::{ArtifactError, DataDir, RevisionFiles, TempFile};
use crate::tenant::Tenant;

/// An artifact that has been received and is of a format that can run.
#[derive(Debug)]
pub struct Upload {
    /// What will run it.
    pub runtime: Runtime,
    revision: Revision,
    bytes: u64,
    artifact: TempFile,
}

/// An artifact that can run: compiled and linked where that is needed, on disk but not yet in its place.
#[derive(Debug)]
pub struct ReadyArtifact {
    /// The digest of the bytes.
    pub revision: Revision,
    /// How many there are.
    pub bytes: u64,
    /// What runs it.
    pub runtime: Runtime,
    /// How it can be called.
    pub exports: Exports,
    /// Its files.
    pub files: RevisionFiles,
}

/// An upload that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum UploadError<E> {
    /// The request's body broke off.
    #[error("the upload was cut off")]
    Body(E),
    /// More bytes than the tenant may upload.
    #[error("the artifact is larger than {0} bytes")]
    TooLarge(u64),
    /// Not a format that can run.
    #[error("{0}")]
    Format(#[from] FormatError),
    /// A file could not be made.
    #[error("{0}")]
    Artifact(#[from] ArtifactError),
    /// A file could not be written or read.
    #[error("write the upload")]
    Io(#[from] std::io::Error),
}

/// Receives an artifact of at most `most` bytes into a temporary file and tells what it is.
///
/// # Errors
/// See [`UploadError`]; the temporary file is gone then.
pub async fn receive<S, E>(dir: &DataDir, most: u64, mut body: S) -> Result<Upload, UploadError<E>>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    let artifact = TempFile::make(dir)?;
    let mut file = tokio::fs::File::from_std(artifact.file().try_clone()?);
    let (mut hasher, mut bytes) = (Hasher::default(), 0);
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(UploadError::Body)?;
        bytes += chunk.len() as u64;
        if bytes > most {
            return Err(UploadError::TooLarge(most));
        }
        hasher.update(&chunk);
        file.write_all(&chunk).await?;
    }
    file.flush().await?;
    let runtime = match inspect_file(&artifact).await? {
        Format::Elf => Runtime::Native,
        Format::Module | Format::Component | Format::Text => Runtime::Wasm,
    };
    Ok(Upload { runtime, revision: hasher.finish(), bytes, artifact })
}

/// Looks at an artifact's headers, on a thread that may block.
async fn inspect_file<E>(artifact: &TempFile) -> Result<Format, UploadError<E>> {
    let file = artifact.reopen()?;
    let look = move || inspect(&ReadCache::new(file));
    Ok(tokio::task::spawn_blocking(look).await.map_err(std::io::Error::other)??)
}

impl Upload {
    /// Makes it ready to run for `tenant`. Nothing of it is visible until the store takes it.
    ///
    /// # Errors
    /// See [`CompileError`]; the temporary files are gone then.
    pub async fn make_ready(
        self,
        dir: &DataDir,
        compiler: &Compiler,
        tenant: &Tenant,
    ) -> Result<ReadyArtifact, CompileError> {
        let Self { runtime, revision, bytes, artifact } = self;
        let (compiled, exports) = match runtime {
            Runtime::Native => (None, Exports::COMMAND),
            Runtime::Wasm => {
                let source = artifact.reopen().map_err(|error| CompileError::Host(error.into()))?;
                let (compiled, exports) = compiler.compile(dir, tenant, source).await?;
                (Some((compiled, compiler.engine().to_owned())), exports)
            }
        };
        Ok(ReadyArtifact { revision, bytes, runtime, exports, files: RevisionFiles { artifact, compiled } })
    }
}
