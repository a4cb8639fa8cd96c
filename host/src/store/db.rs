//! The SQL. Every change is one transaction.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use holm_sandbox::name::Name;
use jiff::Timestamp;
use rusqlite::{Connection, Row, params};
use uuid::Uuid;

use super::StoreError;
use super::data_dir::private_file;
use super::memory::Memory;
use super::usage::{self, Span, Totals};
use crate::limit::Runtime;
use crate::plugin::{Plugin, PluginSettings};
use crate::tenant::{KeyHash, KeyInfo, TenantRow};

/// Counts up with every change of the schema; `PRAGMA user_version` of the file.
const SCHEMA_VERSION: i64 = 3;

const SCHEMA: &str = "
    CREATE TABLE tenants (
        name       TEXT PRIMARY KEY,
        settings   TEXT NOT NULL,
        created_at TEXT NOT NULL,
        paused     INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE keys (
        id         TEXT PRIMARY KEY,
        tenant     TEXT NOT NULL REFERENCES tenants(name) ON DELETE CASCADE,
        hash       BLOB NOT NULL UNIQUE,
        created_at TEXT NOT NULL
    ) STRICT;
    CREATE TABLE plugins (
        tenant     TEXT NOT NULL REFERENCES tenants(name) ON DELETE CASCADE,
        name       TEXT NOT NULL,
        revision   TEXT NOT NULL,
        runtime    TEXT NOT NULL,
        bytes      INTEGER NOT NULL,
        exports    TEXT NOT NULL,
        settings   TEXT NOT NULL,
        created_at TEXT NOT NULL,
        updated_at TEXT NOT NULL,
        PRIMARY KEY (tenant, name)
    ) STRICT;
";

const USAGE: &str = "
    CREATE TABLE usage (
        tenant     TEXT NOT NULL REFERENCES tenants(name) ON DELETE CASCADE,
        seconds    INTEGER NOT NULL,
        start      INTEGER NOT NULL,
        totals     TEXT NOT NULL,
        PRIMARY KEY (tenant, seconds, start)
    ) STRICT, WITHOUT ROWID;
";

/// From version 1, where every plugin was a command.
const ADD_EXPORTS: &str =
    r#"ALTER TABLE plugins ADD COLUMN exports TEXT NOT NULL DEFAULT '{"command":true,"http":false}';"#;

/// From version 2, where no tenant could be paused.
const ADD_PAUSED: &str = "ALTER TABLE tenants ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;";

/// The open database.
#[derive(Debug)]
pub(super) struct Db(Connection);

impl Db {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        // the plugins' environments are in it; what SQLite makes beside it has the same mode
        let made = private_file(path).and_then(|file| file.set_permissions(Permissions::from_mode(0o600)));
        made.map_err(|source| StoreError::File { path: path.to_owned(), source })?;
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // a change that was answered survives the machine's crash
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match version {
            0 => migrate(&mut connection, &[SCHEMA, USAGE])?,
            1 => migrate(&mut connection, &[ADD_EXPORTS, ADD_PAUSED, USAGE])?,
            2 => migrate(&mut connection, &[ADD_PAUSED, USAGE])?,
            SCHEMA_VERSION => {}
            later => {
                return Err(StoreError::Content(format!("schema version {later}, written by a later version")));
            }
        }
        Ok(Self(connection))
    }

    /// Reads everything.
    pub(super) fn load(&self) -> Result<Memory, StoreError> {
        let mut memory = Memory::default();
        let mut statement = self.0.prepare("SELECT name, settings, created_at, paused FROM tenants")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let tenant = tenant(row)?;
            let name = tenant.name.clone();
            memory.put_tenant(tenant);
            memory.set_paused(&name, row.get(3)?);
        }
        let mut statement = self.0.prepare("SELECT id, tenant, created_at, hash FROM keys")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let hash: Vec<u8> = row.get(3)?;
            let hash = KeyHash::from_bytes(&hash).ok_or_else(|| StoreError::Content("a key's hash".into()))?;
            memory.add_key(key(row)?, hash);
        }
        let columns = "tenant, name, revision, runtime, bytes, exports, settings, created_at, updated_at";
        let mut statement = self.0.prepare(&format!("SELECT {columns} FROM plugins"))?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            memory.put_plugin(plugin(row)?);
        }
        Ok(memory)
    }

    pub(super) fn put_tenant(&mut self, row: &TenantRow) -> Result<(), StoreError> {
        let sql = "INSERT INTO tenants (name, settings, created_at) VALUES (?1, ?2, ?3)
                   ON CONFLICT (name) DO UPDATE SET settings = ?2";
        self.0.execute(sql, params![row.name.as_str(), json(&row.settings)?, row.created_at.to_string()])?;
        Ok(())
    }

    pub(super) fn set_paused(&mut self, name: &Name, paused: bool) -> Result<(), StoreError> {
        self.0.execute("UPDATE tenants SET paused = ?2 WHERE name = ?1", params![name.as_str(), paused])?;
        Ok(())
    }

    pub(super) fn add_usage(&mut self, minutes: &[(Name, i64, Totals)]) -> Result<(), StoreError> {
        let transaction = self.0.transaction()?;
        usage::add(&transaction, minutes)?;
        Ok(transaction.commit()?)
    }

    pub(super) fn fold_usage(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let transaction = self.0.transaction()?;
        usage::fold(&transaction, now)?;
        Ok(transaction.commit()?)
    }

    pub(super) fn usage(&mut self, tenant: &Name, span: Span) -> Result<Totals, StoreError> {
        usage::sum(&self.0.transaction()?, tenant, span)
    }

    pub(super) fn delete_tenant(&mut self, name: &Name) -> Result<(), StoreError> {
        self.0.execute("DELETE FROM tenants WHERE name = ?1", [name.as_str()])?;
        Ok(())
    }

    pub(super) fn add_key(&mut self, info: &KeyInfo, hash: &KeyHash) -> Result<(), StoreError> {
        let sql = "INSERT INTO keys (id, tenant, hash, created_at) VALUES (?1, ?2, ?3, ?4)";
        let created_at = info.created_at.to_string();
        self.0.execute(sql, params![info.id.to_string(), info.tenant.as_str(), hash.as_bytes(), created_at])?;
        Ok(())
    }

    pub(super) fn delete_key(&mut self, tenant: &Name, id: Uuid) -> Result<bool, StoreError> {
        let sql = "DELETE FROM keys WHERE tenant = ?1 AND id = ?2";
        Ok(self.0.execute(sql, params![tenant.as_str(), id.to_string()])? > 0)
    }

    pub(super) fn put_plugin(&mut self, plugin: &Plugin) -> Result<(), StoreError> {
        let sql =
            "INSERT INTO plugins (tenant, name, revision, runtime, bytes, exports, settings, created_at, updated_at)
                   VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
                   ON CONFLICT (tenant, name)
                   DO UPDATE SET revision = ?3, runtime = ?4, bytes = ?5, exports = ?6, settings = ?7, updated_at = ?9";
        self.0.execute(
            sql,
            params![
                plugin.tenant.as_str(),
                plugin.name.as_str(),
                plugin.revision.to_string(),
                plugin.runtime.word(),
                i64::try_from(plugin.bytes).unwrap_or(i64::MAX),
                json(&plugin.exports)?,
                json(&plugin.settings)?,
                plugin.created_at.to_string(),
                plugin.updated_at.to_string(),
            ],
        )?;
        Ok(())
    }

    pub(super) fn delete_plugin(&mut self, tenant: &Name, name: &Name) -> Result<(), StoreError> {
        self.0.execute("DELETE FROM plugins WHERE tenant = ?1 AND name = ?2", [tenant.as_str(), name.as_str()])?;
        Ok(())
    }
}

