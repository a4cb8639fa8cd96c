//! Protective calls that tell of success and do nothing: what was to be protected is read back, and the sandbox refused.
//!
//! A step that reported success is no proof that it had its effect (CVE-2025-52881).

use holm_sandbox::Step;
use holm_sandbox::spec::Kind;
use libtest_mimic::Trial;
use nix::errno::Errno::{self, *};

use crate::client::{Client, spec};
use crate::faults::{Call, Fault, When, launcher, sandbox, zygote};
use crate::steps::{ALL, CLONED, COMPILE, Case, NATIVE, WASM, case, is, is_any, is_refused, where_attached};
use crate::trial;
use crate::zygotes::new_zygote;

pub(crate) fn trials() -> Vec<Trial> {
    let noticed = |case: Case| trial(&format!("{}_is_noticed", case.name), move || is_refused(&case));
    let mut trials: Vec<Trial> =
        lies().into_iter().chain(lies_of_zygotes()).chain(lies_about_limits()).map(noticed).collect();
    trials.extend(lies_about_attaching().into_iter().map(|case| where_attached(true, noticed(case))));
    for (name, fault, kinds) in without_effect() {
        trials.push(trial(&format!("{name}_leaves_all_layers_on"), move || all_layers_are_on(fault, kinds)));
    }
    trials
}

/// What the kernel does all the same, or has done before.
fn without_effect() -> [(&'static str, Fault, &'static [Kind]); 4] {
    [
        // the change of ids has emptied all sets but the bounding one
        ("capset_that_lies", sandbox(libc::SYS_capset).lies(), ALL),
        // so it has made the process non-dumpable
        (
            "becoming_non_dumpable_that_lies",
            sandbox(libc::SYS_prctl).when(|call| is(call, libc::PR_SET_DUMPABLE)).lies(),
            ALL,
        ),
        // the working directory already is the new root
        ("chdir_that_lies", sandbox(libc::SYS_chdir).lies(), CLONED),
        // a new user namespace starts with an empty one
        (
            "clearing_the_ambient_set_that_lies",
            sandbox(libc::SYS_prctl).when(|call| is(call, libc::PR_CAP_AMBIENT)).lies(),
            ALL,
        ),
    ]
}

fn all_layers_are_on(fault: Fault, kinds: &[Kind]) {
    let mut client = Client::start_under(&[fault]);
    for kind in kinds.iter().copied() {
        let mut good = client.run(spec(kind), "mark").isolation;
        client.arm(&[fault]);
        let run = client.run(spec(kind), "mark");
        client.disarm();
        assert_eq!((run.stdout.as_str(), run.isolation.capabilities), ("ran\n", 0));
        good.namespaces = run.isolation.namespaces;
        good.cgroups.clone_from(&run.isolation.cgroups);
        good.recycled_network = run.isolation.recycled_network;
        assert_eq!(run.isolation, good, "{kind:?}");
    }
    client.end();
}

