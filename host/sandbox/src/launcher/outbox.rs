//! What the launcher has to say to the server, in order, without ever waiting for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::Source;
use crate::protocol::FromLauncher;
use crate::wire::Packets;

const NO_FDS: &[OwnedFd] = &[];

/// Messages that a server which has stopped reading can leave waiting: a few for each of more sandboxes than the
/// host has pids. A server this far behind is stuck, and is treated as gone.
const MAX_WAITING: usize = 1 << 17;

/// The launcher's end of the server's socket.
pub(super) struct Outbox {
    packets: Packets,
    waiting: VecDeque<FromLauncher>,
    armed: bool,
    broken: bool,
}

impl Outbox {
    /// `packets` must be non-blocking.
    pub(super) fn new(packets: Packets) -> Self {
        Self { packets, waiting: VecDeque::new(), armed: false, broken: false }
    }

    pub(super) fn packets(&self) -> &Packets {
        &self.packets
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.packets.as_fd()
    }

    pub(super) fn send(&mut self, message: FromLauncher) {
        self.waiting.push_back(message);
        self.flush();
    }

    /// Sends as much as the socket takes. False if the server is gone or stuck.
    pub(super) fn flush(&mut self) -> bool {
        while let Some(message) = self.waiting.front() {
            match self.packets.send(message, NO_FDS) {
                Ok(()) => drop(self.waiting.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.broken = true;
                    break;
                }
            }
        }
        !self.broken && self.waiting.len() < MAX_WAITING
    }

    /// Asks for an event when a full socket has room again, only while something waits for that.
    pub(super) fn arm(&mut self, epoll: &Epoll) -> nix::Result<()> {
        let wanted = !self.waiting.is_empty() && !self.broken;
        if wanted == self.armed {
            return Ok(());
        }
        let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
        if wanted {
            flags |= EpollFlags::EPOLLOUT;
        }
        epoll.modify(self.packets.as_fd(), &mut EpollEvent::new(flags, Source::Server.token()))?;
        self.armed = wanted;
        Ok(())
    }
}
