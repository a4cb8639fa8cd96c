//! The server's side of the launcher's socket, blocking.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::time::Duration;

use holm_sandbox::launcher::spawn;
use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::protocol::{FromLauncher, LauncherConfig, ToLauncher, VERSION};
use holm_sandbox::spec::{Kind, SandboxId, SandboxSpec};
use holm_sandbox::usage::{Isolation, SandboxReport};
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::JobMessage;

use crate::LAUNCHER;

const NO_FDS: &[OwnedFd] = &[];

pub struct Client {
    pub socket: Packets,
    pub child: Child,
    next: u64,
    pub lock_dir: tempfile::TempDir,
}

pub struct Run {
    pub isolation: Isolation,
    pub stdout: String,
    pub report: SandboxReport,
}

pub fn limits() -> Limits {
    Limits {
        memory_bytes: 64 << 20,
        cpu_millicores: 1000,
        cpu_weight: 100,
        cpu_time: Duration::from_secs(10),
        wall_time: Duration::from_secs(10),
        pids: 16,
        scratch_bytes: 1 << 20,
        scratch_inodes: 64,
        open_files: 64,
        stack_bytes: 1 << 20,
    }
}

pub fn spec(tenant: &str, kind: Kind) -> SandboxSpec {
    SandboxSpec {
        tenant: tenant.parse().unwrap(),
        ceiling: Ceiling::default(),
        kind,
        program: "action".parse().unwrap(),
        limits: limits(),
    }
}

impl Client {
    pub fn start() -> Self {
        let lock_dir = tempfile::tempdir().unwrap();
        let (socket, child) = spawn(LAUNCHER).unwrap();
        let instance = format!("test-{}", child.id()).parse().unwrap();
        let config = LauncherConfig { version: VERSION, instance, lock_dir: lock_dir.path().to_owned() };
        socket.send(&ToLauncher::Configure(config), NO_FDS).unwrap();
        let client = Self { socket, child, next: 1, lock_dir };
        match client.recv() {
            FromLauncher::Up { .. } => client,
            other => panic!("{other:?}"),
        }
    }

    pub fn recv(&self) -> FromLauncher {
        self.socket.recv(|_| 0).unwrap().value
    }

    pub fn launch(&mut self, spec: SandboxSpec) -> (SandboxId, Packets) {
        let id = SandboxId(self.next);
        self.next += 1;
        let (ours, theirs) = Packets::pair().unwrap();
        let artifact = File::open("/proc/self/exe").unwrap();
        self.socket.send(&ToLauncher::Launch { id, spec }, &[OwnedFd::from(theirs), artifact.into()]).unwrap();
        (id, ours)
    }

    pub fn run(&mut self, spec: SandboxSpec, action: &str) -> Run {
        let (id, channel) = self.launch(spec);
        let isolation = match self.recv() {
            FromLauncher::Ready { isolation, .. } => *isolation,
            other => panic!("{other:?}"),
        };
        let (stdin, to_stdin) = std::io::pipe().unwrap();
        let (mut from_stdout, stdout) = std::io::pipe().unwrap();
        let stderr = stdout.try_clone().unwrap();
        let fds: [OwnedFd; 3] = [stdin.into(), stdout.into(), stderr.into()];
        channel.send(&JobMessage { payload: action.as_bytes().to_vec() }, &fds).unwrap();
        drop((fds, to_stdin));
        assert_eq!(self.recv(), FromLauncher::Started(id));
        let mut output = String::new();
        from_stdout.read_to_string(&mut output).unwrap();
        match self.recv() {
            FromLauncher::Ended { report, .. } => Run { isolation, stdout: output, report },
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = std::io::stderr().flush();
        let (closed, _) = Packets::pair().unwrap();
        self.socket = closed;
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}
