//! The instance's cgroups: made at the start, a level for each tenant, swept at the end.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::dir::Dir;
use super::hierarchy::Hierarchy;
use super::leaf::Leaf;
use super::leaves::STOCK;
use super::machine::{Machine, Node};
use super::tenant::{Attempt, Ground, Tenant};
use super::{CgroupError, Extra, Plan, Role, Served, host, room, settings, v1, v2};
use crate::ceiling::{Ceiling, CeilingError};
use crate::name::Name;

/// How long a tenant's cgroup outlives its last sandbox, so that a quiet tenant's next job finds it.
const TENANT_LINGER: Duration = Duration::from_secs(2);

/// How long a killed cgroup may take to become empty before a sweep gives up on it.
const SWEEP_PATIENCE: Duration = Duration::from_secs(2);

/// One directory in each hierarchy of the plan, all with the same name.
#[derive(Debug)]
pub(super) struct Level(Vec<Dir>);

impl Level {
    /// The directory in the hierarchy of this index in the plan.
    pub(super) fn dir(&self, index: usize) -> &Dir {
        &self.0[index]
    }

    /// All of them, in the plan's order.
    pub(super) fn dirs(&self) -> impl Iterator<Item = (usize, &Dir)> {
        self.0.iter().enumerate()
    }

    /// Makes `name` below the first `count` of them.
    pub(super) fn make_below(&self, name: &str, count: usize) -> nix::Result<Self> {
        let mut made = Vec::with_capacity(count);
        for parent in &self.0[..count] {
            match parent.make(name) {
                Ok(dir) => made.push(dir),
                Err(errno) => {
                    for parent in &self.0[..made.len()] {
                        // best effort: the sweep at the end takes what stays
                        let _ = parent.remove(name);
                    }
                    return Err(errno);
                }
            }
        }
        Ok(Self(made))
    }

    /// Removes `name` in one hierarchy, and makes it again.
    pub(super) fn renew(&mut self, index: usize, parent: &Self, name: &str) -> nix::Result<()> {
        let parent = parent.dir(index);
        parent.remove(name)?;
        self.0[index] = parent.make(name)?;
        Ok(())
    }

    /// Removes `name` below the first `count` of them.
    pub(super) fn remove_below(&self, name: &str, count: usize) -> nix::Result<()> {
        // every hierarchy is tried; the first refusal is reported
        self.0[..count].iter().map(|parent| parent.remove(name)).fold(Ok(()), Result::and)
    }
}

/// The cgroups of this instance.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(super) plan: Rc<Plan>,
    /// The directories that hold the instance's.
    base: Level,
    pub(super) name: String,
    root: Rc<Level>,
    ground: Rc<Ground>,
    pub(super) tenants: HashMap<Name, Tenant>,
    /// Of leaves.
    pub(super) numbers: u64,
    /// The ceilings that have been changed, and confirmed, since this process began. What a launch brings along may be
    /// older.
    changed: HashMap<Name, Ceiling>,
    /// Tenants of whom nothing is to run, whether or not they have a cgroup now.
    pub(super) frozen: HashSet<Name>,
}

/// What has become of ceilings that could not be had at once.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// Those that hold now, or that the kernel will not have: the number of the request, and the tenant.
    pub(crate) answers: Vec<(u64, Name, Result<(), CeilingError>)>,
    /// Tenants that use more memory than they are to have.
    pub(crate) short_of_memory: Vec<Name>,
    /// When to look again.
    pub(crate) next: Option<Instant>,
}

impl Tree {
    /// Makes the instance's directories, after removing what an earlier run of this instance left there, its
    /// processes included.
    pub(crate) fn make(mut plan: Plan, instance: &str) -> Result<Self, CgroupError> {
        let name = format!("holm-{instance}");
        let failed = |what, hierarchy: &Hierarchy, errno: Errno| CgroupError::Directory {
            what,
            path: hierarchy.own_dir.display().to_string(),
            source: errno.into(),
        };
        let mut base = Vec::new();
        for hierarchy in &plan.hierarchies {
            base.push(Dir::open(&hierarchy.own_dir).map_err(|e| failed("open", hierarchy, e))?);
        }
        let base = Level(base);
        sweep(&base, &name);
        let first = &plan.hierarchies[0];
        let count = plan.hierarchies.len();
        let root = base.make_below(&name, count).map_err(|e| failed("make a directory in", first, e))?;
        let delegation = plan.v2_delegation();
        if let (Some(v2), false) = (plan.v2, delegation.is_empty()) {
            let hierarchy = &plan.hierarchies[v2];
            room::delegate(&base.0[v2], hierarchy, &delegation)
                .and_then(|()| {
                    v2::delegate(&root.0[v2], &delegation)
                        .map_err(|e| failed("delegate the controllers of", hierarchy, e))
                })
                .inspect_err(|_| sweep(&base, &name))?;
        }
        offer_extras(&mut plan, &base, &root);
        let (plan, root) = (Rc::new(plan), Rc::new(root));
        let ground = Rc::new(Ground { plan: plan.clone(), root: root.clone(), machine: Machine::look() });
        let (tenants, changed, frozen) = Default::default();
        Ok(Self { plan, base, name, root, ground, tenants, numbers: 0, changed, frozen })
    }

