//! System calls by their number, in children where one could be the caller's last; and ground on which they do no harm.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // arguments of system calls are 64 bits of anything

use std::ffi::{CStr, CString};
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use crate::Result;
use crate::sys::{Forked, exit_now, fork, kill};

/// A system call as the kernel sees it: all six arguments, and its own answer, a refusal as a negative errno.
pub(crate) fn call(number: usize, args: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = args;
    let answer: isize;
    // SAFETY: none that holds for every call. Callers give addresses of their own live memory or none at all, or make
    // the call in a child whose memory is nobody's loss.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number.cast_signed() => answer,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            out("rcx") _, out("r11") _,
        );
    }
    answer
}

/// The same by a number of the C library's, filled up with zeros.
pub(crate) fn try_call<const N: usize>(number: libc::c_long, given: [usize; N]) -> isize {
    let mut args = [0; 6];
    args[..N].copy_from_slice(&given);
    call(number.cast_unsigned() as usize, args)
}

/// The errno of an answer; 0 is success.
pub(crate) fn errno(answer: isize) -> i64 {
    if (-4095..0).contains(&answer) { -answer as i64 } else { 0 }
}

/// The address of a text, as an argument. The text must outlive the call.
pub(crate) fn text(text: &CStr) -> usize {
    text.as_ptr() as usize
}

/// The address of anything, as an argument. It must outlive the call.
pub(crate) fn address<T: ?Sized>(of: &T) -> usize {
    std::ptr::from_ref(of).cast::<u8>() as usize
}

pub(crate) fn c_path(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

/// Numbers that children share with their parent.
pub(crate) fn shared(count: usize) -> io::Result<&'static [AtomicI64]> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping of its own, at an address that the kernel chooses.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), count * size_of::<AtomicI64>(), protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: so long is the mapping, aligned to a page, of zeros, and never unmapped.
    Ok(unsafe { std::slice::from_raw_parts(at.cast(), count) })
}

/// How a child ended.
pub(crate) enum End {
    Exited,
    Signaled(i32),
    /// It did not, within its time, and was killed.
    Blocked,
}

/// Does `work` in a child and waits for it.
pub(crate) fn in_child(patience: Duration, work: impl FnOnce()) -> io::Result<End> {
    let child = match fork()? {
        Forked::Child => {
            work();
            exit_now(0)
        }
        Forked::Parent(child) => child,
    };
    let ended = try_call(libc::SYS_pidfd_open, [child.cast_unsigned() as usize]);
    let mut poll = libc::pollfd { fd: i32::try_from(ended).unwrap_or(-1), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    let in_time = unsafe { libc::poll(&raw mut poll, 1, i32::try_from(patience.as_millis()).unwrap_or(0)) } == 1;
    if !in_time {
        kill(child, libc::SIGKILL);
    }
    try_call(libc::SYS_close, [ended.cast_unsigned()]);
    let mut status = 0;
    // SAFETY: `status` outlives the call. Children without a signal for their end are waited for too.
    if unsafe { libc::waitpid(child, &raw mut status, libc::__WALL) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(match (in_time, libc::WIFSIGNALED(status)) {
        (false, _) => End::Blocked,
        (true, true) => End::Signaled(libc::WTERMSIG(status)),
        (true, false) => End::Exited,
    })
}

/// What `attempt` gives in a child of its own; -1 if the child died of it, and no more than that is known.
pub(crate) fn told_by_child(attempt: impl FnOnce() -> i64) -> Result<i64> {
    use std::sync::atomic::Ordering::SeqCst;
    let told = shared(1)?;
    told[0].store(-1, SeqCst);
    in_child(Duration::from_secs(5), || told[0].store(attempt(), SeqCst))?;
    Ok(told[0].load(SeqCst))
}

/// Does `work` in a child that is root of namespaces of its own, with a `/tmp` of its own at `TMPDIR`: what is done to
/// mounts, names, networks, queues and processes there ends with it. For the outside of a sandbox.
pub(crate) fn on_own_ground(work: impl FnOnce() -> Result<()>) -> Result<()> {
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP;
    let must = |what: &str, answer: isize| match errno(answer) {
        0 => Ok(()),
        code => Err(format!("{what}: {}", io::Error::from_raw_os_error(i32::try_from(code).unwrap_or(0)))),
    };
    must("unshare", try_call(libc::SYS_unshare, [namespaces.cast_unsigned() as usize]))?;
    let private = (libc::MS_REC | libc::MS_PRIVATE) as usize;
    must("private mounts", try_call(libc::SYS_mount, [text(c"none"), text(c"/"), 0, private, 0]))?;
    let tmp = c_path(&std::env::temp_dir())?;
    if tmp.as_c_str() == c"/tmp" {
        return Err("TMPDIR must be a directory of its own".into());
    }
    must("a /tmp", try_call(libc::SYS_mount, [text(c"tmpfs"), text(&tmp), text(c"tmpfs"), 0, 0]))?;
    std::env::set_current_dir(std::env::temp_dir())?;
    match fork()? {
        Forked::Child => {
            crate::sys::leave_session();
            let done = work();
            if let Err(error) = &done {
                let _ = io::Write::write_all(&mut io::stderr(), format!("probe: {error}\n").as_bytes());
            }
            exit_now(i32::from(done.is_err()))
        }
        Forked::Parent(child) => match crate::sys::wait_for(child)? {
            0 => Ok(()),
            code => Err(format!("on its own ground it ended with {code}").into()),
        },
    }
}
