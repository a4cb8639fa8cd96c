//! Orders for sandboxes that live: to stand still and to go on, to have other limits, to be measured.
//!
//! A freeze is ordered and then looked for, a few times and not for ever: the kernel stops each task at its next return
//! to user mode, and one that is in an uninterruptible system call may be long in coming. The launcher never waits.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Launcher;
use super::live::{Live, READY_WITHIN, Stage};
use crate::limits::Limits;
use crate::name::Name;
use crate::protocol::{Answer, FromLauncher, Order, OrderError};
use crate::spec::SandboxId;
use crate::usage::{KillCause, Stats};

/// How long tasks may take to stop. Those that can be stopped do so within milliseconds; what is left then is in the
/// hands of a device, and goes on.
const FREEZE_WITHIN: Duration = Duration::from_secs(2);

/// How soon it is looked for whether they have, the first time and, each time twice as late, at most.
const LOOK_FIRST: Duration = Duration::from_millis(1);
const LOOK_LAST: Duration = Duration::from_millis(16);

/// A freeze that has been ordered and not been seen to have happened.
#[derive(Debug)]
pub(super) struct Freezing {
    request: u64,
    what: Target,
    until: Instant,
    next: Instant,
    wait: Duration,
}

/// What is frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Sandbox(SandboxId),
    Tenant(Name),
}

