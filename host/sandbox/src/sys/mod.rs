//! The only unsafe code of this crate: system calls that `nix` does not wrap, one function per call.
//!
//! Every function takes and gives owned, typed values and reports the call's own errno. Policy lives elsewhere:
//! nothing here knows what a sandbox is.

pub(crate) mod alarm;
pub(crate) mod arena;
pub(crate) mod bpf;
pub(crate) mod file;
pub(crate) mod mount;
pub(crate) mod process;
pub(crate) mod seccomp;
pub(crate) mod text;

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Turns the return value of a raw system call into a `Result`.
fn check(ret: libc::c_long) -> nix::Result<libc::c_long> {
    if ret == -1 { Err(Errno::last()) } else { Ok(ret) }
}

/// Owns a descriptor that the kernel has just put into this process through `SCM_RIGHTS`.
pub(crate) fn received_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: the only caller hands over descriptors straight out of a received control message, which are new and
    // nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
