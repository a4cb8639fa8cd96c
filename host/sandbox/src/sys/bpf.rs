//! `bpf(2)`: loads a small program and attaches it to a cgroup of v2.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::check;

/// One instruction (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Insn {
    pub(crate) code: u8,
    /// The destination register in the low four bits, the source in the high ones.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

/// What a program is asked about, and where in a cgroup it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// Each open of a device.
    Device,
    /// Each new internet socket.
    SocketCreation,
}

impl Hook {
    /// `enum bpf_prog_type` and `enum bpf_attach_type` of `linux/bpf.h`.
    const fn types(self) -> (u32, u32) {
        match self {
            Self::Device => (15, 6),
            Self::SocketCreation => (9, 2),
        }
    }
}

/// The members of `union bpf_attr` for a load, up to the last that is used.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The members of `union bpf_attr` for an attachment.
#[repr(C)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// Loads `program`. `EPERM` without the privilege, `EINVAL` or `EACCES` for one that the kernel's verifier refuses.
pub(crate) fn load(hook: Hook, program: &[Insn]) -> nix::Result<OwnedFd> {
    let (prog_type, expected_attach_type) = hook.types();
    let attr = Load {
        prog_type,
        insn_cnt: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"holm\0\0\0\0\0\0\0\0\0\0\0\0",
        prog_ifindex: 0,
        expected_attach_type,
    };
    // SAFETY: `attr`, and the `insn_cnt` instructions and the C string that it points to, outlive the call; the kernel
    // copies them, and the size given is that of `attr`.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<Load>()) };
    let fd = RawFd::try_from(check(ret)?).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the call succeeded and returned a new descriptor (close-on-exec), which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a loaded program to the cgroup that `dir` is open on, beside those of others, in the place of `old` if that
/// is attached there. It stays until the cgroup is removed.
pub(crate) fn attach(
    hook: Hook,
    dir: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    old: Option<BorrowedFd<'_>>,
) -> nix::Result<()> {
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
    let attr = Attach {
        target_fd: number(dir),
        attach_bpf_fd: number(program),
        attach_type: hook.types().1,
        attach_flags: BPF_F_ALLOW_MULTI | if old.is_some() { BPF_F_REPLACE } else { 0 },
        replace_bpf_fd: old.map_or(0, number),
    };
    // SAFETY: `attr` outlives the call, and the size given is its own.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<Attach>()) };
    check(ret).map(drop)
}
