//! One HTTP request to a guest and its response: what is passed on of their headers, and their bodies as they flow.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use futures_util::StreamExt;
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWrite;
use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::body::PacedBody;
use super::pace::PaceRule;
use crate::job::{Line, Meter, Submitted};

/// Header fields of a response, and the bytes of all of them together, counted like a request's: what that may have.
const MAX_HEADERS: usize = 128;
const MAX_HEADER_BYTES: usize = 64 * 1024;

/// Headers of one connection, which mean nothing on the next (RFC 9110, section 7.6.1), and `Expect`, which is ours to
/// answer.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::EXPECT,
    HeaderName::from_static("keep-alive"),
];

/// Headers that speak for the host itself, in both directions.
const OURS: &str = "holm-";

/// How long a guest that has given no proper answer may take to end by itself, so that its record says why.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// The authority of a request that names none, as HTTP/1.0 ones may.
const NO_HOST: HeaderValue = HeaderValue::from_static("localhost");

/// The guest gave no response, or one that is not HTTP or may not be passed on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    /// The connection to the guest ended, or what came over it was no HTTP response.
    #[error("no HTTP response came")]
    Http(#[from] hyper::Error),
    /// An informational status, which only the server of a connection may send.
    #[error("the status {0} cannot be passed on")]
    Status(StatusCode),
    /// Headers beyond what is passed on.
    #[error("its headers have {0} bytes, more than {MAX_HEADER_BYTES}")]
    Headers(usize),
}

/// How often a connection to a guest is given its turn before what has come of an answer is sent on: it hands on a piece of
/// the body each time that one has been taken. The usual answer is whole after three.
const TURNS: usize = 4;

/// The body of a guest's response, still on its way.
#[derive(Debug)]
pub(super) struct Answer {
    body: Incoming,
    meter: Meter,
    /// Tell by their end that nobody reads on: the connection, and the job.
    _read: (oneshot::Sender<()>, oneshot::Sender<Infallible>),
}

/// Sends `request` to the guest and gives the head of its response; the body follows as it is read.
pub(super) async fn exchange(
    line: Line,
    mut request: Request<Body>,
    rule: PaceRule,
) -> Result<Response<Answer>, ExchangeError> {
    let Line { to_guest, from_guest, meter, reader } = line;
    let io = TokioIo::new(tokio::io::join(from_guest, Patient(to_guest)));
    let (mut sender, connection) =
        http1::Builder::new().max_headers(MAX_HEADERS).max_buf_size(MAX_HEADER_BYTES).handshake(io).await?;
    let (read, no_longer_read) = oneshot::channel();
    let job = meter.clone();
    tokio::spawn(async move {
        let over = async {
            let _ = no_longer_read.await;
            job.over().await;
        };
        // a guest may go on reading its request when its answer has been read, and what it wrote may be read when it
        // has ended; after both there is nothing to wait for
        tokio::select! {
            _ = connection => {}
            () = over => {}
        }
    });
    request.headers_mut().entry(header::HOST).or_insert(NO_HOST);
    let counted = meter.clone();
    let response = sender.send_request(request.map(|body| metered(body, counted, rule))).await?;
    if response.status().is_informational() {
        return Err(ExchangeError::Status(response.status()));
    }
    // what the connection buffers is only about as much
    match header_bytes(response.headers()) {
        bytes if bytes > MAX_HEADER_BYTES => return Err(ExchangeError::Headers(bytes)),
        _ => {}
    }
    Ok(response.map(|body| Answer { body, meter, _read: (read, reader) }))
}

/// The writing end of a guest's connection. A guest may answer and end before it has read its request; for hyper an
/// error of writing ends the whole connection, with what has been read and not been handed on. So a guest that reads no
/// more looks like one that reads slowly.
#[derive(Debug)]
struct Patient<W>(W);

