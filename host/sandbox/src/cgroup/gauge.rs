//! What a job's cgroup counts, while it runs and after.

use std::time::Duration;

use nix::errno::Errno;

use super::leaf::Leaf;
use super::{Extra, Role, Served};
use crate::usage::{Pressure, Stall, StallTime, Stats, Usage};

/// CPU time as a cgroup has counted it: all of it, and how it is divided, on v2 in microseconds and on v1 in any unit.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CpuCounts {
    pub(super) total_us: u64,
    pub(super) user: u64,
    pub(super) system: u64,
}

/// What a leaf had counted before it was the sandbox's that has it now.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Before {
    cpu: CpuCounts,
    throttled_us: u64,
    oom_kills: u64,
}

impl Leaf {
    /// All that the leaf has counted until now, for another sandbox to begin from.
    pub(super) fn count_anew(&mut self) -> nix::Result<()> {
        self.before = Before {
            cpu: self.control(Role::Cpuacct).cpu_counts().ok_or(Errno::EPROTO)?,
            throttled_us: self.control(Role::Cpu).cpu_throttled().unwrap_or(0),
            oom_kills: self.control(Role::Memory).oom_kills().ok_or(Errno::EPROTO)?,
        };
        Ok(())
    }

    /// Processes that the OOM killer has taken in this leaf.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.control(Role::Memory).oom_kills().map_or(0, |kills| kills.saturating_sub(self.before.oom_kills))
    }

    /// Memory in use now.
    pub(crate) fn memory_used(&self) -> Option<u64> {
        self.control(Role::Memory).memory_used()
    }

    /// CPU time used so far.
    pub(crate) fn cpu_used(&self) -> Option<Duration> {
        let total = self.control(Role::Cpuacct).cpu_total()?;
        Some(Duration::from_micros(total.saturating_sub(self.before.cpu.total_us)))
    }

    /// Everything that the leaf has counted so far. `own_pids` of its processes are the host's own.
    pub(crate) fn usage(&self, own_pids: u32) -> Usage {
        let cpuacct = self.control(Role::Cpuacct);
        let times = cpuacct.cpu_counts().map(|now| cpuacct.cpu_times(&now, &self.before.cpu));
        let throttled = self.control(Role::Cpu).cpu_throttled();
        let peak = self.control(Role::Pids).pids_peak();
        let io = self.io();
        Usage {
            wall_us: 0,
            paused_us: 0,
            cpu_user_us: times.map(|(user, _)| user),
            cpu_system_us: times.map(|(_, system)| system),
            cpu_throttled_us: throttled.map(|time| time.saturating_sub(self.before.throttled_us)),
            memory_peak_bytes: self.control(Role::Memory).memory_peak(),
            pids_peak: peak.map(|peak| peak.saturating_sub(u64::from(own_pids))),
            io_read_bytes: io.map(|(read, _)| read),
            io_write_bytes: io.map(|(_, written)| written),
            oom_kills: self.oom_kills(),
        }
    }

    /// The same, with what it uses at this moment.
    pub(crate) fn stats(&self, own_pids: u32) -> Stats {
        let pids = self.control(Role::Pids).pids_used();
        let pressure = |resource: &str| {
            let v2 = self.level.dir(self.plan.v2?);
            stall(&v2.read(&format!("{resource}.pressure")).ok()?)
        };
        Stats {
            usage: self.usage(own_pids),
            memory_bytes: self.memory_used(),
            pids: pids.map(|pids| pids.saturating_sub(u64::from(own_pids))),
            pressure: Pressure { cpu: pressure("cpu"), memory: pressure("memory"), io: pressure("io") },
        }
    }

    /// Bytes read from and written to block devices, where the kernel counts them for each job: on v2, in tenants that
    /// have block devices.
    fn io(&self) -> Option<(u64, u64)> {
        let Ok(Served { index, v2: true }) = self.plan.served(Extra::Io) else { return None };
        Some(io_bytes_v2(&self.level.dir(index).read("io.stat").ok()?))
    }
}

/// The sums over all devices of the lines of `io.stat`: `254:0 rbytes=1 wbytes=2 …`.
pub(super) fn io_bytes_v2(text: &str) -> (u64, u64) {
    let sum = |key: &str| -> u64 {
        let words = text.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
        words.fold(0, u64::saturating_add)
    };
    (sum("rbytes"), sum("wbytes"))
}

/// The sums over all devices of the lines of v1's `blkio.throttle.io_service_bytes`: `254:0 Read 1`.
pub(super) fn io_bytes_v1(text: &str) -> (u64, u64) {
    let sum = |key: &str| -> u64 {
        let number = |line: &str| {
            let (device_and_kind, number) = line.rsplit_once(' ')?;
            device_and_kind.strip_suffix(key)?.strip_suffix(' ')?;
            number.parse().ok()
        };
        text.lines().filter_map(number).fold(0, u64::saturating_add)
    };
    (sum("Read"), sum("Write"))
}

/// What stands in a file of pressure. `None` for what is none.
fn stall(text: &str) -> Option<Stall> {
    let time = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let word = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        // two digits after the point, always
        let hundredths = |key: &str| {
            let (whole, part) = word(key)?.split_once('.')?;
            Some(whole.parse::<u32>().ok()?.checked_mul(100)? + part.parse::<u32>().ok().filter(|part| *part < 100)?)
        };
        Some(StallTime {
            avg10: hundredths("avg10")?,
            avg60: hundredths("avg60")?,
            avg300: hundredths("avg300")?,
            total_us: word("total")?.parse().ok()?,
        })
    };
    Some(Stall { some: time("some")?, full: time("full") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_summed_up() {
        let v2 = "7:0 rbytes=4096 wbytes=10 rios=1 wios=1 dbytes=9 dios=9\n254:0 rbytes=1 wbytes=0\n8:0\n";
        assert_eq!(io_bytes_v2(v2), (4097, 10));
        let v1 = "7:0 Read 4096\n7:0 Write 10\n7:0 Sync 4106\n7:0 Total 4106\n254:0 Read 1\nTotal 4107\n";
        assert_eq!(io_bytes_v1(v1), (4097, 10));
        assert_eq!((io_bytes_v2(""), io_bytes_v1("Total 0\n")), ((0, 0), (0, 0)));
    }

    #[test]
    fn pressure_is_read_to_the_hundredth_and_what_is_none_is_none() {
        let text = "some avg10=88.36 avg60=0.07 avg300=100.00 total=639358180\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        let some = StallTime { avg10: 8836, avg60: 7, avg300: 10_000, total_us: 639_358_180 };
        assert_eq!(stall(text), Some(Stall { some, full: Some(StallTime::default()) }));
        let without = text.lines().next().unwrap();
        assert_eq!(stall(without), Some(Stall { some, full: None }), "of CPUs older kernels have no `full`");
        for bad in ["", "some", "some avg10=1 avg60=1.00 avg300=1.00 total=1", "full avg10=0.00"] {
            assert_eq!(stall(bad), None, "{bad:?}");
        }
    }
}
