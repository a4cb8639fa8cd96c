//! What an operator sets for a tenant: a JSON object, checked as a whole and stored as it was given.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};
use utoipa::ToSchema;

use super::ceiling::CeilingSettings;
use super::quota::{Quota, QuotaKey};
use crate::limit::{Given, Limit, LimitError, Maximums};

/// The greatest priority, and the one of tenants for whom none is set: there is room above and below.
const MOST_PRIORITY: u32 = 1000;
const DEFAULT_PRIORITY: u32 = 100;

/// The body of `PUT /v1/tenants/{t}`. Every field may be left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TenantSettings {
    /// The ceiling over all of the tenant's jobs together; see the schema `TenantLimits`.
    #[serde(skip_serializing_if = "Map::is_empty")]
    limits: Map<String, Value>,
    /// What the tenant may have at once and in all.
    #[serde(skip_serializing_if = "Map::is_empty")]
    quota: Map<String, Value>,
    /// Limits of jobs that give none themselves.
    #[serde(skip_serializing_if = "Map::is_empty")]
    job_defaults: Map<String, Value>,
    /// The greatest limits that jobs may have.
    #[serde(skip_serializing_if = "Map::is_empty")]
    job_maximums: Map<String, Value>,
    /// Whose waiting jobs are served first, 0 to 1,000: higher before lower; 100 if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>, maximum = 1000)]
    priority: Option<Number>,
    /// Never give a job a network namespace that another job has had before.
    #[serde(skip_serializing_if = "Option::is_none")]
    fresh_netns: Option<bool>,
}

/// Settings that cannot be taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// Unknown fields or wrong types.
    #[error("{0}")]
    Malformed(String),
    /// A value out of its range.
    #[error("`{field}` is {given}, outside of {minimum} to {maximum}")]
    OutOfRange {
        /// The field's path.
        field: String,
        /// What was given.
        given: Number,
        /// The least allowed.
        minimum: Number,
        /// The greatest allowed.
        maximum: Number,
    },
    /// A job limit that is wrong.
    #[error("`{field}`: {error}")]
    Limit {
        /// `job_defaults` or `job_maximums`.
        field: &'static str,
        /// What is wrong.
        error: LimitError,
    },
    /// A value that can never be, whose range is no pair of numbers.
    #[error("`{field}` is {given}; possible is {possible}")]
    Impossible {
        /// The field's path.
        field: String,
        /// What was given.
        given: Value,
        /// What can be.
        possible: String,
    },
    /// A setting of the contract that this server cannot enforce.
    #[error("`{field}` cannot be enforced by this server")]
    NotAvailable {
        /// The field's path.
        field: String,
        /// What was given.
        given: Value,
    },
}

impl TenantSettings {
    /// Checks every value for a tenant that has the settings `kept` so far.
    ///
    /// # Errors
    /// The first that cannot be taken.
    pub fn check(&self, kept: &Self, server_maximums: &Given) -> Result<(), SettingsError> {
        CeilingSettings::check(&self.limits)?;
        Quota::check(&self.quota)?;
        let server = Maximums::least_of(vec![server_maximums.clone()]);
        let limit = |field| move |error| SettingsError::Limit { field, error };
        Given::check_change(&kept.job_maximums, &self.job_maximums, None, &server).map_err(limit("job_maximums"))?;
        let own = Maximums::least_of(vec![server_maximums.clone(), self.job_maximums()]);
        Given::check_change(&kept.job_defaults, &self.job_defaults, None, &own).map_err(limit("job_defaults"))?;
        match &self.priority {
            Some(given) if given.as_f64().is_some_and(|value| value.fract() != 0.0) => {
                Err(SettingsError::Malformed("`priority` is no whole number".into()))
            }
            Some(given) if whole(given).is_none_or(|value| value > MOST_PRIORITY) => {
                let (minimum, maximum) = (0.into(), MOST_PRIORITY.into());
                Err(SettingsError::OutOfRange { field: "priority".into(), given: given.clone(), minimum, maximum })
            }
            _ => Ok(()),
        }
    }

    /// Whose waiting jobs are served first: higher before lower.
    #[must_use]
    pub fn priority(&self) -> u32 {
        self.priority.as_ref().and_then(whole).unwrap_or(DEFAULT_PRIORITY)
    }

    /// Whether the operator has set the priority.
    #[must_use]
    pub fn sets_priority(&self) -> bool {
        self.priority.is_some()
    }

    /// Whether a section of the settings has a member of this name.
    #[must_use]
    pub fn knows(section: &str, name: &str) -> bool {
        match section {
            "limits" => CeilingSettings::knows(name),
            "quota" => QuotaKey::ALL.iter().any(|key| key.word() == name),
            "job_defaults" | "job_maximums" => Limit::from_key(name).is_some(),
            _ => true,
        }
    }

    /// The quotas, with defaults for what is not set.
    #[must_use]
    pub fn quota(&self) -> Quota {
        Quota::from_stored(&self.quota)
    }

    /// Whether the operator has set this quota.
    #[must_use]
    pub fn sets_quota(&self, word: &str) -> bool {
        self.quota.contains_key(word)
    }

    /// The defaults of jobs.
    #[must_use]
    pub fn job_defaults(&self) -> Given {
        Given::from_stored(&self.job_defaults)
    }

    /// The maximums of jobs.
    #[must_use]
    pub fn job_maximums(&self) -> Given {
        Given::from_stored(&self.job_maximums)
    }

    /// Whether each job must have a network namespace that no other had before.
    #[must_use]
    pub fn fresh_netns(&self) -> bool {
        self.fresh_netns.unwrap_or(false)
    }

    /// The ceiling over all jobs.
    #[must_use]
    pub fn ceiling(&self) -> holm_sandbox::limits::Ceiling {
        CeilingSettings::from_stored(&self.limits).ceiling()
    }
}

/// A whole number, however it is written; `None` for one that is none, or too large for any setting.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // what is whole and in range is exact
fn whole(number: &Number) -> Option<u32> {
    let value = number.as_f64()?;
    (value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&value)).then_some(value as u32)
}
