//! What one job may use, as far as the kernel enforces it. Zero, negative or absent never mean unlimited.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use crate::ceiling::Ceiling;

/// The limits of one sandbox. The launcher refuses values outside the ranges given here, whoever asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory of all processes of the job, page tables, tmpfs, pipes and swap included.
    pub memory_bytes: u64,
    /// CPU time per wall time, in thousandths of a core.
    pub cpu_millicores: u32,
    /// Share of CPU under contention; 100 is one share.
    pub cpu_weight: u32,
    /// CPU time in all, user and system, of every process of the job.
    pub cpu_time: Duration,
    /// Wall-clock time from the start of tenant code.
    pub wall_time: Duration,
    /// Processes and threads at once.
    pub pids: u32,
    /// Size of `/tmp`.
    pub scratch_bytes: u64,
    /// Files and directories in `/tmp`.
    pub scratch_inodes: u64,
    /// Open descriptors of one process.
    pub open_files: u32,
    /// Stack of the main thread.
    pub stack_bytes: u64,
}

/// A limit outside of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("limit {0} is out of range")]
pub struct LimitError(pub &'static str);

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;
const LONGEST: Duration = Duration::from_secs(3600);
const SHORTEST: Duration = Duration::from_millis(10);

impl Limits {
    /// Range of `memory_bytes`: below 4 MiB not even an empty static program starts.
    pub const MEMORY_BYTES: RangeInclusive<u64> = 4 * MIB..=4 * GIB;
    /// Range of `cpu_millicores`: below 0.01 core the CFS quota would be under the kernel's 1 ms minimum. Above the
    /// host's CPUs a quota has no effect; the upper end is only a sanity bound.
    pub const CPU_MILLICORES: RangeInclusive<u32> = 10..=1_024_000;
    /// Range of `cpu_weight`: that of cgroup v2's `cpu.weight`.
    pub const CPU_WEIGHT: RangeInclusive<u32> = 1..=10_000;
    /// Range of `cpu_time` and `wall_time`.
    pub const TIME: RangeInclusive<Duration> = SHORTEST..=LONGEST;
    /// Range of `pids`.
    pub const PIDS: RangeInclusive<u32> = 1..=4096;
    /// Range of `scratch_bytes`.
    pub const SCRATCH_BYTES: RangeInclusive<u64> = 4 * KIB..=GIB;
    /// Range of `scratch_inodes`.
    pub const SCRATCH_INODES: RangeInclusive<u64> = 16..=65_536;
    /// Range of `open_files`.
    pub const OPEN_FILES: RangeInclusive<u32> = 16..=16_384;
    /// Range of `stack_bytes`.
    pub const STACK_BYTES: RangeInclusive<u64> = 64 * KIB..=64 * MIB;

    /// The first limit in which `other` differs that is fixed once a sandbox is made.
    #[must_use]
    pub fn changed_at_start_only(&self, other: &Self) -> Option<&'static str> {
        let fixed = [
            ("scratch_bytes", self.scratch_bytes == other.scratch_bytes),
            ("scratch_inodes", self.scratch_inodes == other.scratch_inodes),
            ("open_files", self.open_files == other.open_files),
            ("stack_bytes", self.stack_bytes == other.stack_bytes),
        ];
        fixed.iter().find(|(_, same)| !same).map(|(name, _)| *name)
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first limit that is out of its range.
    pub fn check(&self) -> Result<(), LimitError> {
        let ranges = [
            ("memory_bytes", Self::MEMORY_BYTES.contains(&self.memory_bytes)),
            ("cpu_cores", Self::CPU_MILLICORES.contains(&self.cpu_millicores)),
            ("cpu_weight", Self::CPU_WEIGHT.contains(&self.cpu_weight)),
            ("cpu_time_ms", Self::TIME.contains(&self.cpu_time)),
            ("wall_time_ms", Self::TIME.contains(&self.wall_time)),
            ("pids", Self::PIDS.contains(&self.pids)),
            ("scratch_bytes", Self::SCRATCH_BYTES.contains(&self.scratch_bytes)),
            ("scratch_inodes", Self::SCRATCH_INODES.contains(&self.scratch_inodes)),
            ("open_files", Self::OPEN_FILES.contains(&self.open_files)),
            ("stack_bytes", Self::STACK_BYTES.contains(&self.stack_bytes)),
        ];
        all_in_range(&ranges)
    }
}

pub(crate) fn all_in_range(ranges: &[(&'static str, bool)]) -> Result<(), LimitError> {
    match ranges.iter().find(|(_, ok)| !ok) {
        None => Ok(()),
        Some((name, _)) => Err(LimitError(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Limits {
        Limits {
            memory_bytes: 128 * MIB,
            cpu_millicores: 1000,
            cpu_weight: 100,
            cpu_time: Duration::from_secs(30),
            wall_time: Duration::from_secs(30),
            pids: 64,
            scratch_bytes: 16 * MIB,
            scratch_inodes: 1024,
            open_files: 256,
            stack_bytes: 8 * MIB,
        }
    }

    #[test]
    fn zero_is_never_a_limit() {
        assert_eq!(some().check(), Ok(()));
        type Set = fn(&mut Limits);
        let zeros: [(&str, Set); 10] = [
            ("memory_bytes", |l| l.memory_bytes = 0),
            ("cpu_cores", |l| l.cpu_millicores = 0),
            ("cpu_weight", |l| l.cpu_weight = 0),
            ("cpu_time_ms", |l| l.cpu_time = Duration::ZERO),
            ("wall_time_ms", |l| l.wall_time = Duration::ZERO),
            ("pids", |l| l.pids = 0),
            ("scratch_bytes", |l| l.scratch_bytes = 0),
            ("scratch_inodes", |l| l.scratch_inodes = 0),
            ("open_files", |l| l.open_files = 0),
            ("stack_bytes", |l| l.stack_bytes = 0),
        ];
        for (name, set) in zeros {
            let mut limits = some();
            set(&mut limits);
            assert_eq!(limits.check(), Err(LimitError(name)));
        }
    }

    #[test]
    fn huge_is_refused() {
        let limits = Limits { memory_bytes: u64::MAX, ..some() };
        assert_eq!(limits.check(), Err(LimitError("memory_bytes")));
        let limits = Limits { wall_time: Duration::MAX, ..some() };
        assert_eq!(limits.check(), Err(LimitError("wall_time_ms")));
    }
}
