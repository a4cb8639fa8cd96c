//! The one unsafe act of this crate: mapping compiled code.

use std::fs::File;

use wasmtime::{Engine, Module};

/// Maps a compiled artifact, whose code will be run as it is.
///
/// Called only inside a sandbox of the tenant whose bytes were compiled: should the artifact be other than what our
/// compiler makes of them, that tenant has native code in a sandbox that would hold native code just as well.
#[allow(unsafe_code)]
pub(super) fn map_artifact(engine: &Engine, artifact: File) -> wasmtime::Result<Module> {
    // SAFETY: the file was written by `compile` in a sandbox of the same tenant, is found by its digest and the
    // engine's fingerprint, and is never written again (`Store::keep_compiled` renames a finished file into place).
    unsafe { Module::deserialize_open_file(engine, artifact) }
}
