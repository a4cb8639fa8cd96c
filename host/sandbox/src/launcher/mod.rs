//! The launcher: one thread, the only process that keeps privilege.
//!
//! It makes cgroups and sandboxes, opens their gates, keeps their clocks, kills, reaps, reads usage, and cleans up. It
//! never blocks on a sandbox or on the server, holds no job's data, resolves no path inside a job's tree and joins
//! none of its namespaces. When the server goes, it kills every sandbox, removes its cgroups and ends.

mod birth;
mod ceilings;
mod control;
mod expected;
mod families;
mod listing;
mod live;
mod networks;
mod outbox;
mod pause;
mod start;
mod sweeper;
pub(crate) mod verify;
mod zygotes;

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use self::control::Freezing;
use self::expected::Expected;
use self::families::{Family, FamilyId};
use self::listing::Listing;
use self::live::Live;
use self::networks::Networks;
use self::outbox::Outbox;
use self::start::Place;
pub use self::start::{launcher_main, spawn};
use self::zygotes::{Zygote, ZygoteId};
use crate::cgroup::{Leaf, Tree};
use crate::init::seccomp::Filters;
use crate::protocol::{FromLauncher, ToLauncher};
use crate::spec::{Kind, SandboxId, SandboxSpec};
use crate::sys::process::{SingleThreaded, pidfd_send_signal};
use crate::uids::UidPool;
use crate::usage::KillCause;
use crate::wire::{MAX_PACKET, RecvError};
use crate::workload::Workload;

/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// Messages taken from the server before others are looked after: sandboxes, clocks, and what waits to be told.
const MESSAGES: usize = 64;

/// How long after a launch began nothing is done that nobody waits for: a launch is over by then, and would wait for it.
const AT_REST_AFTER: Duration = Duration::from_millis(2);

/// How long after the last attempt a cgroup that is still busy is tried again.
const REMOVE_AGAIN: Duration = Duration::from_millis(1);

/// Cgroups of dead sandboxes that wait to be removed, at most.
const MOST_LEAVING: usize = 64;

/// How long after the last launch the kernel is kept ready for the next one, and how often it is reminded. The cost is
/// some 10 µs of CPU time each. With 8 ms a few of a hundred launches were met by a reminder that had come too late itself.
const WARM_FOR: Duration = Duration::from_secs(10);
const WARM_EVERY: Duration = Duration::from_millis(2);

/// How long killed sandboxes may take to die when the launcher ends. Leaves time for the sweep within the 2 s after
/// which a dead server's launcher must be gone.
const LAST_WAIT: Duration = Duration::from_millis(1200);

/// The highest sandbox id: three bits of an event's token say what happened to it.
const MAX_ID: u64 = u64::MAX >> 3;

/// How long after the end of a zygote children are looked for that it has not told of, and how often; and how often as
/// long as there are some that live.
const STRANGERS_FOR: Duration = Duration::from_secs(2);
const STRANGERS_EVERY: Duration = Duration::from_millis(20);
const STRANGERS_LATER: Duration = Duration::from_millis(500);

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Server,
    Exit(SandboxId),
    Gate(SandboxId),
    Oom(SandboxId),
    Zygote(ZygoteId),
    ZygoteExit(ZygoteId),
    FamilyExit(FamilyId),
    Networks,
}

impl Source {
    fn token(self) -> u64 {
        match self {
            Self::Server => 0,
            Self::Networks => 1 << 3,
            Self::Exit(id) => id.0 << 3 | 1,
            Self::Gate(id) => id.0 << 3 | 2,
            Self::Oom(id) => id.0 << 3 | 3,
            Self::Zygote(id) => id.0 << 3 | 4,
            Self::ZygoteExit(id) => id.0 << 3 | 5,
            Self::FamilyExit(id) => id.0 << 3 | 6,
        }
    }

    fn of(token: u64) -> Self {
        let id = token >> 3;
        match token & 7 {
            1 => Self::Exit(SandboxId(id)),
            2 => Self::Gate(SandboxId(id)),
            3 => Self::Oom(SandboxId(id)),
            4 => Self::Zygote(ZygoteId(id)),
            5 => Self::ZygoteExit(ZygoteId(id)),
            6 => Self::FamilyExit(FamilyId(id)),
            _ if id == 1 => Self::Networks,
            _ => Self::Server,
        }
    }
}

