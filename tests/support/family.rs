//! The processes of a server: itself, its launcher, its sweeper, a compiler at work; and what becomes of them.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::inspect::Process;
use super::{Server, wait_until};

impl Server {
    pub fn process(&self) -> Process {
        Process(self.pid())
    }

    pub fn launcher(&self) -> Process {
        self.process().child("holm-launcher").unwrap()
    }

    pub fn sweeper(&self) -> Process {
        self.launcher().child("holm-sweeper").unwrap()
    }

    /// Waits until a compiler is busy with a tenant's bytes: it starts threads then.
    #[track_caller]
    pub fn wait_for_compiler(&self) -> Process {
        wait_until("a module is compiled", || {
            let mut all = self.sandboxed().into_iter().map(Process);
            all.find(|process| {
                process.try_status().is_some_and(|status| status["Name"] == "holm-compile" && status["Threads"] != "1")
            })
        })
    }

    /// Lets the server's jobs, and itself, come before the rest of this machine, which could otherwise take CPU from them.
    /// One server of a test executable at a time, for as long as what it gives is kept.
    pub fn favour_jobs(&self) -> MutexGuard<'static, ()> {
        static FAVOURED: Mutex<()> = Mutex::new(());
        let favoured = FAVOURED.lock().unwrap_or_else(PoisonError::into_inner);
        for jobs in self.cgroups() {
            let name = jobs.file_name().unwrap().to_string_lossy().into_owned();
            let own = [jobs.with_file_name(format!("server-of-{name}")), jobs.with_file_name("holm-server")];
            for dir in own.into_iter().chain([jobs]) {
                for (file, most) in [("cpu.shares", "262144"), ("cpu.weight", "10000")] {
                    if dir.join(file).exists() {
                        fs::write(dir.join(file), most).unwrap();
                    }
                }
            }
        }
        favoured
    }

    /// Kills the server, gives it no chance to clean up, and waits for its end alone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    /// Takes the directory of a server that has ended. The next one there has a log of its own.
    pub fn take_dir(mut self) -> TempDir {
        assert!(self.child.is_none(), "the server still runs");
        fs::rename(self.dir.path().join("log"), self.dir.path().join("old-log")).unwrap();
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }
}

impl Process {
    /// The living child of this name.
    pub fn child(self, name: &str) -> Option<Self> {
        let parent = self.0.to_string();
        let is_it = |process: &Self| {
            process.try_status().is_some_and(|status| status["PPid"] == parent && status["Name"] == name)
        };
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        pids.map(Process).find(|process| is_it(process) && process.lives())
    }

    /// Whether it can still do anything: it is neither gone nor waiting to be reaped.
    pub fn lives(self) -> bool {
        self.try_status().is_some_and(|status| !status["State"].starts_with(['Z', 'X']))
    }

    pub fn signal(self, signal: Signal) {
        match kill(Pid::from_raw(self.0.cast_signed()), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => panic!("{signal} to {}: {errno}", self.0),
        }
    }
}

/// The first bytes of `file` that somebody has locked by an open file description.
pub fn locked_bytes(file: &Path) -> Vec<i64> {
    let file = fs::File::open(file).unwrap();
    let [write, unlocked] = [libc::F_WRLCK, libc::F_UNLCK].map(|kind| i16::try_from(kind).unwrap());
    let is_locked = |at: &i64| {
        let mut lock = libc::flock { l_type: write, l_whence: 0, l_start: *at, l_len: 1, l_pid: 0 };
        fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
        lock.l_type != unlocked
    };
    (0..256).filter(is_locked).collect()
}
