//! The few system calls that the standard library has no words for.

use std::io;
use std::time::Duration;

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

/// Ends the calling thread alone.
pub(crate) fn exit_thread() -> ! {
    // SAFETY: nothing that other threads use lives on this one's stack.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("a thread that has ended goes on")
}

pub(crate) fn close_streams() {
    for fd in 0..3 {
        // SAFETY: nothing is read or written after this.
        unsafe { libc::close(fd) };
    }
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

/// Sends itself a signal, of which the standard library takes no notice.
pub(crate) fn raise(signal: i32) -> io::Result<()> {
    default_action(signal);
    // SAFETY: no memory is involved.
    let own = unsafe { libc::getpid() };
    // SAFETY: no memory is involved.
    if unsafe { libc::kill(own, signal) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn ignore(signal: i32) {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

pub(crate) fn default_action(signal: i32) {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Leaves the session and process group.
pub(crate) fn leave_session() {
    // SAFETY: no memory is involved.
    unsafe { libc::setsid() };
}

/// CPU time of this process so far.
pub(crate) fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Lets this thread run on one CPU alone.
pub(crate) fn stay_on(cpu: usize) -> io::Result<()> {
    let mask: u64 = 1 << cpu;
    // SAFETY: `mask` is as long as is said, and outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of::<u64>(), &raw const mask) };
    if ret == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
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

/// 0 if a socket of this family can be made, else the errno.
pub(crate) fn socket(family: i32, kind: i32) -> i32 {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd == -1 {
        return io::Error::last_os_error().raw_os_error().unwrap_or(0);
    }
    // SAFETY: `fd` is ours.
    unsafe { libc::close(fd) };
    0
}

/// The errno of a system call by its number; 0 is success. A process that it made ends at once.
pub(crate) fn raw(number: libc::c_long, args: [usize; 5]) -> i32 {
    let [a, b, c, d, e] = args;
    // SAFETY: the callers give arguments that no call can do anything with: no valid address among them.
    let ret = unsafe { libc::syscall(number, a, b, c, d, e) };
    if ret == -1 { io::Error::last_os_error().raw_os_error().unwrap_or(-1) } else { 0 }
}

/// Writes as much as the descriptor takes, if it is open at all.
pub(crate) fn write(fd: i32, bytes: &[u8]) {
    // SAFETY: `bytes` outlives the call, and the length is its own.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// `getpid` by the x32 ABI, whose numbers a filter for x86-64 alone may overlook.
pub(crate) fn x32_call() -> i64 {
    const X32_BIT: i64 = 0x4000_0000;
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_getpid | X32_BIT) }
}

/// `getpid` by the 32-bit entry, where the numbers mean other calls.
pub(crate) fn i386_call() -> i32 {
    const GETPID: i32 = 20;
    let pid: i32;
    // SAFETY: the call takes no arguments and touches no memory; the kernel may overwrite r8 to r11.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("eax") GETPID => pid, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    pid
}

/// Session, process group and parent.
pub(crate) fn kin() -> (i32, i32, i32) {
    // SAFETY: no memory is involved.
    let session = unsafe { libc::getsid(0) };
    // SAFETY: no memory is involved.
    let group = unsafe { libc::getpgrp() };
    // SAFETY: no memory is involved.
    (session, group, unsafe { libc::getppid() })
}

/// The effective user id, as far as an exit code can tell it.
pub(crate) fn effective_id() -> u8 {
    // SAFETY: no memory is involved.
    u8::try_from(unsafe { libc::geteuid() }).unwrap_or(199)
}
