//! Doors for the fuzz targets to parsers that are nobody else's business. Only with the feature `fuzzing`.

use crate::gate::{LauncherGate, MAX_MESSAGE, SandboxGate, ToSandbox};
use crate::launcher::verify::Status;
use crate::paths::CgroupPaths;
use crate::spawn::{FromZygote, MAX_LAUNCHER_MESSAGE, MAX_ZYGOTE_MESSAGE, ToZygote};
use crate::wire::{Packets, RecvError};

/// The launcher takes what a sandbox says over its gate; what it understands is said again into `echo`.
///
/// # Errors
/// It understands nothing.
pub fn read_gate(from_sandbox: Packets, echo: Packets) -> Result<(), RecvError> {
    let (message, _) = LauncherGate(from_sandbox).recv()?;
    SandboxGate(echo).tell(message).map_err(|errno| RecvError::Io(errno.into()))
}

/// A sandbox takes what the launcher says.
///
/// # Errors
/// It understands nothing.
pub fn read_opening(from_launcher: &Packets) -> Result<(), RecvError> {
    from_launcher.recv_into(&mut [0; MAX_MESSAGE], |_: &ToSandbox| 0).map(drop)
}

/// The launcher takes what a zygote says.
///
/// # Errors
/// It understands nothing.
pub fn read_zygote(from_zygote: &Packets) -> Result<(), RecvError> {
    from_zygote.recv_into(&mut [0; MAX_ZYGOTE_MESSAGE], FromZygote::fds).map(drop)
}

/// A zygote takes what the launcher says.
///
/// # Errors
/// It understands nothing.
pub fn read_spawn(from_launcher: &Packets) -> Result<(), RecvError> {
    from_launcher.recv_into(&mut [0; MAX_LAUNCHER_MESSAGE], ToZygote::fds).map(drop)
}

/// The cgroups in the text of `/proc/PID/cgroup`.
#[must_use]
pub fn membership(cgroup: &str) -> CgroupPaths {
    crate::cgroup::membership(cgroup, |_| true)
}

/// Whether the text of `/proc/PID/status` is that of a confined process of this uid.
#[must_use]
pub fn confined(status: &str, uid: u32) -> bool {
    let status = Status::parse(status);
    status.confined(1) && status.only_id("Uid", uid)
}
