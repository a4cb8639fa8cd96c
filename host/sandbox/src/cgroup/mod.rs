//! The cgroups of one instance: `<server's own cgroup>/holm-<instance>/<tenant>/<leaf>/`, one leaf a sandbox.
//!
//! Only the launcher comes here. Nothing outside of the instance's own subtree is ever written, and types of the
//! cgroup library do not leave `v1`.

mod dir;
pub mod hierarchy;
mod v1;
mod v2;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use self::dir::Dir;
use self::hierarchy::{Hierarchy, Layout, LayoutError};
use crate::limits::Ceiling;
use crate::name::Name;
use crate::spec::SandboxSpec;
use crate::usage::Usage;

/// The CFS period. The kernel's own default: shorter ones cost more timer work and bound bursts no better for jobs
/// that run for milliseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// How long a tenant's cgroup outlives its last sandbox, so that a quiet tenant's next job finds it.
const TENANT_LINGER: Duration = Duration::from_secs(2);

/// How long a killed cgroup may take to become empty before a sweep gives up on it.
const SWEEP_PATIENCE: Duration = Duration::from_secs(2);

fn cpu_quota_us(millicores: u32) -> i64 {
    i64::from(millicores) * i64::try_from(CPU_PERIOD_US / 1000).unwrap_or(i64::MAX)
}

/// A controller that every job needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// CPU quota and weight.
    Cpu,
    /// CPU time used.
    Cpuacct,
    /// Memory and swap.
    Memory,
    /// Processes and threads.
    Pids,
    /// Stopping and resuming.
    Freezer,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 5] = [Self::Cpu, Self::Cpuacct, Self::Memory, Self::Pids, Self::Freezer];

    /// The controller's name on v1.
    #[must_use]
    pub const fn v1_name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cpuacct => "cpuacct",
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Freezer => "freezer",
        }
    }

    /// The v2 controller that has to be delegated for it; what is built into v2 needs none.
    const fn v2_controller(self) -> Option<&'static str> {
        match self {
            Self::Cpu => Some("cpu"),
            Self::Memory => Some("memory"),
            Self::Pids => Some("pids"),
            Self::Cpuacct | Self::Freezer => None,
        }
    }
}

/// Which hierarchy serves which role on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    hierarchies: Vec<Hierarchy>,
    roles: BTreeMap<Role, usize>,
    /// The v2 hierarchy among `hierarchies`, whether or not it serves a role.
    v2: Option<usize>,
}

