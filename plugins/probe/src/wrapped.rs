//! System calls of the attacks on quotas, memory and kin: one function each, and nothing that holds a pointer for long.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use libc::{c_int, c_long};

fn told(ret: c_long) -> io::Result<c_long> {
    if ret == -1 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn owned(ret: c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(told(ret)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given this descriptor, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A call whose arguments are numbers and descriptors only.
///
/// Never for one that takes an address: that would be the caller's to prove.
fn plain(number: c_long, args: [usize; 4]) -> io::Result<c_long> {
    let [a, b, c, d] = args;
    // SAFETY: no argument is an address that the call reads or writes, as every caller below shows.
    told(unsafe { libc::syscall(number, a, b, c, d, 0) })
}

fn number(fd: BorrowedFd<'_>) -> usize {
    fd.as_raw_fd().unsigned_abs() as usize
}

fn unsigned(value: c_int) -> usize {
    value.cast_unsigned() as usize
}

pub(crate) fn inotify() -> io::Result<OwnedFd> {
    owned(plain(libc::SYS_inotify_init1, [0; 4])?)
}

pub(crate) fn epoll() -> io::Result<OwnedFd> {
    owned(plain(libc::SYS_epoll_create1, [0; 4])?)
}

/// Has `epoll` watch `fd`.
pub(crate) fn watch(epoll: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut event = libc::epoll_event { events: 1, u64: 0 };
    // SAFETY: `event` outlives the call.
    let ret = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event) };
    told(ret.into()).map(drop)
}

/// The bytes that a pipe holds.
pub(crate) fn pipe_bytes(fd: BorrowedFd<'_>) -> io::Result<c_long> {
    plain(libc::SYS_fcntl, [number(fd), unsigned(libc::F_GETPIPE_SZ), 0, 0])
}

/// A key in the keyring of this process, which it dies with.
pub(crate) fn add_key(name: usize) -> io::Result<()> {
    const PROCESS_KEYRING: c_int = -2;
    let name = CString::new(format!("probe-{name}"))?;
    // SAFETY: both strings end and outlive the call; the payload is as long as is said.
    let ret =
        unsafe { libc::syscall(libc::SYS_add_key, c"user".as_ptr(), name.as_ptr(), c"x".as_ptr(), 1, PROCESS_KEYRING) };
    told(ret).map(drop)
}

/// Queues a real-time signal to this process, which stays queued because it is blocked first.
pub(crate) fn queue_signal() -> io::Result<()> {
    const SIGNAL: c_int = 40;
    let mask: u64 = 1 << (SIGNAL - 1);
    // SAFETY: `mask` is as long as is said, and outlives the call; nothing is written.
    told(unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const mask, std::ptr::null_mut::<u64>(), 8)
    })?;
    let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
    // SAFETY: no memory is involved: the value is a number to the kernel.
    told(unsafe { libc::sigqueue(std::process::id().cast_signed(), SIGNAL, value) }.into()).map(drop)
}

/// A timer that is never set.
pub(crate) fn timer() -> io::Result<()> {
    let mut id: c_int = 0;
    // SAFETY: no event is given, and `id` outlives the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_timer_create,
            libc::CLOCK_MONOTONIC,
            std::ptr::null_mut::<libc::sigevent>(),
            &raw mut id,
        )
    };
    told(ret).map(drop)
}

/// A lock of the whole file by its open description, without waiting.
pub(crate) fn flock(fd: BorrowedFd<'_>) -> io::Result<()> {
    plain(libc::SYS_flock, [number(fd), unsigned(libc::LOCK_EX | libc::LOCK_NB), 0, 0]).map(drop)
}

