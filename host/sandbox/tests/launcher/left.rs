//! What a launcher holds, and what an instance leaves on the host.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use holm_sandbox::cgroup::hierarchy::Layout;
use nix::fcntl::{FcntlArg, fcntl};

/// An instance, and its cgroups in every hierarchy.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    pub(crate) name: String,
    pub(crate) cgroups: Vec<PathBuf>,
}

/// What of a launcher must be the same before and after a sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Held {
    descriptors: Vec<String>,
    mounts: String,
    children: String,
}

impl Instance {
    pub(crate) fn new(name: &str) -> Self {
        let text = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).unwrap();
        let layout = Layout::discover(&text("mountinfo"), &text("cgroup")).unwrap();
        let hierarchies = layout.v1.into_iter().chain(layout.v2);
        let cgroups = hierarchies.map(|hierarchy| hierarchy.own_dir.join(format!("holm-{name}"))).collect();
        Self { name: name.to_owned(), cgroups }
    }

    /// The cgroups of its sandboxes.
    pub(crate) fn sandboxes(&self) -> Vec<PathBuf> {
        let tenants = self.cgroups.iter().flat_map(|cgroup| directories(cgroup));
        let leaves = tenants.flat_map(|tenant| directories(&tenant));
        // zygotes and families are not of any one sandbox
        leaves.filter(|leaf| leaf.file_name().unwrap().to_str().unwrap().starts_with("sandbox-")).collect()
    }

    /// Those of one tenant's.
    pub(crate) fn sandboxes_of(&self, tenant: &str) -> Vec<PathBuf> {
        let is_of = |leaf: &PathBuf| leaf.parent().is_some_and(|parent| parent.ends_with(tenant));
        self.sandboxes().into_iter().filter(is_of).collect()
    }

    /// The processes in its sandboxes.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let procs = |cgroup: &PathBuf| fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        let mut pids: Vec<i32> = Vec::new();
        for cgroup in self.sandboxes() {
            pids.extend(procs(&cgroup).lines().map(|line| line.parse::<i32>().unwrap()));
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Neither a cgroup nor a claim on uids is left.
    pub(crate) fn is_gone(&self, lock_dir: &Path) -> bool {
        self.cgroups.iter().all(|cgroup| !cgroup.exists()) && nothing_locked(lock_dir)
    }

    pub(crate) fn assert_gone(&self, lock_dir: &Path) {
        let left: Vec<&PathBuf> = self.cgroups.iter().filter(|cgroup| cgroup.exists()).collect();
        assert!(left.is_empty(), "cgroups are left: {left:?}");
        assert!(nothing_locked(lock_dir), "uids are still claimed");
    }
}

impl Held {
    /// Whether it has a directory open that is removed.
    pub(crate) fn is_letting_go(&self) -> bool {
        self.descriptors.iter().any(|descriptor| descriptor.ends_with("(deleted)"))
    }

    pub(crate) fn by(pid: u32) -> Self {
        let text = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        // one that is closed while it is being looked at is not held
        let target = |fd: fs::DirEntry| Some(fs::read_link(fd.path()).ok()?.to_string_lossy().into_owned());
        let listed = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let mut descriptors: Vec<String> = listed.filter_map(|fd| target(fd.unwrap())).collect();
        descriptors.sort_unstable();
        Self { descriptors, mounts: text("mountinfo"), children: text(&format!("task/{pid}/children")) }
    }
}

/// Whether there is a v2 hierarchy.
pub(crate) fn has_v2() -> bool {
    fs::read_to_string("/proc/mounts").unwrap().contains(" cgroup2 ")
}

/// The number of cgroup hierarchies in which a sandbox has a cgroup: one on pure v2.
pub(crate) fn hierarchies() -> usize {
    Instance::new("none").cgroups.len()
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let directory = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        entry.file_type().ok()?.is_dir().then(|| entry.path())
    };
    entries.filter_map(directory).collect()
}

/// A lock on the whole file can be had, so that nobody holds one on a byte of it.
#[allow(clippy::cast_possible_truncation)] // the C struct has these small constants as shorts
fn nothing_locked(lock_dir: &Path) -> bool {
    let Ok(file) = fs::OpenOptions::new().write(true).open(lock_dir.join("uid-blocks")) else { return true };
    let (l_type, l_whence) = (libc::F_WRLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    let lock = libc::flock { l_type, l_whence, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}
