//! The gate: the handshake between the launcher and the sandbox that it has cloned.
//!
//! ```text
//! launcher                                   sandbox
//!   maps written
//!   Enter ──────────────────────────────────▶ takes its ids, and what else needs no cgroup
//!   cgroups attached
//!   Open ───────────────────────────────────▶ namespaces entered, root built, confined
//!   reads what is there already back
//!                       Ready or Failed ◀────
//!   reads the other layers back
//!   Admit ──────────────────────────────────▶ receives the job from the server
//!   tells the server
//!                                   Started ◀ the next instruction is the tenant's
//!   clocks start
//!                                    Exited ◀ native only: how the main process ended
//! ```
//!
//! No tenant instruction runs in a process that can still write to its gate, so what arrives here is the host's own
//! word; it is decoded with suspicion all the same.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::error::LaunchError;
use crate::usage::Exit;
use crate::wire::{Packets, RecvError};

/// From the sandbox to the launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromSandbox {
    /// Confined and waiting for its job. Sent by the process that will run tenant code.
    Ready,
    /// A step failed; the sandbox is ending.
    Failed(LaunchError),
    /// Tenant code starts now.
    Started,
    /// The init has reaped the main process.
    Exited(Exit),
}

/// From the launcher to the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToSandbox {
    /// The maps are written: take your ids.
    Enter,
    /// The cgroups are attached: go on.
    Open,
    /// Every layer has been read back: take a job. Not the server's to say, however early it sends one.
    Admit,
}

/// The launcher's end.
#[derive(Debug)]
pub(crate) struct LauncherGate(pub(crate) Packets);

/// The sandbox's end.
#[derive(Debug)]
pub(crate) struct SandboxGate(pub(crate) Packets);

const NO_FDS: &[OwnedFd] = &[];

/// Longer than any message of the gate.
pub(crate) const MAX_MESSAGE: usize = 64;

/// Makes both ends. The launcher's is non-blocking and learns the sender's pid with each packet.
pub(crate) fn pair() -> std::io::Result<(LauncherGate, SandboxGate)> {
    let (launcher, sandbox) = Packets::pair()?;
    launcher.set_nonblocking()?;
    launcher.want_credentials()?;
    Ok((LauncherGate(launcher), SandboxGate(sandbox)))
}

impl LauncherGate {
    pub(crate) fn tell(&self, message: ToSandbox) -> std::io::Result<()> {
        self.0.send(&message, NO_FDS)
    }

    /// The next message and the pid that sent it.
    pub(crate) fn recv(&self) -> Result<(FromSandbox, Option<i32>), RecvError> {
        let received = self.0.recv_into(&mut [0; MAX_MESSAGE], |_: &FromSandbox| 0)?;
        Ok((received.value, received.sender))
    }
}

impl SandboxGate {
    /// Blocks until the launcher says `word`.
    pub(crate) fn wait_for(&self, word: ToSandbox) -> nix::Result<()> {
        match self.0.recv_into(&mut [0; MAX_MESSAGE], |_: &ToSandbox| 0) {
            Ok(received) if received.value == word => Ok(()),
            Ok(_) => Err(nix::errno::Errno::EPROTO),
            Err(RecvError::Io(error)) => Err(crate::sys::process::errno_of(&error)),
            Err(_) => Err(nix::errno::Errno::EPIPE),
        }
    }

    pub(crate) fn tell(&self, message: FromSandbox) -> nix::Result<()> {
        self.0.send(&message, NO_FDS).map_err(|error| crate::sys::process::errno_of(&error))
    }
}
