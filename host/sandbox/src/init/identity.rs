//! Who the child is: session, groups, ids, keyring, limits, capabilities.

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid};

use crate::spec::{JOB_ID, Kind, SandboxSpec};
use crate::sys::process::join_new_session_keyring;

/// Descriptors that Holm's own runtime holds inside a Wasm job, on top of what the guest opens.
const RUNTIME_FILES: u64 = 16;

/// Resource limits that are the same for every job. What a job's own limits set comes on top: open files, and the stack
/// of native programs. There is none on the address space, which would break language runtimes.
pub(crate) const RLIMITS: [(Resource, u64, &str); 6] = [
    (Resource::RLIMIT_CORE, 0, "no core file: nowhere to write it, nobody to read it"),
    (Resource::RLIMIT_MEMLOCK, 64 * 1024, "locked memory cannot be reclaimed"),
    (Resource::RLIMIT_MSGQUEUE, 0, "POSIX queues hold kernel memory"),
    (Resource::RLIMIT_RTPRIO, 0, "real-time scheduling would starve the host"),
    (Resource::RLIMIT_NICE, 0, "cpu_weight decides, not the job"),
    (Resource::RLIMIT_SIGPENDING, 1024, "queued signals and timers hold kernel memory"),
];

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
    let files = if spec.kind == Kind::Wasm { files + RUNTIME_FILES } else { files };
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
    for (resource, value, _) in RLIMITS {
        setrlimit(resource, value, value)?;
    }
    if spec.kind == Kind::Native {
        setrlimit(Resource::RLIMIT_STACK, spec.limits.stack_bytes, spec.limits.stack_bytes)?;
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
    prctl::set_dumpable(false)
}
