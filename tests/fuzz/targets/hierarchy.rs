//! Text that the kernel writes about a process: where its cgroups are, and how it is confined. The input is mountinfo,
//! cgroup and status, with a NUL between them.
#![no_main]

use holm_sandbox::cgroup::hierarchy::{Hierarchy, Layout};
use holm_sandbox::fuzzing::{confined, membership};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|texts: &str| {
    let mut texts = texts.splitn(3, '\0');
    let (mountinfo, cgroup) = (texts.next().unwrap_or_default(), texts.next().unwrap_or_default());
    let status = texts.next().unwrap_or_default();

    if let Ok(Layout { v1, v2 }) = Layout::discover(mountinfo, cgroup) {
        for hierarchy in v1.iter().chain(&v2) {
            check(hierarchy, mountinfo, cgroup);
        }
        assert!(v1.iter().all(|hierarchy| !hierarchy.controllers.is_empty()));
        assert!(v2.is_none_or(|hierarchy| hierarchy.controllers.is_empty()));
    }
    for (controller, path) in membership(cgroup).iter() {
        assert!(cgroup.contains(path), "{controller} is in a cgroup that the text does not have");
    }
    if confined(status, 7) {
        let zeros = |set: &str| status.lines().any(|line| line.starts_with(set) && line.contains('0'));
        assert!(["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"].into_iter().all(zeros));
    }
});

/// The directory of the own cgroup is beneath a mount point, and nowhere else.
fn check(hierarchy: &Hierarchy, mountinfo: &str, cgroup: &str) {
    assert!(hierarchy.own_path.starts_with('/') && cgroup.contains(&hierarchy.own_path));
    assert!(hierarchy.own_dir.is_absolute(), "{hierarchy:?}");
    // with escapes, fields are not what they look like
    if !mountinfo.contains('\\') {
        let mut mount_points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
        assert!(mount_points.any(|point| hierarchy.own_dir.starts_with(point)), "{hierarchy:?} is beneath no mount");
    }
}
