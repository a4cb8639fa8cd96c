//! Artifact files: written aside, moved into place whole, named by their digest, removed when nobody has them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use holm_sandbox::name::Name;
use uuid::Uuid;

use super::data_dir::{DataDir, empty, make_private};
use super::memory::Memory;
use crate::plugin::Revision;

/// A file operation failed.
#[derive(Debug, thiserror::Error)]
#[error("{what} `{path}`")]
pub struct ArtifactError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ArtifactError {
    let path = path.to_owned();
    move |source| ArtifactError { what, path, source }
}

/// A file on its way. Removed when dropped, unless it was kept.
#[derive(Debug)]
pub struct TempFile {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl TempFile {
    /// Makes an empty one.
    ///
    /// # Errors
    /// Those of making a file: no space, no descriptors.
    pub fn make(dir: &DataDir) -> Result<Self, ArtifactError> {
        let path = dir.tmp().join(Uuid::now_v7().to_string());
        let options = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        Ok(Self { file: options.map_err(at("make", &path))?, path, kept: false })
    }

    /// The open file, at whatever position it was left.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Lets everybody read it, and nobody write to it, who can open it at all: in the data directory, the server alone, and
    /// a zygote what it has been handed.
    ///
    /// # Errors
    /// Those of changing a mode.
    pub fn finish(&self) -> Result<(), ArtifactError> {
        let mode = fs::Permissions::from_mode(0o444);
        self.file.set_permissions(mode).map_err(at("change the mode of", &self.path))
    }

    /// Opens it once more for reading, at the start.
    ///
    /// # Errors
    /// Those of opening a file.
    pub fn reopen(&self) -> Result<File, ArtifactError> {
        File::open(&self.path).map_err(at("open", &self.path))
    }

    /// Moves it to `place`, durably: after a crash the file is there whole, or not at all.
    pub(super) fn keep_as(mut self, place: &Path) -> Result<(), ArtifactError> {
        let parent = place.parent().unwrap_or(place);
        make_private(parent).map_err(at("make the directory", parent))?;
        self.file.sync_all().map_err(at("write out", &self.path))?;
        fs::rename(&self.path, place).map_err(at("move into place", place))?;
        self.kept = true;
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(at("write out", parent))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.kept {
            // what stays is removed at the next start
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the files of a revision, for every engine.
pub(super) fn remove_revision(dir: &DataDir, tenant: &Name, revision: &Revision) -> Result<(), ArtifactError> {
    remove_file(&dir.artifact(tenant, revision))?;
    for engine in names_in(&dir.all_compiled())? {
        remove_file(&dir.compiled(&engine, tenant, revision))?;
    }
    Ok(())
}

/// Removes all files of a tenant.
pub(super) fn remove_tenant(dir: &DataDir, tenant: &Name) -> Result<(), ArtifactError> {
    remove_tree(&dir.artifacts().join(tenant.as_str()))?;
    for engine in names_in(&dir.all_compiled())? {
        remove_tree(&dir.all_compiled().join(engine).join(tenant.as_str()))?;
    }
    Ok(())
}

/// Removes what an interrupted change has left: temporary files, and artifacts that no plugin has.
pub(super) fn sweep(dir: &DataDir, memory: &Memory) -> Result<(), ArtifactError> {
    empty(&dir.tmp()).map_err(at("empty", &dir.tmp()))?;
    sweep_tenants(&dir.artifacts(), memory)?;
    for engine in names_in(&dir.all_compiled())? {
        sweep_tenants(&dir.all_compiled().join(engine), memory)?;
    }
    Ok(())
}

fn sweep_tenants(parent: &Path, memory: &Memory) -> Result<(), ArtifactError> {
    for tenant in names_in(parent)? {
        let path = parent.join(&tenant);
        let known = tenant.parse::<Name>().ok().filter(|name| memory.tenants.contains_key(name));
        let Some(name) = known else {
            remove_tree(&path)?;
            continue;
        };
        for digest in names_in(&path)? {
            if !digest.parse::<Revision>().is_ok_and(|revision| memory.uses(&name, &revision)) {
                remove_file(&path.join(digest))?;
            }
        }
    }
    Ok(())
}

fn names_in(dir: &Path) -> Result<Vec<String>, ArtifactError> {
    let entries = fs::read_dir(dir).map_err(at("list", dir))?;
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    entries.map(name).collect::<io::Result<_>>().map_err(at("list", dir))
}

fn remove_file(path: &Path) -> Result<(), ArtifactError> {
    ignore_missing(fs::remove_file(path)).map_err(at("remove", path))
}

fn remove_tree(path: &Path) -> Result<(), ArtifactError> {
    ignore_missing(fs::remove_dir_all(path)).map_err(at("remove", path))
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
