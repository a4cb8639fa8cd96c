//! The server's side of the launcher's socket, blocking, with a bound on every wait.

use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use holm_sandbox::LaunchError;
use holm_sandbox::ceiling::CeilingError;
use holm_sandbox::launcher::spawn;
use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::name::Name;
use holm_sandbox::protocol::{FromLauncher, LauncherConfig, ToLauncher, VERSION};
use holm_sandbox::spec::{ArtifactId, Kind, SandboxId, SandboxSpec};
use holm_sandbox::usage::{Isolation, SandboxReport};
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::JobMessage;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tempfile::TempDir;

use crate::LAUNCHER;
use crate::faults::{self, Fault, Supervisor};
use crate::left::{Held, Instance};
use crate::slowness::at_most;

/// The longest that a launcher may be silent: longer than a sandbox may take to become ready.
const PATIENCE: Duration = Duration::from_secs(15);

/// The launcher's promise for its own end.
const END_WITHIN: Duration = Duration::from_secs(2);

pub(crate) const NO_FDS: &[OwnedFd] = &[];

/// A launcher and the server's end of its socket.
pub(crate) struct Client {
    /// `None` once closed.
    pub(crate) socket: Option<Packets>,
    pub(crate) child: Child,
    pub(crate) instance: Instance,
    next: u64,
    supervisor: Option<Supervisor>,
    /// Where instances agree about uids: one for each test.
    lock_dir: TempDir,
}

/// A sandbox that has been asked for.
pub(crate) struct Launched {
    pub(crate) id: SandboxId,
    pub(crate) channel: Packets,
}

/// A job that went as it should.
pub(crate) struct Run {
    pub(crate) isolation: Isolation,
    pub(crate) stdout: String,
    pub(crate) report: SandboxReport,
}

