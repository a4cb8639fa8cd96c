//! Messages over `SOCK_SEQPACKET`: one postcard value and up to [`MAX_FDS`] descriptors a packet.
//!
//! Both ends treat the other as hostile: a packet that is too long, does not decode, or brings the wrong number of
//! descriptors is an error, and descriptors that nobody took are closed.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixCredentials, recvmsg,
    sendmsg, setsockopt, socketpair, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest packet. Below half of the kernel's default socket buffer (`net.core.wmem_default`, 208 KiB), so that
/// one packet always fits.
pub const MAX_PACKET: usize = 96 * 1024;

/// The most descriptors in a packet: a job's stdin, stdout and stderr.
pub const MAX_FDS: usize = 3;

/// The most that the kernel lets anybody send in one (`unix(7)`).
const SCM_MAX_FD: usize = 253;

/// One end of a `SOCK_SEQPACKET` pair.
#[derive(Debug)]
pub struct Packets(OwnedFd);

/// A packet as it arrived.
#[derive(Debug)]
pub struct Received<T> {
    /// The decoded value.
    pub value: T,
    /// The descriptors that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sender's pid as seen from here, where the socket asks for credentials.
    pub sender: Option<i32>,
}

/// Why no packet could be had.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// The other end is closed.
    #[error("the other end closed the socket")]
    Closed,
    /// Nothing is there (non-blocking sockets only).
    #[error("no packet is waiting")]
    Empty,
    /// Longer than [`MAX_PACKET`], more than [`MAX_FDS`] descriptors, or not the expected type.
    #[error("malformed packet")]
    Malformed,
    /// The system call failed.
    #[error("receive a packet")]
    Io(#[source] io::Error),
}

impl Packets {
    /// A connected pair, close-on-exec, blocking.
    ///
    /// # Errors
    /// `EMFILE` or `ENFILE`.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
    }

    /// Asks the kernel to put the sender's pid on each packet that arrives here from now on.
    pub(crate) fn want_credentials(&self) -> io::Result<()> {
        Ok(setsockopt(&self.0, sockopt::PassCred, &true)?)
    }

    /// Makes this end non-blocking.
    ///
    /// # Errors
    /// Those of `fcntl(2)`.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        nix::fcntl::fcntl(&self.0, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Whether a packet is waiting, or the other end is closed.
    pub(crate) fn has_more(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// As [`send`].
    ///
    /// # Errors
    /// Those of [`send`].
    pub fn send<T: Serialize>(&self, value: &T, fds: &[impl AsFd]) -> io::Result<()> {
        send(self, value, fds)
    }

    /// As [`recv_whole`].
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn recv<T: DeserializeOwned>(&self, expected: impl Fn(&T) -> usize) -> Result<Received<T>, RecvError> {
        recv_whole(self, expected)
    }

    /// As [`recv`].
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn recv_into<T: DeserializeOwned>(
        &self,
        buffer: &mut [u8],
        expected: impl Fn(&T) -> usize,
    ) -> Result<Received<T>, RecvError> {
        recv(self, buffer, expected)
    }
}

/// Sends one packet, all of it or nothing.
///
/// # Errors
/// `WouldBlock` on a full non-blocking socket, `BrokenPipe` when the other end is closed, `InvalidInput` when the
/// encoded value is longer than [`MAX_PACKET`] or there are more than [`MAX_FDS`] descriptors.
pub fn send<T: Serialize>(socket: impl AsFd, value: &T, fds: &[impl AsFd]) -> io::Result<()> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    let bytes = postcard::to_stdvec(value).map_err(|e| invalid(&e.to_string()))?;
    if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
        return Err(invalid("packet too large"));
    }
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let socket = socket.as_fd().as_raw_fd();
    loop {
        match sendmsg::<()>(socket, &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            // SEQPACKET sends whole packets
            Ok(_) => return Ok(()),
        }
    }
}

/// As [`recv`], through a buffer that is as long as the packet: most are short, and a sandbox that had room for the longest
/// one would pay for its pages.
///
/// # Errors
/// See [`RecvError`].
pub fn recv_whole<T: DeserializeOwned>(
    socket: impl AsFd,
    expected: impl Fn(&T) -> usize,
) -> Result<Received<T>, RecvError> {
    let raw = socket.as_fd().as_raw_fd();
    // with MSG_TRUNC the kernel tells the length of the packet, not of what there was room for
    let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
    let length = retried(|| Ok(recvmsg::<()>(raw, &mut [], None, look)?.bytes))?;
    recv(socket, &mut vec![0; length.min(MAX_PACKET)], expected)
}

