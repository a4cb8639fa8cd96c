//! What a cloned process does: the only place where the sandbox and the runtimes meet.

use std::fs::File;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::path::Path;

use holm_runtime::invocation::{Invocation, Report, short};
use holm_runtime::{native, wasm};
use holm_sandbox::spec::{Kind, SandboxSpec};
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::{Job, PROC, Task, Workload};
use nix::errno::Errno;

/// The name under which this program starts as the launcher.
pub const LAUNCHER: &str = "holm-launcher";

/// The whole life of the launcher process; gives its exit code.
#[must_use]
pub fn launcher_main() -> i32 {
    // a panic in a sandbox is reported over its channel; its text would go to the tenant's standard error
    let launcher = std::process::id();
    std::panic::set_hook(Box::new(move |panic| {
        if std::process::id() == launcher {
            let _ = writeln!(std::io::stderr(), "holm-launcher: {panic}");
        }
    }));
    holm_sandbox::launcher::launcher_main(&Inside)
}

/// The exit code of a sandbox that could not run its job (`EX_SOFTWARE`). What counts is the report.
const NO_RUN: i32 = 70;

const NO_FDS: &[OwnedFd] = &[];

struct Inside;

impl Workload for Inside {
    fn prepare(&self, spec: &SandboxSpec, artifact: OwnedFd) -> nix::Result<Box<dyn Task>> {
        Ok(match spec.kind {
            Kind::Native => Box::new(Native { path: format!("/bin/{}", spec.program) }),
            Kind::Compile => Box::new(Compile { source: artifact.into() }),
            Kind::Wasm => {
                let loaded = wasm::load(File::from(artifact), size(spec.limits.stack_bytes)?, Path::new(PROC));
                Box::new(Wasm { loaded: loaded.map_err(|_| Errno::ENOEXEC)?, memory_bytes: 0 })
            }
        })
    }
}

fn size(bytes: u64) -> nix::Result<usize> {
    usize::try_from(bytes).map_err(|_| Errno::EOVERFLOW)
}

/// A program in the sandbox's root, at `path`.
struct Native {
    path: String,
}

impl Task for Native {
    fn settle(&mut self, _: &SandboxSpec) -> nix::Result<()> {
        Ok(())
    }

    fn run(self: Box<Self>, job: Job) -> i32 {
        let Job { payload, channel, started } = job;
        let invocation = match invocation(&payload) {
            Ok(invocation) => invocation,
            Err(report) => return tell(&channel, &report),
        };
        started.signal();
        // an exec that succeeds closes the channel without a word
        let error = native::exec(&self.path, &invocation);
        tell(&channel, &Report::NotRunnable(format!("exec: {error}")))
    }
}

struct Wasm {
    loaded: wasm::Loaded,
    memory_bytes: usize,
}

impl Task for Wasm {
    fn settle(&mut self, spec: &SandboxSpec) -> nix::Result<()> {
        self.memory_bytes = size(spec.limits.memory_bytes)?;
        self.loaded.settle().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32)))
    }

    fn rehearse(&mut self) {
        // should it fail, the run fails in the same way, and says so
        let _ = self.loaded.rehearse();
        self.loaded.instantiate_ahead(self.memory_bytes);
    }

    fn run(self: Box<Self>, job: Job) -> i32 {
        let Job { payload, channel, started } = job;
        // not taken apart in the end: that would touch what the zygote has made page by page, and the process ends
        let mut this = ManuallyDrop::new(self);
        let report = match invocation(&payload) {
            Ok(invocation) => {
                let memory_bytes = this.memory_bytes;
                this.loaded.run(&invocation, memory_bytes, || started.signal())
            }
            Err(report) => report,
        };
        tell(&channel, &report)
    }
}

struct Compile {
    source: File,
}

impl Task for Compile {
    fn settle(&mut self, _: &SandboxSpec) -> nix::Result<()> {
        Ok(())
    }

    fn run(self: Box<Self>, job: Job) -> i32 {
        job.started.signal();
        tell(&job.channel, &wasm::compile(self.source))
    }
}

fn invocation(payload: &[u8]) -> Result<Invocation, Report> {
    postcard::from_bytes(payload).map_err(|error| Report::NotRunnable(short(format!("the job's message: {error}"))))
}

/// Reports to the server. Gives the exit code to end with.
fn tell(channel: &Packets, report: &Report) -> i32 {
    let ran = matches!(report, Report::Wasm { .. } | Report::Compiled { .. } | Report::Invalid(_));
    match channel.send(report, NO_FDS) {
        Ok(()) if ran => 0,
        _ => NO_RUN,
    }
}
