//! The private root: a fresh tmpfs that only this sandbox has, assembled by descriptor and pivoted into.
//!
//! What there is in which kind of sandbox is [`mounts`], [`DEVICES`] and, everywhere, the file of [`LANDLOCK_PROOF`].
//!
//! No file of the host is bound in, none of its paths is resolved: the launcher's own root, which the child starts
//! in, holds nothing but `/proc` and an empty directory to mount on.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, fchmodat, fstat, makedev, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, chdir, fchdir, getgid, getuid, pivot_root, setfsgid, setfsuid, symlinkat};

use crate::cgroup::Node;
use crate::error::{AtStep, LaunchError, Step};
use crate::name::Name;
use crate::spec::{JOB_ID, Kind, SandboxSpec};
use crate::sys::mount::{MountAttr, attach, clone_mount, new_mount, restrict};

/// Where the launcher's own root has its empty directory.
pub(crate) const MOUNT_POINT: &CStr = c"/new";

/// A file in every sandbox's root that Landlock lets nobody open; see `landlock::prove`.
pub(crate) const LANDLOCK_PROOF: &str = ".landlock";

/// What the root tmpfs holds besides the program: directories and a proof file, a page each at most.
const ROOT_OVERHEAD_BYTES: u64 = 64 * 1024;
const ROOT_INODES: &CStr = c"32";

/// The devices of `/dev`: name, major, minor. The six that every container runtime has.
pub(crate) const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// What `/dev` holds by itself, and what each listed device adds with two directories above it.
const DEV_BYTES: u64 = 4096;
const DEV_INODES: u64 = 16;
const DEV_NODE_BYTES: u64 = 4096;
const DEV_NODE_INODES: u64 = 3;

/// Of a program.
const COPIED_AT_ONCE: usize = 128 * 1024;

/// Symbolic links of `/dev`, by convention; `shm` makes POSIX shared memory part of the sized `/tmp`.
const DEV_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("shm", "/tmp"),
];

/// One mount of a sandbox.
pub(crate) struct Mount {
    pub(crate) at: &'static CStr,
    pub(crate) fs: &'static CStr,
    /// As tenant code finds it.
    pub(crate) attr: MountAttr,
    pub(crate) why: &'static str,
}

const BASE: MountAttr = MountAttr::NOSUID.and(MountAttr::NODEV);
const NATIVE_ROOT: Mount = Mount {
    at: c"/",
    fs: c"tmpfs",
    attr: BASE.and(MountAttr::RDONLY),
    why: "directories, and in /bin the program: a copy of the job's own",
};
const BARE_ROOT: Mount = Mount {
    at: c"/",
    fs: c"tmpfs",
    attr: BASE.and(MountAttr::RDONLY).and(MountAttr::NOEXEC),
    why: "directories to mount on, nothing else",
};
const DEV: Mount = Mount {
    at: c"/dev",
    fs: c"tmpfs",
    attr: MountAttr::NOSUID.and(MountAttr::NOEXEC).and(MountAttr::RDONLY),
    why: "the devices below, and those that the tenant's `devices` list; each job has nodes of its own",
};
const PROC: Mount = Mount {
    at: c"/proc",
    fs: c"proc",
    attr: BASE.and(MountAttr::NOEXEC).and(MountAttr::RDONLY),
    why: "the job's own processes (subset=pid, hidepid=invisible); no file about the host",
};
const TMP: Mount = Mount {
    at: c"/tmp",
    fs: c"tmpfs",
    attr: BASE.and(MountAttr::NOEXEC),
    why: "the only place to write; sized by scratch_bytes and scratch_inodes, charged to the job's memory",
};

/// The mounts of one kind of sandbox, the root first.
pub(crate) fn mounts(kind: Kind) -> &'static [Mount] {
    match kind {
        Kind::Native => &[NATIVE_ROOT, DEV, PROC, TMP],
        Kind::Wasm => &[BARE_ROOT, TMP],
        Kind::Compile => &[BARE_ROOT],
    }
}

impl Mount {
    /// Attributes to make it with: it can still be built, until [`Mount::seal`].
    fn open(&self) -> MountAttr {
        MountAttr(self.attr.0 & !MountAttr::RDONLY.0)
    }

    /// Makes it as tenant code shall find it.
    fn seal(&self, mount: BorrowedFd<'_>) -> nix::Result<()> {
        restrict(mount, self.attr)
    }
}

