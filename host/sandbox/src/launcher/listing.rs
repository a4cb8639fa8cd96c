//! The processes of a sandbox, a few at a time: a job may have thousands, and others wait for the launcher.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::Launcher;
use crate::cgroup::{Leaf, membership};
use crate::protocol::{Answer, OrderError, PROCESSES_AT_ONCE};
use crate::spec::SandboxId;
use crate::usage::ProcessInfo;

/// The longest file of a process that is read here: its status has some 1.5 KiB.
const MAX_FILE: u64 = 16 * 1024;

/// A list that has been begun.
#[derive(Debug)]
pub(super) struct Listing {
    request: u64,
    id: SandboxId,
    /// Those that have not been looked at.
    pids: Vec<Pid>,
}

impl Launcher<'_> {
    /// Begins to list the processes of a sandbox. A list of the same that has been begun before comes to its end here.
    pub(super) fn list(&mut self, request: u64, id: SandboxId) {
        if let Some(at) = self.listings.iter().position(|listing| listing.id == id) {
            let overtaken = self.listings.remove(at);
            self.answer(overtaken.request, Err(OrderError::Overtaken));
        }
        let pids = self.live.get(&id).and_then(|live| live.leaf.processes().ok());
        match pids {
            Some(pids) => self.listings.push(Listing { request, id, pids }),
            None => self.answer(request, Err(OrderError::Ended)),
        }
    }

    /// Goes on with one of the lists, by a few processes. True if there is more to do.
    pub(super) fn list_some(&mut self) -> bool {
        if self.listings.is_empty() {
            return false;
        }
        let mut listing = self.listings.remove(0);
        let Some(live) = self.live.get(&listing.id) else {
            self.answer(listing.request, Err(OrderError::Ended));
            return !self.listings.is_empty();
        };
        let now = listing.pids.split_off(listing.pids.len().saturating_sub(PROCESSES_AT_ONCE));
        let some = now.into_iter().filter_map(|pid| look_at(pid, &live.leaf).ok().flatten()).collect();
        let last = listing.pids.is_empty();
        self.answer(listing.request, Ok(Answer::Processes { some, last }));
        if !last {
            self.listings.push(listing); // the others in between
        }
        !self.listings.is_empty()
    }
}

/// What the kernel tells of a process in `leaf`. `None` if it is in another: the pid has been used again in the meantime.
/// Everything is read through one descriptor, which stands for the one process.
fn look_at(pid: Pid, leaf: &Leaf) -> io::Result<Option<ProcessInfo>> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let process = open(&*format!("/proc/{pid}"), flags, Mode::empty())?;
    if !leaf.holds(&membership(&read(&process, "cgroup")?, |_| true)) {
        return Ok(None);
    }
    Ok(understand(pid, &read(&process, "status")?))
}

fn read(process: &OwnedFd, file: &str) -> io::Result<String> {
    let file = openat(process, file, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::new();
    File::from(file).take(MAX_FILE).read_to_end(&mut bytes)?;
    // a process may call itself what is no text
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// From the text of `/proc/PID/status`. It is read without a lock that the process could hold, unlike its command line,
/// which stands in its own memory.
fn understand(pid: Pid, status: &str) -> Option<ProcessInfo> {
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
    Some(ProcessInfo {
        pid: field("NSpid")?.split_whitespace().last()?.parse().ok()?,
        host_pid: pid.as_raw().cast_unsigned(),
        state: field("State")?.chars().next()?,
        threads: field("Threads")?.parse().ok()?,
        command: field("Name")?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str =
        "Name:\ta\u{fffd} b\nUmask:\t0022\nState:\tT (stopped)\nTgid:\t70\nPid:\t70\nNSpid:\t70\t9\t2\nThreads:\t3\n";

    #[test]
    fn a_status_tells_of_a_process_as_it_is_inside() {
        let expected = ProcessInfo { pid: 2, host_pid: 70, state: 'T', threads: 3, command: "a\u{fffd} b".to_owned() };
        assert_eq!(understand(Pid::from_raw(70), STATUS), Some(expected));
    }

    #[test]
    fn a_status_that_lacks_something_tells_nothing() {
        for field in ["Name", "State", "NSpid", "Threads"] {
            assert_eq!(understand(Pid::from_raw(70), &STATUS.replace(&format!("{field}:"), "X:")), None, "{field}");
        }
        assert_eq!(understand(Pid::from_raw(70), ""), None);
    }

    #[test]
    fn an_own_process_can_be_looked_at() {
        let process = open("/proc/self", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        let own = understand(Pid::this(), &read(&process, "status").unwrap()).unwrap();
        assert_eq!(own.host_pid, std::process::id());
    }
}
