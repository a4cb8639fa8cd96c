//! The child's steps, from the clone to the tenant's first instruction, in the order in which they are taken.
//!
//! The child starts as a copy of the launcher or of a [`zygote`], single-threaded, with no privilege outside of its new
//! user namespace. It reports the first step that fails as `(Step, errno)` and ends; only if every step succeeded does it become
//! [`Confined`], and only from there is a job taken. While there is none, start functions of a guest may have run
//! ([`Task::rehearse`]), behind the same layers.

pub(crate) mod identity;
pub(crate) mod landlock;
mod network;
pub(crate) mod proc;
pub(crate) mod reaper;
pub(crate) mod root;
pub(crate) mod seccomp;
pub(crate) mod zygote;

use std::convert::Infallible;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, gethostname, sethostname};

use self::proc::Proc;
use self::seccomp::Filters;
use crate::error::{AtStep, LaunchError, Step};
use crate::gate::{FromSandbox, SandboxGate, ToSandbox};
use crate::spec::{Kind, SandboxSpec};
use crate::sys::arena;
use crate::sys::process::{SingleThreaded, close_all_except, exit_now, fork, reset_signals};
use crate::wire::Packets;
use crate::workload::{Job, JobMessage, Started, Task, Workload};

/// The host name in every sandbox.
const HOSTNAME: &str = "holm";

/// The name of the process that is to run tenant code, until it has a job.
const PARKED: &CStr = c"holm-parked";

/// The exit code of a sandbox that never became ready (`EX_OSERR`); nobody but the launcher sees it.
const NOT_READY: i32 = 71;

/// All that a child needs, made before the clone.
pub(crate) struct Birth<'w> {
    pub(crate) spec: SandboxSpec,
    pub(crate) filters: Rc<Filters>,
    pub(crate) gate: SandboxGate,
    /// To the server: the job comes in here, a report may go out.
    pub(crate) channel: Packets,
    /// `/dev/null`, to stand on until the job's own descriptors come.
    pub(crate) null: OwnedFd,
    pub(crate) parent: Parent<'w>,
}

/// Whom a child is cloned from, and what it has from there.
pub(crate) enum Parent<'w> {
    Launcher {
        workload: &'w dyn Workload,
        /// What the job runs: an ELF file, a compiled module, or bytes to compile.
        artifact: OwnedFd,
        dev: Option<OwnedFd>,
    },
    Zygote(Inheritance),
}

/// What a zygote has done already, once for all that are cloned from it: it has the root that theirs is a copy of, their
/// host name, OOM score and signal dispositions, the first filter, and the artifact loaded.
pub(crate) struct Inheritance {
    pub(crate) task: Box<dyn Task>,
    /// The descriptors that the task has open.
    pub(crate) of_task: Vec<RawFd>,
    pub(crate) proc: Proc,
}

/// Proof that every layer is on. Made by [`run`] alone.
struct Confined<'a> {
    gate_slot: &'a mut Option<SandboxGate>,
    channel: Packets,
}

/// Runs a cloned child to its end. Never returns, whatever happens: the code that called `clone3` belongs to its parent
/// alone.
pub(crate) fn enter(birth: Birth<'_>, proof: &SingleThreaded) -> ! {
    let Birth { spec, filters, gate, channel, null, parent } = birth;
    let mut gate = Some(gate);
    let child = Child { spec, filters, channel, null };
    let outcome = catch_unwind(AssertUnwindSafe(|| run(child, parent, &mut gate, proof)));
    let failure = failure_of(&outcome);
    if let Some(gate) = gate {
        // should the launcher be gone, nobody needs to know
        let _ = gate.tell(FromSandbox::Failed(failure));
    }
    exit_now(NOT_READY)
}

/// What went wrong in a process that was to go on for ever.
fn failure_of(outcome: &std::thread::Result<Result<Infallible, LaunchError>>) -> LaunchError {
    match outcome {
        Ok(Err(failure)) => *failure,
        Ok(Ok(never)) => match *never {},
        Err(_) => LaunchError { step: Step::Panic, errno: Errno::ENOTRECOVERABLE as i32 },
    }
}