/// Of each device that is the host's own.
const BOUND_DEVICE: MountAttr = MountAttr::NOSUID.and(MountAttr::NOEXEC);

/// Makes `/dev` with the standard devices and `nodes`, which belong to the host's id `owner`; not attached anywhere. For
/// the launcher: device nodes can only be made with the host's privilege.
///
/// Each sandbox has its own, so that the nodes' inodes (locks, timestamps) are no channel between jobs.
pub(crate) fn make_dev(nodes: &[Node], owner: u32) -> nix::Result<OwnedFd> {
    let dev = new_dev(nodes.len() as u64)?;
    for (name, major, minor) in DEVICES {
        make_node(&dev, name, SFlag::S_IFCHR, 0o666, makedev(major.into(), minor.into()))?;
    }
    for (name, target) in DEV_LINKS {
        symlinkat(target, &dev, name)?;
    }
    for node in nodes {
        make_listed(&dev, node, owner)?;
    }
    DEV.seal(dev.as_fd())?;
    Ok(dev)
}

/// An empty `/dev` with room for so many nodes beside the standard ones.
fn new_dev(nodes: u64) -> nix::Result<OwnedFd> {
    let (size, inodes) = (decimal(DEV_BYTES + DEV_NODE_BYTES * nodes)?, decimal(DEV_INODES + DEV_NODE_INODES * nodes)?);
    new_mount(DEV.fs, &[(c"size", &size), (c"nr_inodes", &inodes), (c"mode", c"0755")], DEV.open())
}

