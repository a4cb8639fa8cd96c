//! One sandbox between its clone and its burial.
//!
//! ```text
//! Entering ──Ready──▶ Waiting ──Started──▶ Running ──exit──▶ buried: Ended
//!     │                  │                    │
//!     └── Failed, timeout, verify: killed ────┴── Kill, clocks, OOM: killed ──▶ buried: Refused or Ended
//! ```
//!
//! There is one way out, [`Launcher::bury`], and it runs once: when the kernel says that the process is dead.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::Launcher;
use super::families::FamilyId;
use super::pause::Pause;
use super::verify::{self, Seen};
use super::zygotes::ZygoteId;
use crate::cgroup::Leaf;
use crate::error::{AtStep, LaunchError, Step};
use crate::gate::{FromSandbox, LauncherGate, ToSandbox};
use crate::limits::Limits;
use crate::protocol::FromLauncher;
use crate::spec::{Kind, SandboxId, SandboxSpec};
use crate::sys::process::pidfd_send_signal;
use crate::uids::JobIds;
use crate::usage::{Exit, KillCause, Namespaces, SandboxReport};
use crate::wire::RecvError;

/// The closest together that a sandbox's CPU time is looked at.
const CPU_CHECK_MIN: Duration = Duration::from_millis(2);

/// How long after the announcement of an OOM the kill is waited for, and how often it is looked for. It follows at
/// once, unless the task that is at it has no CPU: then a few periods of the quota later.
const OOM_KILL_WITHIN: Duration = Duration::from_secs(2);
const OOM_CHECK: Duration = Duration::from_millis(2);

/// The longest a sandbox may take from its clone to being ready. A compiled module of the greatest allowed size is
/// mapped in well under a second; this is for a machine that is swamped.
pub(super) const READY_WITHIN: Duration = Duration::from_secs(10);

/// How often the death of a sandbox is looked for that nothing may announce.
pub(super) const REAP_AGAIN: Duration = Duration::from_millis(1);

/// A sandbox that has been cloned and not been reaped.
pub(super) struct Live {
    pub(super) spec: SandboxSpec,
    pub(super) pid: Pid,
    pub(super) pidfd: OwnedFd,
    /// The number of its network namespace, if that was made ahead.
    pub(super) network: Option<u64>,
    pub(super) zygote: Option<Descent>,
    pub(super) gate: Option<LauncherGate>,
    pub(super) oom: Option<OwnedFd>,
    pub(super) leaf: Leaf,
    pub(super) ids: JobIds,
    /// What has been read back of it already.
    pub(super) seen: Option<Seen>,
    pub(super) stage: Stage,
    pub(super) alarm: Option<Instant>,
    pub(super) pause: Pause,
    /// Until when an OOM kill that has been announced may still come.
    pub(super) oom_until: Option<Instant>,
    /// The first thing that went wrong before tenant code.
    pub(super) failure: Option<LaunchError>,
    /// The first reason to kill it.
    pub(super) killed: Option<KillCause>,
    /// What its init told of the main process.
    pub(super) told: Option<Exit>,
}

/// Where a sandbox comes from that a zygote has cloned.
pub(super) struct Descent {
    pub(super) zygote: ZygoteId,
    pub(super) family: FamilyId,
    /// The zygote's own.
    pub(super) namespaces: Namespaces,
    /// The zygote says that others have had its network namespace before.
    pub(super) used_network: bool,
}

/// How far a sandbox has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// On its way through the child's steps.
    Entering,
    /// Confined, waiting for its job.
    Waiting,
    /// Running tenant code since then.
    Running(Instant),
}

impl Live {
    /// Whether it has come to its end, or is being brought there.
    pub(super) fn is_dying(&self) -> bool {
        self.killed.is_some() || self.failure.is_some() || self.told.is_some()
    }

