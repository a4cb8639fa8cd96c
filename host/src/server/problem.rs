//! Errors as RFC 9457 problems, and the one list of their codes.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use holm_sandbox::ceiling::CeilingError;
use serde_json::{Value, json};

use crate::admission::AdmissionError;
use crate::launcher::SetCeilingError;
use crate::limit::{Limit, LimitError};
use crate::plugin::PluginSettingsError;
use crate::store::StoreError;
use crate::tenant::{AuthError, SettingsError};

macro_rules! codes {
    ($($variant:ident, $word:literal, $status:ident, $title:literal;)+) => {
        /// The stable word of a problem.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code {
            $(#[doc = $title] $variant,)+
        }

        impl Code {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The word in `code` and in `type`.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// The status that usually goes with it.
            #[must_use]
            pub fn status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$status,)+ }
            }

            /// What it means in general.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)+ }
            }
        }
    };
}

codes! {
    MalformedRequest, "malformed_request", BAD_REQUEST, "The request is malformed";
    Unauthenticated, "unauthenticated", UNAUTHORIZED, "A valid key is needed";
    OperatorOnly, "operator_only", FORBIDDEN, "Only the operator may do this";
    NotFound, "not_found", NOT_FOUND, "There is no such resource";
    MethodNotAllowed, "method_not_allowed", METHOD_NOT_ALLOWED, "The resource does not have this method";
    RequestTimeout, "request_timeout", REQUEST_TIMEOUT, "The request came too slowly";
    WrongInterface, "wrong_interface", CONFLICT, "The plugin has another interface";
    LimitInUse, "limit_in_use", CONFLICT, "More than the limit is in use";
    JobFinished, "job_finished", CONFLICT, "The job is over already";
    JobNotBegun, "job_not_begun", CONFLICT, "The job has not begun";
    Busy, "busy", CONFLICT, "Another change of the same is under way";
    NotFrozen, "not_frozen", CONFLICT, "Not everything could be made to stand still";
    PlaceLent, "place_lent", CONFLICT, "The job's place is lent to one of higher priority";
    PreconditionFailed, "precondition_failed", PRECONDITION_FAILED, "The resource is not in the state that was named";
    PayloadTooLarge, "payload_too_large", PAYLOAD_TOO_LARGE, "The body is too large";
    UriTooLong, "uri_too_long", URI_TOO_LONG, "The URI is too long";
    UnsupportedMediaType, "unsupported_media_type", UNSUPPORTED_MEDIA_TYPE, "The body is of another type than is taken here";
    HeadersTooLarge, "headers_too_large", REQUEST_HEADER_FIELDS_TOO_LARGE, "The headers are too large";
    InvalidName, "invalid_name", UNPROCESSABLE_ENTITY, "The name cannot be used";
    InvalidSettings, "invalid_settings", UNPROCESSABLE_ENTITY, "The settings cannot be used";
    LimitOutOfRange, "limit_out_of_range", UNPROCESSABLE_ENTITY, "A limit is out of its range";
    InvalidRange, "invalid_range", UNPROCESSABLE_ENTITY, "The stretch of time cannot be";
    NotApplicable, "not_applicable", UNPROCESSABLE_ENTITY, "The setting does not apply here";
    NotChangeable, "not_changeable", UNPROCESSABLE_ENTITY, "The setting cannot be changed now";
    NotAvailable, "not_available", UNPROCESSABLE_ENTITY, "This server cannot enforce the setting";
    InvalidArtifact, "invalid_artifact", UNPROCESSABLE_ENTITY, "The artifact cannot be run";
    QuotaExceeded, "quota_exceeded", TOO_MANY_REQUESTS, "A quota of the tenant is used up";
    ServerFull, "server_full", SERVICE_UNAVAILABLE, "The server is full";
    TenantPaused, "tenant_paused", SERVICE_UNAVAILABLE, "The tenant is paused";
    Draining, "draining", SERVICE_UNAVAILABLE, "The server is stopping";
    Internal, "internal", INTERNAL_SERVER_ERROR, "The server has failed";
    Exited, "exited", BAD_GATEWAY, "The job ended with an exit code other than 0";
    Signaled, "signaled", BAD_GATEWAY, "The job was ended by a signal";
    Trapped, "trapped", BAD_GATEWAY, "The job trapped";
    OverLimit, "over_limit", BAD_GATEWAY, "The job reached one of its limits";
    Cancelled, "cancelled", BAD_GATEWAY, "The job was ended by order";
    BadResponse, "bad_response", BAD_GATEWAY, "The plugin's answer cannot be passed on";
    NotRunnable, "not_runnable", BAD_GATEWAY, "The plugin cannot be run";
    Lost, "lost", SERVICE_UNAVAILABLE, "The job was lost by the host's fault";
}

