//! Running: a compiled artifact, loaded and linked, becomes one guest that runs once.

use std::any::Any;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tokio::runtime::{Builder, Runtime};
use wasmtime::{Engine, InstancePre, Result, Store, Trap, WasmBacktrace, bail};
use wasmtime_wasi::I32Exit;
use wasmtime_wasi::p2::bindings::{Command, CommandPre};
use wasmtime_wasi_http::p2::bindings::{Proxy, ProxyPre};

use super::engine::engine;
use super::guest::{OutOfMemory, State, ahead, begin, blank_store, fuel_left, link_component, link_module, store};
use super::http::{self, NoResponse};
use super::load::{Mapped, map_artifact};
use crate::invocation::{Interface, Invocation, Report, WasmEnd, short};

/// An artifact that is mapped, linked and waits for its job. Until [`Loaded::settle`] it holds no descriptor but the
/// artifact's: processes cloned from this one share no state of the kernel's with each other.
pub struct Loaded {
    engine: Engine,
    guest: Guest,
    runtime: Option<Runtime>,
    ahead: Option<Ahead>,
}

/// A guest that has been instantiated before there is a job.
struct Ahead {
    interface: Interface,
    store: Store<State>,
    instance: Instance,
    fuel_used: u64,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Loaded")
    }
}

/// What can be called of an artifact.
enum Guest {
    Module(InstancePre<State>),
    Component { command: Option<CommandPre<State>>, http: Option<ProxyPre<State>> },
}

/// One of it, of which no instruction has run but those of start functions.
enum Instance {
    Module(wasmtime::Instance),
    Command(Command),
    Http(Proxy),
}

/// Maps and links a compiled artifact. No instruction of it runs. `proc` is a `/proc`, through which a component's file is
/// opened once more: its mode must let this process read it.
///
/// # Errors
/// The artifact is of another engine, damaged, or does not link. None of them can come from a tenant's doing.
pub fn load(artifact: File, stack_bytes: usize, proc: &Path) -> Result<Loaded> {
    let engine = engine(stack_bytes)?;
    let guest = match map_artifact(&engine, artifact, proc)? {
        Mapped::Module(module) => Guest::Module(link_module(&module)?),
        Mapped::Component(component) => {
            component.initialize_copy_on_write_image()?;
            let linked = link_component(&component)?;
            let http = ProxyPre::new(linked.clone()).ok();
            Guest::Component { command: CommandPre::new(linked).ok(), http }
        }
    };
    let mut loaded = Loaded { engine, guest, runtime: None, ahead: None };
    // should it fail, the run says why
    let _ = loaded.rehearse();
    if !loaded.waits_for_descriptors() {
        loaded.runtime = Some(event_loop(false)?);
    }
    Ok(loaded)
}

/// One thread: a job may have a pids limit of 1, and file calls block this thread because nothing else waits.
fn event_loop(descriptors: bool) -> io::Result<Runtime> {
    let mut runtime = Builder::new_current_thread();
    runtime.enable_time();
    if descriptors {
        runtime.enable_io();
    }
    runtime.build()
}

impl Loaded {
    /// Makes what this process alone may have: an event loop that waits for descriptors, where there is one.
    ///
    /// # Errors
    /// Those of `epoll_create(2)` and `eventfd(2)`.
    pub fn settle(&mut self) -> io::Result<()> {
        if self.waits_for_descriptors() {
            self.runtime = Some(event_loop(true)?);
        }
        Ok(())
    }

    /// Makes what each run makes anew, and throws it away. So what is found out once in a process has been found out: which
    /// instructions the CPU has, for one, which costs 30 µs under a hypervisor. And a clone has pages of its own where it
    /// will write again.
    ///
    /// # Errors
    /// As a run's beginning: `/tmp` cannot be opened, for one.
    pub fn rehearse(&self) -> Result<()> {
        store(&self.engine, &Invocation::default(), 0).map(drop)
    }

