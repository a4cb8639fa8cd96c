//! Room for the instance on cgroup v2, which gives controllers only to the children of a cgroup that has no processes of
//! its own ("no internal processes", `cgroups(7)`). So the server's own cgroup is emptied into a leaf below it,
//! [`SERVER_LEAF`], where the cgroup is its to arrange; another's is left alone.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::{Pid, geteuid, getppid};

use super::dir::Dir;
use super::hierarchy::{Hierarchy, SERVER_LEAF};
use super::{CgroupError, v2};
use crate::rootless::on_host;
use crate::sys::file::extended_attribute;

/// How often processes that are born meanwhile are moved as well.
const ROUNDS: u32 = 100;

/// What marks a cgroup that systemd has handed over (systemd, `CGROUP_DELEGATION.md`): the first for everybody, the
/// second, of older versions, for root.
const DELEGATED: [&std::ffi::CStr; 2] = [c"user.delegate", c"trusted.delegate"];

/// Gives `controllers` to the children of `base`, the directory of `hierarchy` in which the instance's will be. For the
/// launcher, whose parent is the server.
pub(super) fn delegate(base: &Dir, hierarchy: &Hierarchy, controllers: &[&str]) -> Result<(), CgroupError> {
    let path = || hierarchy.own_dir.display().to_string();
    let failed = |what, errno: Errno| CgroupError::Directory { what, path: path(), source: errno.into() };
    match v2::delegate(base, controllers) {
        Err(Errno::EBUSY | Errno::EOPNOTSUPP) => {}
        other => return other.map_err(|errno| failed("delegate the controllers of", errno)),
    }
    let others = others(base, &[Pid::this(), getppid()]).map_err(|errno| failed("list the processes of", errno))?;
    if !others.is_empty() && !is_ours(base, hierarchy) {
        return Err(CgroupError::Shared { path: path(), others });
    }
    empty(base).map_err(|errno| failed("move processes out of", errno))?;
    v2::delegate(base, controllers).map_err(|errno| failed("delegate the controllers of", errno))
}

/// Whether an instance of this process could be given `controllers`. Changes nothing.
pub(super) fn check(base: &Dir, hierarchy: &Hierarchy, controllers: &[&str]) -> Result<(), CgroupError> {
    let given = base.read("cgroup.subtree_control").unwrap_or_default();
    if controllers.iter().all(|controller| given.split_whitespace().any(|one| one == *controller)) {
        return Ok(());
    }
    // the root of all is exempt from the rule, and alone has no type
    let is_root = matches!(base.read("cgroup.type"), Err(error) if error.kind() == std::io::ErrorKind::NotFound);
    match others(base, &[Pid::this()]) {
        Ok(others) if !is_root && !others.is_empty() && !is_ours(base, hierarchy) => {
            Err(CgroupError::Shared { path: hierarchy.own_dir.display().to_string(), others })
        }
        _ => Ok(()),
    }
}

/// The processes in `base` except `known`, each with its name.
fn others(base: &Dir, known: &[Pid]) -> nix::Result<Vec<String>> {
    let processes = base.processes().map_err(|error| crate::sys::process::errno_of(&error))?;
    let strangers = processes.into_iter().filter(|pid| !known.contains(pid));
    let named = |pid: Pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("{pid} ({})", name.trim_end())
    };
    Ok(strangers.map(named).collect())
}

/// Whether the processes of `base` may be moved about in it: it has been delegated, or is all that there is to see in
/// this cgroup namespace, a container's, or belongs to the ordinary user that we are.
fn is_ours(base: &Dir, hierarchy: &Hierarchy) -> bool {
    let delegated =
        DELEGATED.iter().any(|name| extended_attribute(base.as_fd(), name).is_ok_and(|value| value == b"1"));
    delegated || hierarchy.own_path == "/" || (!(geteuid().is_root() && on_host()) && base.owner() == Ok(geteuid()))
}

/// Moves every process of `base` into the leaf.
fn empty(base: &Dir) -> nix::Result<()> {
    let leaf = base.make(SERVER_LEAF)?;
    for _ in 0..ROUNDS {
        let processes = base.processes().map_err(|error| crate::sys::process::errno_of(&error))?;
        if processes.is_empty() {
            return Ok(());
        }
        for pid in processes {
            match leaf.attach(pid) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    Err(Errno::EBUSY)
}
