//! The connection to an HTTP guest: its standard streams, and the count of what goes over them.

use std::convert::Infallible;
use std::sync::Arc;

use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::entry::Entry;
use super::outcome::Stop;
use crate::launcher::Killer;

/// The host's ends of an HTTP guest's streams, which carry one request and its response as HTTP/1.1.
#[derive(Debug)]
pub struct Line {
    /// To write the request to.
    pub to_guest: pipe::Sender,
    /// To read the response from.
    pub from_guest: pipe::Receiver,
    /// To be told of every piece of a body.
    pub meter: Meter,
    /// To be kept for as long as the response is being read.
    pub reader: oneshot::Sender<Infallible>,
}

/// Counts the bytes of the bodies, and ends a job whose limit is passed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Meter {
    entry: Arc<Entry>,
    killer: Killer,
}

/// A body is longer than the job's limit; the job is being ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the body is longer than the job's limit")]
pub struct OverLimit;

impl Meter {
    pub(super) fn new(entry: Arc<Entry>, killer: Killer) -> Self {
        Self { entry, killer }
    }

    /// So many more bytes of the request's body have come from the client.
    ///
    /// # Errors
    /// They are too many.
    pub fn count_input(&self, bytes: usize) -> Result<(), OverLimit> {
        let (reached, allowed) = self.entry.flows.input.count(bytes);
        if reached > allowed { self.end(Stop::InputOver { reached, allowed }) } else { Ok(()) }
    }

    /// So many more bytes of the response's body have come from the guest.
    ///
    /// # Errors
    /// They are too many.
    pub fn count_output(&self, bytes: usize) -> Result<(), OverLimit> {
        let (reached, allowed) = self.entry.flows.output.count(bytes);
        if reached > allowed { self.end(Stop::OutputOver { allowed }) } else { Ok(()) }
    }

    /// The request's body broke off, or came too slowly.
    pub fn input_broken(&self) {
        let _ = self.end(Stop::InputBroken);
    }

    /// Waits until the job is over.
    pub async fn over(&self) {
        self.entry.finished().await;
    }

    fn end(&self, why: Stop) -> Result<(), OverLimit> {
        // the first reason stands; killing twice does no harm
        let _ = self.entry.stop.set(why);
        self.killer.kill();
        Err(OverLimit)
    }
}
