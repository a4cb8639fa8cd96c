//! Everything HTTP: connections, routes, status codes. Nothing outside of here knows of them.

mod app;
mod body;
mod conditions;
mod connection;
mod crowd;
mod exchange;
mod form;
mod json;
mod pace;
mod problem;
mod routes;

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, Version, header};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;
use utoipa::ToSchema;

pub use self::app::{App, AppParts};
pub use self::connection::ConnectionRules;
use self::connection::{Connections, FirstBody, LastBody, Seat, WatchedStream};
pub use self::crowd::Crowd;
use self::crowd::Slot;
pub use self::pace::PaceRule;
pub use self::problem::{Code, Problem};
pub use self::routes::openapi;

/// Header fields of one request.
const MAX_HEADERS: usize = 128;

/// What a connection buffers of a request's head: the longest URI and the most header bytes, both checked again with
/// a proper answer, and room for what surrounds them.
const MAX_HEAD_BYTES: usize = 80 * 1024;

/// How long to wait after the kernel refused a connection for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An error, as documentation shows it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) struct ProblemBody {
    /// `/problems/{code}`.
    r#type: String,
    /// The code in words.
    title: String,
    /// The HTTP status.
    status: u16,
    /// What went wrong, and what to do about it.
    detail: String,
    /// A stable word of the list `ProblemCode`.
    code: String,
}

/// Serves until `stop` is cancelled, then lets the requests that are under way end. Returns when all have.
///
/// # Errors
/// The listener failed for good.
pub async fn serve(listener: TcpListener, app: App, stop: CancellationToken) -> io::Result<()> {
    let router = routes::router(app.clone());
    let (connections, tasks) = (Connections::default(), TaskTracker::new());
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) if is_transient(&error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
                Err(error) => return Err(error),
            },
            () = stop.cancelled() => break,
        };
        let Some(seat) = connections.seat(app.connections.most) else {
            continue;
        };
        tasks.spawn(converse(stream, seat, router.clone(), app.connections, stop.clone()));
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
    Ok(())
}

/// Errors of `accept(2)` that concern one connection, or that pass.
fn is_transient(error: &io::Error) -> bool {
    use nix::libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM, EPROTO};
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    ) || matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOBUFS | ENOMEM | EPERM | EPROTO))
}

/// One connection, from its first byte to its last.
async fn converse(stream: TcpStream, seat: Seat, router: Router, rules: ConnectionRules, stop: CancellationToken) {
    // answers are written whole; waiting for more only delays them
    let _ = stream.set_nodelay(true);
    let connection = &seat.connection;
    let io = TokioIo::new(WatchedStream::new(stream, connection.clone(), rules.writing));
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        connection.begin();
        let (router, connection) = (router.clone(), connection.clone());
        async move {
            // what is older knows no chunks
            let chunks = request.version() >= Version::HTTP_11;
            let mut request = request.map(|body| Body::new(FirstBody::new(body, connection.clone())));
            let slot = Slot::default();
            request.extensions_mut().insert(slot.clone());
            let mut response = router.oneshot(request).await?;
            if connection.is_unread() {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            let until_close = !chunks && !response.headers().contains_key(header::CONTENT_LENGTH);
            Ok::<_, Infallible>(response.map(|body| LastBody::new(body, connection, slot, until_close)))
        }
    });
    let mut served = std::pin::pin!(
        http1::Builder::new()
            // hyper's own header time-out needs a timer to be in force at all; ours is the stricter one
            .timer(TokioTimer::new())
            .header_read_timeout(rules.idle_timeout.max(rules.header_timeout) + Duration::from_secs(5))
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(io, service)
    );
    tokio::select! {
        // how a connection ends is the client's business, and not worth a line in the log
        _ = served.as_mut() => return,
        () = connection.overdue(&rules) => return,
        () = stop.cancelled() => {}
    }
    let rules = rules.at_the_end();
    served.as_mut().graceful_shutdown();
    tokio::select! {
        _ = served.as_mut() => {}
        () = connection.overdue(&rules) => {}
    }
}