fn lies() -> Vec<Case> {
    use Step::*;
    let lie = |name, call, step, errno| case(name, ALL, sandbox(call).lies(), step, errno);
    let nth = |name, call, nth, step, errno| case(name, ALL, sandbox(call).nth(nth).lies(), step, errno);
    let prctl = |name, when, step, errno| case(name, ALL, sandbox(libc::SYS_prctl).when(when).lies(), step, errno);
    vec![
        case(
            "a_write_of_the_uid_map_that_lies",
            CLONED,
            launcher(libc::SYS_write).when(|call| call.file(0).ends_with("/uid_map")).lies(),
            TakeIdentity,
            EINVAL,
        )
        .or(VerifyIds, EPROTO),
        case(
            "a_write_of_the_gid_map_that_lies",
            CLONED,
            launcher(libc::SYS_write).when(|call| call.file(0).ends_with("/gid_map")).lies(),
            TakeIdentity,
            EPERM,
        ),
        lie("close_range_that_lies", libc::SYS_close_range, CloseFds, EPROTO),
        nth("the_last_close_range_that_lies", libc::SYS_close_range, 2, CloseFds, EPROTO),
        lie("setsid_that_lies", libc::SYS_setsid, VerifyIds, EPROTO),
        cloned("setgroups_that_lies", libc::SYS_setgroups, None, VerifyIds, EPROTO),
        cloned("setresgid_to_root_that_lies", libc::SYS_setresgid, Some(1), MakeRoot, EOVERFLOW),
        cloned("setresuid_to_root_that_lies", libc::SYS_setresuid, Some(1), MakeRoot, EOVERFLOW),
        lie("keyctl_that_lies", libc::SYS_keyctl, JoinKeyring, EPROTO),
        case(
            "a_write_of_oom_score_adj_that_lies",
            CLONED,
            sandbox(libc::SYS_write).when(|call| call.file(0).ends_with("/oom_score_adj")).lies(),
            RaiseOomScore,
            EPROTO,
        ),
        own_writes(
            "a_write_of_max_user_namespaces_that_lies",
            |call| call.file(0).ends_with("/max_user_namespaces"),
            ForbidNestedNamespaces,
        ),
        lie("unshare_that_lies", libc::SYS_unshare, VerifyNamespaces, EPROTO),
        cloned("sethostname_that_lies", libc::SYS_sethostname, None, SetHostname, EPROTO),
        moves("attaching_the_root_that_lies", COMPILE, |call| call.text(3) == "/new", PivotRoot, EINVAL),
        // since Linux 6.15 a mount can be attached to one that is not attached itself
        moves(
            "attaching_the_root_with_tmp_that_lies",
            NATIVE,
            |call| call.text(3) == "/new",
            if kernel() < (6, 15) { MountTmp } else { PivotRoot },
            EINVAL,
        ),
        moves(
            "attaching_tmp_that_lies",
            &[Kind::Native, Kind::Wasm],
            |call| call.text(3) == "tmp",
            VerifyMounts,
            EPROTO,
        ),
        moves("attaching_dev_that_lies", NATIVE, |call| call.text(3) == "dev", VerifyMounts, EPROTO),
        moves("attaching_proc_that_lies", NATIVE, |call| call.text(3) == "proc", VerifyMounts, EPROTO),
        cloned("making_the_root_read_only_that_lies", libc::SYS_mount_setattr, None, VerifyMounts, EPROTO),
        case("making_dev_read_only_that_lies", NATIVE, launcher(libc::SYS_mount_setattr).lies(), VerifyMounts, EPROTO),
        cloned("pivot_root_that_lies", libc::SYS_pivot_root, None, PivotRoot, ESTALE),
        cloned("umount2_that_lies", libc::SYS_umount2, None, VerifyMounts, EPROTO),
        case(
            "prlimit64_that_lies",
            ALL,
            sandbox(libc::SYS_prlimit64).when(|call| call.args[2] != 0).lies(),
            SetRlimits,
            EPROTO,
        ),
        prctl(
            "dropping_from_the_bounding_set_that_lies",
            |call| is(call, libc::PR_CAPBSET_DROP),
            VerifyPrivilege,
            EPROTO,
        ),
        nth("setresgid_to_the_job_s_that_lies", libc::SYS_setresgid, 2, VerifyIds, EPROTO),
        nth("setresuid_to_the_job_s_that_lies", libc::SYS_setresuid, 2, VerifyIds, EPROTO),
        Case {
            faults: vec![sandbox(libc::SYS_setresuid).nth(2).lies(), sandbox(libc::SYS_capset).lies()],
            ..nth("setresuid_and_capset_that_lie", libc::SYS_capset, 1, VerifyPrivilege, EPROTO)
        },
        case(
            "no_new_privs_that_lies",
            CLONED,
            sandbox(libc::SYS_prctl).when(|call| is(call, libc::PR_SET_NO_NEW_PRIVS)).lies(),
            RestrictLandlock,
            EPERM,
        ),
        lie("landlock_restrict_self_that_lies", libc::SYS_landlock_restrict_self, ProveLandlock, ENOTRECOVERABLE),
        nth("the_first_seccomp_that_lies", libc::SYS_seccomp, 1, VerifyPrivilege, EPROTO),
        cloned("the_last_seccomp_that_lies", libc::SYS_seccomp, Some(2), VerifyPrivilege, EPROTO),
        prctl("binding_to_the_launcher_that_lies", |call| is(call, libc::PR_SET_PDEATHSIG), BindToLauncher, EPROTO),
    ]
}

/// Of a sandbox that has not got it from a zygote.
fn cloned(name: &'static str, call: libc::c_long, nth: Option<u32>, step: Step, errno: Errno) -> Case {
    let fault = sandbox(call).lies();
    case(name, CLONED, nth.map_or(fault, |nth| fault.nth(nth)), step, errno)
}

