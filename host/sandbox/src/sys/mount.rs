//! The descriptor-based mount calls (Linux 5.2, `mount_setattr` 5.12): a file system is made, filled and attached by
//! descriptor, so that no path of the host or of a tenant is ever resolved on the way.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::check;

/// Attributes of one mount (`MOUNT_ATTR_*` of `mount_setattr(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MountAttr(pub u64);

impl MountAttr {
    pub(crate) const RDONLY: Self = Self(libc::MOUNT_ATTR_RDONLY);
    pub(crate) const NOSUID: Self = Self(libc::MOUNT_ATTR_NOSUID);
    pub(crate) const NODEV: Self = Self(libc::MOUNT_ATTR_NODEV);
    pub(crate) const NOEXEC: Self = Self(libc::MOUNT_ATTR_NOEXEC);

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl MountAttr {
    /// As `mount(8)` writes it.
    pub(crate) fn words(self) -> Vec<&'static str> {
        let flags = [(Self::RDONLY, "ro"), (Self::NOSUID, "nosuid"), (Self::NODEV, "nodev"), (Self::NOEXEC, "noexec")];
        let mut words: Vec<&str> =
            flags.iter().filter(|(flag, _)| self.0 & flag.0 != 0).map(|(_, word)| *word).collect();
        if self.0 & Self::RDONLY.0 == 0 {
            words.insert(0, "rw");
        }
        words
    }
}

impl std::ops::BitOr for MountAttr {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        self.and(other)
    }
}

/// Makes a new file system of type `kind` with `options`, not attached anywhere.
pub(crate) fn new_mount(kind: &CStr, options: &[(&CStr, &CStr)], attr: MountAttr) -> nix::Result<OwnedFd> {
    // SAFETY: `kind` is a C string that outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) })?;
    for (key, value) in options {
        fsconfig(&context, libc::FSCONFIG_SET_STRING, Some(key), Some(value))?;
    }
    fsconfig(&context, libc::FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: `context` is open; the call reads no memory.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attr.0) })
}

fn fsconfig(context: &OwnedFd, command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>) -> nix::Result<()> {
    let pointer = |s: Option<&CStr>| s.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: `key` and `value` are C strings that outlive the call, or null where the command takes none.
    let ret =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(key), pointer(value), 0) };
    check(ret).map(drop)
}

/// A detached copy of the mount at `path` (relative to `dir`), without the mounts below it.
pub(crate) fn clone_mount(dir: BorrowedFd<'_>, path: &CStr) -> nix::Result<OwnedFd> {
    open_tree(dir, path, 0)
}

/// A detached copy of the mount at `path` (relative to `dir`) with the mounts below it.
pub(crate) fn clone_tree(dir: BorrowedFd<'_>, path: &CStr) -> nix::Result<OwnedFd> {
    open_tree(dir, path, libc::AT_RECURSIVE.cast_unsigned())
}

fn open_tree(dir: BorrowedFd<'_>, path: &CStr, more: libc::c_uint) -> nix::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned() | more;
    // SAFETY: `path` is a C string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches the detached `mount` at `path`, relative to `dir`. Symbolic links at the end of `path` are not followed.
pub(crate) fn attach(mount: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &CStr) -> nix::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | if path.is_empty() { libc::MOVE_MOUNT_T_EMPTY_PATH } else { 0 };
    // SAFETY: both paths are C strings that outlive the call.
    let ret = unsafe {
        libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), c"".as_ptr(), dir.as_raw_fd(), path.as_ptr(), flags)
    };
    check(ret).map(drop)
}

/// Adds `attr` to the mount that `fd` is the root of.
pub(crate) fn restrict(fd: BorrowedFd<'_>, attr: MountAttr) -> nix::Result<()> {
    set_attr(fd.as_raw_fd(), c"", libc::AT_EMPTY_PATH, attr, 0)
}

/// Makes the mount at `/` and everything below it private: nothing mounted here shows up anywhere else.
pub(crate) fn make_all_private() -> nix::Result<()> {
    set_attr(libc::AT_FDCWD, c"/", libc::AT_RECURSIVE, MountAttr(0), libc::MS_PRIVATE)
}

fn set_attr(fd: RawFd, path: &CStr, flags: libc::c_int, set: MountAttr, propagation: u64) -> nix::Result<()> {
    let attr = libc::mount_attr { attr_set: set.0, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: `attr` and `path` outlive the call, and the size given is that of `attr`.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            path.as_ptr(),
            flags,
            &raw const attr,
            libc::MOUNT_ATTR_SIZE_VER0 as usize,
        )
    };
    check(ret).map(drop)
}

/// Owns the descriptor that a system call returned.
fn owned(ret: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = RawFd::try_from(check(ret)?).map_err(|_| nix::errno::Errno::EOVERFLOW)?;
    // SAFETY: the call succeeded and returned a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
