//! What a sandbox used and how it ended, as the kernel tells it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Measured usage of one sandbox, read from its cgroup after its last process died. A figure that the kernel does
/// not offer is `None`, never 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// From the start of tenant code to its end.
    pub wall_us: u64,
    /// CPU time in user mode, dead grandchildren included.
    pub cpu_user_us: Option<u64>,
    /// CPU time in the kernel, dead grandchildren included.
    pub cpu_system_us: Option<u64>,
    /// Time during which the job was ready to run but held back by its CPU quota.
    pub cpu_throttled_us: Option<u64>,
    /// The most memory used at once.
    pub memory_peak_bytes: Option<u64>,
    /// The most processes and threads at once, the host's own init not counted.
    pub pids_peak: Option<u64>,
    /// Processes that the kernel's OOM killer killed in the job's own cgroup.
    pub oom_kills: u64,
}

/// How the job's main process ended, from `waitid(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It called `exit` with this code.
    Exited(i32),
    /// It was ended by this signal.
    Signaled(i32),
}

/// Why a sandbox was killed. The first cause stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KillCause {
    /// The server asked for it.
    Requested,
    /// `wall_time` was over.
    WallTime,
    /// `cpu_time` was used up.
    CpuTime,
    /// The OOM killer took a process of the job, so the whole job goes.
    Memory,
    /// Not by the launcher: by somebody on the host, or because the host itself was out of memory.
    Outside,
}

/// The whole end of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxReport {
    /// How the main process ended.
    pub exit: Exit,
    /// Why it was killed, if the launcher did it.
    pub killed: Option<KillCause>,
    /// Whether tenant code had started.
    pub started: bool,
    /// What it used.
    pub usage: Usage,
}

/// The inode numbers of a process's namespaces: equal numbers, same namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// User namespace.
    pub user: u64,
    /// PID namespace.
    pub pid: u64,
    /// Mount namespace.
    pub mnt: u64,
    /// Host name namespace.
    pub uts: u64,
    /// System V and POSIX IPC namespace.
    pub ipc: u64,
    /// Network namespace.
    pub net: u64,
    /// Cgroup namespace.
    pub cgroup: u64,
}

impl Namespaces {
    /// The numbers with the names under which `/proc/PID/ns` has them.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("user", self.user),
            ("pid", self.pid),
            ("mnt", self.mnt),
            ("uts", self.uts),
            ("ipc", self.ipc),
            ("net", self.net),
            ("cgroup", self.cgroup),
        ]
    }
}

/// The layers around a sandbox, read from the kernel when it was ready and before it got its job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Isolation {
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Its network namespace has served other sandboxes of the same tenant before, each of which had died and left
    /// nothing in it. Else it is new.
    pub recycled_network: bool,
    /// `Seccomp:` of `/proc/PID/status`: 2 is filter mode.
    pub seccomp: u8,
    /// Number of seccomp filters.
    pub seccomp_filters: u32,
    /// `NoNewPrivs:` of `/proc/PID/status`.
    pub no_new_privs: bool,
    /// The five capability sets, bounding set included, or-ed together.
    pub capabilities: u64,
    /// Whether an open that only Landlock forbids was refused.
    pub landlock: bool,
    /// `/proc/PID/uid_map`, one space between the numbers.
    pub uid_map: String,
    /// The cgroup of each controller, as a path below the hierarchy's root; `unified` is the v2 hierarchy.
    pub cgroups: BTreeMap<String, String>,
}
