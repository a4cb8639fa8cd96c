//! Which cgroup a process is in, for each controller.

use serde::{Deserialize, Serialize};

/// The cgroup of each controller, as a path below the hierarchy's root; `unified` is the v2 hierarchy.
///
/// One text, as there is one of these for every job: `name:path` lines, sorted by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPaths(String);

impl CgroupPaths {
    /// From pairs in any order; of two with the same name the later one stands. No name has a colon or a line break in it,
    /// and no path a line break: the kernel makes no such cgroup.
    pub(crate) fn of<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut pairs: Vec<(&str, &str)> = pairs.into_iter().collect();
        // a stable sort: of those with one name the last comes last
        pairs.sort_by_key(|(name, _)| *name);
        let mut text = String::with_capacity(pairs.iter().map(|(name, path)| name.len() + path.len() + 2).sum());
        for (index, (name, path)) in pairs.iter().enumerate() {
            if pairs.get(index + 1).is_none_or(|next| next.0 != *name) {
                text.extend([name, ":", path, "\n"]);
            }
        }
        Self(text)
    }

    /// Each controller's name and path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.lines().filter_map(|line| line.split_once(':'))
    }

    /// The path of a controller.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(found, _)| *found == name).map(|(_, path)| path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_sorted_and_the_last_of_a_name_stands() {
        let paths = CgroupPaths::of([("memory", "/a:b"), ("cpu", "/"), ("memory", "/c:d"), ("blkio", "")]);
        let pairs: Vec<(&str, &str)> = paths.iter().collect();
        assert_eq!(pairs, [("blkio", ""), ("cpu", "/"), ("memory", "/c:d")]);
        assert_eq!((paths.get("memory"), paths.get("pids")), (Some("/c:d"), None));
    }

    #[test]
    fn they_go_over_the_wire_and_come_back() {
        let paths = CgroupPaths::of([("cpu", "/holm-1/t/sandbox-1"), ("unified", "/")]);
        let bytes = postcard::to_stdvec(&paths).unwrap();
        assert_eq!(postcard::from_bytes::<CgroupPaths>(&bytes).unwrap(), paths);
    }
}
