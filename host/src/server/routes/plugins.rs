//! Plugins: uploaded, set up and deleted by their tenant.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::tenants::{patched, to_its_end};
use crate::admission::AdmissionError;
use crate::limit::{Limits, Runtime};
use crate::plugin::{Interface, Plugin, PluginSettings};
use crate::server::app::{App, Params, Query, invalid_name};
use crate::server::body::{
    BodyError, PacedBody, media_type, parse_object, read_json, refuse_encoding, refuse_longer_than, too_large,
};
use crate::server::conditions::{Conditions, Tries, etag, etag_header};
use crate::server::crowd::Member;
use crate::server::form::{Form, FormError, Part, whole_bytes};
use crate::server::problem::{Code, Problem};
use crate::store::{Change, Precondition, StoreError};
use crate::tenant::{Caller, QuotaKey, Tenant};
use crate::upload::{CompileError, Upload, UploadError, receive};

/// A plugin.
#[derive(Serialize, ToSchema)]
struct PluginView {
    /// Its name.
    name: String,
    /// The digest of the uploaded bytes.
    revision: String,
    /// What runs it.
    runtime: Runtime,
    /// Length of the uploaded bytes.
    bytes: u64,
    #[serde(flatten)]
    settings: PluginSettings,
    /// The limits of a job that gives none.
    #[schema(value_type = Object)]
    effective_limits: Limits,
    /// When the name was first uploaded to.
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// When the revision or a setting last changed.
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
}

/// A tenant's plugins.
#[derive(Serialize, ToSchema)]
struct PluginList {
    plugins: Vec<PluginView>,
}

/// Settings that may stand in the URI of an upload.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct UploadQuery {
    /// How the plugin is called.
    interface: Option<Interface>,
    /// Whether `/fn` may be called without a key.
    public: Option<bool>,
}

impl UploadQuery {
    /// The settings with those of the query over them.
    fn over(&self, mut settings: PluginSettings) -> PluginSettings {
        settings.interface = self.interface.or(settings.interface);
        settings.public = self.public.unwrap_or(settings.public);
        settings
    }
}

/// Lists a tenant's plugins.
#[utoipa::path(get, path = "/v1/tenants/{t}/plugins", params(("t" = String, Path, description = "the tenant")),
    responses((status = 200, body = inline(PluginList))))]
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Params(tenant): Params<String>,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    let plugins = app.store.plugins(tenant.name()).iter().map(|plugin| view(&app, &tenant, plugin)).collect();
    Ok(Json(PluginList { plugins }).into_response())
}

/// A plugin's settings.
#[utoipa::path(get, path = "/v1/tenants/{t}/plugins/{p}",
    params(("t" = String, Path, description = "the tenant"), ("p" = String, Path, description = "the plugin")),
    responses((status = 200, body = inline(PluginView))))]
pub(super) async fn get(
    State(app): State<App>,
    caller: Caller,
    Params((tenant, name)): Params<(String, String)>,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    let plugin = existing(&app, &tenant, &name)?;
    Ok(answer(&app, StatusCode::OK, &tenant, &plugin))
}

/// Uploads a plugin. It can run when this answers with 200 or 201; otherwise the old revision stays.
#[utoipa::path(put, path = "/v1/tenants/{t}/plugins/{p}", params(
        ("t" = String, Path, description = "the tenant"), ("p" = String, Path, description = "the plugin"), UploadQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream",
        description = "an ELF program, a WebAssembly module or component, or WebAssembly text; or multipart/form-data with the parts `artifact` and `manifest`"),
    responses((status = 201, body = inline(PluginView)), (status = 200, body = inline(PluginView))))]
