//! The cgroup of one sandbox.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use nix::unistd::Pid;

use super::control::Control;
use super::tree::Level;
use super::{Extra, Plan, Role, UNIFIED, v2};
use crate::name::Name;
use crate::spec::SandboxSpec;
use crate::usage::Usage;

/// One directory in each hierarchy, below the tenant's.
#[derive(Debug)]
pub(crate) struct Leaf {
    plan: Rc<Plan>,
    parent: Rc<Level>,
    tenant: Name,
    /// Below the server's own cgroup.
    path: String,
    level: Level,
    /// Of a process of the host's own.
    own: bool,
    /// The limits that are written.
    limited: Option<Shares>,
    /// What [`Leaf::die_whole`] has given ahead.
    oom: Option<Option<OwnedFd>>,
}

/// What is written into a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shares {
    memory_bytes: u64,
    millicores: u32,
    weight: u32,
    pids: u32,
}

impl Shares {
    /// The CPU limit is the tenant's if that is less: more would mean nothing on v2, and v1 refuses it.
    fn of(spec: &SandboxSpec) -> Self {
        let limits = &spec.limits;
        Self {
            memory_bytes: limits.memory_bytes,
            millicores: limits.cpu_millicores.min(spec.ceiling.cpu_millicores.unwrap_or(u32::MAX)),
            weight: limits.cpu_weight,
            pids: limits.pids + spec.kind.own_pids(),
        }
    }
}

impl Leaf {
    pub(super) fn new(plan: Rc<Plan>, parent: Rc<Level>, tenant: Name, path: String, level: Level, own: bool) -> Self {
        Self { plan, parent, tenant, path, level, own, limited: None, oom: None }
    }

    pub(super) fn is_own(&self) -> bool {
        self.own
    }

    pub(crate) fn tenant(&self) -> &Name {
        &self.tenant
    }

    /// Removes the directories. `EBUSY` while the last task is still on its way out.
    pub(super) fn remove(&self) -> nix::Result<()> {
        let name = self.path.rsplit('/').next().unwrap_or(&self.path);
        self.parent.remove_below(name, self.plan.with_leaves)
    }

