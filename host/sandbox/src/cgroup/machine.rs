//! Which devices the machine has, and how they are scheduled: read from `/sys` for as long as the launcher lives.

use std::path::Path;

use super::dir::Dir;
use crate::ceiling::{CeilingError, DeviceNumber, DeviceRule};
use crate::init::root::DEVICES;

/// The devices that every job may open.
pub(super) const STANDARD_DEVICES: [DeviceRule; DEVICES.len()] = {
    let device = DeviceNumber { major: 0, minor: 0 };
    let mut rules = [DeviceRule { block: false, device, read: true, write: true }; DEVICES.len()];
    let mut i = 0;
    while i < DEVICES.len() {
        rules[i].device = DeviceNumber { major: DEVICES[i].1, minor: DEVICES[i].2 };
        i += 1;
    }
    rules
};

/// How many of the possible devices an error names.
const MOST_NAMED: usize = 16;

/// `/sys` as it was when the launcher came up; that has no path to it any more.
#[derive(Debug)]
pub(super) struct Machine {
    sys: Option<Dir>,
}

/// A node to be made in a job's `/dev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its path below `/dev`, of one to three plain names.
    pub(crate) path: String,
    /// What it is, and what its owner may do.
    pub(crate) rule: DeviceRule,
}

impl Machine {
    pub(super) fn look() -> Self {
        Self { sys: Dir::open(Path::new("/sys")).ok() }
    }

    fn read(&self, file: &str) -> Option<String> {
        self.sys.as_ref()?.read(file).ok()
    }

    fn uevent(&self, block: bool, device: DeviceNumber) -> Option<String> {
        self.read(&format!("dev/{}/{device}/uevent", if block { "block" } else { "char" }))
    }

    /// The node for a device that `rule` lists, named as the kernel names it.
    pub(super) fn node(&self, rule: DeviceRule) -> Option<Node> {
        let text = self.uevent(rule.block, rule.device)?;
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME=")).filter(|name| is_plain(name));
        let kind = if rule.block { "block" } else { "char" };
        let DeviceNumber { major, minor } = rule.device;
        Some(Node { path: name.map_or_else(|| format!("{kind}-{major}-{minor}"), str::to_owned), rule })
    }

    /// Checks that a device is there.
    pub(super) fn require_device(&self, field: &str, rule: DeviceRule) -> Result<(), CeilingError> {
        if self.uevent(rule.block, rule.device).is_some() {
            return Ok(());
        }
        let kind = if rule.block { "block" } else { "character" };
        let given = format!("{kind} device {}, which is not there", rule.device);
        let possible = if rule.block { self.block_devices() } else { "what `ls -l /dev` shows of this machine".into() };
        Err(CeilingError::Impossible { field: field.into(), given, possible })
    }

    /// Checks that a block device is there, and that it is a whole one.
    pub(super) fn require_disk(&self, field: &str, device: DeviceNumber) -> Result<(), CeilingError> {
        self.require_device(field, DeviceRule { block: true, device, read: true, write: true })?;
        if self.read(&format!("dev/block/{device}/partition")).is_none() {
            return Ok(());
        }
        let (given, possible) = (format!("partition {device}"), self.block_devices());
        Err(CeilingError::Impossible { field: field.into(), given, possible })
    }

    fn disks(&self) -> Vec<String> {
        self.sys.as_ref().and_then(|sys| sys.entries("block").ok()).unwrap_or_default()
    }

    fn block_devices(&self) -> String {
        let number = |disk: &String| Some(format!("{} ({disk})", self.read(&format!("block/{disk}/dev"))?.trim()));
        let mut found: Vec<String> = self.disks().iter().filter_map(number).collect();
        found.sort();
        if found.len() > MOST_NAMED {
            found.truncate(MOST_NAMED);
            found.push("…".into());
        }
        if found.is_empty() { "no block device: there is none".into() } else { found.join(", ") }
    }

    /// Whether some block device is scheduled by BFQ, which is what gives weights an effect.
    pub(super) fn has_bfq(&self) -> bool {
        let scheduler = |disk: &String| self.read(&format!("block/{disk}/queue/scheduler"));
        self.disks().iter().filter_map(scheduler).any(|text| text.contains("[bfq]"))
    }
}

/// Whether the kernel's name of a device is a path that can be made as it is: plain names, none of which leads away,
/// and none that every `/dev` has for something else.
fn is_plain(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_.:+".contains(&b);
    let parts: Vec<&str> = name.split('/').collect();
    let taken = ["fd", "stdin", "stdout", "stderr", "shm"];
    let plain = |part: &&str| !part.is_empty() && part.len() <= 64 && !part.starts_with('.') && part.bytes().all(legal);
    parts.len() <= 3 && parts.iter().all(plain) && !taken.contains(&parts[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_taken_from_the_kernel() {
        for good in ["loop0", "net/tun", "bus/usb/001", "nvme0n1", "cpu_dma_latency"] {
            assert!(is_plain(good), "{good}");
        }
        for bad in ["", "/", "..", "../x", "a//b", "a/../b", ".x", "a b", "shm", "fd/1", "a/b/c/d", "é"] {
            assert!(!is_plain(bad), "{bad}");
        }
    }
}
