//! Connections: how many there are, and how long each may be idle, slow or silent.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::crowd::Slot;
use super::pace::{Pace, PaceRule};

/// Time-outs and caps of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionRules {
    /// Connections at once.
    pub most: usize,
    /// From the first byte of a request to the end of its headers.
    pub header_timeout: Duration,
    /// Between requests.
    pub idle_timeout: Duration,
    /// How fast a client must send a body.
    pub reading: PaceRule,
    /// How fast it must take an answer.
    pub writing: PaceRule,
}

/// How long a server that stops waits for a client that has no request under way.
const LAST_WAIT: Duration = Duration::from_millis(500);

impl ConnectionRules {
    /// The same for a server that stops: who sends half a request and then nothing does not keep it.
    pub(super) fn at_the_end(mut self) -> Self {
        self.header_timeout = self.header_timeout.min(LAST_WAIT);
        self.idle_timeout = self.idle_timeout.min(LAST_WAIT);
        self
    }
}

/// What a connection is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// For a request to begin.
    Idle,
    /// For a request's headers to end. Also the first thing that a new connection waits for.
    Headers,
    /// For us.
    Busy,
}

/// All open connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    open: HashMap<u64, Arc<Connection>>,
}

/// One open connection.
#[derive(Debug)]
pub(super) struct Connection {
    state: Mutex<(Phase, Instant, u64)>,
    /// The phase has become one with an earlier deadline.
    hurry: Notify,
    /// Somebody else needs its place.
    evict: Notify,
    /// The last request was answered before all of its body had come.
    unread: AtomicBool,
    /// Not all of the last request's body has come, whether or not somebody still reads it.
    body_under_way: AtomicBool,
    /// Its answer broke off in a way that the client can only tell by a reset.
    broken: AtomicBool,
}

/// The most bytes of a body that nobody wants that are read before the connection is closed: the longest body that any
/// route can take.
const MAX_LINGER_BYTES: u64 = 256 << 20;

/// A connection's place in the table.
#[derive(Debug)]
pub(super) struct Seat {
    table: Connections,
    id: u64,
    pub(super) connection: Arc<Connection>,
}

impl Connections {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection. With `most` open, the one that has waited longest for its client gives way: a
    /// crowd of idle connections must not keep a working client out. `None` if every one of them is being served.
    pub(super) fn seat(&self, most: usize) -> Option<Seat> {
        let mut table = self.table();
        if table.open.len() >= most {
            let waiting = table.open.iter().filter(|(_, c)| c.phase().0 != Phase::Busy);
            let oldest = waiting.min_by_key(|(_, c)| c.phase().1).map(|(id, _)| *id)?;
            if let Some(connection) = table.open.remove(&oldest) {
                connection.evict.notify_one();
            }
        }
        table.next += 1;
        let id = table.next;
        let connection = Arc::new(Connection {
            state: Mutex::new((Phase::Headers, Instant::now(), 0)),
            hurry: Notify::new(),
            evict: Notify::new(),
            unread: AtomicBool::new(false),
            body_under_way: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        });
        table.open.insert(id, connection.clone());
        Some(Seat { table: self.clone(), id, connection })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.table.table().open.remove(&self.id);
    }
}

impl Connection {
    fn state(&self) -> MutexGuard<'_, (Phase, Instant, u64)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase(&self) -> (Phase, Instant) {
        let (phase, since, _) = *self.state();
        (phase, since)
    }

    /// A request has arrived, headers and all.
    pub(super) fn begin(&self) {
        let mut state = self.state();
        *state = (Phase::Busy, Instant::now(), state.2 + 1);
        self.unread.store(false, Ordering::Relaxed);
        self.body_under_way.store(false, Ordering::Relaxed);
    }

    /// Whether the request is done with before all of its body has come. The connection cannot serve another one then.
    pub(super) fn is_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// It waits for the rest of a body that nobody wants, no longer than for the headers of a request.
    fn linger(&self) {
        let mut state = self.state();
        *state = (Phase::Headers, Instant::now(), state.2);
        self.hurry.notify_one();
    }

    /// Its answer has been sent or given up.
    fn end(&self) {
        let mut state = self.state();
        *state = (Phase::Idle, Instant::now(), state.2);
    }

    /// Bytes have come. If none were expected, a request begins.
    fn bytes_came(&self) {
        let mut state = self.state();
        if state.0 == Phase::Idle {
            *state = (Phase::Headers, Instant::now(), state.2);
            self.hurry.notify_one();
        }
    }

    fn requests(&self) -> u64 {
        self.state().2
    }

    /// Waits until the connection has been idle or slow for too long, or has to give way.
    pub(super) async fn overdue(&self, rules: &ConnectionRules) {
        loop {
            let (phase, since) = self.phase();
            let deadline = match phase {
                Phase::Idle => since + rules.idle_timeout,
                Phase::Headers => since + rules.header_timeout,
                // whatever comes after it has its full time left
                Phase::Busy => Instant::now() + rules.header_timeout.min(rules.idle_timeout),
            };
            tokio::select! {
                () = sleep_until(deadline) => {
                    if phase != Phase::Busy && self.phase() == (phase, since) {
                        return;
                    }
                }
                () = self.hurry.notified() => {}
                () = self.evict.notified() => return,
            }
        }
    }
}

/// A socket that notices when requests begin and that does not wait for ever to be rid of an answer.
#[derive(Debug)]
pub(super) struct WatchedStream {
    stream: TcpStream,
    connection: Arc<Connection>,
    rule: PaceRule,
    pace: Pace,
    /// The request whose answer `pace` is about.
    request: u64,
    closing: Closing,
}

