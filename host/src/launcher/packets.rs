//! [`Packets`] with async waiting.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdSocket;

use holm_sandbox::wire::{self, Packets, Received, RecvError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// One end of a packet socket, registered with the runtime.
///
/// The runtime has no type for `SOCK_SEQPACKET`; its datagram socket is used for nothing but to own the descriptor and
/// wait for readiness, which does not depend on the socket's type.
#[derive(Debug)]
pub(super) struct AsyncPackets(UnixDatagram);

impl AsyncPackets {
    pub(super) fn register(packets: Packets) -> io::Result<Self> {
        packets.set_nonblocking()?;
        Ok(Self(UnixDatagram::from_std(StdSocket::from(OwnedFd::from(packets)))?))
    }

    /// Sends one packet. `WouldBlock` if there is no room for it now.
    ///
    /// It does not ask the runtime before, which hears of a new socket's room only when it next looks at all of them.
    pub(super) fn try_send<T: Serialize>(&self, value: &T, fds: &[impl AsFd]) -> io::Result<()> {
        wire::send(&self.0, value, fds)
    }

    /// Ends the connection, whoever else holds this end.
    pub(super) fn hang_up(&self) {
        // an error says that it has ended already
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Calls `send` whenever there may be room, until it does not give `WouldBlock`.
    pub(super) async fn when_there_is_room(&self, send: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, send).await
    }

    /// Receives one packet without descriptors, through `buffer`.
    pub(super) async fn recv_into<T: DeserializeOwned>(&self, buffer: &mut [u8]) -> Result<T, RecvError> {
        self.when_there(|| wire::recv(&self.0, buffer, |_| 0)).await
    }

    /// Receives one packet without descriptors.
    pub(super) async fn recv<T: DeserializeOwned>(&self) -> Result<T, RecvError> {
        self.when_there(|| wire::recv_whole(&self.0, |_| 0)).await
    }

    async fn when_there<T>(&self, mut recv: impl FnMut() -> Result<Received<T>, RecvError>) -> Result<T, RecvError> {
        let received = self.0.async_io(Interest::READABLE, || match recv() {
            Err(RecvError::Empty) => Err(io::ErrorKind::WouldBlock.into()),
            other => Ok(other),
        });
        received.await.map_err(RecvError::Io)?.map(|received| received.value)
    }
}
