//! Where this process's cgroups are: pure functions over the text of `/proc/self/mountinfo` and `/proc/self/cgroup`.
//!
//! Handles v1, v2 and hybrid; co-mounted controllers (`cpu,cpuacct`); a hierarchy that is mounted more than once; and
//! a mount that shows only a part of its hierarchy, as inside a container.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The cgroup hierarchies of this machine as this process sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// One entry for each mounted v1 hierarchy with controllers.
    pub v1: Vec<Hierarchy>,
    /// The v2 hierarchy, if it is mounted. On a hybrid machine it usually has no controllers.
    pub v2: Option<Hierarchy>,
}

/// The leaf that holds the server and its launcher where v2 allows them no place in the cgroup above; see `room`.
pub const SERVER_LEAF: &str = "holm-server";

/// One hierarchy and this process's place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// The controllers bound to it. Empty for v2, whose controllers are in `cgroup.controllers` of each directory.
    pub controllers: BTreeSet<String>,
    /// The directory of this process's own cgroup; on v2, of the one above where its own is [`SERVER_LEAF`].
    pub own_dir: PathBuf,
    /// The same as a path below the hierarchy's root, as `/proc/PID/cgroup` has it.
    pub own_path: String,
}

/// The text is not what the kernel writes, or the hierarchies are out of reach.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A line that does not parse.
    #[error("`{file}` line {line}: {what}")]
    Malformed {
        /// Which file.
        file: &'static str,
        /// Line number from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No cgroup file system is mounted at all.
    #[error("no cgroup file system is mounted")]
    NoneMounted,
}

impl Layout {
    /// Finds the hierarchies. `mountinfo` and `cgroup` are the texts of `/proc/self/mountinfo` and
    /// `/proc/self/cgroup`.
    ///
    /// A hierarchy in which this process's own cgroup is not visible through any mount is left out.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn discover(mountinfo: &str, cgroup: &str) -> Result<Self, LayoutError> {
        let own = parse_self_cgroup(cgroup)?;
        let mounts = parse_mountinfo(mountinfo)?;
        if mounts.is_empty() {
            return Err(LayoutError::NoneMounted);
        }
        let v2 = mounts.iter().filter(|m| m.v2).find_map(|mount| {
            let own_path = above_server_leaf(own.get("")?);
            let own_dir = mount.locate(own_path)?;
            Some(Hierarchy { controllers: BTreeSet::new(), own_dir, own_path: own_path.to_owned() })
        });
        let mut v1: Vec<Hierarchy> = Vec::new();
        for mount in mounts.iter().filter(|m| !m.v2) {
            // the controllers of a v1 mount are among its options; `/proc/self/cgroup` says which words are some
            let controllers: BTreeSet<String> =
                mount.options.iter().filter(|o| own.contains_key(*o)).cloned().collect();
            let Some(first) = controllers.first() else { continue };
            let own_path = own[first].clone();
            let seen = v1.iter().any(|h| h.controllers == controllers);
            if let (false, Some(own_dir)) = (seen, mount.locate(&own_path)) {
                v1.push(Hierarchy { controllers, own_dir, own_path });
            }
        }
        Ok(Self { v1, v2 })
    }

    /// The v1 hierarchy that `controller` is bound to.
    #[must_use]
    pub fn v1_with(&self, controller: &str) -> Option<&Hierarchy> {
        self.v1.iter().find(|h| h.controllers.contains(controller))
    }
}

/// Where a server's cgroups are, from where it is itself.
fn above_server_leaf(own_path: &str) -> &str {
    match own_path.rsplit_once('/') {
        Some(("", SERVER_LEAF)) => "/",
        Some((above, SERVER_LEAF)) => above,
        _ => own_path,
    }
}

struct CgroupMount {
    v2: bool,
    root: String,
    mount_point: PathBuf,
    options: Vec<String>,
}

impl CgroupMount {
    /// The directory that shows the cgroup `path`, if this mount reaches it.
    fn locate(&self, path: &str) -> Option<PathBuf> {
        let below = Path::new(path).strip_prefix(&self.root).ok()?;
        // a path that climbs out (`/..`, seen from inside a cgroup namespace) is not ours to use
        if below.components().any(|c| matches!(c, std::path::Component::ParentDir)) {
            return None;
        }
        Some(self.mount_point.join(below))
    }
}

