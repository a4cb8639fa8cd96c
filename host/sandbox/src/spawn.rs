//! What a launcher and its zygotes say to each other.
//!
//! ```text
//! launcher                                   zygote
//!   attached to its cgroup
//!   Begin ──────────────────────────────────▶ namespaces entered, root built, confined, artifact loaded
//!                       Loaded or Failed ◀───
//!   Spawn ──────────────────────────────────▶ clones a sandbox, writes its maps
//!                    Spawned or Refused ◀────  with its pidfd
//!   …attaches it, opens its gate (see `gate`)
//!   Buried ─────────────────────────────────▶ its network namespace may serve another
//! ```
//!
//! No tenant instruction runs in a zygote; but it has mapped what was compiled of a tenant's bytes, so the launcher
//! believes nothing that it says before it has looked for itself.

use serde::{Deserialize, Serialize};

use crate::error::LaunchError;
use crate::limits::Limits;
use crate::spec::SandboxId;

/// Longer than any message of the launcher's, in bytes.
pub(crate) const MAX_LAUNCHER_MESSAGE: usize = 512;

/// Longer than any of a zygote's.
pub(crate) const MAX_ZYGOTE_MESSAGE: usize = 128;

/// From the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToZygote {
    /// It is in its cgroup: go on.
    Begin,
    /// Clone a sandbox. Brings two descriptors: the sandbox's ends of its gate and of its channel.
    Spawn {
        /// Its id.
        id: SandboxId,
        /// What it may use.
        limits: Limits,
        /// The first of its ids, as the zygote's user namespace calls it.
        first_id: u32,
        /// Its network namespace must be one that no sandbox has had before.
        fresh_network: bool,
    },
    /// A sandbox and all of its processes are dead.
    Buried(SandboxId),
}

impl ToZygote {
    /// The number of descriptors that belong to the message.
    pub(crate) fn fds(&self) -> usize {
        match self {
            Self::Spawn { .. } => 2,
            Self::Begin | Self::Buried(_) => 0,
        }
    }
}

/// From a zygote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromZygote {
    /// Confined and loaded.
    Loaded,
    /// A step failed; the zygote is ending.
    Failed(LaunchError),
    /// A sandbox waits at its gate. Brings its pidfd.
    Spawned {
        /// Which one.
        id: SandboxId,
        /// Its network namespace has been another sandbox's before.
        used_network: bool,
        /// Whether its maps could be written.
        mapped: Result<(), LaunchError>,
    },
    /// A sandbox could not be cloned, and nothing is left of it.
    Refused {
        /// Which one.
        id: SandboxId,
        /// Why.
        error: LaunchError,
    },
}

impl FromZygote {
    /// The number of descriptors that belong to the message.
    pub(crate) fn fds(&self) -> usize {
        match self {
            Self::Spawned { .. } => 1,
            Self::Loaded | Self::Failed(_) | Self::Refused { .. } => 0,
        }
    }
}
