//! Jobs while they run: paused and resumed, put under other limits, looked at.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use holm_sandbox::usage::ProcessInfo;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::jobs::{find, shown};
use crate::job::{ControlError, JobRecord, StatsRecord};
use crate::server::app::{App, Params};
use crate::server::body::read_json;
use crate::server::problem::{Code, Problem};
use crate::tenant::Caller;

/// Other limits for a job that runs. Those that are not given stay; `null` puts back what holds without the request's own.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct JobPatch {
    /// As in the schema `JobLimits`: `memory_bytes`, `cpu_cores`, `cpu_weight`, `cpu_time_ms`, `wall_time_ms`, `pids`,
    /// `output_bytes` and `input_bytes`. The others cannot be changed while a job runs.
    limits: Option<Map<String, Value>>,
}

/// The processes of a job.
#[derive(Serialize, ToSchema)]
struct ProcessList {
    processes: Vec<ProcessView>,
}

/// A process of a job.
#[derive(Serialize, ToSchema)]
struct ProcessView {
    /// Its pid as the job sees it. The host's own init of a native job is 1.
    pid: u32,
    /// Its pid on the host. For the operator only.
    #[serde(skip_serializing_if = "Option::is_none")]
    host_pid: Option<u32>,
    /// `running`, `sleeping`, `blocked`, `stopped`, `traced`, `zombie`, `dead`, or the kernel's letter for another.
    state: String,
    /// Its threads.
    threads: u32,
    /// Its name, of 15 bytes at most, which it can choose.
    command: String,
}

/// Lets nothing of a job run until it is resumed. Answers with its record when nothing of it does. Its wall clock stands
/// meanwhile. Pausing a paused job has no effect.
#[utoipa::path(post, path = "/v1/jobs/{id}/pause", params(("id" = String, Path, description = "the job")),
    responses((status = 200, body = inline(JobRecord)), (status = 409, description = "the job is over, has not begun, or did not stop in time: then it goes on", body = inline(crate::server::ProblemBody))))]
pub(super) async fn pause(
    State(app): State<App>,
    caller: Caller,
    Params(id): Params<String>,
) -> Result<Response, Problem> {
    let (id, _) = find(&app, &caller, &id)?;
    Ok(Json(shown(&caller, app.jobs.pause(&id).await?)).into_response())
}

/// Lets a paused job go on. Resuming a job that runs has no effect.
#[utoipa::path(post, path = "/v1/jobs/{id}/resume", params(("id" = String, Path, description = "the job")),
    responses((status = 200, body = inline(JobRecord)), (status = 409, description = "the job is over or has not begun, its tenant is paused, or its place is lent", body = inline(crate::server::ProblemBody))))]
pub(super) async fn resume(
    State(app): State<App>,
    caller: Caller,
    Params(id): Params<String>,
) -> Result<Response, Problem> {
    let (id, _) = find(&app, &caller, &id)?;
    Ok(Json(shown(&caller, app.jobs.resume(&id).await?)).into_response())
}

/// Puts a job that runs under other limits. Answers with its record when they hold. A job that has passed one of them
/// already is ended by it: then the record is that of its end.
#[utoipa::path(patch, path = "/v1/jobs/{id}", params(("id" = String, Path, description = "the job")),
    request_body = inline(JobPatch),
    responses((status = 200, body = inline(JobRecord)),
        (status = 409, description = "the job is over or has not begun", body = inline(crate::server::ProblemBody)),
        (status = 422, description = "a limit is out of its range, or cannot be changed while a job runs", body = inline(crate::server::ProblemBody))))]
pub(super) async fn patch(
    State(app): State<App>,
    caller: Caller,
    Params(id): Params<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (id, record) = find(&app, &caller, &id)?;
    let row = record.tenant.parse().ok().and_then(|name| app.store.tenant(&name));
    let tenant = caller.tenant(row)?;
    let patch: JobPatch = read_json(&headers, body, app.connections.reading).await?;
    let maximums = tenant.job_maximums(&app.job_maximums);
    let record = app.jobs.change_limits(&id, patch.limits.unwrap_or_default(), maximums).await?;
    Ok(Json(shown(&caller, record)).into_response())
}

/// What a job uses now, and has used so far.
#[utoipa::path(get, path = "/v1/jobs/{id}/stats", params(("id" = String, Path, description = "the job")),
    responses((status = 200, body = inline(StatsRecord))))]
pub(super) async fn stats(
    State(app): State<App>,
    caller: Caller,
    Params(id): Params<String>,
) -> Result<Response, Problem> {
    let (id, _) = find(&app, &caller, &id)?;
    let stats = app.jobs.stats(&id).await.ok_or_else(Problem::not_found)?;
    Ok(Json(stats).into_response())
}

/// The processes of a job: those that it has at this moment; none before it begins and after its end.
#[utoipa::path(get, path = "/v1/jobs/{id}/processes", params(("id" = String, Path, description = "the job")),
    responses((status = 200, body = inline(ProcessList))))]
pub(super) async fn processes(
    State(app): State<App>,
    caller: Caller,
    Params(id): Params<String>,
) -> Result<Response, Problem> {
    let (id, _) = find(&app, &caller, &id)?;
    let operator = caller == Caller::Operator;
    let view = |process: ProcessInfo| ProcessView {
        pid: process.pid,
        host_pid: operator.then_some(process.host_pid),
        state: word(process.state),
        threads: process.threads,
        command: process.command,
    };
    let processes = app.jobs.processes(&id).await?.into_iter().map(view).collect();
    Ok(Json(ProcessList { processes }).into_response())
}

/// The kernel's letter for a process's state in a word (`proc_pid_status(5)`).
fn word(state: char) -> String {
    match state {
        'R' => "running",
        'S' => "sleeping",
        'D' => "blocked",
        'T' => "stopped",
        't' => "traced",
        'Z' => "zombie",
        'X' => "dead",
        other => return other.to_string(),
    }
    .to_owned()
}

impl From<ControlError> for Problem {
    fn from(error: ControlError) -> Self {
        let conflict = |code: Code, detail: String| Self::new(code, detail);
        let detail = error.to_string();
        match error {
            ControlError::Finished => conflict(Code::JobFinished, detail),
            ControlError::NotBegun => conflict(Code::JobNotBegun, detail).retry_after(1),
            ControlError::Busy => conflict(Code::Busy, detail).retry_after(1),
            ControlError::NotFrozen => conflict(Code::NotFrozen, detail).retry_after(1),
            ControlError::TenantPaused => conflict(Code::TenantPaused, detail).status(axum::http::StatusCode::CONFLICT),
            ControlError::Lent => conflict(Code::PlaceLent, detail),
            ControlError::Limit(error) => error.into(),
            ControlError::NoRoom(error) => error.into(),
            ControlError::Refused { limit, .. } => Self::new(Code::NotAvailable, detail).with("field", limit),
            ControlError::Launcher(_) => Self::internal(&error),
        }
    }
}