/// The machine's cgroups cannot isolate jobs.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The hierarchies could not be found.
    #[error("find the cgroup hierarchies")]
    Layout(#[from] LayoutError),
    /// Some controllers are not to be had.
    #[error("the cgroup controllers {0:?} are not available to this process")]
    Missing(Vec<Role>),
    /// A directory could not be made, opened or removed.
    #[error("{what} the cgroup `{path}`")]
    Directory {
        /// What was tried.
        what: &'static str,
        /// On which directory.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Plan {
    /// Reads the machine's hierarchies and gives each role to one: v1 where the controller is bound to v1, else v2.
    ///
    /// # Errors
    /// [`CgroupError::Missing`] names every role that no hierarchy serves.
    pub fn for_this_process() -> Result<Self, CgroupError> {
        let read = |path: &str| {
            fs::read_to_string(path).map_err(|source| CgroupError::Directory {
                what: "read",
                path: path.into(),
                source,
            })
        };
        let layout = Layout::discover(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)?;
        let v2_controllers = match &layout.v2 {
            Some(v2) => Dir::open(&v2.own_dir).map(|dir| v2::available(&dir)).unwrap_or_default(),
            None => Vec::new(),
        };
        Self::from_layout(layout, &v2_controllers)
    }

    fn from_layout(layout: Layout, v2_controllers: &[String]) -> Result<Self, CgroupError> {
        let pure_v2 = layout.v1.is_empty();
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        let mut roles = BTreeMap::new();
        let mut missing = Vec::new();
        for role in Role::ALL {
            let on_v2 = || {
                let v2 = layout.v2.as_ref()?;
                let has = match role.v2_controller() {
                    Some(name) => v2_controllers.iter().any(|c| c == name),
                    None => pure_v2,
                };
                has.then_some(v2)
            };
            match layout.v1_with(role.v1_name()).or_else(on_v2) {
                None => missing.push(role),
                Some(hierarchy) => {
                    let index = hierarchies.iter().position(|h| h == hierarchy).unwrap_or_else(|| {
                        hierarchies.push(hierarchy.clone());
                        hierarchies.len() - 1
                    });
                    roles.insert(role, index);
                }
            }
        }
        if !missing.is_empty() {
            return Err(CgroupError::Missing(missing));
        }
        let v2 = layout.v2.map(|v2| {
            hierarchies.iter().position(|h| *h == v2).unwrap_or_else(|| {
                hierarchies.push(v2);
                hierarchies.len() - 1
            })
        });
        Ok(Self { hierarchies, roles, v2 })
    }

    fn is_v2(&self, role: Role) -> bool {
        Some(self.roles[&role]) == self.v2
    }

    /// The controllers that must be delegated along the v2 hierarchy.
    fn v2_delegation(&self) -> Vec<&'static str> {
        Role::ALL.into_iter().filter(|r| self.is_v2(*r)).filter_map(Role::v2_controller).collect()
    }

    /// The words "v1", "v2" or "hybrid" for what jobs will be limited by.
    #[must_use]
    pub fn version(&self) -> &'static str {
        let v2_roles = Role::ALL.iter().filter(|r| self.is_v2(**r)).count();
        match (v2_roles, self.v2) {
            (0, None) => "v1",
            (n, _) if n == Role::ALL.len() => "v2",
            _ => "hybrid",
        }
    }

    /// For each role its controller's name and the directory of this process's own cgroup.
    #[must_use]
    pub fn describe(&self) -> BTreeMap<&'static str, String> {
        let dir = |index: usize| self.hierarchies[index].own_dir.display().to_string();
        Role::ALL.into_iter().map(|role| (role.v1_name(), dir(self.roles[&role]))).collect()
    }
}

/// One directory in each hierarchy of the plan, all with the same name.
#[derive(Debug)]
struct Level(Vec<Dir>);

impl Level {
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

