//! Tenants: who they are, what they may have, and how a request proves to be one.

mod ceiling;
mod keys;
mod quota;
mod settings;

pub use self::ceiling::CeilingSettings;
pub use self::keys::{AuthError, Caller, Key, KeyHash, KeyInfo, OperatorKey, OperatorKeyError};
pub use self::quota::{Quota, QuotaKey};
pub use self::settings::{SettingsError, TenantSettings};

use std::sync::Arc;

use holm_sandbox::name::Name;
use jiff::Timestamp;

use crate::limit::{Given, Maximums};

/// A tenant as it is stored.
#[derive(Clone, Debug)]
pub struct TenantRow {
    /// Its name.
    pub name: Name,
    /// What the operator has set.
    pub settings: TenantSettings,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A tenant on whose behalf a request may act: proof that the caller was authenticated and may act for this tenant, or
/// calls what is public.
///
/// Made by [`Caller::tenant`] and [`Tenant::of_public_plugin`] alone.
#[derive(Clone, Debug)]
pub struct Tenant(Arc<TenantRow>);

impl Tenant {
    /// The tenant of a plugin that anyone may call, for that call.
    #[must_use]
    pub fn of_public_plugin(row: Arc<TenantRow>) -> Self {
        Self(row)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.0.name
    }

    /// The row behind it.
    #[must_use]
    pub fn row(&self) -> &TenantRow {
        &self.0
    }

    /// What it may have at once and in all.
    #[must_use]
    pub fn quota(&self) -> Quota {
        self.0.settings.quota()
    }

    /// The defaults for its jobs.
    #[must_use]
    pub fn job_defaults(&self) -> Given {
        self.0.settings.job_defaults()
    }

    /// The greatest values for its jobs, below the server's own.
    #[must_use]
    pub fn job_maximums(&self, server: &Given) -> Maximums {
        Maximums::least_of(vec![server.clone(), self.0.settings.job_maximums()])
    }

    /// Whose waiting jobs are served first: higher before lower.
    #[must_use]
    pub fn priority(&self) -> u32 {
        self.0.settings.priority()
    }

    /// Whether each of its jobs must have a network namespace that no other had before.
    #[must_use]
    pub fn wants_fresh_networks(&self) -> bool {
        self.0.settings.fresh_netns()
    }

    /// The ceiling over all of its jobs.
    #[must_use]
    pub fn ceiling(&self) -> holm_sandbox::limits::Ceiling {
        self.0.settings.ceiling()
    }
}
