//! Sandboxes that a zygote owes: asked for, and not told of yet.
//!
//! Each has the same deadline as any other sandbox, and is given up, killed, or asked of another zygote, without anybody
//! waiting for anything.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::families::FamilyId;
use super::live::READY_WITHIN;
use super::zygotes::{GONE, ZygoteId};
use super::{Launcher, verify};
use crate::cgroup::Leaf;
use crate::error::{AtStep, LaunchError, Step};
use crate::gate::LauncherGate;
use crate::name::Name;
use crate::protocol::FromLauncher;
use crate::spec::{SandboxId, SandboxSpec};
use crate::sys::process::pidfd_send_signal;
use crate::uids::JobIds;
use crate::usage::{Exit, KillCause, Namespaces, SandboxReport};

/// A sandbox that a zygote is to clone.
pub(super) struct Expected {
    pub(super) spec: SandboxSpec,
    pub(super) leaf: Leaf,
    pub(super) ids: JobIds,
    pub(super) oom: Option<OwnedFd>,
    pub(super) gate: LauncherGate,
    pub(super) alarm: Option<Instant>,
    /// Its ends of its gate and of its channel.
    pub(super) ends: [OwnedFd; 2],
    /// For another zygote, should this one die.
    artifact: OwnedFd,
    pub(super) zygote: ZygoteId,
    pub(super) asked: bool,
    again: bool,
    pub(super) killed: Option<KillCause>,
}

/// A sandbox as its zygote has told of it.
pub(super) struct Spawned {
    pub(super) expected: Expected,
    pub(super) zygote: ZygoteId,
    pub(super) family: FamilyId,
    pub(super) elder: Namespaces,
    pub(super) pid: Pid,
    pub(super) pidfd: OwnedFd,
    pub(super) used_network: bool,
    pub(super) mapped: Result<(), LaunchError>,
}

/// What a sandbox needs of the launcher to be cloned elsewhere.
pub(super) struct Errand {
    pub(super) leaf: Leaf,
    pub(super) ids: JobIds,
    pub(super) oom: Option<OwnedFd>,
    pub(super) gate: LauncherGate,
    /// The sandbox's ends of its gate and of its channel.
    pub(super) ends: [OwnedFd; 2],
    pub(super) artifact: OwnedFd,
}

