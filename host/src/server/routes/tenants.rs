//! Tenants: set up by the operator, seen by themselves.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use holm_sandbox::ceiling::CeilingError;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::launcher::SetCeilingError;
use crate::limit::{Limit, Runtime};
use crate::server::app::{App, Params};
use crate::server::body::{parse_object, read_json};
use crate::server::conditions::{Conditions, Tries, etag, etag_header, merge_patch};
use crate::server::problem::Problem;
use crate::store::{Change, Precondition, StoreError};
use crate::tenant::{Caller, QuotaKey, Tenant, TenantRow, TenantSettings};

/// A tenant.
#[derive(Serialize, ToSchema)]
pub(super) struct TenantView {
    /// Its name.
    name: String,
    /// What the operator has set.
    #[serde(flatten)]
    settings: TenantSettings,
    /// Whether nothing of it runs until it is resumed.
    paused: bool,
    /// The values that hold, and who has set each: `tenant` or `server`.
    #[schema(value_type = Object)]
    effective: Value,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

/// All tenants.
#[derive(Serialize, ToSchema)]
struct TenantList {
    tenants: Vec<TenantView>,
}

/// Lists the tenants.
#[utoipa::path(get, path = "/v1/tenants", responses((status = 200, body = inline(TenantList))))]
pub(super) async fn list(State(app): State<App>, caller: Caller) -> Result<Response, Problem> {
    caller.operator()?;
    let tenants = app.store.tenants().iter().map(|row| view(&app, row)).collect();
    Ok(Json(TenantList { tenants }).into_response())
}

/// A tenant's settings, and the values that hold.
#[utoipa::path(get, path = "/v1/tenants/{t}", params(("t" = String, Path, description = "the tenant")),
    responses((status = 200, body = inline(TenantView))))]
pub(super) async fn get(
    State(app): State<App>,
    caller: Caller,
    Params(name): Params<String>,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &name)?;
    Ok(answer(&app, StatusCode::OK, tenant.row()))
}

/// Makes a tenant, or replaces its settings.
#[utoipa::path(put, path = "/v1/tenants/{t}", params(("t" = String, Path, description = "the tenant")),
    request_body = inline(TenantSettings),
    responses((status = 201, body = inline(TenantView)), (status = 200, body = inline(TenantView))))]
pub(super) async fn put(
    State(app): State<App>,
    caller: Caller,
    Params(name): Params<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let name = app.operator_on(&caller, &name)?;
    let conditions = Conditions::of(&headers)?;
    let settings: TenantSettings = read_json(&headers, body, app.connections.reading).await?;
    settings.check(&TenantSettings::default(), &app.job_maximums)?;
    let row = TenantRow { name, settings, created_at: Timestamp::now() };
    let change = store(&app, row.clone(), precondition(conditions)).await?;
    let status = if change == Change::Created { StatusCode::CREATED } else { StatusCode::OK };
    let stored = app.store.tenant(&row.name).ok_or(StoreError::NoTenant)?;
    Ok(answer(&app, status, &stored))
}

/// Changes some settings; `null` restores a default.
#[utoipa::path(patch, path = "/v1/tenants/{t}", params(("t" = String, Path, description = "the tenant")),
    request_body = inline(TenantSettings), responses((status = 200, body = inline(TenantView))))]
pub(super) async fn patch(
    State(app): State<App>,
    caller: Caller,
    Params(name): Params<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    existing(&app, &caller, &name)?;
    let conditions = Conditions::of(&headers)?;
    let patch: Map<String, Value> = read_json(&headers, body, app.connections.reading).await?;
    let mut tries = Tries::of(&conditions);
    loop {
        let tenant = existing(&app, &caller, &name)?;
        let done = lay_over(&app, tenant.row(), patch.clone(), conditions.clone()).await;
        if !tries.go_on(&done) {
            return done;
        }
    }
}

