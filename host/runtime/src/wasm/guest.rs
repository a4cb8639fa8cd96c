//! A guest's world: what it may import, what its store holds, and how much of the host it may use.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::rngs::{StdRng, SysRng};
use rand::{RngExt as _, SeedableRng};
use wasmtime::component::{self, Component, InstancePre as ComponentPre};
use wasmtime::error::Context as _;
use wasmtime::{Engine, InstancePre, Linker, Module, ResourceLimiter, Result, Store, bail, format_err};
use wasmtime_wasi::p1::{self, WasiP1Ctx};
use wasmtime_wasi::{FsPerms, HostMonotonicClock, HostWallClock, I32Exit, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::p2::bindings::http::types::ErrorCode;
use wasmtime_wasi_http::{RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView};

use super::stdio;
use crate::invocation::{Interface, Invocation};

/// Table elements of a guest, all tables together. An element takes 8 to 16 bytes of host memory that the guest's own
/// memory limit does not see; a million is far above the largest language runtimes seen (some 60,000).
const MAX_TABLE_ELEMENTS: usize = 1_000_000;

/// Random bytes from one call. Real programs ask for kilobytes; each byte is host memory for a moment.
const MAX_RANDOM_BYTES: u64 = 1024 * 1024;

/// Host memory that the arguments of one WASI call may make the host allocate. wasmtime's default of 128 MiB is more
/// than a whole small job may have.
const MAX_HOSTCALL_BYTES: usize = 8 * 1024 * 1024;

/// Handles of all kinds that a guest may hold: files, streams, pollables, headers. Some hundred bytes of host memory
/// each; wasmtime's default is a million.
const MAX_HANDLES: usize = 16 * 1024;

/// What both clocks are rounded down to. As coarse as browsers make theirs where pages of strangers share a process:
/// far too coarse to tell a cache hit from a miss.
const CLOCK_STEP: Duration = Duration::from_micros(100);

/// Fuel after which a guest lets the host go on moving its bodies, about a quarter of a millisecond.
const YIELD_AFTER_FUEL: u64 = 1_000_000;

/// Fuel that a guest is given and may not use: the engine stops a guest when all is used up, not when it wants more.
const SPARE_FUEL: u64 = 1;

/// Fuel that a guest's start functions may use before there is a job: what toolchains generate uses some ten. With as much as
/// this a guest can touch some 3 MiB, which is about what a parked sandbox is reckoned at.
const FUEL_AHEAD: u64 = 1000;

/// The only directory that the guest has.
const SCRATCH: &str = "/tmp";

/// What belongs to one guest.
pub(super) struct State {
    wasi: WasiP1Ctx,
    http: WasiHttpCtx,
    no_network: NoNetwork,
    limiter: Limiter,
    /// There is no job yet, so that whatever the guest asks of the host ends it.
    ahead: bool,
}

impl State {
    /// For a check of imports, which nothing ever runs in.
    pub(super) fn idle() -> Self {
        Self::around(WasiCtxBuilder::new().build_p1(), 0)
    }

    fn around(wasi: WasiP1Ctx, memory_bytes: usize) -> Self {
        let limiter = Limiter { memory_bytes, in_memory: 0, in_tables: 0 };
        Self { wasi, http: WasiHttpCtx::new(), no_network: NoNetwork, limiter, ahead: false }
    }

    /// What the host's functions for core modules work on.
    fn preview1(&mut self) -> &mut WasiP1Ctx {
        self.leave_if_ahead();
        &mut self.wasi
    }

    /// All that the host has for a guest is reached through this state. The engine hands a panic on to whoever called the
    /// guest.
    fn leave_if_ahead(&self) {
        if self.ahead {
            std::panic::resume_unwind(Box::new("a guest without a job has called the host"));
        }
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.leave_if_ahead();
        self.wasi.ctx()
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        self.leave_if_ahead();
        WasiHttpCtxView { hooks: &mut self.no_network, table: self.wasi.ctx().table, ctx: &mut self.http }
    }
}

/// Generators of random numbers of this run's own. The library's draw from one that its thread has: every process cloned
/// from a zygote would go on from where the zygote's was, and give the same numbers.
fn seed(wasi: &mut WasiCtxBuilder) -> Result<()> {
    let fresh = || StdRng::try_from_rng(&mut SysRng).context("ask the kernel for random numbers");
    wasi.secure_random(fresh()?).insecure_random(fresh()?).insecure_random_seed(fresh()?.random());
    Ok(())
}

/// A store for one run of `invocation`, connected to this process's standard streams.
pub(super) fn store(engine: &Engine, invocation: &Invocation, memory_bytes: usize) -> Result<Store<State>> {
    let mut store = blank_store(engine, memory_bytes);
    begin(&mut store, invocation, 0)?;
    Ok(store)
}

/// A store that has not begun its run: it has nothing that is a job's, and no fuel, so that no instruction runs.
pub(super) fn blank_store(engine: &Engine, memory_bytes: usize) -> Store<State> {
    let mut store = Store::new(engine, State::around(WasiCtxBuilder::new().build_p1(), memory_bytes));
    store.limiter(|state| &mut state.limiter);
    store.set_hostcall_fuel(MAX_HOSTCALL_BYTES);
    store
}

/// Instantiates a guest in a blank store by `instantiate`. Gives the fuel that start functions of the guest have used. They may
/// use a little. What they ask of the host they are to have of a job's: a first call ends in a panic, for the caller to catch.
pub(super) async fn ahead<T>(
    store: &mut Store<State>,
    instantiate: impl AsyncFnOnce(&mut Store<State>) -> Result<T>,
) -> Result<(T, u64)> {
    store.set_fuel(FUEL_AHEAD)?;
    store.data_mut().ahead = true;
    let instance = instantiate(store).await?;
    store.data_mut().ahead = false;
    match store.get_fuel()? {
        0 => bail!("it uses much fuel"),
        left => Ok((instance, FUEL_AHEAD - left)),
    }
}

/// Gives a blank store, in which `used` of the fuel has been used already, its run.
pub(super) fn begin(store: &mut Store<State>, invocation: &Invocation, used: u64) -> Result<()> {
    let mut wasi = WasiCtxBuilder::new();
    seed(&mut wasi)?;
    stdio::connect(&mut wasi, invocation.interface).context("connect the standard streams")?;
    wasi.args(&invocation.args)
        .envs(&invocation.env)
        .max_random_size(MAX_RANDOM_BYTES)
        .monotonic_clock(CoarseClock(Instant::now()))
        .wall_clock(CoarseWallClock)
        .allow_blocking_current_thread(true)
        .allow_tcp(false)
        .allow_udp(false)
        .preopened_dir(SCRATCH, SCRATCH, FsPerms::ReadWrite)
        .context("open `/tmp`")?;
    let state = store.data_mut();
    // the blank one has nothing to give back
    std::mem::forget(std::mem::replace(&mut state.wasi, wasi.build_p1()));
    state.ctx().table.set_max_capacity(MAX_HANDLES);
    store.set_fuel(invocation.fuel.saturating_sub(used).saturating_add(SPARE_FUEL))?;
    if invocation.interface == Interface::Http {
        store.fuel_async_yield_interval(Some(YIELD_AFTER_FUEL))?;
    }
    Ok(())
}

/// What a guest has left of its fuel; `None` if it has used more than it was given. The engine looks at loops and calls
/// only: what was overdrawn after the last of them shows in the spare unit.
pub(super) fn fuel_left(store: &Store<State>) -> Option<u64> {
    store.get_fuel().unwrap_or(0).checked_sub(SPARE_FUEL)
}

/// Links a core module.
pub(super) fn link_module(module: &Module) -> Result<InstancePre<State>> {
    let mut linker: Linker<State> = Linker::new(module.engine());
    p1::add_to_linker_async(&mut linker, State::preview1)?;
    name_unknown_imports(module, &linker)?;
    // wasmtime's own turns codes of 126 and more into an error; a native program may end with any
    linker.allow_shadowing(true);
    linker.func_wrap("wasi_snapshot_preview1", "proc_exit", |code: i32| -> Result<()> { bail!(I32Exit(code)) })?;
    linker.instantiate_pre(module).context("the module does not link")
}

/// Names every import that nothing here provides, not only the first.
fn name_unknown_imports(module: &Module, linker: &Linker<State>) -> Result<()> {
    let mut store = Store::new(module.engine(), State::idle());
    let unknown: Vec<String> = module
        .imports()
        .filter(|import| linker.get(&mut store, import.module(), import.name()).is_err())
        .map(|import| format!("`{}` from `{}`", import.name(), import.module()))
        .collect();
    match unknown.as_slice() {
        [] => Ok(()),
        names => Err(format_err!("unknown import {}: only `wasi_snapshot_preview1` is provided", names.join(", "))),
    }
}

/// Links a component. Imports are matched by semantic versioning; an unknown one is named with its version.
pub(super) fn link_component(component: &Component) -> Result<ComponentPre<State>> {
    let mut linker: component::Linker<State> = component::Linker::new(component.engine());
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    linker
        .instantiate_pre(component)
        .context("the component does not link: provided are the interfaces of `wasi:cli` and `wasi:http`, version 0.2")
}

/// Refuses every outgoing request: there is no network to send it to.
struct NoNetwork;

type Sent = (hyper::Response<WasiBody>, Box<dyn Future<Output = wasmtime_wasi_http::Result<()>> + Send>);

impl WasiHttpHooks for NoNetwork {
    fn send_request(
        &mut self,
        _: hyper::Request<WasiBody>,
        _: Option<RequestOptions>,
        _: Box<dyn Future<Output = wasmtime_wasi_http::Result<()>> + Send>,
    ) -> Box<dyn Future<Output = wasmtime_wasi_http::Result<Sent>> + Send> {
        Box::new(async { Err(ErrorCode::HttpRequestDenied.into()) })
    }
}

/// Time since the guest began.
struct CoarseClock(Instant);

impl HostMonotonicClock for CoarseClock {
    fn resolution(&self) -> u64 {
        nanos(CLOCK_STEP)
    }

    fn now(&self) -> u64 {
        nanos(rounded(self.0.elapsed()))
    }
}

struct CoarseWallClock;

impl HostWallClock for CoarseWallClock {
    fn resolution(&self) -> Duration {
        CLOCK_STEP
    }

    fn now(&self) -> Duration {
        rounded(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }
}

fn rounded(time: Duration) -> Duration {
    let step = CLOCK_STEP.as_nanos();
    Duration::from_nanos(u64::try_from(time.as_nanos() / step * step).unwrap_or(u64::MAX))
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
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
pub(super) struct OutOfMemory {
    pub(super) asked: usize,
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false); // the module's own maximum, which the guest expects to meet
        }
        let total = self.in_memory.saturating_add(desired.saturating_sub(current));
        if total > self.memory_bytes {
            bail!(OutOfMemory { asked: total });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_coarse() {
        assert_eq!(rounded(Duration::from_nanos(1_234_567)), Duration::from_micros(1200));
        assert_eq!(CoarseWallClock.now().subsec_nanos() % 100_000, 0);
        assert_eq!(CoarseClock(Instant::now()).now() % 100_000, 0);
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