/// A [`Birth`] without its gate and its parent.
struct Child {
    spec: SandboxSpec,
    filters: Rc<Filters>,
    channel: Packets,
    null: OwnedFd,
}

/// Takes every step. `gate_slot` keeps the gate as long as a failure can still be told.
fn run(
    child: Child,
    parent: Parent<'_>,
    gate_slot: &mut Option<SandboxGate>,
    proof: &SingleThreaded,
) -> Result<Infallible, LaunchError> {
    prctl::set_name(PARKED).at(Step::TakeIdentity)?;
    let Child { spec, filters, channel, null } = child;
    let gate = gate_slot.as_ref().ok_or(Errno::EBADF).at(Step::WaitGate)?;
    let mut keep = vec![gate.0.as_raw_fd(), channel.as_raw_fd(), null.as_raw_fd()];
    let mut task = match parent {
        Parent::Launcher { workload, artifact, dev } => {
            let proc = Proc::open().at(Step::CloseFds)?;
            keep.push(artifact.as_raw_fd());
            keep.extend(dev.as_ref().map(AsRawFd::as_raw_fd));
            stand_alone(proof, &proc, &keep, &null)?;
            reset_signals().at(Step::TakeIdentity)?;
            drop(null);
            // before the change of ids, after which the kernel gives this file to the host's root
            proc.set("self/oom_score_adj", OOM_SCORE).at(Step::RaiseOomScore)?;
            gate.wait_for(ToSandbox::Enter).at(Step::WaitGate)?;
            settle(&spec, &proc)?;
            take_hostname()?;
            gate.wait_for(ToSandbox::Open).at(Step::WaitGate)?;

            enter_own_cgroup()?;
            root::enter(&spec, artifact.as_fd(), dev.as_ref())?;
            drop((dev, proc));
            give_up_privilege(&spec)?;
            filters.install_base().at(Step::InstallBaseFilter)?;
            bind_to_launcher()?;
            if spec.kind == Kind::Native {
                // an exec is all that is left to do, so the last filter need not wait, and both processes have it
                filters.install_last().at(Step::InstallLastFilter)?;
                // from here on two processes: this one is the init, the other one runs the program
                if let Some(main) = fork(proof).at(Step::ForkWorkload)? {
                    drop((channel, artifact));
                    prctl::set_name(c"holm-init").at(Step::ForkWorkload)?;
                    reaper::reap_until(main, gate);
                }
            }
            let mut task = workload.prepare(&spec, artifact).at(Step::Prepare)?;
            task.settle(&spec).at(Step::Prepare)?;
            task
        }
        Parent::Zygote(Inheritance { mut task, of_task, proc }) => {
            // without one, memory comes from where the zygote has its own
            let _ = arena::open(proof);
            keep.extend(of_task);
            stand_alone(proof, &proc, &keep, &null)?;
            drop(null);
            gate.wait_for(ToSandbox::Enter).at(Step::WaitGate)?;
            settle(&spec, &proc)?;
            drop(proc);
            root::complete_copy(&spec)?;
            gate.wait_for(ToSandbox::Open).at(Step::WaitGate)?;

            let _ = arena::populate();
            enter_own_cgroup()?;
            give_up_privilege(&spec)?;
            bind_to_launcher()?;
            task.settle(&spec).at(Step::Prepare)?;
            task
        }
    };
    if spec.kind != Kind::Native {
        filters.install_last().at(Step::InstallLastFilter)?;
    }
    gate.tell(FromSandbox::Ready).at(Step::ReportReady)?;
    gate.wait_for(ToSandbox::Admit).at(Step::WaitGate)?;
    if !channel.has_more() {
        // parked: nobody waits
        task.rehearse();
    }

    let job = receive_job(Confined { gate_slot, channel })?;
    let name = match spec.kind {
        Kind::Native => c"holm-native",
        Kind::Wasm => c"holm-wasm",
        Kind::Compile => c"holm-compile",
    };
    // nothing depends on it
    let _ = prctl::set_name(name);
    exit_now(task.run(job))
}

/// The first to go when memory is short.
const OOM_SCORE: &str = "1000";

