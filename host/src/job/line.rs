//! The connection to an HTTP guest: its standard streams, and the count of what goes over them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::unix::pipe;

use super::outcome::Stop;
use super::registry::Entry;
use crate::launcher::Killer;
use crate::limit::{Limit, Limits};

/// The host's ends of an HTTP guest's streams, which carry one request and its response as HTTP/1.1.
#[derive(Debug)]
pub struct Line {
    /// To write the request to.
    pub to_guest: pipe::Sender,
    /// To read the response from.
    pub from_guest: pipe::Receiver,
    /// To be told of every piece of a body.
    pub meter: Meter,
}

/// Counts the bytes of the bodies, and ends a job whose limit is passed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Meter(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    entry: Arc<Entry>,
    killer: Killer,
    input: AtomicU64,
    input_limit: u64,
    output: AtomicU64,
    output_limit: u64,
}

/// A body is longer than the job's limit; the job is being ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the body is longer than the job's limit")]
pub struct OverLimit;

impl Meter {
    pub(super) fn new(entry: Arc<Entry>, killer: Killer, limits: &Limits) -> Self {
        Self(Arc::new(Counts {
            entry,
            killer,
            input: AtomicU64::new(0),
            input_limit: limits.get(Limit::InputBytes),
            output: AtomicU64::new(0),
            output_limit: limits.get(Limit::OutputBytes),
        }))
    }

    /// So many more bytes of the request's body have come from the client.
    ///
    /// # Errors
    /// They are too many.
    pub fn count_input(&self, bytes: usize) -> Result<(), OverLimit> {
        let total = self.0.input.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if total > self.0.input_limit { self.end(Stop::InputOver(total)) } else { Ok(()) }
    }

    /// So many more bytes of the response's body have come from the guest.
    ///
    /// # Errors
    /// They are too many.
    pub fn count_output(&self, bytes: usize) -> Result<(), OverLimit> {
        let total = self.0.output.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if total > self.0.output_limit { self.end(Stop::OutputOver) } else { Ok(()) }
    }

    /// The request's body broke off, or came too slowly.
    pub fn input_broken(&self) {
        let _ = self.end(Stop::InputBroken);
    }

    /// Waits until the job is over.
    pub async fn over(&self) {
        self.0.entry.finished().await;
    }

    fn end(&self, why: Stop) -> Result<(), OverLimit> {
        // the first reason stands; killing twice does no harm
        let _ = self.0.entry.stop.set(why);
        self.0.killer.kill();
        Err(OverLimit)
    }

    /// Bytes of the request's body.
    pub(super) fn input(&self) -> u64 {
        self.0.input.load(Ordering::Relaxed)
    }

    /// Bytes of the response's body.
    pub(super) fn output(&self) -> u64 {
        self.0.output.load(Ordering::Relaxed)
    }
}
