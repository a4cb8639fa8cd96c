//! The ceiling over all of a tenant's jobs together: one cgroup in each hierarchy, whatever of it is set.
//!
//! The values are checked here as far as no machine is needed; what the machine lacks is a [`CeilingError`] of the
//! launcher's.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::limits::{LimitError, Limits, all_in_range};

/// What all of a tenant's jobs together may use. `None`, or nothing, leaves the kernel's own setting, which inherits
/// the server's share: it is the operator's choice not to divide the machine, not a limit of zero. Only of devices and
/// huge pages is nothing had that is not listed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ceiling {
    /// Memory of all jobs, swap included.
    pub memory_bytes: Option<u64>,
    /// CPU time per wall time, in thousandths of a core.
    pub cpu_millicores: Option<u32>,
    /// Share of CPU against the other tenants.
    pub cpu_weight: Option<u32>,
    /// Processes and threads of all jobs, the host's own inits included.
    pub pids: Option<u32>,
    /// The CPUs that jobs run on.
    pub cpuset: Option<CpuSet>,
    /// Rates to block devices.
    pub io: Vec<IoLimit>,
    /// Share of a block device against the other tenants.
    pub io_weight: Option<u32>,
    /// Devices besides the standard six.
    pub devices: Vec<DeviceRule>,
    /// Bytes of huge pages, by the kernel's name of their size (`2MB`).
    pub hugetlb: BTreeMap<String, u64>,
    /// The class of packets: that of `net_cls`, or else their mark.
    pub net_class: Option<u32>,
    /// The priority of packets.
    pub net_priority: Option<u32>,
}

/// The numbers of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// The driver's.
    pub major: u32,
    /// The device's among the driver's.
    pub minor: u32,
}

/// Rates to one block device, each at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimit {
    /// A whole block device, no partition.
    pub device: DeviceNumber,
    /// Bytes read in a second.
    pub read_bps: Option<u64>,
    /// Bytes written in a second.
    pub write_bps: Option<u64>,
    /// Reads in a second.
    pub read_iops: Option<u64>,
    /// Writes in a second.
    pub write_iops: Option<u64>,
}

/// A device that jobs may open, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRule {
    /// A block device, else a character device.
    pub block: bool,
    /// Which.
    pub device: DeviceNumber,
    /// To read.
    pub read: bool,
    /// To write.
    pub write: bool,
}

/// A set of CPUs, never empty, in the kernel's list format: `0,2-5`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSet(Vec<RangeInclusive<u32>>);

/// A ceiling that cannot be had on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CeilingError {
    /// The controller behind it is not to be had.
    #[error("`{field}` cannot be enforced here: {why}")]
    NotAvailable {
        /// The setting.
        field: String,
        /// What is missing.
        why: String,
    },
    /// A device, CPU or size that is not there.
    #[error("`{field}` is {given}; possible is {possible}")]
    Impossible {
        /// The setting.
        field: String,
        /// What of it cannot be.
        given: String,
        /// What could.
        possible: String,
    },
    /// More than that is in use and cannot be taken away.
    #[error("`{field}` cannot be lowered: {used} of it are in use, even after a job was ended for it")]
    InUse {
        /// The setting.
        field: String,
        /// In the setting's unit.
        used: u64,
    },
    /// The kernel refuses the value for a reason of its own.
    #[error("`{field}` was refused by the kernel: {}", Errno::from_raw(*errno).desc())]
    Refused {
        /// The setting.
        field: String,
        /// The kernel's reason.
        errno: i32,
    },
}

impl CeilingError {
    /// The setting that cannot be had.
    #[must_use]
    pub fn field(&self) -> &str {
        match self {
            Self::NotAvailable { field, .. }
            | Self::Impossible { field, .. }
            | Self::InUse { field, .. }
            | Self::Refused { field, .. } => field,
        }
    }
}