/// Drops what a clone inherits of its parent's: descriptors, standard streams.
fn stand_alone(proof: &SingleThreaded, proc: &Proc, keep: &[RawFd], null: &OwnedFd) -> Result<(), LaunchError> {
    close_all_except(proof, proc.as_fd(), keep).at(Step::CloseFds)?;
    place_stdio([null, null, null]).at(Step::CloseFds)
}

/// Takes possession of the new namespaces, as far as that needs no cgroup: what is used of CPU and memory here is not
/// the job's yet. Needs the capabilities that a new user namespace starts with.
fn settle(spec: &SandboxSpec, proc: &Proc) -> Result<(), LaunchError> {
    identity::become_namespace_root().at(Step::TakeIdentity)?;
    identity::leave_keyring().at(Step::JoinKeyring)?;
    proc.set("sys/user/max_user_namespaces", "0").at(Step::ForbidNestedNamespaces)?;
    if spec.kind == Kind::Native {
        separate_clocks().at(Step::MakeTimeNamespace)?;
    }
    identity::set_rlimits(spec).at(Step::SetRlimits)?;
    identity::empty_bounding_set().at(Step::DropCapabilities)
}

/// Not at the clone: only after the attach is the namespace rooted at the job's own cgroup.
fn enter_own_cgroup() -> Result<(), LaunchError> {
    unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::EnterCgroupNamespace)
}

fn take_hostname() -> Result<(), LaunchError> {
    sethostname(HOSTNAME).at(Step::SetHostname)?;
    took_effect(gethostname().at(Step::SetHostname)? == HOSTNAME).at(Step::SetHostname)
}

/// Gives the program that is forked later a time namespace of its own. Its clocks are the host's as before; but
/// `/proc/self/ns/time` would be a file that all jobs share, and one could lock it against another. A kernel without
/// time namespaces has no such file.
fn separate_clocks() -> nix::Result<()> {
    match unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)) {
        Err(Errno::EINVAL) => Ok(()),
        other => other,
    }
}

/// From root of a namespace to nobody: the order is that of the needs, each step gives up what the next one lacks.
fn give_up_privilege(spec: &SandboxSpec) -> Result<(), LaunchError> {
    identity::become_job_user().at(Step::TakeJobIdentity)?;
    identity::empty_capability_sets().at(Step::DropCapabilities)?;
    prctl::set_no_new_privs().at(Step::SetNoNewPrivs)?;
    identity::become_non_dumpable().at(Step::SetNonDumpable)?;
    identity::end_speculation().at(Step::EndSpeculation)?;
    landlock::restrict(spec.kind).at(Step::RestrictLandlock)?;
    landlock::prove().at(Step::ProveLandlock)
}

/// The changes of ids have cleared this; should the launcher be dead by now, telling it of readiness fails.
fn bind_to_launcher() -> Result<(), LaunchError> {
    prctl::set_pdeathsig(Signal::SIGKILL).at(Step::BindToLauncher)?;
    took_effect(prctl::get_pdeathsig() == Ok(Some(Signal::SIGKILL))).at(Step::BindToLauncher)
}

/// For what the launcher cannot see from outside.
fn took_effect(holds: bool) -> nix::Result<()> {
    if holds { Ok(()) } else { Err(Errno::EPROTO) }
}

/// Waits for the server to send the job, and puts its streams in place. The only way on from [`Confined`].
fn receive_job(confined: Confined<'_>) -> Result<Job, LaunchError> {
    let Confined { gate_slot, channel } = confined;
    let received = channel.recv(|_: &JobMessage| 3).map_err(|_| Errno::EPROTO).at(Step::ReceiveJob)?;
    let [stdin, stdout, stderr] = &received.fds[..] else {
        return Err(Errno::EPROTO).at(Step::ReceiveJob);
    };
    place_stdio([stdin, stdout, stderr]).at(Step::PlaceStdio)?;
    let gate = gate_slot.take().ok_or(Errno::EBADF).at(Step::ReceiveJob)?;
    Ok(Job { payload: received.value.payload, channel, started: Started(gate) })
}

fn place_stdio([stdin, stdout, stderr]: [&OwnedFd; 3]) -> nix::Result<()> {
    dup2_stdin(stdin)?;
    dup2_stdout(stdout)?;
    dup2_stderr(stderr)
}
