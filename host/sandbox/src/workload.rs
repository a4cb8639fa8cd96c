//! The seam to what runs inside: this crate knows how to confine a process, not what a module or an ELF file is.

use std::fmt;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::gate::{FromSandbox, SandboxGate};
use crate::spec::SandboxSpec;
use crate::wire::Packets;

/// Where a zygote has a `/proc` while it loads an artifact: it is the working directory, and mounted nowhere.
pub const PROC: &str = ".";

/// What a sandbox can run. Lives in the launcher; its methods run in the sandbox, or in the zygote that it is cloned from.
pub trait Workload {
    /// Loads the artifact. The process is confined, one that is not native but for the last filter; no instruction of the
    /// tenant's may run. Of `spec`, only what all sandboxes of one zygote have in common may be looked at where there is
    /// one: kind, program, artifact and `stack_bytes`. There, `/proc` is at [`PROC`].
    ///
    /// # Errors
    /// Any errno: the launch is refused with [`crate::Step::Prepare`].
    fn prepare(&self, spec: &SandboxSpec, artifact: OwnedFd) -> nix::Result<Box<dyn Task>>;
}

/// A loaded artifact, waiting for its job.
pub trait Task {
    /// Makes what no two sandboxes may share, in the sandbox itself: whatever has a descriptor, above all. The last
    /// filter is not on yet.
    ///
    /// # Errors
    /// Any errno: the launch is refused with [`crate::Step::Prepare`].
    fn settle(&mut self, spec: &SandboxSpec) -> nix::Result<()>;

    /// Does in advance what a run will do, while there is no job yet, in a sandbox that has been read back and admitted.
    /// Nothing has to be done. No clock runs: of the tenant's, only what is sure to end in a moment may run.
    fn rehearse(&mut self) {}

    /// Runs the job; gives the process's exit code. Must call [`Started::signal`] right before tenant code.
    fn run(self: Box<Self>, job: Job) -> i32;
}

/// The message with which the server gives a ready sandbox its job, together with stdin, stdout and stderr.
#[derive(Debug, Serialize, Deserialize)]
pub struct JobMessage {
    /// For the workload; opaque here.
    pub payload: Vec<u8>,
}

/// A job as it has arrived. Its standard streams are in place as descriptors 0, 1 and 2.
#[derive(Debug)]
pub struct Job {
    /// For the workload.
    pub payload: Vec<u8>,
    /// To the server, for a report. Close-on-exec.
    pub channel: Packets,
    /// To be signalled right before tenant code starts.
    pub started: Started,
}

/// The right to say once that tenant code starts.
pub struct Started(pub(crate) SandboxGate);

impl Started {
    /// Tells the launcher to start the clocks, and gives up the gate.
    ///
    /// A launcher that is gone has ended this process already or is about to, so there is no error to handle.
    pub fn signal(self) {
        let _ = self.0.tell(FromSandbox::Started);
    }
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Started")
    }
}
