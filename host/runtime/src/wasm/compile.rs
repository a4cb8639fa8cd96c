//! Compiling: a stranger's bytes in, a mapped artifact out. Runs in a sandbox of its own, under limits of its own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::panic::catch_unwind;

use wasmparser::Validator;
use wasmtime::component::types::{ComponentFunc, ComponentItem};
use wasmtime::component::{Component, Type};
use wasmtime::{Engine, Module, Result, bail};
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

use super::engine::{PROMISED, engine};
use super::guest::{link_component, link_module};
use super::run::words_of;
use crate::artifact::is_component;
use crate::invocation::{Exports, Report, short};

/// Stack for an engine that runs nothing.
const STACK_BYTES: usize = 1024 * 1024;

/// Compiles the module or component in `source` (binary or text), checks that it links and can be called, and writes
/// the compiled form to standard output.
///
/// Gives [`Report::Compiled`], or [`Report::Invalid`] with what is wrong and where.
#[must_use]
pub fn compile(mut source: File) -> Report {
    let mut bytes = Vec::new();
    if let Err(error) = source.read_to_end(&mut bytes) {
        return Report::NotRunnable(format!("read the artifact: {error}"));
    }
    let (artifact, exports) = match catch_unwind(|| build(&bytes)) {
        Ok(Ok(built)) => built,
        Ok(Err(error)) => return Report::Invalid(short(format!("{error:#}"))),
        // nobody else shares this process
        Err(panic) => return Report::Invalid(short(format!("the compiler failed on it: {}", words_of(&*panic)))),
    };
    let out = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    match out.and_then(|mut out| out.write_all(&artifact)) {
        Ok(()) => Report::Compiled { bytes: artifact.len() as u64, exports },
        Err(error) => Report::NotRunnable(format!("write the compiled artifact: {error}")),
    }
}

pub(super) fn build(bytes: &[u8]) -> Result<(Vec<u8>, Exports)> {
    let engine = engine(STACK_BYTES)?;
    let binary = wat::parse_bytes(bytes)?;
    Validator::new_with_features(PROMISED).validate_all(&binary)?;
    if is_component(&binary) { build_component(&engine, &binary) } else { build_module(&engine, &binary) }
}

fn build_module(engine: &Engine, binary: &[u8]) -> Result<(Vec<u8>, Exports)> {
    let module = Module::from_binary(engine, binary)?;
    link_module(&module)?;
    check_start(&module)?;
    Ok((module.serialize()?, Exports::COMMAND))
}

fn check_start(module: &Module) -> Result<()> {
    let Some(export) = module.get_export("_start") else {
        let exports: Vec<&str> = module.exports().map(|export| export.name()).collect();
        bail!("no `_start` export; a command needs one. The module exports {exports:?}");
    };
    let ok = export.func().is_some_and(|ty| ty.params().len() == 0 && ty.results().len() == 0);
    if ok { Ok(()) } else { bail!("the `_start` export is not a function without parameters and results") }
}

fn build_component(engine: &Engine, binary: &[u8]) -> Result<(Vec<u8>, Exports)> {
    let component = Component::from_binary(engine, binary)?;
    let linked = link_component(&component)?;
    let exports = Exports {
        command: CommandPre::new(linked.clone()).is_ok() && is_run(&component),
        http: ProxyPre::new(linked).is_ok() && is_handle(&component),
    };
    if !exports.command && !exports.http {
        let ty = component.component_type();
        let names: Vec<&str> = ty.exports(engine).map(|(name, _)| name).collect();
        bail!("neither `wasi:cli/run` nor `wasi:http/incoming-handler` of version 0.2 is exported, but {names:?}");
    }
    Ok((component.serialize()?, exports))
}

/// Whether `run` takes nothing and gives a bare result. Looking an export up goes by its name alone.
fn is_run(component: &Component) -> bool {
    is_all_of(component, "wasi:cli/run@0.2.", "run", |run| {
        let bare = |ty: &Type| matches!(ty, Type::Result(result) if result.ok().is_none() && result.err().is_none());
        run.params().len() == 0 && run.results().len() == 1 && run.results().all(|ty| bare(&ty))
    })
}

/// Whether `handle` takes two resources, the request and the place for the response, and gives nothing.
fn is_handle(component: &Component) -> bool {
    is_all_of(component, "wasi:http/incoming-handler@0.2.", "handle", |handle| {
        handle.params().len() == 2
            && handle.params().all(|(_, ty)| matches!(ty, Type::Own(_)))
            && handle.results().len() == 0
    })
}

/// Whether every exported version of `interface` has a `function` that is right.
fn is_all_of(component: &Component, interface: &str, function: &str, right: impl Fn(&ComponentFunc) -> bool) -> bool {
    let (ty, engine) = (component.component_type(), component.engine());
    ty.exports(engine).filter(|(name, _)| name.starts_with(interface)).all(|(_, export)| match export.ty {
        ComponentItem::ComponentInstance(instance) => instance.exports(engine).any(
            |(name, export)| matches!(export.ty, ComponentItem::ComponentFunc(func) if name == function && right(&func)),
        ),
        _ => false,
    })
}
