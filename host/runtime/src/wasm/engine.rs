//! The engine: which WebAssembly is promised, and the figures that compiled code depends on.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;

use wasmtime::{Config, Engine, WasmFeatures};

/// Host stack that WASI calls may need on top of a guest that has used all of its own. wasmtime's own default leaves
/// 1.5 MiB; its deepest calls measured here use far less.
const HOST_STACK_BYTES: usize = 1024 * 1024;

/// Guest frames in a trap's backtrace.
const MAX_FRAMES: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// What guests may be made of: WebAssembly 2.0 (SIMD included), its reference types without garbage collection, extended
/// constant expressions, and components. No later proposal.
pub(super) const PROMISED: WasmFeatures = WasmFeatures::WASM2
    .union(WasmFeatures::EXTENDED_CONST)
    .union(WasmFeatures::BULK_MEMORY_OPT)
    .union(WasmFeatures::CALL_INDIRECT_OVERLONG)
    .union(WasmFeatures::COMPONENT_MODEL);

/// The engine could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make the WebAssembly engine")]
pub struct EngineError(#[source] wasmtime::Error);

/// An engine whose guests have `stack_bytes` of stack.
///
/// What is not [`PROMISED`] is off, whatever the library's defaults become. The stack's size is no part of compiled code:
/// artifacts fit every engine made here.
pub(super) fn engine(stack_bytes: usize) -> Result<Engine, EngineError> {
    let mut config = Config::new();
    config
        .consume_fuel(true)
        .max_wasm_stack(stack_bytes)
        .async_stack_size(stack_bytes + HOST_STACK_BYTES)
        .wasm_backtrace_max_frames(Some(MAX_FRAMES))
        // registering unwind tables costs time at load, and nothing here unwinds through guests
        .native_unwind_info(false)
        .wasm_tail_call(false)
        .wasm_custom_page_sizes(false)
        .wasm_wide_arithmetic(false)
        .wasm_relaxed_simd(false)
        // for itself: where one part of a component calls another, it makes a module that sees the memories of both.
        // In a guest's own modules there is none, as they are looked at before
        .wasm_multi_memory(true)
        .wasm_memory64(false)
        .wasm_gc(false)
        .wasm_stack_switching(false)
        .wasm_features(WasmFeatures::FUNCTION_REFERENCES | WasmFeatures::THREADS | WasmFeatures::EXCEPTIONS, false)
        .wasm_extended_const(true)
        .wasm_component_model(true);
    Engine::new(&config).map_err(EngineError)
}

/// What compiled artifacts depend on: the engine's version, its settings and this CPU's features. Artifacts are kept
/// under this name, so that another engine or another machine compiles anew and never loads what it cannot run.
///
/// # Errors
/// The engine cannot be made on this machine.
pub fn fingerprint() -> Result<String, EngineError> {
    let engine = engine(HOST_STACK_BYTES)?;
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}
