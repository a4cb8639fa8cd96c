//! Reads every layer of a sandbox back from the kernel, and refuses it where one is not as it was meant to be.
//!
//! A step that reported success is not proof that it had its effect (CVE-2025-52881: a label that was written to a
//! fake procfs). What is read here is also what the job's record shows as its isolation.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::live::{Live, is_child};
use super::start::Place;
use crate::cgroup::{Leaf, membership};
use crate::error::{AtStep, LaunchError, Step};
use crate::init::root;
use crate::init::seccomp::FILTERS;
use crate::paths::CgroupPaths;
use crate::spec::{IDS_PER_JOB, JOB_ID, Kind};
use crate::uids::RunIds;
use crate::usage::{Isolation, Namespaces};

/// More than most files of a process in `/proc` have, and more than any of those that are read here: what is cut off there
/// does not pass as whole.
const USUAL_SIZE: usize = 2048;
const MAX_SIZE: u64 = 1 << 20;

/// What can be read back of a sandbox as soon as it is attached, while it goes on with its steps.
pub(super) struct Seen {
    /// All but that of cgroups, which it may not have entered yet.
    namespaces: Namespaces,
    uid_map: String,
    cgroups: CgroupPaths,
}

/// Reads back what a sandbox has by its birth and its attach.
pub(super) fn look_early(place: &Place, live: &Live) -> Result<Seen, LaunchError> {
    let namespaces = Namespaces { cgroup: 0, ..namespaces_of(live.pid).at(Step::VerifyNamespaces)? };
    require(differ(&namespaces, &place.own_namespaces), Step::VerifyNamespaces)?;
    require(live.network.is_none_or(|made| made == namespaces.net), Step::VerifyNamespaces)?;
    let elder = live.zygote.as_ref().map(|zygote| zygote.namespaces);
    require(elder.is_none_or(|elder| differ(&namespaces, &elder)), Step::VerifyNamespaces)?;
    let uid_map = read(live.pid, "uid_map").at(Step::VerifyIds)?.split_whitespace().collect::<Vec<_>>().join(" ");
    require(uid_map == format!("0 {} {IDS_PER_JOB}", live.ids.first), Step::VerifyIds)?;
    let cgroups = cgroups_of(live.pid, &live.leaf).at(Step::VerifyCgroup)?;
    require(live.leaf.holds(&cgroups), Step::VerifyCgroup)?;
    Ok(Seen { namespaces, uid_map, cgroups: live.leaf.by_controller(&cgroups) })
}

