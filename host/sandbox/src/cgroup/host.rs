//! The host's own share of CPU time: server and launcher are a neighbour of the tenants that comes first.
//!
//! Beside the instance's cgroup, instead of in it, they wait for the CPU up to 0.7 s at a time while 32 jobs fork
//! without end, though these have no more weight than they (Linux 6.18; outside of Holm it is the same). In it, with
//! this much more weight than a tenant has, it is a few milliseconds. Compared with everything else on the machine they
//! count as before, with their jobs, for one.

use nix::errno::Errno;
use nix::unistd::Pid;

use super::control::Control;
use super::dir::Dir;
use super::hierarchy::SERVER_LEAF;

/// Where they are on v1. No tenant can be called that.
pub(super) const HOST: &str = "_host";

/// A tenant's is 100.
const WEIGHT: u32 = 1000;

/// On v1: moves `processes` into the cgroup `HOST` of the instance's `root`, in the hierarchy of the CPU.
pub(super) fn move_in(root: &Dir, processes: &[Pid]) -> nix::Result<()> {
    let host = root.make(HOST)?;
    Control::new(&host, false).weigh_cpu(WEIGHT)?;
    processes.iter().try_for_each(|pid| host.attach(*pid))
}

/// On v1: moves everything that is in `HOST` of `root` back to `base`, and removes it.
pub(super) fn move_out(base: &Dir, root: &Dir) {
    let Ok(host) = root.child(HOST) else { return };
    for pid in host.processes().unwrap_or_default() {
        // it may have ended by now
        let _ = base.attach(pid);
    }
    // what cannot be removed now is at the next round of the sweep
    let _ = root.remove(HOST);
}

/// On v2: weighs the leaf below `base` that they are in. There is none where `base` is the root of all.
pub(super) fn weigh_leaf(base: &Dir) -> nix::Result<()> {
    match base.child(SERVER_LEAF) {
        Ok(leaf) => Control::new(&leaf, true).weigh_cpu(WEIGHT),
        Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}