    /// Gives `processes`, those of the host itself, CPU time before all jobs.
    pub(crate) fn prefer(&self, processes: &[Pid]) -> nix::Result<()> {
        let cpu = self.plan.roles[&Role::Cpu];
        match self.plan.is_v2(Role::Cpu) {
            true => host::weigh_leaf(self.base.dir(cpu)),
            false => host::move_in(self.base.dir(cpu), &self.name, processes),
        }
    }

    /// Attaches this process to the cgroup that it is in. Nothing changes, but that the kernel keeps itself ready for
    /// attaching: the first time after some 15 ms of silence it waits for a grace period of RCU, 7 ms or more.
    pub(crate) fn keep_warm(&self) -> nix::Result<()> {
        let this = Pid::from_raw(0);
        // in the hierarchy of the CPU it may be elsewhere
        let elsewhere = [self.plan.v2, Some(self.plan.roles[&Role::Cpu])];
        let v1 = (0..self.plan.with_leaves).find(|index| !elsewhere.contains(&Some(*index)));
        match (v1, self.plan.v2) {
            (Some(v1), _) => self.base.dir(v1).attach(this),
            (None, Some(v2)) => {
                let base = self.base.dir(v2);
                host::own_leaf(base)?.as_ref().unwrap_or(base).attach(this)
            }
            (None, None) => Ok(()),
        }
    }

