//! One HTTP request for one guest: HTTP/1.1 over this process's standard input and output.
//!
//! Both sides stream. The guest, the connection and the bodies are driven by one thread in turn: a guest that computes
//! yields now and then, and a guest that waits for the client's bytes lets the connection fetch them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use wasmtime::component::ResourceTable;
use wasmtime::{Result, Store, format_err};
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::io::TokioIo;
use wasmtime_wasi_http::p2::bindings::Proxy;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;

use super::answer::{AnswerBody, Settle};
use super::guest::State;

/// Header fields of a request. The server in front has counted them already; this is more than it lets through, as
/// hyper's own default is not.
const MAX_HEADERS: usize = 256;

/// What the guest gives for a response.
type Answer = std::result::Result<Response<HyperOutgoingBody>, ErrorCode>;

/// A guest that ended without a response.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoResponse {
    /// It returned, and had set none.
    #[error("the guest returned without setting a response")]
    Unset,
    /// It set an error in the place of a response.
    #[error("the guest answered with an error: {0:?}")]
    Error(ErrorCode),
    /// It answered with a status that only the server of a connection may send.
    #[error("the guest answered with the informational status {0}")]
    Informational(StatusCode),
}

/// Serves the one request of this process, and waits until both the guest and the transmission of its response are
/// over. Gives the guest's end.
pub(super) async fn serve(guest: &Proxy, store: &mut Store<State>) -> Result<()> {
    let (give_request, request) = oneshot::channel();
    let (give_answer, answer) = oneshot::channel();
    let exchange = Mutex::new(Some((give_request, answer)));
    let service = service_fn(|request: Request<Incoming>| {
        let exchange = exchange.lock().ok().and_then(|mut exchange| exchange.take());
        async move {
            let (give_request, answer) = exchange.ok_or(Closed)?;
            give_request.send(request).map_err(|_| Closed)?;
            answer.await.map_err(|_| Closed)
        }
    });
    let (from, to) = streams()?;
    let streams = TokioIo::new(tokio::io::join(from, to));
    let mut http = http1::Builder::new();
    let connection = http.keep_alive(false).max_headers(MAX_HEADERS).serve_connection(streams, service);
    let connection = async {
        // how the transmission went is for the other end to see, and not the guest's end
        let _ = connection.await;
        // a request that never came, or was none, is not waited for
        exchange.lock().map(|mut exchange| exchange.take())
    };
    let (guest, _) = tokio::join!(handle(guest, store, request, give_answer), connection);
    guest
}

/// The connection has no request for the guest, or the guest none for the connection.
#[derive(Debug, thiserror::Error)]
#[error("closed")]
struct Closed;

/// Calls the guest. Nothing that it had open is left when this returns, of the response's body for instance.
async fn handle(
    guest: &Proxy,
    store: &mut Store<State>,
    request: oneshot::Receiver<Request<Incoming>>,
    give_answer: oneshot::Sender<Response<AnswerBody>>,
) -> Result<()> {
    let mut body = None;
    let result = call(guest, store, request, give_answer, &mut body).await;
    if let Some(body) = body {
        body.settle().await;
    }
    *store.data_mut().http().table = ResourceTable::new();
    result
}

async fn call(
    guest: &Proxy,
    store: &mut Store<State>,
    request: oneshot::Receiver<Request<Incoming>>,
    give_answer: oneshot::Sender<Response<AnswerBody>>,
    body: &mut Option<Settle>,
) -> Result<()> {
    let request = request.await.map_err(|_| format_err!("no request has come"))?;
    let request = store.data_mut().http().new_incoming_request(Scheme::Http, request)?;
    let (set, mut outcome) = oneshot::channel::<Answer>();
    let response = store.data_mut().http().new_response_outparam(set)?;
    let handler = guest.wasi_http_incoming_handler();
    let mut handled = std::pin::pin!(handler.call_handle(store, request, response));
    let mut give_answer = Some(give_answer);
    let mut forward = |answer: Answer| match (answer, give_answer.take()) {
        (Ok(response), _) if response.status().is_informational() => Err(NoResponse::Informational(response.status())),
        (Ok(response), Some(give)) => {
            // should the connection be gone, the guest's body finds out
            let _ = give.send(response.map(|whole| {
                let (whole, settle) = AnswerBody::new(whole);
                *body = Some(settle);
                whole
            }));
            Ok(())
        }
        (Err(code), _) => Err(NoResponse::Error(code)),
        (_, None) => Err(NoResponse::Unset),
    };
    // the response goes out as soon as it is set, while the guest goes on
    tokio::select! {
        biased;
        Ok(answer) = &mut outcome => {
            let set = forward(answer);
            handled.await?;
            set.map_err(Into::into)
        }
        result = &mut handled => {
            result?;
            let answer = outcome.try_recv().map_err(|_| NoResponse::Unset)?;
            forward(answer).map_err(Into::into)
        }
    }
}

/// This process's standard input and output, which are pipes, as asynchronous streams.
fn streams() -> io::Result<(pipe::Receiver, pipe::Sender)> {
    Ok((
        pipe::Receiver::from_owned_fd(non_blocking(io::stdin().as_fd())?)?,
        pipe::Sender::from_owned_fd(non_blocking(io::stdout().as_fd())?)?,
    ))
}

fn non_blocking(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd = fd.try_clone_to_owned()?;
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}
