//! Who the child is: session, groups, ids, keyring, limits, capabilities.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid};

use super::took_effect;
use crate::spec::{JOB_ID, Kind, SandboxSpec};
use crate::sys::process::join_new_session_keyring;

/// Descriptors that Holm's own runtime holds inside a Wasm job, on top of what the guest opens.
const RUNTIME_FILES: u64 = 16;

/// Becomes root of the new user namespace, in a session of its own and with no supplementary groups.
pub(crate) fn become_namespace_root() -> nix::Result<()> {
    setsid()?;
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

/// Leaves the keyring of whoever started the server behind.
pub(crate) fn leave_keyring() -> nix::Result<()> {
    match join_new_session_keyring() {
        Err(nix::errno::Errno::ENOSYS) => Ok(()), // a kernel without keyrings has none to leave
        other => other,
    }
}

/// Becomes the job's own user, which owns nothing but `/tmp`.
pub(crate) fn become_job_user() -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(JOB_ID), Gid::from_raw(JOB_ID));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

/// Sets the limits that the kernel keeps per process or per uid. Never `RLIMIT_AS`: it breaks runtimes that reserve
/// address space, and the memory controller counts what is really used.
pub(crate) fn set_rlimits(spec: &SandboxSpec) -> nix::Result<()> {
    let files = u64::from(spec.limits.open_files);
    let limits = [
        (Resource::RLIMIT_NOFILE, if spec.kind == Kind::Wasm { files + RUNTIME_FILES } else { files }),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, 64 * 1024),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_RTPRIO, 0),
        (Resource::RLIMIT_NICE, 0),
        (Resource::RLIMIT_SIGPENDING, 1024),
    ];
    // the stack of Holm's own code is as the server's; the guest's has a limit of its own
    let stack = (spec.kind == Kind::Native).then_some((Resource::RLIMIT_STACK, spec.limits.stack_bytes));
    for (resource, value) in limits.into_iter().chain(stack) {
        setrlimit(resource, value, value)?;
        took_effect(getrlimit(resource)? == (value, value))?;
    }
    Ok(())
}

/// Empties the bounding set and then the five sets, in this order: dropping from the bounding set needs `CAP_SETPCAP`.
///
/// Must come before [`become_job_user`], which would lose that capability, and the sets once more after it.
pub(crate) fn empty_bounding_set() -> nix::Result<()> {
    caps::clear(None, caps::CapSet::Bounding).map_err(|_| nix::errno::Errno::last())
}

/// Empties the effective, permitted, inheritable and ambient sets.
pub(crate) fn empty_capability_sets() -> nix::Result<()> {
    use caps::CapSet::{Ambient, Effective, Inheritable, Permitted};
    for set in [Ambient, Effective, Inheritable, Permitted] {
        caps::clear(None, set).map_err(|_| nix::errno::Errno::last())?;
    }
    Ok(())
}

/// Makes the process one that nobody can attach to or read through `/proc`.
pub(crate) fn become_non_dumpable() -> nix::Result<()> {
    prctl::set_dumpable(false)?;
    took_effect(!prctl::get_dumpable()?)
}