    /// A second set of descriptors on the same directories, for a process that outlives this one.
    pub(crate) fn remains(&self) -> Remains<'_> {
        Remains { base: &self.base, name: &self.name }
    }

    /// The tenant's cgroup, made if it is not there. It is under the given ceiling, unless that has been changed by
    /// [`Tree::set_ceiling`]. Gives the ceiling that holds.
    pub(crate) fn tenant(&mut self, name: &Name, ceiling: &Ceiling) -> Result<Ceiling, CeilingError> {
        let ceiling = self.changed.get(name).unwrap_or(ceiling).clone();
        let (ground, is_new) = (self.ground.clone(), !self.tenants.contains_key(name));
        let tenant = self.make_tenant(name)?;
        if tenant.is_pending() {
            // its jobs, those to come included, have no more than either value each
            return Ok(tenant.wanted().clone());
        }
        match tenant.change(&ground, &ceiling, None) {
            Ok(_) => Ok(ceiling),
            Err(error) => {
                if is_new {
                    self.tenants.remove(name);
                    // what cannot be removed now is swept at the end
                    let _ = self.root.remove_below(name.as_str(), self.plan.hierarchies.len());
                }
                Err(error)
            }
        }
    }

    fn make_tenant(&mut self, name: &Name) -> Result<&mut Tenant, CeilingError> {
        if !self.tenants.contains_key(name) {
            let refused = |errno: Errno| CeilingError::Refused { field: "limits".into(), errno: errno as i32 };
            let count = self.plan.hierarchies.len();
            let level = self.root.make_below(name.as_str(), count).map_err(refused)?;
            let made = match self.plan.v2 {
                Some(v2) => v2::delegate(&level.0[v2], &self.plan.v2_delegation()).map_err(refused),
                None => Ok(()),
            };
            let freezer = self.plan.freezer(&level);
            let stands = match freezer.v2 && self.frozen.contains(name) {
                true => freezer.set(true).map_err(refused),
                false => Ok(()),
            };
            match made.and(stands).and_then(|()| Tenant::new(&self.plan, &self.root, level)) {
                Ok(tenant) => drop(self.tenants.insert(name.clone(), tenant)),
                Err(error) => {
                    let _ = self.root.remove_below(name.as_str(), count);
                    return Err(error);
                }
            }
        }
        self.tenants.get_mut(name).ok_or(CeilingError::Refused { field: "limits".into(), errno: Errno::ENOENT as i32 })
    }

    /// Puts a tenant under another ceiling, now and for all of its sandboxes to come, or leaves it as it was. True once
    /// it holds; else [`Tree::settle`] tells what becomes of the request.
    pub(crate) fn set_ceiling(&mut self, name: &Name, ceiling: &Ceiling, request: u64) -> Result<bool, CeilingError> {
        let nothing_set = *ceiling == Ceiling::default() && !self.tenants.contains_key(name);
        let holds = nothing_set || {
            let ground = self.ground.clone();
            let tenant = self.make_tenant(name)?;
            if tenant.is_pending() {
                return Err(CeilingError::Refused { field: "limits".into(), errno: Errno::EBUSY as i32 });
            }
            tenant.change(&ground, ceiling, Some(request))?
        };
        if holds {
            self.changed.insert(name.clone(), ceiling.clone());
        }
        Ok(holds)
    }

    /// Forgets the ceiling of a tenant that is deleted, and that it was frozen.
    pub(crate) fn forget(&mut self, name: &Name) {
        self.changed.remove(name);
        // what cannot be thawed now is about to be killed
        let _ = self.freeze(name, false, |_| false);
    }

    /// Freezes everything of a tenant, also what is still to come, or thaws it. On v1 the leaves that `spare` names are
    /// left as they are. [`Tree::is_frozen`] tells when nothing runs any more.
    pub(crate) fn freeze(&mut self, name: &Name, frozen: bool, spare: impl Fn(&str) -> bool) -> nix::Result<()> {
        if frozen {
            self.frozen.insert(name.clone());
        } else {
            self.frozen.remove(name);
        }
        let Some(tenant) = self.tenants.get(name) else { return Ok(()) };
        let freezer = self.plan.freezer(&tenant.level);
        if freezer.v2 { freezer.set(frozen) } else { freezer.set_below(frozen, spare) }
    }

    /// Freezes one leaf, or thaws it as far as its tenant is not frozen.
    pub(crate) fn freeze_leaf(&self, leaf: &Leaf, frozen: bool) -> nix::Result<()> {
        // on v1 the tenant's freeze is written to the same file
        let stays = self.plan.v2.is_none() && self.frozen.contains(leaf.tenant());
        if stays && !frozen { Ok(()) } else { leaf.freeze(frozen) }
    }

    /// Whether everything of a tenant stands still, but for the leaves that `spare` names on v1.
    pub(crate) fn is_frozen(&self, name: &Name, spare: impl Fn(&str) -> bool) -> nix::Result<bool> {
        let Some(tenant) = self.tenants.get(name) else { return Ok(self.frozen.contains(name)) };
        let freezer = self.plan.freezer(&tenant.level);
        if freezer.v2 { freezer.is_frozen() } else { freezer.are_frozen_below(spare) }
    }

    /// What a tenant's sandboxes have read from and written to block devices since this was asked before, where the kernel
    /// counts it for the tenant and not for each of them.
    pub(crate) fn io_since(&mut self, name: &Name) -> Option<(u64, u64)> {
        self.tenants.get_mut(name)?.io_since(&self.plan)
    }

    /// Whether nothing of a tenant is to run.
    pub(crate) fn freezes(&self, name: &Name) -> bool {
        self.frozen.contains(name)
    }

    /// Tries ceilings again that could not be had at once.
    pub(crate) fn settle(&mut self, now: Instant) -> Settled {
        let mut settled = Settled::default();
        for (name, tenant) in self.tenants.iter_mut().filter(|(_, tenant)| tenant.is_pending()) {
            match tenant.try_again(&self.ground, now) {
                Attempt::NotYet { at, memory } => {
                    settled.next = settled.next.into_iter().chain([at]).min();
                    if memory {
                        settled.short_of_memory.push(name.clone());
                    }
                }
                Attempt::Over { request, result } => {
                    if let Some(request) = request {
                        if result.is_ok() {
                            self.changed.insert(name.clone(), tenant.wanted().clone());
                        }
                        settled.answers.push((request, name.clone(), result));
                    }
                }
            }
        }
        settled
    }

    /// The CPU ceiling, in thousandths of a core, of a tenant that has a cgroup.
    pub(crate) fn cpu_ceiling(&self, name: &Name) -> Option<Option<u32>> {
        self.tenants.get(name).map(|tenant| tenant.wanted().cpu_millicores)
    }

    /// The nodes in `/dev` that a ceiling adds to the standard ones.
    pub(crate) fn nodes(&self, ceiling: &Ceiling) -> Vec<Node> {
        ceiling.devices.iter().filter_map(|rule| self.ground.machine.node(*rule)).collect()
    }

    /// Removes the cgroups of tenants that have been idle for a while, and leaves that a burst of jobs has left. Returns when
    /// to look again.
    pub(crate) fn remove_idle_tenants(&mut self, now: Instant) -> Option<Instant> {
        let (root, count) = (&self.root, self.plan.hierarchies.len());
        self.tenants.retain(|name, tenant| {
            let quiet = now >= tenant.idle_since + TENANT_LINGER;
            let due = quiet && tenant.leaves == 0 && !tenant.is_pending();
            if quiet && tenant.stock.len() > STOCK {
                tenant.stock.drain(STOCK..).for_each(|mut leaf| _ = leaf.remove());
            }
            if !due {
                return true;
            }
            // dropping our descriptors first is not needed: they do not keep a cgroup busy
            tenant.stock.drain(..).for_each(|mut leaf| _ = leaf.remove());
            match root.remove_below(name.as_str(), count) {
                Ok(()) => false,
                Err(_) => {
                    tenant.idle_since = now;
                    true
                }
            }
        });
        let to_do = |t: &&Tenant| (t.leaves == 0 && !t.is_pending()) || t.stock.len() > STOCK;
        self.tenants.values().filter(to_do).map(|tenant| tenant.idle_since + TENANT_LINGER).min()
    }
}

