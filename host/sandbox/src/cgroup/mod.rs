//! The cgroups of one instance: `<server's own cgroup>/holm-<instance>/<tenant>/<leaf>/`, one leaf a sandbox.
//!
//! Only the launcher comes here. Nothing outside of the instance's own subtree is ever written, and types of the
//! cgroup library do not leave `v1`.

mod control;
mod dir;
pub mod extra;
mod freezer;
mod gauge;
pub mod hierarchy;
mod host;
mod leaf;
mod leaves;
mod machine;
mod program;
mod room;
mod settings;
mod tenant;
mod tree;
mod v1;
mod v2;

use std::collections::BTreeMap;
use std::fs;
use std::io;

use self::control::Control;
use self::dir::Dir;
use self::extra::{Absence, Extra, Offer, Served};
use self::hierarchy::{Hierarchy, Layout, LayoutError};
pub(crate) use self::leaf::Leaf;
pub(crate) use self::machine::Node;
use self::tree::Level;
pub(crate) use self::tree::{Remains, Tree};
use crate::paths::CgroupPaths;

/// What the v2 hierarchy is called among those that a process is in.
const UNIFIED: &str = "unified";

/// What the kernel rounds memory limits down to, on x86-64.
const PAGE_BYTES: u64 = 4096;

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
    /// How many of `hierarchies`, from the first, have a cgroup for each job; in the rest jobs are in their tenant's.
    with_leaves: usize,
    /// Which hierarchy serves the controllers for tenants alone.
    extras: BTreeMap<Extra, Result<Served, Absence>>,
}

/// The machine's cgroups cannot isolate jobs.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The hierarchies could not be found.
    #[error("find the cgroup hierarchies")]
    Layout(#[from] LayoutError),
    /// Some controllers are not to be had.
    #[error("this process can make no cgroups of {}", .0.iter().map(|role| role.v1_name()).collect::<Vec<_>>().join(", "))]
    Missing(Vec<Role>),
    /// On v2, processes of others are where the instance's cgroups would be.
    #[error("processes that are not Holm's are in the cgroup `{path}`: {}", .others.join(", "))]
    Shared {
        /// The server's own cgroup.
        path: String,
        /// Their pids and names.
        others: Vec<String>,
    },
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
    /// Reads the machine's hierarchies and gives each role to one: v1 where the controller is bound to v1, else v2. One
    /// in which this process can make no directory is as good as none.
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
        let mut layout = Layout::discover(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)?;
        let mounted: Vec<String> = layout.v1.iter().flat_map(|hierarchy| hierarchy.controllers.clone()).collect();
        let usable = |hierarchy: &Hierarchy| Dir::takes_cgroups(&hierarchy.own_dir);
        layout.v1.retain(usable);
        layout.v2 = layout.v2.filter(usable);
        let v2_controllers = match &layout.v2 {
            Some(v2) => Dir::open(&v2.own_dir).map(|dir| v2::available(&dir)).unwrap_or_default(),
            None => Vec::new(),
        };
        // beside v1, what the operator has not enabled on v2 may be meant to be mounted on v1: it is not taken from there
        let v2_enabled = match &layout.v2 {
            Some(v2) if !mounted.is_empty() => Dir::open(&v2.own_dir).map(|dir| v2::enabled(&dir)).unwrap_or_default(),
            _ => v2_controllers.clone(),
        };
        let offer = Offer {
            layout: &layout,
            mounted: &mounted,
            v2_controllers: &v2_controllers,
            v2_enabled: &v2_enabled,
            programs: &extra::takes_programs,
            attaches_cpus: extra::attaches_cpus(),
            kernel: &extra::kernel_controllers(),
        };
        Self::from_offer(&offer)
    }

    /// Looks whether there is room for an instance: on v2, nobody else's process in the server's own cgroup.
    ///
    /// # Errors
    /// [`CgroupError::Shared`] names the processes.
    pub fn check_room(&self) -> Result<(), CgroupError> {
        let (Some(v2), delegation) = (self.v2, self.v2_delegation()) else { return Ok(()) };
        let hierarchy = &self.hierarchies[v2];
        match Dir::open(&hierarchy.own_dir) {
            Ok(base) if !delegation.is_empty() => room::check(&base, hierarchy, &delegation),
            _ => Ok(()),
        }
    }

    fn from_offer(offer: &Offer<'_>) -> Result<Self, CgroupError> {
        let Offer { layout, v2_controllers, .. } = *offer;
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
        let index_of = |hierarchies: &mut Vec<Hierarchy>, hierarchy: &Hierarchy| {
            hierarchies.iter().position(|h| h == hierarchy).unwrap_or_else(|| {
                hierarchies.push(hierarchy.clone());
                hierarchies.len() - 1
            })
        };
        let v2 = layout.v2.as_ref().map(|v2| index_of(&mut hierarchies, v2));
        let with_leaves = hierarchies.len();
        let leaves = hierarchies.clone();
        let extras = Extra::ALL.map(|extra| {
            let found = offer.find(extra, |hierarchy| leaves.contains(hierarchy));
            (extra, found.map(|(hierarchy, v2)| Served { index: index_of(&mut hierarchies, hierarchy), v2 }))
        });
        Ok(Self { hierarchies, roles, v2, with_leaves, extras: extras.into() })
    }

    /// `membership`, completed by the names of the controllers that jobs are limited by on v2.
    fn name_v2_controllers(&self, membership: &CgroupPaths) -> CgroupPaths {
        let on_v2 = Role::ALL.into_iter().filter(|role| self.is_v2(*role));
        let named = on_v2.filter_map(|role| Some((role.v1_name(), membership.get(UNIFIED)?)));
        CgroupPaths::of(membership.iter().chain(named))
    }

    fn is_v2(&self, role: Role) -> bool {
        Some(self.roles[&role]) == self.v2
    }

    /// What controls `role` in a set of directories of this plan.
    fn control<'a>(&self, level: &'a Level, role: Role) -> Control<'a> {
        Control::new(level.dir(self.roles[&role]), self.is_v2(role))
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