/// In a zygote, or of one.
fn lies_of_zygotes() -> Vec<Case> {
    use Step::*;
    let lie = |name, fault: Fault, step, errno| new_zygote(case(name, WASM, fault.lies(), step, errno));
    vec![
        lie("setgroups_of_the_zygote_that_lies", zygote(libc::SYS_setgroups), VerifyIds, EPROTO),
        lie("setresuid_of_the_zygote_that_lies", zygote(libc::SYS_setresuid).nth(1), MakeRoot, EOVERFLOW),
        lie("sethostname_of_the_zygote_that_lies", zygote(libc::SYS_sethostname), SetHostname, EPROTO),
        lie(
            "a_write_of_the_zygote_s_oom_score_adj_that_lies",
            zygote(libc::SYS_write).when(|call| call.file(0).ends_with("/oom_score_adj")),
            RaiseOomScore,
            EPROTO,
        ),
        lie("unshare_of_the_zygote_that_lies", zygote(libc::SYS_unshare).nth(1), SetHostname, EPERM),
        lie(
            "the_zygote_s_unshare_of_the_network_that_lies",
            zygote(libc::SYS_unshare).nth(2),
            VerifyNamespaces,
            EPROTO,
        ),
        lie("making_the_zygote_s_root_read_only_that_lies", zygote(libc::SYS_mount_setattr), VerifyMounts, EPROTO),
        lie("pivot_root_of_the_zygote_that_lies", zygote(libc::SYS_pivot_root), PivotRoot, ESTALE),
        lie("umount2_of_the_zygote_that_lies", zygote(libc::SYS_umount2), VerifyMounts, EPROTO),
        lie(
            "no_new_privs_of_the_zygote_that_lies",
            zygote(libc::SYS_prctl).when(|call| is(call, libc::PR_SET_NO_NEW_PRIVS)),
            VerifyPrivilege,
            EPROTO,
        ),
        lie("seccomp_of_the_zygote_that_lies", zygote(libc::SYS_seccomp), VerifyPrivilege, EPROTO),
        case(
            "a_write_of_the_uid_map_by_the_zygote_that_lies",
            WASM,
            zygote(libc::SYS_write).when(|call| call.file(0).ends_with("/uid_map")).lies(),
            TakeIdentity,
            EINVAL,
        )
        .or(VerifyIds, EPROTO),
    ]
}

fn lies_about_limits() -> Vec<Case> {
    vec![
        limits("a_write_of_the_memory_limit_that_lies", |call| {
            is_any(&call.file(0), &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max"])
        }),
        limits("a_write_of_the_cpu_quota_that_lies", |call| is_any(&call.file(0), &["cpu.cfs_quota_us", "cpu.max"])),
        Case {
            spec: |spec| spec.limits.cpu_weight = 200,
            ..limits("a_write_of_the_cpu_weight_that_lies", |call| is_any(&call.file(0), &["cpu.shares", "cpu.weight"]))
        },
        limits("a_write_of_the_pids_limit_that_lies", |call| is_any(&call.file(0), &["pids.max"])),
    ]
}

fn lies_about_attaching() -> Vec<Case> {
    let attach: [(&str, When); 8] = [
        ("cpu", |call| attaches(call, "cpu")),
        ("cpuacct", |call| attaches(call, "cpuacct")),
        ("memory", |call| attaches(call, "memory")),
        ("pids", |call| attaches(call, "pids")),
        ("freezer", |call| attaches(call, "freezer")),
        ("cpuset", |call| attaches(call, "cpuset")),
        ("blkio", |call| attaches(call, "blkio")),
        ("devices", |call| attaches(call, "devices")),
    ];
    let lie = |(controller, when)| {
        let name: &'static str = format!("an_attach_to_{controller}_that_lies").leak();
        // in its tenant's cgroups a zygote's child is from the beginning
        let kinds = if ["cpuset", "blkio", "devices"].contains(&controller) { CLONED } else { ALL };
        Case { kinds, ..writes(name, when, Step::VerifyCgroup, EPROTO) }
    };
    attach.into_iter().map(lie).collect()
}

/// The running kernel's version.
fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// Whether it writes a pid into the cgroup of the v1 hierarchy of this controller, however that is mounted.
fn attaches(call: &Call, controller: &str) -> bool {
    let file = call.file(0);
    let mut parts = file.split('/');
    file.ends_with("/cgroup.procs") && parts.any(|part| part.split(',').any(|name| name == controller))
}

/// A write of the launcher's.
fn writes(name: &'static str, when: When, step: Step, errno: Errno) -> Case {
    case(name, ALL, launcher(libc::SYS_write).when(when).lies(), step, errno)
}

fn limits(name: &'static str, when: When) -> Case {
    writes(name, when, Step::LimitCgroup, EPROTO)
}

fn own_writes(name: &'static str, when: When, step: Step) -> Case {
    case(name, ALL, sandbox(libc::SYS_write).when(when).lies(), step, EPROTO)
}

fn moves(name: &'static str, kinds: &'static [Kind], when: When, step: Step, errno: Errno) -> Case {
    case(name, kinds, sandbox(libc::SYS_move_mount).when(when).lies(), step, errno)
}
