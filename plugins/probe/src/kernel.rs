//! The parts of the kernel through which containers were left before, each tried as an attacker would: with arguments
//! that do something. Outside of a sandbox all of it is done on ground of its own (`raw::on_own_ground`).

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // arguments of system calls are 64 bits of anything

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::Result;
use crate::raw::{address, c_path, errno, in_child, shared, text, told_by_child, try_call};
use crate::sys::exit_now;

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

const NAMESPACES: [(&str, libc::c_int); 8] = [
    ("user", libc::CLONE_NEWUSER),
    ("pid", libc::CLONE_NEWPID),
    ("mnt", libc::CLONE_NEWNS),
    ("uts", libc::CLONE_NEWUTS),
    ("ipc", libc::CLONE_NEWIPC),
    ("net", libc::CLONE_NEWNET),
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("time", 0x80),
];

/// Every namespace by every way to it: `clone`, `clone3`, `unshare`, and `setns` by the files of the own process.
pub(crate) fn namespaces() -> Result<Value> {
    let mut all = Map::new();
    for (name, flag) in NAMESPACES {
        let flag = flag.cast_unsigned() as usize;
        let clone = || -> Result<i64> {
            // below the flag of the time namespace `clone` has the number of a signal
            if name == "time" { Ok(errno(-(libc::EINVAL as isize))) } else { told_by_child(|| new_child(flag)) }
        };
        let clone3 = told_by_child(|| {
            let args: [u64; 11] = [flag as u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, 0, 0, 0];
            let answer = try_call(libc::SYS_clone3, [address(&args), size_of_val(&args)]);
            if answer == 0 { exit_now(0) } else { errno(answer) }
        })?;
        let unshare = told_by_child(|| errno(try_call(libc::SYS_unshare, [flag])))?;
        let setns = told_by_child(|| match File::open(format!("/proc/self/ns/{name}")) {
            Ok(file) => errno(try_call(libc::SYS_setns, [file.as_raw_fd().cast_unsigned() as usize, flag])),
            Err(error) => 1000 + i64::from(error.raw_os_error().unwrap_or(0)),
        })?;
        all.insert(name.to_owned(), json!({"clone": clone()?, "clone3": clone3, "unshare": unshare, "setns": setns}));
    }
    let nested = told_by_child(|| {
        let user = errno(try_call(libc::SYS_unshare, [libc::CLONE_NEWUSER as usize]));
        if user == 0 { errno(try_call(libc::SYS_unshare, [libc::CLONE_NEWNET as usize])) } else { user }
    })?;
    all.insert("a network of a user's".to_owned(), json!(nested));
    Ok(all.into())
}

/// A child with these flags, which ends at once.
fn new_child(flags: usize) -> i64 {
    let answer = try_call(libc::SYS_clone, [flags | libc::SIGCHLD as usize]);
    if answer == 0 { exit_now(0) } else { errno(answer) }
}

/// Mounting, by the old calls and the new ones, and what may be done with a mount.
pub(crate) fn mounts() -> Result<Value> {
    let dir = std::env::temp_dir().join("mnt");
    fs::create_dir_all(&dir)?;
    let at = c_path(&dir)?;
    let at = text(&at);
    let here = libc::AT_FDCWD as usize;
    let mut all = Map::new();
    let mut told = |name: &str, answer: isize| {
        all.insert(name.to_owned(), json!(errno(answer)));
        answer.cast_unsigned()
    };
    told("mount", try_call(libc::SYS_mount, [text(c"tmpfs"), at, text(c"tmpfs"), 0, 0]));
    told("umount2", try_call(libc::SYS_umount2, [at, libc::MNT_DETACH as usize]));
    told("bind", try_call(libc::SYS_mount, [text(c"/proc"), at, 0, (libc::MS_BIND | libc::MS_REC) as usize, 0]));
    told("remount", try_call(libc::SYS_mount, [0, at, 0, (libc::MS_REMOUNT | libc::MS_BIND) as usize, 0]));
    try_call(libc::SYS_umount2, [at, libc::MNT_DETACH as usize]);

    let context = told("fsopen", try_call(libc::SYS_fsopen, [text(c"tmpfs"), 0]));
    told("fsconfig", try_call(libc::SYS_fsconfig, [context, 6, 0, 0, 0])); // FSCONFIG_CMD_CREATE
    let mount = told("fsmount", try_call(libc::SYS_fsmount, [context, 0, 0]));
    let read_only: [u64; 4] = [1, 0, 0, 0]; // struct mount_attr: MOUNT_ATTR_RDONLY to set
    let attr = [mount, text(c""), 0x1000 /* AT_EMPTY_PATH */, address(&read_only), size_of_val(&read_only)];
    told("mount_setattr", try_call(libc::SYS_mount_setattr, attr));
    told("move_mount", try_call(libc::SYS_move_mount, [mount, text(c""), here, at, 4])); // from an empty path
    let tree = told("open_tree", try_call(libc::SYS_open_tree, [here, at, 1])); // a clone
    told("fspick", try_call(libc::SYS_fspick, [here, at, 0]));
    told("chroot", try_call(libc::SYS_chroot, [at]));
    told("pivot_root", try_call(libc::SYS_pivot_root, [at, at]));
    told("open_tree_attr", try_call(467, [here, at, 1, address(&read_only), size_of_val(&read_only)]));
    for fd in [context, mount, tree] {
        if fd > 2 && fd < 1024 {
            try_call(libc::SYS_close, [fd]);
        }
    }
    Ok(all.into())
}

