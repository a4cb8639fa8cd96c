//! What the kernel tells of processes, in `/proc`.

use std::collections::BTreeMap;
use std::fs;

/// Memory of a process that no other has.
pub fn private_bytes(pid: u32) -> u64 {
    sum_of_kib(pid, "smaps_rollup", &["Private_Clean:", "Private_Dirty:"])
}

/// Memory of a process that is there at the moment.
pub fn resident_bytes(pid: u32) -> u64 {
    sum_of_kib(pid, "status", &["VmRSS:"])
}

/// The most that has been there since [`forget_peak`].
pub fn peak_bytes(pid: u32) -> u64 {
    sum_of_kib(pid, "status", &["VmHWM:"])
}

pub fn forget_peak(pid: u32) {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}

/// What the machine still has.
pub fn available_bytes() -> u64 {
    sum_of_kib_in(&fs::read_to_string("/proc/meminfo").unwrap(), &["MemAvailable:"])
}

fn sum_of_kib(pid: u32, file: &str, keys: &[&str]) -> u64 {
    // one that has ended has none
    sum_of_kib_in(&fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default(), keys)
}

fn sum_of_kib_in(text: &str, keys: &[&str]) -> u64 {
    let words = text.lines().map(|line| line.split_ascii_whitespace());
    let values =
        words.filter_map(|mut words| keys.contains(&words.next()?).then(|| words.next()?.parse::<u64>().ok())?);
    values.sum::<u64>() << 10
}

/// Descriptors that a process has open.
pub fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Mounts that a process sees.
pub fn mounts(pid: u32) -> usize {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default().lines().count()
}

/// `num_cgroups` of all controllers. Counts those that are removed and still have a page in memory.
pub fn kernel_cgroups() -> usize {
    let text = fs::read_to_string("/proc/cgroups").unwrap();
    text.lines().filter_map(|line| line.split('\t').nth(2)?.parse::<usize>().ok()).sum()
}

/// The children of a process, theirs, and so on.
pub fn descendants(pid: u32) -> Vec<u32> {
    let parents: BTreeMap<u32, u32> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(parents.iter().filter(|(_, of)| **of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

/// What this machine is, for a title.
pub fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!("{cpus} CPUs, Linux {}, load {load} before it began", kernel.trim_end())
}
