//! What every route has at hand.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::{FromRequestParts, Path};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};
use holm_sandbox::name::Name;
use serde::de::DeserializeOwned;

use super::connection::ConnectionRules;
use super::crowd::{Crowd, MOST_UPLOADS, Member, Slot, most_requests};
use super::problem::{Code, Problem};
use crate::admission::Admission;
use crate::job::Jobs;
use crate::launcher::Launcher;
use crate::limit::Given;
use crate::store::Store;
use crate::tenant::{AuthError, Caller, KeyHash, OperatorKey, QuotaKey, Tenant, TenantRow};
use crate::upload::Compiler;

/// Words of all `Authorization` headers of a request to a public plugin: more than any scheme has. Each costs a hash.
const MAX_WORDS: usize = 64;

/// The parts of a running server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct App(Arc<AppParts>);

/// See [`App`].
#[derive(Debug)]
pub struct AppParts {
    /// Tenants, keys, plugins.
    pub store: Store,
    /// Jobs.
    pub jobs: Jobs,
    /// Who may run.
    pub admission: Admission,
    /// The privileged end.
    pub launcher: Launcher,
    /// Compiles uploads.
    pub compiler: Arc<Compiler>,
    /// The operator's key.
    pub operator: OperatorKey,
    /// Defaults of jobs, below the tenant's.
    pub job_defaults: Given,
    /// Maximums of jobs, above the tenant's.
    pub job_maximums: Given,
    /// Time-outs and caps.
    pub connections: ConnectionRules,
    /// Tenants' requests that are under way.
    pub requests: Crowd,
    /// Tenants' uploads that are under way.
    pub uploads: Crowd,
    /// Held for each change of a tenant's settings: kernel and store must come to agree on the same ones.
    pub tenant_changes: tokio::sync::Mutex<()>,
    /// Set when the server is about to stop.
    pub draining: AtomicBool,
}

impl std::ops::Deref for App {
    type Target = AppParts;
    fn deref(&self) -> &AppParts {
        &self.0
    }
}

impl App {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: AppParts) -> Self {
        Self(Arc::new(parts))
    }

    /// Whether the server is about to stop.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The tenant that a path names, for a caller that may act for it.
    ///
    /// # Errors
    /// 404 for everybody who may not, 429 for a tenant that asks too often.
    pub fn tenant(&self, caller: &Caller, name: &str) -> Result<Tenant, Problem> {
        let row = name.parse::<Name>().ok().and_then(|name| self.store.tenant(&name));
        let tenant = caller.tenant(row)?;
        if matches!(caller, Caller::Tenant(_)) {
            self.admission.count_request(&tenant)?;
        }
        Ok(tenant)
    }

    /// A place among the tenant's requests.
    fn join_requests(&self, tenant: &TenantRow) -> Result<Member, Problem> {
        let quota = tenant.settings.quota();
        let jobs = quota.count(QuotaKey::JobsRunning).saturating_add(quota.count(QuotaKey::JobsQueued));
        let most = most_requests(self.connections.most, jobs);
        self.requests.join(&tenant.name, most).ok_or_else(|| too_many("requests", most))
    }

    /// A place among the tenant's uploads.
    ///
    /// # Errors
    /// 429.
    pub(super) fn join_uploads(&self, tenant: &Tenant) -> Result<Member, Problem> {
        self.uploads.join(tenant.name(), MOST_UPLOADS).ok_or_else(|| too_many("uploads", MOST_UPLOADS))
    }

    /// The tenant of a plugin that may be called by anyone.
    ///
    /// # Errors
    /// 429 for a tenant whose plugins are called too often.
    pub fn public_plugin(&self, tenant: &str, plugin: &str) -> Result<Option<Tenant>, Problem> {
        let names = tenant.parse::<Name>().ok().zip(plugin.parse::<Name>().ok());
        let found = names.and_then(|(tenant, plugin)| {
            self.store.plugin(&tenant, &plugin).filter(|plugin| plugin.settings.public)?;
            self.store.tenant(&tenant).map(Tenant::of_public_plugin)
        });
        if let Some(tenant) = &found {
            self.admission.count_request(tenant)?;
        }
        Ok(found)
    }

    /// Whether a key of this server stands in these `Authorization` headers, in whatever form.
    pub fn is_key_among<'a>(&self, values: impl IntoIterator<Item = &'a HeaderValue>) -> bool {
        let known = |word: &str| {
            let hash = KeyHash::of(word);
            self.operator.matches(&hash) || self.store.key(&hash).is_some()
        };
        let mut words = values.into_iter().flat_map(|value| value.as_bytes().split(u8::is_ascii_whitespace));
        let looked_at = words.by_ref().take(MAX_WORDS).filter_map(|word| std::str::from_utf8(word).ok());
        let found = looked_at
            .map(|word| (word, word.trim_matches([',', ';', '"', '='])))
            .any(|(word, bare)| known(word) || (bare != word && known(bare)));
        found || words.next().is_some()
    }

    /// Passes the operator, for a route on a tenant that need not exist. What a tenant's key may not see is 404 for
    /// it, before it is 403.
    ///
    /// # Errors
    /// 404, 403, or 422 for a name that no tenant can have.
    pub fn operator_on(&self, caller: &Caller, name: &str) -> Result<Name, Problem> {
        let parsed = name.parse::<Name>();
        if !parsed.as_ref().is_ok_and(|name| caller.sees(name)) && *caller != Caller::Operator {
            return Err(AuthError::NotFound.into());
        }
        caller.operator()?;
        parsed.map_err(|error| invalid_name(&error))
    }
}