/// Mounts cgroup hierarchies, and looks for the file by which the host's root would run a program of ours. Nothing is
/// written to it.
pub(crate) fn release_agent() -> Result<Value> {
    let dir = std::env::temp_dir().join("cgroup");
    fs::create_dir_all(&dir)?;
    let at = c_path(&dir)?;
    let mut all = Map::new();
    for controller in [c"pids", c"memory", c"freezer"] {
        let mounted = try_call(libc::SYS_mount, [text(c"c"), text(&at), text(c"cgroup"), 0, text(controller)]);
        let agent = File::options().write(true).open(dir.join("release_agent"));
        let agent = agent.map_or_else(|error| i64::from(error.raw_os_error().unwrap_or(-1)), |_| 0);
        all.insert(controller.to_string_lossy().into_owned(), json!({"mount": errno(mounted), "agent": agent}));
        if mounted == 0 {
            try_call(libc::SYS_umount2, [text(&at), libc::MNT_DETACH as usize]);
        }
    }
    Ok(all.into())
}

/// A ring, and what can be done with it.
pub(crate) fn rings() -> Value {
    let mut parameters = [0_u64; 15];
    let ring = try_call(libc::SYS_io_uring_setup, [4, std::ptr::from_mut(&mut parameters) as usize]);
    let fd = ring.cast_unsigned();
    let enter = try_call(libc::SYS_io_uring_enter, [fd, 0, 0, 0, 0]);
    let event = try_call(libc::SYS_eventfd2, [0, 0]);
    let event = i32::try_from(event).unwrap_or(-1);
    let register = try_call(libc::SYS_io_uring_register, [fd, 4 /* an eventfd */, address(&event), 1]);
    json!({"setup": errno(ring), "enter": errno(enter), "register": errno(register)})
}

/// Keys made, asked for and read, in a child: they are of its own keyring and go with it.
pub(crate) fn keys() -> Result<Value> {
    const PROCESS_RING: usize = usize::MAX - 1;
    let told = shared(5)?;
    in_child(PATIENCE, || {
        let (kind, name) = (text(c"user"), text(c"holm-probe"));
        let join = try_call(libc::SYS_keyctl, [1, 0]); // a session keyring of its own
        let add = try_call(libc::SYS_add_key, [kind, name, text(c"x"), 1, PROCESS_RING]);
        let request = try_call(libc::SYS_request_key, [kind, name, 0, 0]);
        let mut secret = [0_u8; 8];
        let read = try_call(libc::SYS_keyctl, [11, add.cast_unsigned(), std::ptr::from_mut(&mut secret) as usize, 8]);
        let search = try_call(libc::SYS_keyctl, [10, PROCESS_RING, kind, name, 0]);
        for (slot, answer) in told.iter().zip([join, add, request, read, search]) {
            slot.store(errno(answer), std::sync::atomic::Ordering::SeqCst);
        }
    })?;
    let names = ["join_session", "add_key", "request_key", "read", "search"];
    let told = names.into_iter().zip(told).map(|(name, slot)| (name.to_owned(), json!(slot)));
    Ok(told.collect::<Map<_, _>>().into())
}

/// Copying between files and pipes within the kernel, where pages change hands instead of bytes; and a mapping of a
/// program that others could run, to be written to.
pub(crate) fn page_games() -> Result<Value> {
    let path = std::env::temp_dir().join("pages");
    fs::write(&path, [7; 4096])?;
    let (file, copy) = (File::open(&path)?, File::create(std::env::temp_dir().join("copy"))?);
    let ((out, into), (_out2, into2)) = (io::pipe()?, io::pipe()?);
    let fd = |of: &dyn AsRawFd| of.as_raw_fd().cast_unsigned() as usize;
    let page = [1_u8; 64];
    let vector = [address(&page), page.len()];
    let mut at = 0_i64;
    let at = std::ptr::from_mut(&mut at) as usize;
    let own = File::open("/proc/self/exe")?;
    let (protection, flags) = ((libc::PROT_READ | libc::PROT_WRITE) as usize, libc::MAP_SHARED as usize);
    let answers = [
        ("vmsplice", try_call(libc::SYS_vmsplice, [fd(&into), address(&vector), 1, 0])),
        ("splice", try_call(libc::SYS_splice, [fd(&file), at, fd(&into), 0, 16])),
        ("tee", try_call(libc::SYS_tee, [fd(&out), fd(&into2), 16])),
        ("sendfile", try_call(libc::SYS_sendfile, [fd(&into), fd(&file), 0, 16])),
        ("copy_file_range", try_call(libc::SYS_copy_file_range, [fd(&file), 0, fd(&copy), 0, 16, 0])),
        ("writable mapping of the program", try_call(libc::SYS_mmap, [0, 4096, protection, flags, fd(&own), 0])),
    ];
    Ok(answers.into_iter().map(|(name, answer)| (name.to_owned(), json!(errno(answer)))).collect::<Map<_, _>>().into())
}