pub(super) async fn put(
    State(app): State<App>,
    caller: Caller,
    Params((tenant, name)): Params<(String, String)>,
    query: Query<UploadQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    let name = name.parse().map_err(|error| invalid_name(&error))?;
    let query = query.get()?;
    let conditions = Conditions::of(&headers)?;
    let (_place, upload, manifest) = receive_upload(&app, &tenant, &headers, body).await?;
    let (runtime, maximums) = (upload.runtime, tenant.job_maximums(&app.job_maximums));
    // a manifest is the whole of what is set; an artifact alone keeps what was set before
    let kept = || match &manifest {
        Some(_) => PluginSettings::default(),
        None => app.store.plugin(tenant.name(), &name).map(|now| now.settings.clone()).unwrap_or_default(),
    };
    let check = |kept: &PluginSettings| {
        let settings = query.over(manifest.as_ref().unwrap_or(kept).clone());
        settings.check(kept, runtime, &maximums).map(|()| settings)
    };
    check(&kept())?;
    let ready = upload.make_ready(app.store.dir(), &app.compiler, &tenant).await.map_err(|error| not_ready(&error))?;

    // an upload takes long enough for a change of the settings to come between
    let kept = kept();
    let settings = check(&kept)?;
    let interface = settings.interface_of(ready.exports).map_err(|error| invalid_artifact(error.to_string()))?;
    let allowed: Precondition<Plugin> = Box::new(move |now| {
        let still = || now.map(|now| now.settings.clone()).unwrap_or_default() == kept;
        (manifest.is_some() || still()) && conditions.hold(now.map(plugin_etag).as_deref())
    });
    let updated_at = Timestamp::now();
    let plugin = Plugin {
        tenant: tenant.name().clone(),
        name,
        revision: ready.revision,
        runtime: ready.runtime,
        bytes: ready.bytes,
        exports: ready.exports,
        interface,
        settings,
        created_at: updated_at,
        updated_at,
    };
    let most = tenant.quota().count(QuotaKey::Plugins);
    let (owner, name) = (plugin.tenant.clone(), plugin.name.clone());
    let change = app.store.put_plugin(plugin, ready.files, most, allowed).await?;
    let status = if change == Change::Created { StatusCode::CREATED } else { StatusCode::OK };
    let stored = app.store.plugin(&owner, &name).ok_or(StoreError::NoPlugin)?;
    Ok(answer(&app, status, &tenant, &stored))
}

/// Changes some settings; `null` restores a default.
#[utoipa::path(patch, path = "/v1/tenants/{t}/plugins/{p}",
    params(("t" = String, Path, description = "the tenant"), ("p" = String, Path, description = "the plugin")),
    request_body = inline(PluginSettings), responses((status = 200, body = inline(PluginView))))]
pub(super) async fn patch(
    State(app): State<App>,
    caller: Caller,
    Params((tenant, name)): Params<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    existing(&app, &tenant, &name)?;
    let conditions = Conditions::of(&headers)?;
    let patch: Map<String, Value> = read_json(&headers, body, app.connections.reading).await?;
    let mut tries = Tries::of(&conditions);
    loop {
        let now = existing(&app, &tenant, &name)?;
        let done = lay_over(&app, &tenant, &now, patch.clone(), conditions.clone()).await;
        if !tries.go_on(&done) {
            return done;
        }
    }
}

/// Lays a patch over what is there now, and stores the whole if that is still there then.
async fn lay_over(
    app: &App,
    tenant: &Tenant,
    now: &Plugin,
    patch: Map<String, Value>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let settings: PluginSettings = patched(&now.settings, patch, PluginSettings::knows)?;
    settings.check(&now.settings, now.runtime, &tenant.job_maximums(&app.job_maximums))?;
    let interface = settings.interface_of(now.exports)?;
    let plugin = Plugin { settings, interface, updated_at: Timestamp::now(), ..now.clone() };
    let seen = plugin_etag(now);
    let allowed: Precondition<Plugin> = Box::new(move |plugin| {
        let tag = plugin.map(plugin_etag);
        tag.as_ref() == Some(&seen) && conditions.hold(tag.as_deref())
    });
    app.store.set_plugin(plugin.clone(), allowed).await?;
    Ok(answer(app, StatusCode::OK, tenant, &plugin))
}

/// Deletes a plugin; its running jobs are ended.
#[utoipa::path(delete, path = "/v1/tenants/{t}/plugins/{p}",
    params(("t" = String, Path, description = "the tenant"), ("p" = String, Path, description = "the plugin")),
    responses((status = 204, description = "deleted")))]
