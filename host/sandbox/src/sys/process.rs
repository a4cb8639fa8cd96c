//! Processes: `clone3` from a single-threaded process, pidfd signals, and closing what must not be inherited.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, Pid};

use super::check;
use crate::usage::Exit;

/// Proof that this process has exactly one thread.
///
/// A child cloned without exec shares nothing that another thread could have left locked (malloc's arenas, std's
/// stdout lock), so it may run ordinary Rust code. With a second thread that would be unsound.
#[derive(Debug)]
pub(crate) struct SingleThreaded(());

impl SingleThreaded {
    /// Reads the number of this process's threads from the kernel.
    ///
    /// # Errors
    /// `EBUSY` if there is more than one thread; the error of reading `/proc/self/task` otherwise.
    pub(crate) fn prove() -> nix::Result<Self> {
        let threads = fs::read_dir("/proc/self/task").map_err(|e| errno_of(&e))?.count();
        if threads == 1 { Ok(Self(())) } else { Err(Errno::EBUSY) }
    }
}

/// `linux/sched.h`, since Linux 5.7. The C library's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The two sides of a `clone3`.
pub(crate) enum Cloned {
    /// In the parent: the child's pid as this process sees it, and its pidfd.
    Parent { pid: Pid, pidfd: OwnedFd },
    /// In the child.
    Child,
}

/// Clones the calling process. `cgroup`, if given, is a directory of a cgroup v2 hierarchy in which the child is
/// born (`CLONE_INTO_CGROUP`). The child's end raises no signal: its pidfd tells.
pub(crate) fn clone3(
    _proof: &SingleThreaded,
    flags: CloneFlags,
    cgroup: Option<BorrowedFd<'_>>,
) -> nix::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // SAFETY: `clone_args` is a C struct of integers for which all-zero is the documented default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(flags.bits().cast_unsigned()) | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    if let Some(dir) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(dir.as_raw_fd().cast_unsigned());
    }
    // SAFETY: no CLONE_VM, CLONE_FILES or stack is asked for, so the child is a copy that continues on its own copy
    // of this stack; `_proof` says that no other thread could hold a lock in that copy. `args` and `pidfd` outlive
    // the call.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match check(ret)? {
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent {
            pid: Pid::from_raw(i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?),
            // SAFETY: clone3 succeeded with CLONE_PIDFD, so `pidfd` is a new descriptor that nobody else owns.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// Forks, for where a filter no longer lets `clone3` through. `None` in the child, its pid in the parent.
pub(crate) fn fork(_proof: &SingleThreaded) -> nix::Result<Option<Pid>> {
    // SAFETY: `_proof` says that there is no other thread whose locks the child could inherit.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => Ok(None),
        ForkResult::Parent { child } => Ok(Some(child)),
    }
}

/// Waits for the end of any child.
///
/// `nix` knows no real-time signals: it takes a child that one of them has ended for an error of the call.
pub(crate) fn wait_for_any() -> nix::Result<(Pid, Exit)> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let pid = Pid::from_raw(Errno::result(unsafe { libc::waitpid(-1, &raw mut status, 0) })?);
    // without WUNTRACED and WCONTINUED only ends are told
    let signaled = libc::WIFSIGNALED(status);
    Ok((pid, if signaled { Exit::Signaled(libc::WTERMSIG(status)) } else { Exit::Exited(libc::WEXITSTATUS(status)) }))
}

/// Sends `signal` to the process that `pidfd` refers to. `ESRCH` once that process is dead and reaped.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> nix::Result<()> {
    // SAFETY: `pidfd` is borrowed for the call; a null siginfo is documented to mean "as kill(2) would".
    let ret = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as libc::c_int, std::ptr::null::<u8>(), 0)
    };
    check(ret).map(drop)
}