/// How many zygotes there may be, for how long, and what must be left besides, in bytes.
struct ZygoteLimits {
    zygotes: usize,
    zygote_idle: Duration,
    memory_reserve: u64,
}

/// The launcher's whole state.
struct Launcher<'w> {
    proof: SingleThreaded,
    workload: &'w dyn Workload,
    place: Place,
    outbox: Outbox,
    epoll: Epoll,
    tree: Tree,
    uids: UidPool,
    null: OwnedFd,
    /// Make what sandboxes need before they are asked for.
    ahead: bool,
    networks: Networks,
    filters: HashMap<Kind, Rc<Filters>>,
    live: HashMap<SandboxId, Live>,
    /// Sandboxes that a zygote is to clone.
    expected: HashMap<SandboxId, Expected>,
    zygotes: HashMap<ZygoteId, Zygote>,
    families: HashMap<FamilyId, Family>,
    /// Of zygotes and families.
    numbers: u64,
    limits: ZygoteLimits,
    /// When idle zygotes are looked for.
    look_at_zygotes: Option<Instant>,
    /// Until when children are looked for that nobody has told of.
    strangers_until: Option<Instant>,
    /// When which sandbox has to be looked at. Each has one entry at most, the one in its `alarm`.
    alarms: BTreeSet<(Instant, SandboxId)>,
    /// Cgroups of dead sandboxes, to be removed when there is nothing else to do.
    leaving: Vec<Leaf>,
    /// Those that could not be removed yet.
    busy: Vec<Leaf>,
    /// A `/dev` with the standard devices that no sandbox has.
    dev: Option<OwnedFd>,
    /// What kind of sandbox is to be made ready for ahead.
    stock_up_for: Option<SandboxSpec>,
    /// Freezes that have been ordered and not been seen to have happened.
    freezing: Vec<Freezing>,
    /// Lists of processes that have been begun, at most one a sandbox.
    listings: Vec<Listing>,
    /// When the last launch began.
    last_launch: Instant,
    /// Until when the kernel is kept ready for launches, and when it was last reminded.
    warm: Option<(Instant, Instant)>,
}