/// Lays a patch over what is there now, and stores the whole if that is still there then.
async fn lay_over(
    app: &App,
    now: &TenantRow,
    patch: Map<String, Value>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let settings: TenantSettings = patched(&now.settings, patch, TenantSettings::knows)?;
    settings.check(&now.settings, &app.job_maximums)?;
    let row = TenantRow { settings, ..now.clone() };
    let seen = row_etag(now);
    let allowed: Precondition<TenantRow> = Box::new(move |row| {
        let tag = row.map(row_etag);
        tag.as_ref() == Some(&seen) && conditions.hold(tag.as_deref())
    });
    store(app, row.clone(), allowed).await?;
    Ok(answer(app, StatusCode::OK, &row))
}

/// Deletes a tenant with everything that it has; its running jobs are ended.
#[utoipa::path(delete, path = "/v1/tenants/{t}", params(("t" = String, Path, description = "the tenant")),
    responses((status = 204, description = "deleted")))]
pub(super) async fn delete(
    State(app): State<App>,
    caller: Caller,
    Params(name): Params<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let tenant = existing(&app, &caller, &name)?;
    let (name, allowed) = (tenant.name().clone(), precondition(Conditions::of(&headers)?));
    to_its_end(async move {
        let _one_at_a_time = app.tenant_changes.lock().await;
        app.store.delete_tenant(name.clone(), allowed).await?;
        app.jobs.forget(&name).await;
        app.compiler.forget(&name);
        app.launcher.forget_tenant(name);
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// Does a change in a task of its own: a client that goes away leaves no half of it.
pub(super) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Problem>> + Send + 'static,
) -> Result<T, Problem> {
    tokio::spawn(work).await.unwrap_or_else(|error| Err(Problem::internal(&error)))
}

/// Makes the kernel hold a tenant to its settings, then stores them. What the kernel will not have is not stored; what
/// is not stored, the kernel holds nobody to.
async fn store(app: &App, row: TenantRow, allowed: Precondition<TenantRow>) -> Result<Change, Problem> {
    let app = app.clone();
    to_its_end(async move {
        let _one_at_a_time = app.tenant_changes.lock().await;
        let name = row.name.clone();
        // whoever asks for a state that is not there is told so without an effect on what runs
        let now = app.store.tenant(&name);
        if !allowed(now.as_deref()) {
            return Err(StoreError::Changed.into());
        }
        let seen = now.as_deref().map(row_etag);
        let before = now.map(|now| now.settings.ceiling()).unwrap_or_default();
        let changes = before != row.settings.ceiling();
        if changes {
            // what waits for jobs was made under the ceiling that goes
            app.jobs.unpark(&name, None);
            let set = app.launcher.set_ceiling(name.clone(), row.settings.ceiling()).await;
            set.map_err(|error| refusal(error, &row.settings))?;
        }
        let stored = app.store.put_tenant(row, Box::new(move |row| row.map(row_etag) == seen)).await;
        if stored.is_err() && changes {
            // it held a moment ago
            app.launcher.set_ceiling(name, before).await?;
        }
        Ok(stored?)
    })
    .await
}

/// A ceiling that was refused, with what of the settings it is about, where the refusal does not say that itself.
fn refusal(error: SetCeilingError, settings: &TenantSettings) -> Problem {
    let given = match &error {
        SetCeilingError::Refused(CeilingError::NotAvailable { field, .. } | CeilingError::Refused { field, .. }) => {
            json!(settings).pointer(&format!("/{}", field.replace('.', "/"))).cloned()
        }
        _ => None,
    };
    let problem = Problem::from(error);
    given.into_iter().fold(problem, |problem, given| problem.with("given", given))
}

/// An existing tenant, for the operator.
pub(super) fn existing(app: &App, caller: &Caller, name: &str) -> Result<Tenant, Problem> {
    let tenant = app.tenant(caller, name)?;
    caller.operator()?;
    Ok(tenant)
}

fn precondition(conditions: Conditions) -> Precondition<TenantRow> {
    Box::new(move |row| conditions.hold(row.map(row_etag).as_deref()))
}

fn row_etag(row: &TenantRow) -> String {
    etag(&(&row.name, &row.settings, row.created_at))
}

/// Lays a merge patch over settings, of which `knows` tells whether a section of them has a member of some name.
pub(super) fn patched<T>(
    settings: &T,
    patch: Map<String, Value>,
    knows: impl Fn(&str, &str) -> bool,
) -> Result<T, Problem>
where
    T: Serialize + serde::de::DeserializeOwned + Default,
{
    let mut target = json!(settings);
    // a null takes a member away, also one that never was: names are checked before they vanish
    let probe: Map<String, Value> =
        patch.iter().filter(|(_, v)| v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
    check_names::<T>(&probe)?;
    for (section, members) in patch.iter().filter_map(|(section, value)| Some((section, value.as_object()?))) {
        if let Some((name, _)) = members.iter().find(|(name, value)| value.is_null() && !knows(section, name)) {
            return Err(Problem::malformed(format!("JSON: `{section}` has no `{name}`")));
        }
    }
    merge_patch(&mut target, Value::Object(patch));
    parse_object(target.to_string().as_bytes())
}

/// Finds unknown members among those that are set to null.
fn check_names<T: Serialize + serde::de::DeserializeOwned>(nulls: &Map<String, Value>) -> Result<(), Problem> {
    for key in nulls.keys() {
        let probe = json!({ key: null });
        match serde_json::from_value::<T>(probe) {
            Err(error) if error.to_string().starts_with("unknown field") => {
                return Err(Problem::malformed(format!("JSON: {error}")));
            }
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn answer(app: &App, status: StatusCode, row: &TenantRow) -> Response {
    let tag = [(header::ETAG, etag_header(&row_etag(row)))];
    (status, tag, Json(view(app, row))).into_response()
}

fn view(app: &App, row: &TenantRow) -> TenantView {
    TenantView {
        name: row.name.to_string(),
        settings: row.settings.clone(),
        paused: app.store.is_paused(&row.name),
        effective: effective(app, row),
        created_at: row.created_at,
    }
}

/// Every value that holds for the tenant, with who has set it.
fn effective(app: &App, row: &TenantRow) -> Value {
    let by = |tenant: bool| if tenant { "tenant" } else { "server" };
    let settings = &row.settings;
    let quota = settings.quota();
    let quotas: Map<String, Value> = QuotaKey::ALL
        .into_iter()
        .map(|key| {
            let set_by = by(settings.sets_quota(key.word()));
            (key.word().to_owned(), json!({"value": quota.get(key), "set_by": set_by}))
        })
        .collect();
    let (defaults, maximums) = (settings.job_defaults(), settings.job_maximums());
    let most = crate::limit::Maximums::least_of(vec![app.job_maximums.clone(), maximums.clone()]);
    let limits: Map<String, Value> = Limit::ALL
        .into_iter()
        .map(|limit| {
            let default = |runtime| {
                let limits = crate::limit::Limits::resolve(runtime, &[&defaults, &app.job_defaults], &most);
                limit.to_json(limits.get(limit))
            };
            let own_maximum = maximums.get(limit).is_some_and(|value| value == most.of(limit));
            let value = json!({
                "default": {
                    "native": if limit.applies_to(Runtime::Native) { default(Runtime::Native) } else { Value::Null },
                    "wasm": default(Runtime::Wasm),
                    "set_by": by(defaults.get(limit).is_some()),
                },
                "maximum": {"value": limit.to_json(most.of(limit)), "set_by": by(own_maximum)},
            });
            (limit.key().to_owned(), value)
        })
        .collect();
    let priority = json!({"value": settings.priority(), "set_by": by(settings.sets_priority())});
    json!({"quota": quotas, "job_limits": limits, "priority": priority})
}