/// `proc_pid_mountinfo(5)`: `36 35 98:0 /root /mount/point options [fields…] - type source super,options`.
fn parse_mountinfo(text: &str) -> Result<Vec<CgroupMount>, LayoutError> {
    let mut mounts = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let malformed = |what| LayoutError::Malformed { file: "mountinfo", line: index + 1, what };
        let (left, right) = line.split_once(" - ").ok_or(malformed("no separator"))?;
        let mut right = right.split(' ');
        let kind = right.next().ok_or(malformed("no file system type"))?;
        if kind != "cgroup" && kind != "cgroup2" {
            continue;
        }
        let options = right.nth(1).unwrap_or_default();
        let left: Vec<&str> = left.split(' ').collect();
        let [_, _, _, root, mount_point, ..] = left[..] else {
            return Err(malformed("too few fields"));
        };
        let (root, mount_point) = (unescape(root), unescape(mount_point));
        // what is joined below must stay below: a relative root would let a path in it replace the mount point
        if !root.starts_with('/') || !mount_point.starts_with('/') {
            return Err(malformed("a path is not absolute"));
        }
        mounts.push(CgroupMount {
            v2: kind == "cgroup2",
            root,
            mount_point: PathBuf::from(mount_point),
            options: options.split(',').map(str::to_owned).collect(),
        });
    }
    Ok(mounts)
}

/// `cgroups(7)`: `hierarchy-ID:controller-list:path`. Gives the path of each controller, of v2 under the empty name.
fn parse_self_cgroup(text: &str) -> Result<BTreeMap<String, String>, LayoutError> {
    let mut own = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let malformed = |what| LayoutError::Malformed { file: "cgroup", line: index + 1, what };
        let mut fields = line.splitn(3, ':');
        let (Some(_id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(malformed("fewer than three fields"));
        };
        if !path.starts_with('/') {
            return Err(malformed("the path is not absolute"));
        }
        for controller in controllers.split(',') {
            // named hierarchies (`name=systemd`) have no controllers and are none of our business
            if !controller.starts_with("name=") {
                own.insert(controller.to_owned(), path.to_owned());
            }
        }
    }
    Ok(own)
}