pub(super) async fn delete(
    State(app): State<App>,
    caller: Caller,
    Params((tenant, name)): Params<(String, String)>,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let tenant = app.tenant(&caller, &tenant)?;
    let now = existing(&app, &tenant, &name)?;
    let allowed = precondition(Conditions::of(&headers)?);
    to_its_end(async move {
        app.store.delete_plugin(now.tenant.clone(), now.name.clone(), allowed).await?;
        app.jobs.end_all_of(&now.tenant, &now.name);
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// A plugin of the tenant.
pub(super) fn existing(app: &App, tenant: &Tenant, name: &str) -> Result<Arc<Plugin>, Problem> {
    let plugin = name.parse().ok().and_then(|name| app.store.plugin(tenant.name(), &name));
    plugin.ok_or_else(Problem::not_found)
}

/// Receives the artifact, and the manifest if there is one, in a place among the tenant's uploads.
async fn receive_upload(
    app: &App,
    tenant: &Tenant,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Member, Upload, Option<PluginSettings>), Problem> {
    refuse_encoding(headers)?;
    let most = tenant.quota().get(QuotaKey::ArtifactBytes);
    if media_type(headers).as_deref() != Some("multipart/form-data") {
        refuse_longer_than(headers, most)?;
        let place = app.join_uploads(tenant)?;
        let body = PacedBody::new(body, app.connections.reading);
        let upload = receive(app.store.dir(), most, body).await.map_err(|error| not_received(error, Problem::from))?;
        return Ok((place, upload, None));
    }
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    refuse_longer_than(headers, whole_bytes(most))?;
    let place = app.join_uploads(tenant)?;
    let body = PacedBody::new(body, app.connections.reading);
    let mut form = Form::new(body, content_type, most)?;
    let (mut upload, mut manifest) = (None, None);
    while let Some(part) = form.next().await? {
        match part {
            Part::Artifact(field) => {
                let received = receive(app.store.dir(), most, field).await;
                upload = Some(received.map_err(|error| not_received(error, |broken| FormError::from(broken).into()))?);
            }
            Part::Manifest(bytes) => manifest = Some(parse_object::<PluginSettings>(&bytes)?),
        }
    }
    let upload = upload.ok_or_else(|| Problem::malformed("multipart: the part `artifact` is missing"))?;
    Ok((place, upload, manifest))
}

impl From<FormError> for Problem {
    fn from(error: FormError) -> Self {
        match error {
            FormError::Broken(
                multer::Error::FieldSizeExceeded { limit, .. } | multer::Error::StreamSizeExceeded { limit },
            ) => too_large(limit),
            FormError::Broken(multer::Error::StreamReadFailed(source)) => match source.downcast_ref::<BodyError>() {
                Some(error) => (*error).into(),
                None => Self::malformed("the body broke off"),
            },
            other => Self::malformed(other.to_string()),
        }
    }
}

fn not_received<E>(error: UploadError<E>, broken: impl FnOnce(E) -> Problem) -> Problem {
    match error {
        UploadError::Body(error) => broken(error),
        UploadError::TooLarge(most) => too_large(most),
        UploadError::Format(error) => invalid_artifact(error.to_string()),
        UploadError::Artifact(error) => Problem::internal(&error),
        UploadError::Io(error) => Problem::internal(&error),
    }
}

fn not_ready(error: &CompileError) -> Problem {
    match error {
        CompileError::Invalid(_) | CompileError::OverLimit(_) => invalid_artifact(error.to_string()),
        CompileError::Busy(AdmissionError::TenantQueueFull(_) | AdmissionError::TenantBusy(_)) => {
            let detail = "the tenant's own compilations take all that one tenant may have";
            Problem::new(Code::QuotaExceeded, detail).with("quota", "compilations").retry_after(5)
        }
        CompileError::Busy(AdmissionError::Draining) => AdmissionError::Draining.into(),
        CompileError::Busy(_) => Problem::new(Code::ServerFull, error.to_string()).retry_after(5),
        CompileError::Host(_) => Problem::internal(error),
    }
}

fn invalid_artifact(detail: String) -> Problem {
    Problem::new(Code::InvalidArtifact, detail)
}

fn precondition(conditions: Conditions) -> Precondition<Plugin> {
    Box::new(move |plugin| conditions.hold(plugin.map(plugin_etag).as_deref()))
}

fn plugin_etag(plugin: &Plugin) -> String {
    etag(&BTreeMap::from([
        ("revision", plugin.revision.to_string()),
        ("settings", serde_json::to_string(&plugin.settings).unwrap_or_default()),
        ("created_at", plugin.created_at.to_string()),
    ]))
}

fn answer(app: &App, status: StatusCode, tenant: &Tenant, plugin: &Plugin) -> Response {
    let tag = [(header::ETAG, etag_header(&plugin_etag(plugin)))];
    (status, tag, Json(view(app, tenant, plugin))).into_response()
}

fn view(app: &App, tenant: &Tenant, plugin: &Plugin) -> PluginView {
    let sources = [&plugin.limits(), &tenant.job_defaults(), &app.job_defaults];
    let limits = Limits::resolve(plugin.runtime, &sources, &tenant.job_maximums(&app.job_maximums));
    PluginView {
        name: plugin.name.to_string(),
        revision: plugin.revision.to_string(),
        runtime: plugin.runtime,
        bytes: plugin.bytes,
        settings: plugin.settings.clone().called_by(plugin.interface),
        effective_limits: limits,
        created_at: plugin.created_at,
        updated_at: plugin.updated_at,
    }
}
