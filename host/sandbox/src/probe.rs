//! What this machine can do: each requirement checked by itself, then all of them together in a trial sandbox.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use caps::{CapSet, Capability};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use crate::cgroup::extra::{Absence, Extra};
use crate::cgroup::{CgroupError, Plan};
use crate::error::{LaunchError, in_words};
use crate::limits::{Ceiling, Limits};
use crate::protocol::{FromLauncher, ToLauncher};
use crate::rootless::{self, RootlessError, on_host};
use crate::spec::{ArtifactId, Kind, SandboxId, SandboxSpec};
use crate::sys::process::landlock_abi;
use crate::uids::UidPool;
use crate::usage::Isolation;
use crate::wire::{Packets, RecvError};

/// How a requirement stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is met.
    Ok,
    /// Jobs are isolated, but something is weaker or smaller than it could be.
    Warn,
    /// Jobs cannot be isolated.
    Fail,
}

/// One requirement, what was found, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it; empty if nothing needs to be done.
    pub mend: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), mend: String::new() }
    }

    fn warn(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, found: found.into(), mend: mend.into() }
    }

    fn fail(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, found: found.into(), mend: mend.into() }
    }
}

/// The oldest kernel that has every call used: `CLONE_INTO_CGROUP` (5.7), `close_range` (5.9), `mount_setattr` (5.12),
/// Landlock (5.13), `cgroup.kill` (5.14).
const OLDEST_KERNEL: (u32, u32) = (5, 14);

/// Capabilities that the launcher cannot do without.
const NEEDED: [Capability; 8] = {
    use Capability::*;
    [CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_SYS_PTRACE, CAP_KILL, CAP_MKNOD, CAP_FOWNER, CAP_DAC_OVERRIDE]
};

/// The most open files that a job may ask for.
const MOST_OPEN_FILES: u64 = *Limits::OPEN_FILES.end() as u64;

/// Looks at every requirement. Changes nothing on the machine but the lock directory.
///
/// For an ordinary user this program then begins again in a user namespace, see [`rootless::enter`]; where that fails,
/// it is one more check, after what root would have.
#[must_use]
pub fn machine(lock_dir: &Path) -> Vec<Check> {
    let mut checks = look(lock_dir);
    if rootless::needed() {
        let Err(error) = rootless::enter(lock_dir);
        checks.push(refused_user(&error));
    }
    checks
}

