//! Jobs: run, looked up, listed, cancelled.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::job_output;
use super::job_request::{JobSettings, prefers_representation};
use super::plugins;
use crate::job::{Artifact, Input, InputBroken, JobRecord, JobRequest, Selection, State as JobState, Streams, Supply};
use crate::limit::Limit;
use crate::plugin::{Interface, Plugin};
use crate::server::app::{App, Params, Query};
use crate::server::body::{PacedBody, refuse_encoding, refuse_longer_than};
use crate::server::problem::{Code, Problem};
use crate::tenant::{Caller, Tenant};

/// Jobs listed at once if the request does not say, and at most.
const LIST_DEFAULT: usize = 50;
const LIST_MOST: usize = 1000;

/// How often a submission looks again for a plugin that is replaced at the same moment.
const RESOLVE_TRIES: usize = 5;

/// Which jobs to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    /// `queued`, `running`, `paused` or `finished` only.
    state: Option<String>,
    /// Jobs of this plugin only.
    plugin: Option<String>,
    /// At most so many; 50 if not given, 1,000 at most.
    limit: Option<usize>,
    /// Where the last page ended: its `next_cursor`.
    cursor: Option<Uuid>,
}

/// Jobs, newest first.
#[derive(Serialize, ToSchema)]
struct JobList {
    jobs: Vec<JobRecord>,
    /// Where the next page begins; null on the last one.
    next_cursor: Option<Uuid>,
}

/// Runs a job. The body is its input; the answer is its standard output.
#[utoipa::path(post, path = "/v1/tenants/{t}/plugins/{p}/jobs",
    params(
        ("t" = String, Path, description = "the tenant"), ("p" = String, Path, description = "the plugin"),
        ("Holm-Limits" = Option<String>, Header, description = "limits of this job, a JSON object (`JobLimits`)"),
        ("Holm-Args" = Option<String>, Header, description = "arguments, a JSON array of strings; replaces the plugin's"),
        ("Holm-Env" = Option<String>, Header, description = "environment, a JSON object of strings; laid over the plugin's"),
        ("Prefer" = Option<String>, Header, description = "`return=representation`: answer with the record and the output in it"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "the input"),
    responses(
        (status = 200, description = "the job ended with exit code 0: its standard output", content_type = "application/octet-stream", body = Vec<u8>,
            headers(("Holm-Job-Id" = String), ("Holm-Outcome" = String), ("Holm-Usage" = String), ("Server-Timing" = String))),
        (status = 413, description = "the input is longer than `input_bytes`", body = inline(crate::server::ProblemBody)),
        (status = 429, description = "a quota of the tenant is used up", body = inline(crate::server::ProblemBody)),
        (status = 502, description = "the job ended in any other way: `code` is the outcome's kind", body = inline(crate::server::ProblemBody)),
        (status = 503, description = "the server is full or stopping, or the job was lost", body = inline(crate::server::ProblemBody)),
        (status = 504, description = "the job reached `wall_time_ms`", body = inline(crate::server::ProblemBody)),
    ))]
pub(super) async fn post(
    State(app): State<App>,
    caller: Caller,
    Params((tenant, plugin)): Params<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    let (plugin, artifact) = resolve(&app, &tenant, &plugin)?;
    if plugin.interface != Interface::Command {
        return Err(Problem::new(Code::WrongInterface, "the plugin answers HTTP requests; call it by `/fn`"));
    }
    refuse_encoding(&headers)?;
    let settings = JobSettings::of(&app, &tenant, &plugin, &headers)?;
    refuse_longer_than(&headers, settings.limits.get(Limit::InputBytes))?;
    if app.is_draining() {
        return Err(crate::admission::AdmissionError::Draining.into());
    }
    let JobSettings { limits, defaults, args, env, content_type } = settings;
    let request = JobRequest { tenant, plugin: plugin.clone(), limits, defaults, args, env, content_type };
    let body = PacedBody::new(body, app.connections.reading);
    let input: Input = Box::pin(body.map(|chunk| chunk.map_err(|_| InputBroken)));
    let submitted = app.jobs.submit(request, Supply { artifact, streams: Streams::Command(input) });
    let finished = submitted.finished().await?;
    Ok(if prefers_representation(&headers) {
        job_output::representation(finished, caller == Caller::Operator).await?
    } else {
        job_output::bare(finished, &plugin).await?
    })
}