impl CeilingError {
    /// The same in a word of the kernel's.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::NotAvailable { .. } => Errno::EOPNOTSUPP,
            Self::Impossible { .. } => Errno::ENODEV,
            Self::InUse { .. } => Errno::EBUSY,
            Self::Refused { errno, .. } => Errno::from_raw(*errno),
        }
    }
}

impl Ceiling {
    /// Range of `memory_bytes`: from one job's least to more than any machine has.
    pub const MEMORY_BYTES: RangeInclusive<u64> = 4 << 20..=1 << 50;
    /// Range of `pids`: from an init and its program to the kernel's `PID_MAX_LIMIT`.
    pub const PIDS: RangeInclusive<u32> = 2..=1 << 22;
    /// Range of `io_weight`: that of cgroup v2's `io.weight`.
    pub const IO_WEIGHT: RangeInclusive<u32> = 1..=10_000;
    /// Range of the bytes a second in `io`.
    pub const IO_BPS: RangeInclusive<u64> = 1..=(1 << 53) - 1;
    /// Range of the operations a second in `io`: the kernel's word for no limit is the next number.
    pub const IO_IOPS: RangeInclusive<u64> = 1..=(1 << 32) - 2;
    /// Range of `hugetlb`, of each size.
    pub const HUGETLB_BYTES: RangeInclusive<u64> = 0..=1 << 50;
    /// Range of `net_class`: 0 is the class of everybody without one.
    pub const NET_CLASS: RangeInclusive<u32> = 1..=u32::MAX;
    /// The most devices in `io` and in `devices`: each costs a few instructions at every open on v2, and an inode in
    /// every job's `/dev`.
    pub const MOST_DEVICES: usize = 64;
    /// The most sizes in `hugetlb`; no architecture has more.
    pub const MOST_SIZES: usize = 8;

    /// Checks every value that is there against its range; those of CPU are a job's own.
    ///
    /// # Errors
    /// The first that is out of its range.
    pub fn check(&self) -> Result<(), LimitError> {
        let bytes = |rate: Option<u64>| rate.is_none_or(|rate| Self::IO_BPS.contains(&rate));
        let operations = |rate: Option<u64>| rate.is_none_or(|rate| Self::IO_IOPS.contains(&rate));
        let rates = |io: &IoLimit| {
            io.device.is_possible()
                && [io.read_bps, io.write_bps].into_iter().all(bytes)
                && [io.read_iops, io.write_iops].into_iter().all(operations)
                && [io.read_bps, io.write_bps, io.read_iops, io.write_iops].iter().any(Option::is_some)
        };
        let device = |rule: &DeviceRule| rule.device.is_possible() && (rule.read || rule.write);
        let io = self.io.len() <= Self::MOST_DEVICES
            && self.io.iter().all(rates)
            && all_different(&self.io.iter().map(|io| io.device));
        let devices = self.devices.len() <= Self::MOST_DEVICES
            && self.devices.iter().all(device)
            && all_different(&self.devices.iter().map(|rule| (rule.block, rule.device)));
        let hugetlb = self.hugetlb.len() <= Self::MOST_SIZES
            && self.hugetlb.iter().all(|(size, bytes)| {
                page_bytes(size).is_some_and(|page| bytes.is_multiple_of(page)) && Self::HUGETLB_BYTES.contains(bytes)
            });
        all_in_range(&[
            ("memory_bytes", self.memory_bytes.is_none_or(|value| Self::MEMORY_BYTES.contains(&value))),
            ("cpu_cores", self.cpu_millicores.is_none_or(|value| Limits::CPU_MILLICORES.contains(&value))),
            ("cpu_weight", self.cpu_weight.is_none_or(|value| Limits::CPU_WEIGHT.contains(&value))),
            ("pids", self.pids.is_none_or(|value| Self::PIDS.contains(&value))),
            ("io", io),
            ("io_weight", self.io_weight.is_none_or(|value| Self::IO_WEIGHT.contains(&value))),
            ("devices", devices),
            ("hugetlb", hugetlb),
            ("net_class", self.net_class.is_none_or(|value| Self::NET_CLASS.contains(&value))),
        ])
    }
}