/// Brings the schema to this version.
fn migrate(connection: &mut Connection, steps: &[&str]) -> Result<(), StoreError> {
    let transaction = connection.transaction()?;
    steps.iter().try_for_each(|sql| transaction.execute_batch(sql))?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    Ok(transaction.commit()?)
}

fn tenant(row: &Row<'_>) -> Result<TenantRow, StoreError> {
    Ok(TenantRow { name: parsed(row, 0)?, settings: from_json(row, 1)?, created_at: time(row, 2)? })
}

fn key(row: &Row<'_>) -> Result<KeyInfo, StoreError> {
    Ok(KeyInfo { id: parsed(row, 0)?, tenant: parsed(row, 1)?, created_at: time(row, 2)? })
}

fn plugin(row: &Row<'_>) -> Result<Plugin, StoreError> {
    let runtime: String = row.get(3)?;
    let bytes: i64 = row.get(4)?;
    let (exports, settings): (_, PluginSettings) = (from_json(row, 5)?, from_json(row, 6)?);
    let interface = settings.interface_of(exports).map_err(|error| StoreError::Content(error.to_string()))?;
    Ok(Plugin {
        tenant: parsed(row, 0)?,
        name: parsed(row, 1)?,
        revision: parsed(row, 2)?,
        runtime: match runtime.as_str() {
            "native" => Runtime::Native,
            "wasm" => Runtime::Wasm,
            other => return Err(StoreError::Content(format!("runtime `{other}`"))),
        },
        bytes: u64::try_from(bytes).unwrap_or(0),
        exports,
        interface,
        settings,
        created_at: time(row, 7)?,
        updated_at: time(row, 8)?,
    })
}

fn parsed<T: std::str::FromStr>(row: &Row<'_>, column: usize) -> Result<T, StoreError> {
    let text: String = row.get(column)?;
    text.parse().map_err(|_| StoreError::Content(format!("`{text}`")))
}

fn time(row: &Row<'_>, column: usize) -> Result<Timestamp, StoreError> {
    parsed(row, column)
}

pub(super) fn json(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Content(error.to_string()))
}

pub(super) fn from_json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> Result<T, StoreError> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| StoreError::Content(error.to_string()))
}
