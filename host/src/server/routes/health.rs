//! Liveness, readiness, and the API's own description: the routes that need no key.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use utoipa::openapi::OpenApi as Document;

use crate::server::app::App;
use crate::server::problem::{Code, Problem};

/// The server answers.
#[utoipa::path(get, path = "/healthz", security(()), responses((status = 200, description = "the server answers")))]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// The server takes jobs.
#[utoipa::path(get, path = "/readyz", security(()), responses(
    (status = 200, description = "jobs are taken"),
    (status = 503, description = "the server is stopping", body = inline(crate::server::ProblemBody)),
))]
pub(super) async fn readyz(State(app): State<App>) -> Response {
    if app.is_draining() {
        return Problem::new(Code::Draining, "the server is stopping").retry_after(5).into_response();
    }
    "ok\n".into_response()
}

/// Adds `/openapi.json`, the document itself.
pub(super) fn document(document: &Document) -> Router<App> {
    let json: Arc<str> = document.to_json().unwrap_or_default().into();
    Router::new().route(
        "/openapi.json",
        get(async move || {
            let json_type = HeaderValue::from_static("application/json");
            ([(header::CONTENT_TYPE, json_type)], json.to_string())
        }),
    )
}