impl Launcher<'_> {
    /// Has a sandbox cloned by its artifact's zygote.
    pub(super) fn expect(&mut self, id: SandboxId, spec: SandboxSpec, zygote: ZygoteId, errand: Errand) {
        let Errand { leaf, ids, oom, gate, ends, artifact } = errand;
        let (alarm, asked, again, killed) = (None, false, false, None);
        let expected = Expected { spec, leaf, ids, oom, gate, alarm, ends, artifact, zygote, asked, again, killed };
        self.expected.insert(id, expected);
        self.set_alarm(id, Some(Instant::now() + READY_WITHIN));
        self.queue(id, zygote);
    }

    pub(super) fn queue(&mut self, id: SandboxId, zygote: ZygoteId) {
        if let Some(zygote) = self.zygotes.get_mut(&zygote) {
            zygote.waiting.push_back(id);
            zygote.used = Instant::now();
        }
        self.ask(zygote);
    }

    pub(super) fn refuse_expected(&mut self, zygote: ZygoteId, id: SandboxId, error: LaunchError) -> bool {
        if self.expected.get(&id).is_none_or(|expected| expected.zygote != zygote || !expected.asked) {
            return false;
        }
        self.answered(zygote);
        self.give_up_expected(id, error);
        true
    }

    /// A zygote has cloned a sandbox. It is believed when the kernel says the same: the process is a child of this one, and
    /// has just come out of that zygote.
    pub(super) fn take_spawned(
        &mut self,
        id: ZygoteId,
        sandbox: SandboxId,
        pidfd: OwnedFd,
        used_network: bool,
        mapped: Result<(), LaunchError>,
    ) -> bool {
        let Some(zygote) = self.zygotes.get(&id) else { return true };
        let owed = self.expected.get(&sandbox).is_some_and(|expected| expected.zygote == id && expected.asked);
        let (true, Some(elder), family) = (owed, zygote.namespaces, zygote.family()) else { return false };
        let pid = match verify::own_child(&pidfd) {
            Ok(pid) if !self.is_known(pid) => pid,
            other => {
                // whatever it is, it is below the zygote's family
                let _ = pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL);
                self.strangers_until = self.strangers_from_now();
                let errno = other.err().map_or(Errno::EPROTO, |error| crate::sys::process::errno_of(&error));
                self.answered(id);
                self.give_up_expected(sandbox, LaunchError { step: Step::Spawn, errno: errno as i32 });
                return errno != Errno::EPROTO;
            }
        };
        self.set_alarm(sandbox, None);
        let Some(expected) = self.expected.remove(&sandbox) else { return false };
        self.join_family(family);
        if let Some(zygote) = self.zygotes.get_mut(&id) {
            zygote.sandboxes += 1;
            zygote.used = Instant::now();
        }
        self.adopt_spawned(sandbox, Spawned { expected, zygote: id, family, elder, pid, pidfd, used_network, mapped });
        self.answered(id);
        true
    }

    /// A sandbox that its zygote will not clone.
    pub(super) fn give_up_expected(&mut self, id: SandboxId, error: LaunchError) {
        self.set_alarm(id, None);
        let Some(expected) = self.expected.remove(&id) else { return };
        let message = match expected.killed {
            None => FromLauncher::Refused { id, error },
            killed => {
                let usage = expected.leaf.usage(expected.spec.kind.own_pids());
                let exit = Exit::Signaled(Signal::SIGKILL as i32);
                FromLauncher::Ended {
                    id,
                    report: SandboxReport { exit, killed, started: false, usage, tenant_io: None },
                }
            }
        };
        self.outbox.send(message);
        self.uids.give_back(&expected.ids);
        self.let_go(expected.leaf);
    }

    /// Kills a sandbox that has not been cloned yet.
    pub(super) fn kill_expected(&mut self, id: SandboxId, cause: KillCause) {
        let Some(expected) = self.expected.get_mut(&id) else { return };
        expected.killed.get_or_insert(cause);
        let (zygote, stands) = (expected.zygote, self.tree.freezes(expected.leaf.tenant()));
        if !expected.asked {
            self.give_up_expected(id, LaunchError { step: Step::Spawn, errno: Errno::ECANCELED as i32 });
        } else if stands {
            // it does not come to tell of it
            self.end_zygote(zygote);
        }
    }

    /// A tenant is about to be frozen: a zygote that stands still does not come to tell of what has been killed meanwhile.
    pub(super) fn end_zygotes_that_owe_killed_ones(&mut self, tenant: &Name) {
        let owed = self.expected.values().filter(|expected| expected.killed.is_some());
        let zygotes: Vec<ZygoteId> =
            owed.filter(|expected| expected.leaf.tenant() == tenant).map(|expected| expected.zygote).collect();
        zygotes.into_iter().for_each(|id| self.end_zygote(id));
    }

    /// A sandbox has not come in time: its zygote is stuck.
    pub(super) fn expected_is_late(&mut self, id: SandboxId) {
        let Some(expected) = self.expected.get(&id) else { return };
        let zygote = expected.zygote;
        if self.tree.freezes(expected.leaf.tenant()) {
            return self.set_alarm(id, Some(Instant::now() + READY_WITHIN));
        }
        self.give_up_expected(id, LaunchError { step: Step::BecomeReady, errno: Errno::ETIMEDOUT as i32 });
        self.end_zygote(zygote);
    }

    /// A tenant has been thawed: what stood still could not come.
    pub(super) fn expect_anew(&mut self, tenant: &Name, now: Instant) {
        let of_tenant = self.expected.iter().filter(|(_, expected)| expected.leaf.tenant() == tenant);
        let ids: Vec<SandboxId> = of_tenant.map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.set_alarm(id, Some(now + READY_WITHIN)));
        let zygotes = self.zygotes.values_mut().filter(|zygote| zygote.leaf.tenant() == tenant);
        zygotes.for_each(|zygote| zygote.since = now);
    }

    /// Asks another zygote for a sandbox, with a new gate: somebody may still wait at the old one.
    pub(super) fn expect_again(&mut self, id: SandboxId) -> Result<(), LaunchError> {
        let Some(mut expected) = self.expected.remove(&id) else { return Ok(()) };
        let again = (|| {
            if expected.again || expected.killed.is_some() {
                return Err(GONE);
            }
            let (gate, theirs) = crate::gate::pair().at(Step::MakeGate)?;
            let zygote = self.zygote_for(&expected.spec, &expected.ids, &expected.artifact)?;
            Ok((gate, theirs, zygote))
        })();
        let result = again.map(|(gate, theirs, zygote)| {
            expected.gate = gate;
            expected.ends[0] = theirs.0.into();
            (expected.zygote, expected.asked) = (zygote, false);
            // one that was ended while it stood still has done nothing wrong
            expected.again = !self.tree.freezes(expected.leaf.tenant());
            zygote
        });
        self.expected.insert(id, expected);
        self.queue(id, result?);
        Ok(())
    }
}
