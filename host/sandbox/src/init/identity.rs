//! Who the child is: session, groups, ids, keyring, limits, capabilities.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid};

use super::took_effect;
use crate::spec::{JOB_ID, Kind, SandboxSpec};
use crate::sys::process::{StoreBypass, disable_store_bypass, join_new_session_keyring, store_bypass};

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
    // the stack of Holm's own code is as the server's; the guest's has a limit of its own
    let stack = (spec.kind == Kind::Native).then_some((Resource::RLIMIT_STACK, spec.limits.stack_bytes));
    let same = RLIMITS.map(|(resource, value, _)| (resource, value));
    for (resource, value) in [(Resource::RLIMIT_NOFILE, files)].into_iter().chain(same).chain(stack) {
        setrlimit(resource, value, value)?;
        took_effect(getrlimit(resource)? == (value, value))?;
    }
    Ok(())
}

/// Empties the bounding set and then the five sets, in this order: dropping from the bounding set needs `CAP_SETPCAP`.
///
/// Must come before [`become_job_user`], which would lose that capability, and the sets once more after it.
pub(crate) fn empty_bounding_set() -> nix::Result<()> {
    // not asking of each whether it is there saves half of the calls
    for capability in caps::all() {
        match caps::drop(None, caps::CapSet::Bounding, capability) {
            Ok(()) => {}
            Err(_) => {
                let errno = nix::errno::Errno::last();
                // else this kernel does not know it
                if caps::has_cap(None, caps::CapSet::Bounding, capability).is_ok() {
                    return Err(errno);
                }
            }
        }
    }
    Ok(())
}

/// What a zygote needs in its own user namespace, to clone sandboxes and to write their maps.
const OF_A_ZYGOTE: [caps::Capability; 4] = [
    caps::Capability::CAP_SYS_ADMIN,
    caps::Capability::CAP_SETUID,
    caps::Capability::CAP_SETGID,
    caps::Capability::CAP_DAC_OVERRIDE,
];

/// Gives up every capability that a zygote does not need, for good.
pub(crate) fn keep_what_cloning_takes() -> nix::Result<()> {
    use caps::CapSet::{Ambient, Bounding, Effective, Inheritable, Permitted};
    let failed = |_| nix::errno::Errno::last();
    for capability in caps::all().into_iter().filter(|capability| !OF_A_ZYGOTE.contains(capability)) {
        if caps::has_cap(None, Bounding, capability).map_err(failed)? {
            caps::drop(None, Bounding, capability).map_err(failed)?;
        }
    }
    for set in [Ambient, Inheritable] {
        caps::clear(None, set).map_err(failed)?;
    }
    let kept = OF_A_ZYGOTE.into();
    caps::set(None, Effective, &kept).map_err(failed)?;
    caps::set(None, Permitted, &kept).map_err(failed)
}

/// Empties the effective, permitted, inheritable and ambient sets.
pub(crate) fn empty_capability_sets() -> nix::Result<()> {
    use caps::CapSet::{Ambient, Effective, Inheritable, Permitted};
    for set in [Ambient, Effective, Inheritable, Permitted] {
        caps::clear(None, set).map_err(|_| nix::errno::Errno::last())?;
    }
    Ok(())
}

/// Gives up speculative store bypass, a way to read what the process must not (Spectre variant 4), for good and for every
/// child. Where there is nothing to give up, or no way to, `holm doctor` tells what the kernel says of this CPU.
pub(crate) fn end_speculation() -> nix::Result<()> {
    match store_bypass()? {
        StoreBypass::OfThisThread => {
            disable_store_bypass()?;
            took_effect(store_bypass()? == StoreBypass::Disabled)
        }
        StoreBypass::Disabled | StoreBypass::OutOfReach => Ok(()),
    }
}

/// Makes the process one that nobody can attach to or read through `/proc`.
pub(crate) fn become_non_dumpable() -> nix::Result<()> {
    prctl::set_dumpable(false)?;
    took_effect(!prctl::get_dumpable()?)
}
