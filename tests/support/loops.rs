//! Loop devices: block devices made of files, for tests that need one of their own.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::libc;
use nix::sys::stat::{major, minor};
use tempfile::tempfile;

use super::wait_until;

// `linux/loop.h`
const LOOP_SET_FD: libc::Ioctl = 0x4C00;
const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

/// A block device. Given back when dropped.
pub struct Loop {
    device: File,
    pub path: PathBuf,
    /// As the API has it.
    pub number: String,
}

impl Loop {
    /// Makes one of a new file of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let backing = tempfile().unwrap();
        backing.set_len(bytes).unwrap();
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").unwrap();
        wait_until("a loop device is free", || {
            // SAFETY: the call takes no argument and touches no memory.
            let free = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            let path = PathBuf::from(format!("/dev/loop{free}"));
            let device = OpenOptions::new().read(true).write(true).open(&path).ok()?;
            // SAFETY: the call takes a descriptor and touches no memory.
            let bound = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD, backing.as_raw_fd()) };
            // somebody else may have taken it in between
            (bound == 0).then(|| {
                let number = device.metadata().unwrap().rdev();
                let number = format!("{}:{}", major(number), minor(number));
                Self { device, path, number }
            })
        })
    }

    /// Its name in `/dev`.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap().to_string_lossy().into_owned()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // SAFETY: the call takes no argument and touches no memory. It is let go of once nobody has it open.
        unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_CLR_FD) };
    }
}
