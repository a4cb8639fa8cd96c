//! Drives a launcher, `holm`'s own, as the server does, without HTTP.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holm::inside::LAUNCHER;
use holm_runtime::invocation::Invocation;
use holm_sandbox::ceiling::CeilingError;
use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::probe::wait_up;
use holm_sandbox::protocol::{FromLauncher, LauncherConfig, ToLauncher, VERSION};
use holm_sandbox::spec::{ArtifactId, Kind, SandboxId, SandboxSpec};
use holm_sandbox::uids::LOCK_DIR;
use holm_sandbox::usage::Exit;
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::JobMessage;

const NO_FDS: &[OwnedFd] = &[];

pub struct Launches {
    launcher: Packets,
    child: Child,
    next: u64,
}

/// How long one sandbox took, from the message that asks for it.
pub struct Took {
    /// Until tenant code ran.
    pub launch: Duration,
    /// Until all of it was dead, and told.
    pub cycle: Duration,
}

impl Launches {
    /// Starts a launcher that other benches' are told from by `name`.
    pub fn start(name: &str) -> Self {
        let (launcher, theirs) = Packets::pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_holm"));
        command.arg0(LAUNCHER).env_clear().current_dir("/");
        let child = command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).spawn().unwrap();
        let config = LauncherConfig {
            version: VERSION,
            instance: format!("bench-{name}-{}", std::process::id()).parse().unwrap(),
            lock_dir: LOCK_DIR.into(),
            ahead: true,
            zygotes: 16,
            zygote_idle: Duration::from_secs(10),
            memory_reserve: 1,
            preferred: false,
        };
        launcher.send(&ToLauncher::Configure(config), NO_FDS).unwrap();
        wait_up(&launcher).unwrap();
        Self { launcher, child, next: 1 }
    }

    pub fn end(self) {
        let Self { launcher, mut child, .. } = self;
        drop(launcher);
        assert!(child.wait().unwrap().success());
    }

    fn recv(&self) -> FromLauncher {
        self.launcher.recv(|_: &FromLauncher| 0).unwrap().value
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// One sandbox of a tenant's, with an empty job. Its output goes to `output`.
    pub fn run(&mut self, tenant: &str, kind: Kind, artifact: &File, output: Option<&File>) -> Took {
        let id = SandboxId(self.number());
        let spec = spec(tenant, kind);
        let (channel, theirs) = Packets::pair().unwrap();
        let fds = [OwnedFd::from(theirs), artifact.try_clone().unwrap().into()];
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let stdio = [null(), output.map_or_else(null, |file| file.try_clone().unwrap()), null()];
        let invocation = Invocation { args: vec!["bench".into()], fuel: 1 << 40, ..Invocation::default() };
        let message = JobMessage { payload: postcard::to_stdvec(&invocation).unwrap() };
        let begun = Instant::now();
        self.launcher.send(&ToLauncher::Launch { id, spec }, &fds).unwrap();
        drop(fds);
        // as the server does, before it is ready
        channel.send(&message, &stdio).unwrap();
        let FromLauncher::Ready { .. } = self.recv() else { panic!("the sandbox did not become ready") };
        assert_eq!(self.recv(), FromLauncher::Started(id));
        let launch = begun.elapsed();
        match self.recv() {
            FromLauncher::Ended { report, .. } => assert_eq!(report.exit, Exit::Exited(0)),
            other => panic!("{other:?}"),
        }
        Took { launch, cycle: begun.elapsed() }
    }

    /// A module's compiled form, made as the server makes it.
    pub fn compile(&mut self, text: &str) -> File {
        let mut compiled = file(b"");
        self.run("bench", Kind::Compile, &file(text.as_bytes()), Some(&compiled));
        compiled.rewind().unwrap();
        let mut bytes = Vec::new();
        compiled.read_to_end(&mut bytes).unwrap();
        assert!(bytes.starts_with(b"\x7fELF"), "nothing was compiled");
        compiled
    }

    /// Sets the ceiling of a tenant.
    pub fn set_ceiling(&mut self, tenant: &str, ceiling: Ceiling) -> Result<(), CeilingError> {
        let (request, tenant) = (self.number(), tenant.parse().unwrap());
        self.launcher.send(&ToLauncher::SetCeiling { request, tenant, ceiling }, NO_FDS).unwrap();
        match self.recv() {
            FromLauncher::CeilingSet { result, .. } => result,
            other => panic!("{other:?}"),
        }
    }
}

/// An unnamed file with this content.
pub fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

fn spec(tenant: &str, kind: Kind) -> SandboxSpec {
    let minute = Duration::from_secs(60);
    SandboxSpec {
        tenant: tenant.parse().unwrap(),
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
