//! Running: a compiled artifact, loaded and linked, becomes one guest that runs once.

use std::any::Any;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::runtime::Runtime;
use wasmtime::error::Context as _;
use wasmtime::{InstancePre, Linker, ResourceLimiter, Result, Store, Trap, WasmBacktrace};
use wasmtime_wasi::p1::{self, WasiP1Ctx};
use wasmtime_wasi::{FsPerms, I32Exit, WasiCtxBuilder};

use super::engine::engine;
use super::load::map_artifact;
use super::stdio;
use crate::invocation::{Invocation, Report, WasmEnd, short};

/// Table elements of a guest, all tables together. An element takes 8 to 16 bytes of host memory that the guest's own
/// memory limit does not see; a million is far above the largest language runtimes seen (some 60,000).
const MAX_TABLE_ELEMENTS: usize = 1_000_000;

/// Random bytes from one call. Real programs ask for kilobytes; each byte is host memory for a moment.
const MAX_RANDOM_BYTES: u64 = 1024 * 1024;

/// Host memory that the arguments of one WASI call may make the host allocate. wasmtime's default of 128 MiB is more
/// than a whole small job may have.
const MAX_HOSTCALL_BYTES: usize = 8 * 1024 * 1024;

/// Fuel that a guest is given and may not use: the engine stops a guest when all is used up, not when it wants more.
const SPARE_FUEL: u64 = 1;

/// The only directory that the guest has.
const SCRATCH: &str = "/tmp";

/// A module that is mapped, linked and waits for its job.
pub struct Loaded {
    module: InstancePre<State>,
    runtime: Runtime,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Loaded")
    }
}

/// What belongs to one guest.
struct State {
    wasi: WasiP1Ctx,
    limiter: Limiter,
}

/// Maps and links a compiled artifact. No instruction of it runs.
///
/// # Errors
/// The artifact is of another engine, damaged, or does not link. None of them can come from a tenant's doing.
pub fn load(artifact: File, stack_bytes: usize) -> Result<Loaded> {
    let engine = engine(stack_bytes)?;
    let module = map_artifact(&engine, artifact)?;
    let mut linker: Linker<State> = Linker::new(&engine);
    p1::add_to_linker_async(&mut linker, |state: &mut State| &mut state.wasi)?;
    // wasmtime's own turns codes of 126 and more into an error; a native program may end with any
    linker.allow_shadowing(true);
    linker.func_wrap("wasi_snapshot_preview1", "proc_exit", |code: i32| -> Result<()> { Err(I32Exit(code).into()) })?;
    let module = linker.instantiate_pre(&module)?;
    // one thread: a job may have a pids limit of 1, and file calls block this thread because nothing else waits
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    Ok(Loaded { module, runtime })
}

impl Loaded {
    /// Runs the guest to its end with at most `memory_bytes` of linear memory. `started` is called right before the
    /// first instruction of the guest, be it of a start function.
    #[must_use]
    pub fn run(self, invocation: &Invocation, memory_bytes: usize, started: impl FnOnce()) -> Report {
        let mut store = match self.store(invocation, memory_bytes) {
            Ok(store) => store,
            Err(error) => return Report::NotRunnable(short(format!("{error:#}"))),
        };
        started();
        let Self { module, runtime } = self;
        let result = catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async {
                let instance = module.instantiate_async(&mut store).await?;
                let start = instance.get_typed_func::<(), ()>(&mut store, "_start")?;
                start.call_async(&mut store, ()).await
            })
        }));
        let end = match result {
            Ok(Err(error)) if !has_run(&error) => return Report::NotRunnable(short(format!("{error:#}"))),
            Ok(result) => end_of(result),
            Err(panic) => internal(panic.as_ref()),
        };
        // the engine looks at loops and calls only: what was overdrawn after the last of them shows in the spare unit
        let left = store.get_fuel().unwrap_or(0);
        let end = if left < SPARE_FUEL { WasmEnd::OutOfFuel } else { end };
        Report::Wasm { end, fuel_used: invocation.fuel.saturating_sub(left.saturating_sub(SPARE_FUEL)) }
    }

    fn store(&self, invocation: &Invocation, memory_bytes: usize) -> Result<Store<State>> {
        let mut wasi = WasiCtxBuilder::new();
        stdio::connect(&mut wasi).context("connect the standard streams")?;
        wasi.args(&invocation.args)
            .envs(&invocation.env)
            .max_random_size(MAX_RANDOM_BYTES)
            .allow_blocking_current_thread(true)
            .allow_tcp(false)
            .allow_udp(false)
            .preopened_dir(SCRATCH, SCRATCH, FsPerms::ReadWrite)
            .context("open `/tmp`")?;
        let limiter = Limiter { memory_bytes, in_memory: 0, in_tables: 0 };
        let mut store = Store::new(self.module.module().engine(), State { wasi: wasi.build_p1(), limiter });
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(MAX_HOSTCALL_BYTES);
        store.set_fuel(invocation.fuel.saturating_add(SPARE_FUEL))?;
        Ok(store)
    }
}

