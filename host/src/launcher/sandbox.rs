//! One sandbox from the server's side: launch, ready, job, end.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use holm_runtime::invocation::{Invocation, Report};
use holm_sandbox::LaunchError;
use holm_sandbox::protocol::ToLauncher;
use holm_sandbox::spec::{SandboxId, SandboxSpec};
use holm_sandbox::usage::{Isolation, SandboxReport};
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::JobMessage;
use tokio::sync::mpsc;

use super::packets::AsyncPackets;
use super::{Controls, Event, Launcher};

/// A sandbox that has been asked for. Killed when dropped before its end.
#[derive(Debug)]
pub struct Sandbox {
    events: mpsc::Receiver<Event>,
    channel: AsyncPackets,
    killer: KillOnDrop,
}

/// The right to kill a sandbox, for those that watch over a part of it.
#[derive(Clone, Debug)]
pub struct Killer {
    launcher: Launcher,
    id: SandboxId,
}

#[derive(Debug)]
struct KillOnDrop {
    killer: Killer,
    ended: bool,
}

/// A sandbox that could not be had. All are faults of the host, none the tenant's.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A layer could not be applied, so nothing ran.
    #[error("launch refused: {0}")]
    Refused(#[source] LaunchError),
    /// It ended before it was ready, by no step that it could name.
    #[error("the sandbox ended before it was ready: {0:?}")]
    Died(Box<SandboxReport>),
    /// The launcher has ended.
    #[error("the launcher is gone")]
    LauncherGone,
    /// A socket or pipe of the server's own failed.
    #[error("connect to the sandbox")]
    Io(#[from] io::Error),
}

impl Launcher {
    /// Asks for a sandbox around `artifact`.
    ///
    /// # Errors
    /// [`SandboxError::LauncherGone`], or the server has no descriptors left.
    pub fn launch(&self, spec: SandboxSpec, artifact: File) -> Result<Sandbox, SandboxError> {
        let (ours, theirs) = Packets::pair()?;
        let channel = AsyncPackets::register(ours)?;
        let (id, events) = self.register().ok_or(SandboxError::LauncherGone)?;
        let killer = Killer { launcher: self.clone(), id };
        self.send(ToLauncher::Launch { id, spec }, vec![theirs.into(), artifact.into()]);
        Ok(Sandbox { events, channel, killer: KillOnDrop { killer, ended: false } })
    }
}

impl Sandbox {
    /// Waits until it is confined, and gives what the kernel says of its layers.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub async fn ready(&mut self) -> Result<Isolation, SandboxError> {
        match self.events.recv().await {
            Some(Event::Ready(isolation)) => Ok(*isolation),
            Some(Event::Refused(error)) => {
                self.killer.ended = true;
                Err(SandboxError::Refused(error))
            }
            Some(Event::Ended(report)) => {
                self.killer.ended = true;
                Err(SandboxError::Died(Box::new(report)))
            }
            Some(Event::Started) | None => Err(SandboxError::LauncherGone),
        }
    }

    /// Whether it is ready, as far as is known, and has not been given its job.
    #[must_use]
    pub fn is_waiting(&mut self) -> bool {
        // nothing is told between readiness and the job but the end
        matches!(self.events.try_recv(), Err(mpsc::error::TryRecvError::Empty))
    }

    /// Gives it its one job: the invocation, and its standard input, output and error.
    ///
    /// # Errors
    /// The sandbox has died in the meantime.
    #[allow(clippy::needless_pass_by_value)] // closed here: as long as we had them open, nothing would come to an end
    pub fn give(&self, invocation: &Invocation, stdio: [OwnedFd; 3]) -> Result<(), SandboxError> {
        let payload = postcard::to_stdvec(invocation).map_err(io::Error::other)?;
        let message = JobMessage { payload };
        // the channel has never been used before, so there is room
        Ok(self.channel.try_send(&message, &stdio)?)
    }

    /// Follows it to its end. `started` is called when tenant code starts. Gives what the sandbox said of its run, and
    /// what the kernel says: every process of it is dead then.
    ///
    /// What it said is `None` if it said nothing, or nothing that can be understood: it may have been taken over by
    /// what it ran.
    ///
    /// # Errors
    /// [`SandboxError::LauncherGone`], or [`SandboxError::Refused`] if it failed to take its job.
    pub async fn run(&mut self, started: impl FnOnce()) -> Result<(Option<Report>, SandboxReport), SandboxError> {
        let Self { events, channel, killer } = self;
        let report = async { channel.recv().await.ok() };
        let (report, end) = tokio::join!(report, follow(events, started));
        killer.ended = !matches!(end, Err(SandboxError::LauncherGone));
        Ok((report, end?))
    }

    /// Kills it, however far it has come, and waits until every process of it is dead.
    pub async fn end(mut self) {
        self.killer.killer.kill();
        // the last event of every sandbox is its end; there is none if the launcher is gone and takes it along
        while let Some(Event::Ready(_) | Event::Started) = self.events.recv().await {}
        self.killer.ended = true;
    }

    /// A handle that can give it orders.
    #[must_use]
    pub fn controls(&self) -> Controls {
        Controls::new(self.killer.killer.launcher.clone(), self.killer.killer.id)
    }

    /// A handle that can kill it.
    #[must_use]
    pub fn killer(&self) -> Killer {
        self.killer.killer.clone()
    }
}

async fn follow(events: &mut mpsc::Receiver<Event>, started: impl FnOnce()) -> Result<SandboxReport, SandboxError> {
    let mut started = Some(started);
    loop {
        match events.recv().await {
            Some(Event::Started) => {
                if let Some(started) = started.take() {
                    started();
                }
            }
            Some(Event::Ended(report)) => return Ok(report),
            Some(Event::Refused(error)) => return Err(SandboxError::Refused(error)),
            Some(Event::Ready(_)) => {}
            None => return Err(SandboxError::LauncherGone),
        }
    }
}

impl Killer {
    /// Kills every process of the sandbox, soon. Its end is told as always.
    pub fn kill(&self) {
        self.launcher.send(ToLauncher::Kill(self.id), Vec::new());
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if !self.ended {
            self.killer.kill();
        }
    }
}