/// A record lock of the whole file, to write if it is open for that, else to read.
pub(crate) fn record_lock(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut result = Ok(());
    for kind in [libc::F_WRLCK, libc::F_RDLCK] {
        #[allow(clippy::cast_possible_truncation)] // both are below ten
        let mut lock = libc::flock { l_type: kind as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        // SAFETY: `lock` outlives the call.
        let ret = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLK, &raw mut lock) };
        result = told(ret.into()).map(drop);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// The file lease that makes whoever else opens the file wait.
pub(crate) fn lease(fd: BorrowedFd<'_>) -> io::Result<()> {
    plain(libc::SYS_fcntl, [number(fd), unsigned(libc::F_SETLEASE), unsigned(libc::F_RDLCK), 0]).map(drop)
}

pub(crate) fn memory_file() -> io::Result<OwnedFd> {
    // SAFETY: the name ends and outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_memfd_create, c"probe".as_ptr(), 0) })
}

/// New memory of this process, never given back.
pub(crate) fn map(bytes: usize, flags: c_int) -> io::Result<Mapped> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANONYMOUS | flags);
    // SAFETY: the kernel chooses the place: nothing that is there already is touched.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Mapped { start: start.cast(), bytes }) }
}

/// Memory that [`map`] has made.
#[derive(Clone, Copy)]
pub(crate) struct Mapped {
    start: *mut u8,
    bytes: usize,
}

impl Mapped {
    fn at(self, at: usize) -> *mut u8 {
        assert!(at < self.bytes);
        self.start.wrapping_add(at)
    }

    /// Writes one byte.
    pub(crate) fn touch(self, at: usize, value: u8) {
        let place = self.at(at);
        // SAFETY: within the mapping, which is never given back.
        unsafe { place.write_volatile(value) };
    }

    /// Whether any byte of it is not zero.
    pub(crate) fn is_used(self) -> bool {
        // SAFETY: the mapping is readable, as long as is said, never given back, and written by nobody meanwhile.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }.iter().any(|byte| *byte != 0)
    }

    /// Forbids to write to one page of it, which makes three mappings of one.
    pub(crate) fn split(self, at: usize) -> io::Result<()> {
        assert!(at + 4096 <= self.bytes && at.is_multiple_of(4096));
        let place = self.at(at);
        // SAFETY: within the mapping; nothing is written to that page afterwards.
        let ret = unsafe { libc::mprotect(place.cast(), 4096, libc::PROT_READ) };
        told(ret.into()).map(drop)
    }

    /// Tells the kernel something of it.
    pub(crate) fn advise(self, advice: c_int) -> io::Result<()> {
        // SAFETY: the mapping is ours; no advice that is given here takes contents away.
        told(unsafe { libc::madvise(self.start.cast(), self.bytes, advice) }.into()).map(drop)
    }

    /// Asks which pages of it are in memory.
    pub(crate) fn resident(self) -> io::Result<usize> {
        let mut pages = vec![0_u8; self.bytes.div_ceil(4096)];
        // SAFETY: there is one byte for each page of the mapping.
        told(unsafe { libc::mincore(self.start.cast(), self.bytes, pages.as_mut_ptr()) }.into())?;
        Ok(pages.iter().filter(|page| **page & 1 == 1).count())
    }
}

/// Sends a copy of `fd` by a Unix socket.
pub(crate) fn send_fd(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [0_u8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // header, descriptor, padding
    let mut control = [20_u64, u64::from(libc::SCM_RIGHTS.cast_unsigned()) << 32 | 1, number(fd) as u64];
    let message = libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut part,
        msg_iovlen: 1,
        msg_control: control.as_mut_ptr().cast(),
        msg_controllen: 24,
        msg_flags: 0,
    };
    // SAFETY: every part of the message outlives the call, and is as long as is said.
    told(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT) } as c_long).map(drop)
}