/// An error as it is answered.
#[derive(Debug)]
pub struct Problem {
    code: Code,
    status: StatusCode,
    detail: String,
    members: Vec<(String, Value)>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// A problem with its usual status.
    #[must_use]
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, status: code.status(), detail: detail.into(), members: Vec::new(), headers: Vec::new() }
    }

    /// Whether it has this code.
    #[must_use]
    pub fn is(&self, code: Code) -> bool {
        self.code == code
    }

    /// Adds an extension member.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.members.push((name.to_owned(), value.into()));
        self
    }

    /// The same for callers who may know no more than its code, its status and `member`.
    #[must_use]
    pub fn bare(mut self, member: &str) -> Self {
        self.detail = self.code.title().to_owned();
        self.members.retain(|(name, _)| name == member);
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Changes the status.
    #[must_use]
    pub fn status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        self.header(header::RETRY_AFTER, seconds.into())
    }

    /// A malformed request.
    #[must_use]
    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::new(Code::MalformedRequest, detail)
    }

    /// What is not there, or not to be seen by this caller.
    #[must_use]
    pub fn not_found() -> Self {
        Self::new(Code::NotFound, "there is no such resource, or it is not yours")
    }

    /// Our own failure. What failed is for the log; the caller is told nothing of it.
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut causes = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            causes = format!("{causes}: {cause}");
            source = cause.source();
        }
        tracing::error!(error = %causes, "request failed");
        Self::new(Code::Internal, "the server has failed; the operator can find out why in its log")
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response<Body> {
        let mut body = json!({
            "type": format!("/problems/{}", self.code.word()),
            "title": self.code.title(),
            "status": self.status.as_u16(),
            "detail": self.detail,
            "code": self.code.word(),
        });
        if let Value::Object(object) = &mut body {
            object.extend(self.members);
        }
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.extend(self.headers);
        response
    }
}

impl From<AuthError> for Problem {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::Unauthenticated => {
                Self::new(Code::Unauthenticated, "send the header `Authorization: Bearer <key>` with a valid key")
                    .header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
            }
            AuthError::NotFound => Self::not_found(),
            AuthError::OperatorOnly => Self::new(Code::OperatorOnly, "this route takes the operator's key only"),
        }
    }
}

impl From<LimitError> for Problem {
    fn from(error: LimitError) -> Self {
        let detail = error.to_string();
        match error {
            LimitError::Malformed(_) => Self::malformed(detail),
            LimitError::OutOfRange { limit, given, minimum, maximum } => Self::new(Code::LimitOutOfRange, detail)
                .with("limit", limit.key())
                .with("given", given)
                .with("minimum", limit.to_json(minimum))
                .with("maximum", limit.to_json(maximum)),
            LimitError::NotApplicable { limit, .. } => {
                Self::new(Code::NotApplicable, detail).with("limit", limit.key())
            }
            LimitError::Fixed { limit, given } => Self::new(Code::NotChangeable, detail)
                .with("limit", limit.key())
                .with("given", given)
                .with("possible", Limit::changing_while_running()),
        }
    }
}

