//! The unsafe acts of this crate: mapping compiled code.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use wasmtime::component::Component;
use wasmtime::{Engine, Module, Precompiled, Result, bail};

/// A compiled artifact, ready to be linked.
pub(super) enum Mapped {
    Module(Module),
    Component(Component),
}

/// Maps a compiled artifact, whose code will be run as it is.
///
/// Called only inside a sandbox of the tenant whose bytes were compiled: should the artifact be other than what our
/// compiler makes of them, that tenant has native code in a sandbox that would hold native code just as well.
#[allow(unsafe_code)]
pub(super) fn map_artifact(engine: &Engine, artifact: File) -> Result<Mapped> {
    let bytes = map(&artifact)?;
    Ok(match Engine::detect_precompiled(bytes) {
        // by its file, which the guest's memory is then mapped from too
        // SAFETY: the file was written by `compile` in a sandbox of the same tenant, is found by its digest and the
        // engine's fingerprint, and is never written again (`Store::keep_compiled` renames a finished file into place).
        Some(Precompiled::Module) => Mapped::Module(unsafe { Module::deserialize_open_file(engine, artifact) }?),
        // by its bytes, which are copied: the engine takes a component's file by path only, and there is none in here
        // SAFETY: as above.
        Some(Precompiled::Component) => Mapped::Component(unsafe { Component::deserialize(engine, bytes) }?),
        None => bail!("not a compiled artifact"),
    })
}

/// Maps a whole file for the rest of this process's life.
#[allow(unsafe_code)]
fn map(file: &File) -> io::Result<&'static [u8]> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let size = NonZeroUsize::new(length).ok_or(io::ErrorKind::UnexpectedEof)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let start = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, file, 0) }?;
    let bytes: NonNull<[u8]> = NonNull::slice_from_raw_parts(start.cast(), length);
    // SAFETY: the mapping is readable, as long as this, never unmapped, and its file is never written again.
    Ok(unsafe { bytes.as_ref() })
}
