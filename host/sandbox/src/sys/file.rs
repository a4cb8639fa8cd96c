//! What files carry besides their bytes.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::check;

/// The longest value that is read.
const MAX_VALUE: usize = 64;

/// The value of the extended attribute `name`. `ENODATA` if there is none, `ERANGE` if it is longer than 64 bytes.
///
/// The file may be open with `O_PATH` alone, which `fgetxattr` would refuse.
pub(crate) fn extended_attribute(file: BorrowedFd<'_>, name: &CStr) -> nix::Result<Vec<u8>> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|_| Errno::EINVAL)?;
    let mut value = vec![0; MAX_VALUE];
    // SAFETY: both strings outlive the call, and `value` has the size that is given.
    let ret = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(check(ret as libc::c_long)?).map_err(|_| Errno::EOVERFLOW)?);
    Ok(value)
}
