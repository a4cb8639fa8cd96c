//! The embedded store: tenants, keys and plugins in SQLite, artifacts as files named by their digest.
//!
//! Everything that requests look up is also held in memory, so that no job's path touches the disk for more than its
//! artifact. The database is written first and is the truth; memory follows under the same lock.

mod artifacts;
mod data_dir;
mod db;
mod memory;
mod usage;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use holm_sandbox::name::Name;
use jiff::Timestamp;
use uuid::Uuid;

pub use self::artifacts::{ArtifactError, TempFile};
pub use self::data_dir::{DataDir, DataDirError};
use self::db::Db;
use self::memory::Memory;
pub use self::usage::{Span, Totals, minute_of};
use crate::plugin::{Plugin, Revision};
use crate::tenant::{KeyHash, KeyInfo, TenantRow};

/// The store of one data directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: DataDir,
    /// Held for every change, database and files together.
    db: Mutex<Db>,
    memory: RwLock<Memory>,
}

/// The store could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database failed.
    #[error("database: {0}")]
    Db(#[from] rusqlite::Error),
    /// Its file could not be made.
    #[error("make `{path}`")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the database holds is not what this version wrote.
    #[error("the database holds what this version does not understand: {0}")]
    Content(String),
    /// A file could not be written, moved or removed.
    #[error("artifact files")]
    Artifact(#[from] ArtifactError),
    /// The tenant is not there (any more).
    #[error("no such tenant")]
    NoTenant,
    /// The plugin is not there (any more).
    #[error("no such plugin")]
    NoPlugin,
    /// The tenant has as many plugins as it may.
    #[error("the tenant already has {0} plugins")]
    TooManyPlugins(usize),
    /// The precondition of a change does not hold.
    #[error("the resource has changed")]
    Changed,
    /// The thread that did the work was lost.
    #[error("the store's worker ended early")]
    Worker,
}

/// Whether a change made something new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there before.
    Created,
    /// It was there and has been replaced.
    Replaced,
}

/// A check on what is stored now, made under the lock of the change that follows it.
pub type Precondition<T> = Box<dyn FnOnce(Option<&T>) -> bool + Send>;

impl Store {
    /// Opens the store in a directory that is held, and removes what an interrupted change left there.
    ///
    /// # Errors
    /// The database cannot be opened, or is of a later version.
    pub fn open(dir: DataDir) -> Result<Self, StoreError> {
        let db = Db::open(&dir.database())?;
        let memory = db.load()?;
        artifacts::sweep(&dir, &memory)?;
        Ok(Self(Arc::new(Inner { dir, db: Mutex::new(db), memory: RwLock::new(memory) })))
    }

    /// The directory behind it.
    #[must_use]
    pub fn dir(&self) -> &DataDir {
        &self.0.dir
    }

    fn read<T>(&self, look: impl FnOnce(&Memory) -> T) -> T {
        look(&self.0.memory.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs a change on a thread that may block.
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner, &mut Db) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.0.clone();
        let worker = tokio::task::spawn_blocking(move || {
            let mut db = inner.db.lock().unwrap_or_else(PoisonError::into_inner);
            work(&inner, &mut db)
        });
        worker.await.map_err(|_| StoreError::Worker)?
    }

    // tenants

    /// The tenant of this name.
    #[must_use]
    pub fn tenant(&self, name: &Name) -> Option<Arc<TenantRow>> {
        self.read(|memory| memory.tenants.get(name).map(|entry| entry.row.clone()))
    }

    /// All tenants, in the order of their names.
    #[must_use]
    pub fn tenants(&self) -> Vec<Arc<TenantRow>> {
        self.read(|memory| memory.tenants.values().map(|entry| entry.row.clone()).collect())
    }

    /// Makes or replaces a tenant's settings, if `allowed` accepts what is there.
    ///
    /// # Errors
    /// [`StoreError::Changed`] if it does not.
    pub async fn put_tenant(&self, row: TenantRow, allowed: Precondition<TenantRow>) -> Result<Change, StoreError> {
        self.change(move |inner, db| {
            let now = inner.read().tenants.get(&row.name).map(|entry| entry.row.clone());
            if !allowed(now.as_deref()) {
                return Err(StoreError::Changed);
            }
            let row = TenantRow { created_at: now.as_ref().map_or(row.created_at, |now| now.created_at), ..row };
            db.put_tenant(&row)?;
            inner.write().put_tenant(row);
            Ok(if now.is_some() { Change::Replaced } else { Change::Created })
        })
        .await
    }

