//! How the settings that only tenants have are written into a tenant's cgroup, and read back, on v1 and on v2.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::dir::Dir;
use super::machine::STANDARD_DEVICES;
use super::program;
use crate::ceiling::{CpuSet, DeviceNumber, DeviceRule, IoLimit};
use crate::sys::bpf::{self, Hook};

/// What both versions give a cgroup for which nothing is set.
const DEFAULT_IO_WEIGHT: u32 = 100;

/// The greatest weight of BFQ (`BFQ_MAX_WEIGHT`).
pub(super) const MOST_BFQ_WEIGHT: u32 = 1000;

fn confirmed(holds: bool) -> nix::Result<()> {
    if holds { Ok(()) } else { Err(Errno::EPROTO) }
}

/// As [`Dir::read`], with the errno alone.
fn read(dir: &Dir, file: &str) -> nix::Result<String> {
    dir.read(file).map_err(|error| crate::sys::process::errno_of(&error))
}

/// Gives a new v1 cgroup the CPUs and memory nodes of its parent: without any, nothing can be attached.
pub(super) fn inherit_cpus(parent: &Dir, dir: &Dir) -> nix::Result<()> {
    for (from, to) in [("cpuset.effective_cpus", "cpuset.cpus"), ("cpuset.effective_mems", "cpuset.mems")] {
        dir.write(to, read(parent, from)?.trim_end())?;
    }
    Ok(())
}

/// The CPUs that a cgroup can give away.
pub(super) fn cpus_of(dir: &Dir, v2: bool) -> nix::Result<CpuSet> {
    let text = read(dir, if v2 { "cpuset.cpus.effective" } else { "cpuset.effective_cpus" })?;
    text.trim_end().parse().map_err(|_| Errno::EPROTO)
}

/// Keeps a cgroup to `cpus`, or lets it have all of `parent`'s.
pub(super) fn set_cpus(parent: &Dir, dir: &Dir, v2: bool, cpus: Option<&CpuSet>) -> nix::Result<()> {
    match cpus {
        None if v2 => match dir.write("cpuset.cpus", "\n") {
            // while there are processes it must have some: all that there are, then
            Err(Errno::ENOSPC) => dir.write("cpuset.cpus", read(parent, "cpuset.cpus.effective")?.trim_end()),
            other => other,
        },
        None => inherit_cpus(parent, dir),
        Some(cpus) => {
            dir.write("cpuset.cpus", &cpus.to_string())?;
            confirmed(cpus_of(dir, v2)? == *cpus)
        }
    }
}

/// Replaces the rates in `old` by those in `new`.
pub(super) fn set_io(dir: &Dir, v2: bool, old: &[IoLimit], new: &[IoLimit]) -> nix::Result<()> {
    let kept = |device: DeviceNumber| new.iter().any(|io| io.device == device);
    let none = |device| IoLimit { device, read_bps: None, write_bps: None, read_iops: None, write_iops: None };
    let gone = old.iter().filter(|io| !kept(io.device)).map(|io| none(io.device));
    for (is_gone, io) in gone.map(|io| (true, io)).chain(new.iter().map(|io| (false, *io))) {
        match if v2 { limit_io_v2(dir, &io) } else { limit_io_v1(dir, &io) } {
            // a device that has been taken out has no rates either
            Err(Errno::ENODEV | Errno::ENXIO) if is_gone => {}
            other => other?,
        }
    }
    Ok(())
}

fn limit_io_v1(dir: &Dir, io: &IoLimit) -> nix::Result<()> {
    let files = [
        ("blkio.throttle.read_bps_device", io.read_bps),
        ("blkio.throttle.write_bps_device", io.write_bps),
        ("blkio.throttle.read_iops_device", io.read_iops),
        ("blkio.throttle.write_iops_device", io.write_iops),
    ];
    for (file, rate) in files {
        let line = format!("{} {}", io.device, rate.unwrap_or(0)); // 0 takes the rate away
        dir.write(file, &line)?;
        let is_there = read(dir, file)?.lines().any(|found| found == line);
        confirmed(is_there == rate.is_some())?;
    }
    Ok(())
}

