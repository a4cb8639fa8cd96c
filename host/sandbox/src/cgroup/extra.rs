//! The controllers that only tenants have settings for: which of them this machine offers, and where.
//!
//! None of them is needed to isolate jobs. Where one is missing, its setting is refused with the reason given here; it
//! is never mounted or delegated by Holm.

use std::fs;

use nix::errno::Errno;

use super::Plan;
use super::hierarchy::{Hierarchy, Layout};
use crate::sys::bpf::{self, Hook};

/// A controller for tenants alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Extra {
    /// CPUs to run on.
    Cpuset,
    /// Rates and weight of block devices.
    Io,
    /// Devices that can be opened.
    Devices,
    /// Huge pages.
    Hugetlb,
    /// The class of packets.
    NetClass,
    /// The priority of packets.
    NetPriority,
}

/// Where a controller is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Served {
    /// The index of the hierarchy in the plan.
    pub(super) index: usize,
    /// By the files of v2, or programs attached there.
    pub(super) v2: bool,
}

/// Why a controller is not to be had, and what would change that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absence {
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub mend: String,
}

impl Extra {
    /// Every one.
    pub const ALL: [Self; 6] =
        [Self::Cpuset, Self::Io, Self::Devices, Self::Hugetlb, Self::NetClass, Self::NetPriority];

    /// The controller's name on v1.
    #[must_use]
    pub const fn v1_name(self) -> &'static str {
        match self {
            Self::Cpuset => "cpuset",
            Self::Io => "blkio",
            Self::Devices => "devices",
            Self::Hugetlb => "hugetlb",
            Self::NetClass => "net_cls",
            Self::NetPriority => "net_prio",
        }
    }

    /// The tenants' settings that need it.
    #[must_use]
    pub const fn settings(self) -> &'static str {
        match self {
            Self::Cpuset => "cpuset",
            Self::Io => "io, io_weight",
            Self::Devices => "devices",
            Self::Hugetlb => "hugetlb",
            Self::NetClass => "net_class",
            Self::NetPriority => "net_priority",
        }
    }

    /// On v2 a controller that has to be delegated, or else a program that is attached.
    const fn on_v2(self) -> Result<&'static str, Hook> {
        match self {
            Self::Cpuset => Ok("cpuset"),
            Self::Io => Ok("io"),
            Self::Hugetlb => Ok("hugetlb"),
            Self::Devices => Err(Hook::Device),
            Self::NetClass | Self::NetPriority => Err(Hook::SocketCreation),
        }
    }
}

/// What the machine has, as far as it decides about these controllers.
pub(super) struct Offer<'a> {
    /// The usable hierarchies.
    pub(super) layout: &'a Layout,
    /// The v1 controllers of hierarchies that are mounted, usable or not.
    pub(super) mounted: &'a [String],
    /// The controllers that the v2 hierarchy could delegate.
    pub(super) v2_controllers: &'a [String],
    /// Those of them that may be delegated for tenants' settings alone.
    pub(super) v2_enabled: &'a [String],
    /// Whether programs of a kind can be loaded, or the kernel's reason.
    pub(super) programs: &'a dyn Fn(Hook) -> Result<(), String>,
    /// Whether this process may attach others to a cpuset.
    pub(super) attaches_cpus: bool,
    /// The text of `/proc/cgroups`.
    pub(super) kernel: &'a str,
}