    /// Deletes a tenant, its keys, its plugins and their files.
    ///
    /// # Errors
    /// [`StoreError::NoTenant`], or [`StoreError::Changed`].
    pub async fn delete_tenant(&self, name: Name, allowed: Precondition<TenantRow>) -> Result<(), StoreError> {
        self.change(move |inner, db| {
            let now = inner.read().tenants.get(&name).map(|entry| entry.row.clone()).ok_or(StoreError::NoTenant)?;
            if !allowed(Some(&now)) {
                return Err(StoreError::Changed);
            }
            db.delete_tenant(&name)?;
            inner.write().delete_tenant(&name);
            artifacts::remove_tenant(&inner.dir, &name)?;
            Ok(())
        })
        .await
    }

    /// Whether a tenant is paused.
    #[must_use]
    pub fn is_paused(&self, name: &Name) -> bool {
        self.read(|memory| memory.tenants.get(name).is_some_and(|entry| entry.paused))
    }

    /// Keeps in mind, also beyond a restart, that a tenant is paused, or is not.
    ///
    /// # Errors
    /// [`StoreError::NoTenant`].
    pub async fn set_paused(&self, name: Name, paused: bool) -> Result<(), StoreError> {
        self.change(move |inner, db| {
            if !inner.read().tenants.contains_key(&name) {
                return Err(StoreError::NoTenant);
            }
            db.set_paused(&name, paused)?;
            inner.write().set_paused(&name, paused);
            Ok(())
        })
        .await
    }

    // usage

