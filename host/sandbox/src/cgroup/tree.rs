//! The instance's cgroups: made at the start, a level for each tenant, swept at the end.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};

use super::dir::Dir;
use super::hierarchy::Hierarchy;
use super::leaf::Leaf;
use super::{CgroupError, Plan, Role, room, v1, v2};
use crate::limits::Ceiling;
use crate::name::Name;

/// How long a tenant's cgroup outlives its last sandbox, so that a quiet tenant's next job finds it.
const TENANT_LINGER: Duration = Duration::from_secs(2);

/// How often and for how long a ceiling is tried again that the kernel refuses: on v1 a CPU quota below that of a cgroup
/// which is removed already, but not yet let go of, some RCU grace periods later.
const CEILING_AGAIN: Duration = Duration::from_millis(5);
const CEILING_WITHIN: Duration = Duration::from_secs(2);

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

    fn make_below(&self, name: &str) -> nix::Result<Self> {
        let mut made = Vec::with_capacity(self.0.len());
        for parent in &self.0 {
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

    pub(super) fn remove_below(&self, name: &str) -> nix::Result<()> {
        // every hierarchy is tried; the first refusal is reported
        self.0.iter().map(|parent| parent.remove(name)).fold(Ok(()), Result::and)
    }
}

/// The cgroups of this instance.
#[derive(Debug)]
pub(crate) struct Tree {
    plan: Rc<Plan>,
    /// The directories that hold the instance's.
    base: Level,
    name: String,
    root: Rc<Level>,
    tenants: HashMap<Name, Tenant>,
}

#[derive(Debug)]
struct Tenant {
    level: Rc<Level>,
    /// As it was written.
    ceiling: Ceiling,
    /// As it should be, and until when it is tried to make it so.
    wanted: Ceiling,
    wanted_until: Instant,
    sandboxes: usize,
    idle_since: Instant,
}

impl Tenant {
    fn new(level: Level) -> Self {
        let (now, ceiling) = (Instant::now(), Ceiling::default());
        Self { level: Rc::new(level), ceiling, wanted: ceiling, wanted_until: now, sandboxes: 0, idle_since: now }
    }

    /// Writes what of the ceiling has changed. What has been written before an error stands.
    fn apply_ceiling(&mut self, plan: &Plan) -> nix::Result<()> {
        let (new, now) = (self.wanted, &mut self.ceiling);
        let control = |role| plan.control(&self.level, role);
        if now.memory_bytes != new.memory_bytes {
            control(Role::Memory).limit_memory(new.memory_bytes.unwrap_or(NO_CEILING_BYTES))?;
            now.memory_bytes = new.memory_bytes;
        }
        if now.cpu_weight != new.cpu_weight {
            control(Role::Cpu).weigh_cpu(new.cpu_weight.unwrap_or(DEFAULT_WEIGHT))?;
            now.cpu_weight = new.cpu_weight;
        }
        if now.pids != new.pids {
            control(Role::Pids).limit_pids(new.pids.unwrap_or(NO_CEILING_PIDS))?;
            now.pids = new.pids;
        }
        // the one that may have to be tried again
        if now.cpu_millicores != new.cpu_millicores {
            control(Role::Cpu).limit_cpu_of_all(new.cpu_millicores.unwrap_or(NO_CEILING_MILLICORES))?;
            now.cpu_millicores = new.cpu_millicores;
        }
        Ok(())
    }
}

impl Tree {
    /// Makes the instance's directories, after removing what an earlier run of this instance left there, its
    /// processes included.
    pub(crate) fn make(plan: Plan, instance: &str) -> Result<Self, CgroupError> {
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
        let root = base.make_below(&name).map_err(|e| failed("make a directory in", first, e))?;
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
        Ok(Self { plan: Rc::new(plan), base, name, root: Rc::new(root), tenants: HashMap::new() })
    }

    /// A second set of descriptors on the same directories, for a process that outlives this one.
    pub(crate) fn remains(&self) -> Remains<'_> {
        Remains { base: &self.base, name: &self.name }
    }

    /// The tenant's cgroup, made if it is not there, under the given ceiling.
    pub(crate) fn tenant(&mut self, name: &Name, ceiling: Ceiling) -> nix::Result<()> {
        if !self.tenants.contains_key(name) {
            let level = self.root.make_below(name.as_str())?;
            if let Some(v2) = self.plan.v2 {
                v2::delegate(&level.0[v2], &self.plan.v2_delegation())?;
            }
            self.tenants.insert(name.clone(), Tenant::new(level));
        }
        let Some(tenant) = self.tenants.get_mut(name) else {
            return Err(Errno::ENOENT);
        };
        if tenant.wanted != ceiling {
            tenant.wanted = ceiling;
            tenant.wanted_until = Instant::now() + CEILING_WITHIN;
        }
        match tenant.apply_ceiling(&self.plan) {
            // soon; until then its jobs, those to come included, have no more than that each
            Err(Errno::EINVAL) => Ok(()),
            other => other,
        }
    }

    /// Tries ceilings again that the kernel has refused. Returns when to look again.
    pub(crate) fn apply_ceilings(&mut self, now: Instant) -> Option<Instant> {
        let mut refused = false;
        for tenant in self.tenants.values_mut().filter(|tenant| now < tenant.wanted_until) {
            refused |= tenant.apply_ceiling(&self.plan).is_err();
        }
        refused.then_some(now + CEILING_AGAIN)
    }

    /// Changes the ceiling of a tenant that has a cgroup; one that has none gets its ceiling with its next sandbox.
    /// A value that the kernel refuses is tried again then, and refuses that sandbox.
    pub(crate) fn set_ceiling(&mut self, name: &Name, ceiling: Ceiling) {
        if self.tenants.contains_key(name) {
            let _ = self.tenant(name, ceiling);
        }
    }

    /// A leaf for one sandbox under its tenant, which must have been made by [`Tree::tenant`]. No limits yet.
    pub(crate) fn leaf(&mut self, tenant: &Name, name: &str) -> nix::Result<Leaf> {
        let entry = self.tenants.get_mut(tenant).ok_or(Errno::ENOENT)?;
        let level = entry.level.make_below(name)?;
        entry.sandboxes += 1;
        let path = format!("/{}/{tenant}/{name}", self.name);
        Ok(Leaf::new(self.plan.clone(), entry.level.clone(), tenant.clone(), path, level))
    }

    /// Removes the leaf's directories. `EBUSY` gives it back, to be tried again: the last task may still be on its
    /// way out.
    pub(crate) fn remove(&mut self, leaf: Leaf) -> Result<(), (Leaf, Errno)> {
        if let Err(errno) = leaf.remove() {
            return Err((leaf, errno));
        }
        if let Some(tenant) = self.tenants.get_mut(leaf.tenant()) {
            tenant.sandboxes -= 1;
            tenant.idle_since = Instant::now();
        }
        Ok(())
    }

    /// Removes the cgroups of tenants that have been idle for a while. Returns when to look again.
    pub(crate) fn remove_idle_tenants(&mut self, now: Instant) -> Option<Instant> {
        let root = &self.root;
        self.tenants.retain(|name, tenant| {
            let due = tenant.sandboxes == 0 && now >= tenant.idle_since + TENANT_LINGER;
            if !due {
                return true;
            }
            // dropping our descriptors first is not needed: they do not keep a cgroup busy
            match root.remove_below(name.as_str()) {
                Ok(()) => false,
                Err(_) => {
                    tenant.idle_since = now;
                    true
                }
            }
        });
        self.tenants.values().filter(|t| t.sandboxes == 0).map(|t| t.idle_since + TENANT_LINGER).min()
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
    while base.0.iter().filter(|dir| !sweep_once(dir, name)).count() > 0 {
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

// What a ceiling becomes when it is taken away again: beyond what any machine has, but written out, because "max" and
// -1 are spelled differently by every controller.
const NO_CEILING_BYTES: u64 = 1 << 50;
const NO_CEILING_MILLICORES: u32 = 1_024_000;
const NO_CEILING_PIDS: u32 = 1 << 22; // the kernel's PID_MAX_LIMIT
const DEFAULT_WEIGHT: u32 = 100;
