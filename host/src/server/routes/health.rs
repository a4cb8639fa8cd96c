//! Liveness, readiness, and the API's own description: the routes that need no key.

use std::sync::LazyLock;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

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

/// This description of the API, an OpenAPI 3.1 document.
#[utoipa::path(get, path = "/openapi.json", security(()),
    responses((status = 200, description = "the document", content_type = "application/json", body = Object)))]
pub(super) async fn openapi_json() -> Response {
    static DOCUMENT: LazyLock<String> = LazyLock::new(|| super::openapi().to_json().unwrap_or_default());
    let json_type = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, json_type)], DOCUMENT.as_str()).into_response()
}
