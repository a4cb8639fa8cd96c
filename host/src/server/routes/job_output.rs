//! A finished job as an HTTP answer: its bare output, a problem, or its record with the output in it.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::{Stream, TryStreamExt};
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;

use crate::admission::Permit;
use crate::job::{Finished, JobRecord, Outcome, Output};
use crate::launcher::Content;
use crate::limit::Limit;
use crate::plugin::Plugin;
use crate::server::problem::{Code, Problem};

/// Bytes of a large output that are handled at once. A multiple of 3, so that pieces in base64 join without padding.
const PIECE: usize = 48 * 1024;

const OCTETS: &str = "application/octet-stream";

/// The output of a job that did well, else a problem.
pub(super) async fn bare(finished: Finished, plugin: &Plugin) -> Result<Response, Problem> {
    let Finished { record, output, stderr_tail } = finished;
    let mut response = match failure(&record, &stderr_tail) {
        Some(problem) => problem.into_response(),
        None => {
            let content_type = plugin.settings.output_content_type.as_deref().unwrap_or(OCTETS);
            let content_type = HeaderValue::from_str(content_type).unwrap_or(HeaderValue::from_static(OCTETS));
            let (body, length) = raw(output).await.map_err(|error| Problem::internal(&error))?;
            ([(header::CONTENT_TYPE, content_type), (header::CONTENT_LENGTH, length.into())], body).into_response()
        }
    };
    add_facts(response.headers_mut(), &record);
    Ok(response)
}

