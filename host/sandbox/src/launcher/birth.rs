//! From a specification to a cloned process behind its gate.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::unistd::{Pid, Uid, getuid, seteuid, setfsuid};

use super::expected::{Errand, Expected, Spawned};
use super::live::{Descent, Live, READY_WITHIN, REAP_AGAIN, Stage};
use super::pause::Pause;
use super::{Launcher, MAX_ID, Source, WARM_FOR, verify};
use crate::cgroup::Leaf;
use crate::error::{AtStep, LaunchError, Step};
use crate::gate::{self, LauncherGate, SandboxGate, ToSandbox};
use crate::init::seccomp::Filters;
use crate::init::{self, Birth, Parent, root};
use crate::limits::Limits;
use crate::name::Name;
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
        if spec.check().is_err() || id.0 > MAX_ID || self.live.contains_key(&id) || self.expected.contains_key(&id) {
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
        let mut leaf = match self.leaf_for(&spec.tenant).at(Step::CreateCgroup) {
            Ok(leaf) => leaf,
            Err(error) => {
                self.uids.give_back(&ids);
                return Err(error);
            }
        };
        self.stock_up_for = self.ahead.then(|| spec.clone());
        self.last_launch = Instant::now();
        let begun = match self.prepare(&spec, &mut leaf) {
            Ok((oom, gate, theirs)) if spec.kind.has_zygote() => match self.zygote_for(&spec, &ids, &artifact) {
                Ok(zygote) => {
                    let ends = [theirs.0.into(), channel];
                    self.expect(id, spec, zygote, Errand { leaf, ids, oom, gate, ends, artifact });
                    Ok(())
                }
                Err(error) => Err((error, leaf, ids)),
            },
            Ok(prepared) => match self.clone_into(spec, &leaf, &ids, prepared, channel.into(), artifact) {
                Ok(newborn) => {
                    self.adopt(id, newborn, leaf, ids);
                    Ok(())
                }
                Err(error) => Err((error, leaf, ids)),
            },
            Err(error) => Err((error, leaf, ids)),
        };
        begun.map_err(|(error, leaf, ids)| {
            self.uids.give_back(&ids);
            self.let_go(leaf);
            error
        })
    }

    /// Makes ahead what the next sandbox like `spec` needs, a little at a time. Whether there is more to do.
    pub(super) fn provide(&mut self, spec: &SandboxSpec) -> bool {
        if spec.kind == Kind::Native && self.place.on_host && self.dev.is_none() {
            // without one, the launch makes it
            self.dev = root::make_dev(&[], 0).ok();
        }
        self.tree.stock_up(spec)
    }

    /// The cgroup of a sandbox: one that is there already, if only as that of a dead one.
    fn leaf_for(&mut self, tenant: &Name) -> nix::Result<Leaf> {
        let left = self.leaving.iter().position(|leaf| leaf.tenant() == tenant && leaf.may_be_renewed());
        if self.ahead
            && !self.tree.has_stock(tenant)
            && let Some(index) = left
        {
            let leaf = self.leaving.swap_remove(index);
            self.let_go_now(leaf);
        }
        self.tree.leaf(tenant)
    }

    /// Limits the leaf of a sandbox, and makes both ends of its gate.
    fn prepare(
        &mut self,
        spec: &SandboxSpec,
        leaf: &mut Leaf,
    ) -> Result<(Option<OwnedFd>, LauncherGate, SandboxGate), LaunchError> {
        leaf.limit(spec).at(Step::LimitCgroup)?;
        let oom = leaf.die_whole().at(Step::WatchOom)?;
        let (gate, theirs) = gate::pair().at(Step::MakeGate)?;
        Ok((oom, gate, theirs))
    }

    /// A cgroup below a tenant's for a process of the host's own.
    pub(super) fn own_leaf(&mut self, spec: &SandboxSpec, name: &str) -> nix::Result<Leaf> {
        let mut leaf = self.tree.own_leaf(&spec.tenant, name)?;
        let own = SandboxSpec { limits: OWN_LIMITS, ..spec.clone() };
        match leaf.limit(&own) {
            Ok(()) => Ok(leaf),
            Err(errno) => {
                self.let_go(leaf);
                Err(errno)
            }
        }
    }

    /// Clones into the leaf.
    fn clone_into(
        &mut self,
        spec: SandboxSpec,
        leaf: &Leaf,
        ids: &JobIds,
        (oom, gate, sandbox_gate): (Option<OwnedFd>, LauncherGate, SandboxGate),
        channel: Packets,
        artifact: OwnedFd,
    ) -> Result<Newborn, LaunchError> {
        // elsewhere the child mounts the host's own
        let makes_dev = spec.kind == Kind::Native && self.place.on_host;
        let dev = if makes_dev {
            let (nodes, owner) = (self.tree.nodes(&spec.ceiling), ids.first + JOB_ID);
            let ahead = self.dev.take_if(|_| nodes.is_empty());
            Some(ahead.map_or_else(|| root::make_dev(&nodes, owner), Ok).at(Step::MakeDev)?)
        } else {
            None
        };
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
                let parent = Parent::Launcher { workload: self.workload, artifact, dev };
                init::enter(Birth { spec, filters, gate: sandbox_gate, channel, null, parent }, &self.proof)
            }
            Cloned::Parent { pid, pidfd } => {
                let mapped = back.at(Step::Clone).and_then(|()| map_ids(pid, ids).at(Step::MapIds));
                self.networks.order();
                let network = network.map(|network| network.number);
                Ok(Newborn { spec, pid, pidfd, network, zygote: None, gate, oom, mapped })
            }
        }
    }

    /// Takes in a sandbox that a zygote has cloned.
    pub(super) fn adopt_spawned(&mut self, id: SandboxId, spawned: Spawned) {
        let Spawned { expected, zygote, family, elder, pid, pidfd, used_network, mapped } = spawned;
        let Expected { spec, leaf, ids, oom, gate, killed, .. } = expected;
        let zygote = Some(Descent { zygote, family, namespaces: elder, used_network });
        self.adopt(id, Newborn { spec, pid, pidfd, network: None, zygote, gate, oom, mapped }, leaf, ids);
        if let Some(cause) = killed {
            self.kill(id, cause);
        }
    }

    /// Takes a cloned process into the books, attaches it and opens its gate; one that cannot be readied is killed, and
    /// told of when it is dead.
    fn adopt(&mut self, id: SandboxId, newborn: Newborn, leaf: Leaf, ids: JobIds) {
        let Newborn { spec, pid, pidfd, network, zygote, gate, oom, mapped } = newborn;
        let attach = || match &zygote {
            None => leaf.attach(pid),
            Some(_) => leaf.attach_from_beside(pid),
        };
        let ready = self
            .watch(pidfd.as_fd(), Source::Exit(id))
            .at(Step::OpenGate)
            .and(mapped)
            .and_then(|()| gate.tell(ToSandbox::Enter).at(Step::OpenGate))
            .and_then(|()| attach().at(Step::AttachCgroup))
            .and_then(|()| self.watch(gate.0.as_fd(), Source::Gate(id)).at(Step::OpenGate))
            .and_then(|()| match &oom {
                Some(event) => self.watch(event.as_fd(), Source::Oom(id)).at(Step::WatchOom),
                None => Ok(()),
            })
            .and_then(|()| gate.tell(ToSandbox::Open).at(Step::OpenGate));
        let now = Instant::now();
        let pause = Pause::of_newborn(self.tree.freezes(leaf.tenant()), now);
        self.warm = self.ahead.then_some((now + WARM_FOR, now));
        self.watch_over(now);
        let mut live = Live {
            spec,
            pid,
            pidfd,
            network,
            zygote,
            gate: Some(gate),
            oom,
            leaf,
            ids,
            seen: None,
            stage: Stage::Entering,
            alarm: None,
            pause,
            oom_until: None,
            failure: None,
            killed: None,
            told: None,
        };
        // while it goes on
        let ready = ready.and_then(|()| verify::look_early(&self.place, &live));
        let ready = ready.map(|seen| live.seen = Some(seen));
        self.live.insert(id, live);
        self.set_alarm(id, Some(now + READY_WITHIN));
        if let Err(error) = ready {
            self.read_gate(id); // what it says went wrong came first
            self.fail(id, error);
            // its death may go unannounced, if that is what could not be watched
            self.set_alarm(id, Some(Instant::now() + REAP_AGAIN));
        }
    }
}

