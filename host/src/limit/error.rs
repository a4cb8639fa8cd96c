//! Limits that cannot be had.

use serde_json::{Number, Value};

use super::{Limit, Runtime};

/// What is wrong with limits that somebody gave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// No such limit, or a value that is no number of the right kind.
    #[error("{0}")]
    Malformed(String),
    /// A value outside of its range.
    #[error("`{}` is {given}, outside of {} to {}", limit.key(), limit.to_json(*minimum), limit.to_json(*maximum))]
    OutOfRange {
        /// Which limit.
        limit: Limit,
        /// The value as it was given.
        given: Number,
        /// The least allowed.
        minimum: u64,
        /// The greatest allowed here.
        maximum: u64,
    },
    /// A limit that jobs of this runtime do not have.
    #[error("`{}` does not apply to {} plugins", limit.key(), runtime.word())]
    NotApplicable {
        /// Which limit.
        limit: Limit,
        /// The plugin's runtime.
        runtime: Runtime,
    },
    /// A limit that cannot be changed while a job runs.
    #[error("`{}` cannot be changed while a job runs; {} can", limit.key(), Limit::changing_while_running().join(", "))]
    Fixed {
        /// Which limit.
        limit: Limit,
        /// The value as it was given.
        given: Value,
    },
}