fn limit_io_v2(dir: &Dir, io: &IoLimit) -> nix::Result<()> {
    let rates = [("rbps", io.read_bps), ("wbps", io.write_bps), ("riops", io.read_iops), ("wiops", io.write_iops)];
    let words =
        rates.map(|(key, rate)| format!("{key}={}", rate.map_or_else(|| "max".to_owned(), |rate| rate.to_string())));
    let device = io.device.to_string();
    dir.write("io.max", &format!("{device} {}", words.join(" ")))?;
    let text = read(dir, "io.max")?;
    let found: Option<Vec<&str>> =
        text.lines().map(|line| line.split(' ').collect()).find(|line: &Vec<&str>| line[0] == device);
    let meant = rates.iter().any(|(_, rate)| rate.is_some());
    confirmed(found.map_or(!meant, |found| words.iter().all(|word| found.contains(&word.as_str()))))
}

/// The files that weigh a cgroup's share of block devices: BFQ's on both versions, and on v2 that of `iocost`.
pub(super) const WEIGHTS: [(&str, bool); 3] =
    [("blkio.bfq.weight", false), ("io.bfq.weight", true), ("io.weight", true)];

/// Weighs a cgroup's share of block devices, in every way that the kernel has.
pub(super) fn weigh_io(dir: &Dir, v2: bool, weight: Option<u32>) -> nix::Result<()> {
    let weight = weight.unwrap_or(DEFAULT_IO_WEIGHT);
    for (file, _) in WEIGHTS.iter().filter(|(_, of_v2)| *of_v2 == v2) {
        if weight > MOST_BFQ_WEIGHT && file.contains("bfq") {
            continue; // which the caller has allowed only where another file takes it
        }
        match dir.write(file, &weight.to_string()) {
            Err(Errno::ENOENT) => continue,
            other => other?,
        }
        // a number, or `default N` before those of single devices
        let text = read(dir, file)?;
        let first = text.lines().next().unwrap_or_default();
        confirmed(first.strip_prefix("default ").unwrap_or(first).parse() == Ok(weight))?;
    }
    Ok(())
}

/// Lets a v1 cgroup open the standard devices and those in `rules`, and nothing else.
pub(super) fn allow_devices_v1(dir: &Dir, rules: &[DeviceRule]) -> nix::Result<()> {
    let line = |rule: &DeviceRule| {
        let kind = if rule.block { 'b' } else { 'c' };
        let access = match (rule.read, rule.write) {
            (true, false) => "r",
            (false, _) => "w",
            (true, true) => "rw",
        };
        format!("{kind} {} {access}", rule.device)
    };
    let mut meant: Vec<String> = STANDARD_DEVICES.iter().map(line).collect();
    let more = rules.iter().filter(|rule| !is_standard(rule)).map(line);
    meant.extend(more);
    let list = |dir| read(dir, "devices.list").map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    // only what differs: a device that jobs have now and keep is not to be refused to them in between
    let there = list(dir)?;
    if there.iter().any(|line| line.starts_with('a')) {
        dir.write("devices.deny", "a")?;
    }
    let there: Vec<String> = there.into_iter().filter(|line| !line.starts_with('a')).collect();
    for line in there.iter().filter(|line| !meant.contains(line)) {
        dir.write("devices.deny", line)?;
    }
    for line in meant.iter().filter(|line| !there.contains(line)) {
        dir.write("devices.allow", line)?;
    }
    let mut found = list(dir)?;
    found.sort();
    meant.sort();
    confirmed(found == meant)
}

fn is_standard(rule: &DeviceRule) -> bool {
    STANDARD_DEVICES.iter().any(|standard| (standard.block, standard.device) == (rule.block, rule.device))
}