/// What is written to the name of this thread shows in the host's list of processes.
pub(crate) fn rename(name: impl Into<Vec<u8>>) {
    let Ok(name) = CString::new(name) else { return };
    // SAFETY: the name ends and outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

pub(crate) fn prctl(operation: c_int, value: usize) -> io::Result<c_long> {
    plain(libc::SYS_prctl, [unsigned(operation), value, 0, 0])
}

/// How this process may speculate past stores: `PR_GET_SPECULATION_CTRL`, and what setting it gives.
pub(crate) fn speculation() -> (io::Result<c_long>, io::Result<c_long>) {
    const GET: c_int = 52;
    const SET: c_int = 53;
    const STORE_BYPASS: usize = 0;
    const FORCE_DISABLE: usize = 8;
    let set = plain(libc::SYS_prctl, [unsigned(SET), STORE_BYPASS, FORCE_DISABLE, 0]);
    (plain(libc::SYS_prctl, [unsigned(GET), STORE_BYPASS, 0, 0]), set)
}

pub(crate) fn membarrier(command: usize) -> io::Result<()> {
    plain(libc::SYS_membarrier, [command, 0, 0, 0]).map(drop)
}

/// Shared memory, semaphores, a queue of messages of System V, by one key: what asking for each gives.
pub(crate) fn system_v(key: usize, flags: usize) -> [(&'static str, io::Result<c_long>); 3] {
    [
        ("shm", plain(libc::SYS_shmget, [key, 4096, flags, 0])),
        ("sem", plain(libc::SYS_semget, [key, 1, flags, 0])),
        ("msg", plain(libc::SYS_msgget, [key, flags, 0, 0])),
    ]
}

/// Takes away what [`system_v`] has made.
pub(crate) fn remove_system_v(kind: &str, id: c_long) {
    let id = usize::try_from(id).unwrap_or(0);
    let _ = match kind {
        "shm" => plain(libc::SYS_shmctl, [id, 0, 0, 0]),
        "sem" => plain(libc::SYS_semctl, [id, 0, 0, 0]),
        _ => plain(libc::SYS_msgctl, [id, 0, 0, 0]),
    };
}

/// Opens or makes a POSIX message queue.
pub(crate) fn message_queue(name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let flags = libc::O_CREAT | libc::O_RDWR;
    // SAFETY: the name ends and outlives the call; without attributes none are read.
    owned(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o600, std::ptr::null::<libc::mq_attr>()) })
}

pub(crate) fn remove_message_queue(name: &str) {
    let Ok(name) = CString::new(name) else { return };
    // SAFETY: the name ends and outlives the call.
    unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) };
}

/// Writes out every file system of the host.
pub(crate) fn sync() -> io::Result<()> {
    plain(libc::SYS_sync, [0; 4]).map(drop)
}

/// Writes out the file system that the file is on.
pub(crate) fn sync_of(fd: BorrowedFd<'_>) -> io::Result<()> {
    plain(libc::SYS_syncfs, [number(fd), 0, 0, 0]).map(drop)
}

pub(crate) fn fallocate(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    plain(libc::SYS_fallocate, [number(fd), 0, 0, bytes]).map(drop)
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (CString::new(path.as_os_str().as_encoded_bytes())?, CString::new(name)?);
    // SAFETY: both names end, the value is as long as is said, and all outlive the call.
    let ret = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    told(ret.into()).map(drop)
}

/// Asks for more or less than its share: negative is more.
pub(crate) fn nice(value: c_int) -> io::Result<()> {
    plain(libc::SYS_setpriority, [0, 0, unsigned(value), 0]).map(drop)
}

/// Asks for a real-time class.
pub(crate) fn real_time() -> io::Result<()> {
    let priority: c_int = 1;
    // SAFETY: the parameter is that number alone, and outlives the call.
    told(unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_FIFO, &raw const priority) }).map(drop)
}

/// A child that is the caller's sibling; 0 in it.
pub(crate) fn clone_sibling() -> io::Result<c_long> {
    plain(libc::SYS_clone, [unsigned(libc::CLONE_PARENT | libc::SIGCHLD), 0, 0, 0])
}

/// A child for whose end or exec the caller is kept waiting; 0 in it. Unlike that of a `vfork` it has memory of its own.
pub(crate) fn clone_and_park() -> io::Result<c_long> {
    plain(libc::SYS_clone, [unsigned(libc::CLONE_VFORK | libc::SIGCHLD), 0, 0, 0])
}
