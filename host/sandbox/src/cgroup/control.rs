//! One controller in one cgroup, whichever version of the interface it has.

use std::os::fd::OwnedFd;
use std::sync::LazyLock;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::dir::Dir;
use super::gauge::CpuCounts;
use super::{PAGE_BYTES, v1, v2};
use crate::sys::alarm;

/// The CFS period. The kernel's own default: shorter ones cost more timer work and bound bursts no better for jobs
/// that run for milliseconds.
const CPU_PERIOD_US: u32 = 100_000;

/// How long the kernel may look for memory to reclaim when a limit is lowered below what is in use. Without an end, what
/// touches pages as fast as they are reclaimed could keep the launcher here.
const RECLAIM_WITHIN: Duration = Duration::from_millis(20);

/// What a CPU charges to a cgroup at once, for the next pages to come cheaper (`MEMCG_CHARGE_BATCH` of the kernel).
const CHARGED_AHEAD: u64 = 64 * PAGE_BYTES;

/// As much of that as is let pass in a cgroup that is used again, on machines of many CPUs.
const MOST_CHARGED_AHEAD: u64 = 4 * CHARGED_AHEAD;

/// What the kernel frees a moment after the death of the process that it was for: 60 KiB at most were seen.
const FREED_LATE: u64 = 64 << 10;

/// The directory that serves a role, and the version whose files it has.
pub(super) struct Control<'a> {
    dir: &'a Dir,
    v2: bool,
}

impl<'a> Control<'a> {
    pub(super) fn new(dir: &'a Dir, v2: bool) -> Self {
        Self { dir, v2 }
    }

    pub(super) fn limit_memory(&self, bytes: u64) -> nix::Result<()> {
        if self.v2 { v2::limit_memory(self.dir, bytes) } else { v1::limit_memory(self.dir, bytes) }
    }

    /// The same while processes are in it. `EBUSY` if more is in use, and stays in use after a bounded attempt to
    /// reclaim it; on v2 the limit holds then all the same, and the kernel may have killed for it.
    pub(super) fn change_memory_limit(&self, bytes: u64) -> nix::Result<()> {
        let changed = alarm::within(RECLAIM_WITHIN, || {
            if self.v2 { v2::limit_memory(self.dir, bytes) } else { v1::change_memory_limit(self.dir, bytes) }
        })?;
        match changed {
            Err(Errno::EINTR) => Err(Errno::EBUSY),
            Ok(()) if self.memory_used().is_some_and(|used| used > bytes) => Err(Errno::EBUSY),
            other => other,
        }
    }

    /// The same for a cgroup above those of jobs. `EBUSY` leaves the limit as it was: v2 would take it and kill until it
    /// fits, the next one before the memory of the first is free.
    pub(super) fn change_memory_limit_of_all(&self, bytes: u64) -> nix::Result<()> {
        if !self.v2 {
            return self.change_memory_limit(bytes);
        }
        // the kernel takes that back as it lowers the limit
        let fits = bytes.saturating_add(charged_ahead());
        let excess = || self.memory_used().and_then(|used| used.checked_sub(fits)).filter(|excess| *excess > 0);
        if let Some(excess) = excess() {
            // the next look says what could not be reclaimed
            let _ = alarm::within(RECLAIM_WITHIN, || v2::reclaim(self.dir, bytes, excess));
        }
        if excess().is_some() {
            return Err(Errno::EBUSY);
        }
        alarm::within(RECLAIM_WITHIN, || v2::limit_memory(self.dir, bytes))?
    }

    /// Makes an OOM kill take the whole cgroup, where the kernel can do that. On v1 it cannot: there a descriptor is
    /// given that becomes readable when there may have been an OOM kill, for somebody to finish the work.
    pub(super) fn die_whole(&self) -> nix::Result<Option<OwnedFd>> {
        if self.v2 { v2::kill_whole_group_on_oom(self.dir).map(|()| None) } else { v1::watch_oom(self.dir).map(Some) }
    }

    /// Limits CPU time per wall time here, and of everything directly below as far as it has more: v1 refuses what is
    /// less than a child has.
    pub(super) fn limit_cpu_of_all(&self, millicores: u32) -> nix::Result<()> {
        if !self.v2 {
            for child in self.dir.children()? {
                // one that is gone by now has no quota
                let Ok(child) = self.dir.child(&child) else { continue };
                if v1::cpu_quota(&child).is_some_and(|quota_us| quota_us > quota_us_of(millicores)) {
                    v1::limit_cpu(&child, quota_us_of(millicores), CPU_PERIOD_US.into())?;
                }
            }
        }
        self.limit_cpu(millicores)
    }

