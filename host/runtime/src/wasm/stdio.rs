//! The guest's standard streams: plain blocking reads and writes on descriptors 0, 1 and 2.
//!
//! The process has nothing else to do while the guest waits, so blocking is right. A read fills the whole buffer or
//! meets the end: how the bytes happened to arrive must not show in the number of calls a guest makes, or the same
//! job would use different fuel from run to run.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::cli::{IsTerminal, OutputFile, StdinStream};
use wasmtime_wasi::p2::{InputStream, Pollable, StreamError, StreamResult};

use crate::invocation::Interface;

/// The most that one read gives, and so the size of the buffer made for it.
const MAX_READ: usize = 64 * 1024;

/// Gives this process's standard streams to the guest. One that is called with HTTP requests has no input of its own,
/// and prints on standard error only: the other two carry the request and the response.
pub(super) fn connect(builder: &mut WasiCtxBuilder, interface: Interface) -> io::Result<()> {
    let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    builder.stderr(OutputFile::new(copy(io::stderr().as_fd())?));
    match interface {
        Interface::Command => builder
            .stdin(Stdin(Arc::new(copy(io::stdin().as_fd())?)))
            .stdout(OutputFile::new(copy(io::stdout().as_fd())?)),
        Interface::Http => builder.stdout(OutputFile::new(copy(io::stderr().as_fd())?)),
    };
    Ok(())
}

/// Standard input. All handles that the guest has of it read from the same place.
#[derive(Clone)]
struct Stdin(Arc<File>);

impl Stdin {
    /// Reads until `buffer` is full or the input ends.
    fn fill(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match (&*self.0).read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

impl StdinStream for Stdin {
    fn p2_stream(&self) -> Box<dyn InputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        Box::new(self.clone())
    }
}

impl IsTerminal for Stdin {
    fn is_terminal(&self) -> bool {
        false
    }
}

#[async_trait::async_trait]
impl Pollable for Stdin {
    async fn ready(&mut self) {}
}

impl InputStream for Stdin {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        let mut buffer = BytesMut::zeroed(size.min(MAX_READ));
        let filled = self.fill(&mut buffer).map_err(|error| StreamError::LastOperationFailed(error.into()))?;
        if filled == 0 && size > 0 {
            return Err(StreamError::Closed);
        }
        buffer.truncate(filled);
        Ok(buffer.freeze())
    }
}

impl AsyncRead for Stdin {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let filled = self.fill(buf.initialize_unfilled())?;
        buf.advance(filled);
        Poll::Ready(Ok(()))
    }
}