impl Offer<'_> {
    /// The hierarchy for `extra`, with whether it serves as v2. v1 comes first, as for every controller.
    pub(super) fn find(
        &self,
        extra: Extra,
        shared: impl Fn(&Hierarchy) -> bool,
    ) -> Result<(&Hierarchy, bool), Absence> {
        let name = extra.v1_name();
        let absent = |found: String, mend: String| Err(Absence { found, mend });
        if extra == Extra::Cpuset && !self.attaches_cpus {
            let found = "nothing can be attached to a cpuset without CAP_SYS_NICE".to_owned();
            return absent(found, "start holm with CAP_SYS_NICE".to_owned());
        }
        if let Some(v1) = self.layout.v1_with(name) {
            if shared(v1) {
                let found = format!("`{name}` shares a hierarchy with a controller that every job has a cgroup of");
                return absent(found, format!("mount `{name}` in a hierarchy of its own"));
            }
            return Ok((v1, false));
        }
        if let Some(v2) = &self.layout.v2 {
            match extra.on_v2() {
                Ok(controller) if self.v2_enabled.iter().any(|c| c == controller) => return Ok((v2, true)),
                Err(hook) => match (self.programs)(hook) {
                    Ok(()) => return Ok((v2, true)),
                    Err(why) => {
                        let mend = "use a kernel with CONFIG_CGROUP_BPF, and grant CAP_SYS_ADMIN";
                        return absent(format!("the kernel takes no program for it: {why}"), mend.to_owned());
                    }
                },
                Ok(_) => {}
            }
        }
        if self.mounted.iter().any(|c| c == name) {
            let found = format!("`{name}` is mounted, and this process can make no cgroups in it");
            return absent(found, format!("mount `{name}` writable, with this process's own cgroup in reach"));
        }
        if let (Ok(controller), Some(v2), true) = (extra.on_v2(), &self.layout.v2, self.layout.v1.is_empty()) {
            let found = format!("`{controller}` is not delegated to `{}`", v2.own_dir.display());
            let mend = "use a systemd unit with Delegate=yes, or write it to cgroup.subtree_control of the parent";
            return absent(found, mend.to_owned());
        }
        if kernel_has(self.kernel, name) {
            let found = format!("the kernel has `{name}`, and it is not mounted here");
            let or = match &self.layout.v2 {
                Some(v2)
                    if self.v2_controllers.iter().any(|c| extra.on_v2().is_ok_and(|controller| controller == c)) =>
                {
                    format!(", or echo +{name} > {}/cgroup.subtree_control", v2.own_dir.display())
                }
                _ => String::new(),
            };
            let mend = format!(
                "before holm starts: mkdir /sys/fs/cgroup/{name} && mount -t cgroup -o {name} none /sys/fs/cgroup/{name}{or}"
            );
            return absent(found, mend);
        }
        let mend = "use a kernel built with it, and boot without cgroup_disable= for it";
        absent(format!("the kernel has no `{name}`"), mend.to_owned())
    }
}

/// Whether a line of `/proc/cgroups` (`name hierarchy cgroups enabled`) says that the controller can be mounted.
fn kernel_has(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.first() == Some(&name) && words.get(3) == Some(&"1")
    })
}

/// Whether the kernel takes programs of this kind from this process: the least one is loaded and let go.
pub(super) fn takes_programs(hook: Hook) -> Result<(), String> {
    let let_through = super::program::of_sockets(None, None);
    bpf::load(hook, &let_through).map(drop).map_err(|errno| errno.desc().to_owned())
}

/// Whether this process may attach others to a cpuset (`cap_task_setscheduler`): those that it clones have more
/// capabilities, in a namespace of their own.
pub(super) fn attaches_cpus() -> bool {
    caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_NICE).unwrap_or(false)
}

pub(super) fn kernel_controllers() -> String {
    fs::read_to_string("/proc/cgroups").unwrap_or_default()
}

impl Plan {
    pub(super) fn served(&self, extra: Extra) -> Result<Served, &Absence> {
        self.extras[&extra].as_ref().copied()
    }

    /// Does without a controller that does not work as it should.
    pub(super) fn give_up(&mut self, extra: Extra, errno: Errno) {
        let found = format!("`{}` cannot be set up: {}", extra.v1_name(), errno.desc());
        self.extras.insert(extra, Err(Absence { found, mend: "make it writable below holm's own cgroup".into() }));
    }

    /// Where each of the controllers for tenants alone is served, or why it is not.
    #[must_use]
    pub fn describe_extras(&self) -> Vec<(Extra, Result<String, Absence>)> {
        let describe = |extra: Extra| {
            let served = self.served(extra).map_err(Clone::clone)?;
            let dir = self.hierarchies[served.index].own_dir.display();
            Ok(match (served.v2, extra.on_v2()) {
                (false, _) => format!("in the kernel, mounted, writable: v1 `{}` at `{dir}`", extra.v1_name()),
                (true, Ok(controller)) => format!("in the kernel, mounted, delegated: v2 `{controller}` at `{dir}`"),
                (true, Err(_)) => format!("in the kernel, by eBPF programs on the v2 hierarchy at `{dir}`"),
            })
        };
        Extra::ALL.into_iter().map(|extra| (extra, describe(extra))).collect()
    }

