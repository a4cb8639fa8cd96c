//! Tenants as a whole: paused and resumed, and what they have used.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::tenants::{TenantView, answer, existing};
use crate::server::app::{App, Params, Query};
use crate::server::problem::{Code, Problem};
use crate::store::{Span, StoreError, Totals};
use crate::tenant::Caller;

/// A stretch of time.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct UsageQuery {
    /// Jobs that ended from then on; from the making of the tenant if not given.
    #[param(value_type = Option<String>)]
    from: Option<Timestamp>,
    /// Jobs that ended before; now if not given.
    #[param(value_type = Option<String>)]
    to: Option<Timestamp>,
}

/// What a tenant's jobs have used, from the kernel's counters after the end of each.
#[derive(Serialize, ToSchema)]
struct UsageView {
    /// The tenant.
    tenant: String,
    /// Jobs that ended from then on: the beginning of a minute; of an hour where that is more than two days ago.
    #[schema(value_type = String, format = DateTime)]
    from: Timestamp,
    /// And before then: the end of one.
    #[schema(value_type = String, format = DateTime)]
    to: Timestamp,
    #[serde(flatten)]
    totals: Totals,
}

/// Lets nothing of a tenant run until it is resumed. Answers when nothing does. The wall clocks of its jobs stand
/// meanwhile; jobs that are submitted wait for as long as they may wait for a place, and are refused then.
#[utoipa::path(post, path = "/v1/tenants/{t}/pause", params(("t" = String, Path, description = "the tenant")),
    responses((status = 200, body = inline(TenantView)), (status = 409, description = "something of it did not stop in time: then everything goes on", body = inline(crate::server::ProblemBody))))]
pub(super) async fn pause(
    State(app): State<App>,
    caller: Caller,
    Params(name): Params<String>,
) -> Result<Response, Problem> {
    set_paused(&app, &caller, &name, true).await
}

/// Lets a paused tenant go on. Jobs that have been paused by themselves stay so.
#[utoipa::path(post, path = "/v1/tenants/{t}/resume", params(("t" = String, Path, description = "the tenant")),
    responses((status = 200, body = inline(TenantView))))]
pub(super) async fn resume(
    State(app): State<App>,
    caller: Caller,
    Params(name): Params<String>,
) -> Result<Response, Problem> {
    set_paused(&app, &caller, &name, false).await
}

/// Sums of what a tenant's jobs have used that ended in a stretch of time. They survive a restart. Minutes are kept for two
/// days, hours for 400.
#[utoipa::path(get, path = "/v1/tenants/{t}/usage",
    params(("t" = String, Path, description = "the tenant"), UsageQuery),
    responses((status = 200, body = inline(UsageView)), (status = 422, description = "`from` is not before `to`", body = inline(crate::server::ProblemBody))))]
pub(super) async fn usage(
    State(app): State<App>,
    caller: Caller,
    Params(name): Params<String>,
    query: Query<UsageQuery>,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &name)?;
    let (query, now) = (query.get()?, Timestamp::now());
    let (from, to) = (query.from.unwrap_or(tenant.row().created_at), query.to.unwrap_or(now));
    if from >= to {
        let detail = format!("`from` is {from}, which is not before `to`, {to}");
        return Err(Problem::new(Code::InvalidRange, detail).with("from", from.to_string()).with("to", to.to_string()));
    }
    let span = Span::around(from, to, now);
    let totals = app.jobs.usage(tenant.name(), span).await?;
    // what lies beyond what a time can be is cut to it
    let time = |second: i64, otherwise| Timestamp::from_second(second).unwrap_or(otherwise);
    let (from, to) = (time(span.from, Timestamp::MIN), time(span.to, Timestamp::MAX));
    Ok(Json(UsageView { tenant: tenant.name().to_string(), from, to, totals }).into_response())
}

/// Lets the kernel hold a tenant, or let go of it, and keeps that in mind. In a task of its own: a client that goes away
/// leaves no half of it.
async fn set_paused(app: &App, caller: &Caller, name: &str, paused: bool) -> Result<Response, Problem> {
    let tenant = existing(app, caller, name)?;
    let (app, name) = (app.clone(), tenant.name().clone());
    let work = tokio::spawn(async move {
        let _one_at_a_time = app.tenant_changes.lock().await;
        app.jobs.pause_tenant(&app.launcher, &name, paused).await?;
        if let Err(error) = app.store.set_paused(name.clone(), paused).await {
            // it has been deleted meanwhile, or the disk is full
            app.jobs.pause_tenant(&app.launcher, &name, !paused).await?;
            return Err(error.into());
        }
        let row = app.store.tenant(&name).ok_or(StoreError::NoTenant)?;
        Ok(answer(&app, StatusCode::OK, &row))
    });
    work.await.unwrap_or_else(|error| Err(Problem::internal(&error)))
}
