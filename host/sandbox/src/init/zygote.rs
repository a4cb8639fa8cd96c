//! The zygote: a process that has an artifact loaded, and of which sandboxes are cloned.
//!
//! It is in its tenant's cgroup and in the user and pid namespaces of the tenant's family (see `launcher::families`),
//! whose root it is; it has no privilege outside of them, the sandboxes' first filter, and a root that holds nothing. It
//! is not pid 1 of its namespace, so that it can give its children to the launcher, which alone reaps.
//!
//! Nothing of a job ever comes here: not its input, not its arguments, not even its start. What it hands on is what all
//! sandboxes of one artifact begin with, and no descriptor but the artifact's own.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::unistd::{Uid, chdir, fchdir, seteuid};

use super::network::Networks;
use super::proc::Proc;
use super::seccomp::Filters;
use super::{Birth, Inheritance, NOT_READY, OOM_SCORE, Parent, bind_to_launcher, failure_of, identity, root};
use super::{enter, stand_alone, take_hostname};
use crate::error::{AtStep, LaunchError, Step};
use crate::gate::SandboxGate;
use crate::limits::Limits;
use crate::spawn::{FromZygote, MAX_LAUNCHER_MESSAGE, ToZygote};
use crate::spec::{IDS_PER_JOB, SandboxSpec};
use crate::sys::mount::{MountAttr, new_mount};
use crate::sys::process::{
    Cloned, SingleThreaded, clone3, exit_now, keep_capabilities_as_any_user, open_descriptors, reset_signals,
};
use crate::wire::{Packets, RecvError};
use crate::workload::{Task, Workload};

/// The namespaces of every clone but that of the network, which is the zygote's to choose, and of cgroups, which the child
/// enters once it is attached.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_PARENT);

/// All that a zygote needs, made by the launcher before the clone.
pub(crate) struct ZygoteBirth {
    /// Of the sandbox for which it is made. Those that are cloned may differ in their limits, `stack_bytes` excepted.
    pub(crate) spec: SandboxSpec,
    pub(crate) filters: Rc<Filters>,
    /// To the launcher.
    pub(crate) socket: Packets,
    /// The pidfd of the process that keeps the family's namespaces.
    pub(crate) family: OwnedFd,
    pub(crate) artifact: OwnedFd,
    pub(crate) null: OwnedFd,
}

/// The whole life of a zygote, from its clone on. Never returns: the code that cloned it belongs to the launcher.
pub(crate) fn live(birth: ZygoteBirth, proof: &SingleThreaded, workload: &dyn Workload) -> ! {
    let ZygoteBirth { spec, filters, socket, family, artifact, null } = birth;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut zygote = Zygote::settle(spec, filters, &socket, &family, artifact, null, proof, workload)?;
        drop(family);
        zygote.serve(&socket, proof)
    }));
    let failure = failure_of(&outcome);
    // should the launcher be gone, nobody needs to know
    let _ = socket.send(&FromZygote::Failed(failure), NO_FDS);
    exit_now(NOT_READY)
}

const NO_FDS: &[OwnedFd] = &[];

struct Zygote {
    spec: SandboxSpec,
    filters: Rc<Filters>,
    null: OwnedFd,
    proc: Proc,
    /// Taken by the child of a clone alone.
    task: Option<Box<dyn Task>>,
    /// The descriptors that the task has open.
    of_task: Vec<RawFd>,
    networks: Networks,
}

impl Zygote {
    /// Every step from the clone to readiness. What a sandbox would do in the same way, and with the same effect for
    /// itself, is done here once.
    #[allow(clippy::too_many_arguments)] // the fields of a `ZygoteBirth`
    fn settle(
        spec: SandboxSpec,
        filters: Rc<Filters>,
        socket: &Packets,
        family: &OwnedFd,
        artifact: OwnedFd,
        null: OwnedFd,
        proof: &SingleThreaded,
        workload: &dyn Workload,
    ) -> Result<Self, LaunchError> {
        prctl::set_name(c"holm-zygote").at(Step::TakeIdentity)?;
        let hosts_proc = Proc::open().at(Step::CloseFds)?;
        let keep = [socket.as_raw_fd(), family.as_raw_fd(), artifact.as_raw_fd(), null.as_raw_fd()];
        stand_alone(proof, &hosts_proc, &keep, &null)?;
        reset_signals().at(Step::TakeIdentity)?;
        match socket.recv_into(&mut [0; MAX_LAUNCHER_MESSAGE], ToZygote::fds) {
            Ok(received) if received.value == ToZygote::Begin => {}
            _ => return Err(Errno::EPROTO).at(Step::WaitGate),
        }

        hosts_proc.set("self/oom_score_adj", OOM_SCORE).at(Step::RaiseOomScore)?;
        setns(family, CloneFlags::CLONE_NEWUSER).at(Step::EnterFamily)?;
        identity::become_namespace_root().at(Step::TakeIdentity)?;
        keep_capabilities_as_any_user().at(Step::TakeIdentity)?;
        identity::leave_keyring().at(Step::JoinKeyring)?;
        let fresh = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
        unshare(fresh).at(Step::EnterFamily)?;
        take_hostname()?;
        // not attached anywhere, so that sandboxes need not get rid of it; the kernel lets us make it because the
        // launcher's can still be seen
        let attr = MountAttr::NOSUID | MountAttr::NODEV | MountAttr::NOEXEC;
        let proc = Proc::at(new_mount(c"proc", &[], attr).at(Step::MountProc)?);
        drop(hosts_proc);
        root::enter_template(spec.kind)?;
        identity::keep_what_cloning_takes().at(Step::DropCapabilities)?;
        prctl::set_no_new_privs().at(Step::SetNoNewPrivs)?;
        filters.install_base().at(Step::InstallBaseFilter)?;
        bind_to_launcher()?;

        let networks = Networks::start(&proc).at(Step::MakeNetwork)?;
        let before = open_descriptors(proc.as_fd()).at(Step::Prepare)?;
        fchdir(&proc).at(Step::Prepare)?;
        let task = workload.prepare(&spec, artifact).at(Step::Prepare)?;
        chdir("/").at(Step::Prepare)?;
        let artifact = keep[2];
        let mut of_task = open_descriptors(proc.as_fd()).at(Step::Prepare)?;
        of_task.retain(|fd| *fd == artifact || !before.contains(fd));
        Ok(Self { spec, filters, null, proc, task: Some(task), of_task, networks })
    }

