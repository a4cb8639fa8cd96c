//! The probe outside of any sandbox, where its attacks must work: as a plain process of this host.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};

use tempfile::TempDir;

use super::native;

/// A user that nobody is, for what the kernel counts by user and does not count for root.
pub const NOBODY_ELSE: u32 = 61_183;

/// A probe that runs. Killed when dropped.
pub struct Plain {
    child: Child,
    stdout: BufReader<ChildStdout>,
    _dir: TempDir,
}

impl Plain {
    /// Starts it as a user of this host, with an input that does not end.
    pub fn start(uid: u32, words: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.path().join("probe");
        fs::write(&path, native("probe")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(&path);
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).uid(uid).gid(uid).process_group(0);
        // another test's fork may hold the file open to write for a moment
        let mut child = super::wait_until("the probe starts", || command.spawn().ok());
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout, _dir: dir }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it says.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Ends its input, and gives what it says until its end.
    pub fn finish(mut self) -> String {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        rest.trim_end().to_owned()
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the probe says as root of this host.
pub fn outside(words: &[&str]) -> String {
    Plain::start(0, words).finish()
}