    /// For how long tenant code has run, and how long it was paused in between, in microseconds.
    pub(super) fn clocks(&self, now: Instant) -> (u64, u64) {
        let Stage::Running(since) = self.stage else { return (0, 0) };
        let paused = self.pause.total(now);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        (micros(now.saturating_duration_since(since).saturating_sub(paused)), micros(paused))
    }

    /// Stops everything in the sandbox. Safe to repeat.
    fn strike(&self) {
        // ESRCH: dead already, its pidfd says so in a moment
        let _ = pidfd_send_signal(self.pidfd.as_fd(), Signal::SIGKILL);
        let _ = self.leaf.kill();
    }
}

impl Launcher<'_> {
    /// Takes what a sandbox says over its gate.
    pub(super) fn read_gate(&mut self, id: SandboxId) {
        loop {
            let Some(live) = self.live.get_mut(&id) else { return };
            let Some(gate) = &live.gate else { return };
            match gate.recv() {
                // what could not be read back is failing already
                Ok((FromSandbox::Ready, _)) if live.seen.is_none() => {}
                Ok((FromSandbox::Ready, Some(pid))) if live.stage == Stage::Entering => self.admit(id, pid),
                Ok((FromSandbox::Started, _)) if live.stage == Stage::Waiting => self.start_clocks(id),
                Ok((FromSandbox::Exited(exit), _)) if live.stage != Stage::Entering => live.told = Some(exit),
                Ok((FromSandbox::Failed(error), _)) => self.fail(id, error),
                Ok(_) | Err(RecvError::Malformed) => {
                    self.fail(id, LaunchError { step: Step::ReportReady, errno: Errno::EPROTO as i32 });
                    return;
                }
                Err(RecvError::Empty) => return,
                Err(RecvError::Closed | RecvError::Io(_)) => {
                    let gate = live.gate.take();
                    return gate.into_iter().for_each(|gate| self.unwatch(gate.0));
                }
            }
        }
    }

    /// Reads the layers of a sandbox that says it is ready back from the kernel, and tells the server.
    fn admit(&mut self, id: SandboxId, pid: i32) {
        let Some(live) = self.live.get_mut(&id) else { return };
        let admitted = verify::read_back(&self.place, live, Pid::from_raw(pid)).and_then(|isolation| {
            let gate = live.gate.as_ref().ok_or(Errno::EPIPE).at(Step::OpenGate)?;
            gate.tell(ToSandbox::Admit).at(Step::OpenGate)?;
            Ok(isolation)
        });
        match admitted {
            Ok(isolation) => {
                live.stage = Stage::Waiting;
                self.set_alarm(id, None);
                self.outbox.send(FromLauncher::Ready { id, isolation: Box::new(isolation) });
            }
            Err(error) => self.fail(id, error),
        }
    }

    fn start_clocks(&mut self, id: SandboxId) {
        let Some(live) = self.live.get_mut(&id) else { return };
        let now = Instant::now();
        live.stage = Stage::Running(now);
        live.pause.begin(now);
        // only an init has more to say
        let gate = if live.spec.kind == Kind::Native { None } else { live.gate.take() };
        let watched = live.pause.stands() || live.oom_until.is_some();
        let limits = live.spec.limits;
        self.outbox.send(FromLauncher::Started(id));
        gate.into_iter().for_each(|gate| self.unwatch(gate.0));
        if watched {
            return self.keep_time(id, now);
        }
        // what it has used to come so far is looked at when half of its time may be over: most have ended by then
        let first = self.soonest(limits.cpu_time / 2, &limits);
        self.set_alarm(id, Some(now + limits.wall_time.min(first)));
    }

    /// How long it takes to use so much CPU time at least: no faster than its quota allows, nor than the host has CPUs.
    fn soonest(&self, cpu_time: Duration, limits: &Limits) -> Duration {
        let millicores = limits.cpu_millicores.min(self.place.host_millicores).max(1);
        (cpu_time * 1000 / millicores).max(CPU_CHECK_MIN)
    }

    /// Kills a sandbox that could not be made as it should.
    pub(super) fn fail(&mut self, id: SandboxId, error: LaunchError) {
        let Some(live) = self.live.get_mut(&id) else { return };
        live.failure.get_or_insert(error);
        live.strike();
        self.set_alarm(id, None);
    }

    /// Kills a sandbox for `cause`, unless its main process has ended by itself before.
    pub(super) fn kill(&mut self, id: SandboxId, cause: KillCause) {
        let Some(live) = self.live.get_mut(&id) else { return self.kill_expected(id, cause) };
        if live.told.is_none() {
            live.killed.get_or_insert(cause);
        }
        live.strike();
        self.set_alarm(id, None);
    }

    /// The kernel may have killed something in this sandbox for memory. One process of a job gone means a job in an
    /// unknown state: it goes as a whole.
    pub(super) fn check_oom(&mut self, id: SandboxId) {
        let Some(live) = self.live.get_mut(&id) else { return };
        if let Some(event) = &live.oom {
            let _ = nix::unistd::read(event, &mut [0; 8]);
        }
        // v1 announces before it kills: the counter may be about to change
        let now = Instant::now();
        live.oom_until = Some(now + OOM_KILL_WITHIN);
        if live.leaf.oom_kills() > 0 {
            self.kill(id, KillCause::Memory);
        } else {
            self.keep_time(id, now);
        }
    }

    /// Looks at every sandbox whose time has come.
    pub(super) fn ring_alarms(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.alarms.first() {
            if at > now {
                return;
            }
            self.set_alarm(id, None);
            let Some(live) = self.live.get(&id) else {
                self.expected_is_late(id);
                continue;
            };
            match live.stage {
                Stage::Entering if live.failure.is_some() => {
                    self.bury(id);
                    self.set_alarm(id, Some(now + REAP_AGAIN));
                }
                Stage::Entering if live.pause.stands() => self.set_alarm(id, Some(now + READY_WITHIN)),
                Stage::Entering => {
                    self.fail(id, LaunchError { step: Step::BecomeReady, errno: Errno::ETIMEDOUT as i32 });
                }
                Stage::Running(_) => self.keep_time(id, now),
                Stage::Waiting => {}
            }
        }
    }

    /// Kills the sandbox if its wall or CPU time is over, or for an OOM; else says when to look again.
    pub(super) fn keep_time(&mut self, id: SandboxId, now: Instant) {
        let Some(live) = self.live.get(&id) else { return };
        let Stage::Running(since) = live.stage else { return };
        let limits = live.spec.limits;
        let oom = live.oom_until.is_some_and(|until| now < until);
        if oom && live.leaf.oom_kills() > 0 {
            return self.kill(id, KillCause::Memory);
        }
        if live.pause.stands() {
            // time stands still with it, but what has been announced may still come
            return self.set_alarm(id, oom.then_some(now + OOM_CHECK));
        }
        let wall_end = since + limits.wall_time + live.pause.total(now);
        if now >= wall_end {
            return self.kill(id, KillCause::WallTime);
        }
        let used = live.leaf.cpu_used().unwrap_or_default();
        let Some(left) = limits.cpu_time.checked_sub(used).filter(|left| !left.is_zero()) else {
            return self.kill(id, KillCause::CpuTime);
        };
        let soonest = self.soonest(left, &limits);
        let look_again = if oom { soonest.min(OOM_CHECK) } else { soonest };
        self.set_alarm(id, Some(wall_end.min(now + look_again)));
    }

    pub(super) fn set_alarm(&mut self, id: SandboxId, at: Option<Instant>) {
        let live = self.live.get_mut(&id).map(|live| &mut live.alarm);
        let Some(alarm) = live.or_else(|| Some(&mut self.expected.get_mut(&id)?.alarm)) else { return };
        if let Some(old) = std::mem::replace(alarm, at) {
            self.alarms.remove(&(old, id));
        }
        if let Some(at) = at {
            self.alarms.insert((at, id));
        }
    }

    /// Reaps a dead sandbox, reads what it used, tells the server, and clears away what is left.
    pub(super) fn bury(&mut self, id: SandboxId) {
        self.read_gate(id); // its last words may still be there
        let Some(live) = self.live.get(&id) else { return };
        let Some(status) = reap(&live.pidfd) else { return };
        self.set_alarm(id, None);
        let Some(live) = self.live.remove(&id) else { return };
        self.unwatch(&live.pidfd);
        live.gate.iter().for_each(|gate| self.unwatch(&gate.0));
        live.oom.iter().for_each(|oom| self.unwatch(oom));
        // told with a job's report alone: what else there is of sandboxes is made and ended unheard
        let had_job = matches!(live.stage, Stage::Running(_)) && live.spec.kind != Kind::Compile;
        let tenant_io = if had_job { self.tree.io_since(live.leaf.tenant()) } else { None };
        let report = SandboxReport { tenant_io, ..report(&live, status) };
        let message = match live.failure {
            // whatever failed where the kernel had killed for memory failed for that
            Some(error) if report.usage.oom_kills == 0 => FromLauncher::Refused { id, error },
            _ => FromLauncher::Ended { id, report },
        };
        self.outbox.send(message);
        self.uids.give_back(&live.ids);
        if let Some(Descent { zygote, family, .. }) = live.zygote {
            self.tell_zygote(zygote, id);
            self.leave_family(family);
        }
        let Live { mut leaf, oom, .. } = live;
        leaf.keep_oom(oom);
        self.let_go(leaf);
    }
}