/// A descriptor that becomes readable when this process ends.
pub(crate) fn own_pidfd() -> nix::Result<OwnedFd> {
    // SAFETY: `pidfd_open` takes two numbers.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, Pid::this().as_raw(), 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: it has just been opened, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes every descriptor except those in `keep`, and `proc`, a `/proc`, whoever thinks that it owns them.
///
/// For a freshly cloned child only: the copies of its parent's descriptors have no owner in the child but values that
/// are never dropped there, because the child never returns into the code that holds them.
pub(crate) fn close_all_except(_proof: &SingleThreaded, proc: BorrowedFd<'_>, keep: &[RawFd]) -> nix::Result<()> {
    let mut keep: Vec<libc::c_uint> = keep.iter().chain([&proc.as_raw_fd()]).map(|fd| fd.cast_unsigned()).collect();
    keep.sort_unstable();
    let mut first: libc::c_uint = 0;
    for fd in &keep {
        if *fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, libc::c_uint::MAX)?;
    // reads back from the kernel that no other is open
    let stays = |fd: &RawFd| keep.contains(&fd.cast_unsigned());
    if open_descriptors(proc)?.iter().all(stays) { Ok(()) } else { Err(Errno::EPROTO) }
}

/// The descriptors that this process has open. `proc` is a `/proc`.
pub(crate) fn open_descriptors(proc: BorrowedFd<'_>) -> nix::Result<Vec<RawFd>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = openat(proc, "self/fd", flags, Mode::empty())?;
    let mut open = Vec::new();
    // the library's own buffer of 32 KiB would be most of what a sandbox allocates
    let mut buffer = [0_u8; 2048];
    loop {
        // SAFETY: the kernel writes no more than the buffer has room for.
        let ret = unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
        let length = usize::try_from(check(ret)?).map_err(|_| Errno::EOVERFLOW)?;
        if length == 0 {
            open.retain(|fd| *fd != dir.as_raw_fd());
            return Ok(open);
        }
        let mut rest = &buffer[..length];
        while let Some((name, size)) = entry(rest) {
            // `.` and `..` are no numbers
            open.extend(name.parse::<RawFd>().ok());
            rest = rest.get(size..).unwrap_or_default();
        }
    }
}

/// The name of the first of the entries that `getdents64(2)` has given, and how long that entry is.
fn entry(entries: &[u8]) -> Option<(&str, usize)> {
    // two numbers of 8 bytes, the length of the entry, a byte for the type, the name and a zero
    let size = usize::from(u16::from_ne_bytes(entries.get(16..18)?.try_into().ok()?));
    let name = std::ffi::CStr::from_bytes_until_nul(entries.get(19..size)?).ok()?;
    Some((name.to_str().unwrap_or_default(), size))
}

fn close_range(first: libc::c_uint, last: libc::c_uint) -> nix::Result<()> {
    // SAFETY: closing descriptors touches no memory; that no live owner is robbed is the contract of the only
    // caller, `close_all_except`.
    let ret = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    check(ret).map(drop)
}

/// Ends this process at once: no destructors, no `atexit`, no flushing of the parent's buffers a second time.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` never returns and needs nothing of the process's state.
    unsafe { libc::_exit(code) }
}

/// Takes ownership of a descriptor number that this process was given at exec by the documented convention.
///
/// # Errors
/// `EBADF` if nothing is open at `fd`.
pub(crate) fn inherited_fd(fd: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks whether the descriptor is open.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) }.into())?;
    // SAFETY: it is open, and by convention it was opened for us by the exec's caller, so nothing here owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Joins a new, anonymous session keyring (`keyctl(KEYCTL_JOIN_SESSION_KEYRING, NULL)`).
pub(crate) fn join_new_session_keyring() -> nix::Result<()> {
    // SAFETY: a null name asks for an anonymous keyring; no memory is read.
    let ret = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) };
    // the number of the keyring, which is never 0
    if check(ret)? > 0 { Ok(()) } else { Err(Errno::EPROTO) }
}

/// Lets a change of the effective user leave the capabilities alone, for this process and what it clones into its own
/// user namespace; a new user namespace begins with the usual rules.
pub(crate) fn keep_capabilities_as_any_user() -> nix::Result<()> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2; // SECBIT_NO_SETUID_FIXUP, linux/securebits.h
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) }.into()).map(drop)
}

