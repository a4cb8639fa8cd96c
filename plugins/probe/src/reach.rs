//! Reaching for what is not the job's: files, devices, system calls, other processes. Each tells what came of it.
//!
//! Nothing here changes what it reaches: outside of a sandbox, where most of it succeeds, no harm is done.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::sys::{self, raw};
use crate::{Result, say};

/// Files and directories that one search looks at.
const MAX_ENTRIES: usize = 5000;

/// For each path the errno of opening it to read and to write; 0 is success.
pub(crate) fn open(paths: &[&str]) -> Value {
    let errno = |result: io::Result<File>| result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |_| 0);
    let tried = paths.iter().map(|path| {
        let (read, write) = (File::open(path), OpenOptions::new().write(true).open(path));
        ((*path).to_owned(), json!({"read": errno(read), "write": errno(write)}))
    });
    tried.collect::<Map<_, _>>().into()
}

/// The directories below `root` in which a file can be made, and the files that can be opened to be written to.
pub(crate) fn writable(root: &str) -> Value {
    let (mut directories, mut files, mut devices, mut seen) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut waiting = vec![PathBuf::from(root)];
    while let Some(path) = waiting.pop() {
        let Ok(kind) = fs::symlink_metadata(&path).map(|metadata| metadata.file_type()) else { continue };
        seen += 1;
        if kind.is_dir() {
            let new = path.join(format!(".probe-{}", std::process::id()));
            if File::create_new(&new).is_ok() {
                let _ = fs::remove_file(&new);
                directories.push(path.clone());
            }
            if seen < MAX_ENTRIES {
                waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
            }
        } else if !kind.is_symlink() && OpenOptions::new().write(true).open(&path).is_ok() {
            if kind.is_char_device() { &mut devices } else { &mut files }.push(path);
        }
    }
    let sorted = |mut paths: Vec<PathBuf>| {
        paths.sort();
        paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
    };
    json!({"directories": sorted(directories), "files": sorted(files), "devices": sorted(devices), "seen": seen})
}