impl Launcher<'_> {
    /// Serves until the server's end of the socket is closed, then until every sandbox is dead.
    fn run(&mut self) -> nix::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
        self.epoll.add(self.outbox.socket(), EpollEvent::new(flags, Source::Server.token()))?;
        if let Some(maker) = self.networks.maker() {
            self.watch(maker, Source::Networks)?;
        }
        let mut buffer = vec![0; MAX_PACKET];
        while self.step(&mut buffer)? {}
        self.end()
    }

    /// One round of events. False once the server is gone.
    fn step(&mut self, buffer: &mut [u8]) -> nix::Result<bool> {
        let mut serving = true;
        let sources = self.wait()?;
        let at_rest = sources.is_empty() && self.last_launch.elapsed() >= AT_REST_AFTER;
        if at_rest || self.busy.len() > MOST_LEAVING {
            self.do_chore();
        }
        for source in sources {
            match source {
                Source::Server => serving &= self.read_server(buffer),
                Source::Gate(id) => self.read_gate(id),
                Source::Oom(id) => self.check_oom(id),
                Source::Exit(id) => self.bury(id),
                Source::Zygote(id) => self.read_zygote(id),
                Source::ZygoteExit(id) => self.bury_zygote(id),
                Source::FamilyExit(id) => self.bury_family(id),
                Source::Networks => {
                    let live = &self.live;
                    self.networks.receive(|number| live.values().any(|live| live.network == Some(number)));
                }
            }
        }
        self.ring_alarms(Instant::now());
        serving &= self.outbox.flush();
        Ok(serving)
    }

    /// Waits for events, or until something is due.
    fn wait(&mut self) -> nix::Result<Vec<Source>> {
        let now = Instant::now();
        let rest = now.max(self.last_launch + AT_REST_AFTER);
        let chores = (!self.leaving.is_empty() || self.stock_up_for.is_some()).then_some(rest);
        let busy = (!self.busy.is_empty()).then(|| rest.max(now + REMOVE_AGAIN));
        let idle = self.tree.remove_idle_tenants(now);
        let ceilings = self.settle_ceilings(now);
        let freezes = self.settle_freezes(now);
        let lists = self.list_some().then_some(now);
        let warm = self.keep_warm(now);
        let zygotes = self.look_at_zygotes(now);
        let strangers = self.reap_strangers(now);
        // those before may have set one
        let alarm = self.alarms.first().map(|(at, _)| *at);
        let next = [alarm, chores, busy, idle, ceilings, freezes, lists, warm, zygotes, strangers];
        let next = next.into_iter().flatten().min();
        let timeout = next.map_or(EpollTimeout::NONE, |at| {
            // rounded up: a timer that rings early would ring again and again until it is due
            let ms = at.saturating_duration_since(now).as_micros().div_ceil(1000);
            EpollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::MAX)
        });
        self.outbox.arm(&self.epoll)?;
        let mut events = [EpollEvent::empty(); EVENTS];
        match self.epoll.wait(&mut events, timeout) {
            Ok(n) => Ok(events[..n].iter().map(|event| Source::of(event.data())).collect()),
            Err(Errno::EINTR) => Ok(Vec::new()),
            Err(errno) => Err(errno),
        }
    }

    /// Reminds the kernel of attaching, see [`Tree::keep_warm`]. Returns when to do so again.
    fn keep_warm(&mut self, now: Instant) -> Option<Instant> {
        let (until, last) = self.warm?;
        if now >= until {
            self.warm = None;
            return None;
        }
        if now < last + WARM_EVERY {
            return Some(last + WARM_EVERY);
        }
        match self.tree.keep_warm() {
            Ok(()) => self.warm = Some((until, now)),
            // launches are a little slower
            Err(_) => self.warm = None,
        }
        self.warm.map(|_| now + WARM_EVERY)
    }

    /// Takes some of the messages that the server has sent. False once it is gone, or talks nonsense.
    fn read_server(&mut self, buffer: &mut [u8]) -> bool {
        for _ in 0..MESSAGES {
            let received = match self.outbox.packets().recv_into(buffer, ToLauncher::fds) {
                Ok(received) => received,
                Err(RecvError::Empty) => return true,
                Err(RecvError::Closed | RecvError::Malformed | RecvError::Io(_)) => return false,
            };
            match received.value {
                ToLauncher::Launch { id, spec } => {
                    if let Err(error) = self.launch(id, spec, received.fds) {
                        self.outbox.send(FromLauncher::Refused { id, error });
                    }
                }
                ToLauncher::Kill(id) => self.kill(id, KillCause::Requested),
                ToLauncher::SetCeiling { request, tenant, ceiling } => self.change_ceiling(request, &tenant, &ceiling),
                ToLauncher::ForgetTenant(tenant) => {
                    // what could not be ended yet goes on, its clocks too
                    let _ = self.thaw_tenant(&tenant);
                    self.tree.forget(&tenant);
                    self.end_zygotes_of(&tenant, None);
                }
                ToLauncher::ForgetProgram { tenant, program } => self.end_zygotes_of(&tenant, Some(&program)),
                ToLauncher::Order { request, id, order } => self.obey(request, id, order),
                ToLauncher::FreezeTenant { request, tenant, frozen } => self.freeze_tenant(request, &tenant, frozen),
                ToLauncher::Configure(_) => return false,
            }
        }
        // the event is still there for what is left
        true
    }

    /// For the next zygote or family.
    fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Whether a child of this process is in the books.
    fn is_known(&self, pid: Pid) -> bool {
        let is_sandbox = self.live.values().any(|live| live.pid == pid);
        is_sandbox || self.has_zygote(pid) || self.has_family(pid) || self.place.is_own(pid)
    }

    fn strangers_from_now(&self) -> Option<Instant> {
        Some(Instant::now() + STRANGERS_FOR)
    }

    /// Reaps dead children that nobody has told of: what a zygote had cloned when it died itself. Returns when to look
    /// again.
    fn reap_strangers(&mut self, now: Instant) -> Option<Instant> {
        let until = self.strangers_until?;
        let own = Pid::this();
        let children = std::fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap_or_default();
        let mut live = false;
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw) {
            if !self.is_known(pid) {
                // it is nobody else's to wait for; one that lives is let be
                let waited = waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL));
                live |= waited == Ok(WaitStatus::StillAlive);
            }
        }
        // one that stands still with its tenant on v1 comes to its end after
        self.strangers_until = (live || now < until).then_some(until);
        self.strangers_until.map(|until| now + if now < until { STRANGERS_EVERY } else { STRANGERS_LATER })
    }

    /// Does a little of what nobody waits for.
    fn do_chore(&mut self) {
        if let Some(leaf) = self.leaving.pop() {
            self.let_go_now(leaf);
        } else if let Some(spec) = self.stock_up_for.take() {
            self.stock_up_for = self.provide(&spec).then_some(spec);
        } else {
            for leaf in std::mem::take(&mut self.busy) {
                self.let_go_now(leaf);
            }
        }
    }

    /// Removes the cgroup of a process that is dead, or keeps it for another one, soon.
    fn let_go(&mut self, leaf: Leaf) {
        if self.leaving.len() < MOST_LEAVING { self.leaving.push(leaf) } else { self.let_go_now(leaf) }
    }

    fn let_go_now(&mut self, leaf: Leaf) {
        let left = if self.ahead { self.tree.keep(leaf) } else { self.tree.remove(leaf) };
        self.busy.extend(left);
    }

    /// Kills what lives, waits a bounded time for the deaths, and removes every cgroup.
    fn end(&mut self) -> nix::Result<()> {
        let ids: Vec<SandboxId> = self.live.keys().chain(self.expected.keys()).copied().collect();
        for id in ids {
            self.kill(id, KillCause::Requested);
        }
        for family in self.families.values() {
            let _ = pidfd_send_signal(family.pidfd.as_fd(), Signal::SIGKILL);
        }
        for id in self.zygotes.keys().copied().collect::<Vec<_>>() {
            self.end_zygote(id);
        }
        let _ = self.epoll.delete(self.outbox.socket());
        let deadline = Instant::now() + LAST_WAIT;
        let left = |launcher: &Self| {
            !launcher.live.is_empty() || !launcher.zygotes.is_empty() || !launcher.families.is_empty()
        };
        while left(self) && Instant::now() < deadline {
            let mut events = [EpollEvent::empty(); EVENTS];
            let n = self.epoll.wait(&mut events, 10_u8).unwrap_or(0);
            for event in &events[..n] {
                match Source::of(event.data()) {
                    Source::Exit(id) => self.bury(id),
                    Source::Gate(id) => self.read_gate(id),
                    Source::Zygote(id) => self.read_zygote(id),
                    Source::ZygoteExit(id) => self.bury_zygote(id),
                    Source::FamilyExit(id) => self.bury_family(id),
                    Source::Oom(_) | Source::Server | Source::Networks => {}
                }
            }
        }
        self.tree.remains().sweep();
        self.networks.dismiss();
        self.place.dismiss_sweeper();
        Ok(())
    }

    fn watch(&self, fd: impl AsFd, source: Source) -> nix::Result<()> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.token()))
    }

    /// Before a descriptor is closed that is watched, or may be. Closing it is not enough: a child that stands still from
    /// its birth on has not closed its copy yet, and the kernel would go on to tell of it.
    fn unwatch(&self, fd: impl AsFd) {
        // ENOENT: it was not
        let _ = self.epoll.delete(fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_say_what_they_are_about() {
        for id in [SandboxId(0), SandboxId(1), SandboxId(MAX_ID)] {
            for source in [Source::Exit(id), Source::Gate(id), Source::Oom(id)] {
                assert_eq!(Source::of(source.token()), source);
            }
        }
        let zygote = ZygoteId(7);
        let others = [Source::Zygote(zygote), Source::ZygoteExit(zygote), Source::FamilyExit(FamilyId(7))];
        for source in [Source::Server, Source::Networks].into_iter().chain(others) {
            assert_eq!(Source::of(source.token()), source);
        }
    }
}
