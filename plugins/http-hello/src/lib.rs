//! Answers HTTP requests: greets on `/`, gives a body back on `/echo` as it arrives, lists the headers it was sent on
//! `/headers`. A `wasi:http` component that runs on any host of them, built for `wasm32-wasip2` only.
#![cfg(target_env = "p2")]

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{ErrorCode, Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};
use wasip2::io::streams::{InputStream, OutputStream, StreamError};

struct Hello;

wasip2::http::proxy::export!(Hello);

impl Guest for Hello {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let path_and_query = request.path_with_query().unwrap_or_default();
        let path = path_and_query.split('?').next().unwrap_or_default();
        match path {
            "/" => answer(out, 200, "text/plain; charset=utf-8", |body| write(body, greeting(&request).as_bytes())),
            "/headers" => answer(out, 200, "text/plain; charset=utf-8", |body| write(body, &headers(&request))),
            "/echo" => echo(&request, out),
            _ => answer(out, 404, "text/plain; charset=utf-8", |body| write(body, b"there is nothing here\n")),
        }
    }
}

type Sent = Result<(), StreamError>;

fn greeting(request: &IncomingRequest) -> String {
    let variable = |name| std::env::var(name).unwrap_or_else(|_| "nobody".into());
    let path = request.path_with_query().unwrap_or_default();
    format!("hello from `{}` of {}, who was asked for {path}\n", variable("HOLM_PLUGIN"), variable("HOLM_TENANT"))
}

fn headers(request: &IncomingRequest) -> Vec<u8> {
    let mut list = Vec::new();
    for (name, value) in request.headers().entries() {
        list.extend_from_slice(name.as_bytes());
        list.extend_from_slice(b": ");
        list.extend_from_slice(&value);
        list.push(b'\n');
    }
    list
}

fn echo(request: &IncomingRequest, out: ResponseOutparam) {
    let Ok(incoming) = request.consume() else {
        return ResponseOutparam::set(out, Err(ErrorCode::InternalError(None)));
    };
    let Ok(input) = incoming.stream() else {
        return ResponseOutparam::set(out, Err(ErrorCode::InternalError(None)));
    };
    answer(out, 200, "application/octet-stream", |output| copy(&input, output));
}

fn copy(input: &InputStream, output: &OutputStream) -> Sent {
    loop {
        match input.blocking_read(64 * 1024) {
            Ok(piece) => write(output, &piece)?,
            Err(StreamError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Writes in the pieces that the standard lets one call have.
fn write(output: &OutputStream, bytes: &[u8]) -> Sent {
    bytes.chunks(4096).try_for_each(|piece| output.blocking_write_and_flush(piece))
}

/// Sends the head, then lets `fill` write the body. A body that could not be finished is left so, and the connection
/// is cut: the client must not take it for a whole one.
fn answer(out: ResponseOutparam, status: u16, content_type: &str, fill: impl FnOnce(&OutputStream) -> Sent) {
    let headers = Fields::new();
    let typed = headers.set("content-type", &[content_type.as_bytes().to_vec()]);
    let response = OutgoingResponse::new(headers);
    let (Ok(()), Ok(()), Ok(body)) = (typed, response.set_status_code(status), response.body()) else {
        return ResponseOutparam::set(out, Err(ErrorCode::InternalError(None)));
    };
    ResponseOutparam::set(out, Ok(response));
    let filled = body.write().map_err(|()| StreamError::Closed).and_then(|stream| fill(&stream));
    if filled.is_ok() {
        // the other end may be gone by now: there is nobody left to tell
        let _ = OutgoingBody::finish(body, None);
    }
}
