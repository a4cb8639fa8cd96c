//! The launcher: one thread, the only process that keeps privilege.
//!
//! It makes cgroups and sandboxes, opens their gates, keeps their clocks, kills, reaps, reads usage, and cleans up. It
//! never blocks on a sandbox or on the server, holds no job's data, resolves no path inside a job's tree and joins
//! none of its namespaces. When the server goes, it kills every sandbox, removes its cgroups and ends.

mod birth;
mod ceilings;
mod control;
mod listing;
mod live;
mod networks;
mod outbox;
mod pause;
mod start;
mod sweeper;
pub(crate) mod verify;

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};

use self::control::Freezing;
use self::listing::Listing;
use self::live::Live;
use self::networks::Networks;
use self::outbox::Outbox;
use self::start::Place;
pub use self::start::{launcher_main, spawn};
use crate::cgroup::{Leaf, Tree};
use crate::init::seccomp::Filters;
use crate::protocol::{FromLauncher, ToLauncher};
use crate::spec::{Kind, SandboxId};
use crate::sys::process::SingleThreaded;
use crate::uids::UidPool;
use crate::usage::KillCause;
use crate::wire::{MAX_PACKET, RecvError};
use crate::workload::Workload;

/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// Messages taken from the server before others are looked after: sandboxes, clocks, and what waits to be told.
const MESSAGES: usize = 64;

/// How long after the last attempt a cgroup that is still busy is tried again.
const REMOVE_AGAIN: Duration = Duration::from_millis(1);

/// How long after the last launch the kernel is kept ready for the next one, and how often it is reminded. The cost is
/// some 10 µs of CPU time each.
const WARM_FOR: Duration = Duration::from_secs(10);
const WARM_EVERY: Duration = Duration::from_millis(8);

/// How long killed sandboxes may take to die when the launcher ends. Leaves time for the sweep within the 2 s after
/// which a dead server's launcher must be gone.
const LAST_WAIT: Duration = Duration::from_millis(1200);

/// The highest sandbox id: two bits of an event's token say what happened to it.
const MAX_ID: u64 = u64::MAX >> 2;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Server,
    Exit(SandboxId),
    Gate(SandboxId),
    Oom(SandboxId),
    Networks,
}

impl Source {
    fn token(self) -> u64 {
        match self {
            Self::Server => 0,
            Self::Networks => 1 << 2,
            Self::Exit(id) => id.0 << 2 | 1,
            Self::Gate(id) => id.0 << 2 | 2,
            Self::Oom(id) => id.0 << 2 | 3,
        }
    }

    fn of(token: u64) -> Self {
        let id = SandboxId(token >> 2);
        match token & 3 {
            1 => Self::Exit(id),
            2 => Self::Gate(id),
            3 => Self::Oom(id),
            _ if id == SandboxId(1) => Self::Networks,
            _ => Self::Server,
        }
    }
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
    /// When which sandbox has to be looked at. Each has one entry at most, the one in its `alarm`.
    alarms: BTreeSet<(Instant, SandboxId)>,
    /// Cgroups of dead sandboxes that could not be removed yet.
    leaving: Vec<Leaf>,
    /// Freezes that have been ordered and not been seen to have happened.
    freezing: Vec<Freezing>,
    /// Lists of processes that have been begun, at most one a sandbox.
    listings: Vec<Listing>,
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
        for source in self.wait()? {
            match source {
                Source::Server => serving &= self.read_server(buffer),
                Source::Gate(id) => self.read_gate(id),
                Source::Oom(id) => self.check_oom(id),
                Source::Exit(id) => self.bury(id),
                Source::Networks => {
                    let live = &self.live;
                    self.networks.receive(|number| live.values().any(|live| live.network == Some(number)));
                }
            }
        }
        self.ring_alarms(Instant::now());
        self.remove_leaving();
        serving &= self.outbox.flush();
        Ok(serving)
    }

    /// Waits for events, or until something is due.
    fn wait(&mut self) -> nix::Result<Vec<Source>> {
        let now = Instant::now();
        let leaving = (!self.leaving.is_empty()).then(|| now + REMOVE_AGAIN);
        let idle = self.tree.remove_idle_tenants(now);
        let ceilings = self.settle_ceilings(now);
        let freezes = self.settle_freezes(now);
        let lists = self.list_some().then_some(now);
        let warm = self.keep_warm(now);
        // those before may have set one
        let alarm = self.alarms.first().map(|(at, _)| *at);
        let next = [alarm, leaving, idle, ceilings, freezes, lists, warm].into_iter().flatten().min();
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
            Some(Ok(())) => self.warm = Some((until, now)),
            // not needed, or not to be had: launches are a little slower
            None | Some(Err(_)) => self.warm = None,
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
                ToLauncher::ForgetCeiling(tenant) => self.tree.forget(&tenant),
                ToLauncher::Order { request, id, order } => self.obey(request, id, order),
                ToLauncher::FreezeTenant { request, tenant, frozen } => self.freeze_tenant(request, &tenant, frozen),
                ToLauncher::Configure(_) => return false,
            }
        }
        // the event is still there for what is left
        true
    }

    /// Tries once more to remove the cgroups of the dead.
    fn remove_leaving(&mut self) {
        for leaf in std::mem::take(&mut self.leaving) {
            if let Err((leaf, _)) = self.tree.remove(leaf) {
                self.leaving.push(leaf);
            }
        }
    }

    /// Kills what lives, waits a bounded time for the deaths, and removes every cgroup.
    fn end(&mut self) -> nix::Result<()> {
        let ids: Vec<SandboxId> = self.live.keys().copied().collect();
        for id in ids {
            self.kill(id, KillCause::Requested);
        }
        let _ = self.epoll.delete(self.outbox.socket());
        let deadline = Instant::now() + LAST_WAIT;
        while !self.live.is_empty() && Instant::now() < deadline {
            let mut events = [EpollEvent::empty(); EVENTS];
            let n = self.epoll.wait(&mut events, 10_u8).unwrap_or(0);
            for event in &events[..n] {
                match Source::of(event.data()) {
                    Source::Exit(id) => self.bury(id),
                    Source::Gate(id) => self.read_gate(id),
                    Source::Oom(_) | Source::Server | Source::Networks => {}
                }
            }
            self.remove_leaving();
        }
        self.tree.remains().sweep();
        self.networks.dismiss();
        self.place.dismiss_sweeper();
        Ok(())
    }

    fn watch(&self, fd: impl AsFd, source: Source) -> nix::Result<()> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.token()))
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
        for source in [Source::Server, Source::Networks] {
            assert_eq!(Source::of(source.token()), source);
        }
    }
}