    /// Instantiates the guest before there is a job. Start functions run in that, if they need nothing of the host and little
    /// fuel, which the job is charged with. Whatever goes wrong, the run begins from nothing.
    pub fn instantiate_ahead(&mut self, memory_bytes: usize) {
        let Some(runtime) = &self.runtime else { return };
        let (guest, mut store) = (&self.guest, blank_store(&self.engine, memory_bytes));
        let interface = guest.likely_interface();
        let made = catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(ahead(&mut store, async |store| guest.instantiate(interface, store).await))
        }));
        let made = made.ok().and_then(Result::ok);
        self.ahead = made.map(|(instance, fuel_used)| Ahead { interface, store, instance, fuel_used });
    }

    fn waits_for_descriptors(&self) -> bool {
        matches!(self.guest, Guest::Component { http: Some(_), .. })
    }

    /// Runs the guest to its end with at most `memory_bytes` of linear memory. `started` is called right before the
    /// first instruction of the guest, be it of a start function, unless [`Loaded::instantiate_ahead`] has come before. The
    /// process's standard streams serve one run.
    #[must_use]
    pub fn run(&mut self, invocation: &Invocation, memory_bytes: usize, started: impl FnOnce()) -> Report {
        let Self { engine, guest, runtime, ahead } = self;
        let Some(runtime) = runtime else { return Report::NotRunnable("it has not been settled".into()) };
        let fits = |ahead: &Ahead| ahead.interface == invocation.interface && ahead.fuel_used <= invocation.fuel;
        let begun = match ahead.take().filter(fits) {
            Some(Ahead { mut store, instance, fuel_used, .. }) => {
                begin(&mut store, invocation, fuel_used).map(|()| (store, Some(instance)))
            }
            None => store(engine, invocation, memory_bytes).map(|store| (store, None)),
        };
        let (store, instance) = match begun {
            Ok(begun) => begun,
            Err(error) => return Report::NotRunnable(short(format!("{error:#}"))),
        };
        started();
        let run = AssertUnwindSafe(|| runtime.block_on(guest.call(store, invocation.interface, instance)));
        let (end, left) = match catch_unwind(run) {
            Ok((Err(error), _)) if error.is::<NotInstantiated>() => {
                return Report::NotRunnable(short(format!("{error:#}")));
            }
            Ok((_, None)) => (WasmEnd::OutOfFuel, 0),
            Ok((result, Some(left))) => (end_of(result), left),
            // how much it used is lost with its store
            Err(panic) => (internal(panic.as_ref()), 0),
        };
        Report::Wasm { end, fuel_used: invocation.fuel.saturating_sub(left) }
    }
}

impl Guest {
    /// The one that a job of it most likely asks for.
    fn likely_interface(&self) -> Interface {
        if matches!(self, Self::Component { http: Some(_), .. }) { Interface::Http } else { Interface::Command }
    }

    async fn instantiate(&self, interface: Interface, store: &mut Store<State>) -> Result<Instance> {
        match (interface, self) {
            (Interface::Http, Self::Component { http: Some(http), .. }) => {
                instantiated(http.instantiate_async(store).await).map(Instance::Http)
            }
            (Interface::Command, Self::Module(module)) => {
                instantiated(module.instantiate_async(store).await).map(Instance::Module)
            }
            (Interface::Command, Self::Component { command: Some(command), .. }) => {
                instantiated(command.instantiate_async(store).await).map(Instance::Command)
            }
            _ => Err(wasmtime::format_err!("the artifact does not have the interface {interface:?}")),
        }
    }

    /// Gives its end and what is left of its fuel. The store stays: the process is about to end, and to take it apart would
    /// cost more than that.
    async fn call(
        &self,
        store: Store<State>,
        interface: Interface,
        instance: Option<Instance>,
    ) -> (Result<()>, Option<u64>) {
        let mut store = ManuallyDrop::new(store);
        let instance = match instance {
            Some(instance) => Ok(instance),
            None => self.instantiate(interface, &mut store).await,
        };
        let result = match instance {
            Ok(instance) => instance.call(&mut store).await,
            Err(error) => Err(error),
        };
        (result, fuel_left(&store))
    }
}

impl Instance {
    async fn call(&self, store: &mut Store<State>) -> Result<()> {
        match self {
            Self::Module(instance) => {
                let start = instance.get_typed_func::<(), ()>(&mut *store, "_start")?;
                start.call_async(store, ()).await
            }
            Self::Command(command) => match command.wasi_cli_run().call_run(store).await? {
                Ok(()) => Ok(()),
                // what the standard calls failure has no number; a shell's is 1
                Err(()) => bail!(I32Exit(1)),
            },
            Self::Http(proxy) => http::serve(proxy, store).await,
        }
    }
}

/// None of the guest's instructions could run, for instance because its tables are larger than a guest's may be.
#[derive(Debug, thiserror::Error)]
#[error("it cannot be instantiated")]
struct NotInstantiated;

/// Marks an error of instantiation that is not of the guest's own doing, in a start function or by its memory.
fn instantiated<T>(result: Result<T>) -> Result<T> {
    result.map_err(|error| {
        let own =
            error.is::<Trap>() || error.is::<I32Exit>() || error.is::<OutOfMemory>() || error.is::<WasmBacktrace>();
        if own { error } else { error.context(NotInstantiated) }
    })
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
    if error.is::<NoResponse>() {
        return WasmEnd::Trapped { code: "no_response".into(), backtrace: short(error.to_string()) };
    }
    match error.downcast_ref::<Trap>() {
        Some(Trap::OutOfFuel) => WasmEnd::OutOfFuel,
        Some(trap) => WasmEnd::Trapped { code: snake_case(&format!("{trap:?}")), backtrace },
        // a WASI call's own refusal to go on
        None => WasmEnd::Trapped { code: "host_error".into(), backtrace: short(format!("{error:#}\n{backtrace}")) },
    }
}