/// The plugin and its open artifact. A plugin that is replaced between the look at it and the opening of its file is
/// looked at again.
pub(super) fn resolve(app: &App, tenant: &Tenant, name: &str) -> Result<(std::sync::Arc<Plugin>, Artifact), Problem> {
    for _ in 0..RESOLVE_TRIES {
        let plugin = plugins::existing(app, tenant, name)?;
        if let Some(artifact) = app.jobs.open(&plugin).map_err(|error| Problem::internal(&error))? {
            return Ok((plugin, artifact));
        }
    }
    Err(Problem::internal(&std::io::Error::other(format!("the artifact of `{name}` is not in the store"))))
}

/// Lists a tenant's jobs, newest first: all that wait or run, and the last 1,000 that are over.
#[utoipa::path(get, path = "/v1/tenants/{t}/jobs", params(("t" = String, Path, description = "the tenant"), ListQuery),
    responses((status = 200, body = inline(JobList))))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(tenant): Params<String>,
    query: Query<ListQuery>,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    let query = query.get()?;
    let state = match query.state.as_deref() {
        None => None,
        Some(word) => Some(JobState::from_word(word).ok_or_else(|| {
            Problem::malformed(format!(
                "`state` is queued, running, paused or finished, not `{}`",
                word.escape_default()
            ))
        })?),
    };
    let limit = query.limit.unwrap_or(LIST_DEFAULT);
    if !(1..=LIST_MOST).contains(&limit) {
        return Err(Problem::malformed(format!("`limit` is 1 to {LIST_MOST}")));
    }
    // one more than asked for tells whether there is another page
    let selection = Selection { state, plugin: query.plugin, before: query.cursor, limit: limit + 1 };
    let mut jobs = app.jobs.list(tenant.name(), &selection);
    let more = jobs.len() > limit;
    jobs.truncate(limit);
    let next_cursor = more.then(|| jobs.last().map(|job| job.id)).flatten();
    let jobs = jobs.into_iter().map(|job| shown(&caller, job)).collect();
    Ok(Json(JobList { jobs, next_cursor }).into_response())
}

/// A job's record.
#[utoipa::path(get, path = "/v1/jobs/{id}", params(("id" = String, Path, description = "the job")),
    responses((status = 200, body = inline(JobRecord))))]
pub(super) async fn get(
    State(app): State<App>,
    caller: Caller,
    Params(id): Params<String>,
) -> Result<Response, Problem> {
    let (_, record) = find(&app, &caller, &id)?;
    Ok(Json(shown(&caller, record)).into_response())
}

/// Ends a job. Answers with its record when every process of it is dead.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", params(("id" = String, Path, description = "the job")),
    responses((status = 200, body = inline(JobRecord)), (status = 409, description = "the job is over already", body = inline(crate::server::ProblemBody))))]
pub(super) async fn cancel(
    State(app): State<App>,
    caller: Caller,
    Params(id): Params<String>,
) -> Result<Response, Problem> {
    let (id, _) = find(&app, &caller, &id)?;
    match app.jobs.cancel(&id).await {
        Some(record) => Ok((StatusCode::OK, Json(shown(&caller, record))).into_response()),
        None => Err(Problem::new(Code::JobFinished, "the job is over already")),
    }
}

/// A job that the caller may see.
pub(super) fn find(app: &App, caller: &Caller, id: &str) -> Result<(Uuid, JobRecord), Problem> {
    let id = id.parse::<Uuid>().map_err(|_| Problem::not_found())?;
    let (tenant, record) = app.jobs.record(&id).ok_or_else(Problem::not_found)?;
    // counts the request, and is the same 404 for another tenant's job as for none
    app.tenant(caller, tenant.as_str())?;
    Ok((id, record))
}

pub(super) fn shown(caller: &Caller, record: JobRecord) -> JobRecord {
    if *caller == Caller::Operator { record } else { record.for_tenant() }
}
