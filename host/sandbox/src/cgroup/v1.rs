//! The controllers of cgroup v1, each in a hierarchy of its own or mounted together with others.

use std::os::fd::{AsRawFd, OwnedFd};

use cgroups_rs::MaxValue;
use cgroups_rs::cpu::CpuController;
use cgroups_rs::memory::MemController;
use cgroups_rs::pid::PidController;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::PAGE_BYTES;
use super::dir::Dir;
use super::gauge::CpuCounts;

/// Limits memory, and memory plus swap to the same value, so that swapping is no way around the limit.
pub(super) fn limit_memory(dir: &Dir, bytes: u64) -> nix::Result<()> {
    let whole_pages = bytes - bytes % PAGE_BYTES;
    let bytes = i64::try_from(bytes).map_err(|_| Errno::ERANGE)?;
    let memory = MemController::new(dir.path(), false);
    // the kernel refuses `limit > memsw` at any moment: lower the limit first, raise it last
    let raising = match errno(memory.set_limit(bytes)) {
        Err(Errno::EINVAL) => true,
        other => {
            other?;
            false
        }
    };
    match errno(memory.set_memswap_limit(bytes)) {
        // swap is not accounted by this kernel; doctor says whether there is any
        Err(Errno::ENOENT) => {}
        other => {
            other?;
            dir.confirm("memory.memsw.limit_in_bytes", whole_pages)?;
        }
    }
    if raising {
        errno(memory.set_limit(bytes))?;
    }
    dir.confirm("memory.limit_in_bytes", whole_pages)
}

/// The same for a cgroup with processes in it: lowering the limit makes the kernel reclaim what it can, for as long as
/// it finds something, or until a signal comes (`EINTR`). By plain writes, as the library's are repeated after a signal.
pub(super) fn change_memory_limit(dir: &Dir, bytes: u64) -> nix::Result<()> {
    let whole_pages = bytes - bytes % PAGE_BYTES;
    let (limit, with_swap) = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes");
    let order =
        if dir.number(limit).is_some_and(|now| now < whole_pages) { [with_swap, limit] } else { [limit, with_swap] };
    for file in order {
        match dir.write(file, &bytes.to_string()) {
            // swap is not accounted by this kernel
            Err(Errno::ENOENT) if file == with_swap => continue,
            other => other?,
        }
        dir.confirm(file, whole_pages)?;
    }
    Ok(())
}

pub(super) fn limit_cpu(dir: &Dir, quota_us: u64, period_us: u64) -> nix::Result<()> {
    let cpu = CpuController::new(dir.path(), false);
    errno(cpu.set_cfs_period(period_us))?;
    errno(cpu.set_cfs_quota(i64::try_from(quota_us).map_err(|_| Errno::ERANGE)?))?;
    dir.confirm("cpu.cfs_period_us", period_us)?;
    dir.confirm("cpu.cfs_quota_us", quota_us)
}

/// Gives all of a period's quota anew, whatever has been used of it.
pub(super) fn refill_cpu(dir: &Dir, quota_us: u64) -> nix::Result<()> {
    dir.write("cpu.cfs_quota_us", &quota_us.to_string())?;
    dir.confirm("cpu.cfs_quota_us", quota_us)
}

/// CPU time in a period; `None` if there is no limit.
pub(super) fn cpu_quota(dir: &Dir) -> Option<u64> {
    dir.number("cpu.cfs_quota_us") // -1 without a limit, which is no such number
}

/// `cpu.shares` is 1024 where `cpu.weight` is 100, within the kernel's bounds of 2 and 2^18.
pub(super) fn weigh_cpu(dir: &Dir, weight: u32) -> nix::Result<()> {
    let shares = (u64::from(weight) * 1024 / 100).clamp(2, 1 << 18);
    errno(CpuController::new(dir.path(), false).set_shares(shares))?;
    dir.confirm("cpu.shares", shares)
}

pub(super) fn limit_pids(dir: &Dir, pids: u32) -> nix::Result<()> {
    errno(PidController::new(dir.path(), false).set_pid_max(MaxValue::Value(i64::from(pids))))?;
    dir.confirm("pids.max", pids.into())
}