impl<W: AsyncWrite + Unpin> AsyncWrite for Patient<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        for_ever_if_unread(Pin::new(&mut self.0).poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        for_ever_if_unread(Pin::new(&mut self.0).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn for_ever_if_unread<T>(polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
    match polled {
        Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Poll::Pending,
        other => other,
    }
}

/// The bytes of all headers together, counted as names, values and four bytes of punctuation each.
pub(super) fn header_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

/// A request's body, counted. If it is too long, breaks off or comes too slowly, its job is being ended; until it is, the
/// body goes on without a word, so that the guest has nothing to fail of by itself.
fn metered(body: Body, meter: Meter, rule: PaceRule) -> Body {
    if body.is_end_stream() {
        return Body::empty();
    }
    Body::from_stream(PacedBody::new(body, rule).then(move |chunk| {
        let meter = meter.clone();
        async move {
            match chunk {
                Ok(chunk) if meter.count_input(chunk.len()).is_ok() => return Ok::<_, Infallible>(chunk),
                Ok(_) => {}
                Err(_) => meter.input_broken(),
            }
            pending().await
        }
    }))
}

/// Takes out what is not for the other side: headers of this connection, also those that `Connection` names, and the
/// host's own.
pub(super) fn pass_on(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // which are about the message, whatever `Connection` says
        .filter(|name| ![header::CONTENT_LENGTH, header::HOST].contains(name))
        .collect();
    let ours = headers.keys().filter(|name| name.as_str().starts_with(OURS)).cloned();
    let unwanted: Vec<HeaderName> =
        ours.chain(named).chain(HOP_BY_HOP).chain([HeaderName::from_static("proxy-connection")]).collect();
    for name in unwanted {
        headers.remove(name);
    }
}

/// A response's body on its way to the client. Dropped before its end, it ends the job: nobody reads on. One that breaks
/// off by itself leaves the job its last words.
#[derive(Debug)]
pub(super) struct GuestBody {
    /// Dropped first: what the guest fails of when its answer is not read any more is not its own failure.
    job: Option<Submitted>,
    answer: Answer,
    /// What has come before anybody asked.
    early: VecDeque<Piece>,
    /// What came before the answer broke off has been sent.
    sent: bool,
}

/// A piece of a body, or what broke it off.
type Piece = Result<Frame<Bytes>, axum::Error>;

impl GuestBody {
    pub(super) fn new(answer: Answer, job: Submitted) -> Self {
        Self { answer, job: Some(job), early: VecDeque::new(), sent: false }
    }

    /// Takes what the guest has written already. A short answer is whole then, and goes out in one piece.
    pub(super) async fn take_early(&mut self) {
        for _ in 0..TURNS {
            while self.early.len() < TURNS
                && !self.answer.body.is_end_stream()
                && let Poll::Ready(next) = poll_once(|cx| self.poll_answer(cx)).await
            {
                let Some(piece) = next else { return };
                let broken = piece.is_err();
                self.early.push_back(piece);
                if broken {
                    return;
                }
            }
            if self.answer.body.is_end_stream() {
                return self.complete();
            }
            yield_now().await;
        }
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Option<Piece>> {
        Poll::Ready(match ready!(Pin::new(&mut self.answer.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                Some(self.answer.meter.count_output(bytes).map(|()| frame).map_err(axum::Error::new))
            }
            Some(Err(error)) => {
                if let Some(job) = self.job.take() {
                    tokio::spawn(timeout(LAST_WORDS, job.finished()));
                }
                Some(Err(axum::Error::new(error)))
            }
            None => {
                self.complete();
                None
            }
        })
    }

    /// All of it has come; what the guest does after that is its own affair.
    fn complete(&mut self) {
        if let Some(job) = self.job.take() {
            job.let_go();
        }
    }
}

/// Polls, and does not wait.
async fn poll_once<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    poll_fn(|cx| Poll::Ready(poll(cx))).await
}

impl HttpBody for GuestBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Piece>> {
        if self.early.front().is_some_and(Result::is_err) && !std::mem::replace(&mut self.sent, true) {
            // an error ends the connection at once: a client that had seen nothing would ask again
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match self.early.pop_front() {
            Some(piece) => Poll::Ready(Some(piece)),
            None => self.poll_answer(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.early.is_empty() && self.answer.body.is_end_stream()
    }

    // no `size_hint`: a length that is known stands in the header already, and the length of no body, as answers to
    // HEAD have it, must not come to stand there
}

impl Drop for GuestBody {
    fn drop(&mut self) {
        // a body that is known to be empty, or whose last piece was its end, is never asked for more
        if self.answer.body.is_end_stream() {
            self.complete();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn an_answer_outlives_a_guest_that_does_not_read() {
        // with the plain pipe, hyper's error of writing comes between the head and the body in most of the rounds
        for _ in 0..100 {
            let (to_guest, mut request) = tokio::io::duplex(64);
            let (mut response, from_guest) = tokio::io::duplex(4096);
            let io = TokioIo::new(tokio::io::join(from_guest, Patient(to_guest)));
            let (mut sender, connection) = http1::handshake(io).await.unwrap();
            let connection = tokio::spawn(connection);
            let body =
                Body::from_stream(futures_util::stream::iter((0..64).map(|_| Ok::<_, io::Error>(vec![0; 1024]))));
            let sent = sender.send_request(Request::post("/").body(body).unwrap());
            let guest = async move {
                let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nearly\r\n0\r\n\r\n";
                request.read_exact(&mut [0; 16]).await.unwrap();
                response.write_all(answer.as_bytes()).await.unwrap();
                drop((request, response));
            };
            let (answer, ()) = tokio::join!(sent, guest);
            let body = axum::body::to_bytes(Body::new(answer.unwrap().into_body()), 100).await;
            assert_eq!(body.unwrap(), "early");
            connection.abort();
        }
    }

    #[test]
    fn what_belongs_to_a_connection_or_to_the_host_is_not_passed_on() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Private"),
            ("connection", "other"),
            ("x-private", "1"),
            ("other", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("holm-job-id", "forged"),
            ("expect", "100-continue"),
            ("content-length", "5"),
            ("accept", "*/*"),
            ("traceparent", "00-1-2-00"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        pass_on(&mut headers);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["accept", "content-length", "traceparent"]);
    }

    #[test]
    fn connection_cannot_name_what_holds_the_message_together() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONNECTION, HeaderValue::from_static("content-length, host"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("5"));
        headers.insert(header::HOST, HeaderValue::from_static("a"));
        pass_on(&mut headers);
        assert!(headers.contains_key(header::CONTENT_LENGTH) && headers.contains_key(header::HOST));
    }
}
