//! What server and launcher say to each other. The launcher is the privileged end: it checks every field it uses.

use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::ceiling::{Ceiling, CeilingError};
use crate::error::LaunchError;
use crate::limits::Limits;
use crate::name::Name;
use crate::spec::{SandboxId, SandboxSpec};
use crate::usage::{Isolation, ProcessInfo, SandboxReport, Stats};

/// The version of these messages; a launcher refuses a server that speaks another.
pub const VERSION: u32 = 1;

/// What a launcher must know before anything else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LauncherConfig {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// The instance's id, a [`Name`]: its cgroups are called `holm-<instance>`.
    pub instance: Name,
    /// The directory in which instances on this host agree about uids.
    pub lock_dir: PathBuf,
    /// Make what sandboxes need before they are asked for.
    pub ahead: bool,
    /// The most zygotes at once. At least 1.
    pub zygotes: usize,
    /// How long a zygote without a sandbox is kept.
    pub zygote_idle: Duration,
    /// Bytes of the host's memory that should be available. When there are less, idle zygotes are ended.
    pub memory_reserve: u64,
    /// Give the sender and the launcher CPU time before all jobs.
    pub preferred: bool,
}

/// From the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLauncher {
    /// The first message.
    Configure(LauncherConfig),
    /// Make a sandbox. Brings two descriptors: the sandbox's end of its channel, and the artifact.
    Launch {
        /// Its id from now on.
        id: SandboxId,
        /// Everything about it.
        spec: SandboxSpec,
    },
    /// Kill a sandbox. Unknown ids are ignored: it may just have ended.
    Kill(SandboxId),
    /// Change the ceiling of a tenant, now and for every launch from now on, whatever that brings along. Answered by
    /// [`FromLauncher::CeilingSet`].
    SetCeiling {
        /// The number that the answer has. Chosen by the server.
        request: u64,
        /// The tenant.
        tenant: Name,
        /// Its new ceiling.
        ceiling: Ceiling,
    },
    /// A tenant is deleted: forget the ceiling that has been set for it, and that it was frozen, and end what its
    /// sandboxes are cloned from.
    ForgetTenant(Name),
    /// A program of a tenant's is deleted: end what its sandboxes are cloned from.
    ForgetProgram {
        /// Whose.
        tenant: Name,
        /// Which.
        program: Name,
    },
    /// Do something with a sandbox that lives. Answered by [`FromLauncher::Answer`].
    Order {
        /// The number that the answer has. Chosen by the server.
        request: u64,
        /// Which sandbox.
        id: SandboxId,
        /// What to do.
        order: Order,
    },
    /// Freeze or thaw everything of a tenant, what is still to come included. Answered by [`FromLauncher::Answer`].
    FreezeTenant {
        /// The number that the answer has.
        request: u64,
        /// The tenant. It need not have a sandbox now.
        tenant: Name,
        /// Or thaw it.
        frozen: bool,
    },
}

/// What can be done with a sandbox that lives. An answer that all is done comes when it is, by the kernel's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Let nothing of it run, and stop its wall clock. No effect on one that is frozen.
    Freeze,
    /// Let it go on, unless its tenant is frozen. No effect on one that is not frozen.
    Thaw,
    /// Change its limits, those that can be changed while it runs; see [`Limits::changed_at_start_only`].
    Limit(Limits),
    /// Tell what it uses.
    Measure,
    /// Tell its processes.
    List,
}

/// What has become of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// The limits hold, and the sandbox ends because it has passed one of them.
    Ending,
    /// What it uses.
    Stats(Box<Stats>),
    /// Some of its processes; more are told in another answer to the same request, until `last`.
    Processes {
        /// At most [`PROCESSES_AT_ONCE`].
        some: Vec<ProcessInfo>,
        /// No more follow.
        last: bool,
    },
}

/// Processes in one [`Answer::Processes`]: reading what the kernel knows of one takes some 70 µs, in which the launcher
/// does nothing else.
pub const PROCESSES_AT_ONCE: usize = 16;

/// Why an order was not obeyed. Everything is as it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum OrderError {
    /// The sandbox has ended, or is ending.
    #[error("the sandbox has ended")]
    Ended,
    /// Some task could not be frozen in time, as it is in a system call that nothing interrupts.
    #[error("a process did not stop in time")]
    NotFrozen,
    /// Another order for the same has come in the meantime.
    #[error("another order came in between")]
    Overtaken,
    /// A limit that cannot be had: out of range, or not to be changed while the sandbox runs.
    #[error("the limit `{0}` cannot be changed to that")]
    Limit(String),
    /// The kernel refused.
    #[error("`{what}` was refused by the kernel: {}", Errno::from_raw(*errno).desc())]
    Refused {
        /// What was to be written.
        what: String,
        /// The kernel's reason.
        errno: i32,
    },
}

impl ToLauncher {
    /// The number of descriptors that belong to the message.
    #[must_use]
    pub fn fds(&self) -> usize {
        match self {
            Self::Launch { .. } => 2,
            Self::Configure(_)
            | Self::Kill(_)
            | Self::SetCeiling { .. }
            | Self::ForgetTenant(_)
            | Self::ForgetProgram { .. }
            | Self::Order { .. }
            | Self::FreezeTenant { .. } => 0,
        }
    }
}

/// From the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromLauncher {
    /// Configured: sandboxes can be launched.
    Up {
        /// "v1", "v2" or "hybrid".
        cgroup_version: String,
    },
    /// This process cannot be a launcher; it ends. One sentence for each thing missing.
    Unable(Vec<String>),
    /// The sandbox is confined and waits for its job on its channel.
    Ready {
        /// Which one.
        id: SandboxId,
        /// The layers around it, read from the kernel.
        isolation: Box<Isolation>,
    },
    /// The sandbox could not be made; nothing ran and nothing is left of it.
    Refused {
        /// Which one.
        id: SandboxId,
        /// Why.
        error: LaunchError,
    },
    /// A ceiling holds, or cannot: then everything is as it was before.
    CeilingSet {
        /// The request that this answers.
        request: u64,
        /// Why it cannot.
        result: Result<(), CeilingError>,
    },
    /// Tenant code has started.
    Started(SandboxId),
    /// Every process of the sandbox is dead.
    Ended {
        /// Which one.
        id: SandboxId,
        /// How it ended and what it used.
        report: SandboxReport,
    },
    /// The host has less memory than should be available. Told again as long as it is so and something lives.
    MemoryShort,
    /// What has become of an order.
    Answer {
        /// The request that this answers.
        request: u64,
        /// Why it was not obeyed.
        result: Result<Answer, OrderError>,
    },
}
