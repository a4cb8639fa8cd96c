//! `/fn`: HTTP requests that go to a plugin, and come back as it answers them.

use std::fmt::Display;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::uri::{Authority, PathAndQuery};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri, Version, header};
use axum::response::IntoResponse;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{job_output, jobs};
use crate::admission::AdmissionError;
use crate::job::{Finished, JobRequest, Streams, Submitted, Supply};
use crate::limit::{Limit, Limits};
use crate::plugin::{Interface, Plugin};
use crate::server::app::App;
use crate::server::body::refuse_longer_than;
use crate::server::exchange::{GuestBody, LAST_WORDS, exchange, pass_on};
use crate::server::problem::{Code, Problem};
use crate::tenant::{Caller, Tenant};

/// Everything below a plugin, itself included.
pub(super) const PATHS: [&str; 3] = ["/fn/{t}/{p}", "/fn/{t}/{p}/", "/fn/{t}/{p}/{*path}"];

const JOB_ID: HeaderName = HeaderName::from_static("holm-job-id");

/// Passes a request of any method on to the plugin, as `/{path}`. Both bodies are streamed.
#[utoipa::path(method(get, head, post, put, patch, delete, options), path = "/fn/{t}/{p}/{path}",
    params(("t" = String, Path, description = "the tenant"), ("p" = String, Path, description = "the plugin, of the interface `http`"),
        ("path" = String, Path, description = "what the plugin sees as `/{path}`, with the query; may be empty and may have slashes")),
    request_body(content = Vec<u8>, content_type = "*/*"),
    responses(
        (status = "default", description = "what the plugin answers", headers(("Holm-Job-Id" = String))),
        (status = 502, description = "the plugin failed before it answered; a failure after that aborts the connection", body = inline(crate::server::ProblemBody)),
        (status = 504, description = "the plugin reached `wall_time_ms` before it answered", body = inline(crate::server::ProblemBody)),
    ),
    security((), ("key" = [])))]
pub(super) async fn call(State(app): State<App>, request: Request<Body>) -> Result<Response<Body>, Problem> {
    let (mut parts, body) = request.into_parts();
    let Target { tenant, plugin, uri } = Target::of(&parts.uri).ok_or_else(Problem::not_found)?;
    let (tenant, trusted) = authorize(&app, &mut parts, &tenant, &plugin).await?;
    let (plugin, artifact) = jobs::resolve(&app, &tenant, &plugin)?;
    if plugin.interface != Interface::Http {
        return Err(Problem::new(Code::WrongInterface, "the plugin is a command; run it with `POST …/jobs`"));
    }
    check_host(&parts.headers)?;
    let request = job_request(&app, tenant, plugin)?;
    refuse_longer_than(&parts.headers, request.limits.get(Limit::InputBytes))?;
    if app.is_draining() {
        return Err(AdmissionError::Draining.into());
    }
    let (hand_over, line) = oneshot::channel();
    let submitted = app.jobs.submit(request, Supply { artifact, streams: Streams::Http(hand_over) });
    let id = submitted.id();
    let to_guest = for_guest(parts, uri, body);
    let answered = async {
        match line.await {
            Ok(line) => match exchange(line, to_guest, app.connections.reading).await {
                Ok(response) => {
                    let (head, answer) = response.into_parts();
                    let mut body = GuestBody::new(answer, submitted);
                    body.take_early().await;
                    Ok(Response::from_parts(head, Body::new(body)))
                }
                Err(error) => Err(timeout(LAST_WORDS, failure(submitted)).await.unwrap_or_else(|_| bad(&error))),
            },
            // it never came to be called
            Err(_) => Err(failure(submitted).await),
        }
    };
    let mut response = match answered.await {
        Ok(mut response) => {
            pass_on(response.headers_mut());
            response
        }
        Err(problem) if trusted => problem.into_response(),
        Err(problem) => problem.bare("job_id").into_response(),
    };
    if let Ok(id) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().insert(JOB_ID, id);
    }
    Ok(response)
}

/// What a URI names.
struct Target {
    tenant: String,
    plugin: String,
    /// What the guest sees of it.
    uri: Uri,
}