/// The layers of a sandbox whose process `pid` says that it is ready.
pub(super) fn read_back(place: &Place, live: &Live, pid: Pid) -> Result<Isolation, LaunchError> {
    let seen = live.seen.as_ref().ok_or(Errno::EPROTO).at(Step::VerifyNamespaces)?;
    let cgroup = namespace_of(live.pid, "cgroup").at(Step::VerifyNamespaces)?;
    let namespaces = Namespaces { cgroup, ..seen.namespaces };
    require(cgroup != place.own_namespaces.cgroup, Step::VerifyNamespaces)?;

    let status = Status::of(pid).at(Step::VerifyPrivilege)?;
    let filters = place.own_filters + FILTERS;
    require(status.confined(filters), Step::VerifyPrivilege)?;
    if live.spec.kind == Kind::Native {
        // the pid came from the sandbox: only that it lives in the child's own namespaces makes it the sandbox's
        require(namespaces_of(pid).at(Step::VerifyNamespaces)? == namespaces, Step::VerifyNamespaces)?;
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

    let mounts = read(pid, "mountinfo").at(Step::VerifyMounts)?;
    require(root::is_whole(live.spec.kind, !place.on_host, &mounts), Step::VerifyMounts)?;

    Ok(Isolation {
        namespaces,
        recycled_network: live.zygote.as_ref().is_some_and(|zygote| zygote.used_network),
        seccomp: u8::try_from(status.number("Seccomp", 10)).unwrap_or_default(),
        seccomp_filters: u32::try_from(status.number("Seccomp_filters", 10)).unwrap_or_default(),
        no_new_privs: status.number("NoNewPrivs", 10) == 1,
        capabilities: status.capabilities(),
        landlock: true, // `landlock::prove` is a step before readiness
        uid_map: seen.uid_map.clone(),
        cgroups: seen.cgroups.clone(),
    })
}

/// The namespaces of a zygote that says that it has loaded its artifact; every layer that it is to have is looked for.
pub(super) fn read_back_zygote(place: &Place, pid: Pid, run: RunIds, leaf: &Leaf) -> Result<Namespaces, LaunchError> {
    let namespaces = namespaces_of(pid).at(Step::VerifyNamespaces)?;
    // of the seventh each sandbox makes its own, once it is attached
    let apart_from_cgroup = Namespaces { cgroup: 0, ..namespaces };
    require(differ(&apart_from_cgroup, &place.own_namespaces), Step::VerifyNamespaces)?;
    let status = Status::of(pid).at(Step::VerifyPrivilege)?;
    require(status.filtered(place.own_filters + FILTERS - 1), Step::VerifyPrivilege)?;
    require(status.only_id("Uid", run.first) && status.only_id("Gid", run.first), Step::VerifyIds)?;
    require(status.field("Groups").is_empty(), Step::VerifyIds)?;
    let uid_map = read(pid, "uid_map").at(Step::VerifyIds)?.split_whitespace().collect::<Vec<_>>().join(" ");
    require(uid_map == format!("0 {} {}", run.first, run.count), Step::VerifyIds)?;
    let mounts = read(pid, "mountinfo").at(Step::VerifyMounts)?;
    require(root::is_template(&mounts), Step::VerifyMounts)?;
    let cgroups = cgroups_of(pid, leaf).at(Step::VerifyCgroup)?;
    require(leaf.holds(&cgroups), Step::VerifyCgroup)?;
    Ok(namespaces)
}

/// The process of a pidfd that a zygote has sent, if it is this process's own child; else `EPROTO`. A zygote knows no
/// process but those of its family, and all children of this process but what a zygote has just cloned are in the books.
pub(super) fn own_child(pidfd: &OwnedFd) -> std::io::Result<Pid> {
    let unknown = || std::io::Error::from(Errno::EPROTO);
    let info = text(&format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    // another kind of descriptor has no such line, and a dead process -1
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
    let pid = Pid::from_raw(pid.filter(|pid| *pid > 1).ok_or_else(unknown)?);
    // of one on its way out too; its last words wait at its gate
    if is_child(pidfd)? { Ok(pid) } else { Err(unknown()) }
}

/// Whether none of the seven namespaces is the same.
fn differ(one: &Namespaces, other: &Namespaces) -> bool {
    one.named().iter().zip(other.named()).all(|(one, other)| one.1 != other.1)
}

fn require(holds: bool, step: Step) -> Result<(), LaunchError> {
    if holds { Ok(()) } else { Err(Errno::EPROTO).at(step) }
}

/// The inode numbers of a process's seven namespaces.
pub(super) fn namespaces_of(pid: Pid) -> std::io::Result<Namespaces> {
    let inode = |name| namespace_of(pid, name);
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

/// The cgroups of a process, as far as they are of a leaf's making or of its tenant's.
fn cgroups_of(pid: Pid, leaf: &Leaf) -> std::io::Result<CgroupPaths> {
    Ok(membership(&read(pid, "cgroup")?, |name| leaf.is_governed_by(name)))
}

/// That of one of them.
fn namespace_of(pid: Pid, name: &str) -> std::io::Result<u64> {
    let link = fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
    let link = link.to_string_lossy();
    // `mnt:[4026531841]`
    let number = link.split_once('[').and_then(|(_, rest)| rest.strip_suffix(']'));
    number.and_then(|n| n.parse().ok()).ok_or_else(|| Errno::EPROTO.into())
}

/// The number of system call filters on a process.
pub(super) fn filters_of(pid: Pid) -> std::io::Result<u32> {
    Status::of(pid)?.filters().ok_or_else(|| Errno::EPROTO.into())
}

fn read(pid: Pid, file: &str) -> std::io::Result<String> {
    text(&format!("/proc/{pid}/{file}"))
}

/// As `fs::read_to_string`, in two reads: the kernel tells no size of these files, so that one grows piece by piece.
fn text(path: &str) -> std::io::Result<String> {
    let mut text = String::with_capacity(USUAL_SIZE);
    File::open(path)?.take(MAX_SIZE).read_to_string(&mut text)?;
    Ok(text)
}

/// `/proc/PID/status`.
pub(crate) struct Status(String);

impl Status {
    fn of(pid: Pid) -> std::io::Result<Self> {
        Ok(Self::parse(&read(pid, "status")?))
    }

    pub(crate) fn parse(text: &str) -> Self {
        Self(text.to_owned())
    }

    fn field(&self, key: &str) -> &str {
        let value = self.0.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        value.unwrap_or_default().trim()
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
        self.capabilities() == 0 && self.filtered(filters)
    }

    /// `no_new_privs`, and seccomp in filter mode with this many filters.
    fn filtered(&self, filters: u32) -> bool {
        let filtered = self.number("Seccomp", 10) == 2 && self.filters() == Some(filters);
        self.number("NoNewPrivs", 10) == 1 && filtered
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