/// How far the closing of a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    Open,
    /// Our side is closed; so many more bytes of the client's are read.
    Lingering(u64),
}

impl WatchedStream {
    pub(super) fn new(stream: TcpStream, connection: Arc<Connection>, rule: PaceRule) -> Self {
        Self { stream, connection, rule, pace: Pace::new(rule), request: 0, closing: Closing::Open }
    }

    fn paced<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>, moved: usize) -> Poll<io::Result<T>> {
        let request = self.connection.requests();
        if request != self.request {
            self.request = request;
            self.pace = Pace::new(self.rule);
        }
        match polled {
            Poll::Ready(result) => {
                self.pace.moved(moved);
                Poll::Ready(result)
            }
            Poll::Pending => {
                ready!(self.pace.poll_waiting(cx));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

/// An answer that ends with the connection and broke off must not look like a whole one: the connection is reset.
impl Drop for WatchedStream {
    fn drop(&mut self) {
        if self.connection.broken.load(Ordering::Relaxed) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut this.stream).poll_read(cx, buf));
        if buf.filled().len() > before {
            this.connection.bytes_came();
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(cx, buf);
        let moved = if let Poll::Ready(Ok(n)) = &polled { *n } else { 0 };
        this.paced(cx, polled, moved)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        let moved = if let Poll::Ready(Ok(n)) = &polled { *n } else { 0 };
        this.paced(cx, polled, moved)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_flush(cx);
        this.paced(cx, polled, 0)
    }

    /// Closes our side. If a request was answered before its body had come, what still comes of it is read and thrown
    /// away for a while: closing a socket with unread bytes resets the connection, and a client that first sends and
    /// then reads would never see the answer (RFC 9112, section 9.6).
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.closing == Closing::Open {
            let polled = Pin::new(&mut this.stream).poll_shutdown(cx);
            ready!(this.paced(cx, polled, 0))?;
            // an HTTP guest may have answered while its request is still being passed on
            if !this.connection.body_under_way.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
            this.connection.linger();
            this.closing = Closing::Lingering(MAX_LINGER_BYTES);
        }
        let mut scratch = [0; 8 * 1024];
        while let Closing::Lingering(left @ 1..) = this.closing {
            let mut buffer = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {
                    this.closing = Closing::Lingering(left.saturating_sub(buffer.filled().len() as u64));
                }
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// A request's body. Dropping it before its end leaves bytes on the connection that nobody wants.
#[derive(Debug)]
pub(super) struct FirstBody {
    body: Incoming,
    ended: bool,
    connection: Arc<Connection>,
}

impl FirstBody {
    pub(super) fn new(body: Incoming, connection: Arc<Connection>) -> Self {
        connection.body_under_way.store(!body.is_end_stream(), Ordering::Relaxed);
        Self { body, ended: false, connection }
    }
}

impl Drop for FirstBody {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_end_stream() {
            self.connection.unread.store(true, Ordering::Relaxed);
        }
    }
}

impl HttpBody for FirstBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.ended |= !matches!(frame, Some(Ok(_))) || self.body.is_end_stream();
        self.connection.body_under_way.store(!self.ended, Ordering::Relaxed);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body, whose end is the end of the request.
#[derive(Debug)]
pub(super) struct LastBody {
    body: Body,
    connection: Arc<Connection>,
    /// The request's place among those of its tenant.
    _slot: Slot,
    /// Whether nothing but the end of the connection tells the client where it ends.
    until_close: bool,
}

impl LastBody {
    pub(super) fn new(body: Body, connection: Arc<Connection>, slot: Slot, until_close: bool) -> Self {
        Self { body, connection, _slot: slot, until_close }
    }
}

impl Drop for LastBody {
    fn drop(&mut self) {
        self.connection.end();
    }
}

impl HttpBody for LastBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if self.until_close && matches!(frame, Some(Err(_))) {
            self.connection.broken.store(true, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> ConnectionRules {
        let pace = PaceRule { grace: Duration::from_secs(10), bytes_per_second: 1024, most: Duration::from_secs(300) };
        ConnectionRules {
            most: 2,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            reading: pace,
            writing: pace,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_is_overdue_after_the_header_timeout() {
        let seat = Connections::default().seat(9).unwrap();
        let start = Instant::now();
        seat.connection.overdue(&rules()).await;
        assert_eq!(start.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_one_has_longer_until_it_begins_to_speak() {
        let connection = Connections::default().seat(9).unwrap().connection.clone();
        connection.begin();
        connection.end();
        let start = Instant::now();
        let (speaks, watched) = (connection.clone(), connection.clone());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(30)).await;
            speaks.bytes_came();
        });
        watched.overdue(&rules()).await;
        assert_eq!(start.elapsed().as_secs(), 40);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_served_is_never_overdue() {
        let connection = Connections::default().seat(9).unwrap().connection.clone();
        connection.begin();
        let long = tokio::time::timeout(Duration::from_secs(3600), connection.overdue(&rules())).await;
        assert!(long.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_that_waits_longest_gives_way() {
        let connections = Connections::default();
        let first = connections.seat(2).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let second = connections.seat(2).unwrap();
        first.connection.begin();
        let third = connections.seat(2).unwrap();
        let start = Instant::now();
        second.connection.overdue(&rules()).await;
        assert_eq!(start.elapsed(), Duration::ZERO, "evicted at once");
        third.connection.begin();
        assert!(connections.seat(2).is_none(), "both are being served");
        drop(first);
        assert!(connections.seat(2).is_some());
    }
}