    fn control(&self, role: Role) -> Control<'_> {
        self.plan.control(&self.level, role)
    }

    /// Writes the limits. Nothing may be attached before.
    pub(crate) fn limit(&mut self, spec: &SandboxSpec) -> nix::Result<()> {
        let (new, now) = (Shares::of(spec), self.limited.take());
        let changes = |value: fn(&Shares) -> u64| now.is_none_or(|now| value(&now) != value(&new));
        if changes(|shares| shares.memory_bytes) {
            self.control(Role::Memory).limit_memory(new.memory_bytes)?;
        }
        if changes(|shares| shares.millicores.into()) {
            self.control(Role::Cpu).limit_cpu(new.millicores)?;
        }
        if changes(|shares| shares.weight.into()) {
            self.control(Role::Cpu).weigh_cpu(new.weight)?;
        }
        if changes(|shares| shares.pids.into()) {
            self.control(Role::Pids).limit_pids(new.pids)?;
        }
        self.limited = Some(new);
        Ok(())
    }

    /// Somebody else may have written limits.
    pub(super) fn distrust(&mut self) {
        self.limited = None;
    }

    /// Writes the CPU limit alone.
    pub(crate) fn limit_cpu(&self, spec: &SandboxSpec) -> nix::Result<()> {
        self.control(Role::Cpu).limit_cpu(Shares::of(spec).millicores)
    }

    /// Sees to it that an OOM kill takes the whole job: on v2 the kernel does, on v1 the descriptor given becomes
    /// readable when the job has to be looked at.
    pub(crate) fn die_whole(&mut self) -> nix::Result<Option<OwnedFd>> {
        match self.oom.take() {
            Some(ahead) => Ok(ahead),
            None => self.control(Role::Memory).die_whole(),
        }
    }

    /// Does all of that for a sandbox which may come.
    pub(super) fn make_ready(&mut self, spec: &SandboxSpec) -> nix::Result<()> {
        self.limit(spec)?;
        self.oom = Some(self.control(Role::Memory).die_whole()?);
        Ok(())
    }

    /// The directory in which the process should be born, where there is a v2 hierarchy.
    pub(crate) fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.plan.v2.map(|index| self.level.dir(index).as_fd())
    }

    /// Attaches `pid` in every hierarchy in which it was not born: to the leaf, and where there are none, to the tenant's
    /// cgroup.
    pub(crate) fn attach(&self, pid: Pid) -> nix::Result<()> {
        let born = self.plan.v2;
        let own = self.level.dirs().filter(|(index, _)| Some(*index) != born);
        let of_tenant = self.parent.dirs().filter(|(index, _)| *index >= self.plan.with_leaves);
        own.chain(of_tenant).try_for_each(|(_, dir)| dir.attach(pid))
    }

    /// Attaches `pid`, which comes out of another leaf of the same tenant: in the tenant's cgroups it is already.
    pub(crate) fn attach_from_beside(&self, pid: Pid) -> nix::Result<()> {
        self.level.dirs().try_for_each(|(_, dir)| dir.attach(pid))
    }

    /// Whether a process with this membership is in the leaf, in every hierarchy.
    pub(crate) fn holds(&self, membership: &BTreeMap<String, String>) -> bool {
        let in_leaf = |name: &str| membership.get(name).is_some_and(|path| path.ends_with(&self.path));
        let v1 = Role::ALL.into_iter().filter(|role| !self.plan.is_v2(*role)).all(|role| in_leaf(role.v1_name()));
        v1 && (self.plan.v2.is_none() || in_leaf(UNIFIED)) && self.tenant_holds(membership)
    }

    /// The cgroups of a process with this membership, by the names of the controllers that limit it.
    pub(crate) fn by_controller(&self, membership: BTreeMap<String, String>) -> BTreeMap<String, String> {
        self.plan.name_v2_controllers(membership)
    }

    /// Whether a controller, or `unified`, has a cgroup of this leaf or of its tenant: others are nobody's concern.
    pub(crate) fn is_governed_by(&self, name: &str) -> bool {
        let extra = Extra::ALL.into_iter().find(|extra| extra.v1_name() == name);
        extra.is_none_or(|extra| self.plan.served(extra).is_ok_and(|served| !served.v2))
    }

    /// Whether it is in the tenant's cgroup, in every hierarchy that has no leaves.
    fn tenant_holds(&self, membership: &BTreeMap<String, String>) -> bool {
        let (tenant, _) = self.path.rsplit_once('/').unwrap_or_default();
        let in_tenant = |name: &str| membership.get(name).is_some_and(|path| path.ends_with(tenant));
        let on_v1 = |extra: &Extra| self.plan.served(*extra).is_ok_and(|served| !served.v2);
        Extra::ALL.iter().filter(|extra| on_v1(extra)).all(|extra| in_tenant(extra.v1_name()))
    }

    /// Lets what is frozen in it go on, if only to die.
    pub(crate) fn thaw(&self) -> nix::Result<()> {
        self.control(Role::Freezer).thaw()
    }

    /// Kills everything in the leaf that the death of its init would not take with it at once, frozen or not.
    pub(crate) fn kill(&self) -> nix::Result<()> {
        self.control(Role::Freezer).thaw()?;
        match self.plan.v2 {
            Some(index) => v2::kill(self.level.dir(index)),
            None => Ok(()),
        }
    }

    /// Processes that the OOM killer has taken in this leaf.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.control(Role::Memory).oom_kills().unwrap_or(0)
    }

    /// Memory in use now.
    pub(crate) fn memory_used(&self) -> u64 {
        self.control(Role::Memory).memory_used().unwrap_or(0)
    }

    /// CPU time used so far.
    pub(crate) fn cpu_used(&self) -> Option<Duration> {
        self.control(Role::Cpuacct).cpu_total().map(Duration::from_micros)
    }

    /// Everything that the leaf counted. `own_pids` of them are the host's own.
    pub(crate) fn usage(&self, own_pids: u32) -> Usage {
        let (user, system) = self.control(Role::Cpuacct).cpu_times();
        let peak = self.control(Role::Pids).pids_peak();
        Usage {
            wall_us: 0,
            cpu_user_us: user,
            cpu_system_us: system,
            cpu_throttled_us: self.control(Role::Cpu).cpu_throttled(),
            memory_peak_bytes: self.control(Role::Memory).memory_peak(),
            pids_peak: peak.map(|peak| peak.saturating_sub(u64::from(own_pids))),
            oom_kills: self.oom_kills(),
        }
    }
}