/// The record with the output in it, whatever the outcome.
pub(super) async fn representation(finished: Finished, operator: bool) -> Result<Response, Problem> {
    let Finished { record, output, stderr_tail } = finished;
    if let Some(problem) = input_too_long(&record) {
        let mut response = problem.into_response();
        add_facts(response.headers_mut(), &record);
        return Ok(response);
    }
    let shown = if operator { record.clone() } else { record.clone().for_tenant() };
    let mut object = json!(shown);
    object["stderr_tail"] = Value::from(String::from_utf8_lossy(&stderr_tail));
    let body = match output.content {
        Content::Memory(bytes) => {
            match std::str::from_utf8(&bytes) {
                Ok(text) => object["output"] = Value::from(text),
                Err(_) => object["output_base64"] = Value::from(STANDARD.encode(&bytes)),
            }
            Body::from(object.to_string())
        }
        Content::File(file) => {
            let body = large(&object, file).await.map_err(|error| Problem::internal(&error))?;
            with_place(body, output.place)
        }
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(HeaderName::from_static("preference-applied"), HeaderValue::from_static("return=representation"));
    add_facts(headers, &record);
    Ok(response)
}

/// The problem that an outcome other than success is.
pub(super) fn failure(record: &JobRecord, stderr_tail: &[u8]) -> Option<Problem> {
    if let Some(problem) = input_too_long(record) {
        return Some(problem);
    }
    let outcome = record.outcome.as_ref().filter(|outcome| !outcome.is_success())?;
    let wall = outcome.limit() == Some(Limit::WallTimeMs.key());
    let (code, detail) = words(outcome);
    let problem = Problem::new(code, detail)
        .with("outcome", json!(outcome))
        .with("usage", json!(record.usage))
        .with("job_id", record.id.to_string())
        .with("stderr_tail", String::from_utf8_lossy(stderr_tail).into_owned());
    Some(if wall { problem.status(StatusCode::GATEWAY_TIMEOUT) } else { problem })
}

fn words(outcome: &Outcome) -> (Code, String) {
    match outcome {
        Outcome::Exited { exit_code } => (Code::Exited, format!("the job ended with exit code {exit_code}")),
        Outcome::Signaled { signal } => (Code::Signaled, format!("the job was ended by signal {signal}")),
        Outcome::Trapped { trap, .. } => (Code::Trapped, format!("the job trapped: {trap}")),
        Outcome::OverLimit { limit, allowed, reached } => {
            (Code::OverLimit, format!("the job may have {allowed} of `{limit}` and reached {reached}"))
        }
        Outcome::Cancelled => (Code::Cancelled, "the job was ended by order, or because nobody waited for it".into()),
        Outcome::NotRunnable { reason } => (Code::NotRunnable, format!("the plugin cannot be run: {reason}")),
        Outcome::Lost => (Code::Lost, "the job was lost by the host's fault; it can be sent again".into()),
    }
}

/// The one outcome that is the request's fault and not the job's.
fn input_too_long(record: &JobRecord) -> Option<Problem> {
    let over = record.outcome.as_ref()?.limit() == Some(Limit::InputBytes.key());
    over.then(|| {
        Problem::new(Code::PayloadTooLarge, "the input is longer than `input_bytes`; the job was ended")
            .with("maximum", Limit::InputBytes.to_json(record.limits.get(Limit::InputBytes)))
            .with("job_id", record.id.to_string())
    })
}

/// The headers that every synchronous answer has.
fn add_facts(headers: &mut HeaderMap, record: &JobRecord) {
    let usage = record.usage;
    let ms = |us: u64| format!("{}.{:03}", us / 1000, us % 1000);
    let (queue, launch, run) = (ms(usage.queue_us), ms(usage.launch_us), ms(usage.wall_us));
    let facts = [
        ("holm-job-id", record.id.to_string()),
        ("holm-outcome", record.outcome.as_ref().map_or("", Outcome::kind).to_owned()),
        ("holm-usage", json!(usage).to_string()),
        ("server-timing", format!("queue;dur={queue}, launch;dur={launch}, run;dur={run}")),
        ("vary", "Prefer".to_owned()),
    ];
    for (name, value) in facts {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

/// Output as a body, with its length.
async fn raw(output: Output) -> io::Result<(Body, u64)> {
    match output.content {
        Content::Memory(bytes) => {
            let length = bytes.len() as u64;
            Ok((Body::from(bytes), length))
        }
        Content::File(mut file) => {
            let length = file.metadata()?.len();
            file.rewind()?;
            let body = Body::from_stream(ReaderStream::with_capacity(tokio::fs::File::from_std(file), PIECE));
            Ok((with_place(body, output.place), length))
        }
    }
}

/// A body that gives `place` up when it is dropped.
fn with_place(body: Body, place: Option<Permit>) -> Body {
    Body::from_stream(body.into_data_stream().inspect_ok(move |_| _ = &place))
}

/// The JSON object `head` with a large output as one more member, never whole in memory.
async fn large(head: &Value, file: File) -> io::Result<Body> {
    let read = file.try_clone()?;
    let utf8 = tokio::task::spawn_blocking(move || is_utf8(read)).await.map_err(io::Error::other)??;
    let name = if utf8 { "output" } else { "output_base64" };
    let mut opening = head.to_string();
    opening.pop(); // the closing brace comes last
    opening.push_str(&format!(",\"{name}\":\""));
    Ok(Body::from_stream(pieces(opening, file, utf8)))
}

/// Reads a file to its end and tells whether it is UTF-8.
fn is_utf8(mut file: File) -> io::Result<bool> {
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(file);
    let (mut buffer, mut held) = (vec![0; PIECE], 0);
    loop {
        let n = reader.read(&mut buffer[held..])?;
        let end = held + n;
        match std::str::from_utf8(&buffer[..end]) {
            Ok(_) => held = 0,
            // a character that the next piece may complete
            Err(error) if error.error_len().is_none() && n > 0 => {
                buffer.copy_within(error.valid_up_to()..end, 0);
                held = end - error.valid_up_to();
            }
            Err(_) => return Ok(false),
        }
        if n == 0 {
            return Ok(held == 0);
        }
    }
}

enum Stage {
    Opening(String),
    Content(Vec<u8>),
    Done,
}

/// The text of the JSON: opening, the file's content escaped or in base64, and the end.
fn pieces(opening: String, file: File, utf8: bool) -> impl Stream<Item = io::Result<Bytes>> {
    let start = (Stage::Opening(opening), file);
    futures_util::stream::try_unfold(start, move |(stage, mut file)| async move {
        match stage {
            Stage::Opening(opening) => {
                file.rewind()?;
                Ok(Some((Bytes::from(opening), (Stage::Content(Vec::new()), file))))
            }
            Stage::Content(held) => {
                let read = move || next_piece(file, held, utf8);
                let (piece, held, file) = tokio::task::spawn_blocking(read).await.map_err(io::Error::other)??;
                match piece {
                    Some(piece) => Ok(Some((Bytes::from(piece), (Stage::Content(held), file)))),
                    None => Ok(Some((Bytes::from_static(b"\"}"), (Stage::Done, file)))),
                }
            }
            Stage::Done => Ok(None),
        }
    })
}

/// Encodes the next piece of the file. `held` is the beginning of a character that the last piece ended within.
fn next_piece(file: File, mut held: Vec<u8>, utf8: bool) -> io::Result<(Option<String>, Vec<u8>, File)> {
    (&file).take((PIECE - held.len()) as u64).read_to_end(&mut held)?;
    if held.is_empty() {
        return Ok((None, held, file));
    }
    if !utf8 {
        return Ok((Some(STANDARD.encode(&held)), Vec::new(), file));
    }
    let valid = match std::str::from_utf8(&held) {
        Ok(_) => held.len(),
        Err(error) => error.valid_up_to(),
    };
    let rest = held.split_off(valid);
    let quoted = Value::from(String::from_utf8_lossy(&held)).to_string();
    Ok((Some(quoted[1..quoted.len() - 1].to_owned()), rest, file))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    async fn round(content: &[u8]) -> Value {
        let body = large(&json!({"id": 1}), file(content)).await.unwrap();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    #[tokio::test]
    async fn large_text_comes_through_whatever_lies_on_the_seams() {
        for shift in 0..4 {
            let text = format!("{}{}\"\\\n\0", "x".repeat(shift), "ä€😀".repeat(30_000));
            let json = round(text.as_bytes()).await;
            assert!(json["output"] == text && json["id"] == 1 && json.get("output_base64").is_none());
        }
    }

    #[tokio::test]
    async fn other_bytes_come_in_base64() {
        let bytes: Vec<u8> = (0..=255_u8).cycle().take(200_001).collect();
        let json = round(&bytes).await;
        assert!(STANDARD.decode(json["output_base64"].as_str().unwrap()).unwrap() == bytes);
        let cut = [b"x".repeat(PIECE), vec![0xe2, 0x82]].concat();
        assert!(round(&cut).await["output_base64"].is_string(), "a character that never ends is no text");
    }

    #[test]
    fn nothing_is_text() {
        assert!(is_utf8(file(b"")).unwrap());
    }
}
