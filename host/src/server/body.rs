//! Request bodies: how fast they come, and JSON read strictly.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, header};
use futures_util::{Stream, StreamExt};
use hyper::body::Body as HttpBody;
use serde::de::DeserializeOwned;

use super::json;
use super::pace::{Pace, PaceRule};
use super::problem::{Code, Problem};

/// The longest JSON body.
const MAX_JSON_BYTES: usize = 1024 * 1024;

/// A request body as a stream, in which a client that is too slow is an error.
#[derive(Debug)]
pub(super) struct PacedBody {
    body: Body,
    pace: Pace,
}

/// A body that broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BodyError {
    /// The client closed the connection, or broke the framing.
    #[error("the body broke off")]
    Broken,
    /// The client sends too slowly.
    #[error("the body came too slowly")]
    TooSlow,
}

impl PacedBody {
    pub(super) fn new(body: Body, rule: PaceRule) -> Self {
        Self { body, pace: Pace::new(rule) }
    }
}

impl Stream for PacedBody {
    type Item = Result<Bytes, BodyError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { continue }; // trailers are nobody's here
                    this.pace.moved(data.len());
                    return Poll::Ready(Some(Ok(data)));
                }
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Some(Err(BodyError::Broken))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {
                    ready!(this.pace.poll_waiting(cx));
                    return Poll::Ready(Some(Err(BodyError::TooSlow)));
                }
            }
        }
    }
}

impl From<BodyError> for Problem {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::Broken => Self::malformed("the body broke off"),
            BodyError::TooSlow => Self::new(Code::RequestTimeout, "the body came too slowly"),
        }
    }
}

/// Refuses every `Content-Encoding`: nothing is inflated here, so nothing can be a bomb.
pub(super) fn refuse_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.contains_key(header::CONTENT_ENCODING) {
        return Err(Problem::new(Code::UnsupportedMediaType, "send the body without `Content-Encoding`"));
    }
    Ok(())
}

/// Refuses a body whose announced length is over the limit, before any of it is asked for.
pub(super) fn refuse_longer_than(headers: &HeaderMap, most: u64) -> Result<(), Problem> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    match announced {
        Some(length) if length > most => Err(too_large(most)),
        _ => Ok(()),
    }
}

pub(super) fn too_large(most: u64) -> Problem {
    Problem::new(Code::PayloadTooLarge, format!("the body may have {most} bytes at most")).with("maximum", most)
}

/// Reads a body that must be a JSON object.
pub(super) async fn read_json<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    rule: PaceRule,
) -> Result<T, Problem> {
    refuse_encoding(headers)?;
    refuse_other_type(headers)?;
    refuse_longer_than(headers, MAX_JSON_BYTES as u64)?;
    let mut body = PacedBody::new(body, rule);
    let mut bytes = Vec::new();
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        if bytes.len() + chunk.len() > MAX_JSON_BYTES {
            return Err(too_large(MAX_JSON_BYTES as u64));
        }
        bytes.extend_from_slice(&chunk);
    }
    parse_object(&bytes)
}

/// Parses a JSON object into `T`.
pub(super) fn parse_object<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Problem::malformed("the body must be a JSON object; send `{}` to set nothing"));
    }
    json::parse(bytes).map_err(|error| Problem::malformed(format!("JSON: {error}")))
}

/// JSON routes take JSON, or a body of no declared type.
fn refuse_other_type(headers: &HeaderMap) -> Result<(), Problem> {
    match media_type(headers).as_deref() {
        None | Some("application/json" | "application/merge-patch+json") => Ok(()),
        Some(_) => Err(Problem::new(Code::UnsupportedMediaType, "send JSON with `Content-Type: application/json`")),
    }
}

/// The `type/subtype` of the body, in small letters.
pub(super) fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().unwrap_or_default();
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}