/// Prepares what the controllers for tenants alone need above the tenants. One that turns out not to work is given up,
/// with the reason.
fn offer_extras(plan: &mut Plan, base: &Level, root: &Level) {
    let mut broken = Vec::new();
    for (extra, controller) in plan.v2_extras() {
        let Some(v2) = plan.v2 else { continue };
        let delegated = [base, root].into_iter().try_for_each(|level| v2::delegate(level.dir(v2), &[controller]));
        broken.extend(delegated.err().map(|errno| (extra, errno)));
    }
    if let Ok(Served { index, v2: false }) = plan.served(Extra::Cpuset) {
        let inherited = settings::inherit_cpus(base.dir(index), root.dir(index));
        broken.extend(inherited.err().map(|errno| (Extra::Cpuset, errno)));
    }
    for (extra, errno) in broken {
        plan.give_up(extra, errno);
    }
}

/// What is needed to clean up after the instance: where its directories are.
#[derive(Debug)]
pub(crate) struct Remains<'a> {
    base: &'a Level,
    name: &'a str,
}

impl Remains<'_> {
    /// Kills whatever is in the instance's cgroups and removes them.
    pub(crate) fn sweep(&self) {
        sweep(self.base, self.name);
    }

    /// The descriptors that [`Remains::sweep`] works on.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.base.0.iter().map(AsFd::as_fd)
    }
}

/// Kills every process below `base/name` in every hierarchy and removes the directories, for a bounded time.
///
/// Only for cgroups whose launcher is dead or dying: whatever is in there belongs to nobody else.
fn sweep(base: &Level, name: &str) {
    let deadline = Instant::now() + SWEEP_PATIENCE;
    // every hierarchy is worked on in each round, whether or not an earlier one is done
    while base.0.iter().filter(|dir| !(host::move_out(dir, name) & sweep_once(dir, name))).count() > 0 {
        if Instant::now() > deadline {
            return;
        }
        // a dying process tells nobody when it has left its cgroup on v1
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One pass over `parent/name`; true once it is gone.
fn sweep_once(parent: &Dir, name: &str) -> bool {
    let Ok(dir) = parent.child(name) else { return true };
    let _ = v1::thaw(&dir); // refused in hierarchies without a freezer
    let _ = v2::kill(&dir); // on v2, everything below at once, also what is just being born
    for child in dir.children().unwrap_or_default() {
        sweep_once(&dir, &child);
    }
    for pid in dir.processes().unwrap_or_default() {
        let _ = kill(pid, Signal::SIGKILL);
    }
    parent.remove(name).is_ok()
}
