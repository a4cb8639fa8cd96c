//! The child's steps, from the clone to the tenant's first instruction, in the order in which they are taken.
//!
//! The child starts as a copy of the launcher, single-threaded, with no privilege outside of its new user namespace.
//! It reports the first step that fails as `(Step, errno)` and ends; only if every step succeeded does it become
//! [`Confined`], and only from there does tenant code run.

pub(crate) mod identity;
pub(crate) mod landlock;
pub(crate) mod reaper;
pub(crate) mod root;
pub(crate) mod seccomp;

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, gethostname, sethostname};

use self::seccomp::Filters;
use crate::error::{AtStep, LaunchError, Step};
use crate::gate::{FromSandbox, SandboxGate, ToSandbox};
use crate::spec::{Kind, SandboxSpec};
use crate::sys::process::{SingleThreaded, close_all_except, exit_now, fork, reset_signals};
use crate::wire::Packets;
use crate::workload::{Job, JobMessage, Started, Workload};

/// The host name in every sandbox.
const HOSTNAME: &str = "holm";

/// The name of the process that is to run tenant code, until it has a job.
const PARKED: &CStr = c"holm-parked";

/// The exit code of a sandbox that never became ready (`EX_OSERR`); nobody but the launcher sees it.
const NOT_READY: i32 = 71;

/// All that a child needs, made by the launcher before the clone.
#[derive(Debug)]
pub(crate) struct Birth {
    pub(crate) spec: SandboxSpec,
    pub(crate) filters: Rc<Filters>,
    pub(crate) gate: SandboxGate,
    /// To the server: the job comes in here, a report may go out.
    pub(crate) channel: Packets,
    /// What the job runs: an ELF file, a compiled module, or bytes to compile.
    pub(crate) artifact: OwnedFd,
    pub(crate) dev: Option<OwnedFd>,
    /// `/dev/null`, to stand on until the job's own descriptors come.
    pub(crate) null: OwnedFd,
}

/// Proof that every layer is on. Made by [`confine`] alone.
struct Confined<'a> {
    gate_slot: &'a mut Option<SandboxGate>,
    channel: Packets,
}

/// Runs a cloned child to its end. Never returns, whatever happens: the code that called `clone3` belongs to the
/// launcher alone.
pub(crate) fn enter(birth: Birth, proof: &SingleThreaded, workload: &dyn Workload) -> ! {
    let Birth { spec, filters, gate, channel, artifact, dev, null } = birth;
    let mut gate = Some(gate);
    let child = Child { spec, filters, channel, artifact, dev, null };
    let outcome = catch_unwind(AssertUnwindSafe(|| run(child, &mut gate, proof, workload)));
    let failure = match outcome {
        Ok(Err(failure)) => failure,
        Err(_) => LaunchError { step: Step::Panic, errno: Errno::ENOTRECOVERABLE as i32 },
    };
    if let Some(gate) = gate {
        // should the launcher be gone, nobody needs to know
        let _ = gate.tell(FromSandbox::Failed(failure));
    }
    exit_now(NOT_READY)
}

/// A [`Birth`] without its gate.
struct Child {
    spec: SandboxSpec,
    filters: Rc<Filters>,
    channel: Packets,
    artifact: OwnedFd,
    dev: Option<OwnedFd>,
    null: OwnedFd,
}

