//! The host's own share of CPU time: server and launcher come before the jobs.
//!
//! Without one they wait for the CPU up to 0.7 s at a time while some jobs fork without end, though these have no more
//! weight than they (Linux 6.18; outside of Holm it is the same). Not beside the tenants in the instance's cgroup: there
//! they would share with the jobs what that has of a machine that is busy with other things.

use nix::errno::Errno;
use nix::unistd::Pid;

use super::control::Control;
use super::dir::Dir;
use super::hierarchy::SERVER_LEAF;

/// 100 is the usual one. With ten times that, the storm above is felt for 40 ms at a time, with this for 6.
const WEIGHT: u32 = 3200;

/// What their cgroup on v1 is called, beside that of the instance.
fn name_of(instance: &str) -> String {
    format!("server-of-{instance}")
}

/// On v1: moves `processes` from `base`, the directory of the CPU's hierarchy that holds the cgroup `instance`, into one of
/// their own.
pub(super) fn move_in(base: &Dir, instance: &str, processes: &[Pid]) -> nix::Result<()> {
    let host = base.make(&name_of(instance))?;
    Control::new(&host, false).weigh_cpu(WEIGHT)?;
    processes.iter().try_for_each(|pid| host.attach(*pid))
}

/// Undoes [`move_in`], whoever is there. False if that takes another try.
pub(super) fn move_out(base: &Dir, instance: &str) -> bool {
    let name = name_of(instance);
    let Ok(host) = base.child(&name) else { return true };
    for pid in host.processes().unwrap_or_default() {
        // it may have ended by now
        let _ = base.attach(pid);
    }
    base.remove(&name).is_ok()
}

/// On v2: weighs the leaf that they are in.
pub(super) fn weigh_leaf(base: &Dir) -> nix::Result<()> {
    own_leaf(base)?.map_or(Ok(()), |leaf| Control::new(&leaf, true).weigh_cpu(WEIGHT))
}

/// On v2: the leaf below `base` that they are in. There is none where `base` is the root of all.
pub(super) fn own_leaf(base: &Dir) -> nix::Result<Option<Dir>> {
    match base.child(SERVER_LEAF) {
        Ok(leaf) => Ok(Some(leaf)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}