/// Clones with the new user namespace in the ownership of `owner`, an id of the job's own. The kernel counts inotify
/// instances, queued signals and more in every user namespace up to the host's, each time for the owner of the one
/// below: were that this process's user, all jobs together would have as much as one user of the host.
pub(super) fn clone_owned(
    proof: &SingleThreaded,
    namespaces: CloneFlags,
    owner: Uid,
    leaf: &Leaf,
) -> nix::Result<Cloned> {
    seteuid(owner)?;
    // files are opened as before, and so are the child's own in `/proc`
    setfsuid(getuid());
    let cloned = clone3(proof, namespaces, leaf.birthplace());
    if !matches!(cloned, Ok(Cloned::Child)) {
        seteuid(getuid())?;
    }
    cloned
}

/// A process that has been cloned and waits behind its gate.
struct Newborn {
    spec: SandboxSpec,
    pid: Pid,
    pidfd: OwnedFd,
    network: Option<u64>,
    zygote: Option<Descent>,
    gate: LauncherGate,
    oom: Option<OwnedFd>,
    mapped: Result<(), LaunchError>,
}

/// What a process of the host's own beside a tenant's sandboxes may use: a zygote, or what keeps its namespaces. Memory: the
/// pages of the largest artifact (256 MiB), which are its file's, and as much again. Processes: it, and those that it
/// has cloned and that have not left its cgroup.
const OWN_LIMITS: Limits = Limits {
    memory_bytes: 512 << 20,
    cpu_millicores: *Limits::CPU_MILLICORES.end(),
    cpu_weight: 100,
    cpu_time: *Limits::TIME.end(),
    wall_time: *Limits::TIME.end(),
    pids: 64,
    scratch_bytes: *Limits::SCRATCH_BYTES.start(),
    scratch_inodes: *Limits::SCRATCH_INODES.start(),
    open_files: *Limits::OPEN_FILES.end(),
    stack_bytes: *Limits::STACK_BYTES.end(),
};

/// Maps inside ids 0 to [`IDS_PER_JOB`] - 1 to the job's own on the host. The pid cannot have been reused: the child
/// has not been reaped.
fn map_ids(pid: Pid, ids: &JobIds) -> std::io::Result<()> {
    write_maps(pid, ids.first, IDS_PER_JOB)
}

/// Maps `count` ids from 0 up to those from `first` up, uids and gids alike.
pub(super) fn write_maps(pid: Pid, first: u32, count: u32) -> std::io::Result<()> {
    let map = format!("0 {first} {count}\n");
    for file in ["uid_map", "gid_map"] {
        fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/{file}"))?.write_all(map.as_bytes())?;
    }
    Ok(())
}
