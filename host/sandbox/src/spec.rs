//! The whole of a sandbox as data, checked before the first system call.

use serde::{Deserialize, Serialize};

use crate::limits::{Ceiling, LimitError, Limits};
use crate::name::Name;

/// What kind of code a sandbox runs; every layer that differs between them differs by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A tenant's ELF program, beneath a minimal init.
    Native,
    /// Holm's own Wasm runtime with a tenant's compiled module in it.
    Wasm,
    /// Holm's own compiler with a tenant's bytes in it.
    Compile,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Native, Self::Wasm, Self::Compile];

    /// Whether sandboxes of this kind are cloned from a zygote, a process that has loaded the artifact. A program is
    /// loaded by its own `execve`, and a compiler runs once for each artifact.
    #[must_use]
    pub const fn has_zygote(self) -> bool {
        matches!(self, Self::Wasm)
    }

    /// Processes of the host's own in a sandbox of this kind, which the job's `pids` does not count.
    #[must_use]
    pub const fn own_pids(self) -> u32 {
        match self {
            Self::Native => 1, // the init
            Self::Wasm | Self::Compile => 0,
        }
    }
}

/// Which artifact it is, among its tenant's: the digest of its content, say. Sandboxes of the same one may have it loaded
/// once for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ArtifactId(pub [u8; 32]);

/// One sandbox: whose it is, what it runs, what it may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// The tenant, whose cgroup and uid range the sandbox is under.
    pub tenant: Name,
    /// The ceiling over all of the tenant's sandboxes.
    pub ceiling: Ceiling,
    /// What runs.
    pub kind: Kind,
    /// The program's name: a native program is `/bin/<name>` inside.
    pub program: Name,
    /// What comes with the launch as its artifact.
    pub artifact: ArtifactId,
    /// Its network namespace must be one that no sandbox has had before. Else it may be one of another sandbox of this
    /// tenant's that is dead and has left nothing in it.
    pub fresh_network: bool,
    /// What it may use.
    pub limits: Limits,
}

impl SandboxSpec {
    /// Checks what the types do not already say.
    ///
    /// # Errors
    /// The first limit that is out of its range.
    pub fn check(&self) -> Result<(), LimitError> {
        self.limits.check()?;
        self.ceiling.check()
    }
}

/// The number by which server and launcher speak of one sandbox. Chosen by the server, never reused by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SandboxId(pub u64);

/// The number of inside uids and gids that each job has, from 0 up, mapped to host ids that no other live job has.
pub const IDS_PER_JOB: u32 = 100;

/// The inside uid and gid that tenant code runs as. Not 0: the files of its root belong to 0, so that even a
/// writable mount of them would not be the job's to change.
pub const JOB_ID: u32 = 1;
