//! The few system calls that the standard library has no words for.

use std::io;

/// The two sides of a fork.
pub(crate) enum Forked {
    Child,
    Parent(i32),
}

pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: this program has one thread wherever it forks, or goes on in the child with plain system calls only.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid)),
    }
}

pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process without touching anything of it.
    unsafe { libc::_exit(code) }
}

/// Waits for a child; its exit code, or 128 and the signal.
pub(crate) fn wait_for(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) })
}

pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: no memory is involved. A process that is gone is as good as killed.
    unsafe { libc::kill(pid, signal) };
}

pub(crate) fn raise(signal: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let own = unsafe { libc::getpid() };
    // SAFETY: no memory is involved.
    if unsafe { libc::kill(own, signal) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn segfault() -> ! {
    // SAFETY: none: the point is to be ended for it.
    unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
    unreachable!("address 8 is mapped")
}

/// What `umask`, `hostname` and `getrlimit` know.
pub(crate) fn umask() -> u32 {
    // SAFETY: no memory is involved; the old mask is put back at once.
    let mask = unsafe { libc::umask(0) };
    // SAFETY: as above.
    unsafe { libc::umask(mask) };
    mask
}

pub(crate) fn hostname() -> String {
    let mut name = [0_u8; 256];
    // SAFETY: `name` is as long as is said, and outlives the call.
    unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
    let end = name.iter().position(|b| *b == 0).unwrap_or(0);
    String::from_utf8_lossy(&name[..end]).into_owned()
}

/// Soft and hard limit.
pub(crate) fn rlimit(resource: libc::__rlimit_resource_t) -> (u64, u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` outlives the call.
    unsafe { libc::getrlimit(resource, &raw mut limit) };
    (limit.rlim_cur, limit.rlim_max)
}

pub(crate) fn dumpable() -> i32 {
    // SAFETY: no memory is involved.
    unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }
}

/// The number of an interface's address family that a socket can be made of, or the errno.
pub(crate) fn socket(family: i32) -> i32 {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM, 0) };
    if fd == -1 {
        return io::Error::last_os_error().raw_os_error().unwrap_or(0);
    }
    // SAFETY: `fd` is ours.
    unsafe { libc::close(fd) };
    0
}
