//! The sweeper: a process that waits for the launcher's death, by whatever cause, and removes its cgroups.
//!
//! A launcher that is killed takes its sandboxes with it (each asked the kernel for that), but directories do not die.
//! The sweeper holds a pidfd of the launcher, and one end of a pipe whose other end only the launcher should have: the
//! end-of-file alone is not enough, as a sandbox that stands still from its birth on has not closed its copy.
//! It also holds the claim on the instance's uids until no process is left that could have one of them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};

use crate::cgroup::Remains;
use crate::init::proc::Proc;
use crate::sys::process::{SingleThreaded, close_all_except, exit_now, fork, own_pidfd};

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
    let (dismissal, alive) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let death = own_pidfd()?;
    match fork(proof)? {
        Some(pid) => Ok(Sweeper { pid, alive }),
        None => {
            let mut keep: Vec<RawFd> = remains.fds().map(|fd| fd.as_raw_fd()).collect();
            keep.extend([dismissal.as_raw_fd(), death.as_raw_fd(), claim.as_raw_fd()]);
            if Proc::open().and_then(|proc| close_all_except(proof, proc.as_fd(), &keep)).is_ok() {
                watch_over(&dismissal, &death, remains);
            }
            exit_now(0)
        }
    }
}

fn watch_over(dismissal: &OwnedFd, death: &OwnedFd, remains: &Remains<'_>) {
    let _ = prctl::set_name(c"holm-sweeper");
    // nothing is ever written: either is ready at the end alone
    let mut ends = [dismissal, death].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
    while matches!(poll(&mut ends, PollTimeout::NONE), Ok(0) | Err(nix::errno::Errno::EINTR)) {}
    remains.sweep();
}