/// Counts what the guest's memories and tables take together.
struct Limiter {
    memory_bytes: usize,
    in_memory: usize,
    in_tables: usize,
}

/// The guest asked for more memory than it may have. It is ended, as the kernel would end a native job: a guest that
/// is told of the failure mostly traps for a reason that says nothing of memory.
#[derive(Debug, thiserror::Error)]
#[error("memory of {asked} bytes asked for")]
struct OutOfMemory {
    asked: usize,
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false); // the module's own maximum, which the guest expects to meet
        }
        let total = self.in_memory.saturating_add(desired.saturating_sub(current));
        if total > self.memory_bytes {
            return Err(OutOfMemory { asked: total }.into());
        }
        self.in_memory = total;
        Ok(true)
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        let total = self.in_tables.saturating_add(desired.saturating_sub(current));
        if maximum.is_some_and(|maximum| desired > maximum) || total > MAX_TABLE_ELEMENTS {
            return Ok(false);
        }
        self.in_tables = total;
        Ok(true)
    }
}

/// Whether an error can have come from the guest's doing: else the module cannot even be instantiated, for instance
/// because its tables are larger than [`MAX_TABLE_ELEMENTS`].
fn has_run(error: &wasmtime::Error) -> bool {
    error.is::<Trap>() || error.is::<I32Exit>() || error.is::<OutOfMemory>() || error.is::<WasmBacktrace>()
}

fn end_of(result: Result<()>) -> WasmEnd {
    let Err(error) = result else { return WasmEnd::Exited(0) };
    if let Some(exit) = error.downcast_ref::<I32Exit>() {
        return WasmEnd::Exited(exit.0);
    }
    if let Some(OutOfMemory { asked }) = error.downcast_ref() {
        return WasmEnd::OutOfMemory { asked: *asked as u64 };
    }
    let backtrace = error.downcast_ref::<WasmBacktrace>().map(|frames| short(frames.to_string())).unwrap_or_default();
    match error.downcast_ref::<Trap>() {
        Some(Trap::OutOfFuel) => WasmEnd::OutOfFuel,
        Some(trap) => WasmEnd::Trapped { code: snake_case(&format!("{trap:?}")), backtrace },
        // a WASI call's own refusal to go on
        None => WasmEnd::Trapped { code: "host_error".into(), backtrace: short(format!("{error:#}\n{backtrace}")) },
    }
}

/// The engine or a WASI call panicked on what the guest did. The guest is lost; nobody else shares this process.
fn internal(panic: &(dyn Any + Send)) -> WasmEnd {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    WasmEnd::Trapped { code: "internal".into(), backtrace: short(message.unwrap_or("panic").to_owned()) }
}

/// `UnreachableCodeReached` to `unreachable_code_reached`.
fn snake_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 8);
    for (i, c) in name.char_indices() {
        if c.is_ascii_uppercase() && i > 0 {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trap_codes_are_words() {
        assert_eq!(snake_case(&format!("{:?}", Trap::UnreachableCodeReached)), "unreachable_code_reached");
        assert_eq!(snake_case(&format!("{:?}", Trap::StackOverflow)), "stack_overflow");
    }

    #[test]
    fn memory_is_counted_over_all_of_it() {
        let mut limiter = Limiter { memory_bytes: 3 << 16, in_memory: 0, in_tables: 0 };
        assert!(limiter.memory_growing(0, 1 << 16, None).unwrap());
        assert!(limiter.memory_growing(0, 2 << 16, None).unwrap(), "a second memory");
        let error = limiter.memory_growing(2 << 16, 3 << 16, None).unwrap_err();
        assert_eq!(error.downcast_ref::<OutOfMemory>().unwrap().asked, 4 << 16);
        assert!(!limiter.memory_growing(0, 1 << 20, Some(1 << 16)).unwrap(), "its own maximum");
    }

    #[test]
    fn tables_are_counted_over_all_of_them() {
        let mut limiter = Limiter { memory_bytes: 0, in_memory: 0, in_tables: 0 };
        assert!(limiter.table_growing(0, MAX_TABLE_ELEMENTS, None).unwrap());
        assert!(!limiter.table_growing(0, 1, None).unwrap());
    }
}
