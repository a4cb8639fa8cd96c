//! What a sandbox costs: up, an empty program, gone; against the raw floor in the same run.
//!
//! The bench is its own launcher, as `holm` is, and drives it as the server does, without HTTP.

#![allow(clippy::unwrap_used)] // a measurement that cannot go on should say where

mod support;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::time::Duration;

use holm::inside::{LAUNCHER, launcher_main};
use holm_runtime::invocation::Invocation;
use holm_sandbox::launcher::spawn;
use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::probe::wait_up;
use holm_sandbox::protocol::{FromLauncher, LauncherConfig, ToLauncher, VERSION};
use holm_sandbox::spec::{ArtifactId, Kind, SandboxId, SandboxSpec};
use holm_sandbox::uids::LOCK_DIR;
use holm_sandbox::usage::Exit;
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::JobMessage;
use support::{EMPTY_MODULE, Side, clone_exit_wait, empty_program, interleave, print_table};

fn main() {
    if std::env::args().next().as_deref() == Some(LAUNCHER) {
        std::process::exit(launcher_main());
    }
    let mut bench = Bench::start();
    let program = file(&empty_program());
    let module = bench.compile(EMPTY_MODULE);
    let bench = std::cell::RefCell::new(bench);
    let times = interleave(vec![
        Side { name: "floor: clone3(7 namespaces) + exit + wait", run: Box::new(clone_exit_wait) },
        Side { name: "native, cold", run: Box::new(|| bench.borrow_mut().run(Kind::Native, &program, None)) },
        Side { name: "wasm, cold", run: Box::new(|| bench.borrow_mut().run(Kind::Wasm, &module, None)) },
    ]);
    print_table("Launch: sandbox up, empty program, gone", &times);
    bench.into_inner().end();
}

struct Bench {
    launcher: Packets,
    child: Child,
    next: u64,
}

impl Bench {
    fn start() -> Self {
        let (launcher, child) = spawn(LAUNCHER).unwrap();
        let instance = format!("bench-{}", std::process::id()).parse().unwrap();
        let zygote_idle = Duration::from_secs(10);
        let config = LauncherConfig {
            version: VERSION,
            instance,
            lock_dir: LOCK_DIR.into(),
            ahead: true,
            zygotes: 16,
            zygote_idle,
            memory_reserve: 1,
            preferred: false,
        };
        launcher.send(&ToLauncher::Configure(config), &[] as &[OwnedFd]).unwrap();
        wait_up(&launcher).unwrap();
        Self { launcher, child, next: 1 }
    }

    fn end(self) {
        let Self { launcher, mut child, .. } = self;
        drop(launcher);
        assert!(child.wait().unwrap().success());
    }

    fn recv(&self) -> FromLauncher {
        self.launcher.recv(|_: &FromLauncher| 0).unwrap().value
    }

    /// One sandbox from the request to its report; its output goes to `output`.
    fn run(&mut self, kind: Kind, artifact: &File, output: Option<&File>) {
        let id = SandboxId(self.next);
        self.next += 1;
        let (channel, theirs) = Packets::pair().unwrap();
        let fds = [OwnedFd::from(theirs), artifact.try_clone().unwrap().into()];
        self.launcher.send(&ToLauncher::Launch { id, spec: spec(kind) }, &fds).unwrap();
        drop(fds);
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let output = output.map_or_else(null, |file| file.try_clone().unwrap());
        let invocation = Invocation { args: vec!["bench".into()], fuel: 1 << 40, ..Invocation::default() };
        let message = JobMessage { payload: postcard::to_stdvec(&invocation).unwrap() };
        // as the server does, before it is ready
        channel.send(&message, &[null(), output, null()]).unwrap();
        let FromLauncher::Ready { .. } = self.recv() else { panic!("the sandbox did not become ready") };
        assert_eq!(self.recv(), FromLauncher::Started(id));
        match self.recv() {
            FromLauncher::Ended { report, .. } => assert_eq!(report.exit, Exit::Exited(0)),
            other => panic!("{other:?}"),
        }
    }

    /// A module's compiled form, made as the server makes it.
    fn compile(&mut self, text: &str) -> File {
        let mut compiled = file(b"");
        self.run(Kind::Compile, &file(text.as_bytes()), Some(&compiled));
        compiled.rewind().unwrap();
        let mut bytes = Vec::new();
        compiled.read_to_end(&mut bytes).unwrap();
        assert!(bytes.starts_with(b"\x7fELF"), "nothing was compiled");
        compiled
    }
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

fn spec(kind: Kind) -> SandboxSpec {
    let minute = Duration::from_secs(60);
    SandboxSpec {
        tenant: "bench".parse().unwrap(),
        ceiling: Ceiling::default(),
        kind,
        program: "bench".parse().unwrap(),
        artifact: ArtifactId([0; 32]),
        fresh_network: false,
        limits: Limits {
            memory_bytes: 128 << 20,
            cpu_millicores: 2000,
            cpu_weight: 100,
            cpu_time: minute,
            wall_time: minute,
            pids: 64,
            scratch_bytes: 16 << 20,
            scratch_inodes: 1024,
            open_files: 256,
            stack_bytes: 1 << 20,
        },
    }
}
