//! Reads every layer of a sandbox back from the kernel, and refuses it where one is not as it was meant to be.
//!
//! A step that reported success is not proof that it had its effect (CVE-2025-52881: a label that was written to a
//! fake procfs). What is read here is also what the job's record shows as its isolation.

use std::collections::HashMap;
use std::fs;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::live::Live;
use super::start::Place;
use crate::cgroup::membership;
use crate::error::{AtStep, LaunchError, Step};
use crate::init::root;
use crate::init::seccomp::FILTERS;
use crate::spec::{IDS_PER_JOB, JOB_ID, Kind};
use crate::usage::{Isolation, Namespaces};

/// The layers of a sandbox whose process `pid` says that it is ready.
pub(super) fn read_back(place: &Place, live: &Live, pid: Pid) -> Result<Isolation, LaunchError> {
    let namespaces = namespaces_of(pid).at(Step::VerifyNamespaces)?;
    let init_namespaces = namespaces_of(live.pid).at(Step::VerifyNamespaces)?;
    let fresh = namespaces.named().iter().zip(place.own_namespaces.named()).all(|(own, host)| own.1 != host.1);
    require(live.network.is_none_or(|made| made == namespaces.net), Step::VerifyNamespaces)?;
    // the pid came from the sandbox: only that it lives in the child's own namespaces makes it the sandbox's
    require(fresh && namespaces == init_namespaces, Step::VerifyNamespaces)?;

    let status = Status::of(pid).at(Step::VerifyPrivilege)?;
    let filters = place.own_filters + FILTERS;
    require(status.confined(filters), Step::VerifyPrivilege)?;
    if live.spec.kind == Kind::Native {
        let init = Status::of(live.pid).at(Step::VerifyPrivilege)?;
        require(init.confined(filters), Step::VerifyPrivilege)?;
    } else {
        require(pid == live.pid, Step::VerifyNamespaces)?;
    }

    let host_id = live.ids.first + JOB_ID;
    require(status.only_id("Uid", host_id) && status.only_id("Gid", host_id), Step::VerifyIds)?;
    require(status.field("Groups").is_empty(), Step::VerifyIds)?;
    // as seen from within, where pid 1 leads it
    require(status.field("NSsid").split_whitespace().last() == Some("1"), Step::VerifyIds)?;
    let uid_map = read(pid, "uid_map").at(Step::VerifyIds)?.split_whitespace().collect::<Vec<_>>().join(" ");
    require(uid_map == format!("0 {} {IDS_PER_JOB}", live.ids.first), Step::VerifyIds)?;

    let mounts = read(pid, "mountinfo").at(Step::VerifyMounts)?;
    require(root::is_whole(live.spec.kind, !place.on_host, &mounts), Step::VerifyMounts)?;

    let mut cgroups = membership(&read(pid, "cgroup").at(Step::VerifyCgroup)?);
    cgroups.retain(|name, _| live.leaf.is_governed_by(name));
    require(live.leaf.holds(&cgroups), Step::VerifyCgroup)?;

    Ok(Isolation {
        namespaces,
        seccomp: u8::try_from(status.number("Seccomp", 10)).unwrap_or_default(),
        seccomp_filters: u32::try_from(status.number("Seccomp_filters", 10)).unwrap_or_default(),
        no_new_privs: status.number("NoNewPrivs", 10) == 1,
        capabilities: status.capabilities(),
        landlock: true, // `landlock::prove` is a step before readiness
        uid_map,
        cgroups: live.leaf.by_controller(cgroups),
    })
}

fn require(holds: bool, step: Step) -> Result<(), LaunchError> {
    if holds { Ok(()) } else { Err(Errno::EPROTO).at(step) }
}

/// The inode numbers of a process's seven namespaces.
pub(super) fn namespaces_of(pid: Pid) -> std::io::Result<Namespaces> {
    let inode = |name: &str| -> std::io::Result<u64> {
        let link = fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
        let link = link.to_string_lossy();
        // `mnt:[4026531841]`
        let number = link.split_once('[').and_then(|(_, rest)| rest.strip_suffix(']'));
        number.and_then(|n| n.parse().ok()).ok_or_else(|| Errno::EPROTO.into())
    };
    Ok(Namespaces {
        user: inode("user")?,
        pid: inode("pid")?,
        mnt: inode("mnt")?,
        uts: inode("uts")?,
        ipc: inode("ipc")?,
        net: inode("net")?,
        cgroup: inode("cgroup")?,
    })
}

/// The number of system call filters on a process.
pub(super) fn filters_of(pid: Pid) -> std::io::Result<u32> {
    Status::of(pid)?.filters().ok_or_else(|| Errno::EPROTO.into())
}

fn read(pid: Pid, file: &str) -> std::io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/{file}"))
}

/// `/proc/PID/status`.
pub(crate) struct Status(HashMap<String, String>);

impl Status {
    fn of(pid: Pid) -> std::io::Result<Self> {
        Ok(Self::parse(&read(pid, "status")?))
    }

    pub(crate) fn parse(text: &str) -> Self {
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        Self(fields.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect())
    }

    fn field(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    /// A numeric field; one that is missing or malformed is the number that no check accepts.
    fn number(&self, key: &str, radix: u32) -> u64 {
        u64::from_str_radix(self.field(key), radix).unwrap_or(u64::MAX)
    }

    fn capabilities(&self) -> u64 {
        ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].iter().fold(0, |all, set| all | self.number(set, 16))
    }

    /// Shown since Linux 5.9.
    fn filters(&self) -> Option<u32> {
        self.field("Seccomp_filters").parse().ok()
    }

    /// No capability, `no_new_privs`, and seccomp in filter mode with this many filters.
    pub(crate) fn confined(&self, filters: u32) -> bool {
        let filtered = self.number("Seccomp", 10) == 2 && self.filters() == Some(filters);
        self.capabilities() == 0 && self.number("NoNewPrivs", 10) == 1 && filtered
    }

    /// Real, effective, saved and file-system id are all `id`.
    pub(crate) fn only_id(&self, field: &str, id: u32) -> bool {
        let ids: Vec<&str> = self.field(field).split_whitespace().collect();
        ids.len() == 4 && ids.iter().all(|text| text.parse() == Ok(id))
    }
}

#[cfg(test)]
mod tests {
    use super::Status;

    const CONFINED: &str = "\
Name:\techo
Uid:\t1879048193\t1879048193\t1879048193\t1879048193
Gid:\t1879048193\t1879048193\t1879048193\t1879048193
Groups:\t 
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t2
";

    #[test]
    fn a_confined_status_passes() {
        let status = Status::parse(CONFINED);
        assert!(status.confined(2));
        assert!(status.only_id("Uid", 1_879_048_193) && status.field("Groups").is_empty());
    }

    #[test]
    fn each_missing_layer_is_noticed() {
        let weaker = [
            ("CapBnd:\t0000000000000000", "CapBnd:\t0000000000000400"),
            ("CapAmb:\t0000000000000000\n", ""),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
            ("Seccomp:\t2", "Seccomp:\t0"),
            ("Seccomp:\t2\n", ""),
            ("Seccomp_filters:\t2", "Seccomp_filters:\t1"),
        ];
        for (from, to) in weaker {
            assert!(!Status::parse(&CONFINED.replacen(from, to, 1)).confined(2), "{from} -> {to:?}");
        }
        assert!(!Status::parse(&CONFINED.replacen("1879048193", "0", 1)).only_id("Uid", 1_879_048_193));
        assert!(!Status::parse("").only_id("Uid", 0));
    }
}
