//! One cgroup directory, held by descriptor: control files are opened relative to it, never by a path from the root.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat};
use nix::sys::stat::{Mode, fstat, mkdirat};
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, Statfs, statfs};
use nix::unistd::{AccessFlags, Pid, Uid, UnlinkatFlags, faccessat, unlinkat};

/// The longest control file that is read. `cpuacct.usage_all` of a large machine is the longest that we know, and we
/// do not read it; 64 KiB hold the pids of some 8,000 processes.
const MAX_CONTROL_FILE: u64 = 64 * 1024;

/// Longer than most of them.
const FIRST_READ: usize = 1024;

const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// An open cgroup directory.
#[derive(Debug)]
pub(crate) struct Dir(OwnedFd);

impl Dir {
    pub(crate) fn open(path: &Path) -> nix::Result<Self> {
        Ok(Self(open(path, DIRECTORY, Mode::empty())?))
    }

    /// Whether this process may make cgroups at `path`: it is one, not hidden by another mount, and can be written to.
    pub(crate) fn takes_cgroups(path: &Path) -> bool {
        let is_cgroup = |fs: Statfs| [CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&fs.filesystem_type());
        let may = AccessFlags::W_OK | AccessFlags::X_OK;
        statfs(path).is_ok_and(is_cgroup) && faccessat(AT_FDCWD, path, may, AtFlags::AT_EACCESS).is_ok()
    }

    /// Makes the directory `name` below this one, or opens it if it is there already.
    pub(crate) fn make(&self, name: &str) -> nix::Result<Self> {
        match mkdirat(&self.0, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => self.child(name),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn child(&self, name: &str) -> nix::Result<Self> {
        Ok(Self(openat(&self.0, name, DIRECTORY, Mode::empty())?))
    }

    /// Removes the empty cgroup `name`. `EBUSY` while a process of it is still dying; a missing one is fine.
    pub(crate) fn remove(&self, name: &str) -> nix::Result<()> {
        match unlinkat(&self.0, name, UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Whose directory it is.
    pub(crate) fn owner(&self) -> nix::Result<Uid> {
        Ok(Uid::from_raw(fstat(&self.0)?.st_uid))
    }

    /// The names of the cgroups directly below.
    pub(crate) fn children(&self) -> nix::Result<Vec<String>> {
        self.list(".", |kind| kind == Some(nix::dir::Type::Directory))
    }

    /// The names of everything in `path` below this directory.
    pub(crate) fn entries(&self, path: &str) -> nix::Result<Vec<String>> {
        self.list(path, |_| true)
    }

    fn list(&self, path: &str, wanted: impl Fn(Option<nix::dir::Type>) -> bool) -> nix::Result<Vec<String>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = nix::dir::Dir::openat(&self.0, path, flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if wanted(entry.file_type()) && name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    pub(crate) fn write(&self, file: &str, value: &str) -> nix::Result<()> {
        let fd = openat(&self.0, file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        match nix::unistd::write(&fd, value.as_bytes())? {
            n if n == value.len() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    /// As [`Dir::write`]; a file that this kernel does not have is no error.
    pub(crate) fn write_if_present(&self, file: &str, value: &str) -> nix::Result<()> {
        match self.write(file, value) {
            Err(Errno::ENOENT) => Ok(()),
            other => other,
        }
    }

    pub(crate) fn read(&self, file: &str) -> io::Result<String> {
        let mut file = File::from(self.open_file(file, OFlag::O_RDONLY)?);
        // the kernel gives as much at once as there is room for: a second read is for the few files that are longer
        let mut first = [0; FIRST_READ];
        let length = file.read(&mut first)?;
        let mut text = first[..length].to_vec();
        if length == FIRST_READ {
            file.take(MAX_CONTROL_FILE).read_to_end(&mut text)?;
        }
        String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    pub(crate) fn open_file(&self, file: &str, flags: OFlag) -> nix::Result<OwnedFd> {
        openat(&self.0, file, flags | OFlag::O_CLOEXEC, Mode::empty())
    }

    /// Moves a process, all its threads, into this cgroup.
    pub(crate) fn attach(&self, pid: Pid) -> nix::Result<()> {
        let fd = self.open_file("cgroup.procs", OFlag::O_WRONLY)?;
        File::from(fd).write_all(pid.to_string().as_bytes()).map_err(|e| crate::sys::process::errno_of(&e))
    }

    /// The processes in this cgroup, those below not counted.
    pub(crate) fn processes(&self) -> io::Result<Vec<Pid>> {
        let text = self.read("cgroup.procs")?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw).collect())
    }

    /// A path that leads here in this process, for libraries that only take paths.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }

    /// Reads back that a file holds the number that was written to it, else `EPROTO`.
    pub(crate) fn confirm(&self, file: &str, value: u64) -> nix::Result<()> {
        if self.number(file) == Some(value) { Ok(()) } else { Err(Errno::EPROTO) }
    }

    /// A figure from a file that holds a single number.
    pub(crate) fn number(&self, file: &str) -> Option<u64> {
        self.read(file).ok()?.trim().parse().ok()
    }

    /// A figure from a file of `key value` lines.
    pub(crate) fn keyed_number(&self, file: &str, key: &str) -> Option<u64> {
        let text = self.read(file).ok()?;
        keyed(&text, key)
    }
}

/// The number behind `key` in the `key value` lines of `text`.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::keyed;

    #[test]
    fn a_key_matches_whole_and_only_at_the_start() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!(keyed(text, "oom_kill"), Some(3));
        assert_eq!(keyed(text, "oom"), None);
        assert_eq!(keyed("usage_usec x\n", "usage_usec"), None);
    }
}
