//! From a stream of bytes to a revision that can run.

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use holm_runtime::artifact::{Format, FormatError, inspect};
use holm_sandbox::limits::Ceiling;
use holm_sandbox::name::Name;
use object::ReadCache;
use tokio::io::AsyncWriteExt;

use super::compile::{CompileError, Compiler};
use super::revision::{Hasher, Revision};
use crate::limit::Runtime;
use crate::store::{ArtifactError, DataDir, RevisionFiles, TempFile};

/// An artifact that can run: inspected, compiled and linked where that is needed, on disk but not yet in its place.
#[derive(Debug)]
pub struct ReadyArtifact {
    /// The digest of the bytes.
    pub revision: Revision,
    /// How many there are.
    pub bytes: u64,
    /// What runs it.
    pub runtime: Runtime,
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
    /// It does not compile or link.
    #[error("{0}")]
    Compile(#[from] CompileError),
    /// A file could not be written.
    #[error("{0}")]
    Artifact(#[from] ArtifactError),
    /// The same, without a name.
    #[error("write the upload")]
    Io(#[from] std::io::Error),
}

/// Receives an artifact and makes it ready to run for `tenant`. Nothing of it is visible until the store takes it.
///
/// # Errors
/// See [`UploadError`]; the temporary files are gone then.
pub async fn prepare<S, E>(
    dir: &DataDir,
    compiler: &Compiler,
    (tenant, ceiling): (&Name, Ceiling),
    max_bytes: u64,
    body: S,
) -> Result<ReadyArtifact, UploadError<E>>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    let (artifact, revision, bytes) = receive(dir, max_bytes, body).await?;
    let format = inspect_file(&artifact).await?;
    let (runtime, compiled) = match format {
        Format::Elf => (Runtime::Native, None),
        Format::Module | Format::Text => {
            let compiled = compiler.compile(dir, tenant, ceiling, artifact.reopen()?).await?;
            (Runtime::Wasm, Some((compiled, compiler.engine().to_owned())))
        }
    };
    Ok(ReadyArtifact { revision, bytes, runtime, files: RevisionFiles { artifact, compiled } })
}

async fn receive<S, E>(dir: &DataDir, max_bytes: u64, mut body: S) -> Result<(TempFile, Revision, u64), UploadError<E>>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    let artifact = TempFile::make(dir)?;
    let mut file = tokio::fs::File::from_std(artifact.file().try_clone()?);
    let (mut hasher, mut bytes) = (Hasher::default(), 0);
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(UploadError::Body)?;
        bytes += chunk.len() as u64;
        if bytes > max_bytes {
            return Err(UploadError::TooLarge(max_bytes));
        }
        hasher.update(&chunk);
        file.write_all(&chunk).await?;
    }
    file.flush().await?;
    Ok((artifact, hasher.finish(), bytes))
}

/// Looks at an artifact's headers, on a thread that may block.
async fn inspect_file<E>(artifact: &TempFile) -> Result<Format, UploadError<E>> {
    let file = artifact.reopen()?;
    let look = move || inspect(&ReadCache::new(file));
    Ok(tokio::task::spawn_blocking(look).await.map_err(std::io::Error::other)??)
}
