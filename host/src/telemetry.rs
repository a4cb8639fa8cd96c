//! Logs, to standard error. Nothing of a job's input or output, no key and no header ever goes there.

use std::io;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Directives that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("`log` is `{directives}`: {detail}")]
pub struct LogError {
    directives: String,
    detail: String,
}

/// Starts logging what `directives` select.
///
/// # Errors
/// [`LogError`].
pub fn start(directives: &str, format: LogFormat) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(directives)
        .map_err(|error| LogError { directives: directives.to_owned(), detail: error.to_string() })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    // a second start, in tests, changes nothing
    let _ = match format {
        LogFormat::Text => lines.with_ansi(false).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    Ok(())
}