    fn remove_below(&self, name: &str) -> nix::Result<()> {
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
    ceiling: Ceiling,
    sandboxes: usize,
    idle_since: Instant,
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
            for dir in [&base.0[v2], &root.0[v2]] {
                v2::delegate(dir, &delegation).map_err(|e| failed("delegate the controllers of", hierarchy, e))?;
            }
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
            let level = Rc::new(level);
            let ceiling = Ceiling::default();
            self.tenants.insert(name.clone(), Tenant { level, ceiling, sandboxes: 0, idle_since: Instant::now() });
        }
        let Some(tenant) = self.tenants.get_mut(name) else {
            return Err(Errno::ENOENT);
        };
        if tenant.ceiling != ceiling {
            apply_ceiling(&self.plan, &tenant.level, tenant.ceiling, ceiling)?;
            tenant.ceiling = ceiling;
        }
        Ok(())
    }

    /// Changes the ceiling of a tenant that has a cgroup; one that has none gets its ceiling with its next sandbox.
    /// A value that the kernel refuses is tried again then, and refuses that sandbox.
    pub(crate) fn set_ceiling(&mut self, name: &Name, ceiling: Ceiling) {
        if self.tenants.contains_key(name) {
            let _ = self.tenant(name, ceiling);
        }
    }

    /// A leaf for one sandbox under its tenant, which must have been made by [`Tree::tenant`]. No limits yet.
    pub(crate) fn leaf(&mut self, tenant: &Name, name: String) -> nix::Result<Leaf> {
        let entry = self.tenants.get_mut(tenant).ok_or(Errno::ENOENT)?;
        let level = entry.level.make_below(&name)?;
        entry.sandboxes += 1;
        let path = format!("/{}/{tenant}/{name}", self.name);
        Ok(Leaf { plan: self.plan.clone(), parent: entry.level.clone(), tenant: tenant.clone(), name, path, level })
    }

    /// Removes the leaf's directories. `EBUSY` gives it back, to be tried again: the last task may still be on its
    /// way out.
    pub(crate) fn remove(&mut self, leaf: Leaf) -> Result<(), (Leaf, Errno)> {
        if let Err(errno) = leaf.parent.remove_below(&leaf.name) {
            return Err((leaf, errno));
        }
        if let Some(tenant) = self.tenants.get_mut(&leaf.tenant) {
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
    for child in dir.children().unwrap_or_default() {
        sweep_once(&dir, &child);
    }
    for pid in dir.processes().unwrap_or_default() {
        let _ = kill(pid, Signal::SIGKILL);
    }
    parent.remove(name).is_ok()
}

fn apply_ceiling(plan: &Plan, level: &Level, old: Ceiling, new: Ceiling) -> nix::Result<()> {
    let dir = |role: Role| &level.0[plan.roles[&role]];
    if old.memory_bytes != new.memory_bytes {
        let bytes = new.memory_bytes.unwrap_or(NO_CEILING_BYTES);
        if plan.is_v2(Role::Memory) {
            v2::limit_memory(dir(Role::Memory), bytes)?;
        } else {
            v1::limit_memory(dir(Role::Memory), bytes)?;
        }
    }
    if old.cpu_millicores != new.cpu_millicores {
        let millicores = new.cpu_millicores.unwrap_or(NO_CEILING_MILLICORES);
        limit_cpu(plan, dir(Role::Cpu), millicores)?;
    }
    if old.cpu_weight != new.cpu_weight {
        weigh_cpu(plan, dir(Role::Cpu), new.cpu_weight.unwrap_or(DEFAULT_WEIGHT))?;
    }
    if old.pids != new.pids {
        limit_pids(plan, dir(Role::Pids), new.pids.unwrap_or(NO_CEILING_PIDS))?;
    }
    Ok(())
}

// What a ceiling becomes when it is taken away again: beyond what any machine has, but written out, because "max" and
// -1 are spelled differently by every controller.
const NO_CEILING_BYTES: u64 = 1 << 50;
const NO_CEILING_MILLICORES: u32 = 1_024_000;
const NO_CEILING_PIDS: u32 = 1 << 22; // the kernel's PID_MAX_LIMIT
const DEFAULT_WEIGHT: u32 = 100;

fn limit_cpu(plan: &Plan, dir: &Dir, millicores: u32) -> nix::Result<()> {
    if plan.is_v2(Role::Cpu) { v2::limit_cpu(dir, millicores) } else { v1::limit_cpu(dir, millicores) }
}

fn weigh_cpu(plan: &Plan, dir: &Dir, weight: u32) -> nix::Result<()> {
    if plan.is_v2(Role::Cpu) { v2::weigh_cpu(dir, weight) } else { v1::weigh_cpu(dir, weight) }
}

fn limit_pids(plan: &Plan, dir: &Dir, pids: u32) -> nix::Result<()> {
    if plan.is_v2(Role::Pids) { v2::limit_pids(dir, pids) } else { v1::limit_pids(dir, pids) }
}

/// The cgroup of one sandbox.
#[derive(Debug)]
pub(crate) struct Leaf {
    plan: Rc<Plan>,
    parent: Rc<Level>,
    tenant: Name,
    name: String,
    /// Below the server's own cgroup.
    path: String,
    level: Level,
}

impl Leaf {
    fn dir(&self, role: Role) -> &Dir {
        &self.level.0[self.plan.roles[&role]]
    }

    /// Writes the limits. Nothing may be attached before.
    pub(crate) fn limit(&self, spec: &SandboxSpec) -> nix::Result<()> {
        let limits = &spec.limits;
        let memory = self.dir(Role::Memory);
        if self.plan.is_v2(Role::Memory) {
            v2::limit_memory(memory, limits.memory_bytes)?;
            v2::kill_whole_group_on_oom(memory)?;
        } else {
            v1::limit_memory(memory, limits.memory_bytes)?;
        }
        limit_cpu(&self.plan, self.dir(Role::Cpu), limits.cpu_millicores)?;
        weigh_cpu(&self.plan, self.dir(Role::Cpu), limits.cpu_weight)?;
        limit_pids(&self.plan, self.dir(Role::Pids), limits.pids + spec.kind.own_pids())
    }

    /// On v1, a descriptor that becomes readable when there may have been an OOM kill. On v2 the kernel kills the
    /// whole leaf by itself, and nobody needs to be woken.
    pub(crate) fn watch_oom(&self) -> nix::Result<Option<OwnedFd>> {
        if self.plan.is_v2(Role::Memory) {
            return Ok(None);
        }
        v1::watch_oom(self.dir(Role::Memory)).map(Some)
    }

    /// The directory in which the process should be born, where there is a v2 hierarchy.
    pub(crate) fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.plan.v2.map(|index| self.level.0[index].as_fd())
    }

    /// Attaches `pid` in every hierarchy in which it was not born.
    pub(crate) fn attach(&self, pid: Pid) -> nix::Result<()> {
        let born = self.plan.v2;
        self.level.0.iter().enumerate().filter(|(i, _)| Some(*i) != born).try_for_each(|(_, dir)| dir.attach(pid))
    }

    /// Whether a process with this [`membership`] is in the leaf, in every hierarchy.
    pub(crate) fn holds(&self, membership: &BTreeMap<String, String>) -> bool {
        let in_leaf = |name: &str| membership.get(name).is_some_and(|path| path.ends_with(&self.path));
        let v1 = Role::ALL.into_iter().filter(|role| !self.plan.is_v2(*role)).all(|role| in_leaf(role.v1_name()));
        v1 && (self.plan.v2.is_none() || in_leaf("unified"))
    }

    /// Kills everything in the leaf that the death of its init would not take with it at once, frozen or not.
    pub(crate) fn kill(&self) -> nix::Result<()> {
        if !self.plan.is_v2(Role::Freezer) {
            v1::thaw(self.dir(Role::Freezer))?;
        }
        match self.plan.v2 {
            Some(index) => v2::kill(&self.level.0[index]),
            None => Ok(()),
        }
    }

    /// Processes that the OOM killer has taken in this leaf.
    pub(crate) fn oom_kills(&self) -> u64 {
        let memory = self.dir(Role::Memory);
        let kills = if self.plan.is_v2(Role::Memory) { v2::oom_kills(memory) } else { v1::oom_kills(memory) };
        kills.unwrap_or(0)
    }

    /// CPU time used so far.
    pub(crate) fn cpu_used(&self) -> Option<Duration> {
        let cpuacct = self.dir(Role::Cpuacct);
        let us = if self.plan.is_v2(Role::Cpuacct) { v2::cpu_total(cpuacct) } else { v1::cpu_total(cpuacct) };
        us.map(Duration::from_micros)
    }

    /// Everything that the leaf counted. `own_pids` of them are the host's own.
    pub(crate) fn usage(&self, own_pids: u32) -> Usage {
        let (cpu, cpuacct) = (self.dir(Role::Cpu), self.dir(Role::Cpuacct));
        let (memory, pids) = (self.dir(Role::Memory), self.dir(Role::Pids));
        let v2 = |role| self.plan.is_v2(role);
        let (user, system) = if v2(Role::Cpuacct) { v2::cpu_times(cpuacct) } else { v1::cpu_times(cpuacct) };
        let peak = if v2(Role::Pids) { v2::pids_peak(pids) } else { v1::pids_peak(pids) };
        Usage {
            wall_us: 0,
            cpu_user_us: user,
            cpu_system_us: system,
            cpu_throttled_us: if v2(Role::Cpu) { v2::cpu_throttled(cpu) } else { v1::cpu_throttled(cpu) },
            memory_peak_bytes: if v2(Role::Memory) { v2::memory_peak(memory) } else { v1::memory_peak(memory) },
            pids_peak: peak.map(|peak| peak.saturating_sub(u64::from(own_pids))),
            oom_kills: self.oom_kills(),
        }
    }
}

