//! What a plugin's jobs start from: interface, arguments, environment, limits.

use std::collections::BTreeMap;

use holm_runtime::invocation::{self, Exports};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::limit::{Given, Limit, LimitError, Maximums, Runtime};

/// How a plugin is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Interface {
    /// Standard input to standard output, by `POST …/jobs`.
    Command,
    /// HTTP requests, by `/fn`.
    Http,
}

impl From<Interface> for invocation::Interface {
    fn from(interface: Interface) -> Self {
        match interface {
            Interface::Command => Self::Command,
            Interface::Http => Self::Http,
        }
    }
}

/// The settings of a plugin: the `manifest` of an upload, and the body of `PATCH`. Every field may be left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PluginSettings {
    /// How it is called; if not given, as its exports say, and as a command where they allow both.
    pub interface: Option<Interface>,
    /// Arguments of each job, the program's own name not counted.
    pub args: Vec<String>,
    /// Environment variables of each job.
    pub env: BTreeMap<String, String>,
    /// Limits of each job.
    limits: Map<String, Value>,
    /// Whether `/fn` may be called without a key.
    pub public: bool,
    /// `Content-Type` of a job's answer; `application/octet-stream` if not given.
    pub output_content_type: Option<String>,
}

/// Settings that cannot be taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PluginSettingsError {
    /// A value that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// A limit that is wrong.
    #[error("`limits`: {0}")]
    Limit(#[from] LimitError),
    /// A setting of the contract that this server does not have.
    #[error("`{0}` is not available in this version")]
    NotAvailable(&'static str),
}

/// The most bytes of arguments, environment and content type together: well within the kernel's 128 KiB for a single
/// string, and within one packet to the sandbox with all else that goes there.
const MAX_ARGS_AND_ENV: usize = 64 * 1024;

/// Variables that the host sets itself.
const RESERVED_PREFIX: &str = "HOLM_";

impl PluginSettings {
    /// Checks every value for a plugin of `runtime` that has the settings `kept` so far.
    ///
    /// # Errors
    /// The first that cannot be taken.
    pub fn check(&self, kept: &Self, runtime: Runtime, maximums: &Maximums) -> Result<(), PluginSettingsError> {
        let invalid = |field: &'static str| move |what| PluginSettingsError::Invalid(format!("`{field}`: {what}"));
        check_args(&self.args).map_err(invalid("args"))?;
        check_env(&self.env).map_err(invalid("env"))?;
        check_size(&self.args, &self.env, "").map_err(PluginSettingsError::Invalid)?;
        Given::check_change(&kept.limits, &self.limits, Some(runtime), maximums)?;
        if let Some(content_type) = &self.output_content_type {
            check_content_type(content_type).map_err(invalid("output_content_type"))?;
        }
        if self.interface == Some(Interface::Http) && runtime == Runtime::Native {
            return Err(PluginSettingsError::NotAvailable("interface=http"));
        }
        Ok(())
    }

    /// Whether a section of the settings has a member of this name.
    #[must_use]
    pub fn knows(section: &str, name: &str) -> bool {
        section != "limits" || Limit::from_key(name).is_some()
    }

    /// How an artifact with these exports is called.
    ///
    /// # Errors
    /// It does not have the interface that is asked for.
    pub fn interface_of(&self, exports: Exports) -> Result<Interface, PluginSettingsError> {
        let interface = self.interface.unwrap_or(if exports.command { Interface::Command } else { Interface::Http });
        if exports.has(interface.into()) {
            return Ok(interface);
        }
        let missing = match interface {
            Interface::Command => "exports no `_start` and no `wasi:cli/run`",
            Interface::Http => "exports no `wasi:http/incoming-handler` of version 0.2",
        };
        Err(PluginSettingsError::Invalid(format!("`interface`: the artifact {missing}")))
    }

    /// The same with the interface written down.
    #[must_use]
    pub fn called_by(mut self, interface: Interface) -> Self {
        self.interface = Some(interface);
        self
    }

    /// The limits that are set.
    #[must_use]
    pub fn limits(&self) -> Given {
        Given::from_stored(&self.limits)
    }
}

/// Checks arguments, wherever they come from.
///
/// # Errors
/// What is wrong, in words.
pub fn check_args(args: &[String]) -> Result<(), String> {
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err("an argument cannot hold a NUL byte".into());
    }
    Ok(())
}

/// Checks environment variables, wherever they come from.
///
/// # Errors
/// What is wrong, in words.
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(format!(
                "`{}` cannot be a variable: names are not empty and have no `=`, nothing has a NUL byte",
                name.escape_default()
            ));
        }
        if name.starts_with(RESERVED_PREFIX) {
            return Err(format!("`{name}`: names that begin with {RESERVED_PREFIX} are set by the host"));
        }
    }
    Ok(())
}

/// Checks that arguments, environment and the input's content type, which becomes a variable, fit into one job.
///
/// # Errors
/// What is wrong, in words.
pub fn check_size(args: &[String], env: &BTreeMap<String, String>, content_type: &str) -> Result<(), String> {
    let args: usize = args.iter().map(|arg| arg.len() + 1).sum();
    let env: usize = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    let bytes = args + env + content_type.len();
    if bytes <= MAX_ARGS_AND_ENV {
        return Ok(());
    }
    Err(format!("arguments, environment and content type have {bytes} bytes, more than {MAX_ARGS_AND_ENV}"))
}

/// A `type/subtype` with optional parameters, as it will stand in a header.
fn check_content_type(text: &str) -> Result<(), String> {
    let shape = text.split_once('/').is_some_and(|(kind, rest)| !kind.is_empty() && !rest.is_empty());
    let visible = text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
    if shape && visible && text.len() <= 255 { Ok(()) } else { Err("not a media type".into()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(json: Value) -> Result<(), PluginSettingsError> {
        let settings: PluginSettings = serde_json::from_value(json).unwrap();
        settings.check(&PluginSettings::default(), Runtime::Native, &Maximums::default())
    }

    #[test]
    fn ordinary_settings_pass() {
        check(json!({})).unwrap();
        check(json!({
            "args": ["--top", "9"], "env": {"LANG": "de", "A_b": ""}, "limits": {"pids": 2},
            "output_content_type": "text/plain; charset=utf-8", "public": true, "interface": "command",
        }))
        .unwrap();
    }

    #[test]
    fn what_would_not_survive_an_exec_or_a_header_is_refused() {
        for bad in [
            json!({"args": ["a\0b"]}),
            json!({"args": ["x".repeat(70_000)]}),
            json!({"args": ["x".repeat(40_000)], "env": {"A": "x".repeat(40_000)}}),
            json!({"env": {"": "x"}}),
            json!({"env": {"A=B": "x"}}),
            json!({"env": {"A": "x\0"}}),
            json!({"env": {"HOLM_TENANT": "other"}}),
            json!({"output_content_type": "text"}),
            json!({"output_content_type": "text/plain\r\nX: y"}),
            json!({"limits": {"pids": 0}}),
            json!({"limits": {"fuel": 5}}),
            json!({"interface": "http"}),
        ] {
            assert!(check(bad.clone()).is_err(), "{bad}");
        }
    }
}
