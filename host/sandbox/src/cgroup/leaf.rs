//! The cgroup of one sandbox.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::control::Control;
use super::gauge::Before;
use super::tree::Level;
use super::{Extra, Plan, Role, UNIFIED, v2};
use crate::limits::Limits;
use crate::name::Name;
use crate::paths::CgroupPaths;
use crate::spec::SandboxSpec;

/// A limit: its key, whether it is to be written, and what writes it.
type LimitWrite = (&'static str, bool, fn(&Leaf, &SandboxSpec) -> nix::Result<()>);

/// One directory in each hierarchy, below the tenant's.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(super) plan: Rc<Plan>,
    parent: Rc<Level>,
    tenant: Name,
    /// Below the server's own cgroup.
    path: String,
    pub(super) level: Level,
    /// Of a process of the host's own.
    own: bool,
    /// The limits that are written, as long as nobody else may have written others.
    limited: Option<Shares>,
    /// What [`Leaf::die_whole`] gives, if it has been made already.
    oom: Option<Option<OwnedFd>>,
    pub(super) before: Before,
}

/// What is written into a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shares {
    memory_bytes: u64,
    millicores: u32,
    weight: u32,
    pids: u32,
    /// Nobody but the job's one process was to be in it.
    alone: bool,
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
            alone: spec.kind.own_pids() == 0,
        }
    }
}

impl Leaf {
    pub(super) fn new(plan: Rc<Plan>, parent: Rc<Level>, tenant: Name, path: String, level: Level, own: bool) -> Self {
        Self { plan, parent, tenant, path, level, own, limited: None, oom: None, before: Before::default() }
    }

    pub(super) fn is_own(&self) -> bool {
        self.own
    }

    pub(crate) fn tenant(&self) -> &Name {
        &self.tenant
    }

    /// Removes the directories. `EBUSY` while the last task is still on its way out.
    pub(super) fn remove(&mut self) -> nix::Result<()> {
        self.oom = None;
        self.parent.remove_below(self.name(), self.plan.with_leaves)
    }

    /// Whether [`Leaf::renew`] is worth an attempt.
    pub(crate) fn may_be_renewed(&self) -> bool {
        let on_v1 = Role::ALL.into_iter().all(|role| !self.plan.is_v2(role));
        on_v1 && !self.own && self.limited.is_some_and(|limited| limited.alone)
    }

    /// Makes what a dead sandbox has left as good as new for another one of the tenant. True if it is.
    ///
    /// What v1 counts begins from here. It resets no peak of pids; but where that is 1 nobody had more than one process, and
    /// the next one's is right too. On v2 the directory is another one: nothing resets the averages of its pressure.
    pub(super) fn renew(&mut self) -> nix::Result<bool> {
        let (true, Some(limited)) = (self.may_be_renewed(), self.limited) else { return Ok(false) };
        let pids = self.control(Role::Pids);
        if pids.pids_used() != Some(0) || pids.pids_peak().is_some_and(|peak| peak > 1) {
            return Ok(false);
        }
        match self.plan.v2 {
            Some(v2) => {
                let name = self.name().to_owned();
                self.level.renew(v2, &self.parent, &name)?;
            }
            // an order to freeze may have come when its process had ended already
            None => self.control(Role::Freezer).thaw()?,
        }
        if !self.control(Role::Memory).forget_memory_peak()? {
            return Ok(false);
        }
        // of what the last one was throttled for, the next one does not pay
        self.control(Role::Cpu).refill_cpu(limited.millicores)?;
        if let Some(Some(oom)) = &self.oom {
            // what has been told of has been looked at
            let _ = nix::unistd::read(oom, &mut [0; 8]);
        }
        self.count_anew()?;
        Ok(true)
    }

    pub(super) fn control(&self, role: Role) -> Control<'_> {
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

    /// Changes the limits of what runs already, as far as they differ. An error names the limit and puts back those that
    /// had been changed before it; only `EBUSY` for memory is told when all is written: more of it is in use.
    pub(crate) fn change_limits(&mut self, from: &SandboxSpec, to: &SandboxSpec) -> Result<(), (&'static str, Errno)> {
        self.distrust();
        let writes: [LimitWrite; 3] = [
            ("cpu_cores", from.limits.cpu_millicores != to.limits.cpu_millicores, Self::limit_cpu),
            ("cpu_weight", from.limits.cpu_weight != to.limits.cpu_weight, Self::weigh_cpu),
            ("pids", from.limits.pids != to.limits.pids, Self::limit_pids),
        ];
        for (done, (limit, differs, write)) in writes.iter().enumerate() {
            if *differs && let Err(errno) = write(self, to) {
                self.put_back(&writes[..done], from);
                return Err((limit, errno));
            }
        }
        if from.limits.memory_bytes == to.limits.memory_bytes {
            return Ok(());
        }
        let memory = self.control(Role::Memory);
        memory.change_memory_limit(to.limits.memory_bytes).map_err(|errno| {
            if errno != Errno::EBUSY {
                self.put_back(&writes, from);
                let _ = memory.change_memory_limit(from.limits.memory_bytes);
            }
            ("memory_bytes", errno)
        })
    }

