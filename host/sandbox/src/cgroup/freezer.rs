//! Stopping and resuming what is in a cgroup, by either version of the freezer.
//!
//! Where there is a v2 hierarchy it is the one that freezes, whichever serves the other roles: what it has frozen can
//! still be killed, and it freezes a whole subtree with all that is born into it later. On v1 a frozen task ignores
//! SIGKILL until it is thawed, and nothing can be thawed below a frozen cgroup: so there leaves are frozen, one by one.

use super::dir::Dir;
use super::tree::Level;
use super::{Plan, Role};

/// The freezer's files of one cgroup.
pub(super) struct Freezer<'a> {
    dir: &'a Dir,
    pub(super) v2: bool,
}

impl Plan {
    /// What freezes one of the cgroups of this plan.
    pub(super) fn freezer<'a>(&self, level: &'a Level) -> Freezer<'a> {
        let index = self.v2.unwrap_or(self.roles[&Role::Freezer]);
        Freezer { dir: level.dir(index), v2: self.v2.is_some() }
    }

    /// Where this process's own cgroup is in the hierarchy that freezes, and whether that is one of v2.
    #[must_use]
    pub fn freezer_dir(&self) -> (String, bool) {
        let index = self.v2.unwrap_or(self.roles[&Role::Freezer]);
        (self.hierarchies[index].own_dir.display().to_string(), self.v2.is_some())
    }
}

impl Freezer<'_> {
    /// Orders it; [`Freezer::is_frozen`] tells when nothing runs any more.
    pub(super) fn set(&self, frozen: bool) -> nix::Result<()> {
        set(self.dir, self.v2, frozen)
    }

    /// Whether every task is frozen. On v1 this look is what makes the kernel find out.
    pub(super) fn is_frozen(&self) -> nix::Result<bool> {
        is_frozen(self.dir, self.v2)
    }

    /// The same for every cgroup directly below, but for those whose name is to be spared.
    pub(super) fn set_below(&self, frozen: bool, spare: impl Fn(&str) -> bool) -> nix::Result<()> {
        self.below(spare)?.iter().try_for_each(|dir| set(dir, self.v2, frozen))
    }

    /// Whether all of them are frozen.
    pub(super) fn are_frozen_below(&self, spare: impl Fn(&str) -> bool) -> nix::Result<bool> {
        self.below(spare)?.iter().try_fold(true, |all, dir| Ok(all && is_frozen(dir, self.v2)?))
    }

    fn below(&self, spare: impl Fn(&str) -> bool) -> nix::Result<Vec<Dir>> {
        let names = self.dir.children()?.into_iter().filter(|name| !spare(name));
        // one that is gone by now has nothing to freeze
        Ok(names.filter_map(|name| self.dir.child(&name).ok()).collect())
    }
}

fn set(dir: &Dir, v2: bool, frozen: bool) -> nix::Result<()> {
    match (v2, frozen) {
        (true, true) => dir.write("cgroup.freeze", "1"),
        (true, false) => dir.write("cgroup.freeze", "0"),
        (false, true) => dir.write("freezer.state", "FROZEN"),
        (false, false) => dir.write("freezer.state", "THAWED"),
    }
}

fn is_frozen(dir: &Dir, v2: bool) -> nix::Result<bool> {
    let read = |file| dir.read(file).map_err(|error| crate::sys::process::errno_of(&error));
    if v2 {
        Ok(read("cgroup.events")?.lines().any(|line| line == "frozen 1"))
    } else {
        Ok(read("freezer.state")?.trim_end() == "FROZEN")
    }
}