/// The programs that are attached to a tenant's cgroup of v2.
#[derive(Debug, Default)]
pub(super) struct Programs {
    devices: Option<OwnedFd>,
    sockets: Option<OwnedFd>,
}

impl Programs {
    /// The same as [`allow_devices_v1`].
    pub(super) fn allow_devices(&mut self, dir: &Dir, rules: &[DeviceRule]) -> nix::Result<()> {
        replace(Hook::Device, dir, &program::of_devices(rules), &mut self.devices)
    }

    /// Gives the class and the priority to each socket that is made from now on.
    pub(super) fn mark_sockets(&mut self, dir: &Dir, class: Option<u32>, priority: Option<u32>) -> nix::Result<()> {
        if self.sockets.is_none() && class.is_none() && priority.is_none() {
            return Ok(());
        }
        replace(Hook::SocketCreation, dir, &program::of_sockets(class, priority), &mut self.sockets)
    }
}

fn replace(hook: Hook, dir: &Dir, program: &[bpf::Insn], attached: &mut Option<OwnedFd>) -> nix::Result<()> {
    // the kernel takes no descriptor that was opened for its path alone
    let dir = dir.open_file(".", nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_DIRECTORY)?;
    let program = bpf::load(hook, program)?;
    bpf::attach(hook, dir.as_fd(), program.as_fd(), attached.as_ref().map(AsFd::as_fd))?;
    *attached = Some(program);
    Ok(())
}

/// The sizes of huge pages that a cgroup can limit.
pub(super) fn huge_page_sizes(dir: &Dir) -> nix::Result<Vec<String>> {
    let size = |file: String| {
        let (size, rest) = file.strip_prefix("hugetlb.")?.split_once('.')?;
        matches!(rest, "max" | "limit_in_bytes").then(|| size.to_owned())
    };
    Ok(dir.entries(".")?.into_iter().filter_map(size).collect())
}

/// Limits huge pages of every size, both what is reserved by a map and what is touched; those of a size that is not in
/// `bytes` to none: the memory controller does not count them.
pub(super) fn limit_huge_pages(dir: &Dir, v2: bool, bytes: &BTreeMap<String, u64>) -> nix::Result<()> {
    let limit = if v2 { "max" } else { "limit_in_bytes" };
    for size in huge_page_sizes(dir)? {
        let bytes = bytes.get(&size).copied().unwrap_or(0);
        for (file, optional) in
            [(format!("hugetlb.{size}.{limit}"), false), (format!("hugetlb.{size}.rsvd.{limit}"), true)]
        {
            match dir.write(&file, &bytes.to_string()) {
                Err(Errno::ENOENT) if optional => {} // before Linux 5.7 nothing limits what is reserved
                other => {
                    other?;
                    dir.confirm(&file, bytes)?;
                }
            }
        }
    }
    Ok(())
}

pub(super) fn set_class_v1(dir: &Dir, class: Option<u32>) -> nix::Result<()> {
    dir.write("net_cls.classid", &class.unwrap_or(0).to_string())?;
    dir.confirm("net_cls.classid", class.unwrap_or(0).into())
}

/// Sets the priority on every interface that the host has now: v1 has no other way.
pub(super) fn set_priority_v1(dir: &Dir, priority: Option<u32>) -> nix::Result<()> {
    let priority = priority.unwrap_or(0);
    for line in read(dir, "net_prio.ifpriomap")?.lines() {
        let Some((interface, _)) = line.rsplit_once(' ') else { continue };
        match dir.write("net_prio.ifpriomap", &format!("{interface} {priority}")) {
            Err(Errno::ENODEV) => continue, // it has gone since
            other => other?,
        }
        let text = read(dir, "net_prio.ifpriomap")?;
        let found = text.lines().find_map(|line| line.strip_prefix(interface)?.strip_prefix(' '));
        confirmed(found.is_none_or(|found| found.parse() == Ok(priority)))?;
    }
    Ok(())
}
