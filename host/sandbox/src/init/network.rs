//! Network namespaces of a zygote's sandboxes. An empty one serves again: to make one costs more than the rest of a clone.
//!
//! Each is made by the zygote, so that it belongs to the tenant's user namespace and no sandbox has a capability in it; its
//! `lo` is down and stays down. When a sandbox is dead, its namespace is compared with what it was when it was new: sockets
//! of every family, counters of every protocol and device. One that is not as it was is thrown away. None ever leaves its
//! zygote, and so its tenant.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;

use super::proc::Proc;
use super::zygote::Choice;
use crate::spec::SandboxId;

/// Empty ones that are kept at most: what a burst of jobs may find. Each holds some 50 KiB of kernel memory.
const KEPT: usize = 8;

/// What is made ahead while nobody waits.
const AHEAD: usize = 1;

/// Files that must read as they did when the namespace was new, as far as they are about the namespace. Missing ones are
/// as good as empty: IPv6 may be off.
const FILES: [&str; 7] = [
    "self/net/sockstat",
    "self/net/sockstat6",
    "self/net/unix",
    "self/net/netlink",
    "self/net/snmp",
    "self/net/snmp6",
    "self/net/dev",
];

/// Longer than any of them is in an empty namespace; and what all of them have there, about.
const MAX_FILE: usize = 16 * 1024;
const USUAL_SIZE: usize = 8 * 1024;

/// The namespaces of one zygote.
#[derive(Debug)]
pub(super) struct Networks {
    /// The zygote's own, in which no sandbox ever is.
    own: OwnedFd,
    empty: Vec<Network>,
    lent: HashMap<SandboxId, Network>,
}

#[derive(Debug)]
struct Network {
    fd: OwnedFd,
    /// [`FILES`], which tell of it wherever they are read.
    files: Vec<(&'static str, OwnedFd)>,
    /// What they said when it was new.
    newborn: Vec<u8>,
    used: bool,
}

impl Network {
    /// The one that this process is in, which is new.
    fn own(proc: &Proc) -> nix::Result<Self> {
        let fd = own(proc)?;
        let mut files = Vec::with_capacity(FILES.len());
        for name in FILES {
            match openat(proc.as_fd(), name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) {
                Ok(file) => files.push((name, file)),
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        let newborn = look(&files)?;
        Ok(Self { fd, files, newborn, used: false })
    }

    /// Whether nothing is left of those that have had it.
    fn is_empty(&self) -> bool {
        look(&self.files).is_ok_and(|now| now == self.newborn)
    }
}

impl Networks {
    /// Moves this process into a namespace of its own.
    pub(super) fn start(proc: &Proc) -> nix::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(Self { own: own(proc)?, empty: Vec::new(), lent: HashMap::new() })
    }

    /// Moves into the namespace that the sandbox is to be cloned in, if there is an empty one.
    pub(super) fn choose(&mut self, id: SandboxId, fresh: bool) -> Choice {
        let found = self.empty.iter().rposition(|network| !(fresh && network.used));
        let Some(mut network) = found.map(|index| self.empty.swap_remove(index)) else { return Choice::OfTheClone };
        if enter(&network.fd).is_err() {
            return Choice::OfTheClone;
        }
        let choice = if network.used { Choice::Used } else { Choice::New };
        network.used = true;
        self.lent.insert(id, network);
        choice
    }

    /// Moves back home.
    pub(super) fn leave(&self) {
        // it has been there; and what is cloned next is cloned from where [`Networks::choose`] goes
        let _ = enter(&self.own);
    }

    /// The sandbox is dead: keeps its namespace if there is nothing in it.
    pub(super) fn give_back(&mut self, id: SandboxId) {
        let Some(network) = self.lent.remove(&id) else { return };
        if self.empty.len() < KEPT && network.is_empty() {
            self.empty.push(network);
        }
    }

    /// Makes one ahead, if there is none.
    pub(super) fn provide(&mut self, proc: &Proc) {
        if self.empty.len() >= AHEAD {
            return;
        }
        let made = unshare(CloneFlags::CLONE_NEWNET).and_then(|()| Network::own(proc));
        // without one, the clone makes its own
        self.empty.extend(made.ok());
        self.leave();
    }
}

fn enter(network: &OwnedFd) -> nix::Result<()> {
    setns(network, CloneFlags::CLONE_NEWNET)
}

/// This process's network namespace.
fn own(proc: &Proc) -> nix::Result<OwnedFd> {
    openat(proc.as_fd(), "self/ns/net", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
}

/// What the files say now.
fn look(files: &[(&'static str, OwnedFd)]) -> nix::Result<Vec<u8>> {
    let mut seen = Vec::with_capacity(USUAL_SIZE);
    let mut piece = [0; 4096];
    for (name, file) in files {
        let start = seen.len();
        loop {
            let read = seen.len() - start;
            let at = libc::off_t::try_from(read).map_err(|_| Errno::EFBIG)?;
            let length = pread(file, &mut piece, at)?;
            seen.extend(&piece[..length]);
            // the kernel gives whole lines, as many as there is room for; none of them is as long as half of the room
            if length < piece.len() / 2 {
                break;
            }
            if read + length > MAX_FILE {
                return Err(Errno::EFBIG);
            }
        }
        if name.contains("sockstat") {
            let own = own_counts(&seen[start..]);
            seen.truncate(start);
            seen.extend(own);
        }
    }
    Ok(seen)
}

/// What of the text of `sockstat` is about the namespace: `orphan`, `alloc` and `mem` are the whole machine's.
fn own_counts(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    let mut counts = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        counts.push_str(words.next().unwrap_or_default());
        while let (Some(key), Some(value)) = (words.next(), words.next()) {
            if matches!(key, "used" | "inuse" | "tw" | "memory") {
                counts.extend([" ", key, " ", value]);
            }
        }
        counts.push('\n');
    }
    counts.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::own_counts;

    #[test]
    fn counts_of_the_whole_machine_are_left_out() {
        let text = "sockets: used 3\nTCP: inuse 1 orphan 5 tw 2 alloc 900 mem 77\nUDP: inuse 0 mem 9\nFRAG: inuse 0 memory 0\n";
        let own = "sockets: used 3\nTCP: inuse 1 tw 2\nUDP: inuse 0\nFRAG: inuse 0 memory 0\n";
        assert_eq!(String::from_utf8(own_counts(text.as_bytes())).unwrap(), own);
    }
}
