//! How a launcher comes to be: spawned by the server before that has threads, then cut off from everything but its
//! own root, its cgroups and its socket.

use std::collections::{BTreeSet, HashMap};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, mkdirat, umask};
use nix::unistd::{Pid, chdir, fchdir, getppid, pivot_root, setsid};

use super::networks::Networks;
use super::outbox::Outbox;
use super::sweeper::{self, Sweeper};
use super::{Launcher, ZygoteLimits, verify};
use crate::cgroup::{Plan, Tree};
use crate::error::in_words;
use crate::init::{identity, root};
use crate::protocol::{FromLauncher, LauncherConfig, ToLauncher, VERSION};
use crate::rootless;
use crate::sys::mount::{MountAttr, attach, clone_mount, clone_tree, make_all_private, new_mount, restrict};
use crate::sys::process::{SingleThreaded, inherited_fd, keep_capabilities_as_any_user};
use crate::sys::text;
use crate::uids::UidPool;
use crate::usage::Namespaces;
use crate::wire::Packets;
use crate::workload::Workload;

/// What the launcher keeps of the host's capabilities, each for the step named. The rest is dropped for good.
const KEPT: [caps::Capability; 11] = {
    use caps::Capability::*;
    [
        CAP_SYS_ADMIN,       // clone and map namespaces, make /dev's file system, delegate cgroups
        CAP_SETUID,          // write uid maps
        CAP_SETGID,          // write gid maps
        CAP_SYS_PTRACE,      // read back the namespaces of a non-dumpable process
        CAP_KILL,            // kill processes of other uids
        CAP_MKNOD,           // make the nodes of /dev
        CAP_FOWNER,          // set their modes
        CAP_DAC_OVERRIDE,    // write control files of the instance's cgroups, whoever they were delegated to
        CAP_DAC_READ_SEARCH, // open cgroups below directories of others
        CAP_SYS_NICE,        // attach processes with other capabilities to a cpuset
        CAP_SYS_RESOURCE,    // limits above the server's own, where the machine grants it
    ]
};

/// With a stricter one a job could not execute its own copy of the program.
const UMASK: Mode = Mode::S_IWGRP.union(Mode::S_IWOTH);

/// Facts about where the launcher lives, taken once.
pub(super) struct Place {
    pub(super) own_namespaces: Namespaces,
    /// System call filters that the launcher was itself started under; every sandbox inherits them.
    pub(super) own_filters: u32,
    pub(super) host_millicores: u32,
    /// In the host's user namespace, so that device nodes can be made.
    pub(super) on_host: bool,
    /// The process that makes network namespaces.
    pub(super) maker: Option<Pid>,
    sweeper: Option<Sweeper>,
}

impl Place {
    /// Whether this is a child that has nothing to do with sandboxes.
    pub(super) fn is_own(&self, pid: Pid) -> bool {
        self.maker == Some(pid) || self.sweeper.as_ref().is_some_and(|sweeper| sweeper.pid == pid)
    }

    /// Ends the sweeper, which finds nothing to do after an orderly end.
    pub(super) fn dismiss_sweeper(&mut self) {
        if let Some(sweeper) = self.sweeper.take() {
            sweeper.dismiss();
        }
    }
}

/// Starts a launcher: this same program under the name `argv0`, with nothing of this process but one socket. Gives
/// the server's end, blocking, and the child.
///
/// The program is executed through a read-only clone of its mount, so that not even host root could write to it
/// through `/proc/PID/exe` (CVE-2019-5736).
///
/// # Errors
/// Those of making the socket, of cloning the mount (`EPERM` without `CAP_SYS_ADMIN`), and of the exec.
pub fn spawn(argv0: &str) -> io::Result<(Packets, Child)> {
    let program = clone_mount(AT_FDCWD, c"/proc/self/exe")?;
    restrict(program.as_fd(), MountAttr::RDONLY | MountAttr::NOSUID | MountAttr::NODEV)?;
    let (ours, theirs) = Packets::pair()?;
    let child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
        .arg0(argv0)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()?;
    Ok((ours, child))
}