fn look(lock_dir: &Path) -> Vec<Check> {
    let always = [
        kernel(),
        privileges(),
        namespaces(),
        cgroups(),
        freezer(),
        pressure(),
        landlock(),
        seccomp(),
        uids(lock_dir),
        open_files(),
        swap(),
        pids(),
        neighbours(),
    ];
    always.into_iter().chain(user_namespace()).chain(controllers()).collect()
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn kernel() -> Check {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let (major, minor) = OLDEST_KERNEL;
    match version(&release) {
        Some(found) if found >= OLDEST_KERNEL => Check::ok("kernel", release),
        _ => Check::fail("kernel", release, format!("run Linux {major}.{minor} or later")),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn privileges() -> Check {
    let effective: HashSet<Capability> = caps::read(None, CapSet::Effective).unwrap_or_default();
    let missing: Vec<String> = NEEDED.iter().filter(|c| !effective.contains(c)).map(ToString::to_string).collect();
    if !missing.is_empty() {
        let mend =
            "start holm as root, in a container with these capabilities added; the server itself drops all of them";
        return Check::fail("privileges", format!("missing {}", missing.join(", ")), mend);
    }
    if !effective.contains(&Capability::CAP_SYS_RESOURCE) {
        let mend = "grant CAP_SYS_RESOURCE for limits above the server's own hard limits";
        return Check::warn("privileges", "all needed ones, but not CAP_SYS_RESOURCE", mend);
    }
    Check::ok("privileges", "all needed capabilities")
}

/// What is weaker where Holm is not started by the host's root. `None` on the host.
fn user_namespace() -> Option<Check> {
    let found = "not the host's: the kernel's quotas of one user there (inotify instances, pending signals, namespaces) \
                 are shared by all jobs, and their device nodes are the host's own, on which jobs could see each \
                 other's file locks; all other layers are the same";
    let mend = "start holm as the host's root for quotas and nodes of each job's own; it drops all privilege";
    (!on_host()).then(|| Check::warn("user namespace", found, mend))
}

/// That an ordinary user cannot run Holm here, and why.
fn refused_user(error: &RootlessError) -> Check {
    let mend = "let the user have user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, \
                AppArmor), the package `uidmap` and subordinate ids; or start holm as root";
    Check::fail("ordinary user", in_words(error), mend)
}

fn namespaces() -> Check {
    let mut problems = Vec::new();
    for (name, sysctl) in [
        ("user", "user"),
        ("pid", "pid"),
        ("mnt", "mnt"),
        ("uts", "uts"),
        ("ipc", "ipc"),
        ("net", "net"),
        ("cgroup", "cgroup"),
    ] {
        if !Path::new(&format!("/proc/self/ns/{name}")).exists() {
            problems.push(format!("the kernel has no {name} namespaces"));
        } else if read(&format!("/proc/sys/user/max_{sysctl}_namespaces")).as_deref() == Some("0") {
            problems.push(format!("user.max_{sysctl}_namespaces is 0"));
        }
    }
    if problems.is_empty() {
        return Check::ok("namespaces", "user, pid, mount, uts, ipc, net, cgroup");
    }
    let mend = "use a kernel with all seven namespaces, and set user.max_*_namespaces by sysctl to some 10,000";
    Check::fail("namespaces", problems.join("; "), mend)
}

fn cgroups() -> Check {
    let usable = Plan::for_this_process().and_then(|plan| plan.check_room().map(|()| plan));
    match usable {
        Err(error @ CgroupError::Shared { .. }) => {
            let mend = "give holm a cgroup of its own: the unit `holm.service`, or before the command \
                        `systemd-run --scope -p Delegate=yes` (an ordinary user: `systemd-run --user --scope …`)";
            Check::fail("cgroups", in_words(&error), mend)
        }
        Ok(plan) => Check::ok("cgroups", format!("{}: cpu, cpuacct, memory, pids, freezer", plan.version())),
        Err(error) => {
            let mend = "mount the cgroup file systems writable; under systemd use the unit `holm.service`, or another with Delegate=yes";
            Check::fail("cgroups", in_words(&error), mend)
        }
    }
}

/// The controllers that only tenants' settings need: without one, jobs are isolated all the same.
fn controllers() -> Vec<Check> {
    // what hinders all of them is said where it hinders more
    let Ok(plan) = Plan::for_this_process() else { return Vec::new() };
    let check = |(extra, found): (Extra, Result<String, Absence>)| match found {
        Ok(found) => Check::ok(extra.v1_name(), found),
        Err(absence) => {
            let found = format!("{}: tenants cannot be given `limits` {}", absence.found, extra.settings());
            Check::warn(extra.v1_name(), found, absence.mend)
        }
    };
    plan.describe_extras().into_iter().map(check).collect()
}

fn freezer() -> Check {
    match Plan::for_this_process().as_ref().map(Plan::freezer_dir) {
        Ok((dir, true)) => Check::ok("freezer", format!("v2 `cgroup.freeze` at `{dir}`")),
        Ok((dir, false)) => Check::warn(
            "freezer",
            format!("v1 `freezer` at `{dir}`, whose tasks can only die when they are thawed for it"),
            "mount a v2 hierarchy beside it: mount -t cgroup2 none /sys/fs/cgroup/unified",
        ),
        // `cgroups` says why
        Err(_) => Check::warn("freezer", "unknown, as there are no cgroups to be had", "see cgroups"),
    }
}

fn pressure() -> Check {
    let v2 = Plan::for_this_process().is_ok_and(|plan| plan.freezer_dir().1);
    match (read("/proc/pressure/cpu").is_some(), v2) {
        (true, true) => Check::ok("pressure", "told for each job"),
        (false, _) => Check::warn("pressure", "the kernel tells none (PSI)", "boot with psi=1"),
        (true, false) => Check::warn(
            "pressure",
            "told for the machine, and not for jobs",
            "mount a v2 hierarchy beside those of v1: mount -t cgroup2 none /sys/fs/cgroup/unified",
        ),
    }
}

fn landlock() -> Check {
    match landlock_abi() {
        Ok(abi) if abi >= 6 => Check::ok("landlock", format!("ABI {abi}")),
        Ok(abi) => {
            let mend = "Linux 6.12 adds scopes for signals and abstract sockets; the namespaces forbid those too";
            Check::warn("landlock", format!("ABI {abi}"), mend)
        }
        Err(errno) => {
            let mend =
                "use a kernel built with CONFIG_SECURITY_LANDLOCK and boot it with `landlock` in the `lsm=` list";
            Check::fail("landlock", errno.desc(), mend)
        }
    }
}

fn seccomp() -> Check {
    let actions = read("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if ["kill_process", "errno", "allow"].iter().all(|action| actions.split(' ').any(|a| a == *action)) {
        return Check::ok("seccomp", actions);
    }
    Check::fail("seccomp", format!("actions: `{actions}`"), "use a kernel built with CONFIG_SECCOMP_FILTER")
}

fn uids(lock_dir: &Path) -> Check {
    match UidPool::claim(lock_dir) {
        Ok(_) => Check::ok("uids", "a block of uids for jobs is free"),
        Err(error) => {
            let mend = format!("make `{}` writable for who starts holm, on a local file system", lock_dir.display());
            Check::fail("uids", in_words(&error), mend)
        }
    }
}

fn open_files() -> Check {
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    let found = format!("hard limit {hard}");
    if hard >= MOST_OPEN_FILES {
        return Check::ok("open files", found);
    }
    let mend = format!(
        "raise the hard limit (`ulimit -Hn`, LimitNOFILE=) to {MOST_OPEN_FILES} or more; until then jobs cannot have more `open_files` than this"
    );
    Check::warn("open files", found, mend)
}

fn swap() -> Check {
    let swaps = read("/proc/swaps").unwrap_or_default().lines().count().saturating_sub(1);
    if swaps == 0 {
        return Check::ok("swap", "none");
    }
    let accounted = Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists()
        || Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    if accounted {
        return Check::ok("swap", "there is some, and it is accounted");
    }
    Check::warn("swap", "there is some, and it is not accounted", "boot with `swapaccount=1`, or turn swap off")
}

fn pids() -> Check {
    let max: u64 = read("/proc/sys/kernel/pid_max").and_then(|text| text.parse().ok()).unwrap_or(0);
    if max >= 1 << 17 {
        return Check::ok("pids", format!("kernel.pid_max is {max}"));
    }
    let mend = "raise kernel.pid_max by sysctl (up to 4194304) to run more jobs at once";
    Check::warn("pids", format!("kernel.pid_max is {max}, which bounds the jobs at once"), mend)
}

/// What lets neighbours on one machine learn of each other in spite of all walls.
fn neighbours() -> Check {
    let mut found = Vec::new();
    if read("/sys/devices/system/cpu/smt/active").as_deref() == Some("1") {
        found.push("SMT is on");
    }
    if read("/sys/kernel/mm/ksm/run").is_some_and(|run| run != "0") {
        found.push("KSM merges pages");
    }
    let vulnerable = fs::read_dir("/sys/devices/system/cpu/vulnerabilities").is_ok_and(|dir| {
        dir.flatten().any(|entry| fs::read_to_string(entry.path()).is_ok_and(|text| text.starts_with("Vulnerable")))
    });
    if vulnerable {
        found.push("a CPU vulnerability has no mitigation");
    }
    if found.is_empty() {
        return Check::ok("side channels", "SMT off, KSM off, mitigations on");
    }
    let mend = "for tenants that must not learn of each other: boot with `nosmt mitigations=auto`, and turn KSM off";
    Check::warn("side channels", found.join(", "), mend)
}

/// A trial that failed.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// A layer could not be applied.
    #[error("{0}")]
    Refused(#[source] LaunchError),
    /// The launcher could not come up: one sentence for each thing missing.
    #[error("{}", .0.join("; "))]
    Unable(Vec<String>),
    /// The launcher ended, or spoke out of turn.
    #[error("the launcher broke off: {0}")]
    Broken(String),
}

/// Waits for a configured launcher to come up.
///
/// # Errors
/// [`TrialError::Unable`] with everything that is missing.
pub fn wait_up(launcher: &Packets) -> Result<String, TrialError> {
    match receive(launcher)? {
        FromLauncher::Up { cgroup_version } => Ok(cgroup_version),
        FromLauncher::Unable(problems) => Err(TrialError::Unable(problems)),
        other => Err(TrialError::Broken(format!("{other:?}"))),
    }
}

/// Has a launcher make a native sandbox with every layer, and throws it away. `launcher` must be up, and blocking; the
/// id 0 must be free.
///
/// # Errors
/// The layer that could not be applied.
pub fn trial(launcher: &Packets) -> Result<Isolation, TrialError> {
    let broken = |error: std::io::Error| TrialError::Broken(error.to_string());
    let id = SandboxId(0);
    let (_channel, theirs) = Packets::pair().map_err(broken)?;
    let program = memfd_create(c"trial", MFdFlags::MFD_CLOEXEC).map_err(|errno| broken(errno.into()))?;
    let mut program = fs::File::from(program);
    program.write_all(b"never run").map_err(broken)?;
    let spec = trial_spec();
    launcher.send(&ToLauncher::Launch { id, spec }, &[OwnedFd::from(theirs), program.into()]).map_err(broken)?;
    let isolation = match receive(launcher)? {
        FromLauncher::Ready { isolation, .. } => *isolation,
        FromLauncher::Refused { error, .. } => return Err(TrialError::Refused(error)),
        other => return Err(TrialError::Broken(format!("{other:?}"))),
    };
    launcher.send(&ToLauncher::Kill(id), &[] as &[OwnedFd]).map_err(broken)?;
    match receive(launcher)? {
        FromLauncher::Ended { .. } => Ok(isolation),
        other => Err(TrialError::Broken(format!("{other:?}"))),
    }
}

fn receive(launcher: &Packets) -> Result<FromLauncher, TrialError> {
    let received = launcher.recv(|_: &FromLauncher| 0);
    received.map(|r| r.value).map_err(|error: RecvError| TrialError::Broken(error.to_string()))
}

fn trial_spec() -> SandboxSpec {
    let name = |text: &str| text.parse().unwrap_or_else(|_| unreachable!("`{text}` is a name"));
    let second = Duration::from_secs(1);
    SandboxSpec {
        artifact: ArtifactId([0; 32]),
        fresh_network: true,
        tenant: name("trial"),
        ceiling: Ceiling::default(),
        kind: Kind::Native,
        program: name("trial"),
        limits: Limits {
            memory_bytes: 16 << 20,
            cpu_millicores: 1000,
            cpu_weight: 100,
            cpu_time: second,
            wall_time: second,
            pids: 2,
            scratch_bytes: 1 << 20,
            scratch_inodes: 16,
            open_files: 16,
            stack_bytes: 1 << 20,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_compared_as_numbers() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("5.9"), Some((5, 9)));
        assert_eq!(version("nonsense"), None);
        assert!(version("5.9") < Some(OLDEST_KERNEL) && version("10.1") > Some(OLDEST_KERNEL));
    }

    #[test]
    fn whatever_is_not_met_says_how_to_mend_it() {
        let dir = tempfile::tempdir().unwrap();
        for check in look(dir.path()) {
            assert_eq!(check.status == Status::Ok, check.mend.is_empty(), "{check:?}");
            assert!(!check.found.is_empty(), "{check:?}");
        }
        let nowhere = uids(Path::new("/proc/nowhere"));
        assert!(nowhere.status == Status::Fail && nowhere.mend.contains("/proc/nowhere"));
    }
}
