//! What a sandbox used and how it ended, as the kernel tells it.

use serde::{Deserialize, Serialize};

use crate::paths::CgroupPaths;

/// Measured usage of one sandbox, read from its cgroup after its last process died. A figure that the kernel does
/// not offer is `None`, never 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// From the start of tenant code to its end, what it was paused for left out.
    pub wall_us: u64,
    /// How long it was paused after its start.
    pub paused_us: u64,
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
    /// Bytes read from block devices.
    pub io_read_bytes: Option<u64>,
    /// Bytes written to block devices.
    pub io_write_bytes: Option<u64>,
    /// Processes that the kernel's OOM killer killed in the job's own cgroup.
    pub oom_kills: u64,
}

/// What a sandbox uses now, and has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// So far.
    pub usage: Usage,
    /// Memory in use, bytes.
    pub memory_bytes: Option<u64>,
    /// Processes and threads, the host's own init not counted.
    pub pids: Option<u64>,
    /// How its processes wait for resources.
    pub pressure: Pressure,
}

/// Pressure stall information (PSI), for each resource that the kernel has it of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pressure {
    /// Waiting for a CPU.
    pub cpu: Option<Stall>,
    /// Waiting for memory to be had.
    pub memory: Option<Stall>,
    /// Waiting for block devices.
    pub io: Option<Stall>,
}

/// The time in which some, and in which all, processes were held up for want of one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// At least one was.
    pub some: StallTime,
    /// All were. The kernel may have none for some resources.
    pub full: Option<StallTime>,
}

/// Parts of the last seconds, in hundredths of a percent, and a sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StallTime {
    /// Of the last 10 s.
    pub avg10: u32,
    /// Of the last 60 s.
    pub avg60: u32,
    /// Of the last 300 s.
    pub avg300: u32,
    /// In all.
    pub total_us: u64,
}

/// A process of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its pid in the sandbox.
    pub pid: u32,
    /// Its pid on the host.
    pub host_pid: u32,
    /// The kernel's letter for its state (`proc_pid_status(5)`).
    pub state: char,
    /// Its threads.
    pub threads: u32,
    /// Its name, which it can choose: 15 bytes at most, what is no text in it replaced.
    pub command: String,
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
    /// Bytes that all sandboxes of its tenant have read from block devices, and written there, since the last report of
    /// the tenant; where the kernel counts them for the tenant and not for each sandbox.
    pub tenant_io: Option<(u64, u64)>,
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
    /// Its cgroups.
    pub cgroups: CgroupPaths,
}
