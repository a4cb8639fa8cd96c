//! Zygotes: one for each artifact in use, of which its sandboxes are cloned. See `init::zygote` for what one is.
//!
//! The launcher asks, and never waits: a sandbox that is asked for is [`Expected`] until its zygote has told of it, and has
//! the same deadline as any other. A zygote that dies takes no sandbox along; those that it still owed are asked of a new
//! one, once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::families::FamilyId;
use super::live::{READY_WITHIN, reap, wait_for_end};
use super::verify;
use super::{Launcher, Source};
use crate::cgroup::Leaf;
use crate::error::{AtStep, LaunchError, Step};
use crate::init::seccomp::Filters;
use crate::init::zygote::{self, ZygoteBirth};
use crate::name::Name;
use crate::protocol::FromLauncher;
use crate::spawn::{FromZygote, MAX_ZYGOTE_MESSAGE, ToZygote};
use crate::spec::{ArtifactId, SandboxId, SandboxSpec};
use crate::sys::process::{Cloned, clone3, exit_now, pidfd_send_signal};
use crate::uids::JobIds;
use crate::usage::{KillCause, Namespaces};
use crate::wire::{Packets, RecvError};

/// Sandboxes that a zygote is asked for before it has answered: as many requests as its socket has room for, many
/// times over, and few enough for none to wait long behind another's clone.
const ASKED_AT_ONCE: usize = 16;

/// Messages taken from one zygote before others are looked after.
const MESSAGES: usize = 64;

/// How often idle zygotes are looked for, and how much memory is left.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A zygote's number. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ZygoteId(pub(super) u64);

/// What sandboxes must have in common to be cloned from the same zygote.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    family: FamilyId,
    program: Name,
    artifact: ArtifactId,
    stack_bytes: u64,
}

/// A living zygote.
pub(super) struct Zygote {
    key: Key,
    pid: Pid,
    pub(super) pidfd: OwnedFd,
    socket: Packets,
    pub(super) leaf: Leaf,
    /// Its own, once it has loaded its artifact.
    pub(super) namespaces: Option<Namespaces>,
    /// Those that it has not been asked for yet.
    pub(super) waiting: VecDeque<SandboxId>,
    asked: usize,
    /// Sandboxes of it that live.
    pub(super) sandboxes: usize,
    /// When it was made, or could go on.
    pub(super) since: Instant,
    pub(super) used: Instant,
    pub(super) failure: Option<LaunchError>,
}

impl Zygote {
    pub(super) fn family(&self) -> FamilyId {
        self.key.family
    }

    /// Whether it owes anything.
    pub(super) fn owes(&self) -> bool {
        self.asked + self.waiting.len() > 0
    }
}