pub(crate) fn limits() -> Limits {
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

pub(crate) fn spec(kind: Kind) -> SandboxSpec {
    SandboxSpec {
        tenant: "acme".parse().unwrap(),
        ceiling: Ceiling::default(),
        kind,
        program: "action".parse().unwrap(),
        artifact: ArtifactId([7; 32]),
        fresh_network: false,
        limits: limits(),
    }
}

/// What every launcher is configured with.
pub(crate) fn config(instance: Name, lock_dir: &Path) -> LauncherConfig {
    let zygote_idle = Duration::from_secs(60);
    LauncherConfig {
        version: VERSION,
        instance,
        lock_dir: lock_dir.to_owned(),
        ahead: false,
        preferred: false,
        zygotes: 4,
        zygote_idle,
        memory_reserve: 1,
    }
}

impl Client {
    pub(crate) fn start() -> Self {
        Self::start_under(&[])
    }

    /// Starts a launcher whose calls `faults` can be armed for later.
    pub(crate) fn start_under(faults: &[Fault]) -> Self {
        let client = Self::spawn(faults, tempfile::tempdir().unwrap(), None);
        client.configure(VERSION).unwrap();
        client
    }

    /// Starts a launcher, with `faults` in force at once, and gives what it says is missing.
    pub(crate) fn start_in_vain(faults: &[Fault]) -> Vec<String> {
        let client = Self::spawn(faults, tempfile::tempdir().unwrap(), None);
        client.arm(faults);
        let problems = client.configure(VERSION).unwrap_err();
        client.disarm();
        client.must_have_refused();
        problems
    }

    /// Speaks another version of the protocol.
    pub(crate) fn start_with_version(version: u32) -> Result<(), Vec<String>> {
        let client = Self::spawn(&[], tempfile::tempdir().unwrap(), None);
        let up = client.configure(version);
        client.must_have_refused();
        up
    }

    fn must_have_refused(mut self) {
        let code = self.wait_for_end().code();
        assert_eq!(code, Some(71), "EX_OSERR");
        self.instance.assert_gone(self.lock_dir.path());
    }

    /// A new launcher of the same instance; the last one must be dead.
    pub(crate) fn start_again(mut self) -> Self {
        let lock_dir = std::mem::replace(&mut self.lock_dir, tempfile::tempdir().unwrap());
        let mut client = Self::spawn(&[], lock_dir, Some(self.instance.clone()));
        client.next = self.next;
        client.configure(VERSION).unwrap();
        client
    }

    fn spawn(faults: &[Fault], lock_dir: TempDir, instance: Option<Instance>) -> Self {
        let calls = faults::calls(faults);
        let (socket, child) =
            spawn(&format!("{LAUNCHER} {}", calls.iter().map(|c| format!("{c},")).collect::<String>()))
                .expect("start a launcher");
        let patience = TimeVal::seconds(at_most(PATIENCE).as_secs().cast_signed());
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience).unwrap();
        setsockopt(&socket, sockopt::SendTimeout, &patience).unwrap();
        let supervisor = (!calls.is_empty()).then(|| {
            let [listener] = <[OwnedFd; 1]>::try_from(socket.recv::<u8>(|_| 1).unwrap().fds).unwrap();
            Supervisor::start(listener, child.id())
        });
        let instance = instance.unwrap_or_else(|| Instance::new(&format!("test-{}", child.id())));
        Self { socket: Some(socket), child, instance, next: 1, supervisor, lock_dir }
    }

    fn configure(&self, version: u32) -> Result<(), Vec<String>> {
        let instance = self.instance.name.parse().unwrap();
        let config = LauncherConfig { version, ..config(instance, self.lock_dir.path()) };
        self.send(&ToLauncher::Configure(config));
        match self.recv() {
            FromLauncher::Up { .. } => Ok(()),
            FromLauncher::Unable(problems) => Err(problems),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn arm(&self, faults: &[Fault]) {
        if let Some(supervisor) = &self.supervisor {
            supervisor.arm(faults);
        }
    }

    /// How often armed faults have struck.
    pub(crate) fn struck(&self) -> u32 {
        self.supervisor.as_ref().map_or(0, Supervisor::hits)
    }

    /// Each fault must have struck: a test whose fault meets nothing shows nothing.
    pub(crate) fn disarm(&self) {
        let hits = self.supervisor.as_ref().map(Supervisor::disarm).unwrap_or_default();
        assert!(hits.iter().all(|hits| *hits > 0), "the faults struck {hits:?} times");
    }

    pub(crate) fn socket(&self) -> &Packets {
        self.socket.as_ref().unwrap()
    }

    pub(crate) fn send(&self, message: &ToLauncher) {
        self.socket().send(message, NO_FDS).unwrap();
    }

    /// Changes a tenant's ceiling, and gives the answer.
    pub(crate) fn set_ceiling(&mut self, tenant: Name, ceiling: Ceiling) -> Result<(), CeilingError> {
        self.next += 1;
        let asked = self.next;
        self.send(&ToLauncher::SetCeiling { request: asked, tenant, ceiling });
        match self.recv() {
            FromLauncher::CeilingSet { request, result } if request == asked => result,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn recv(&self) -> FromLauncher {
        self.socket().recv(|_| 0).unwrap().value
    }

    pub(crate) fn new_id(&mut self) -> SandboxId {
        self.next += 1;
        SandboxId(self.next - 1)
    }

    pub(crate) fn launch(&mut self, spec: SandboxSpec) -> Launched {
        let id = self.new_id();
        self.launch_as(id, spec)
    }

    pub(crate) fn launch_as(&self, id: SandboxId, spec: SandboxSpec) -> Launched {
        let (channel, theirs) = Packets::pair().unwrap();
        self.socket().send(&ToLauncher::Launch { id, spec }, &[theirs.into(), artifact()]).unwrap();
        Launched { id, channel }
    }

    /// Launches and waits until it is ready.
    pub(crate) fn park(&mut self, spec: SandboxSpec) -> (Launched, Isolation) {
        let launched = self.launch(spec);
        let isolation = self.ready(launched.id);
        (launched, isolation)
    }

    pub(crate) fn ready(&self, sandbox: SandboxId) -> Isolation {
        match self.recv() {
            FromLauncher::Ready { id, isolation } if id == sandbox => *isolation,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn refused(&self, sandbox: SandboxId) -> LaunchError {
        match self.recv() {
            FromLauncher::Refused { id, error } if id == sandbox => error,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn ended(&self, sandbox: SandboxId) -> SandboxReport {
        match self.recv() {
            FromLauncher::Ended { id, report } if id == sandbox => report,
            other => panic!("{other:?}"),
        }
    }

    /// Lets a ready sandbox do `action`.
    pub(crate) fn finish(&self, launched: &Launched, isolation: Isolation, action: &str) -> Run {
        let output = give(&launched.channel, action);
        assert_eq!(self.recv(), FromLauncher::Started(launched.id));
        let stdout = read(output);
        Run { isolation, stdout, report: self.ended(launched.id) }
    }

    pub(crate) fn run(&mut self, spec: SandboxSpec, action: &str) -> Run {
        let (launched, isolation) = self.park(spec);
        self.finish(&launched, isolation, action)
    }

    /// What the launcher holds once the sandboxes that have ended are cleared away.
    pub(crate) fn held(&self) -> Held {
        wait_until("the cgroups of ended sandboxes are removed", || self.instance.sandboxes().is_empty());
        // the last descriptors are closed right after
        let (mut last, mut held) = (None, Held::by(self.child.id()));
        while last.as_ref() != Some(&held) || held.is_letting_go() {
            std::thread::sleep(at_most(Duration::from_millis(2)));
            last = Some(std::mem::replace(&mut held, Held::by(self.child.id())));
        }
        held
    }

    /// The launcher holds what it did before.
    pub(crate) fn must_hold(&self, before: &Held) {
        let mut held = self.held();
        let begun = Instant::now();
        // an idle tenant goes after 2 s
        while held != *before && begun.elapsed() < at_most(Duration::from_secs(6)) {
            held = self.held();
        }
        assert_eq!(held, *before);
    }

    /// Takes the server away: the launcher must end in order and leave nothing.
    pub(crate) fn end(mut self) {
        self.socket = None;
        self.must_end();
    }

    /// The launcher must be ending, in order, and leave nothing.
    pub(crate) fn must_end(mut self) {
        let status = self.wait_for_end();
        assert!(status.success(), "{status}");
        self.instance.assert_gone(self.lock_dir.path());
    }

    fn wait_for_end(&mut self) -> std::process::ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < at_most(END_WITHIN), "the launcher has not ended within {END_WITHIN:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the dead launcher's sweeper has left nothing.
    pub(crate) fn must_be_swept(mut self) {
        self.child.wait().unwrap();
        wait_until("the sweeper is done", || self.instance.is_gone(self.lock_dir.path()));
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.socket = None;
        self.disarm_quietly();
        let _ = self.child.wait();
    }
}

impl Client {
    fn disarm_quietly(&self) {
        if let Some(supervisor) = &self.supervisor {
            supervisor.disarm();
        }
    }
}

/// Sends a job; gives the end of its output.
pub(crate) fn give(channel: &Packets, action: &str) -> PipeReader {
    let (output, sent) = send_job(channel, action);
    sent.unwrap();
    output
}

/// As [`give`], to a sandbox that may be gone.
pub(crate) fn offer(channel: &Packets, action: &str) -> PipeReader {
    send_job(channel, action).0
}

fn send_job(channel: &Packets, action: &str) -> (PipeReader, std::io::Result<()>) {
    let (stdin, _) = std::io::pipe().unwrap();
    let (output, stdout) = std::io::pipe().unwrap();
    let stderr = stdout.try_clone().unwrap();
    let fds: [OwnedFd; 3] = [stdin.into(), stdout.into(), stderr.into()];
    let sent = channel.send(&JobMessage { payload: action.as_bytes().to_vec() }, &fds);
    (output, sent)
}

pub(crate) fn read(mut output: PipeReader) -> String {
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    text
}

/// What the server hands over as what a job runs: a small regular file.
pub(crate) fn artifact() -> OwnedFd {
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(b"an artifact").unwrap();
    file.into()
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < at_most(Duration::from_secs(5)), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
