//! The unsafe acts of this crate: mapping compiled code.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use wasmtime::component::Component;
use wasmtime::{Engine, Module, Precompiled, Result, bail};

/// A compiled artifact, ready to be linked.
pub(super) enum Mapped {
    Module(Module),
    Component(Component),
}

/// Maps a compiled artifact, whose code will be run as it is. Guests' memory is mapped from the same file, so nothing of
/// it is copied: processes that are cloned from this one share all of it. `proc` is a `/proc`.
///
/// Called only inside a sandbox of the tenant whose bytes were compiled: should the artifact be other than what our
/// compiler makes of them, that tenant has native code in a sandbox that would hold native code just as well.
#[allow(unsafe_code)]
pub(super) fn map_artifact(engine: &Engine, artifact: File, proc: &Path) -> Result<Mapped> {
    // SAFETY, of both: the file was written by `compile` in a sandbox of the same tenant, is found by its digest and the
    // engine's fingerprint, and is never written again (`Store::keep_compiled` renames a finished file into place).
    Ok(match kind(&artifact)? {
        // SAFETY: as above.
        Some(Precompiled::Module) => Mapped::Module(unsafe { Module::deserialize_open_file(engine, artifact) }?),
        Some(Precompiled::Component) => {
            // the engine takes a component's file by path alone
            let path = proc.join("self/fd").join(artifact.as_raw_fd().to_string());
            // SAFETY: as above.
            Mapped::Component(unsafe { Component::deserialize_file(engine, path) }?)
        }
        None => bail!("not a compiled artifact"),
    })
}

/// What the file's headers say that it is.
#[allow(unsafe_code)]
fn kind(file: &File) -> io::Result<Option<Precompiled>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let size = NonZeroUsize::new(length).ok_or(io::ErrorKind::UnexpectedEof)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let start = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, file, 0) }?;
    let bytes: NonNull<[u8]> = NonNull::slice_from_raw_parts(start.cast(), length);
    // SAFETY: the mapping is readable, and there until the end of this function; its file is never written again.
    let kind = Engine::detect_precompiled(unsafe { bytes.as_ref() });
    // SAFETY: it is our own mapping, and nothing refers to it any more.
    unsafe { munmap(start, length) }?;
    Ok(kind)
}