/// Undoes the kernel's escapes: `\040` for a space, and tab, newline and backslash likewise.
fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let escaped = (bytes[i] == b'\\').then(|| bytes.get(i + 1..i + 4)).flatten();
        let escaped = escaped.filter(|digits| digits.iter().all(u8::is_ascii_digit)); // `+01` is a number too
        let value = escaped.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match value {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the kernel does (`seq_escape` of space, tab, newline and backslash).
    fn escape(path: &str) -> String {
        let escaped = |c: char| if " \t\n\\".contains(c) { format!("\\{:03o}", u32::from(c)) } else { c.into() };
        path.chars().map(escaped).collect()
    }

    proptest! {
        #[test]
        fn a_mount_point_of_any_name_is_found(name in "[^/]{1,20}", below in "[a-z -]{1,9}") {
            let mount_point = format!("/mnt/{name}");
            let mounts = format!("30 25 0:26 / {} rw shared:1 - cgroup2 none rw\n", escape(&mount_point));
            let layout = Layout::discover(&mounts, &format!("0::/{below}\n")).unwrap();
            prop_assert_eq!(layout.v2.unwrap().own_dir, Path::new(&mount_point).join(below));
        }
    }

    const HYBRID_MOUNTS: &str = "\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const HYBRID_SELF: &str = "\
9:name=systemd:/
8:pids:/
6:freezer:/
4:memory:/supervisor/c3e2
2:cpuacct:/
1:cpu:/
0::/
";

    #[test]
    fn hybrid_has_each_v1_hierarchy_and_the_bare_v2_one() {
        let layout = Layout::discover(HYBRID_MOUNTS, HYBRID_SELF).unwrap();
        let memory = layout.v1_with("memory").unwrap();
        assert_eq!(memory.own_dir, Path::new("/sys/fs/cgroup/memory/supervisor/c3e2"));
        assert_eq!(memory.own_path, "/supervisor/c3e2");
        assert_eq!(layout.v1.len(), 5, "the named hierarchy is not ours");
        assert_eq!(layout.v2.unwrap().own_dir, Path::new("/sys/fs/cgroup/unified"));
    }

    #[test]
    fn v1_has_co_mounted_controllers_once() {
        let mounts = "\
30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/memory rw,nosuid shared:11 - cgroup cgroup rw,memory
32 25 0:26 / /mnt/second rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct
";
        let own = "4:memory:/user.slice\n3:cpu,cpuacct:/user.slice/a b\n";
        let layout = Layout::discover(mounts, own).unwrap();
        assert_eq!(layout.v2, None);
        assert_eq!(layout.v1.len(), 2);
        let cpu = layout.v1_with("cpu").unwrap();
        assert_eq!(cpu, layout.v1_with("cpuacct").unwrap());
        assert_eq!(cpu.own_dir, Path::new("/sys/fs/cgroup/cpu,cpuacct/user.slice/a b"));
    }

    #[test]
    fn v2_has_one_hierarchy_and_its_own_path() {
        let mounts = "25 23 0:22 / /sys/fs/cgroup rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let layout = Layout::discover(mounts, "0::/system.slice/holm.service\n").unwrap();
        assert!(layout.v1.is_empty());
        let v2 = layout.v2.unwrap();
        assert_eq!(v2.own_dir, Path::new("/sys/fs/cgroup/system.slice/holm.service"));
    }

    #[test]
    fn a_server_in_its_leaf_has_its_cgroups_beside_it() {
        let mounts = "25 23 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        for (own, dir) in [
            ("/system.slice/holm.service/holm-server", "/sys/fs/cgroup/system.slice/holm.service"),
            ("/holm-server", "/sys/fs/cgroup"),
            ("/a/holm-server/b", "/sys/fs/cgroup/a/holm-server/b"),
            ("/a/not-holm-server", "/sys/fs/cgroup/a/not-holm-server"),
        ] {
            let v2 = Layout::discover(mounts, &format!("0::{own}\n")).unwrap().v2.unwrap();
            assert_eq!(v2.own_dir, Path::new(dir), "{own}");
        }
    }

    #[test]
    fn a_container_sees_its_part_of_the_hierarchy() {
        let mounts = "30 25 0:26 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let inside = Layout::discover(mounts, "4:memory:/docker/abc/job\n").unwrap();
        assert_eq!(inside.v1_with("memory").unwrap().own_dir, Path::new("/sys/fs/cgroup/memory/job"));
        // the own cgroup lies outside of what is mounted: the hierarchy is out of reach
        let outside = Layout::discover(mounts, "4:memory:/elsewhere\n").unwrap();
        assert_eq!(outside.v1_with("memory"), None);
        let climbing = Layout::discover(mounts, "4:memory:/docker/abc/../../x\n").unwrap();
        assert_eq!(climbing.v1_with("memory"), None);
    }

    #[test]
    fn escapes_in_mount_points_are_undone() {
        let mounts = "30 25 0:26 / /mnt/my\\040cg\\134x rw - cgroup2 none rw\n";
        let layout = Layout::discover(mounts, "0::/\n").unwrap();
        assert_eq!(layout.v2.unwrap().own_dir, Path::new("/mnt/my cg\\x"));
        let no_escape = "30 25 0:26 / /mnt/\\+01 rw - cgroup2 none rw\n";
        assert_eq!(Layout::discover(no_escape, "0::/\n").unwrap().v2.unwrap().own_dir, Path::new("/mnt/\\+01"));
    }

    #[test]
    fn text_that_the_kernel_would_not_write_is_an_error_or_nothing() {
        assert!(Layout::discover("nonsense\n", "0::/\n").is_err());
        assert!(Layout::discover("30 - cgroup2 none rw\n", "0::/\n").is_err());
        for mounts in ["30 25 0:26  /mnt rw - cgroup2 none rw\n", "30 25 0:26 / mnt rw - cgroup2 none rw\n"] {
            assert!(Layout::discover(mounts, "0::/etc\n").is_err(), "{mounts}");
        }
        assert!(Layout::discover(HYBRID_MOUNTS, "0:/\n").is_err());
        assert!(Layout::discover(HYBRID_MOUNTS, "0::relative\n").is_err());
        assert_eq!(Layout::discover("", "0::/\n"), Err(LayoutError::NoneMounted));
    }
}
