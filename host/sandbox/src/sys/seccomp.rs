//! `seccomp(2)`: installs a compiled filter on this thread.

use super::check;

/// Installs `program` (classic BPF) for the calling thread and all that it will create.
///
/// Needs `no_new_privs`. `EINVAL` for a program that the kernel's checker refuses, `ENOMEM` if the sum of all
/// filters is too long.
pub(crate) fn install(program: &[libc::sock_filter]) -> nix::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| nix::errno::Errno::EINVAL)?;
    let fprog = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: `fprog` points to `len` instructions that outlive the call; the kernel copies and never writes them.
    let ret = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const fprog) };
    check(ret).map(drop)
}