fn too_many(what: &str, most: usize) -> Problem {
    let detail = format!("the tenant has {most} {what} under way, and may have no more at once");
    Problem::new(Code::QuotaExceeded, detail).with("quota", format!("{what}_at_once")).retry_after(1)
}

/// A name that cannot be used.
pub(super) fn invalid_name(error: &holm_sandbox::name::NameError) -> Problem {
    Problem::new(Code::InvalidName, error.to_string())
}

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let presented = presented_key(&parts.headers).ok_or(AuthError::Unauthenticated)?;
        let hash = KeyHash::of(presented);
        if app.operator.matches(&hash) {
            return Ok(Self::Operator);
        }
        let key = app.store.key(&hash).ok_or(AuthError::Unauthenticated)?;
        let row = app.store.tenant(&key.tenant).ok_or(AuthError::Unauthenticated)?;
        if let Some(slot) = parts.extensions.get::<Slot>() {
            slot.keep(app.join_requests(&row)?);
        }
        Ok(Self::Tenant(key.tenant))
    }
}

/// The key in `Authorization: Bearer …`, if there is exactly one such header.
fn presented_key(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
    let key = key.trim_matches(' ');
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

/// Path parameters. What does not decode names nothing.
#[derive(Debug)]
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        match Path::<T>::from_request_parts(parts, app).await {
            Ok(Path(params)) => Ok(Self(params)),
            Err(_) => Err(Problem::not_found()),
        }
    }
}

/// Query parameters, strictly: an unknown or malformed one is an error. What the path names is looked at before they
/// are, so they are taken with [`Query::get`] after that.
#[derive(Debug)]
pub(super) struct Query<T>(Result<T, String>);

impl<T> Query<T> {
    pub(super) fn get(self) -> Result<T, Problem> {
        self.0.map_err(|error| Problem::malformed(format!("query: {error}")))
    }
}

impl<T: DeserializeOwned> FromRequestParts<App> for Query<T> {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Infallible> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        Ok(Self(query.map(|axum::extract::Query(query)| query).map_err(|error| error.body_text())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(values: &[&str]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        presented_key(&headers).map(str::to_owned)
    }

    #[test]
    fn one_bearer_key_and_no_other_is_taken() {
        assert_eq!(key(&["Bearer abc"]).as_deref(), Some("abc"));
        assert_eq!(key(&["bearer  abc "]).as_deref(), Some("abc"));
        for bad in [&["Basic abc"][..], &["Bearer"], &["Bearer "], &["abc"], &[], &["Bearer a", "Bearer a"]] {
            assert_eq!(key(bad), None, "{bad:?}");
        }
    }
}