/// Makes the node of a device that the tenant's `devices` list, with the directories above it.
fn make_listed(dev: &OwnedFd, node: &Node, owner: u32) -> nix::Result<()> {
    let rule = &node.rule;
    for (end, _) in node.path.match_indices('/') {
        match mkdirat(dev, &node.path[..end], Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    let kind = if rule.block { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
    let mode = if rule.read { 0o400 } else { 0 } | if rule.write { 0o200 } else { 0 };
    let device = makedev(rule.device.major.into(), rule.device.minor.into());
    // made by its owner, as it were: to give a file away takes a capability that the launcher does not keep
    setfsuid(Uid::from_raw(owner));
    setfsgid(Gid::from_raw(owner));
    let made = make_node(dev, &node.path, kind, mode, device);
    setfsuid(getuid());
    setfsgid(getgid());
    match made {
        // one of the standard six, which is there already, and more open than this
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

/// Makes a node with exactly this mode, whatever the umask.
fn make_node(dev: &OwnedFd, path: &str, kind: SFlag, mode: libc::mode_t, device: u64) -> nix::Result<()> {
    mknodat(dev, path, kind, Mode::from_bits_truncate(mode), device)?;
    fchmodat(dev, path, Mode::from_bits_truncate(mode), nix::sys::stat::FchmodatFlags::FollowSymlink)
}

/// Makes `/dev` in `root` where device nodes cannot be made, in a user namespace of an ordinary user: the host's own,
/// mounted on files. The launcher's root has them, see [`bind_devices`].
fn bind_dev(root: &OwnedFd) -> nix::Result<()> {
    let dev = new_dev(0)?;
    for (name, target) in DEV_LINKS {
        symlinkat(target, &dev, name)?;
    }
    for (name, ..) in DEVICES {
        create(&dev, name, 0o666)?;
    }
    // a mount can be attached only to one that is attached itself
    attach(dev.as_fd(), root.as_fd(), c"dev")?;
    for (name, major, minor) in DEVICES {
        let node = clone_device(c"/dev", name, major, minor)?;
        restrict(node.as_fd(), BOUND_DEVICE)?;
        attach(node.as_fd(), dev.as_fd(), &CString::new(name).map_err(|_| Errno::EINVAL)?)?;
    }
    DEV.seal(dev.as_fd())
}

/// The mounts of the host's devices, not attached anywhere, for [`attach_devices`].
pub(crate) fn take_devices() -> nix::Result<Vec<OwnedFd>> {
    DEVICES.iter().map(|(name, major, minor)| clone_device(c"/dev", name, *major, *minor)).collect()
}

/// Attaches what [`take_devices`] has given in `home`, the launcher's root, as `dev`.
pub(crate) fn attach_devices(home: &OwnedFd, devices: &[OwnedFd]) -> nix::Result<()> {
    mkdirat(home, "dev", Mode::from_bits_truncate(0o755))?;
    for ((name, ..), device) in DEVICES.iter().zip(devices) {
        let at = format!("dev/{name}");
        create(home, &at, 0o444)?;
        attach(device.as_fd(), home.as_fd(), &CString::new(at).map_err(|_| Errno::EINVAL)?)?;
    }
    Ok(())
}

/// A mount of the device `name` in the directory `dir`, not attached anywhere. `ENODEV` if it is another one.
fn clone_device(dir: &CStr, name: &str, major: u32, minor: u32) -> nix::Result<OwnedFd> {
    let path = CString::new([dir.to_bytes(), b"/", name.as_bytes()].concat()).map_err(|_| Errno::EINVAL)?;
    let node = clone_mount(AT_FDCWD, &path)?;
    let stat = fstat(&node)?;
    let character = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    if character && stat.st_rdev == makedev(major.into(), minor.into()) { Ok(node) } else { Err(Errno::ENODEV) }
}

/// Builds the root of `spec`, pivots into it and lets the old one go. `program` is the ELF of a native job, `dev` its
/// `/dev`, where the launcher could make one.
pub(crate) fn enter(spec: &SandboxSpec, program: BorrowedFd<'_>, dev: Option<&OwnedFd>) -> Result<(), LaunchError> {
    let native = spec.kind == Kind::Native;
    let root = make_root(spec.kind, native.then_some((&spec.program, program)))?;
    if spec.kind != Kind::Compile {
        let tmp = make_tmp(spec).at(Step::MountTmp)?;
        attach(tmp.as_fd(), root.as_fd(), c"tmp").at(Step::MountTmp)?;
    }
    if native {
        match dev {
            Some(dev) => attach(dev.as_fd(), root.as_fd(), c"dev").at(Step::MountDev)?,
            None => bind_dev(&root).at(Step::MountDev)?,
        }
        let options = [(c"subset", c"pid"), (c"hidepid", c"invisible")];
        let proc = new_mount(PROC.fs, &options, PROC.attr).at(Step::MountProc)?;
        attach(proc.as_fd(), root.as_fd(), c"proc").at(Step::MountProc)?;
    }
    root_of(spec.kind).seal(root.as_fd()).at(Step::SealRoot)?;
    pivot(&root).at(Step::PivotRoot)
}

/// As [`enter`], for a zygote: the root that sandboxes have a copy of, and no file of a job's in it.
pub(crate) fn enter_template(kind: Kind) -> Result<(), LaunchError> {
    let root = make_root(kind, None)?;
    root_of(kind).seal(root.as_fd()).at(Step::SealRoot)?;
    pivot(&root).at(Step::PivotRoot)
}

/// Completes the copy of a zygote's root that a sandbox was born in. Of that root it shares the inodes of two directories
/// and of the proof file with others of the same zygote: WebAssembly, the only kind that has one, opens neither.
pub(crate) fn complete_copy(spec: &SandboxSpec) -> Result<(), LaunchError> {
    let tmp = make_tmp(spec).at(Step::MountTmp)?;
    attach(tmp.as_fd(), AT_FDCWD, c"tmp").at(Step::MountTmp)
}

/// Whether `mountinfo`, the content of a sandbox's `/proc/PID/mountinfo`, shows its root as [`enter`] makes it, and no
/// mount more. With `bound`, the devices of a native sandbox are the host's.
pub(crate) fn is_whole(kind: Kind, bound: bool, mountinfo: &str) -> bool {
    let meant: &[(&str, &str, &[&str])] = match kind {
        Kind::Native => &[
            ("/", "tmpfs", &["ro", "nosuid", "nodev"]),
            ("/dev", "tmpfs", &["ro", "nosuid", "noexec"]),
            ("/proc", "proc", &["ro", "nosuid", "nodev", "noexec"]),
            ("/tmp", "tmpfs", &["nosuid", "nodev", "noexec"]),
        ],
        Kind::Wasm => {
            &[("/", "tmpfs", &["ro", "nosuid", "nodev", "noexec"]), ("/tmp", "tmpfs", &["nosuid", "nodev", "noexec"])]
        }
        Kind::Compile => &[("/", "tmpfs", &["ro", "nosuid", "nodev", "noexec"])],
    };
    shows(mountinfo, bound, kind == Kind::Native, meant)
}

/// Whether `mountinfo`, the content of a zygote's `/proc/PID/mountinfo`, shows its root as [`enter_template`] makes it, and
/// no mount more.
pub(crate) fn is_template(mountinfo: &str) -> bool {
    shows(mountinfo, false, false, &[("/", "tmpfs", &["ro", "nosuid", "nodev", "noexec"])])
}

/// Whether `mountinfo` shows the mounts that are `meant`: where, of what type, with which options. With `bound`, the
/// devices of a `native` root are the host's.
fn shows(mountinfo: &str, bound: bool, native: bool, meant: &[(&str, &str, &[&str])]) -> bool {
    // `36 35 98:0 /root /mount/point options [fields…] - type source super,options`
    let mut mounts: Vec<(&str, &str, &str)> = Vec::new();
    let mut devices: Vec<&str> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { return false };
        let mut left = left.split(' ').skip(4);
        let (Some(at), Some(options), Some(kind)) = (left.next(), left.next(), right.split(' ').next()) else {
            return false;
        };
        match at.strip_prefix("/dev/") {
            // what it shows, the sandbox has made sure of itself
            Some(device) if bound && ["nosuid", "noexec"].iter().all(|o| options.split(',').any(|has| has == *o)) => {
                devices.push(device);
            }
            _ => mounts.push((at, kind, options)),
        }
    }
    mounts.sort_unstable(); // kernels differ in the order
    devices.sort_unstable();
    let mut named: Vec<&str> = DEVICES.iter().map(|(name, ..)| *name).collect();
    named.sort_unstable();
    let devices_as_meant = if bound && native { devices == named } else { devices.is_empty() };
    let as_meant = |mount: &(&str, &str, &str), meant: &(&str, &str, &[&str])| {
        (mount.0, mount.1) == (meant.0, meant.1)
            && meant.2.iter().all(|option| mount.2.split(',').any(|o| o == *option))
    };
    devices_as_meant
        && mounts.len() == meant.len()
        && mounts.iter().zip(meant).all(|(mount, meant)| as_meant(mount, meant))
}

/// The root of one kind of sandbox, attached, with a native one's program in it.
fn make_root(kind: Kind, program: Option<(&Name, BorrowedFd<'_>)>) -> Result<OwnedFd, LaunchError> {
    let program_bytes = program.map_or(Ok(0), |(_, program)| program_size(program)).at(Step::CopyProgram)?;
    let size = decimal(program_bytes + ROOT_OVERHEAD_BYTES).at(Step::MakeRoot)?;
    let options = [(c"size", size.as_c_str()), (c"nr_inodes", ROOT_INODES), (c"mode", c"0755")];
    let mount = root_of(kind);
    let root = new_mount(mount.fs, &options, mount.open()).at(Step::MakeRoot)?;
    attach(root.as_fd(), AT_FDCWD, MOUNT_POINT).at(Step::MakeRoot)?;
    let directories: &[&str] = match kind {
        Kind::Native => &["bin", "dev", "proc", "tmp"],
        Kind::Wasm => &["tmp"],
        Kind::Compile => &[],
    };
    for name in directories {
        mkdirat(&root, *name, Mode::from_bits_truncate(0o755)).at(Step::MakeRoot)?;
    }
    create(&root, LANDLOCK_PROOF, 0o444).at(Step::MakeRoot)?;
    if let Some((name, program)) = program {
        let copy = create(&root, &format!("bin/{name}"), 0o555).at(Step::CopyProgram)?;
        copy_program(program, &copy, program_bytes).at(Step::CopyProgram)?;
    }
    Ok(root)
}

fn make_tmp(spec: &SandboxSpec) -> nix::Result<OwnedFd> {
    let size = decimal(spec.limits.scratch_bytes)?;
    // the kernel counts the root directory as one of them
    let inodes = decimal(spec.limits.scratch_inodes + 1)?;
    let id = decimal(JOB_ID.into())?;
    let options = [
        (c"size", size.as_c_str()),
        (c"nr_inodes", inodes.as_c_str()),
        (c"mode", c"0700"),
        (c"uid", id.as_c_str()),
        (c"gid", id.as_c_str()),
    ];
    new_mount(TMP.fs, &options, TMP.attr)
}

fn root_of(kind: Kind) -> &'static Mount {
    &mounts(kind)[0]
}

/// The size of the program, which must be a regular file: the descriptor comes from the unprivileged server.
fn program_size(program: BorrowedFd<'_>) -> nix::Result<u64> {
    let stat = fstat(program)?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(Errno::EINVAL);
    }
    u64::try_from(stat.st_size).map_err(|_| Errno::EINVAL)
}

/// Copies the program within the kernel, so that it is charged to the job as tmpfs pages only. The job gets a copy
/// of its own: an inode shared between jobs could be locked, and a page-cache bug would reach all of them.
fn copy_program(program: BorrowedFd<'_>, copy: &OwnedFd, bytes: u64) -> nix::Result<()> {
    let source = File::from(program.try_clone_to_owned().map_err(|e| crate::sys::process::errno_of(&e))?);
    let mut buffer = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX).min(COPIED_AT_ONCE)];
    let mut at = 0;
    while at < bytes {
        let n = source.read_at(&mut buffer, at).map_err(|e| crate::sys::process::errno_of(&e))?;
        if n == 0 {
            return Err(Errno::EIO); // shorter than it said
        }
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            let written = nix::unistd::write(copy, rest)?;
            rest = &rest[written..];
        }
        at += n as u64;
    }
    Ok(())
}

