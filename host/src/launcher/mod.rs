//! The server's side of the launcher: messages out, events in, one handle a sandbox.

mod ceilings;
mod orders;
mod packets;
mod parking;
mod sandbox;
mod streams;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holm_sandbox::LaunchError;
use holm_sandbox::ceiling::CeilingError;
use holm_sandbox::protocol::{FromLauncher, ToLauncher};
use holm_sandbox::spec::SandboxId;
use holm_sandbox::usage::{Isolation, SandboxReport};
use holm_sandbox::wire::{MAX_PACKET, Packets, RecvError};
use tokio::sync::{Notify, mpsc, oneshot};

pub use self::ceilings::SetCeilingError;
use self::orders::Asked;
pub use self::orders::{Controls, OrderFailure, Then};
use self::packets::AsyncPackets;
pub use self::parking::{Parked, Parking, ParkingRules};
pub use self::sandbox::{Killer, Sandbox, SandboxError};
pub use self::streams::{Collected, Collector, Content, Flow, Stdio, StreamError};

/// Events that one sandbox can cause: ready, started, ended; or refused.
const EVENTS: usize = 4;

/// A connection to the launcher process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Launcher(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    socket: AsyncPackets,
    /// What there was no room for in the socket. Unbounded, as what goes in is bounded: a launch and a kill or two for each
    /// admitted job, an order for each request.
    outbox: Mutex<VecDeque<Outgoing>>,
    /// There is something in the outbox.
    backlog: Notify,
    sandboxes: Mutex<Sandboxes>,
    next_id: AtomicU64,
    memory_short: Notify,
}

#[derive(Debug, Default)]
struct Sandboxes {
    /// Set once the launcher is gone: nothing can be launched any more.
    gone: bool,
    events: HashMap<SandboxId, mpsc::Sender<Event>>,
    /// Changes of ceilings that have not been answered, by their number. At most one for each tenant.
    ceilings: HashMap<u64, oneshot::Sender<Result<(), CeilingError>>>,
    /// Orders that have not been answered, by their number. At most one of each kind for each job and tenant.
    orders: HashMap<u64, Asked>,
}

type Outgoing = (ToLauncher, Vec<OwnedFd>);

/// What the launcher tells of one sandbox.
#[derive(Clone, Debug)]
enum Event {
    Ready(Box<Isolation>),
    Refused(LaunchError),
    Started,
    Ended(SandboxReport),
}

