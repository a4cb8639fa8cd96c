//! What requests look up, in memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use holm_sandbox::name::Name;
use uuid::Uuid;

use crate::plugin::{Plugin, Revision};
use crate::tenant::{KeyHash, KeyInfo, TenantRow};

/// The whole content of the database.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) tenants: BTreeMap<Name, Entry>,
    keys: HashMap<KeyHash, KeyInfo>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) row: Arc<TenantRow>,
    pub(super) plugins: BTreeMap<Name, Arc<Plugin>>,
    pub(super) paused: bool,
}

impl Memory {
    pub(super) fn put_tenant(&mut self, row: TenantRow) {
        let row = Arc::new(row);
        match self.tenants.get_mut(&row.name) {
            Some(entry) => entry.row = row,
            None => drop(self.tenants.insert(row.name.clone(), Entry { row, plugins: BTreeMap::new(), paused: false })),
        }
    }

    pub(super) fn set_paused(&mut self, name: &Name, paused: bool) {
        if let Some(entry) = self.tenants.get_mut(name) {
            entry.paused = paused;
        }
    }

    pub(super) fn delete_tenant(&mut self, name: &Name) {
        self.tenants.remove(name);
        self.keys.retain(|_, key| key.tenant != *name);
    }

    pub(super) fn add_key(&mut self, info: KeyInfo, hash: KeyHash) {
        self.keys.insert(hash, info);
    }

    pub(super) fn delete_key(&mut self, tenant: &Name, id: Uuid) {
        self.keys.retain(|_, key| !(key.id == id && key.tenant == *tenant));
    }

    /// The key with this hash, compared once more in constant time: the map's own comparison of hashes of random keys
    /// tells nothing useful, and this costs nothing.
    pub(super) fn key(&self, hash: &KeyHash) -> Option<KeyInfo> {
        self.keys.get_key_value(hash).filter(|(stored, _)| stored.matches(hash)).map(|(_, info)| info.clone())
    }

    pub(super) fn keys_of(&self, tenant: &Name) -> Vec<KeyInfo> {
        let mut keys: Vec<KeyInfo> = self.keys.values().filter(|key| key.tenant == *tenant).cloned().collect();
        keys.sort_by_key(|key| key.id);
        keys
    }

    pub(super) fn plugin(&self, tenant: &Name, name: &Name) -> Option<Arc<Plugin>> {
        self.tenants.get(tenant)?.plugins.get(name).cloned()
    }

    pub(super) fn put_plugin(&mut self, plugin: Plugin) {
        if let Some(entry) = self.tenants.get_mut(&plugin.tenant) {
            entry.plugins.insert(plugin.name.clone(), Arc::new(plugin));
        }
    }

    pub(super) fn delete_plugin(&mut self, tenant: &Name, name: &Name) {
        if let Some(entry) = self.tenants.get_mut(tenant) {
            entry.plugins.remove(name);
        }
    }

    /// Whether a plugin of the tenant has this revision.
    pub(super) fn uses(&self, tenant: &Name, revision: &Revision) -> bool {
        self.tenants.get(tenant).is_some_and(|entry| entry.plugins.values().any(|p| p.revision == *revision))
    }
}