/// The whole life of a launcher process. Call first thing in `main`, when the program was started by [`spawn`].
/// Gives the process's exit code: 0 after an orderly end, 71 (`EX_OSERR`) if it could not come up or broke.
#[must_use]
pub fn launcher_main(workload: &dyn Workload) -> i32 {
    let Ok(proof) = SingleThreaded::prove() else { return 71 };
    // without them, everything takes a little longer
    let _ = text::move_to_huge_pages(&proof);
    // what is made for a sandbox, and its job, has this one, whatever the server was started with
    umask(UMASK);
    let Ok(mut outbox) = take_socket() else { return 71 };
    let Ok(received) = outbox.packets().recv(ToLauncher::fds) else {
        return 71;
    };
    let ToLauncher::Configure(config) = received.value else {
        return 71;
    };
    let foundation = match lay_foundation(&config) {
        Ok(foundation) => foundation,
        Err(problems) => {
            outbox.send(FromLauncher::Unable(problems));
            return 71;
        }
    };
    let cgroup_version = foundation.cgroup_version.to_owned();
    match settle(proof, workload, outbox, foundation) {
        Ok(mut launcher) => {
            launcher.outbox.send(FromLauncher::Up { cgroup_version });
            let result = launcher.outbox.packets().set_nonblocking().map_err(|e| crate::sys::process::errno_of(&e));
            if result.and_then(|()| launcher.run()).is_ok() { 0 } else { 71 }
        }
        Err((mut outbox, problem)) => {
            outbox.send(FromLauncher::Unable(vec![problem]));
            71
        }
    }
}

/// Takes the socket that [`spawn`] put where standard input would be.
fn take_socket() -> io::Result<Outbox> {
    let stdin = inherited_fd(0)?;
    let socket = stdin.try_clone()?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    std::mem::forget(stdin); // descriptor 0 now is /dev/null and stays that
    Ok(Outbox::new(Packets::from(socket)))
}

/// What has to be taken from the host before leaving it behind.
struct Foundation {
    cgroup_version: &'static str,
    uids: UidPool,
    tree: Tree,
    null: OwnedFd,
    host_millicores: u32,
    ahead: bool,
    limits: ZygoteLimits,
}

/// Claims uids and cgroups. Reports everything that is missing, not only the first.
fn lay_foundation(config: &LauncherConfig) -> Result<Foundation, Vec<String>> {
    let mut problems = Vec::new();
    if config.version != VERSION {
        problems
            .push(format!("the server speaks version {} of the launcher's protocol, not {VERSION}", config.version));
    }
    let uids = UidPool::claim(&config.lock_dir).and_then(|uids| uids.succeed(&config.instance));
    let uids = uids.map_err(|error| problems.push(in_words(&error))).ok();
    let plan = Plan::for_this_process().map_err(|error| problems.push(in_words(&error))).ok();
    let version = plan.as_ref().map(Plan::version);
    let make = |plan| Tree::make(plan, config.instance.as_str()).map_err(|error| problems.push(in_words(&error))).ok();
    let tree = plan.filter(|_| uids.is_some()).and_then(make);
    if let (Some(tree), true) = (&tree, config.preferred) {
        let preferred = tree.prefer(&[Pid::this(), getppid()]);
        let _ = preferred.map_err(|errno| problems.push(format!("take CPU time before all jobs: {}", errno.desc())));
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let null = null.map_err(|error| problems.push(format!("open `/dev/null`: {error}"))).ok();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match (uids, version, tree, null) {
        (Some(uids), Some(cgroup_version), Some(tree), Some(null)) if problems.is_empty() => Ok(Foundation {
            cgroup_version,
            uids,
            tree,
            null,
            ahead: config.ahead,
            limits: ZygoteLimits {
                zygotes: config.zygotes.max(1),
                zygote_idle: config.zygote_idle,
                memory_reserve: config.memory_reserve,
            },
            host_millicores: u32::try_from(cores).unwrap_or(u32::MAX).saturating_mul(1000),
        }),
        (_, _, tree, _) => {
            // nobody else would remove what has just been made
            tree.iter().for_each(|tree| tree.remains().sweep());
            Err(problems)
        }
    }
}

/// Leaves the host: own session, mounts, network and IPC; few capabilities; nothing to read in `/proc` for others.
fn settle<'w>(
    proof: SingleThreaded,
    workload: &'w dyn Workload,
    outbox: Outbox,
    foundation: Foundation,
) -> Result<Launcher<'w>, (Outbox, String)> {
    let Foundation { uids, tree, null, host_millicores, ahead, limits, .. } = foundation;
    let mut sweeper = None;
    let prepared = (|| -> Result<(Namespaces, u32, Epoll, Networks), String> {
        let fail = |what: &'static str| move |error: nix::errno::Errno| format!("{what}: {}", error.desc());
        // a terminal's Ctrl-C is for the server, which then ends us in order
        setsid().map_err(fail("leave the terminal's session"))?;
        leave_mounts().map_err(fail("make a private root for the launcher"))?;
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC)
            .map_err(fail("leave the host's network and IPC namespaces"))?;
        prctl::set_name(c"holm-launcher").map_err(fail("set the process name"))?;
        let started = sweeper::start(&proof, &tree.remains(), uids.claim_fd());
        sweeper = Some(started.map_err(fail("fork the sweeper"))?);
        raise_open_files();
        keep_capabilities_as_any_user().map_err(fail("keep capabilities"))?;
        keep_few_capabilities().map_err(|error| format!("drop capabilities: {error}"))?;
        identity::become_non_dumpable().map_err(fail("become non-dumpable"))?;
        let networks = Networks::start(&proof, ahead).map_err(fail("fork the maker of network namespaces"))?;
        let namespaces = verify::namespaces_of(Pid::this()).map_err(|error| format!("read own namespaces: {error}"))?;
        let filters = verify::filters_of(Pid::this()).map_err(|error| format!("read own filters: {error}"))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(fail("make an epoll instance"))?;
        Ok((namespaces, filters, epoll, networks))
    })();
    match prepared {
        Err(problem) => {
            tree.remains().sweep();
            if let Some(sweeper) = sweeper {
                sweeper.dismiss();
            }
            Err((outbox, problem))
        }
        Ok((own_namespaces, own_filters, epoll, networks)) => Ok(Launcher {
            proof,
            workload,
            place: Place {
                own_namespaces,
                own_filters,
                host_millicores,
                on_host: rootless::on_host(),
                maker: networks.maker_pid(),
                sweeper,
            },
            outbox,
            epoll,
            tree,
            uids,
            null,
            ahead,
            networks,
            filters: HashMap::new(),
            live: HashMap::new(),
            expected: HashMap::new(),
            zygotes: HashMap::new(),
            families: HashMap::new(),
            numbers: 0,
            limits,
            look_at_zygotes: None,
            strangers_until: None,
            alarms: BTreeSet::new(),
            leaving: Vec::new(),
            freezing: Vec::new(),
            listings: Vec::new(),
            busy: Vec::new(),
            dev: None,
            stock_up_for: None,
            last_launch: Instant::now(),
            warm: None,
        }),
    }
}

