//! The body of a guest's response, in which a body that was left behind breaks off.
//!
//! The library ends a body in the same way whether its guest has finished it or is gone with its store: a client would
//! take half an answer for a whole one. While the store is there, though, a body that is not finished has no end. So it
//! is looked at once more before the store goes.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// For the connection. Dropping it tells the guest that nobody listens any more.
pub(super) struct AnswerBody(Arc<Mutex<Inner>>);

/// For whoever drops the guest's store. Does not keep the body.
pub(super) struct Settle(Weak<Mutex<Inner>>);

struct Inner {
    body: HyperOutgoingBody,
    /// What was still under way when the guest ended; no more than the library's channel holds.
    under_way: VecDeque<Frame<Bytes>>,
    end: Option<End>,
}

#[derive(Clone, Copy)]
enum End {
    Finished,
    LeftBehind,
}

/// The guest ended without having finished the body.
#[derive(Debug, thiserror::Error)]
#[error("the guest left the body unfinished")]
struct LeftBehind;

impl AnswerBody {
    pub(super) fn new(body: HyperOutgoingBody) -> (Self, Settle) {
        let inner = Arc::new(Mutex::new(Inner { body, under_way: VecDeque::new(), end: None }));
        let settle = Settle(Arc::downgrade(&inner));
        (Self(inner), settle)
    }
}

impl Settle {
    /// Decides how the body ends. To be called when the guest has ended and before its store goes.
    pub(super) async fn settle(self) {
        let Some(inner) = self.0.upgrade() else { return };
        poll_fn(|cx| {
            inner.lock().unwrap_or_else(PoisonError::into_inner).settle(cx);
            // the connection may have been polled already
            cx.waker().wake_by_ref();
            Poll::Ready(())
        })
        .await;
    }
}

impl Inner {
    fn settle(&mut self, cx: &mut Context<'_>) {
        let end = loop {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => self.under_way.push_back(frame),
                Poll::Ready(None) => break End::Finished,
                Poll::Ready(Some(Err(_))) | Poll::Pending => break End::LeftBehind,
            }
        };
        self.end = Some(end);
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(frame) = inner.under_way.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        Poll::Ready(match inner.end {
            Some(End::Finished) => None,
            Some(End::LeftBehind) => Some(Err(LeftBehind.into())),
            None => ready!(Pin::new(&mut inner.body).poll_frame(cx)).map(|frame| frame.map_err(Into::into)),
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).body.size_hint()
    }
}