fn all_different<T: PartialEq>(values: &(impl Iterator<Item = T> + Clone)) -> bool {
    values.clone().enumerate().all(|(i, value)| !values.clone().take(i).any(|earlier| earlier == value))
}

/// The bytes of one page of a size as the kernel writes it: a number and `KB`, `MB` or `GB` (`mem_fmt` of its
/// `mm/hugetlb_cgroup.c`).
#[must_use]
pub fn page_bytes(size: &str) -> Option<u64> {
    let units = [("KB", 1_u64 << 10), ("MB", 1 << 20), ("GB", 1 << 30)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((size.strip_suffix(name)?, unit)))?;
    let plain = !number.starts_with(['0', '+']) && number.len() <= 4;
    plain.then(|| number.parse::<u64>().ok()).flatten().map(|number| number * unit)
}

impl DeviceNumber {
    /// Whether the kernel has room for such numbers: 12 bits for the major, 20 for the minor.
    fn is_possible(self) -> bool {
        self.major < 1 << 12 && self.minor < 1 << 20
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The text is no `major:minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a device is its major and minor number, as in `7:0`")]
pub struct DeviceNumberError;

impl FromStr for DeviceNumber {
    type Err = DeviceNumberError;
    fn from_str(text: &str) -> Result<Self, DeviceNumberError> {
        let number = |text: &str| match text.starts_with('+') {
            true => None,
            false => text.parse().ok(),
        };
        let parts = text.split_once(':').and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
        let device = parts.map(|(major, minor)| Self { major, minor });
        device.filter(|device| device.is_possible()).ok_or(DeviceNumberError)
    }
}

/// The text is no list of CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a set of CPUs is a list of numbers and ranges, as in `0,2-5`")]
pub struct CpuSetError;

impl CpuSet {
    /// More than any kernel is built for (`NR_CPUS`).
    const MOST: u32 = 8192;

    /// Whether every CPU of this set is in the other one.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        self.0.iter().cloned().flatten().all(|cpu| other.0.iter().any(|range| range.contains(&cpu)))
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        let number = |text: &str| {
            let plain = text.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| text.parse::<u32>().ok()).flatten().filter(|cpu| *cpu < Self::MOST).ok_or(CpuSetError)
        };
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = number(first)?..=number(last)?;
            if range.is_empty() {
                return Err(CpuSetError);
            }
            ranges.push(range);
        }
        ranges.sort_unstable_by_key(|range| *range.start());
        let mut merged: Vec<RangeInclusive<u32>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if *range.start() <= last.end() + 1 => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => merged.push(range),
            }
        }
        Ok(Self(merged))
    }
}

impl TryFrom<String> for CpuSet {
    type Error = CpuSetError;
    fn try_from(text: String) -> Result<Self, CpuSetError> {
        text.parse()
    }
}

impl From<CpuSet> for String {
    fn from(cpus: CpuSet) -> Self {
        cpus.to_string()
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, range) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match range.start() == range.end() {
                true => write!(f, "{comma}{}", range.start())?,
                false => write!(f, "{comma}{}-{}", range.start(), range.end())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    fn read_bps(rate: u64) -> IoLimit {
        let device = device(7, 0);
        IoLimit { device, read_bps: Some(rate), write_bps: None, read_iops: None, write_iops: None }
    }

    #[test]
    fn a_ceiling_has_ranges_too() {
        let rule = DeviceRule { block: true, device: device(4095, (1 << 20) - 1), read: true, write: false };
        let most = Ceiling {
            memory_bytes: Some(1 << 50),
            cpu_millicores: Some(1_024_000),
            cpu_weight: Some(10_000),
            pids: Some(1 << 22),
            cpuset: Some("0-8191".parse().unwrap()),
            io: vec![read_bps((1 << 53) - 1)],
            io_weight: Some(10_000),
            devices: vec![rule, DeviceRule { block: false, ..rule }],
            hugetlb: [("2MB".to_owned(), 1 << 50), ("1GB".to_owned(), 0)].into(),
            net_class: Some(u32::MAX),
            net_priority: Some(u32::MAX),
        };
        for ceiling in [Ceiling::default(), most.clone()] {
            assert_eq!(ceiling.check(), Ok(()));
        }
        type Set = fn(&mut Ceiling);
        let wrong: [(&str, Set); 16] = [
            ("memory_bytes", |c| c.memory_bytes = Some(0)),
            ("memory_bytes", |c| c.memory_bytes = Some(u64::MAX)),
            ("cpu_cores", |c| c.cpu_millicores = Some(0)),
            ("cpu_weight", |c| c.cpu_weight = Some(0)),
            ("pids", |c| c.pids = Some(1)),
            ("io", |c| c.io = vec![read_bps(0)]),
            ("io", |c| c.io = vec![read_bps(5), read_bps(6)]),
            ("io", |c| c.io[0].read_bps = None),
            ("io_weight", |c| c.io_weight = Some(0)),
            ("devices", |c| c.devices[1] = c.devices[0]),
            ("devices", |c| c.devices[0].read = false),
            ("devices", |c| c.devices[0].device.major = 4096),
            ("devices", |c| c.devices = vec![c.devices[0]; 65]),
            ("hugetlb", |c| _ = c.hugetlb.insert("3".into(), 0)),
            ("hugetlb", |c| _ = c.hugetlb.insert("2MB".into(), 1)),
            ("net_class", |c| c.net_class = Some(0)),
        ];
        for (name, set) in wrong {
            let mut ceiling = most.clone();
            set(&mut ceiling);
            assert_eq!(ceiling.check(), Err(LimitError(name)), "{ceiling:?}");
        }
    }

    #[test]
    fn sets_of_cpus_are_read_as_the_kernel_writes_them() {
        for (text, shown) in [("0", "0"), ("0-3,2-5,7", "0-5,7"), ("3,1,2", "1-3"), ("5,0", "0,5")] {
            assert_eq!(text.parse::<CpuSet>().unwrap().to_string(), shown);
        }
        for bad in ["", "a", "1-", "-1", "3-1", "0,,1", "+1", " 1", "8192", "0-99999", "1-2-3"] {
            assert_eq!(bad.parse::<CpuSet>(), Err(CpuSetError), "{bad}");
        }
        let within = |a: &str, b: &str| a.parse::<CpuSet>().unwrap().is_within(&b.parse().unwrap());
        assert!(within("0-1", "0-1,3") && within("3", "0-1,3") && !within("2", "0-1,3") && !within("0-3", "0-1,3"));
    }

    #[test]
    fn device_numbers_and_page_sizes_are_the_kernel_s() {
        assert_eq!("7:0".parse(), Ok(device(7, 0)));
        for bad in ["7", "7:", ":0", "a:b", "-1:0", "+1:0", "7:0:0", "4096:0", "0:1048576", "7: 0"] {
            assert_eq!(bad.parse::<DeviceNumber>(), Err(DeviceNumberError), "{bad}");
        }
        assert_eq!(
            [page_bytes("2MB"), page_bytes("1GB"), page_bytes("64KB")],
            [Some(2 << 20), Some(1 << 30), Some(64 << 10)]
        );
        for bad in ["", "MB", "2", "2mb", "02MB", "+2MB", "2MB ", "99999GB", "2PB", "0MB"] {
            assert_eq!(page_bytes(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_of_a_set_is_the_set(text in "[0-9]{1,3}(-[0-9]{1,3})?(,[0-9]{1,3}(-[0-9]{1,3})?){0,5}") {
            if let Ok(cpus) = text.parse::<CpuSet>() {
                let again: CpuSet = cpus.to_string().parse().unwrap();
                prop_assert_eq!(&again, &cpus);
                prop_assert!(again.is_within(&cpus));
            }
        }
    }
}
