//! Plugins: a tenant's code, by the digest of its bytes, and the settings that its jobs start from.

mod revision;
mod settings;

pub use self::revision::{Hasher, Revision};
pub use self::settings::{Interface, PluginSettings, PluginSettingsError, check_args, check_env, check_size};

use holm_runtime::invocation::Exports;
use holm_sandbox::name::Name;
use jiff::Timestamp;

use crate::limit::{Given, Runtime};

/// A plugin as it is stored: the current revision and its settings.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// Whose it is.
    pub tenant: Name,
    /// Its name.
    pub name: Name,
    /// The digest of the uploaded bytes.
    pub revision: Revision,
    /// What runs it.
    pub runtime: Runtime,
    /// Length of the uploaded bytes.
    pub bytes: u64,
    /// How it can be called.
    pub exports: Exports,
    /// How it is called.
    pub interface: Interface,
    /// What its jobs start from.
    pub settings: PluginSettings,
    /// When the name was first uploaded to.
    pub created_at: Timestamp,
    /// When the revision or a setting last changed.
    pub updated_at: Timestamp,
}

impl Plugin {
    /// The limits that its settings give.
    #[must_use]
    pub fn limits(&self) -> Given {
        self.settings.limits()
    }
}
