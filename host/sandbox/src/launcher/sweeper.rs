//! The sweeper: a process that waits for the launcher's death, by whatever cause, and removes its cgroups.
//!
//! A launcher that is killed takes its sandboxes with it (each asked the kernel for that), but directories do not die.
//! The sweeper holds one end of a pipe whose other end only the launcher has: its end-of-file is the launcher's death.
//! It also holds the claim on the instance's uids until no process is left that could have one of them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::prctl;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2, read};

use crate::cgroup::Remains;
use crate::init::proc::Proc;
use crate::sys::process::{SingleThreaded, close_all_except, exit_now, fork};

/// The launcher's hold on its sweeper.
pub(super) struct Sweeper {
    pub(super) pid: Pid,
    /// Closing it sets the sweeper to work.
    alive: OwnedFd,
}

impl Sweeper {
    /// Lets it work and waits for its end.
    pub(super) fn dismiss(self) {
        drop(self.alive);
        // nothing to do about an error: the sweeper ends by itself
        let _ = waitpid(self.pid, None);
    }
}

/// Forks the sweeper of the cgroups in `remains`, which keeps the uids claimed through `claim`.
pub(super) fn start(proof: &SingleThreaded, remains: &Remains<'_>, claim: BorrowedFd<'_>) -> nix::Result<Sweeper> {
    let (death, alive) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    match fork(proof)? {
        Some(pid) => Ok(Sweeper { pid, alive }),
        None => {
            let mut keep: Vec<RawFd> = remains.fds().map(|fd| fd.as_raw_fd()).collect();
            keep.extend([death.as_raw_fd(), claim.as_raw_fd()]);
            if Proc::open().and_then(|proc| close_all_except(proof, proc.as_fd(), &keep)).is_ok() {
                watch_over(&death, remains);
            }
            exit_now(0)
        }
    }
}

fn watch_over(death: &OwnedFd, remains: &Remains<'_>) {
    let _ = prctl::set_name(c"holm-sweeper");
    // nothing is ever written: this returns at end-of-file
    while matches!(read(death, &mut [0; 1]), Ok(1..) | Err(nix::errno::Errno::EINTR)) {}
    remains.sweep();
}