    /// Goes back to limits that have held before.
    fn put_back(&self, writes: &[LimitWrite], to: &SandboxSpec) {
        for (_, differs, write) in writes {
            if *differs {
                // they were taken before; what is refused now stays as it was last written
                let _ = write(self, to);
            }
        }
    }

    fn weigh_cpu(&self, spec: &SandboxSpec) -> nix::Result<()> {
        self.control(Role::Cpu).weigh_cpu(Shares::of(spec).weight)
    }

    fn limit_pids(&self, spec: &SandboxSpec) -> nix::Result<()> {
        self.control(Role::Pids).limit_pids(Shares::of(spec).pids)
    }

    /// Somebody else may have written limits.
    pub(super) fn distrust(&mut self) {
        self.limited = None;
    }

    /// Writes the CPU limit alone.
    pub(crate) fn limit_cpu(&self, spec: &SandboxSpec) -> nix::Result<()> {
        self.control(Role::Cpu).limit_cpu(Shares::of(spec).millicores)
    }

    /// Writes that of a process of the host's own: as much as its tenant has.
    pub(crate) fn limit_own_cpu(&self, ceiling_millicores: Option<u32>) -> nix::Result<()> {
        let most = *Limits::CPU_MILLICORES.end();
        self.control(Role::Cpu).limit_cpu(ceiling_millicores.map_or(most, |ceiling| most.min(ceiling)))
    }

    /// Sees to it that an OOM kill takes the whole job: on v2 the kernel does, on v1 the descriptor given becomes
    /// readable when the job has to be looked at.
    pub(crate) fn die_whole(&mut self) -> nix::Result<Option<OwnedFd>> {
        match self.oom.take() {
            Some(ahead) => Ok(ahead),
            None => self.control(Role::Memory).die_whole(),
        }
    }

    /// Takes back what [`Leaf::die_whole`] has given, for another sandbox.
    pub(crate) fn keep_oom(&mut self, oom: Option<OwnedFd>) {
        self.oom = Some(oom);
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
    pub(crate) fn holds(&self, membership: &CgroupPaths) -> bool {
        let in_leaf = |name: &str| membership.get(name).is_some_and(|path| path.ends_with(&self.path));
        let v1 = Role::ALL.into_iter().filter(|role| !self.plan.is_v2(*role)).all(|role| in_leaf(role.v1_name()));
        v1 && (self.plan.v2.is_none() || in_leaf(UNIFIED)) && self.tenant_holds(membership)
    }

    /// The cgroups of a process with this membership, by the names of the controllers that limit it.
    pub(crate) fn by_controller(&self, membership: &CgroupPaths) -> CgroupPaths {
        self.plan.name_v2_controllers(membership)
    }

    /// Whether a controller, or `unified`, has a cgroup of this leaf or of its tenant: others are nobody's concern.
    pub(crate) fn is_governed_by(&self, name: &str) -> bool {
        let extra = Extra::ALL.into_iter().find(|extra| extra.v1_name() == name);
        extra.is_none_or(|extra| self.plan.served(extra).is_ok_and(|served| !served.v2))
    }

    /// Whether it is in the tenant's cgroup, in every hierarchy that has no leaves.
    fn tenant_holds(&self, membership: &CgroupPaths) -> bool {
        let (tenant, _) = self.path.rsplit_once('/').unwrap_or_default();
        let in_tenant = |name: &str| membership.get(name).is_some_and(|path| path.ends_with(tenant));
        let on_v1 = |extra: &Extra| self.plan.served(*extra).is_ok_and(|served| !served.v2);
        Extra::ALL.iter().filter(|extra| on_v1(extra)).all(|extra| in_tenant(extra.v1_name()))
    }

    /// The processes in it.
    pub(crate) fn processes(&self) -> std::io::Result<Vec<Pid>> {
        self.level.dir(self.plan.roles[&Role::Pids]).processes()
    }

    /// The name of its directories.
    pub(crate) fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// Orders it to stand still or to go on; [`Leaf::is_frozen`] tells when nothing runs any more.
    pub(crate) fn freeze(&self, frozen: bool) -> nix::Result<()> {
        self.plan.freezer(&self.level).set(frozen)
    }

    /// Whether every task is frozen, for whatever reason.
    pub(crate) fn is_frozen(&self) -> nix::Result<bool> {
        self.plan.freezer(&self.level).is_frozen()
    }

    /// Kills everything in the leaf that the death of its init would not take with it at once, frozen or not.
    pub(crate) fn kill(&self) -> nix::Result<()> {
        self.control(Role::Freezer).thaw()?;
        match self.plan.v2 {
            Some(index) => v2::kill(self.level.dir(index)),
            None => Ok(()),
        }
    }
}