/// Holds another process: `pid`, or a child of its own if that is 0.
pub(crate) fn attach(pid: i32) -> Result<Value> {
    let mut child = None;
    let target = if pid == 0 {
        match crate::sys::fork()? {
            crate::sys::Forked::Child => {
                std::thread::sleep(PATIENCE);
                exit_now(0)
            }
            crate::sys::Forked::Parent(new) => *child.insert(new),
        }
    } else {
        pid
    };
    let who = target.cast_unsigned() as usize;
    let ptrace = |request: usize| {
        told_by_child(|| errno(try_call(libc::SYS_ptrace, [request, who, 0, 0]))) // the tracer's end lets go
    };
    let byte = [0_u8; 8];
    let (own, theirs) = ([address(&byte), 8], [address(&PATIENCE), 8]);
    let vm = |number| errno(try_call(number, [who, address(&own), 1, address(&theirs), 1, 0]));
    let pidfd = try_call(libc::SYS_pidfd_open, [who]);
    let open = |path: String, write: bool| {
        let opened = File::options().read(true).write(write).open(path);
        opened.map_or_else(|error| i64::from(error.raw_os_error().unwrap_or(-1)), |_| 0)
    };
    let told = json!({
        "traceme": told_by_child(|| errno(try_call(libc::SYS_ptrace, [0, 0, 0, 0])))?,
        "attach": ptrace(16)?,
        "seize": ptrace(0x4206)?,
        "process_vm_readv": vm(libc::SYS_process_vm_readv),
        "kcmp": errno(try_call(libc::SYS_kcmp, [who, who, 2, 0, 0])),
        "pidfd_getfd": errno(try_call(libc::SYS_pidfd_getfd, [pidfd.cast_unsigned(), 1, 0])),
        "mem to read": open(format!("/proc/{target}/mem"), false),
        "mem to write": open(format!("/proc/{target}/mem"), true),
        "environ": open(format!("/proc/{target}/environ"), false),
    });
    if let Some(child) = child {
        crate::sys::kill(child, libc::SIGKILL);
        crate::sys::wait_for(child)?;
    }
    Ok(told)
}

/// Types a key into the terminal of its session; if it has none, tries to get one. Commands are given with and
/// without garbage in the half that the kernel drops.
pub(crate) fn type_keys() -> Result<Value> {
    const TIOCSTI: usize = 0x5412;
    const TIOCLINUX: usize = 0x541c;
    const HIGH: usize = 0x5413 << 32;
    let number = |file: io::Result<File>| {
        file.map_or_else(|e| -i64::from(e.raw_os_error().unwrap_or(0)), |f| i64::from(f.into_raw_fd()))
    };
    crate::sys::leave_session();
    let open = |path: &str| number(File::options().read(true).write(true).open(path));
    let (own, master) = (open("/dev/tty"), open("/dev/ptmx"));
    let master = usize::try_from(master).unwrap_or(0);
    let unlocked = 0_i32;
    try_call(libc::SYS_ioctl, [master, 0x4004_5431 /* TIOCSPTLCK */, address(&unlocked)]);
    let flags = (libc::O_RDWR | libc::O_NOCTTY).cast_unsigned() as usize;
    let peer = try_call(libc::SYS_ioctl, [master, 0x5441 /* TIOCGPTPEER */, flags]);
    let terminal = usize::try_from(peer).unwrap_or(0);
    let ask = |request: usize| errno(try_call(libc::SYS_ioctl, [terminal, request, text(c"k")]));
    Ok(json!({
        "own": own.min(0),
        "make": errno(peer),
        "control": errno(try_call(libc::SYS_ioctl, [terminal, 0x540e /* TIOCSCTTY */, 0])),
        "TIOCSTI": ask(TIOCSTI),
        "TIOCSTI with garbage": ask(TIOCSTI | HIGH),
        "TIOCLINUX": ask(TIOCLINUX),
        "TIOCLINUX with garbage": ask(TIOCLINUX | HIGH),
    }))
}