/// An eventfd that becomes readable on an OOM in this cgroup. It also fires for an ancestor's OOM and on removal, so
/// it only says "look at the counter".
pub(super) fn watch_oom(dir: &Dir) -> nix::Result<OwnedFd> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let control = dir.open_file("memory.oom_control", OFlag::O_RDONLY)?;
    dir.write("cgroup.event_control", &format!("{} {}", event.as_raw_fd(), control.as_raw_fd()))?;
    Ok(event.into())
}

pub(super) fn oom_kills(memory: &Dir) -> Option<u64> {
    memory.keyed_number("memory.oom_control", "oom_kill")
}

pub(super) fn memory_peak(memory: &Dir) -> Option<u64> {
    memory.number("memory.max_usage_in_bytes")
}

/// User and system time in microseconds, of what has been counted since `before`.
///
/// v1 counts the sum to the nanosecond but samples the division between user and kernel at timer ticks, so the exact
/// sum is divided in the sampled proportion, as the kernel itself does for `cpu.stat` of v2 (`cputime_adjust`).
pub(super) fn cpu_times(now: &CpuCounts, before: &CpuCounts) -> (u64, u64) {
    let since = |count: fn(&CpuCounts) -> u64| count(now).saturating_sub(count(before));
    divide(since(|counts| counts.total_us), since(|counts| counts.user), since(|counts| counts.system))
}

pub(super) fn cpu_counts(cpuacct: &Dir) -> Option<CpuCounts> {
    let sampled = |file| cpuacct.number(file).unwrap_or(0);
    let (user, system) = (sampled("cpuacct.usage_user"), sampled("cpuacct.usage_sys"));
    cpu_total(cpuacct).map(|total_us| CpuCounts { total_us, user, system })
}

/// Divides `total` as `user` is to `system`. Without a sample, all of it is the kernel's: a process that no tick has
/// met has done little else than start.
fn divide(total: u64, user: u64, system: u64) -> (u64, u64) {
    let (total_wide, user_wide) = (u128::from(total), u128::from(user));
    let sum = user_wide + u128::from(system);
    let user = (total_wide * user_wide).checked_div(sum).and_then(|part| u64::try_from(part).ok()).unwrap_or(0);
    (user, total - user)
}

/// Begins anew to look for the peak, and gives where it begins: at what is in use.
pub(super) fn reset_memory_peak(memory: &Dir) -> nix::Result<u64> {
    memory.write("memory.max_usage_in_bytes", "0")?;
    memory_peak(memory).ok_or(Errno::EPROTO)
}

/// All CPU time in microseconds.
pub(super) fn cpu_total(cpuacct: &Dir) -> Option<u64> {
    cpuacct.number("cpuacct.usage").map(|ns| ns / 1000)
}

pub(super) fn cpu_throttled(cpu: &Dir) -> Option<u64> {
    cpu.keyed_number("cpu.stat", "throttled_time").map(|ns| ns / 1000)
}

/// Thaws: on v1 a frozen task does not even die of SIGKILL.
pub(super) fn thaw(freezer: &Dir) -> nix::Result<()> {
    freezer.write("freezer.state", "THAWED")
}

/// The errno beneath the library's error.
fn errno(result: cgroups_rs::error::Result<()>) -> nix::Result<()> {
    result.map_err(|error| {
        std::error::Error::source(&error)
            .and_then(|cause| cause.downcast_ref::<std::io::Error>())
            .map_or(Errno::EIO, crate::sys::process::errno_of)
    })
}

#[cfg(test)]
mod tests {
    use super::divide;

    #[test]
    fn the_parts_are_the_sum_and_keep_the_proportion() {
        assert_eq!(divide(1000, 3, 1), (750, 250));
        assert_eq!(divide(1000, 0, 0), (0, 1000));
        assert_eq!(divide(1000, 7, 0), (1000, 0));
        assert_eq!(divide(0, 7, 9), (0, 0));
        assert_eq!(divide(u64::MAX, u64::MAX, u64::MAX), (u64::MAX / 2, u64::MAX / 2 + 1));
    }
}