    pub(super) fn limit_cpu(&self, millicores: u32) -> nix::Result<()> {
        let quota_us = quota_us_of(millicores);
        let limit = if self.v2 { v2::limit_cpu } else { v1::limit_cpu };
        limit(self.dir, quota_us, CPU_PERIOD_US.into())
    }

    /// Gives all of a period's CPU time anew, by a limit that holds already.
    pub(super) fn refill_cpu(&self, millicores: u32) -> nix::Result<()> {
        if self.v2 { self.limit_cpu(millicores) } else { v1::refill_cpu(self.dir, quota_us_of(millicores)) }
    }

    pub(super) fn weigh_cpu(&self, weight: u32) -> nix::Result<()> {
        if self.v2 { v2::weigh_cpu(self.dir, weight) } else { v1::weigh_cpu(self.dir, weight) }
    }

    pub(super) fn limit_pids(&self, pids: u32) -> nix::Result<()> {
        if self.v2 { v2::limit_pids(self.dir, pids) } else { v1::limit_pids(self.dir, pids) }
    }

    pub(super) fn thaw(&self) -> nix::Result<()> {
        // on v2 `cgroup.kill` reaches what is frozen
        if self.v2 { Ok(()) } else { v1::thaw(self.dir) }
    }

    pub(super) fn oom_kills(&self) -> Option<u64> {
        if self.v2 { v2::oom_kills(self.dir) } else { v1::oom_kills(self.dir) }
    }

    pub(super) fn memory_used(&self) -> Option<u64> {
        self.dir.number(if self.v2 { "memory.current" } else { "memory.usage_in_bytes" })
    }

    pub(super) fn memory_peak(&self) -> Option<u64> {
        if self.v2 { v2::memory_peak(self.dir) } else { v1::memory_peak(self.dir) }
    }

    /// Begins anew to look for the peak of memory. True if that begins at next to nothing: little more than the CPUs have
    /// charged ahead, which is in the peak of a new cgroup too.
    pub(super) fn forget_memory_peak(&self) -> nix::Result<bool> {
        if self.v2 {
            return Ok(false);
        }
        let next_to_nothing = charged_ahead().min(MOST_CHARGED_AHEAD) + FREED_LATE;
        v1::reset_memory_peak(self.dir).map(|begin| begin <= next_to_nothing)
    }

    /// Tasks now. Attempts to make one that are being refused count for their moment.
    pub(super) fn pids_used(&self) -> Option<u64> {
        self.dir.number("pids.current")
    }

    /// Since Linux 6.1, on both versions.
    pub(super) fn pids_peak(&self) -> Option<u64> {
        self.dir.number("pids.peak")
    }

    /// All CPU time, in microseconds.
    pub(super) fn cpu_total(&self) -> Option<u64> {
        if self.v2 { v2::cpu_total(self.dir) } else { v1::cpu_total(self.dir) }
    }

    pub(super) fn cpu_counts(&self) -> Option<CpuCounts> {
        if self.v2 { v2::cpu_counts(self.dir) } else { v1::cpu_counts(self.dir) }
    }

    /// User and system time, in microseconds, of what has been counted between two looks.
    pub(super) fn cpu_times(&self, now: &CpuCounts, before: &CpuCounts) -> (u64, u64) {
        // only that of v1 is kept for more than one sandbox
        if self.v2 { (now.user, now.system) } else { v1::cpu_times(now, before) }
    }

    pub(super) fn cpu_throttled(&self) -> Option<u64> {
        if self.v2 { v2::cpu_throttled(self.dir) } else { v1::cpu_throttled(self.dir) }
    }
}

/// What all CPUs that this process, and so a job, may run on have charged ahead at most, and nobody uses.
fn charged_ahead() -> u64 {
    static CPUS: LazyLock<u64> = LazyLock::new(|| {
        let ours = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        (0..CpuSet::count()).filter(|cpu| ours.is_set(*cpu) == Ok(true)).count() as u64
    });
    *CPUS * CHARGED_AHEAD
}

fn quota_us_of(millicores: u32) -> u64 {
    u64::from(millicores) * u64::from(CPU_PERIOD_US) / 1000
}