/// The errno of each system call that a sandbox refuses, made with arguments that do nothing where it is let through.
pub(crate) fn forbidden_calls() -> Value {
    const NONE: usize = usize::MAX; // no descriptor, no process
    const HERE: usize = 1; // no address
    let calls: &[(&str, libc::c_long, [usize; 5])] = &[
        ("acct", libc::SYS_acct, [HERE, 0, 0, 0, 0]),
        ("add_key", libc::SYS_add_key, [0, 0, 0, 0, 0]),
        ("adjtimex", libc::SYS_adjtimex, [0, 0, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [NONE, 0, 0, 0, 0]),
        ("capset", libc::SYS_capset, [0, 0, 0, 0, 0]),
        ("chroot", libc::SYS_chroot, [0, 0, 0, 0, 0]),
        ("clock_settime", libc::SYS_clock_settime, [NONE, 0, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0]),
        ("fanotify_init", libc::SYS_fanotify_init, [NONE, 0, 0, 0, 0]),
        ("fsconfig", libc::SYS_fsconfig, [NONE, 0, 0, 0, 0]),
        ("fsmount", libc::SYS_fsmount, [NONE, 0, 0, 0, 0]),
        ("fsopen", libc::SYS_fsopen, [0, 0, 0, 0, 0]),
        ("fspick", libc::SYS_fspick, [NONE, 0, NONE, 0, 0]),
        ("io_setup", libc::SYS_io_setup, [0, 0, 0, 0, 0]),
        ("io_uring_enter", libc::SYS_io_uring_enter, [NONE, 0, 0, 0, 0]),
        ("io_uring_register", libc::SYS_io_uring_register, [NONE, 0, 0, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0, 0, 0]),
        ("ioperm", libc::SYS_ioperm, [NONE, 1, 0, 0, 0]),
        ("iopl", libc::SYS_iopl, [99, 0, 0, 0, 0]),
        ("kcmp", libc::SYS_kcmp, [NONE, NONE, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, 0xffff_fffd, 0, 0, 0]), // the session keyring's number
        ("landlock_create_ruleset", libc::SYS_landlock_create_ruleset, [0, 0, 1, 0, 0]),
        ("memfd_secret", libc::SYS_memfd_secret, [NONE, 0, 0, 0, 0]),
        ("mincore", libc::SYS_mincore, [HERE, 0, 0, 0, 0]),
        ("mknod", libc::SYS_mknod, [0, 0, 0, 0, 0]),
        ("mknodat", libc::SYS_mknodat, [NONE, 0, 0, 0, 0]),
        ("modify_ldt", libc::SYS_modify_ldt, [99, 0, 0, 0, 0]),
        ("mount", libc::SYS_mount, [0, 0, 0, 0, 0]),
        ("mount_setattr", libc::SYS_mount_setattr, [NONE, 0, NONE, 0, 0]),
        ("move_mount", libc::SYS_move_mount, [NONE, 0, NONE, 0, NONE]),
        ("mq_open", libc::SYS_mq_open, [0, 0, 0, 0, 0]),
        ("msgget", libc::SYS_msgget, [HERE, 0, 0, 0, 0]),
        ("name_to_handle_at", libc::SYS_name_to_handle_at, [NONE, 0, 0, 0, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [NONE, 0, 0, 0, 0]),
        ("open_tree", libc::SYS_open_tree, [NONE, 0, NONE, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0, NONE, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [NONE, 0, 0, 0, 0]),
        ("pivot_root", libc::SYS_pivot_root, [0, 0, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [NONE, 0, 0, 0, 0]),
        ("process_vm_writev", libc::SYS_process_vm_writev, [NONE, 0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [NONE, NONE, 0, 0, 0]),
        ("quotactl", libc::SYS_quotactl, [NONE, 0, 0, 0, 0]),
        ("reboot", libc::SYS_reboot, [0, 0, 0, 0, 0]),
        ("request_key", libc::SYS_request_key, [0, 0, 0, 0, 0]),
        ("sched_setattr", libc::SYS_sched_setattr, [0, 0, 0, 0, 0]),
        ("seccomp", libc::SYS_seccomp, [99, 0, 0, 0, 0]),
        ("semget", libc::SYS_semget, [HERE, 0, 0, 0, 0]),
        ("setdomainname", libc::SYS_setdomainname, [0, NONE, 0, 0, 0]),
        ("setgroups", libc::SYS_setgroups, [NONE, 0, 0, 0, 0]),
        ("sethostname", libc::SYS_sethostname, [0, NONE, 0, 0, 0]),
        ("setns", libc::SYS_setns, [NONE, 0, 0, 0, 0]),
        ("setresgid", libc::SYS_setresgid, [NONE, NONE, NONE, 0, 0]),
        ("setresuid", libc::SYS_setresuid, [NONE, NONE, NONE, 0, 0]),
        ("shmget", libc::SYS_shmget, [HERE, 0, 0, 0, 0]),
        ("splice", libc::SYS_splice, [NONE, 0, NONE, 0, 1]),
        ("swapoff", libc::SYS_swapoff, [0, 0, 0, 0, 0]),
        ("swapon", libc::SYS_swapon, [0, 0, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, [NONE, 0, 0, 0, 0]),
        ("tee", libc::SYS_tee, [NONE, NONE, 1, 0, 0]),
        ("umount2", libc::SYS_umount2, [0, 0, 0, 0, 0]),
        ("unshare", libc::SYS_unshare, [0, 0, 0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [NONE, 0, 0, 0, 0]),
        ("vmsplice", libc::SYS_vmsplice, [NONE, 0, 0, 0, 0]),
        // refused for some arguments only
        ("clone of a user namespace", libc::SYS_clone, [CLONE_NOTHING, 0, 0, 0, 0]),
        ("fcntl of a pipe's size", libc::SYS_fcntl, [1, libc::F_SETPIPE_SZ as usize, 4096, 0, 0]),
        ("membarrier of all CPUs", libc::SYS_membarrier, [1, 0, 0, 0, 0]),
        ("personality of readable code", libc::SYS_personality, [0x0040_0000, 0, 0, 0, 0]),
        ("prctl of seccomp", libc::SYS_prctl, [libc::PR_SET_SECCOMP as usize, 99, 0, 0, 0]),
        ("prlimit of the init", libc::SYS_prlimit64, [1, libc::RLIMIT_CORE as usize, 0, 0, 0]),
    ];
    calls
        .iter()
        .map(|(name, number, args)| ((*name).to_owned(), json!(raw(*number, *args))))
        .collect::<Map<_, _>>()
        .into()
}

/// A new user namespace, and two flags that exclude each other: EINVAL wherever the call is looked at at all.
const CLONE_NOTHING: usize = (libc::CLONE_NEWUSER | libc::CLONE_THREAD) as usize;

/// The errno of a socket of each address family; 0 is success. Never connected to anything.
pub(crate) fn sockets() -> Value {
    let families = [
        ("unix", libc::AF_UNIX, libc::SOCK_STREAM),
        ("inet", libc::AF_INET, libc::SOCK_STREAM),
        ("inet6", libc::AF_INET6, libc::SOCK_DGRAM),
        ("netlink", libc::AF_NETLINK, libc::SOCK_RAW),
        ("packet", libc::AF_PACKET, libc::SOCK_RAW),
        ("alg", libc::AF_ALG, libc::SOCK_SEQPACKET),
        ("vsock", libc::AF_VSOCK, libc::SOCK_STREAM),
        ("unix raw", libc::AF_UNIX, libc::SOCK_RAW),
    ];
    families
        .into_iter()
        .map(|(name, family, kind)| (name.to_owned(), json!(sys::socket(family, kind))))
        .collect::<Map<_, _>>()
        .into()
}

/// Takes a lock on a file without waiting, and holds it for a while.
pub(crate) fn lock(path: &str, time: Duration) -> Result<()> {
    let file = File::open(path)?;
    match file.try_lock() {
        Ok(()) => say("locked")?,
        Err(error) => say(&error.to_string())?,
    }
    std::thread::sleep(time);
    Ok(())
}

/// Leaves a file in `/tmp`.
pub(crate) fn keep(name: &str) -> Result<()> {
    Ok(fs::write(std::env::temp_dir().join(name), "kept")?)
}

/// The names in a directory.
pub(crate) fn list(dir: &str) -> Result<Value> {
    let mut names = Vec::new();
    for entry in fs::read_dir(Path::new(dir))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names.into())
}

/// Sends every kind of deadly signal to the init, and then one to every process that there is.
///
/// Only where this process is the second of its pid namespace: on a host, where that is a kernel thread's place, it
/// would end the machine.
pub(crate) fn strike_init() -> Result<()> {
    require_own_namespace()?;
    for signal in [libc::SIGTERM, libc::SIGSTOP, libc::SIGSEGV, libc::SIGABRT, libc::SIGKILL] {
        sys::kill(1, signal);
    }
    sys::kill(-1, libc::SIGKILL);
    say("the init lives")
}

/// Has a child send SIGKILL to every process that there is, and waits for that.
pub(crate) fn killed_by_child() -> Result<()> {
    require_own_namespace()?;
    if let sys::Forked::Child = sys::fork()? {
        sys::kill(-1, libc::SIGKILL);
        sys::exit_now(0)
    }
    std::thread::sleep(Duration::from_secs(5));
    Ok(())
}

fn require_own_namespace() -> Result<()> {
    if std::process::id() == 2 { Ok(()) } else { Err("not in a pid namespace of its own".into()) }
}

/// Says on every descriptor, and in the words of the host, that all is well.
pub(crate) fn forge() -> Result<()> {
    let verdicts = [
        r#"{"kind":"exited","exit_code":0}"#,
        "HTTP/1.1 200 OK\r\nHolm-Outcome: exited\r\n\r\n",
        "job finished outcome=\"exited\"\n",
        "\0\u{3}\0\0",
    ];
    for fd in 0..=64 {
        for verdict in verdicts {
            sys::write(fd, verdict.as_bytes());
        }
    }
    Ok(())
}