/// Sets every signal to its default action and unblocks all: what a program expects to start with.
///
/// By the system call itself: the C library keeps two signals for itself, will not touch them here, and yet leaves them
/// ignored in what it spawns.
pub(crate) fn reset_signals() -> nix::Result<()> {
    const SIGNALS: i32 = 64;
    const MASK_BYTES: usize = 8;
    // the kernel's sigaction: handler, flags, restorer, mask; all zero is SIG_DFL with no flags and an empty mask
    let default = [0_u64; 4];
    for signal in (1..=SIGNALS).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP)) {
        // SAFETY: `default` is as large as the kernel's structure and outlives the call; no handler of ours is relied
        // upon in this process.
        check(unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), MASK_BYTES)
        })?;
    }
    nix::sys::signal::SigSet::empty().thread_set_mask()
}

/// Waits for one byte. `EPIPE` at the end of file.
pub(crate) fn wait_for_byte(from: &OwnedFd) -> nix::Result<()> {
    match nix::unistd::read(from, &mut [0; 1])? {
        0 => Err(Errno::EPIPE),
        _ => Ok(()),
    }
}

/// What the kernel lets this thread do about speculative store bypass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreBypass {
    /// It is on, or may be switched on again.
    OfThisThread,
    /// It is off for good.
    Disabled,
    /// The CPU has none, or the machine's own setting stands.
    OutOfReach,
}

// the C library's prctl reads words, and the kernel wants the unused ones to be zero
const STORE_BYPASS: libc::c_ulong = libc::PR_SPEC_STORE_BYPASS as libc::c_ulong;
const ZERO: libc::c_ulong = 0;

/// Asks for it (`PR_GET_SPECULATION_CTRL`).
pub(crate) fn store_bypass() -> nix::Result<StoreBypass> {
    // SAFETY: the call reads no memory.
    let ret = unsafe { libc::prctl(libc::PR_GET_SPECULATION_CTRL, STORE_BYPASS, ZERO, ZERO, ZERO) };
    let state = match check(ret.into()) {
        Ok(state) => libc::c_uint::try_from(state).map_err(|_| Errno::EPROTO)?,
        Err(Errno::EINVAL | Errno::ENODEV) => return Ok(StoreBypass::OutOfReach), // an old kernel, another CPU
        Err(errno) => return Err(errno),
    };
    Ok(if state & libc::PR_SPEC_PRCTL == 0 {
        StoreBypass::OutOfReach
    } else if state & libc::PR_SPEC_FORCE_DISABLE != 0 {
        StoreBypass::Disabled
    } else {
        StoreBypass::OfThisThread
    })
}

/// Switches it off, which nothing can undo (`PR_SET_SPECULATION_CTRL`).
pub(crate) fn disable_store_bypass() -> nix::Result<()> {
    let off = libc::c_ulong::from(libc::PR_SPEC_FORCE_DISABLE);
    // SAFETY: the call reads no memory.
    let ret = unsafe { libc::prctl(libc::PR_SET_SPECULATION_CTRL, STORE_BYPASS, off, ZERO, ZERO) };
    check(ret.into()).map(drop)
}

/// The version of Landlock that the kernel has. `ENOSYS` or `EOPNOTSUPP` without Landlock.
pub(crate) fn landlock_abi() -> nix::Result<i64> {
    const CREATE_RULESET_VERSION: libc::c_uint = 1; // LANDLOCK_CREATE_RULESET_VERSION, linux/landlock.h
    // SAFETY: with this flag the kernel demands a null attribute of size 0, and only returns a number.
    let ret = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, CREATE_RULESET_VERSION)
    };
    check(ret)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn every_open_descriptor_is_listed_however_many_there_are() {
        let proc = File::open("/proc").unwrap();
        let files: Vec<File> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
        let open = open_descriptors(proc.as_fd()).unwrap();
        assert!(files.iter().all(|file| open.contains(&file.as_raw_fd())), "{open:?}");
    }
}