impl Launcher<'_> {
    /// Whether this is a zygote's pid.
    pub(super) fn has_zygote(&self, pid: Pid) -> bool {
        self.zygotes.values().any(|zygote| zygote.pid == pid)
    }

    pub(super) fn zygote_for(
        &mut self,
        spec: &SandboxSpec,
        ids: &JobIds,
        artifact: &OwnedFd,
    ) -> Result<ZygoteId, LaunchError> {
        let family = self.family_for(spec, ids.run)?;
        let key = Key {
            family,
            program: spec.program.clone(),
            artifact: spec.artifact,
            stack_bytes: spec.limits.stack_bytes,
        };
        let found = self.zygotes.iter().find(|(_, zygote)| zygote.key == key && zygote.failure.is_none());
        if let Some((id, _)) = found {
            return Ok(*id);
        }
        let room = self.make_room_for_zygote();
        let artifact = room.and_then(|()| artifact.try_clone().at(Step::MakeZygote));
        let made = artifact.and_then(|artifact| self.make_zygote(key, spec, artifact));
        if made.is_err() {
            self.let_family_go(family);
        }
        made
    }

    /// Ends the zygote that has been of no use for the longest, if there are as many as there may be.
    fn make_room_for_zygote(&mut self) -> Result<(), LaunchError> {
        if self.zygotes.len() < self.limits.zygotes {
            return Ok(());
        }
        let unneeded = self.zygotes.iter().filter(|(_, zygote)| !zygote.owes());
        let oldest = unneeded.min_by_key(|(_, zygote)| zygote.used).map(|(id, _)| *id);
        match oldest {
            Some(id) => {
                self.end_zygote(id);
                Ok(())
            }
            None => Err(Errno::EAGAIN).at(Step::MakeZygote),
        }
    }

    fn make_zygote(&mut self, key: Key, spec: &SandboxSpec, artifact: OwnedFd) -> Result<ZygoteId, LaunchError> {
        let id = ZygoteId(self.next_number());
        let leaf = self.own_leaf(spec, &format!("zygote-{}", id.0)).at(Step::MakeZygote)?;
        match self.clone_zygote(id, &key, spec, artifact, &leaf) {
            Ok((pid, pidfd, socket)) => {
                let now = Instant::now();
                self.join_family(key.family);
                let (namespaces, waiting, asked, sandboxes, failure) = (None, VecDeque::new(), 0, 0, None);
                let zygote = Zygote {
                    key,
                    pid,
                    pidfd,
                    socket,
                    leaf,
                    namespaces,
                    waiting,
                    asked,
                    sandboxes,
                    since: now,
                    used: now,
                    failure,
                };
                self.zygotes.insert(id, zygote);
                self.watch_over(now);
                Ok(id)
            }
            Err(error) => {
                // what has been cloned all the same ends, as nobody bids it begin
                self.strangers_until = self.strangers_from_now();
                self.let_go(leaf);
                Err(error)
            }
        }
    }

    fn clone_zygote(
        &mut self,
        id: ZygoteId,
        key: &Key,
        spec: &SandboxSpec,
        artifact: OwnedFd,
        leaf: &Leaf,
    ) -> Result<(Pid, OwnedFd, Packets), LaunchError> {
        let family = self.families.get(&key.family).ok_or(Errno::ESRCH).at(Step::MakeZygote)?;
        let family = family.pidfd.try_clone().at(Step::MakeZygote)?;
        let (socket, theirs) = Packets::pair().at(Step::MakeZygote)?;
        socket.set_nonblocking().at(Step::MakeZygote)?;
        let null = self.null.try_clone().at(Step::MakeZygote)?;
        let filters = self.filters.entry(spec.kind).or_insert_with(|| Rc::new(Filters::compile(spec.kind))).clone();
        let (report, reporter) = Packets::pair().at(Step::MakeZygote)?;
        match clone3(&self.proof, CloneFlags::empty(), None).at(Step::MakeZygote)? {
            Cloned::Child => {
                let birth = ZygoteBirth { spec: spec.clone(), filters, socket: theirs, family, artifact, null };
                self.clone_in_family(birth, &reporter, leaf)
            }
            // it does two calls and ends
            Cloned::Parent { pidfd, .. } => wait_for_end(&pidfd).at(Step::MakeZygote)?,
        }
        drop(reporter);
        let told = report.recv(|told: &Result<(), LaunchError>| usize::from(told.is_ok()));
        let told = told.map_err(|_| Errno::EPIPE).at(Step::MakeZygote)?;
        told.value?;
        let pidfd = told.fds.into_iter().next().ok_or(Errno::EPROTO).at(Step::MakeZygote)?;
        let pid = verify::own_child(&pidfd).at(Step::MakeZygote)?;
        let ready = self
            .watch(pidfd.as_fd(), Source::ZygoteExit(id))
            .and_then(|()| self.watch(socket.as_fd(), Source::Zygote(id)))
            .and_then(|()| leaf.attach(pid))
            .at(Step::MakeZygote)
            .and_then(|()| socket.send(&ToZygote::Begin, NO_FDS).at(Step::MakeZygote));
        match ready {
            Ok(()) => Ok((pid, pidfd, socket)),
            Err(error) => {
                let _ = pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL);
                self.unwatch(pidfd);
                self.unwatch(socket);
                Err(error)
            }
        }
    }

    /// The life of a process between the launcher and a zygote. What enters a pid namespace for its children needs
    /// privilege over its own to come back, which an ordinary user's launcher does not have; so this one enters, and its
    /// child is the launcher's.
    fn clone_in_family(&self, birth: ZygoteBirth, reporter: &Packets, leaf: &Leaf) -> ! {
        let cloned = prctl::set_name(c"holm-zygote")
            .and_then(|()| setns(&birth.family, CloneFlags::CLONE_NEWPID))
            .and_then(|()| clone3(&self.proof, CloneFlags::CLONE_PARENT, leaf.birthplace()));
        // should it not be heard, the launcher knows by this process's end
        let _ = match cloned.at(Step::MakeZygote) {
            Ok(Cloned::Child) => zygote::live(birth, &self.proof, self.workload),
            Ok(Cloned::Parent { pidfd, .. }) => reporter.send(&Ok::<(), LaunchError>(()), &[pidfd]),
            Err(error) => reporter.send(&Err::<(), LaunchError>(error), NO_FDS),
        };
        exit_now(0)
    }

    /// Asks a zygote for as many of the sandboxes that it owes as it may be asked for at once.
    pub(super) fn ask(&mut self, id: ZygoteId) {
        let Some(zygote) = self.zygotes.get_mut(&id) else { return };
        while zygote.namespaces.is_some() && zygote.asked < ASKED_AT_ONCE {
            let Some(next) = zygote.waiting.pop_front() else { return };
            let Some(expected) = self.expected.get_mut(&next) else { continue };
            let spawn = ToZygote::Spawn {
                id: next,
                limits: expected.spec.limits,
                first_id: expected.ids.within_run(),
                fresh_network: expected.spec.fresh_network,
            };
            match zygote.socket.send(&spawn, &expected.ends) {
                Ok(()) => {
                    expected.asked = true;
                    zygote.asked += 1;
                }
                // its next answer makes room
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && zygote.asked > 0 => {
                    zygote.waiting.push_front(next);
                    return;
                }
                // its death is told by its pidfd, and this one is then asked of another
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return,
                Err(error) => {
                    let errno = crate::sys::process::errno_of(&error);
                    self.give_up_expected(next, LaunchError { step: Step::Spawn, errno: errno as i32 });
                    return self.ask(id);
                }
            }
        }
    }

    /// Takes what a zygote says.
    pub(super) fn read_zygote(&mut self, id: ZygoteId) {
        for _ in 0..MESSAGES {
            let Some(zygote) = self.zygotes.get_mut(&id) else { return };
            let mut buffer = [0; MAX_ZYGOTE_MESSAGE];
            let received = match zygote.socket.recv_into(&mut buffer, FromZygote::fds) {
                Ok(received) => received,
                Err(RecvError::Empty) => return,
                // its death is told by its pidfd
                Err(_) => return self.end_zygote(id),
            };
            let understood = match received.value {
                FromZygote::Loaded => self.take_up_zygote(id),
                FromZygote::Failed(error) => {
                    zygote.failure.get_or_insert(error);
                    true
                }
                FromZygote::Refused { id: sandbox, error } => self.refuse_expected(id, sandbox, error),
                FromZygote::Spawned { id: sandbox, used_network, mapped } => {
                    let pidfd = received.fds.into_iter().next();
                    pidfd.is_some_and(|pidfd| self.take_spawned(id, sandbox, pidfd, used_network, mapped))
                }
            };
            if !understood {
                return self.end_zygote(id);
            }
        }
    }

    /// A zygote says that it is confined and loaded: it is looked at, and asked for what it owes.
    fn take_up_zygote(&mut self, id: ZygoteId) -> bool {
        let Some(zygote) = self.zygotes.get_mut(&id) else { return true };
        let Some(family) = self.families.get(&zygote.key.family) else { return false };
        match verify::read_back_zygote(&self.place, zygote.pid, family.run, &zygote.leaf) {
            Ok(namespaces) if zygote.namespaces.is_none() => {
                zygote.namespaces = Some(namespaces);
                self.ask(id);
                true
            }
            Ok(_) => false,
            Err(error) => {
                // one that is not there any more is to blame for nothing
                let vanished = [Errno::ENOENT, Errno::ESRCH].contains(&Errno::from_raw(error.errno));
                zygote.failure.get_or_insert(if vanished { GONE } else { error });
                false
            }
        }
    }

    pub(super) fn answered(&mut self, id: ZygoteId) {
        if let Some(zygote) = self.zygotes.get_mut(&id) {
            zygote.asked -= 1;
        }
        self.ask(id);
    }

    /// Kills a zygote. What it still owes is seen to when it is dead.
    pub(super) fn end_zygote(&mut self, id: ZygoteId) {
        if let Some(zygote) = self.zygotes.get_mut(&id) {
            zygote.failure.get_or_insert(GONE);
            let _ = pidfd_send_signal(zygote.pidfd.as_fd(), Signal::SIGKILL);
            let _ = zygote.leaf.freeze(false);
        }
    }

    /// Ends the zygotes of a tenant, or of one of its programs. What they owe, somebody has asked for since.
    pub(super) fn end_zygotes_of(&mut self, tenant: &Name, program: Option<&Name>) {
        let of = |zygote: &Zygote| {
            zygote.leaf.tenant() == tenant && program.is_none_or(|program| zygote.key.program == *program)
        };
        let ids: Vec<ZygoteId> = self.zygotes.iter().filter(|(_, zygote)| of(zygote)).map(|(id, _)| *id).collect();
        for id in ids {
            self.end_zygote(id);
        }
    }

    /// A zygote is dead: what it still owes is asked of another, unless that is to blame itself.
    pub(super) fn bury_zygote(&mut self, id: ZygoteId) {
        self.read_zygote(id); // its last words may still be there
        let Some(zygote) = self.zygotes.get(&id) else { return };
        if reap(&zygote.pidfd).is_none() {
            return;
        }
        let Some(zygote) = self.zygotes.remove(&id) else { return };
        self.unwatch(&zygote.pidfd);
        self.unwatch(&zygote.socket);
        // what it has cloned and not told of waits at a gate that nobody opens. It would end by itself, if nobody stood
        // still who has a copy of that gate; being a child of this process it can be told by its pid
        for pid in zygote.leaf.processes().unwrap_or_default() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let _ = zygote.leaf.kill();
        self.strangers_until = self.strangers_from_now();
        let owed = self.expected.iter().filter(|(_, expected)| expected.zygote == id).map(|(id, _)| *id);
        let owed: Vec<SandboxId> = owed.collect();
        let short_of_memory = zygote.leaf.oom_kills() > 0;
        for sandbox in owed {
            if short_of_memory && let Some(expected) = self.expected.get_mut(&sandbox) {
                expected.killed.get_or_insert(KillCause::Memory);
            }
            let failure = zygote.failure.unwrap_or(GONE);
            let to_blame = short_of_memory || failure != GONE;
            if to_blame || self.expect_again(sandbox).is_err() {
                self.give_up_expected(sandbox, failure);
            }
        }
        self.let_go(zygote.leaf);
        self.leave_family(zygote.key.family);
    }

    /// Looks at what lives from time to time, from now on.
    pub(super) fn watch_over(&mut self, now: Instant) {
        self.look_at_zygotes.get_or_insert(now + LOOK_EVERY);
    }

    /// Ends zygotes that have been idle, and those that do not come to load their artifact. Where memory is short, being
    /// idle for a moment is enough, and the server is told, as sandboxes may be waiting for jobs. Returns when to look again.
    pub(super) fn look_at_zygotes(&mut self, now: Instant) -> Option<Instant> {
        let due = self.look_at_zygotes?;
        if now < due {
            return Some(due);
        }
        let short = available_memory().is_some_and(|bytes| bytes < self.limits.memory_reserve);
        let idle = if short { Duration::ZERO } else { self.limits.zygote_idle };
        let done = |zygote: &Zygote| match zygote.namespaces {
            None => now >= zygote.since + READY_WITHIN && !self.tree.freezes(zygote.leaf.tenant()),
            Some(_) => {
                let busy = zygote.sandboxes > 0 || zygote.owes();
                !busy && now >= zygote.used + idle
            }
        };
        let done: Vec<ZygoteId> = self.zygotes.iter().filter(|(_, zygote)| done(zygote)).map(|(id, _)| *id).collect();
        for id in done {
            self.end_zygote(id);
        }
        let anything = !self.zygotes.is_empty() || !self.live.is_empty();
        if short && anything {
            self.outbox.send(FromLauncher::MemoryShort);
        }
        self.look_at_zygotes = anything.then(|| now + LOOK_EVERY);
        self.look_at_zygotes
    }

    /// A sandbox that it has cloned is dead.
    pub(super) fn tell_zygote(&mut self, id: ZygoteId, buried: SandboxId) {
        if let Some(zygote) = self.zygotes.get_mut(&id) {
            zygote.sandboxes -= 1;
            zygote.used = Instant::now();
            match zygote.socket.send(&ToZygote::Buried(buried), NO_FDS) {
                // then the network namespace does not serve again
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.end_zygote(id),
                _ => {}
            }
        }
    }
}

/// Bytes that the host can give without taking them from anybody who uses them.
fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

const NO_FDS: &[OwnedFd] = &[];

/// The zygote died, by nothing that it could tell.
pub(super) const GONE: LaunchError = LaunchError { step: Step::Spawn, errno: Errno::EPIPE as i32 };