/// The launcher has ended, or broken the protocol. Every sandbox is dead or dying.
#[derive(Debug, thiserror::Error)]
#[error("the launcher is gone")]
pub struct LauncherGone(#[source] Option<io::Error>);

impl Launcher {
    /// Takes over a configured launcher's socket. The second value must be polled for anything to happen; it ends
    /// when the launcher does.
    ///
    /// # Errors
    /// The socket cannot be registered with the runtime.
    pub fn connect(packets: Packets) -> io::Result<(Self, impl Future<Output = LauncherGone>)> {
        let socket = AsyncPackets::register(packets)?;
        let launcher = Self(Arc::new(Inner {
            socket,
            outbox: Mutex::default(),
            backlog: Notify::new(),
            sandboxes: Mutex::default(),
            next_id: AtomicU64::new(1),
            memory_short: Notify::new(),
        }));
        let driver = drive(Connection(launcher.0.clone()));
        Ok((launcher, driver))
    }

    /// Waits until the host has less memory than should be available.
    pub async fn memory_is_short(&self) {
        self.0.memory_short.notified().await;
    }

    /// Messages go out in the order in which they are given here.
    fn send(&self, message: ToLauncher, fds: Vec<OwnedFd>) {
        let mut outbox = self.0.outbox();
        if outbox.is_empty() && self.0.socket.try_send(&message, &fds).is_ok() {
            return;
        }
        // the driver tries again; if it has ended, every waiting sandbox is told of that
        outbox.push_back((message, fds));
        self.0.backlog.notify_one();
    }

    /// Registers a new sandbox. `None` if the launcher is gone.
    fn register(&self) -> Option<(SandboxId, mpsc::Receiver<Event>)> {
        let id = SandboxId(self.0.next_id.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = mpsc::channel(EVENTS);
        let mut sandboxes = self.0.sandboxes();
        if sandboxes.gone {
            return None;
        }
        sandboxes.events.insert(id, sender);
        Some((id, receiver))
    }
}

impl Inner {
    fn outbox(&self) -> MutexGuard<'_, VecDeque<Outgoing>> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what there is room for of what had none.
    fn send_backlog(&self) -> io::Result<()> {
        let mut outbox = self.outbox();
        while let Some((message, fds)) = outbox.front() {
            self.socket.try_send(message, fds)?;
            outbox.pop_front();
        }
        Ok(())
    }

    fn sandboxes(&self) -> MutexGuard<'_, Sandboxes> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes an event on to whoever waits for it. The last one of a sandbox ends its registration.
    fn dispatch(&self, message: FromLauncher) {
        let (id, event, last) = match message {
            FromLauncher::Ready { id, isolation } => (id, Event::Ready(isolation), false),
            FromLauncher::Started(id) => (id, Event::Started, false),
            FromLauncher::Refused { id, error } => (id, Event::Refused(error), true),
            FromLauncher::Ended { id, report } => (id, Event::Ended(report), true),
            FromLauncher::CeilingSet { request, result } => return self.answer_ceiling(request, result),
            FromLauncher::Answer { request, result } => return self.take_answer(request, result),
            FromLauncher::MemoryShort => return self.memory_short.notify_one(),
            FromLauncher::Up { .. } | FromLauncher::Unable(_) => return,
        };
        let mut sandboxes = self.sandboxes();
        let sender = if last { sandboxes.events.remove(&id) } else { sandboxes.events.get(&id).cloned() };
        if let Some(sender) = sender {
            // full only if the launcher tells the same thing twice; closed if nobody waits any more
            let _ = sender.try_send(event);
        }
    }
}

/// Is there for as long as messages move: the launcher ends with it.
struct Connection(Arc<Inner>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.socket.hang_up();
    }
}

/// Moves messages until the launcher is gone, then tells every sandbox's owner by closing its events.
async fn drive(connection: Connection) -> LauncherGone {
    let inner = &connection.0;
    let gone = tokio::select! {
        gone = receive(inner) => gone,
        gone = transmit(inner) => gone,
    };
    let mut sandboxes = inner.sandboxes();
    sandboxes.gone = true;
    sandboxes.events.clear();
    sandboxes.ceilings.clear();
    sandboxes.orders.clear();
    drop(sandboxes);
    // with the descriptors that were to go along
    inner.outbox().clear();
    gone
}

async fn receive(inner: &Inner) -> LauncherGone {
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        match inner.socket.recv_into::<FromLauncher>(&mut buffer).await {
            Ok(message) => inner.dispatch(message),
            Err(RecvError::Closed) => return LauncherGone(None),
            Err(error) => return LauncherGone(Some(io::Error::other(error))),
        }
    }
}

async fn transmit(inner: &Inner) -> LauncherGone {
    loop {
        inner.backlog.notified().await;
        if let Err(error) = inner.socket.when_there_is_room(|| inner.send_backlog()).await {
            return LauncherGone(Some(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_finds_no_room_goes_out_later_and_in_order() {
        let (ours, theirs) = Packets::pair().unwrap();
        let (launcher, driver) = Launcher::connect(ours).unwrap();
        let driver = tokio::spawn(driver);
        let mut sent = 0;
        while launcher.0.outbox().len() < 100 {
            sent += 1;
            launcher.send(ToLauncher::Kill(SandboxId(sent)), Vec::new());
        }
        let received = tokio::task::spawn_blocking(move || {
            let receive = |_| theirs.recv(ToLauncher::fds).unwrap().value;
            (0..sent).map(receive).collect::<Vec<_>>()
        });
        let expected: Vec<ToLauncher> = (1..=sent).map(|id| ToLauncher::Kill(SandboxId(id))).collect();
        assert!(received.await.unwrap() == expected);
        driver.abort();
    }

    #[tokio::test]
    async fn the_connection_ends_with_its_driver_whoever_holds_a_handle() {
        let (ours, theirs) = Packets::pair().unwrap();
        let (launcher, driver) = Launcher::connect(ours).unwrap();
        drop(driver);
        let ended = tokio::task::spawn_blocking(move || theirs.recv(ToLauncher::fds).map(drop));
        assert!(matches!(ended.await.unwrap(), Err(RecvError::Closed)));
        drop(launcher);
    }
}