/// Out-of-band data on a Unix socket, by every call that sends and receives.
pub(crate) fn out_of_band() -> Result<Value> {
    let (one, other) = std::os::unix::net::UnixStream::pair()?;
    let (from, to) = (one.as_raw_fd().cast_unsigned() as usize, other.as_raw_fd().cast_unsigned() as usize);
    let oob = libc::MSG_OOB as usize;
    let mut byte = [b'x'; 8];
    let vector = [std::ptr::from_mut(&mut byte) as usize, 1];
    // struct msghdr: name, length of it, iov, their count, control, length of it, flags; mmsghdr has a count behind it
    let message: [usize; 8] = [0, 0, address(&vector), 1, 0, 0, 0, 0];
    let message = address(&message);
    let dont_wait = libc::MSG_DONTWAIT as usize;
    let bytes = std::ptr::from_mut(&mut byte) as usize;
    let answers = [
        ("sendto", try_call(libc::SYS_sendto, [from, bytes, 1, oob, 0, 0])),
        ("recvfrom", try_call(libc::SYS_recvfrom, [to, bytes, 1, oob | dont_wait, 0, 0])),
        ("sendmsg", try_call(libc::SYS_sendmsg, [from, message, oob])),
        ("recvmsg", try_call(libc::SYS_recvmsg, [to, message, oob | dont_wait])),
        ("sendmmsg", try_call(libc::SYS_sendmmsg, [from, message, 1, oob])),
        ("recvmmsg", try_call(libc::SYS_recvmmsg, [to, message, 1, oob | dont_wait, 0])),
        ("sendto with garbage", try_call(libc::SYS_sendto, [from, bytes, 1, oob | 7 << 40, 0, 0])),
        ("plain sendto", try_call(libc::SYS_sendto, [from, bytes, 1, 0, 0, 0])),
        ("plain recvfrom", try_call(libc::SYS_recvfrom, [to, bytes, 8, dont_wait, 0, 0])),
    ];
    Ok(answers.into_iter().map(|(name, answer)| (name.to_owned(), json!(errno(answer)))).collect::<Map<_, _>>().into())
}

/// Device nodes made in `/tmp`: by name the errno, and the one of opening it.
pub(crate) fn nodes() -> Result<Value> {
    let devices = [("mem", libc::S_IFCHR, 1, 1), ("null", libc::S_IFCHR, 1, 3), ("kmsg", libc::S_IFCHR, 1, 11)]
        .into_iter()
        .chain([("kvm", libc::S_IFCHR, 10, 232), ("disk", libc::S_IFBLK, 253, 0), ("fifo", libc::S_IFIFO, 0, 0)]);
    let mut all = Map::new();
    for (name, kind, major, minor) in devices {
        let path: PathBuf = std::env::temp_dir().join(format!("node-{name}"));
        let at = c_path(&path)?;
        let device = usize::try_from(libc::makedev(major, minor))?;
        let mode = (kind | 0o666) as usize;
        let old = errno(try_call(libc::SYS_mknod, [text(&at), mode, device]));
        let there = path.exists();
        let _ = fs::remove_file(&path);
        let new = errno(try_call(libc::SYS_mknodat, [libc::AT_FDCWD as usize, text(&at), mode, device]));
        all.insert(name.to_owned(), json!({"mknod": old, "mknodat": new, "there": there}));
    }
    Ok(all.into())
}

/// Sockets of every family, type and protocol up to these, by `socket` and `socketpair`: those that were made. Never
/// connected to anything. And every errno that there was.
pub(crate) fn socket_matrix(families: usize, kinds: usize, protocols: &[usize]) -> Value {
    let (mut made, mut pairs, mut errnos) = (Vec::new(), Vec::new(), std::collections::BTreeMap::<i64, u32>::new());
    let mut ends = [0_i32; 2];
    let ends = std::ptr::from_mut(&mut ends) as usize;
    for family in 0..=families {
        for kind in 0..=kinds {
            for protocol in protocols {
                let socket = try_call(libc::SYS_socket, [family, kind, *protocol]);
                let pair = try_call(libc::SYS_socketpair, [family, kind, *protocol, ends]);
                for (answer, list) in [(socket, &mut made), (pair, &mut pairs)] {
                    *errnos.entry(errno(answer)).or_default() += 1;
                    if errno(answer) == 0 {
                        list.push(json!([family, kind, protocol]));
                    }
                }
                if socket > 2 {
                    try_call(libc::SYS_close, [socket.cast_unsigned()]);
                }
                if pair == 0 {
                    try_call(libc::SYS_close_range, [3, 1 << 20, 0]);
                }
            }
        }
    }
    json!({"made": made, "pairs": pairs, "errnos": errnos})
}