/// The cgroups in `text`, the content of `/proc/PID/cgroup`: the path of each controller that limits jobs; the v2
/// hierarchy is called `unified`.
pub(crate) fn membership(text: &str) -> BTreeMap<String, String> {
    let mut paths = BTreeMap::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if controllers.is_empty() {
            paths.insert("unified".to_owned(), path.to_owned());
        }
        for controller in controllers.split(',') {
            if Role::ALL.iter().any(|role| role.v1_name() == controller) {
                paths.insert(controller.to_owned(), path.to_owned());
            }
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(controllers: &[&str], dir: &str) -> Hierarchy {
        let controllers = controllers.iter().map(|c| (*c).to_owned()).collect();
        Hierarchy { controllers, own_dir: dir.into(), own_path: "/".into() }
    }

    #[test]
    fn hybrid_limits_by_v1_and_kills_by_v2() {
        let v1 = ["cpu", "cpuacct", "memory", "pids", "freezer", "blkio"];
        let layout =
            Layout { v1: v1.iter().map(|c| hierarchy(&[c], c)).collect(), v2: Some(hierarchy(&[], "unified")) };
        let plan = Plan::from_layout(layout, &[]).unwrap();
        assert_eq!(plan.version(), "hybrid");
        assert_eq!(plan.hierarchies.len(), 6, "five for the roles, blkio for none, and v2");
        assert!(plan.v2_delegation().is_empty());
        assert!(!plan.is_v2(Role::Freezer));
    }

    #[test]
    fn co_mounted_controllers_share_a_directory() {
        let layout = Layout {
            v1: vec![hierarchy(&["cpu", "cpuacct"], "a"), hierarchy(&["memory", "pids", "freezer"], "b")],
            v2: None,
        };
        let plan = Plan::from_layout(layout, &[]).unwrap();
        assert_eq!((plan.version(), plan.hierarchies.len()), ("v1", 2));
    }

    #[test]
    fn v2_delegates_what_it_limits() {
        let controllers: Vec<String> = ["cpuset", "cpu", "io", "memory", "pids"].map(String::from).into();
        let layout = Layout { v1: vec![], v2: Some(hierarchy(&[], "u")) };
        let plan = Plan::from_layout(layout, &controllers).unwrap();
        assert_eq!((plan.version(), plan.hierarchies.len()), ("v2", 1));
        assert_eq!(plan.v2_delegation(), ["cpu", "memory", "pids"]);
    }

    #[test]
    fn every_missing_controller_is_named_at_once() {
        let layout = Layout { v1: vec![], v2: Some(hierarchy(&[], "u")) };
        let error = Plan::from_layout(layout, &["cpu".to_owned()]).unwrap_err();
        assert!(matches!(error, CgroupError::Missing(roles) if roles == [Role::Memory, Role::Pids]));
        let layout = Layout { v1: vec![hierarchy(&["memory"], "m")], v2: None };
        let error = Plan::from_layout(layout, &[]).unwrap_err();
        assert!(matches!(error, CgroupError::Missing(roles) if roles.len() == 4));
    }

    #[test]
    fn membership_names_the_controllers_that_limit() {
        let text = "9:name=systemd:/\n5:cpu,cpuacct:/h/t/l\n4:memory:/x\n1:blkio:/\n0::/h/t/l\n";
        let paths = membership(text);
        let expected = [("cpu", "/h/t/l"), ("cpuacct", "/h/t/l"), ("memory", "/x"), ("unified", "/h/t/l")];
        assert_eq!(paths, expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }
}