/// The cgroups in `text`, the content of `/proc/PID/cgroup`: the path of each controller that limits jobs and that is
/// `wanted`; the v2 hierarchy is called `unified`.
pub(crate) fn membership(text: &str, wanted: impl Fn(&str) -> bool) -> CgroupPaths {
    let limits = |name: &str| {
        name == UNIFIED
            || Role::ALL.map(Role::v1_name).contains(&name)
            || Extra::ALL.map(Extra::v1_name).contains(&name)
    };
    let lines = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let named = lines.flat_map(|(controllers, path)| {
        let controllers = if controllers.is_empty() { UNIFIED } else { controllers };
        controllers.split(',').map(move |controller| (controller, path))
    });
    CgroupPaths::of(named.filter(|(name, _)| limits(name) && wanted(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(controllers: &[&str], dir: &str) -> Hierarchy {
        let controllers = controllers.iter().map(|c| (*c).to_owned()).collect();
        Hierarchy { controllers, own_dir: dir.into(), own_path: "/".into() }
    }

    fn plan(layout: &Layout, v2_controllers: &[&str]) -> Result<Plan, CgroupError> {
        let v2_controllers: Vec<String> = v2_controllers.iter().map(ToString::to_string).collect();
        let (v2_controllers, programs) = (&v2_controllers, &|_| Ok(()));
        let v2_enabled = v2_controllers;
        Plan::from_offer(&Offer {
            layout,
            mounted: &[],
            v2_controllers,
            v2_enabled,
            programs,
            attaches_cpus: true,
            kernel: "",
        })
    }

    #[test]
    fn hybrid_limits_by_v1_and_kills_by_v2() {
        let v1 = ["cpu", "cpuacct", "memory", "pids", "freezer", "blkio"];
        let layout =
            Layout { v1: v1.iter().map(|c| hierarchy(&[c], c)).collect(), v2: Some(hierarchy(&[], "unified")) };
        let plan = plan(&layout, &[]).unwrap();
        assert_eq!(plan.version(), "hybrid");
        assert_eq!((plan.with_leaves, plan.hierarchies.len()), (6, 7), "five for the roles, and v2; blkio for tenants");
        assert_eq!(plan.served(Extra::Io), Ok(Served { index: 6, v2: false }));
        assert_eq!(plan.served(Extra::Devices), Ok(Served { index: 5, v2: true }));
        assert!(plan.v2_delegation().is_empty());
        assert!(!plan.is_v2(Role::Freezer));
    }

    #[test]
    fn co_mounted_controllers_share_a_directory() {
        let layout = Layout {
            v1: vec![hierarchy(&["cpu", "cpuacct"], "a"), hierarchy(&["memory", "pids", "freezer"], "b")],
            v2: None,
        };
        let plan = plan(&layout, &[]).unwrap();
        assert_eq!((plan.version(), plan.hierarchies.len()), ("v1", 2));
    }

    #[test]
    fn v2_delegates_what_it_limits() {
        let layout = Layout { v1: vec![], v2: Some(hierarchy(&[], "u")) };
        let plan = plan(&layout, &["cpuset", "cpu", "io", "memory", "pids"]).unwrap();
        assert_eq!((plan.version(), plan.hierarchies.len()), ("v2", 1));
        assert_eq!(plan.v2_delegation(), ["cpu", "memory", "pids"]);
        assert_eq!(plan.v2_extras(), [(Extra::Cpuset, "cpuset"), (Extra::Io, "io")]);
    }

    #[test]
    fn every_missing_controller_is_named_at_once() {
        let layout = Layout { v1: vec![], v2: Some(hierarchy(&[], "u")) };
        let error = plan(&layout, &["cpu"]).unwrap_err();
        assert!(matches!(error, CgroupError::Missing(roles) if roles == [Role::Memory, Role::Pids]));
        let layout = Layout { v1: vec![hierarchy(&["memory"], "m")], v2: None };
        let error = plan(&layout, &[]).unwrap_err();
        assert!(matches!(error, CgroupError::Missing(roles) if roles.len() == 4));
    }

    #[test]
    fn membership_names_the_controllers_that_limit() {
        let text = "9:name=systemd:/\n5:cpu,cpuacct:/h/t/l\n4:memory:/x\n1:perf_event:/\n2:blkio:/h/t\n0::/h/t/l\n";
        let paths = membership(text, |name| name != "cpuacct");
        let expected = [("blkio", "/h/t"), ("cpu", "/h/t/l"), ("memory", "/x"), ("unified", "/h/t/l")];
        assert_eq!(paths.iter().collect::<Vec<_>>(), expected);
    }
}
