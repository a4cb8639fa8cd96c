//! The data directory: who holds it, and what is where in it.
//!
//! ```text
//! lock                                   held (flock) by the one server that uses the directory
//! instance                               the id under which this directory's cgroups go
//! holm.db                                tenants, keys, plugins
//! operator.key                           made at the first start if no key was given
//! artifacts/TENANT/DIGEST                uploads, as they came
//! compiled/ENGINE/TENANT/DIGEST          compiled modules
//! tmp/                                   uploads and outputs on their way; emptied at start
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use holm_sandbox::name::Name;
use nix::fcntl::{Flock, FlockArg};

use crate::plugin::Revision;

/// A data directory that this process holds.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    instance: Name,
    _lock: Flock<File>,
}

/// A directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another server holds it.
    #[error("the data directory `{0}` is in use by another server; stop that one, or give this one its own --data-dir")]
    Held(PathBuf),
    /// A file system call failed.
    #[error("{what} `{path}`")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The instance's id is not one.
    #[error("`{0}` holds no instance id; it was not written by holm")]
    Instance(PathBuf),
}

impl DataDir {
    /// Makes the directory if it is not there, and takes hold of it.
    ///
    /// # Errors
    /// See [`DataDirError`].
    pub fn hold(path: &Path) -> Result<Self, DataDirError> {
        let at = |what, path: &Path| {
            let path = path.to_owned();
            move |source| DataDirError::Io { what, path, source }
        };
        make_private(path).map_err(at("make the directory", path))?;
        let path = path.canonicalize().map_err(at("resolve", path))?;
        let lock_path = path.join("lock");
        let lock = private_file(&lock_path).map_err(at("open", &lock_path))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| DataDirError::Held(path.clone()))?;
        for name in ["artifacts", "compiled", "tmp"] {
            let dir = path.join(name);
            make_private(&dir).map_err(at("make the directory", &dir))?;
        }
        let instance_path = path.join("instance");
        let instance = read_or_make_instance(&instance_path).map_err(at("read", &instance_path))?;
        let instance = instance.parse().map_err(|_| DataDirError::Instance(instance_path))?;
        Ok(Self { path, instance, _lock: lock })
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The id of this directory's cgroups.
    #[must_use]
    pub fn instance(&self) -> &Name {
        &self.instance
    }

    /// Where the database is.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.path.join("holm.db")
    }

    /// Where the operator key is, if the first start made one.
    #[must_use]
    pub fn operator_key(&self) -> PathBuf {
        self.path.join("operator.key")
    }

    /// Where files on their way are.
    #[must_use]
    pub fn tmp(&self) -> PathBuf {
        self.path.join("tmp")
    }

    pub(super) fn artifacts(&self) -> PathBuf {
        self.path.join("artifacts")
    }

    pub(super) fn all_compiled(&self) -> PathBuf {
        self.path.join("compiled")
    }

    /// The bytes of a revision as they were uploaded.
    #[must_use]
    pub fn artifact(&self, tenant: &Name, revision: &Revision) -> PathBuf {
        self.artifacts().join(tenant.as_str()).join(revision.hex())
    }

    /// The compiled form of a revision for an engine. Each tenant has its own, so that no tenant's upload can come to
    /// another, nor its timing tell that somebody had uploaded the same.
    #[must_use]
    pub fn compiled(&self, engine: &str, tenant: &Name, revision: &Revision) -> PathBuf {
        self.all_compiled().join(engine).join(tenant.as_str()).join(revision.hex())
    }
}

pub(super) fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

pub(super) fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// The id is random, and made with the directory: two directories on one host never share a cgroup.
fn read_or_make_instance(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let mut file = private_file(path)?;
    Read::by_ref(&mut file).take(64).read_to_string(&mut text)?;
    if text.is_empty() {
        let mut bytes = [0; 6];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        text = hex::encode(bytes);
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
    }
    Ok(text.trim().to_owned())
}

/// Empties a directory of files.
pub(super) fn empty(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_directory_is_refused_and_keeps_its_instance() {
        let dir = tempfile::tempdir().unwrap();
        let held = DataDir::hold(dir.path()).unwrap();
        assert!(matches!(DataDir::hold(dir.path()), Err(DataDirError::Held(_))));
        let instance = held.instance().clone();
        drop(held);
        assert_eq!(*DataDir::hold(dir.path()).unwrap().instance(), instance);
    }

    #[test]
    fn a_foreign_instance_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("instance"), "../../etc").unwrap();
        assert!(matches!(DataDir::hold(dir.path()), Err(DataDirError::Instance(_))));
    }
}