    /// Adds to what tenants have used: tenant, minute, sum.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn add_usage(&self, minutes: Vec<(Name, i64, Totals)>) -> Result<(), StoreError> {
        self.change(move |_, db| db.add_usage(&minutes)).await
    }

    /// Puts what is long ago together, and forgets what is longer ago.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn fold_usage(&self, now: Timestamp) -> Result<(), StoreError> {
        self.change(move |_, db| db.fold_usage(now)).await
    }

    /// What a tenant has used in a span of time.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn usage(&self, tenant: Name, span: Span) -> Result<Totals, StoreError> {
        self.change(move |_, db| db.usage(&tenant, span)).await
    }

    // keys

    /// The key with this hash.
    #[must_use]
    pub fn key(&self, hash: &KeyHash) -> Option<KeyInfo> {
        self.read(|memory| memory.key(hash))
    }

    /// The keys of a tenant, oldest first.
    #[must_use]
    pub fn keys(&self, tenant: &Name) -> Vec<KeyInfo> {
        self.read(|memory| memory.keys_of(tenant))
    }

    /// Stores a key.
    ///
    /// # Errors
    /// [`StoreError::NoTenant`].
    pub async fn add_key(&self, info: KeyInfo, hash: KeyHash) -> Result<(), StoreError> {
        self.change(move |inner, db| {
            if !inner.read().tenants.contains_key(&info.tenant) {
                return Err(StoreError::NoTenant);
            }
            db.add_key(&info, &hash)?;
            inner.write().add_key(info, hash);
            Ok(())
        })
        .await
    }

    /// Deletes a key. False if the tenant has none with this id.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn delete_key(&self, tenant: Name, id: Uuid) -> Result<bool, StoreError> {
        self.change(move |inner, db| {
            let deleted = db.delete_key(&tenant, id)?;
            inner.write().delete_key(&tenant, id);
            Ok(deleted)
        })
        .await
    }

    // plugins

    /// A tenant's plugin.
    #[must_use]
    pub fn plugin(&self, tenant: &Name, name: &Name) -> Option<Arc<Plugin>> {
        self.read(|memory| memory.tenants.get(tenant)?.plugins.get(name).cloned())
    }

    /// All plugins of a tenant, in the order of their names.
    #[must_use]
    pub fn plugins(&self, tenant: &Name) -> Vec<Arc<Plugin>> {
        self.read(|memory| {
            memory.tenants.get(tenant).map(|t| t.plugins.values().cloned().collect()).unwrap_or_default()
        })
    }

    /// Makes or replaces a plugin with the files of its revision, at once or not at all.
    ///
    /// # Errors
    /// [`StoreError::NoTenant`], [`StoreError::TooManyPlugins`], [`StoreError::Changed`]; the old revision stays.
    pub async fn put_plugin(
        &self,
        plugin: Plugin,
        files: RevisionFiles,
        max_plugins: usize,
        allowed: Precondition<Plugin>,
    ) -> Result<Change, StoreError> {
        self.change(move |inner, db| {
            let (old, count) = {
                let memory = inner.read();
                let tenant = memory.tenants.get(&plugin.tenant).ok_or(StoreError::NoTenant)?;
                (tenant.plugins.get(&plugin.name).cloned(), tenant.plugins.len())
            };
            if !allowed(old.as_deref()) {
                return Err(StoreError::Changed);
            }
            if old.is_none() && count >= max_plugins {
                return Err(StoreError::TooManyPlugins(max_plugins));
            }
            files.keep(&inner.dir, &plugin.tenant, &plugin.revision)?;
            let created_at = old.as_ref().map_or(plugin.created_at, |old| old.created_at);
            let plugin = Plugin { created_at, ..plugin };
            db.put_plugin(&plugin)?;
            inner.write().put_plugin(plugin);
            if let Some(old) = &old {
                inner.forget_revision(&old.tenant, &old.revision)?;
            }
            Ok(if old.is_some() { Change::Replaced } else { Change::Created })
        })
        .await
    }

    /// Changes a plugin's settings.
    ///
    /// # Errors
    /// [`StoreError::NoPlugin`] or [`StoreError::Changed`].
    pub async fn set_plugin(&self, plugin: Plugin, allowed: Precondition<Plugin>) -> Result<(), StoreError> {
        self.change(move |inner, db| {
            let now = inner.read().plugin(&plugin.tenant, &plugin.name).ok_or(StoreError::NoPlugin)?;
            // an upload in the meantime has brought a revision that these settings were not made for
            if !allowed(Some(&now)) || now.revision != plugin.revision {
                return Err(StoreError::Changed);
            }
            db.put_plugin(&plugin)?;
            inner.write().put_plugin(plugin);
            Ok(())
        })
        .await
    }

    /// Deletes a plugin and the files that no other plugin of the tenant uses.
    ///
    /// # Errors
    /// [`StoreError::NoPlugin`] or [`StoreError::Changed`].
    pub async fn delete_plugin(
        &self,
        tenant: Name,
        name: Name,
        allowed: Precondition<Plugin>,
    ) -> Result<(), StoreError> {
        self.change(move |inner, db| {
            let now = inner.read().plugin(&tenant, &name).ok_or(StoreError::NoPlugin)?;
            if !allowed(Some(&now)) {
                return Err(StoreError::Changed);
            }
            db.delete_plugin(&tenant, &name)?;
            inner.write().delete_plugin(&tenant, &name);
            inner.forget_revision(&tenant, &now.revision)
        })
        .await
    }

    /// Keeps a compiled artifact that was made again, for this engine.
    ///
    /// # Errors
    /// [`StoreError::NoPlugin`] if no plugin of the tenant has this revision any more.
    pub async fn keep_compiled(
        &self,
        tenant: Name,
        revision: Revision,
        compiled: TempFile,
        engine: String,
    ) -> Result<(), StoreError> {
        self.change(move |inner, _| {
            if !inner.read().uses(&tenant, &revision) {
                return Err(StoreError::NoPlugin);
            }
            Ok(compiled.keep_as(&inner.dir.compiled(&engine, &tenant, &revision))?)
        })
        .await
    }
}

impl Inner {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a revision's files unless some plugin of the tenant still has it.
    fn forget_revision(&self, tenant: &Name, revision: &Revision) -> Result<(), StoreError> {
        if !self.read().uses(tenant, revision) {
            artifacts::remove_revision(&self.dir, tenant, revision)?;
        }
        Ok(())
    }
}

/// The files of one revision, not yet in their place.
#[derive(Debug)]
pub struct RevisionFiles {
    /// The bytes as they were uploaded.
    pub artifact: TempFile,
    /// The compiled form, with the engine that it is for.
    pub compiled: Option<(TempFile, String)>,
}

impl RevisionFiles {
    fn keep(self, dir: &DataDir, tenant: &Name, revision: &Revision) -> Result<(), ArtifactError> {
        if let Some((compiled, engine)) = self.compiled {
            compiled.keep_as(&dir.compiled(&engine, tenant, revision))?;
        }
        self.artifact.keep_as(&dir.artifact(tenant, revision))
    }
}

/// Opens a file of the store for reading. `None` if it is not there.
///
/// # Errors
/// Every other failure.
pub fn open_if_there(path: &Path) -> io::Result<Option<std::fs::File>> {
    match std::fs::File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
