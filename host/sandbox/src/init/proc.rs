//! `/proc`, held by a descriptor: some processes have it nowhere in their tree.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use super::took_effect;

/// Longer than any file that is read here.
const MAX_FILE: u64 = 64;

/// A directory that is a `/proc`.
#[derive(Debug)]
pub(crate) struct Proc(OwnedFd);

impl Proc {
    /// The one at its usual place.
    pub(crate) fn open() -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self(open("/proc", flags, Mode::empty())?))
    }

    /// One that may be mounted nowhere.
    pub(crate) fn at(mount: OwnedFd) -> Self {
        Self(mount)
    }

    /// A second descriptor on it.
    pub(crate) fn try_clone(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Writes a file of it, and reads back that it holds what was written.
    pub(crate) fn set(&self, file: &str, value: &str) -> std::io::Result<()> {
        self.write(file, value)?;
        let file = openat(&self.0, file, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        File::from(file).take(MAX_FILE).read_to_string(&mut text)?;
        Ok(took_effect(text.trim_end() == value)?)
    }

    /// Writes a file of it.
    pub(crate) fn write(&self, file: &str, value: &str) -> std::io::Result<()> {
        let file = openat(&self.0, file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        File::from(file).write_all(value.as_bytes())
    }
}

impl AsFd for Proc {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
