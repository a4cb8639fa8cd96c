//! The controllers of cgroup v2. Also used on hybrid machines, where the v2 hierarchy has no controllers but still
//! kills and freezes.

use nix::errno::Errno;

use super::PAGE_BYTES;
use super::dir::{Dir, keyed};
use super::gauge::CpuCounts;

/// The controllers that this cgroup could give to its children.
pub(super) fn available(dir: &Dir) -> Vec<String> {
    let text = dir.read("cgroup.controllers").unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// The controllers that its children have.
pub(super) fn enabled(dir: &Dir) -> Vec<String> {
    let text = dir.read("cgroup.subtree_control").unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Gives `controllers` to the children of this cgroup. `EBUSY` or `EOPNOTSUPP` while it has processes of its own and is
/// not the root of all.
///
/// In one write, all or none: `cpu` and `pids` alone would be given in spite of processes, and make of the cgroup a
/// thread root, which can give no `memory` (`cgroups(7)`, "Thread mode").
pub(super) fn delegate(dir: &Dir, controllers: &[&str]) -> nix::Result<()> {
    let words: Vec<String> = controllers.iter().map(|controller| format!("+{controller}")).collect();
    if words.is_empty() { Ok(()) } else { dir.write("cgroup.subtree_control", &words.join(" ")) }
}

/// Limits memory with no swap, and makes an OOM kill take the whole cgroup.
pub(super) fn limit_memory(dir: &Dir, bytes: u64) -> nix::Result<()> {
    dir.write("memory.max", &bytes.to_string())?;
    dir.confirm("memory.max", bytes - bytes % PAGE_BYTES)?;
    dir.write_if_present("memory.swap.max", "0")
}

/// Frees `excess` of what is used here and below, as far as it is found, so that `bytes` are left; without killing. Before
/// Linux 5.19 by a threshold that is taken away again at once, as it makes all slow that use more.
pub(super) fn reclaim(dir: &Dir, bytes: u64, excess: u64) -> nix::Result<()> {
    match dir.write("memory.reclaim", &excess.to_string()) {
        Err(Errno::ENOENT) => {
            let lowered = dir.write("memory.high", &bytes.to_string());
            dir.write("memory.high", "max").and(lowered)
        }
        other => other,
    }
}

pub(super) fn kill_whole_group_on_oom(dir: &Dir) -> nix::Result<()> {
    dir.write("memory.oom.group", "1")?;
    dir.confirm("memory.oom.group", 1)
}

pub(super) fn limit_cpu(dir: &Dir, quota_us: u64, period_us: u64) -> nix::Result<()> {
    let max = format!("{quota_us} {period_us}");
    dir.write("cpu.max", &max)?;
    let read = dir.read("cpu.max").map_err(|error| crate::sys::process::errno_of(&error))?;
    if read.trim_end() == max { Ok(()) } else { Err(Errno::EPROTO) }
}

pub(super) fn weigh_cpu(dir: &Dir, weight: u32) -> nix::Result<()> {
    dir.write("cpu.weight", &weight.to_string())?;
    dir.confirm("cpu.weight", weight.into())
}

pub(super) fn limit_pids(dir: &Dir, pids: u32) -> nix::Result<()> {
    dir.write("pids.max", &pids.to_string())?;
    dir.confirm("pids.max", pids.into())
}

pub(super) fn oom_kills(dir: &Dir) -> Option<u64> {
    dir.keyed_number("memory.events", "oom_kill")
}

pub(super) fn memory_peak(dir: &Dir) -> Option<u64> {
    dir.number("memory.peak") // since Linux 5.19
}

pub(super) fn cpu_counts(dir: &Dir) -> Option<CpuCounts> {
    let text = dir.read("cpu.stat").ok()?;
    let count = |key| keyed(&text, key);
    Some(CpuCounts { total_us: count("usage_usec")?, user: count("user_usec")?, system: count("system_usec")? })
}

/// All CPU time in microseconds.
pub(super) fn cpu_total(dir: &Dir) -> Option<u64> {
    dir.keyed_number("cpu.stat", "usage_usec")
}

pub(super) fn cpu_throttled(dir: &Dir) -> Option<u64> {
    dir.keyed_number("cpu.stat", "throttled_usec")
}

/// Kills every process of the cgroup and below, also those forking just now. Since Linux 5.14.
pub(super) fn kill(dir: &Dir) -> nix::Result<()> {
    match dir.write("cgroup.kill", "1") {
        Err(Errno::ENOENT) => Ok(()), // an older kernel: the pid namespace's own death does the same
        other => other,
    }
}