/// Takes every step. `gate_slot` keeps the gate as long as a failure can still be told.
fn run(
    child: Child,
    gate_slot: &mut Option<SandboxGate>,
    proof: &SingleThreaded,
    workload: &dyn Workload,
) -> Result<Infallible, LaunchError> {
    let Child { spec, filters, channel, artifact, dev, null } = child;
    let gate = gate_slot.as_ref().ok_or(Errno::EBADF).at(Step::WaitGate)?;
    let mut keep = vec![gate.0.as_fd(), channel.as_fd(), artifact.as_fd(), null.as_fd()];
    keep.extend(dev.as_ref().map(AsFd::as_fd));
    stand_alone(proof, &keep, &null)?;
    drop(null);
    gate.wait_for(ToSandbox::Open).at(Step::WaitGate)?;

    settle(&spec)?;
    root::enter(&spec, artifact.as_fd(), dev.as_ref())?;
    drop(dev);
    give_up_privilege(&spec, &filters)?;

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
    let task = workload.prepare(&spec, artifact).at(Step::Prepare)?;
    if spec.kind != Kind::Native {
        filters.install_last().at(Step::InstallLastFilter)?;
    }
    gate.tell(FromSandbox::Ready).at(Step::ReportReady)?;
    gate.wait_for(ToSandbox::Admit).at(Step::WaitGate)?;

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

/// Drops everything of the launcher's that a clone inherits: descriptors, standard streams, signal dispositions.
fn stand_alone(proof: &SingleThreaded, keep: &[BorrowedFd<'_>], null: &OwnedFd) -> Result<(), LaunchError> {
    close_all_except(proof, keep).at(Step::CloseFds)?;
    place_stdio([null, null, null]).at(Step::CloseFds)?;
    reset_signals().at(Step::TakeIdentity)
}

/// Takes possession of the new namespaces. Needs the capabilities that a new user namespace starts with.
fn settle(spec: &SandboxSpec) -> Result<(), LaunchError> {
    // before the change of ids, after which the kernel gives this file to the host's root
    write_and_read_back("/proc/self/oom_score_adj", "1000").at(Step::RaiseOomScore)?;
    identity::become_namespace_root().at(Step::TakeIdentity)?;
    identity::leave_keyring().at(Step::JoinKeyring)?;
    write_and_read_back("/proc/sys/user/max_user_namespaces", "0").at(Step::ForbidNestedNamespaces)?;
    // not at the clone: only after the attach is the namespace rooted at the job's own cgroup
    unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::EnterCgroupNamespace)?;
    if spec.kind == Kind::Native {
        separate_clocks().at(Step::MakeTimeNamespace)?;
    }
    sethostname(HOSTNAME).at(Step::SetHostname)?;
    took_effect(gethostname().at(Step::SetHostname)? == HOSTNAME).at(Step::SetHostname)?;
    prctl::set_name(PARKED).at(Step::TakeIdentity)
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
fn give_up_privilege(spec: &SandboxSpec, filters: &Filters) -> Result<(), LaunchError> {
    identity::set_rlimits(spec).at(Step::SetRlimits)?;
    identity::empty_bounding_set().at(Step::DropCapabilities)?;
    identity::become_job_user().at(Step::TakeJobIdentity)?;
    identity::empty_capability_sets().at(Step::DropCapabilities)?;
    prctl::set_no_new_privs().at(Step::SetNoNewPrivs)?;
    identity::become_non_dumpable().at(Step::SetNonDumpable)?;
    identity::end_speculation().at(Step::EndSpeculation)?;
    landlock::restrict(spec.kind).at(Step::RestrictLandlock)?;
    landlock::prove().at(Step::ProveLandlock)?;
    filters.install_base().at(Step::InstallBaseFilter)?;
    // the change of ids has cleared this before; should the launcher be dead by now, telling it of readiness fails
    prctl::set_pdeathsig(Signal::SIGKILL).at(Step::BindToLauncher)?;
    took_effect(prctl::get_pdeathsig() == Ok(Some(Signal::SIGKILL))).at(Step::BindToLauncher)
}

/// For what the launcher cannot see from outside.
fn took_effect(holds: bool) -> nix::Result<()> {
    if holds { Ok(()) } else { Err(Errno::EPROTO) }
}

fn write_and_read_back(file: &str, value: &str) -> std::io::Result<()> {
    fs::write(file, value)?;
    Ok(took_effect(fs::read_to_string(file)?.trim_end() == value)?)
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