impl Target {
    /// From `/fn/{tenant}/{plugin}/…`. The rest is passed on byte by byte: what it means is the guest's to say.
    fn of(uri: &Uri) -> Option<Self> {
        let mut segments = uri.path().splitn(5, '/').skip(2);
        let (tenant, plugin) = (segments.next()?.to_owned(), segments.next()?.to_owned());
        let mut rest = format!("/{}", segments.next().unwrap_or_default());
        if let Some(query) = uri.query() {
            rest.push('?');
            rest.push_str(query);
        }
        Some(Self { tenant, plugin, uri: PathAndQuery::try_from(rest).ok()?.into() })
    }
}

/// Lets anyone call what is public, and else those who may act for the tenant. Tells whether the caller is one of them.
/// A key of this server is not for the guest to see.
async fn authorize(app: &App, parts: &mut Parts, tenant: &str, plugin: &str) -> Result<(Tenant, bool), Problem> {
    let caller = Caller::from_request_parts(parts, app).await;
    let public = app.public_plugin(tenant, plugin)?;
    if public.is_none() || app.is_key_among(parts.headers.get_all(header::AUTHORIZATION)) {
        parts.headers.remove(header::AUTHORIZATION);
    }
    match (public, caller) {
        (Some(tenant), caller) => {
            let trusted = caller.is_ok_and(|caller| caller.sees(tenant.name()));
            Ok((tenant, trusted))
        }
        (None, caller) => Ok((app.tenant(&caller?, tenant)?, true)),
    }
}

/// Refuses a `Host` that is none, or more than one (RFC 9112, section 3.2): a guest takes its authority from it.
fn check_host(headers: &HeaderMap) -> Result<(), Problem> {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => Ok(()),
        (Some(host), None) if host.to_str().is_ok_and(|host| host.is_empty() || host.parse::<Authority>().is_ok()) => {
            Ok(())
        }
        _ => Err(Problem::malformed("`Host` must be one name, with a port or without")),
    }
}

/// A job with the plugin's own settings: a call has none.
fn job_request(app: &App, tenant: Tenant, plugin: Arc<Plugin>) -> Result<JobRequest, Problem> {
    let maximums = tenant.job_maximums(&app.job_maximums);
    let sources = [&plugin.limits(), &tenant.job_defaults(), &app.job_defaults];
    let limits = Limits::resolve(plugin.runtime, &sources, &maximums);
    limits.check(&maximums)?;
    let (args, env) = (plugin.settings.args.clone(), plugin.settings.env.clone());
    // the guest sees the request's own headers
    let defaults = limits.clone();
    Ok(JobRequest { tenant, plugin, limits, defaults, args, env, content_type: String::new() })
}

fn for_guest(mut parts: Parts, uri: Uri, body: Body) -> Request<Body> {
    pass_on(&mut parts.headers);
    parts.uri = uri;
    parts.version = Version::HTTP_11;
    Request::from_parts(parts, body)
}

/// The problem of a job that ends without an answer, once it has ended.
async fn failure(submitted: Submitted) -> Problem {
    match submitted.finished().await {
        Ok(Finished { record, stderr_tail, .. }) => {
            job_output::failure(&record, &stderr_tail).unwrap_or_else(|| bad(&"it ended without one"))
        }
        Err(refusal) => refusal.into(),
    }
}

fn bad(why: &impl Display) -> Problem {
    Problem::new(Code::BadResponse, format!("the plugin's answer cannot be passed on: {why}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_of_a_uri_is_lost_or_added(rest in "(/[!-~&&[^?#]]{0,20})?(\\?[!-~&&[^#]]{0,20})?") {
            let Ok(uri) = format!("/fn/t/p{rest}").parse::<Uri>() else { return Ok(()) };
            let target = Target::of(&uri).unwrap();
            prop_assert_eq!((&*target.tenant, &*target.plugin), ("t", "p"));
            let slash = if rest.starts_with('/') { "" } else { "/" };
            prop_assert_eq!(target.uri.to_string(), format!("{slash}{rest}"));
        }
    }

    #[test]
    fn the_guest_sees_the_rest_of_the_uri_as_it_came() {
        for (uri, expected) in [
            ("/fn/t/p", "/"),
            ("/fn/t/p/", "/"),
            ("/fn/t/p?x=1", "/?x=1"),
            ("/fn/t/p/a/b%2Fc//d/?q=%20&r", "/a/b%2Fc//d/?q=%20&r"),
            ("http://host/fn/t/p/a", "/a"),
        ] {
            let target = Target::of(&uri.parse().unwrap()).unwrap();
            assert_eq!((&*target.tenant, &*target.plugin), ("t", "p"));
            assert_eq!(target.uri.to_string(), expected);
        }
    }
}