/// Receives one packet through `buffer`; a longer one is malformed. It must bring exactly the number of descriptors
/// that `expected` names for its value.
///
/// # Errors
/// See [`RecvError`].
pub fn recv<T: DeserializeOwned>(
    socket: impl AsFd,
    buffer: &mut [u8],
    expected: impl Fn(&T) -> usize,
) -> Result<Received<T>, RecvError> {
    // room for all that can come: of what is cut off nobody would hear which descriptors are here already
    let mut control = nix::cmsg_space!([RawFd; SCM_MAX_FD], UnixCredentials);
    let mut iov = [IoSliceMut::new(buffer)];
    let socket = socket.as_fd().as_raw_fd();
    let (len, truncated, fds, sender) = retried(|| {
        let message = recvmsg::<()>(socket, &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        let (fds, sender) = take_control(message.cmsgs()?);
        Ok((message.bytes, truncated, fds, sender))
    })?;
    if len == 0 && fds.is_empty() {
        return Err(RecvError::Closed);
    }
    if truncated {
        return Err(RecvError::Malformed);
    }
    let (value, rest) = postcard::take_from_bytes::<T>(&buffer[..len]).map_err(|_| RecvError::Malformed)?;
    if !rest.is_empty() || fds.len() != expected(&value) {
        return Err(RecvError::Malformed);
    }
    Ok(Received { value, fds, sender })
}

/// Repeats a call until it is not interrupted.
fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> Result<T, RecvError> {
    loop {
        match call() {
            Err(nix::errno::Errno::EINTR) => {}
            // said once, by an end that closed before it had read everything; what it has sent is still to come
            Err(nix::errno::Errno::ECONNRESET) => {}
            Err(nix::errno::Errno::EAGAIN) => return Err(RecvError::Empty),
            Err(errno) => return Err(RecvError::Io(errno.into())),
            Ok(done) => return Ok(done),
        }
    }
}

/// Owns every descriptor that came, so that none leaks whatever the packet turns out to be.
fn take_control(messages: impl Iterator<Item = ControlMessageOwned>) -> (Vec<OwnedFd>, Option<i32>) {
    let mut fds = Vec::new();
    let mut sender = None;
    for message in messages {
        match message {
            ControlMessageOwned::ScmRights(raw) => fds.extend(raw.into_iter().map(crate::sys::received_fd)),
            ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials.pid()),
            _ => {}
        }
    }
    (fds, sender)
}

impl AsFd for Packets {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Packets {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<OwnedFd> for Packets {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Packets> for OwnedFd {
    fn from(packets: Packets) -> Self {
        packets.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_carries_value_and_descriptors() {
        let (a, b) = Packets::pair().unwrap();
        let file = memfd(c"carried");
        a.send(&(7_u32, "seven".to_owned()), &[&file, &file]).unwrap();
        let got = b.recv::<(u32, String)>(|_| 2).unwrap();
        assert_eq!(got.value, (7, "seven".to_owned()));
        assert_eq!(got.fds.len(), 2);
    }

    #[test]
    fn the_wrong_number_of_descriptors_is_malformed_and_leaks_none() {
        let (a, b) = Packets::pair().unwrap();
        let file = memfd(c"leaked");
        a.send(&1_u8, &[&file]).unwrap();
        assert!(matches!(b.recv::<u8>(|_| 0), Err(RecvError::Malformed)));
        drop(file);
        assert_eq!(open_memfds("leaked"), 0);
    }

    #[test]
    fn more_descriptors_than_anybody_has_use_for_are_closed() {
        let (a, b) = Packets::pair().unwrap();
        for count in [MAX_FDS + 1, 12, 13, 64, SCM_MAX_FD] {
            let file = memfd(c"many");
            let raw = vec![file.as_raw_fd(); count];
            let (bytes, rights) = (postcard::to_stdvec(&1_u8).unwrap(), [ControlMessage::ScmRights(&raw)]);
            sendmsg::<()>(a.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::empty(), None).unwrap();
            assert!(matches!(b.recv::<u8>(|_| 0), Err(RecvError::Malformed)), "{count}");
            drop(file);
            assert_eq!(open_memfds("many"), 0, "{count}");
        }
    }

    #[test]
    fn garbage_and_trailing_bytes_are_malformed() {
        let (a, b) = Packets::pair().unwrap();
        a.send(&(1_u8, 2_u8), &[] as &[OwnedFd]).unwrap();
        assert!(matches!(b.recv::<u8>(|_| 0), Err(RecvError::Malformed)));
        a.send(&[0xff_u8; 32], &[] as &[OwnedFd]).unwrap();
        assert!(matches!(b.recv::<String>(|_| 0), Err(RecvError::Malformed)));
    }

    #[test]
    fn a_closed_end_says_so() {
        let (a, b) = Packets::pair().unwrap();
        drop(a);
        assert!(matches!(b.recv::<u8>(|_| 0), Err(RecvError::Closed)));
    }

    #[test]
    fn the_last_words_of_an_end_that_did_not_listen_arrive() {
        let (a, b) = Packets::pair().unwrap();
        b.send(&1_u8, &[] as &[OwnedFd]).unwrap();
        a.send(&2_u8, &[] as &[OwnedFd]).unwrap();
        drop(a);
        assert_eq!(b.recv::<u8>(|_| 0).unwrap().value, 2);
        assert!(matches!(b.recv::<u8>(|_| 0), Err(RecvError::Closed)));
    }

    fn memfd(name: &std::ffi::CStr) -> OwnedFd {
        nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap()
    }

    fn open_memfds(name: &str) -> usize {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target.to_string_lossy().contains(&format!("memfd:{name} ")))
            .count()
    }
}