fn create(root: &OwnedFd, path: &str, mode: libc::mode_t) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    openat(root, path, flags, Mode::from_bits_truncate(mode))
}

/// Makes `root` the root of the mount namespace. With `.` for both arguments the old root is mounted over the new
/// one, so that detaching it leaves no path to any earlier mount (`pivot_root(2)`, "pivot_root(".", ".")").
fn pivot(root: &OwnedFd) -> nix::Result<()> {
    fchdir(root)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    // the working directory must be the new root itself, not a directory of a mount that is gone (CVE-2024-21626)
    let (here, there) = (nix::sys::stat::stat(".")?, fstat(root)?);
    if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) { Ok(()) } else { Err(Errno::ESTALE) }
}

fn decimal(number: u64) -> nix::Result<CString> {
    CString::new(number.to_string()).map_err(|_| Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WASM: &str = "\
93 45 0:50 / /tmp rw,nosuid,nodev,noexec,relatime - tmpfs none rw,size=1024k,nr_inodes=65,mode=700
91 45 0:40 / / ro,nosuid,nodev,noexec,relatime - tmpfs none rw,size=64k,nr_inodes=32,mode=755
";

    #[test]
    fn a_root_as_it_was_made_is_whole() {
        assert!(is_whole(Kind::Wasm, false, WASM));
        assert!(
            !is_whole(Kind::Native, false, WASM)
                && !is_whole(Kind::Compile, false, WASM)
                && !is_whole(Kind::Wasm, false, "")
        );
    }

    #[test]
    fn the_host_s_devices_are_all_there_or_none() {
        let mount = |at: &str, fs: &str, options: &str| format!("9 4 0:5 / {at} {options} - {fs} none rw\n");
        let bare = [
            mount("/", "tmpfs", "ro,nosuid,nodev"),
            mount("/dev", "tmpfs", "ro,nosuid,noexec"),
            mount("/proc", "proc", "ro,nosuid,nodev,noexec"),
            mount("/tmp", "tmpfs", "rw,nosuid,nodev,noexec"),
        ]
        .concat();
        let device = |name: &str| mount(&format!("/dev/{name}"), "devtmpfs", "rw,nosuid,noexec");
        let devices: String = DEVICES.iter().map(|(name, ..)| device(name)).collect();
        assert!(is_whole(Kind::Native, false, &bare) && !is_whole(Kind::Native, true, &bare));
        let bound = bare.clone() + &devices;
        assert!(is_whole(Kind::Native, true, &bound) && !is_whole(Kind::Native, false, &bound));
        assert!(!is_whole(Kind::Native, true, &(bound.clone() + &device("kmsg"))));
        assert!(!is_whole(Kind::Native, true, &bound.replacen("rw,nosuid,noexec", "rw,noexec", 1)));
        assert!(!is_whole(Kind::Wasm, true, &format!("{WASM}{devices}")));
    }

    #[test]
    fn a_mount_too_many_or_too_open_is_noticed() {
        let more = "84 45 0:41 / /proc rw,nosuid,nodev,noexec - proc none rw\n";
        assert!(!is_whole(Kind::Wasm, false, &format!("{WASM}{more}")));
        for (from, to) in [("/ / ro,", "/ / rw,"), ("/tmp rw,nosuid,", "/tmp rw,"), ("/tmp", "/t"), ("tmpfs", "ext4")] {
            assert!(!is_whole(Kind::Wasm, false, &WASM.replacen(from, to, 1)), "{from} -> {to}");
        }
    }
}