impl Launcher<'_> {
    /// Does what the server wants of a sandbox, or begins to.
    pub(super) fn obey(&mut self, request: u64, id: SandboxId, order: Order) {
        let result = match order {
            Order::Freeze => match self.freeze(id) {
                Ok(()) => return self.look_for_freeze(request, Target::Sandbox(id)),
                Err(error) => Err(error),
            },
            Order::Thaw => self.thaw(id),
            Order::Limit(limits) => return self.change_limits(request, id, limits),
            Order::Measure => self.measure(id).map(|stats| Answer::Stats(Box::new(stats))),
            Order::List => return self.list(request, id),
        };
        self.answer(request, result);
    }

    /// Freezes everything of a tenant, or thaws what is not frozen by an order of its own.
    pub(super) fn freeze_tenant(&mut self, request: u64, tenant: &Name, frozen: bool) {
        let target = Target::Tenant(tenant.clone());
        self.overtake(&target);
        if !frozen {
            let result = self.thaw_tenant(tenant).map(|()| Answer::Done);
            return self.answer(request, result);
        }
        self.end_zygotes_that_owe_killed_ones(tenant);
        let dying = self.dying_leaves_of(tenant);
        match self.tree.freeze(tenant, true, |leaf| dying.contains(leaf)) {
            Ok(()) => self.look_for_freeze(request, target),
            Err(errno) => {
                // everything is as it was before, as far as the kernel lets it
                let _ = self.thaw_tenant(tenant);
                self.answer(request, Err(refused("freezer", errno)));
            }
        }
    }

    pub(super) fn answer(&mut self, request: u64, result: Result<Answer, OrderError>) {
        self.outbox.send(FromLauncher::Answer { request, result });
    }

    /// Looks for the freezes that are due. Returns when to look again.
    pub(super) fn settle_freezes(&mut self, now: Instant) -> Option<Instant> {
        for mut freezing in std::mem::take(&mut self.freezing) {
            if now >= freezing.next && self.settle(&freezing, now) {
                continue;
            }
            if now >= freezing.next {
                freezing.wait = (freezing.wait * 2).min(LOOK_LAST);
                freezing.next = (now + freezing.wait).min(freezing.until);
            }
            self.freezing.push(freezing);
        }
        self.freezing.iter().map(|freezing| freezing.next).min()
    }

    fn look_for_freeze(&mut self, request: u64, what: Target) {
        let now = Instant::now();
        let freezing = Freezing { request, what, until: now + FREEZE_WITHIN, next: now + LOOK_FIRST, wait: LOOK_FIRST };
        // what slept is frozen at once
        if !self.settle(&freezing, now) {
            self.freezing.push(freezing);
        }
    }

    /// True once it is answered.
    fn settle(&mut self, freezing: &Freezing, now: Instant) -> bool {
        let frozen = match &freezing.what {
            Target::Sandbox(id) => self.living(*id).and_then(|live| live.leaf.is_frozen().map_err(unreadable)),
            Target::Tenant(tenant) => {
                let dying = self.dying_leaves_of(tenant);
                self.tree.is_frozen(tenant, |leaf| dying.contains(leaf)).map_err(unreadable)
            }
        };
        let result = match frozen {
            Ok(false) if now < freezing.until => return false,
            Ok(false) => Err(OrderError::NotFrozen),
            Ok(true) => Ok(Answer::Done),
            Err(error) => Err(error),
        };
        match (&freezing.what, result.is_ok()) {
            (Target::Sandbox(id), true) => self.stop_clocks(*id, now),
            (Target::Tenant(tenant), true) => {
                let ids = self.ids_of(tenant);
                ids.into_iter().for_each(|id| self.stop_clocks(id, now));
            }
            (Target::Sandbox(id), false) => drop(self.thaw(*id)),
            (Target::Tenant(tenant), false) => drop(self.thaw_tenant(tenant)),
        }
        self.answer(freezing.request, result);
        true
    }

    /// Another order for the same target makes an end to the wait for a freeze.
    fn overtake(&mut self, target: &Target) {
        let overtaken = self.freezing.extract_if(.., |freezing| freezing.what == *target);
        let requests: Vec<u64> = overtaken.map(|freezing| freezing.request).collect();
        requests.into_iter().for_each(|request| self.answer(request, Err(OrderError::Overtaken)));
    }

    /// A sandbox that can be given orders. One that is being killed cannot: on v1 to freeze it would be to let it live.
    fn living(&self, id: SandboxId) -> Result<&Live, OrderError> {
        self.live.get(&id).filter(|live| !live.is_dying()).ok_or(OrderError::Ended)
    }

    fn freeze(&mut self, id: SandboxId) -> Result<(), OrderError> {
        self.overtake(&Target::Sandbox(id));
        let live = self.living(id)?;
        self.tree.freeze_leaf(&live.leaf, true).map_err(|errno| refused("freezer", errno))?;
        if let Some(live) = self.live.get_mut(&id) {
            live.pause.own = true;
        }
        Ok(())
    }

    fn thaw(&mut self, id: SandboxId) -> Result<Answer, OrderError> {
        self.overtake(&Target::Sandbox(id));
        let live = self.living(id)?;
        self.tree.freeze_leaf(&live.leaf, false).map_err(|errno| refused("freezer", errno))?;
        let stays = self.tree.freezes(live.leaf.tenant());
        if !stays && live.leaf.is_frozen().map_err(unreadable)? {
            return Err(refused("freezer", Errno::EPROTO));
        }
        if let Some(live) = self.live.get_mut(&id) {
            live.pause.own = false;
        }
        if !stays {
            self.start_clocks_again(id, Instant::now());
        }
        Ok(Answer::Done)
    }

    pub(super) fn thaw_tenant(&mut self, tenant: &Name) -> Result<(), OrderError> {
        let own = self.leaves_of(tenant, |live| live.pause.own);
        self.tree.freeze(tenant, false, |leaf| own.contains(leaf)).map_err(|errno| refused("freezer", errno))?;
        let now = Instant::now();
        for id in self.ids_of(tenant) {
            if !self.live[&id].pause.own {
                self.start_clocks_again(id, now);
            }
        }
        self.expect_anew(tenant, now);
        Ok(())
    }

    fn stop_clocks(&mut self, id: SandboxId, now: Instant) {
        let Some(live) = self.live.get_mut(&id) else { return };
        live.pause.stop(now);
        self.look_after(id, now);
    }

    fn start_clocks_again(&mut self, id: SandboxId, now: Instant) {
        let Some(live) = self.live.get_mut(&id) else { return };
        live.pause.go_on(now);
        self.look_after(id, now);
    }

    /// Sets the alarm that a sandbox needs now.
    fn look_after(&mut self, id: SandboxId, now: Instant) {
        let Some(live) = self.live.get(&id) else { return };
        match live.stage {
            _ if live.is_dying() => {}
            Stage::Entering => self.set_alarm(id, Some(now + READY_WITHIN)),
            Stage::Waiting => {}
            Stage::Running(_) => self.keep_time(id, now),
        }
    }

    fn change_limits(&mut self, request: u64, id: SandboxId, limits: Limits) {
        let living = self.live.get_mut(&id).filter(|live| !live.is_dying()).ok_or(OrderError::Ended);
        let changed = living.and_then(|live| {
            let fixed = live.spec.limits.changed_at_start_only(&limits);
            if let Some(limit) = limits.check().err().map(|error| error.0).or(fixed) {
                return Err(OrderError::Limit(limit.to_owned()));
            }
            let mut spec = live.spec.clone();
            spec.limits = limits;
            match live.leaf.change_limits(&live.spec, &spec) {
                Ok(()) => Ok(live.leaf.oom_kills() > 0), // on v2 the kernel may have found nothing to reclaim
                Err((_, Errno::EBUSY)) => Ok(true),
                Err((limit, errno)) => Err(refused(limit, errno)),
            }
        });
        let too_much_memory = match changed {
            Ok(too_much_memory) => too_much_memory,
            Err(error) => return self.answer(request, Err(error)),
        };
        let now = Instant::now();
        if let Some(live) = self.live.get_mut(&id) {
            live.spec.limits = limits;
        }
        if too_much_memory {
            self.kill(id, KillCause::Memory);
        } else {
            self.look_after(id, now); // it may have had more time than it has now
        }
        let ending = self.living(id).is_err();
        self.answer(request, Ok(if ending { Answer::Ending } else { Answer::Done }));
    }

    fn measure(&self, id: SandboxId) -> Result<Stats, OrderError> {
        let live = self.live.get(&id).ok_or(OrderError::Ended)?;
        let mut stats = live.leaf.stats(live.spec.kind.own_pids());
        (stats.usage.wall_us, stats.usage.paused_us) = live.clocks(Instant::now());
        Ok(stats)
    }

    fn ids_of(&self, tenant: &Name) -> Vec<SandboxId> {
        self.live.iter().filter(|(_, live)| live.leaf.tenant() == tenant).map(|(id, _)| *id).collect()
    }

    /// The names of the leaves in which something of a tenant's is being killed.
    fn dying_leaves_of(&self, tenant: &Name) -> HashSet<String> {
        let mut leaves = self.leaves_of(tenant, Live::is_dying);
        let zygotes = self.zygotes.values().filter(|zygote| zygote.failure.is_some()).map(|zygote| &zygote.leaf);
        let families = self.families.values().filter(|family| family.ending).map(|family| &family.leaf);
        // what a dead zygote had cloned and not told of may still be on its way out
        let left = self.leaving.iter().chain(&self.busy);
        let own = zygotes.chain(families).chain(left).filter(|leaf| leaf.tenant() == tenant);
        leaves.extend(own.map(|leaf| leaf.name().to_owned()));
        leaves
    }

    /// The names of the leaves of a tenant's sandboxes of which this holds.
    fn leaves_of(&self, tenant: &Name, holds: impl Fn(&Live) -> bool) -> HashSet<String> {
        let own = self.live.values().filter(|live| live.leaf.tenant() == tenant && holds(live));
        own.map(|live| live.leaf.name().to_owned()).collect()
    }
}

fn refused(what: &str, errno: Errno) -> OrderError {
    OrderError::Refused { what: what.to_owned(), errno: errno as i32 }
}

/// The freezer's state cannot be read.
fn unreadable(errno: Errno) -> OrderError {
    refused("freezer", errno)
}
