//! What a request says of the job that it wants: headers, strictly read.

use std::collections::BTreeMap;

use axum::http::{HeaderMap, HeaderName, header};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::limit::{Given, Limits};
use crate::plugin::{Plugin, check_args, check_env, check_size};
use crate::server::app::App;
use crate::server::json;
use crate::server::problem::{Code, Problem};
use crate::tenant::Tenant;

/// The longest of the headers that carry a job's settings.
const MAX_SETTING_BYTES: usize = 16 * 1024;

const LIMITS: HeaderName = HeaderName::from_static("holm-limits");
const ARGS: HeaderName = HeaderName::from_static("holm-args");
const ENV: HeaderName = HeaderName::from_static("holm-env");
const PREFER: HeaderName = HeaderName::from_static("prefer");

/// A job's settings, complete.
#[derive(Debug)]
pub(super) struct JobSettings {
    pub(super) limits: Limits,
    /// What they would be without the request's own.
    pub(super) defaults: Limits,
    pub(super) args: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) content_type: String,
}

impl JobSettings {
    /// The plugin's settings with the request's own over them.
    pub(super) fn of(app: &App, tenant: &Tenant, plugin: &Plugin, headers: &HeaderMap) -> Result<Self, Problem> {
        let maximums = tenant.job_maximums(&app.job_maximums);
        let own = match setting::<Map<String, Value>>(headers, &LIMITS, "an object")? {
            Some(json) => Given::read(&json, Some(plugin.runtime), &maximums)?,
            None => Given::default(),
        };
        let (of_plugin, of_tenant) = (plugin.limits(), tenant.job_defaults());
        let sources = [&own, &of_plugin, &of_tenant, &app.job_defaults];
        let limits = Limits::resolve(plugin.runtime, &sources, &maximums);
        limits.check(&maximums)?;
        let defaults = Limits::resolve(plugin.runtime, &sources[1..], &maximums);
        let args = setting::<Vec<String>>(headers, &ARGS, "an array of strings")?;
        let args = args.unwrap_or_else(|| plugin.settings.args.clone());
        let mut env = plugin.settings.env.clone();
        env.extend(setting::<BTreeMap<String, String>>(headers, &ENV, "an object of strings")?.unwrap_or_default());
        let invalid = |what| Problem::new(Code::InvalidSettings, what);
        check_args(&args).map_err(invalid)?;
        check_env(&env).map_err(invalid)?;
        let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        check_size(&args, &env, content_type).map_err(invalid)?;
        Ok(Self { limits, defaults, args, env, content_type: content_type.to_owned() })
    }
}

/// A setting in a header: ASCII JSON, once.
fn setting<T: DeserializeOwned>(headers: &HeaderMap, name: &HeaderName, shape: &str) -> Result<Option<T>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::malformed(format!("`{name}` may be sent once")));
    }
    if value.len() > MAX_SETTING_BYTES {
        return Err(Problem::malformed(format!("`{name}` may have {MAX_SETTING_BYTES} bytes at most")));
    }
    let Ok(text) = value.to_str() else {
        return Err(Problem::malformed(format!("`{name}` must be ASCII; write other characters as \\u escapes")));
    };
    let parsed = json::parse(text.as_bytes());
    parsed.map(Some).map_err(|error| Problem::malformed(format!("`{name}` must be {shape} in JSON: {error}")))
}

/// Whether the request prefers the record to the bare output (RFC 7240).
pub(super) fn prefers_representation(headers: &HeaderMap) -> bool {
    let preferences = headers.get_all(&PREFER).iter().filter_map(|value| value.to_str().ok());
    preferences.flat_map(|value| value.split(',')).any(|preference| {
        let token = preference.split(';').next().unwrap_or_default();
        let Some((name, value)) = token.split_once('=') else {
            return false;
        };
        name.trim().eq_ignore_ascii_case("return")
            && value.trim().trim_matches('"').eq_ignore_ascii_case("representation")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, axum::http::HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    #[test]
    fn settings_are_ascii_json_once() {
        let read = |pairs: &[(&'static str, &[u8])]| setting::<Vec<String>>(&headers(pairs), &ARGS, "an array");
        assert_eq!(read(&[]).unwrap(), None);
        let umlaut = read(&[("holm-args", br#"["a", "\u00e4"]"#)]).unwrap();
        assert_eq!(umlaut, Some(vec!["a".into(), "ä".into()]));
        assert!(read(&[("holm-args", "[\"ä\"]".as_bytes())]).is_err());
        assert!(read(&[("holm-args", b"[]"), ("holm-args", b"[]")]).is_err());
        assert!(read(&[("holm-args", b"{}")]).is_err());
        assert!(read(&[("holm-args", b"[1]")]).is_err());
        assert!(read(&[("holm-args", b"")]).is_err());
        let long = format!("[\"{}\"]", "x".repeat(MAX_SETTING_BYTES));
        assert!(read(&[("holm-args", long.as_bytes())]).is_err());
    }

    #[test]
    fn preferences_are_those_of_the_rfc() {
        for (value, expected) in [
            ("return=representation", true),
            ("respond-async, Return = \"representation\"; x=y", true),
            ("return=minimal", false),
            ("representation", false),
            ("respond-async", false),
        ] {
            assert_eq!(prefers_representation(&headers(&[("prefer", value.as_bytes())])), expected, "{value}");
        }
    }
}