/// Looks at a child, and leaves it to be reaped.
fn look(child: &OwnedFd) -> nix::Result<WaitStatus> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
    waitid(Id::PIDFd(child.as_fd()), flags)
}

/// Whether a child waits to be reaped, or is none any more.
pub(super) fn is_dead(child: &OwnedFd) -> bool {
    !matches!(look(child), Ok(WaitStatus::StillAlive))
}

/// Whether the process of a pidfd is this one's child, and has not been reaped.
pub(super) fn is_child(process: &OwnedFd) -> nix::Result<bool> {
    match look(process) {
        Ok(_) => Ok(true),
        Err(Errno::ECHILD) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Waits for the end of a child that is about to end, and reaps it.
pub(super) fn wait_for_end(child: &OwnedFd) -> nix::Result<()> {
    waitid(Id::PIDFd(child.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::__WALL).map(drop)
}

/// Reaps a child; `None` while it lives.
pub(super) fn reap(child: &OwnedFd) -> Option<Exit> {
    // __WALL: a child that raises no signal at its end is not waited for otherwise
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
    match waitid(Id::PIDFd(child.as_fd()), flags) {
        Ok(WaitStatus::StillAlive) => None,
        Ok(WaitStatus::Exited(_, code)) => Some(Exit::Exited(code)),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(Exit::Signaled(signal as i32)),
        // not ours any more: nothing is known of its end
        Ok(_) | Err(_) => Some(Exit::Signaled(Signal::SIGKILL as i32)),
    }
}

fn report(live: &Live, status: Exit) -> SandboxReport {
    let mut usage = live.leaf.usage(live.spec.kind.own_pids());
    (usage.wall_us, usage.paused_us) = live.clocks(Instant::now());
    let started = matches!(live.stage, Stage::Running(_));
    // an OOM kill that ended the job before anybody was woken is one all the same
    let killed = live.killed.or((usage.oom_kills > 0).then_some(KillCause::Memory));
    // no pid 1 can be sent this signal from within its namespace
    let outside = live.told.is_none() && status == Exit::Signaled(Signal::SIGKILL as i32);
    let killed = killed.or(outside.then_some(KillCause::Outside));
    SandboxReport { exit: live.told.unwrap_or(status), killed, started, usage, tenant_io: None }
}
