//! What can go wrong between "launch this" and "tenant code runs": a [`Step`] and the kernel's errno.
//!
//! The child sends the two in a few bytes; this module makes words of them. Whatever fails, nothing runs.

use std::fmt;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// The steps of a launch, in the order in which they are taken. Each is fatal when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Step {
    // in the launcher
    /// The specification is checked.
    CheckSpec,
    /// Host uids are taken for the job.
    ClaimUids,
    /// The cgroup of the job's tenant is made and limited.
    TenantCgroup,
    /// The cgroup of the job is made.
    CreateCgroup,
    /// The limits are written into the job's cgroup.
    LimitCgroup,
    /// The launcher asks to be told of an OOM kill in the job's cgroup.
    WatchOom,
    /// `/dev` is made with the standard device nodes.
    MakeDev,
    /// The socket pair of the gate is made.
    MakeGate,
    /// The namespaces of the tenant's family are made, which its zygotes share.
    MakeFamily,
    /// The zygote is cloned and attached to its cgroup.
    MakeZygote,
    /// The zygote clones the sandbox and tells so.
    Spawn,
    /// The process is cloned into its namespaces.
    Clone,
    /// The uid and gid maps are written.
    MapIds,
    /// The process is attached to its cgroup.
    AttachCgroup,
    /// The gate is opened, or the sandbox admitted through it.
    OpenGate,
    // in the zygote
    /// The zygote enters the namespaces of its family, and makes its own.
    EnterFamily,
    /// The zygote moves into a network namespace of its own.
    MakeNetwork,
    // in the child; the zygote takes some of these steps for all of its children
    /// Inherited descriptors are closed.
    CloseFds,
    /// The child waits at its gate, to go on or to be admitted.
    WaitGate,
    /// Session, groups and ids are taken.
    TakeIdentity,
    /// A session keyring of its own is joined.
    JoinKeyring,
    /// The job's OOM score is raised.
    RaiseOomScore,
    /// The number of user namespaces below the job's is set to none.
    ForbidNestedNamespaces,
    /// The cgroup namespace is entered.
    EnterCgroupNamespace,
    /// A time namespace of the job's own is made for its program.
    MakeTimeNamespace,
    /// The host name is set.
    SetHostname,
    /// The root file system is made.
    MakeRoot,
    /// The program is copied into the root.
    CopyProgram,
    /// `/tmp` is mounted.
    MountTmp,
    /// `/dev` is mounted.
    MountDev,
    /// `/proc` is mounted.
    MountProc,
    /// The root is made read-only.
    SealRoot,
    /// The old root is left and detached.
    PivotRoot,
    /// Resource limits are set.
    SetRlimits,
    /// The job's own uid and gid are taken.
    TakeJobIdentity,
    /// All five capability sets and the bounding set are emptied.
    DropCapabilities,
    /// `no_new_privs` is set.
    SetNoNewPrivs,
    /// The process is made non-dumpable.
    SetNonDumpable,
    /// Speculation past stores is switched off for good, where the CPU can and the kernel lets it.
    EndSpeculation,
    /// The Landlock rules are enforced.
    RestrictLandlock,
    /// A file that Landlock must refuse is opened, and must be refused.
    ProveLandlock,
    /// The allow-list filter is installed.
    InstallBaseFilter,
    /// The workload's process is forked beneath the init.
    ForkWorkload,
    /// What the job runs is loaded.
    Prepare,
    /// The last filter is installed.
    InstallLastFilter,
    /// The process asks to die with the launcher.
    BindToLauncher,
    /// The launcher is told that the sandbox is ready.
    ReportReady,
    // in the launcher again
    /// The launcher reads the sandbox's namespaces back from the kernel.
    VerifyNamespaces,
    /// It reads capabilities, no_new_privs and seccomp mode back.
    VerifyPrivilege,
    /// It reads session, ids and the uid map back.
    VerifyIds,
    /// It reads the mounts back.
    VerifyMounts,
    /// It reads cgroup membership back.
    VerifyCgroup,
    /// The sandbox became ready in time.
    BecomeReady,
    // in the child again
    /// The job is received from the server.
    ReceiveJob,
    /// The job's standard descriptors are put in place.
    PlaceStdio,
    /// The child's own code panicked.
    Panic,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CheckSpec => "check the specification",
            Self::ClaimUids => "claim host uids",
            Self::TenantCgroup => "set up the tenant's cgroup",
            Self::CreateCgroup => "create the job's cgroup",
            Self::LimitCgroup => "write the limits of the job's cgroup",
            Self::WatchOom => "watch the job's cgroup for OOM kills",
            Self::MakeDev => "make `/dev`",
            Self::MakeGate => "make the gate",
            Self::MakeFamily => "make the namespaces of the tenant's zygotes",
            Self::MakeZygote => "make the zygote",
            Self::Spawn => "spawn the sandbox from its zygote",
            Self::EnterFamily => "enter the namespaces of the tenant's zygotes",
            Self::MakeNetwork => "make a network namespace for the zygote",
            Self::Clone => "clone into new namespaces",
            Self::MapIds => "write the uid and gid maps",
            Self::AttachCgroup => "attach to the cgroup",
            Self::OpenGate => "open the gate",
            Self::CloseFds => "close inherited descriptors",
            Self::WaitGate => "wait for the gate",
            Self::TakeIdentity => "take session and ids",
            Self::JoinKeyring => "join a new session keyring",
            Self::RaiseOomScore => "raise the OOM score",
            Self::ForbidNestedNamespaces => "forbid nested user namespaces",
            Self::EnterCgroupNamespace => "enter a cgroup namespace",
            Self::MakeTimeNamespace => "make a time namespace",
            Self::SetHostname => "set the host name",
            Self::MakeRoot => "make the root file system",
            Self::CopyProgram => "copy the program into the root",
            Self::MountTmp => "mount `/tmp`",
            Self::MountDev => "mount `/dev`",
            Self::MountProc => "mount `/proc`",
            Self::SealRoot => "make the root read-only",
            Self::PivotRoot => "pivot into the root",
            Self::SetRlimits => "set resource limits",
            Self::TakeJobIdentity => "take the job's ids",
            Self::DropCapabilities => "drop all capabilities",
            Self::SetNoNewPrivs => "set no_new_privs",
            Self::SetNonDumpable => "become non-dumpable",
            Self::EndSpeculation => "end speculative store bypass",
            Self::RestrictLandlock => "enforce Landlock",
            Self::ProveLandlock => "prove that Landlock refuses",
            Self::InstallBaseFilter => "install the seccomp allow-list",
            Self::ForkWorkload => "fork the workload",
            Self::Prepare => "load the artifact",
            Self::InstallLastFilter => "install the last seccomp filter",
            Self::BindToLauncher => "bind the sandbox's life to the launcher's",
            Self::ReportReady => "report ready",
            Self::VerifyNamespaces => "verify the namespaces against the kernel",
            Self::VerifyPrivilege => "verify capabilities, no_new_privs and seccomp against the kernel",
            Self::VerifyIds => "verify the ids against the kernel",
            Self::VerifyMounts => "verify the mounts against the kernel",
            Self::VerifyCgroup => "verify the cgroup against the kernel",
            Self::BecomeReady => "become ready in time",
            Self::ReceiveJob => "receive the job",
            Self::PlaceStdio => "place standard descriptors",
            Self::Panic => "run without panic",
        })
    }
}

/// A launch that was refused: the step that failed and the kernel's reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{step}: {}", Errno::from_raw(*errno).desc())]
pub struct LaunchError {
    /// Where it failed.
    pub step: Step,
    /// Why: the errno of the call that failed.
    pub errno: i32,
}

/// Attaches a [`Step`] to an errno.
pub(crate) trait AtStep<T> {
    fn at(self, step: Step) -> Result<T, LaunchError>;
}

impl<T> AtStep<T> for nix::Result<T> {
    fn at(self, step: Step) -> Result<T, LaunchError> {
        self.map_err(|errno| LaunchError { step, errno: errno as i32 })
    }
}

impl<T> AtStep<T> for std::io::Result<T> {
    fn at(self, step: Step) -> Result<T, LaunchError> {
        self.map_err(|error| crate::sys::process::errno_of(&error)).at(step)
    }
}

/// An error and its causes in one line.
pub(crate) fn in_words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