/// Makes a root that holds a `/proc`, an empty directory and, for an ordinary user, devices, and moves there. The fewer
/// mounts, the less a clone has to copy; and nothing of the host has a path here that a child could be made to follow.
///
/// The `/proc` must be an unmasked one: the kernel lets a job mount its own only where one is visible.
fn leave_mounts() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    make_all_private()?;
    let proc = unmasked_proc()?;
    let devices = if rootless::on_host() { Vec::new() } else { root::take_devices()? };
    let options = [(c"size", c"4k"), (c"nr_inodes", c"16"), (c"mode", c"0755")];
    let home = new_mount(c"tmpfs", &options, MountAttr::NOSUID | MountAttr::NODEV | MountAttr::NOEXEC)?;
    mkdirat(&home, "proc", Mode::from_bits_truncate(0o555))?;
    mkdirat(&home, "new", Mode::from_bits_truncate(0o755))?;
    // any directory serves to attach it, as all is left behind at once: the working directory of a server is `/`
    attach(home.as_fd(), AT_FDCWD, c"/proc")?;
    attach(proc.as_fd(), home.as_fd(), c"proc")?;
    if !devices.is_empty() {
        root::attach_devices(&home, &devices)?;
    }
    restrict(home.as_fd(), MountAttr::RDONLY)?;
    fchdir(&home)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    debug_assert_eq!(root::MOUNT_POINT, c"/new");
    Ok(())
}

/// A `/proc`: a new one, or in a user namespace that does not own the pid namespace, a copy of the one there is.
fn unmasked_proc() -> nix::Result<OwnedFd> {
    match new_mount(c"proc", &[], MountAttr::NOSUID | MountAttr::NODEV | MountAttr::NOEXEC) {
        Err(nix::errno::Errno::EPERM) => clone_tree(AT_FDCWD, c"/proc"),
        other => other,
    }
}

/// Raises the number of open files to the hard limit: each sandbox takes some ten.
fn raise_open_files() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // a lower limit is still a limit: launches beyond it are refused
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn keep_few_capabilities() -> Result<(), caps::errors::CapsError> {
    use caps::CapSet;
    for capability in caps::all() {
        if !KEPT.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let kept: caps::CapsHashSet =
        caps::read(None, CapSet::Permitted)?.into_iter().filter(|capability| KEPT.contains(capability)).collect();
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}
