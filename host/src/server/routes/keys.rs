//! Tenant keys: made, listed and deleted by the operator.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::server::app::{App, Params};
use crate::server::problem::Problem;
use crate::tenant::{Caller, Key, KeyInfo};

/// A key, as it is shown once.
#[derive(Serialize, ToSchema)]
struct NewKey {
    /// By which it is deleted.
    id: Uuid,
    /// The key itself. It is not stored and cannot be shown again.
    key: String,
}

/// A key, as it is listed.
#[derive(Serialize, ToSchema)]
struct ListedKey {
    /// By which it is deleted.
    id: Uuid,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

/// The keys of a tenant.
#[derive(Serialize, ToSchema)]
struct KeyList {
    keys: Vec<ListedKey>,
}

/// Makes a key for a tenant.
#[utoipa::path(post, path = "/v1/tenants/{t}/keys", params(("t" = String, Path, description = "the tenant")),
    responses((status = 201, body = inline(NewKey))))]
pub(super) async fn post(
    State(app): State<App>,
    caller: Caller,
    Params(tenant): Params<String>,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    caller.operator()?;
    let key = Key::generate().map_err(|error| Problem::internal(&error))?;
    let info = KeyInfo { id: Uuid::now_v7(), tenant: tenant.name().clone(), created_at: Timestamp::now() };
    let id = info.id;
    app.store.add_key(info, key.hash()).await?;
    let no_store = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    Ok((StatusCode::CREATED, no_store, Json(NewKey { id, key: key.reveal().to_owned() })).into_response())
}

/// Lists a tenant's keys, oldest first; the keys themselves are not known.
#[utoipa::path(get, path = "/v1/tenants/{t}/keys", params(("t" = String, Path, description = "the tenant")),
    responses((status = 200, body = inline(KeyList))))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(tenant): Params<String>,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    caller.operator()?;
    let keys = app.store.keys(tenant.name());
    let keys = keys.into_iter().map(|key| ListedKey { id: key.id, created_at: key.created_at }).collect();
    Ok(Json(KeyList { keys }).into_response())
}

/// Deletes a key. It is of no use any more when this answers.
#[utoipa::path(delete, path = "/v1/tenants/{t}/keys/{id}",
    params(("t" = String, Path, description = "the tenant"), ("id" = String, Path, description = "the key's id")),
    responses((status = 204, description = "deleted")))]
pub(super) async fn delete(
    State(app): State<App>,
    caller: Caller,
    Params((tenant, id)): Params<(String, String)>,
) -> Result<StatusCode, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    let id = id.parse::<Uuid>().map_err(|_| Problem::not_found())?;
    if !app.store.keys(tenant.name()).iter().any(|key| key.id == id) {
        return Err(Problem::not_found());
    }
    caller.operator()?;
    match app.store.delete_key(tenant.name().clone(), id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::not_found()),
    }
}