impl From<SettingsError> for Problem {
    fn from(error: SettingsError) -> Self {
        let detail = error.to_string();
        match error {
            SettingsError::Malformed(_) => Self::malformed(detail),
            SettingsError::OutOfRange { field, given, minimum, maximum } => Self::new(Code::LimitOutOfRange, detail)
                .with("limit", field)
                .with("given", given)
                .with("minimum", minimum)
                .with("maximum", maximum),
            SettingsError::Impossible { field, given, possible } => Self::new(Code::LimitOutOfRange, detail)
                .with("limit", field)
                .with("given", given)
                .with("possible", possible),
            SettingsError::Limit { field, error } => Self::from(error).with("field", field),
            SettingsError::NotAvailable { field, given } => Self::new(Code::NotAvailable, detail)
                .with("field", field)
                .with("given", given)
                .with("possible", "to leave it out"),
        }
    }
}

impl From<SetCeilingError> for Problem {
    fn from(error: SetCeilingError) -> Self {
        let SetCeilingError::Refused(refused) = error else { return Self::internal(&error) };
        let detail = refused.to_string();
        match refused {
            CeilingError::NotAvailable { field, why } => Self::new(Code::NotAvailable, detail)
                .with("field", field)
                .with("possible", format!("to leave it out; {why}")),
            CeilingError::Impossible { field, given, possible } => Self::new(Code::LimitOutOfRange, detail)
                .with("limit", field)
                .with("given", given)
                .with("possible", possible),
            CeilingError::InUse { field, used } => {
                Self::new(Code::LimitInUse, detail).with("limit", field).with("used", used).retry_after(1)
            }
            CeilingError::Refused { field, .. } => Self::new(Code::NotAvailable, detail).with("field", field),
        }
    }
}

impl From<PluginSettingsError> for Problem {
    fn from(error: PluginSettingsError) -> Self {
        let detail = error.to_string();
        match error {
            PluginSettingsError::Invalid(_) => Self::new(Code::InvalidSettings, detail),
            PluginSettingsError::Limit(error) => Self::from(error).with("field", "limits"),
            PluginSettingsError::NotAvailable(field) => Self::new(Code::NotAvailable, detail).with("field", field),
        }
    }
}

impl From<AdmissionError> for Problem {
    fn from(error: AdmissionError) -> Self {
        let detail = error.to_string();
        let quota = |name: &str| Self::new(Code::QuotaExceeded, detail.clone()).with("quota", name).retry_after(1);
        match error {
            AdmissionError::TenantQueueFull(_) => quota("jobs_queued"),
            AdmissionError::TenantBusy(_) => quota("jobs_running"),
            AdmissionError::TenantPids(_) => quota("pids"),
            AdmissionError::TooManyRequests(_) => quota("requests_per_second"),
            AdmissionError::ServerFull | AdmissionError::ServerBusy => {
                Self::new(Code::ServerFull, detail).retry_after(1)
            }
            AdmissionError::TenantPaused => Self::new(Code::TenantPaused, detail).retry_after(5),
            AdmissionError::Draining => Self::new(Code::Draining, detail).retry_after(5),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NoTenant | StoreError::NoPlugin => Self::not_found(),
            StoreError::TooManyPlugins(most) => {
                Self::new(Code::QuotaExceeded, format!("the tenant's quota `plugins` of {most} is used up"))
                    .with("quota", "plugins")
                    .retry_after(60)
            }
            StoreError::Changed => Self::new(
                Code::PreconditionFailed,
                "`If-Match` or `If-None-Match` does not hold; read the resource again",
            ),
            error => Self::internal(&error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn codes_are_stable_words_and_unique() {
        let words: HashSet<&str> = Code::ALL.iter().map(|code| code.word()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        for word in words {
            assert!(word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{word}");
        }
    }

    #[tokio::test]
    async fn a_problem_has_the_members_of_the_rfc() {
        let problem = Problem::from(AdmissionError::TenantQueueFull(7));
        let response = problem.into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["type"], "/problems/quota_exceeded");
        assert_eq!(
            (&body["status"], &body["code"], &body["quota"]),
            (&json!(429), &json!("quota_exceeded"), &json!("jobs_queued"))
        );
        assert!(body["title"].is_string() && body["detail"].as_str().unwrap().contains('7'));
    }
}
