//! Network namespaces, made ahead.
//!
//! A new one costs more than the six other namespaces of a clone together. So a process of its own, the maker, makes
//! them while nobody waits: each is handed over once, to one sandbox, fresh from the kernel. The launcher steps into it
//! for the clone alone. Where there is none, the clone makes one.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, fstat};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::init::proc::Proc;
use crate::sys::process::{Cloned, SingleThreaded, close_all_except, errno_of, exit_now, fork};
use crate::wire::{Packets, RecvError};

/// Namespaces that wait at most: more than jobs begin in the time that it takes to make one.
const AHEAD: usize = 8;

/// This process's network namespace.
const OWN: &str = "/proc/self/ns/net";

/// The namespaces that wait for their sandbox.
#[derive(Debug)]
pub(super) struct Networks {
    /// The launcher's own.
    own: OwnedFd,
    maker: Option<Maker>,
    ready: VecDeque<Network>,
    /// Asked for and not come.
    ordered: usize,
}

/// The process that makes them.
#[derive(Debug)]
struct Maker {
    pid: Pid,
    socket: Packets,
}

/// A network namespace that nobody is in.
#[derive(Debug)]
pub(super) struct Network {
    fd: OwnedFd,
    /// Its inode's number, as in `/proc/PID/ns/net`.
    pub(super) number: u64,
}

impl Network {
    fn new(fd: OwnedFd) -> nix::Result<Self> {
        let number = fstat(&fd)?.st_ino;
        Ok(Self { fd, number })
    }
}

impl Networks {
    /// Forks the maker, if namespaces are to be made `ahead`.
    pub(super) fn start(proof: &SingleThreaded, ahead: bool) -> nix::Result<Self> {
        let own = open(OWN, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let maker = if ahead { Some(start_maker(proof)?) } else { None };
        Ok(Self { own, maker, ready: VecDeque::new(), ordered: 0 })
    }

    /// Where the maker's work arrives. Readable too when it has ended.
    pub(super) fn maker(&self) -> Option<&Packets> {
        self.maker.as_ref().map(|maker| &maker.socket)
    }

    /// The maker's pid.
    pub(super) fn maker_pid(&self) -> Option<Pid> {
        self.maker.as_ref().map(|maker| maker.pid)
    }

    /// Ends the maker and waits for its end.
    pub(super) fn dismiss(&mut self) {
        self.ready.clear();
        if let Some(Maker { pid, socket }) = self.maker.take() {
            drop(socket);
            // nothing to do about an error: it dies with this process
            let _ = waitpid(pid, None);
        }
    }

    /// Takes one, if there is any.
    pub(super) fn take(&mut self) -> Option<Network> {
        self.ready.pop_front()
    }

    /// Orders as many as are missing.
    pub(super) fn order(&mut self) {
        let Some(maker) = &self.maker else { return };
        for _ in self.ready.len() + self.ordered..AHEAD {
            if maker.socket.send(&ORDER, &[] as &[OwnedFd]).is_err() {
                return;
            }
            self.ordered += 1;
        }
    }

    /// Takes what has been made. One that is not new to this process is thrown away: `in_use` tells the numbers of those
    /// that sandboxes have.
    pub(super) fn receive(&mut self, in_use: impl Fn(u64) -> bool) {
        while let Some(maker) = &self.maker {
            match maker.socket.recv(|_: &u8| 1) {
                Ok(received) => {
                    self.ordered = self.ordered.saturating_sub(1);
                    self.ready.extend(received.fds.into_iter().filter_map(|fd| Network::new(fd).ok()));
                }
                Err(RecvError::Empty) => break,
                // from now on each clone makes its own
                Err(_) => self.dismiss(),
            }
        }
        let own = fstat(&self.own).map_or(0, |stat| stat.st_ino);
        let mut seen = vec![own];
        self.ready.retain(|network| {
            let new = !seen.contains(&network.number) && !in_use(network.number);
            seen.push(network.number);
            new
        });
    }

    /// Clones from within `network`: the child stays there, this process comes back, or tells that it has not.
    pub(super) fn clone_in(
        &self,
        network: &Network,
        clone: impl FnOnce() -> nix::Result<Cloned>,
    ) -> nix::Result<(Cloned, nix::Result<()>)> {
        let go = |to: &OwnedFd| setns(to, CloneFlags::CLONE_NEWNET);
        go(&network.fd)?;
        match clone() {
            Ok(Cloned::Child) => Ok((Cloned::Child, Ok(()))),
            Ok(parent) => Ok((parent, go(&self.own))),
            Err(errno) => {
                go(&self.own)?;
                Err(errno)
            }
        }
    }
}

/// What the launcher and the maker say to each other: one more, and here it is.
const ORDER: u8 = 1;

fn start_maker(proof: &SingleThreaded) -> nix::Result<Maker> {
    let (ours, theirs) = Packets::pair().map_err(|error| errno_of(&error))?;
    let Some(pid) = fork(proof)? else {
        let alone = Proc::open().and_then(|proc| close_all_except(proof, proc.as_fd(), &[theirs.as_raw_fd()])).is_ok()
            && prctl::set_name(c"holm-networks").is_ok()
            && prctl::set_pdeathsig(Signal::SIGKILL).is_ok();
        // ends with the launcher, which alone has the other end
        while alone && theirs.recv(|_: &u8| 0).is_ok() && make(&theirs).is_ok() {}
        exit_now(0)
    };
    ours.set_nonblocking().map_err(|error| errno_of(&error))?;
    Ok(Maker { pid, socket: ours })
}

fn make(launcher: &Packets) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let network = open(OWN, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    launcher.send(&ORDER, &[network]).map_err(|error| errno_of(&error))
}
