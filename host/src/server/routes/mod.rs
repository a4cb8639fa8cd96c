//! The routes, and the document that describes them.

mod functions;
mod health;
mod job_control;
mod job_output;
mod job_request;
mod jobs;
mod keys;
mod limits_schema;
mod plugins;
mod tenant_control;
mod tenants;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, State};
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::IntoResponse;
use axum::routing::any;
use utoipa::OpenApi;
use utoipa::openapi::OpenApi as Document;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::exchange::header_bytes;
use super::problem::{Code, Problem};
use crate::tenant::Caller;

/// The longest URI.
const MAX_URI_BYTES: usize = 8 * 1024;

/// The most bytes of all headers together.
const MAX_HEADER_BYTES: usize = 64 * 1024;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Holm",
        description = "Functions of many tenants, each job in a process of its own. Errors are RFC 9457 problems; their codes are listed under `ProblemCode`."
    ),
    paths(functions::call),
    security(("key" = []))
)]
struct Description;

/// Every route, with the state that they need.
pub(super) fn router(app: App) -> Router {
    let (router, _) = api().split_for_parts();
    // any method, those that no document can list too
    functions::PATHS
        .iter()
        .fold(router, |router, path| router.route(path, any(functions::call)))
        .fallback(nothing)
        .method_not_allowed_fallback(other_method)
        .layer(from_fn(check_size))
        .with_state(app)
}

fn api() -> OpenApiRouter<App> {
    let mut document = Description::openapi();
    let components = document.components.get_or_insert_default();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    components.add_security_scheme("key", SecurityScheme::Http(bearer));
    limits_schema::add_to(components);
    OpenApiRouter::with_openapi(document)
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(health::openapi_json))
        .routes(routes!(tenants::list))
        .routes(routes!(tenants::get, tenants::put, tenants::patch, tenants::delete))
        .routes(routes!(tenant_control::pause))
        .routes(routes!(tenant_control::resume))
        .routes(routes!(tenant_control::usage))
        .routes(routes!(keys::list, keys::post))
        .routes(routes!(keys::delete))
        .routes(routes!(plugins::list))
        .routes(routes!(plugins::get, plugins::put, plugins::patch, plugins::delete))
        .routes(routes!(jobs::post))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::get, job_control::patch))
        .routes(routes!(jobs::cancel))
        .routes(routes!(job_control::pause))
        .routes(routes!(job_control::resume))
        .routes(routes!(job_control::stats))
        .routes(routes!(job_control::processes))
}

/// The OpenAPI document, for tests and tools.
#[must_use]
pub fn openapi() -> Document {
    api().to_openapi()
}

/// What is no route at all. Below `/v1` nobody without a key is told so.
async fn nothing(State(app): State<App>, request: Request<Body>) -> Problem {
    let (mut parts, _) = request.into_parts();
    match Caller::from_request_parts(&mut parts, &app).await {
        Err(unauthenticated) if parts.uri.path().starts_with("/v1/") => unauthenticated,
        _ => Problem::not_found(),
    }
}

/// `OPTIONS` on what exists, and everything that a resource does not have. The router adds `Allow`.
async fn other_method(method: Method) -> Response<Body> {
    if method == Method::OPTIONS {
        return StatusCode::NO_CONTENT.into_response();
    }
    Problem::new(Code::MethodNotAllowed, format!("{method} is not one of the methods in `Allow`")).into_response()
}

/// Refuses what is too large to be looked at, and adds what every answer has.
async fn check_size(request: Request<Body>, next: Next) -> Response<Body> {
    let mut response = if request.uri().to_string().len() > MAX_URI_BYTES {
        let detail = format!("the URI may have {MAX_URI_BYTES} bytes at most");
        Problem::new(Code::UriTooLong, detail).into_response()
    } else if header_bytes(request.headers()) > MAX_HEADER_BYTES {
        let detail = format!("all headers together may have {MAX_HEADER_BYTES} bytes at most");
        Problem::new(Code::HeadersTooLarge, detail).into_response()
    } else {
        next.run(request).await
    };
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_openapi_3_1_and_lists_the_codes() {
        let document = serde_json::to_value(openapi()).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        assert!(document["paths"]["/v1/tenants/{t}/plugins/{p}/jobs"]["post"].is_object());
        let codes = document["components"]["schemas"]["ProblemCode"]["enum"].as_array().unwrap();
        assert_eq!(codes.len(), Code::ALL.len());
        let limits = &document["components"]["schemas"]["JobLimits"]["properties"];
        assert_eq!(limits["pids"]["maximum"], 4096.0);
    }
}