    /// The controllers among these that must be delegated along the v2 hierarchy, down to the tenants' own cgroups.
    pub(super) fn v2_extras(&self) -> Vec<(Extra, &'static str)> {
        let delegated = |extra: &Extra| self.served(*extra).is_ok_and(|served| served.v2);
        let named = |extra: Extra| extra.on_v2().ok().map(|controller| (extra, controller));
        Extra::ALL.into_iter().filter(delegated).filter_map(named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str =
        "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t3\t1\t1\nhugetlb\t0\t1\t1\nnet_cls\t0\t1\t0\n";

    fn hierarchy(controllers: &[&str], dir: &str) -> Hierarchy {
        let controllers = controllers.iter().map(|c| (*c).to_owned()).collect();
        Hierarchy { controllers, own_dir: dir.into(), own_path: "/".into() }
    }

    fn found(
        layout: &Layout,
        mounted: &[&str],
        v2: &[&str],
        programs: bool,
        extra: Extra,
    ) -> Result<(String, bool), String> {
        let (mounted, v2): (Vec<String>, Vec<String>) =
            (mounted.iter().map(ToString::to_string).collect(), v2.iter().map(ToString::to_string).collect());
        let programs = |_| if programs { Ok(()) } else { Err("no".to_owned()) };
        let v2_enabled = &v2;
        let offer = Offer {
            layout,
            mounted: &mounted,
            v2_controllers: &v2,
            v2_enabled,
            programs: &programs,
            attaches_cpus: true,
            kernel: KERNEL,
        };
        let shared = |hierarchy: &Hierarchy| hierarchy.controllers.contains("cpu");
        match offer.find(extra, shared) {
            Ok((hierarchy, v2)) => Ok((hierarchy.own_dir.display().to_string(), v2)),
            Err(absence) => Err(format!("{} / {}", absence.found, absence.mend)),
        }
    }

    #[test]
    fn v1_comes_before_v2_and_what_is_missing_says_why() {
        let hybrid = Layout { v1: vec![hierarchy(&["devices"], "d")], v2: Some(hierarchy(&[], "u")) };
        let on = |extra| found(&hybrid, &["devices", "blkio"], &[], true, extra);
        assert_eq!(on(Extra::Devices), Ok(("d".to_owned(), false)));
        assert_eq!(on(Extra::NetClass), Ok(("u".to_owned(), true)), "by a program");
        assert!(on(Extra::Io).unwrap_err().contains("can make no cgroups in it"));
        assert!(on(Extra::Hugetlb).unwrap_err().contains("mount -t cgroup -o hugetlb"));
        let none = Layout { v1: vec![hierarchy(&["cpu", "cpuset"], "c")], v2: None };
        assert!(found(&none, &["cpu", "cpuset"], &[], true, Extra::Cpuset).unwrap_err().contains("of its own"));
        assert!(found(&none, &[], &[], true, Extra::NetClass).unwrap_err().contains("has no `net_cls`"));
    }

    #[test]
    fn pure_v2_serves_what_is_delegated_and_what_programs_do() {
        let pure = Layout { v1: vec![], v2: Some(hierarchy(&[], "u")) };
        let on = |extra| found(&pure, &[], &["cpuset", "io"], true, extra);
        for extra in [Extra::Cpuset, Extra::Io, Extra::Devices, Extra::NetClass, Extra::NetPriority] {
            assert_eq!(on(extra), Ok(("u".to_owned(), true)), "{extra:?}");
        }
        assert!(on(Extra::Hugetlb).unwrap_err().contains("Delegate=yes"));
        let without = found(&pure, &[], &[], false, Extra::Devices).unwrap_err();
        assert!(without.contains("CONFIG_CGROUP_BPF"), "{without}");
    }
}
