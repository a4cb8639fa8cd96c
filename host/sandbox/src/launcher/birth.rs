//! From a specification to a cloned process behind its gate.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::unistd::{Pid, Uid, getuid, seteuid, setfsuid};

use super::live::{Live, READY_WITHIN, REAP_AGAIN, Stage};
use super::pause::Pause;
use super::{Launcher, MAX_ID, Source, WARM_FOR};
use crate::cgroup::Leaf;
use crate::error::{AtStep, LaunchError, Step};
use crate::gate::{self, ToSandbox};
use crate::init::seccomp::Filters;
use crate::init::{self, Birth, root};
use crate::spec::{IDS_PER_JOB, JOB_ID, Kind, SandboxId, SandboxSpec};
use crate::sys::process::{Cloned, SingleThreaded, clone3};
use crate::uids::JobIds;
use crate::wire::Packets;

/// The namespaces of every clone. That of the network may have been made ahead; that of cgroups is entered by the child
/// once it is attached.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC);

impl Launcher<'_> {
    /// Makes a sandbox and lets it begin to confine itself. An error means that nothing was cloned and nothing is
    /// left; whatever goes wrong later is told when the process is dead.
    pub(super) fn launch(
        &mut self,
        id: SandboxId,
        mut spec: SandboxSpec,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LaunchError> {
        if spec.check().is_err() || id.0 > MAX_ID || self.live.contains_key(&id) {
            return Err(Errno::EINVAL).at(Step::CheckSpec);
        }
        let Ok([channel, artifact]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(Errno::EINVAL).at(Step::CheckSpec);
        };
        let ids = self.uids.take(&spec.tenant).at(Step::ClaimUids)?;
        spec.ceiling = self
            .tree
            .tenant(&spec.tenant, &spec.ceiling)
            .map_err(|error| error.errno())
            .at(Step::TenantCgroup)
            .inspect_err(|_| self.uids.give_back(&ids))?;
        let leaf = match self.tree.leaf(&spec.tenant, &format!("sandbox-{}", id.0)).at(Step::CreateCgroup) {
            Ok(leaf) => leaf,
            Err(error) => {
                self.uids.give_back(&ids);
                return Err(error);
            }
        };
        match self.clone_into(id, spec, &leaf, &ids, channel.into(), artifact) {
            Ok(newborn) => {
                self.adopt(id, newborn, leaf, ids);
                Ok(())
            }
            Err(error) => {
                self.uids.give_back(&ids);
                if let Err((leaf, _)) = self.tree.remove(leaf) {
                    self.leaving.push(leaf);
                }
                Err(error)
            }
        }
    }

    /// Limits the leaf and clones into it.
    fn clone_into(
        &mut self,
        id: SandboxId,
        spec: SandboxSpec,
        leaf: &Leaf,
        ids: &JobIds,
        channel: Packets,
        artifact: OwnedFd,
    ) -> Result<Newborn, LaunchError> {
        leaf.limit(&spec).at(Step::LimitCgroup)?;
        let oom = leaf.die_whole().at(Step::WatchOom)?;
        // elsewhere the child mounts the host's own
        let makes_dev = spec.kind == Kind::Native && self.place.on_host;
        let dev = if makes_dev {
            let (nodes, owner) = (self.tree.nodes(&spec.ceiling), ids.first + JOB_ID);
            Some(root::make_dev(&nodes, owner).at(Step::MakeDev)?)
        } else {
            None
        };
        let (gate, sandbox_gate) = gate::pair().at(Step::MakeGate)?;
        let null = self.null.try_clone().at(Step::MakeGate)?;
        let filters = self.filters.entry(spec.kind).or_insert_with(|| Rc::new(Filters::compile(spec.kind))).clone();
        // everything that can fail for want of descriptors is done before there is a process to get rid of
        let owner = Uid::from_raw(ids.first);
        let network = self.networks.take();
        let (cloned, back) = match &network {
            Some(network) => self.networks.clone_in(network, || clone_owned(&self.proof, NAMESPACES, owner, leaf)),
            None => clone_owned(&self.proof, NAMESPACES | CloneFlags::CLONE_NEWNET, owner, leaf).map(|c| (c, Ok(()))),
        }
        .at(Step::Clone)?;
        match cloned {
            Cloned::Child => {
                let birth = Birth { spec, filters, gate: sandbox_gate, channel, artifact, dev, null };
                init::enter(birth, &self.proof, self.workload)
            }
            Cloned::Parent { pid, pidfd } => {
                let ready = back
                    .at(Step::Clone)
                    .and_then(|()| self.watch(pidfd.as_fd(), Source::Exit(id)).at(Step::OpenGate))
                    .and_then(|()| map_ids(pid, ids).at(Step::MapIds))
                    .and_then(|()| leaf.attach(pid).at(Step::AttachCgroup))
                    .and_then(|()| self.watch(gate.0.as_fd(), Source::Gate(id)).at(Step::OpenGate))
                    .and_then(|()| match &oom {
                        Some(event) => self.watch(event.as_fd(), Source::Oom(id)).at(Step::WatchOom),
                        None => Ok(()),
                    })
                    .and_then(|()| gate.tell(ToSandbox::Open).at(Step::OpenGate));
                self.networks.order();
                let now = Instant::now();
                self.warm = self.ahead.then_some((now + WARM_FOR, now));
                let network = network.map(|network| network.number);
                Ok(Newborn { spec, pid, pidfd, network, gate, oom, ready })
            }
        }
    }

    /// Takes a cloned process into the books; one that could not be readied is killed, and told of when it is dead.
    fn adopt(&mut self, id: SandboxId, newborn: Newborn, leaf: Leaf, ids: JobIds) {
        let Newborn { spec, pid, pidfd, network, gate, oom, ready } = newborn;
        let now = Instant::now();
        let pause = Pause::of_newborn(self.tree.freezes(leaf.tenant()), now);
        let live = Live {
            spec,
            pid,
            pidfd,
            network,
            gate: Some(gate),
            oom,
            leaf,
            ids,
            stage: Stage::Entering,
            alarm: None,
            pause,
            oom_until: None,
            failure: None,
            killed: None,
            told: None,
        };
        self.live.insert(id, live);
        self.set_alarm(id, Some(now + READY_WITHIN));
        if let Err(error) = ready {
            self.fail(id, error);
            // its death may go unannounced, if that is what could not be watched
            self.set_alarm(id, Some(Instant::now() + REAP_AGAIN));
        }
    }
}

