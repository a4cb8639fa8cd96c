//! Compiling: a stranger's bytes in, a mapped artifact out. Runs in a sandbox of its own, under limits of its own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use wasmtime::error::Context as _;
use wasmtime::{Linker, Module, Result, bail, format_err};
use wasmtime_wasi::p1::{self, WasiP1Ctx};

use super::engine::engine;
use crate::invocation::{Report, short};

/// Stack for an engine that runs nothing.
const STACK_BYTES: usize = 1024 * 1024;

/// Compiles the module in `source` (binary or text), checks that it links and has a `_start`, and writes the compiled
/// form to standard output.
///
/// Gives [`Report::Compiled`], or [`Report::Invalid`] with what is wrong and where in the module.
#[must_use]
pub fn compile(mut source: File) -> Report {
    let mut bytes = Vec::new();
    if let Err(error) = source.read_to_end(&mut bytes) {
        return Report::NotRunnable(format!("read the module: {error}"));
    }
    let artifact = match build(&bytes) {
        Ok(artifact) => artifact,
        Err(error) => return Report::Invalid(short(format!("{error:#}"))),
    };
    let out = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    match out.and_then(|mut out| out.write_all(&artifact)) {
        Ok(()) => Report::Compiled { bytes: artifact.len() as u64 },
        Err(error) => Report::NotRunnable(format!("write the compiled module: {error}")),
    }
}

fn build(bytes: &[u8]) -> Result<Vec<u8>> {
    let engine = engine(STACK_BYTES)?;
    let module = Module::new(&engine, bytes)?;
    let mut linker: Linker<WasiP1Ctx> = Linker::new(&engine);
    p1::add_to_linker_async(&mut linker, |ctx| ctx)?;
    name_unknown_imports(&module, &linker)?;
    linker.instantiate_pre(&module).context("the module does not link")?;
    check_start(&module)?;
    module.serialize()
}

/// Names every import that nothing here provides, not only the first.
fn name_unknown_imports(module: &Module, linker: &Linker<WasiP1Ctx>) -> Result<()> {
    let mut store = wasmtime::Store::new(module.engine(), wasmtime_wasi::WasiCtxBuilder::new().build_p1());
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

fn check_start(module: &Module) -> Result<()> {
    let Some(export) = module.get_export("_start") else {
        let exports: Vec<&str> = module.exports().map(|export| export.name()).collect();
        bail!("no `_start` export; a command needs one. The module exports {exports:?}");
    };
    let ok = export.func().is_some_and(|ty| ty.params().len() == 0 && ty.results().len() == 0);
    if ok { Ok(()) } else { bail!("the `_start` export is not a function without parameters and results") }
}