/// The engine or a WASI call panicked on what the guest did. The guest is lost; nobody else shares this process.
fn internal(panic: &(dyn Any + Send)) -> WasmEnd {
    WasmEnd::Trapped { code: "internal".into(), backtrace: short(words_of(panic).to_owned()) }
}

/// What a panic says.
pub(super) fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic")
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

    fn compiled(text: &str) -> File {
        let (artifact, _) = super::super::compile::build(text.as_bytes()).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &artifact).unwrap();
        file
    }

    /// Runs it with so much fuel, instantiated ahead if that was possible, and anew. Whether it was, and both ends.
    fn both_ways(text: &str, fuel: u64) -> (bool, [(WasmEnd, u64); 2]) {
        let mut was_ahead = false;
        let ends = [true, false].map(|ahead| {
            let mut loaded = load(compiled(text), 1 << 20, Path::new("/proc")).unwrap();
            if ahead {
                loaded.instantiate_ahead(1 << 20);
                was_ahead = loaded.ahead.is_some();
            }
            let report = loaded.run(&Invocation { fuel, ..Invocation::default() }, 1 << 20, || ());
            let Report::Wasm { end, fuel_used } = report else { panic!("{report:?}") };
            (end, fuel_used)
        });
        (was_ahead, ends)
    }

    #[test]
    fn a_run_ends_in_the_same_way_and_uses_the_same_fuel_whether_or_not_it_was_instantiated_ahead() {
        let module = |start: &str| {
            format!(
                r#"(module
                    (import "wasi_snapshot_preview1" "environ_sizes_get" (func $host (param i32 i32) (result i32)))
                    (memory (export "memory") 1) (global $g (mut i32) (i32.const 0))
                    (func $start {start}) (start $start)
                    (func (export "_start")
                        (if (i32.ne (global.get $g) (i32.const 7)) (then unreachable))))"#
            )
        };
        let trapped = |code: &str| WasmEnd::Trapped { code: code.into(), backtrace: String::new() };
        let sets = "(global.set $g (i32.const 7))";
        let cases = [
            (module(sets), 1000, true, WasmEnd::Exited(0)),
            (module(sets), 3, true, WasmEnd::OutOfFuel),
            (module("nop"), 1000, true, trapped("unreachable_code_reached")),
            (module("unreachable"), 1000, false, trapped("unreachable_code_reached")),
            (
                module(&format!("{sets} (drop (call $host (i32.const 0) (i32.const 8)))")),
                1000,
                false,
                WasmEnd::Exited(0),
            ),
            (module("(loop (br 0))"), 1_000_000, false, WasmEnd::OutOfFuel),
        ];
        for (text, fuel, ahead, expected) in cases {
            let (was_ahead, ends) = both_ways(&text, fuel);
            assert_eq!(was_ahead, ahead, "{text}");
            for (end, used) in &ends {
                let end = match end.clone() {
                    WasmEnd::Trapped { code, .. } => trapped(&code),
                    other => other,
                };
                assert_eq!((&end, *used), (&expected, ends[1].1), "{text}");
            }
        }
    }

    #[test]
    fn what_is_instantiated_ahead_has_the_memory_limit_of_its_run() {
        let mut loaded =
            load(compiled(r#"(module (memory 2) (func (export "_start")))"#), 1 << 20, Path::new("/proc")).unwrap();
        loaded.instantiate_ahead(1 << 16);
        assert!(loaded.ahead.is_none());
        let Report::Wasm { end, .. } = loaded.run(&Invocation { fuel: 1000, ..Invocation::default() }, 1 << 16, || ())
        else {
            panic!()
        };
        assert!(matches!(end, WasmEnd::OutOfMemory { asked: 131_072 }), "{end:?}");
    }

    #[test]
    fn what_is_compiled_can_be_loaded() {
        let command = r#"(component
            (core module $m (func (export "run") (result i32) i32.const 0))
            (core instance $i (instantiate $m))
            (func $run (result (result)) (canon lift (core func $i "run")))
            (instance $cli (export "run" (func $run)))
            (export "wasi:cli/run@0.2.3" (instance $cli)))"#;
        for text in [r#"(module (func (export "_start")))"#, command] {
            let (artifact, exports) = super::super::compile::build(text.as_bytes()).unwrap();
            assert!(exports.command && !exports.http);
            let mut file = tempfile::tempfile().unwrap();
            std::io::Write::write_all(&mut file, &artifact).unwrap();
            load(file, 1 << 20, Path::new("/proc")).unwrap();
        }
    }
}