    /// Clones sandboxes for as long as the launcher wants.
    fn serve(&mut self, socket: &Packets, proof: &SingleThreaded) -> Result<Infallible, LaunchError> {
        let tell = |message, fds: &[OwnedFd]| {
            socket.send(&message, fds).map_err(|error| crate::sys::process::errno_of(&error)).at(Step::ReportReady)
        };
        tell(FromZygote::Loaded, NO_FDS)?;
        let mut buffer = [0; MAX_LAUNCHER_MESSAGE];
        loop {
            let received = match socket.recv_into(&mut buffer, ToZygote::fds) {
                Ok(received) => received,
                // the launcher wants no more of us
                Err(RecvError::Closed) => exit_now(0),
                Err(_) => return Err(Errno::EPROTO).at(Step::WaitGate),
            };
            match received.value {
                ToZygote::Begin => return Err(Errno::EPROTO).at(Step::WaitGate),
                ToZygote::Buried(id) => self.networks.give_back(id),
                ToZygote::Spawn { id, limits, first_id, fresh_network } => {
                    let Ok([gate, channel]) = <[OwnedFd; 2]>::try_from(received.fds) else {
                        return Err(Errno::EPROTO).at(Step::WaitGate);
                    };
                    let (gate, channel) = (SandboxGate(gate.into()), channel.into());
                    let network = self.networks.choose(id, fresh_network);
                    let used_network = network.is_used();
                    match self.spawn(&limits, first_id, network.flags(), gate, channel, proof) {
                        Ok((pidfd, mapped)) => tell(FromZygote::Spawned { id, used_network, mapped }, &[pidfd])?,
                        Err(error) => {
                            self.networks.give_back(id);
                            tell(FromZygote::Refused { id, error }, NO_FDS)?;
                        }
                    }
                    self.networks.leave();
                }
            }
            // while nobody waits
            if !socket.has_more() {
                self.networks.provide(&self.proc);
            }
        }
    }

    /// Clones one sandbox and maps its ids. Gives its pidfd, and whether the maps could be written.
    fn spawn(
        &mut self,
        limits: &Limits,
        first_id: u32,
        network: CloneFlags,
        gate: SandboxGate,
        channel: Packets,
        proof: &SingleThreaded,
    ) -> Result<(OwnedFd, Result<(), LaunchError>), LaunchError> {
        let null = self.null.try_clone().at(Step::Clone)?;
        // in the ownership of an id of the job's own: see `launcher::birth::clone_owned`
        seteuid(Uid::from_raw(first_id)).at(Step::Clone)?;
        // the change has made this process, and would make the child, one whose maps only the host's root may write
        prctl::set_dumpable(true).at(Step::Clone)?;
        let cloned = clone3(proof, NAMESPACES | network, None);
        match cloned {
            Ok(Cloned::Child) => {
                let Some(task) = self.task.take() else { exit_now(NOT_READY) };
                let Ok(proc) = self.proc.try_clone() else { exit_now(NOT_READY) };
                let spec = SandboxSpec { limits: *limits, ..self.spec.clone() };
                let parent = Parent::Zygote(Inheritance { task, of_task: std::mem::take(&mut self.of_task), proc });
                enter(Birth { spec, filters: self.filters.clone(), gate, channel, null, parent }, proof)
            }
            Ok(Cloned::Parent { pid, pidfd }) => {
                let map = format!("0 {first_id} {IDS_PER_JOB}\n");
                let write = |file| self.proc.write(&format!("{pid}/{file}"), &map);
                let back = seteuid(Uid::from_raw(0)).map_err(Into::into);
                Ok((pidfd, back.and_then(|()| write("uid_map")).and_then(|()| write("gid_map")).at(Step::MapIds)))
            }
            Err(errno) => {
                seteuid(Uid::from_raw(0)).at(Step::Clone)?;
                Err(errno).at(Step::Clone)
            }
        }
    }
}

/// A sandbox's network namespace, as the zygote has chosen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// The one that this process is in, new.
    New,
    /// The one that this process is in, which has served others and is empty.
    Used,
    /// One that the clone makes.
    OfTheClone,
}

impl Choice {
    fn flags(self) -> CloneFlags {
        if self == Self::OfTheClone { CloneFlags::CLONE_NEWNET } else { CloneFlags::empty() }
    }

    fn is_used(self) -> bool {
        self == Self::Used
    }
}
