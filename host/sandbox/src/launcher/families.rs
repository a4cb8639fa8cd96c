//! Families: the namespaces that a tenant's zygotes have in common.
//!
//! Each is held by a process that does nothing else: the root of a user namespace in which a run of the tenant's uids is
//! mapped, and pid 1 of a pid namespace. A family has one run, so a tenant with more jobs than a run has ids for has
//! more families. It goes with its last zygote and sandbox; should its process die before, they die with it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, Uid};

use super::birth::{clone_owned, write_maps};
use super::live::{is_dead, reap};
use super::{Launcher, Source};
use crate::cgroup::Leaf;
use crate::error::{AtStep, LaunchError, Step};
use crate::init::identity;
use crate::init::proc::Proc;
use crate::init::seccomp;
use crate::spec::SandboxSpec;
use crate::sys::process::{Cloned, SingleThreaded, close_all_except, exit_now, pidfd_send_signal, wait_for_byte};
use crate::uids::RunIds;

/// A family's number. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct FamilyId(pub(super) u64);

/// One family.
pub(super) struct Family {
    pub(super) run: RunIds,
    pid: Pid,
    /// Of the process that keeps its namespaces.
    pub(super) pidfd: OwnedFd,
    pub(super) leaf: Leaf,
    /// As long as it is open, that process goes on.
    _hold: OwnedFd,
    /// Zygotes and sandboxes, which all would die with that process.
    members: usize,
    /// It has been told to end.
    pub(super) ending: bool,
}

impl Launcher<'_> {
    /// The family of this run, which is made if it is not there.
    pub(super) fn family_for(&mut self, spec: &SandboxSpec, run: RunIds) -> Result<FamilyId, LaunchError> {
        let lives = |family: &Family| family.run == run && !family.ending && !is_dead(&family.pidfd);
        if let Some((id, _)) = self.families.iter().find(|(_, family)| lives(family)) {
            return Ok(*id);
        }
        let id = FamilyId(self.next_number());
        let leaf = self.own_leaf(spec, &format!("family-{}", id.0)).at(Step::MakeFamily)?;
        match self.clone_family(id, run, &leaf) {
            Ok((pid, pidfd, hold)) => {
                self.families.insert(id, Family { run, pid, pidfd, leaf, _hold: hold, members: 0, ending: false });
                self.uids.keep(run, true);
                Ok(id)
            }
            Err(error) => {
                self.let_go(leaf);
                Err(error)
            }
        }
    }

    fn clone_family(&mut self, id: FamilyId, run: RunIds, leaf: &Leaf) -> Result<(Pid, OwnedFd, OwnedFd), LaunchError> {
        let (wait, hold) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).at(Step::MakeFamily)?;
        let namespaces = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID;
        match clone_owned(&self.proof, namespaces, Uid::from_raw(run.first), leaf).at(Step::MakeFamily)? {
            Cloned::Child => keep_namespaces(&self.proof, &wait),
            Cloned::Parent { pid, pidfd } => {
                let ready = self
                    .watch(pidfd.as_fd(), Source::FamilyExit(id))
                    .at(Step::MakeFamily)
                    .and_then(|()| write_maps(pid, run.first, run.count).at(Step::MapIds))
                    .and_then(|()| leaf.attach(pid).at(Step::AttachCgroup))
                    // a byte lets it give up what it has by its birth
                    .and_then(|()| nix::unistd::write(&hold, &[0]).at(Step::MakeFamily));
                match ready {
                    Ok(_) => Ok((pid, pidfd, hold)),
                    Err(error) => {
                        // it is a child that has nothing yet
                        let _ = pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL);
                        self.unwatch(pidfd);
                        self.strangers_until = self.strangers_from_now();
                        Err(error)
                    }
                }
            }
        }
    }

    /// Whether this is the pid of a process that keeps a family's namespaces.
    pub(super) fn has_family(&self, pid: Pid) -> bool {
        self.families.values().any(|family| family.pid == pid)
    }

    /// A family has one member more.
    pub(super) fn join_family(&mut self, id: FamilyId) {
        if let Some(family) = self.families.get_mut(&id) {
            family.members += 1;
        }
    }

    /// A member of a family is dead.
    pub(super) fn leave_family(&mut self, id: FamilyId) {
        if let Some(family) = self.families.get_mut(&id) {
            family.members -= 1;
        }
        self.let_family_go(id);
    }

    /// Ends a family that has no member.
    pub(super) fn let_family_go(&mut self, id: FamilyId) {
        if let Some(family) = self.families.get_mut(&id).filter(|family| family.members == 0) {
            family.ending = true;
            let _ = pidfd_send_signal(family.pidfd.as_fd(), Signal::SIGKILL);
            let _ = family.leaf.kill();
        }
    }

    /// The process that kept a family's namespaces is dead, and so is, or will be in a moment, every process below.
    pub(super) fn bury_family(&mut self, id: FamilyId) {
        let Some(family) = self.families.get(&id) else { return };
        if reap(&family.pidfd).is_none() {
            return;
        }
        let Some(family) = self.families.remove(&id) else { return };
        self.unwatch(&family.pidfd);
        let kept = self.families.values().any(|other| other.run == family.run);
        self.uids.keep(family.run, kept);
        self.let_go(family.leaf);
    }
}

/// The life of a family's process.
fn keep_namespaces(proof: &SingleThreaded, wait: &OwnedFd) -> ! {
    let confined = (|| -> nix::Result<()> {
        prctl::set_name(c"holm-family")?;
        let proc = Proc::open()?;
        close_all_except(proof, proc.as_fd(), &[wait.as_raw_fd()])?;
        drop(proc);
        wait_for_byte(wait)?;
        identity::become_namespace_root()?;
        identity::leave_keyring()?;
        identity::empty_bounding_set()?;
        identity::empty_capability_sets()?;
        identity::become_non_dumpable()?;
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        prctl::set_no_new_privs()?;
        seccomp::allow_reading_alone()
    })();
    // from here on it can do nothing but read, and end
    while confined.is_ok() && wait_for_byte(wait) != Err(Errno::EPIPE) {}
    exit_now(0)
}