/// Clones with the new user namespace in the ownership of `owner`, an id of the job's own. The kernel counts inotify
/// instances, queued signals and more in every user namespace up to the host's, each time for the owner of the one
/// below: were that this process's user, all jobs together would have as much as one user of the host.
fn clone_owned(proof: &SingleThreaded, namespaces: CloneFlags, owner: Uid, leaf: &Leaf) -> nix::Result<Cloned> {
    seteuid(owner)?;
    // files are opened as before, and so are the child's own in `/proc`
    setfsuid(getuid());
    let cloned = clone3(proof, namespaces, leaf.birthplace());
    if !matches!(cloned, Ok(Cloned::Child)) {
        seteuid(getuid())?;
    }
    cloned
}

/// A process that has been cloned and waits behind its gate, or should have.
struct Newborn {
    spec: SandboxSpec,
    pid: Pid,
    pidfd: OwnedFd,
    network: Option<u64>,
    gate: gate::LauncherGate,
    oom: Option<OwnedFd>,
    ready: Result<(), LaunchError>,
}

/// Maps inside ids 0 to [`IDS_PER_JOB`] - 1 to the job's own on the host. The pid cannot have been reused: the child
/// has not been reaped.
fn map_ids(pid: Pid, ids: &JobIds) -> std::io::Result<()> {
    let map = format!("0 {} {IDS_PER_JOB}\n", ids.first);
    for file in ["uid_map", "gid_map"] {
        fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/{file}"))?.write_all(map.as_bytes())?;
    }
    Ok(())
}
