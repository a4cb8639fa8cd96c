//! Every step of a launch fails, one at a time: the sandbox is refused with that step and errno, its job does not run,
//! nothing is left, and the same launcher's next sandbox is as good as ever.

use std::collections::BTreeMap;

use holm_sandbox::spec::{Kind, SandboxSpec};
use holm_sandbox::{LaunchError, Step};
use libtest_mimic::Trial;
use nix::errno::Errno::{self, *};

use crate::client::{Client, Launched, artifact, offer, read, spec};
use crate::faults::{Call, Fault, When, launcher, sandbox};
use crate::left::hierarchies;
use crate::{trial, zygotes};

/// One way for a launch to fail.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) kinds: &'static [Kind],
    pub(crate) faults: Vec<Fault>,
    pub(crate) spec: fn(&mut SandboxSpec),
    pub(crate) step: Step,
    pub(crate) errno: Errno,
    /// What may be noticed instead, if that comes first.
    pub(crate) or: Option<(Step, Errno)>,
}

impl Case {
    pub(crate) fn or(self, step: Step, errno: Errno) -> Self {
        Self { or: Some((step, errno)), ..self }
    }
}

pub(crate) const ALL: &[Kind] = &Kind::ALL;
pub(crate) const NATIVE: &[Kind] = &[Kind::Native];
pub(crate) const COMPILE: &[Kind] = &[Kind::Compile];
pub(crate) const WITH_TMP: &[Kind] = &[Kind::Native, Kind::Wasm];
pub(crate) const WASM: &[Kind] = &[Kind::Wasm];
/// Cloned by the launcher itself.
pub(crate) const CLONED: &[Kind] = &[Kind::Native, Kind::Compile];

pub(crate) fn case(name: &'static str, kinds: &'static [Kind], fault: Fault, step: Step, errno: Errno) -> Case {
    Case { name, kinds, faults: vec![fault], spec: |_| {}, step, errno, or: None }
}

fn asked(name: &'static str, kinds: &'static [Kind], spec: fn(&mut SandboxSpec), step: Step, errno: Errno) -> Case {
    Case { name, kinds, faults: vec![], spec, step, errno, or: None }
}

/// Steps whose failure takes more than a system call that fails, and the tests that see to them.
const ELSEWHERE: [(Step, &str); 5] = [
    (Step::ClaimUids, "a_host_without_free_uids_refuses_at_claim_uids"),
    (Step::BecomeReady, "stuck_sandboxes_hold_nobody_up_and_are_refused_at_their_deadline"),
    (Step::ReceiveJob, "a_job_that_is_none_is_refused_at_receive_job"),
    (Step::PlaceStdio, "streams_that_cannot_be_placed_are_refused_at_place_stdio"),
    (Step::Panic, "a_panic_in_the_sandbox_is_refused_at_panic"),
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = Vec::new();
    for case in cases() {
        let name = format!("{}_at_{}", case.name, snake(case.step));
        let attaches = case.step == Step::AttachCgroup;
        trials.push(where_attached(attaches, trial(&name, move || is_refused(&case))));
    }
    trials.push(trial("streams_that_cannot_be_placed_are_refused_at_place_stdio", streams_that_cannot_be_placed));
    trials.push(trial("a_job_that_is_none_is_refused_at_receive_job", a_job_that_is_none));
    trials
}

fn cases() -> impl Iterator<Item = Case> {
    in_the_launcher().into_iter().chain(zygotes::cases()).chain(in_the_sandbox())
}

/// A test of what happens when a sandbox is attached to its cgroup, if `attaches`: on pure v2 it is born there.
pub(crate) fn where_attached(attaches: bool, trial: Trial) -> Trial {
    if attaches && hierarchies() == 1 { trial.with_kind("not on pure v2").with_ignored_flag(true) } else { trial }
}

/// No step is without a test that sees it fail: there are no exceptions. `trials` are the names of all tests.
pub(crate) fn every_step_fails_in_some_test(trials: &[String]) {
    let mut covered: BTreeMap<String, String> =
        cases().map(|case| (format!("{:?}", case.step), format!("{}_at_{}", case.name, snake(case.step)))).collect();
    covered.extend(ELSEWHERE.map(|(step, name)| (format!("{step:?}"), name.to_owned())));
    // postcard numbers the variants from 0
    let steps: Vec<Step> = (0..128).map_while(|variant| postcard::from_bytes(&[variant]).ok()).collect();
    assert!(steps.contains(&Step::CheckSpec) && steps.contains(&Step::Panic), "{steps:?}");
    for step in steps {
        let name = covered.get(&format!("{step:?}"));
        assert!(name.is_some_and(|name| trials.contains(name)), "no test sees {step:?} fail: {name:?}");
    }
}

fn snake(step: Step) -> String {
    let mut name = String::new();
    for letter in format!("{step:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

pub(crate) fn is_refused(case: &Case) {
    let mut client = Client::start_under(&case.faults);
    for kind in case.kinds {
        let good = client.run(spec(*kind), "mark");
        assert_eq!(good.stdout, "ran\n");
        let before = client.held();

        let mut asked = spec(*kind);
        (case.spec)(&mut asked);
        client.arm(&case.faults);
        let launched = client.launch(asked);
        // the job is there from the start: if anything let the sandbox have it too early, it would leave its mark
        let output = offer(&launched.channel, "mark");
        let error = client.refused(launched.id);
        client.disarm();
        let meant = |step, errno: Errno| error == LaunchError { step, errno: errno as i32 };
        let noticed = meant(case.step, case.errno) || case.or.is_some_and(|(step, errno)| meant(step, errno));
        assert!(noticed, "{kind:?}: {error:?} for {:?} {}", case.step, case.errno);
        drop(launched);
        assert_eq!(read(output), "", "{kind:?}: its job ran");
        client.must_hold(&before);

        let after = client.run(spec(*kind), "mark");
        assert_eq!(after.stdout, "ran\n");
        assert_eq!(after.isolation.uid_map, good.isolation.uid_map, "its uids were not given back");
    }
    client.end();
}

fn in_the_launcher() -> Vec<Case> {
    use Step::*;
    // where there are two hierarchies, one directory is made already
    let last = hierarchies().min(2).try_into().unwrap();
    vec![
        asked("a_limit_of_zero_fails", ALL, |spec| spec.limits.pids = 0, CheckSpec, EINVAL),
        Case {
            spec: |spec| spec.tenant = "another".parse().unwrap(),
            ..case(
                "making_the_tenant_s_cgroup_fails",
                NATIVE,
                launcher(libc::SYS_mkdirat).when(|call| call.text(1) == "another").fails(ENOSPC),
                TenantCgroup,
                ENOSPC,
            )
        },
        asked(
            "a_ceiling_beyond_its_range_fails",
            NATIVE,
            |spec| spec.ceiling.memory_bytes = Some(u64::MAX),
            CheckSpec,
            EINVAL,
        ),
        case(
            "making_the_job_s_cgroup_fails",
            ALL,
            launcher(libc::SYS_mkdirat).when(|call| call.text(1).starts_with("sandbox-")).nth(last).fails(ENOSPC),
            CreateCgroup,
            ENOSPC,
        ),
        limit("opening_the_memory_limit_fails", |call| is_any(&call.text(1), &["memory.limit_in_bytes", "memory.max"])),
        limit("opening_the_cpu_quota_fails", |call| is_any(&call.text(1), &["cpu.cfs_quota_us", "cpu.max"])),
        limit("opening_the_cpu_weight_fails", |call| is_any(&call.text(1), &["cpu.shares", "cpu.weight"])),
        limit("opening_the_pids_limit_fails", |call| is_any(&call.text(1), &["pids.max"])),
        case(
            "asking_for_oom_events_fails",
            ALL,
            launcher(libc::SYS_openat)
                .when(|call| is_any(&call.text(1), &["cgroup.event_control", "memory.oom.group"]))
                .fails(EACCES),
            WatchOom,
            EACCES,
        ),
        case("mknodat_fails", NATIVE, launcher(libc::SYS_mknodat).nth(6).fails(EPERM), MakeDev, EPERM),
        case("fsopen_fails", NATIVE, launcher(libc::SYS_fsopen).fails(ENODEV), MakeDev, ENODEV),
        case("mount_setattr_fails", NATIVE, launcher(libc::SYS_mount_setattr).fails(EINVAL), MakeDev, EINVAL),
        case("socketpair_fails", ALL, launcher(libc::SYS_socketpair).fails(EMFILE), MakeGate, EMFILE),
        case("clone3_fails", CLONED, launcher(libc::SYS_clone3).fails(EAGAIN), Clone, EAGAIN),
        case("clone3_is_missing", CLONED, launcher(libc::SYS_clone3).fails(ENOSYS), Clone, ENOSYS),
        map("opening_the_uid_map_fails", |call| call.text(1).ends_with("/uid_map")),
        map("opening_the_gid_map_fails", |call| call.text(1).ends_with("/gid_map")),
        case(
            "writing_the_uid_map_fails",
            CLONED,
            launcher(libc::SYS_write).when(|call| call.file(0).ends_with("/uid_map")).fails(EPERM),
            MapIds,
            EPERM,
        ),
        case(
            "writing_cgroup_procs_fails",
            ALL,
            launcher(libc::SYS_write).when(|call| call.file(0).ends_with("/cgroup.procs")).nth(1).fails(ESRCH),
            AttachCgroup,
            ESRCH,
        ),
        case("epoll_ctl_fails", ALL, launcher(libc::SYS_epoll_ctl).nth(1).fails(ENOSPC), OpenGate, ENOSPC),
        case("sendmsg_fails", CLONED, launcher(libc::SYS_sendmsg).nth(1).fails(ENOBUFS), OpenGate, ENOBUFS),
        // the first one asks the zygote
        case("the_second_sendmsg_fails", WASM, launcher(libc::SYS_sendmsg).nth(2).fails(ENOBUFS), OpenGate, ENOBUFS),
        case(
            "readlink_fails",
            ALL,
            launcher(libc::SYS_readlink).when(|call| call.text(0).ends_with("/ns/ipc")).fails(EACCES),
            VerifyNamespaces,
            EACCES,
        ),
        verify("opening_the_status_fails", |call| call.text(1).ends_with("/status"), VerifyPrivilege),
        verify("opening_the_uid_map_fails", |call| call.text(1).ends_with("/uid_map"), VerifyIds),
        verify("opening_the_mounts_fails", |call| call.text(1).ends_with("/mountinfo"), VerifyMounts),
        verify("opening_the_membership_fails", |call| call.text(1).ends_with("/cgroup"), VerifyCgroup),
    ]
}

pub(crate) fn is_any(path: &str, files: &[&str]) -> bool {
    files.contains(&path.rsplit('/').next().unwrap())
}

fn limit(name: &'static str, when: When) -> Case {
    case(name, ALL, launcher(libc::SYS_openat).when(when).nth(1).fails(EIO), Step::LimitCgroup, EIO)
}

fn map(name: &'static str, when: When) -> Case {
    case(name, CLONED, launcher(libc::SYS_openat).when(when).nth(1).fails(EACCES), Step::MapIds, EACCES)
}

/// The `uid_map` is opened twice: to write it, and to read it back.
fn verify(name: &'static str, when: When, step: Step) -> Case {
    let nth = if step == Step::VerifyIds { 2 } else { 1 };
    case(name, CLONED, launcher(libc::SYS_openat).when(when).nth(nth).fails(EMFILE), step, EMFILE)
}

fn in_the_sandbox() -> Vec<Case> {
    use Step::*;
    let opens = |name, step, when| case(name, ALL, sandbox(libc::SYS_openat).when(when).fails(EACCES), step, EACCES);
    let prctl = |name, step, when| case(name, ALL, sandbox(libc::SYS_prctl).when(when).fails(EINVAL), step, EINVAL);
    let moves =
        |name, kinds, step, when| case(name, kinds, sandbox(libc::SYS_move_mount).when(when).fails(EBUSY), step, EBUSY);
    vec![
        case("close_range_fails", ALL, sandbox(libc::SYS_close_range).nth(1).fails(EINVAL), CloseFds, EINVAL),
        case("dup2_fails", ALL, sandbox(libc::SYS_dup2).nth(2).fails(EBADF), CloseFds, EBADF),
        case("recvmsg_fails", ALL, sandbox(libc::SYS_recvmsg).nth(1).fails(ENOMEM), WaitGate, ENOMEM),
        case("rt_sigaction_fails", CLONED, sandbox(libc::SYS_rt_sigaction).nth(1).fails(EINVAL), TakeIdentity, EINVAL),
        case("setsid_fails", ALL, sandbox(libc::SYS_setsid).fails(EPERM), TakeIdentity, EPERM),
        case("setgroups_fails", ALL, sandbox(libc::SYS_setgroups).fails(EPERM), TakeIdentity, EPERM),
        case("setresgid_fails", ALL, sandbox(libc::SYS_setresgid).nth(1).fails(EPERM), TakeIdentity, EPERM),
        case("setresuid_fails", ALL, sandbox(libc::SYS_setresuid).nth(1).fails(EAGAIN), TakeIdentity, EAGAIN),
        case("keyctl_fails", ALL, sandbox(libc::SYS_keyctl).nth(1).fails(EDQUOT), JoinKeyring, EDQUOT),
        case(
            "opening_oom_score_adj_fails",
            CLONED,
            sandbox(libc::SYS_openat).when(|call| call.text(1).ends_with("/oom_score_adj")).fails(EACCES),
            RaiseOomScore,
            EACCES,
        ),
        opens("opening_max_user_namespaces_fails", ForbidNestedNamespaces, |call| {
            call.text(1).ends_with("/max_user_namespaces")
        }),
        case(
            "unshare_fails",
            ALL,
            sandbox(libc::SYS_unshare).when(|call| is(call, libc::CLONE_NEWCGROUP)).fails(ENOSPC),
            EnterCgroupNamespace,
            ENOSPC,
        ),
        case(
            "unshare_of_time_fails",
            NATIVE,
            sandbox(libc::SYS_unshare).when(|call| is(call, libc::CLONE_NEWTIME)).fails(EPERM),
            MakeTimeNamespace,
            EPERM,
        ),
        case("sethostname_fails", CLONED, sandbox(libc::SYS_sethostname).fails(EPERM), SetHostname, EPERM),
        case("fsopen_fails", CLONED, sandbox(libc::SYS_fsopen).nth(1).fails(ENODEV), MakeRoot, ENODEV),
        case("fsconfig_fails", CLONED, sandbox(libc::SYS_fsconfig).nth(1).fails(EINVAL), MakeRoot, EINVAL),
        case("fsmount_fails", CLONED, sandbox(libc::SYS_fsmount).nth(1).fails(EPERM), MakeRoot, EPERM),
        moves("move_mount_fails", CLONED, MakeRoot, |call| call.text(3) == "/new"),
        case("mkdirat_fails", NATIVE, sandbox(libc::SYS_mkdirat).nth(1).fails(ENOSPC), MakeRoot, ENOSPC),
        case(
            "making_the_landlock_proof_fails",
            CLONED,
            sandbox(libc::SYS_openat).when(|call| call.text(1) == ".landlock").fails(EACCES),
            MakeRoot,
            EACCES,
        ),
        case("pread_fails", NATIVE, sandbox(libc::SYS_pread64).fails(EIO), CopyProgram, EIO),
        case("fsopen_of_tmp_fails", NATIVE, sandbox(libc::SYS_fsopen).nth(2).fails(ENOMEM), MountTmp, ENOMEM),
        case("fsopen_of_tmp_alone_fails", WASM, sandbox(libc::SYS_fsopen).nth(1).fails(ENOMEM), MountTmp, ENOMEM),
        moves("move_mount_fails", WITH_TMP, MountTmp, |call| call.text(3) == "tmp"),
        moves("move_mount_fails", NATIVE, MountDev, |call| call.text(3) == "dev"),
        case(
            "fsopen_fails",
            NATIVE,
            sandbox(libc::SYS_fsopen).when(|call| call.text(0) == "proc").fails(EPERM),
            MountProc,
            EPERM,
        ),
        moves("move_mount_fails", NATIVE, MountProc, |call| call.text(3) == "proc"),
        case("mount_setattr_fails", CLONED, sandbox(libc::SYS_mount_setattr).fails(EPERM), SealRoot, EPERM),
        case("pivot_root_fails", CLONED, sandbox(libc::SYS_pivot_root).fails(EINVAL), PivotRoot, EINVAL),
        case("umount2_fails", CLONED, sandbox(libc::SYS_umount2).fails(EBUSY), PivotRoot, EBUSY),
        case("chdir_fails", CLONED, sandbox(libc::SYS_chdir).fails(EACCES), PivotRoot, EACCES),
        case("prlimit64_fails", ALL, sandbox(libc::SYS_prlimit64).nth(7).fails(EPERM), SetRlimits, EPERM),
        prctl("prctl_capbset_drop_fails", DropCapabilities, |call| is(call, libc::PR_CAPBSET_DROP)),
        case("capset_fails", ALL, sandbox(libc::SYS_capset).nth(1).fails(EPERM), DropCapabilities, EPERM),
        case("setresgid_fails", ALL, sandbox(libc::SYS_setresgid).nth(2).fails(EPERM), TakeJobIdentity, EPERM),
        case("setresuid_fails", ALL, sandbox(libc::SYS_setresuid).nth(2).fails(EAGAIN), TakeJobIdentity, EAGAIN),
        prctl("prctl_no_new_privs_fails", SetNoNewPrivs, |call| is(call, libc::PR_SET_NO_NEW_PRIVS)),
        // EINVAL would say that the kernel is too old to know of it
        case(
            "prctl_speculation_fails",
            ALL,
            sandbox(libc::SYS_prctl).when(|call| is(call, libc::PR_GET_SPECULATION_CTRL)).fails(EPERM),
            EndSpeculation,
            EPERM,
        ),
        prctl("prctl_dumpable_fails", SetNonDumpable, |call| is(call, libc::PR_SET_DUMPABLE)),
        landlock("landlock_create_ruleset_is_missing", libc::SYS_landlock_create_ruleset, ENOSYS),
        landlock("landlock_create_ruleset_is_off", libc::SYS_landlock_create_ruleset, EOPNOTSUPP),
        landlock("landlock_restrict_self_fails", libc::SYS_landlock_restrict_self, E2BIG),
        case(
            "landlock_add_rule_fails",
            WITH_TMP,
            sandbox(libc::SYS_landlock_add_rule).nth(1).fails(ENOMEM),
            RestrictLandlock,
            ENOMEM,
        ),
        case(
            "opening_the_proof_fails_for_another_reason",
            ALL,
            sandbox(libc::SYS_openat).when(|call| call.text(1) == "/.landlock").fails(EMFILE),
            ProveLandlock,
            EMFILE,
        ),
        case("seccomp_fails", CLONED, sandbox(libc::SYS_seccomp).nth(1).fails(EINVAL), InstallBaseFilter, EINVAL),
        prctl("prctl_pdeathsig_fails", BindToLauncher, |call| is(call, libc::PR_SET_PDEATHSIG)),
        case("clone_fails", NATIVE, sandbox(libc::SYS_clone).fails(EAGAIN), ForkWorkload, EAGAIN),
        asked("a_broken_artifact_fails", ALL, |spec| spec.program = "broken".parse().unwrap(), Prepare, ENOEXEC),
        case("seccomp_fails", CLONED, sandbox(libc::SYS_seccomp).nth(2).fails(ENOMEM), InstallLastFilter, ENOMEM),
        case("the_only_seccomp_fails", WASM, sandbox(libc::SYS_seccomp).fails(ENOMEM), InstallLastFilter, ENOMEM),
        case("sendmsg_fails", ALL, sandbox(libc::SYS_sendmsg).nth(1).fails(ENOBUFS), ReportReady, ENOBUFS),
    ]
}

pub(crate) fn is(call: &Call, option: libc::c_int) -> bool {
    call.args[0] == u64::from(option.cast_unsigned())
}

fn landlock(name: &'static str, call: libc::c_long, errno: Errno) -> Case {
    case(name, ALL, sandbox(call).fails(errno), Step::RestrictLandlock, errno)
}

/// It was ready, and is refused all the same; so are those below.
fn streams_that_cannot_be_placed() {
    let fault = sandbox(libc::SYS_dup2).nth(6).fails(EMFILE); // the first three make its own streams
    let mut client = Client::start_under(&[fault]);
    for kind in Kind::ALL {
        client.run(spec(kind), "mark");
        let before = client.held();
        client.arm(&[fault]);
        let (launched, _) = client.park(spec(kind));
        let output = offer(&launched.channel, "mark");
        let error = client.refused(launched.id);
        client.disarm();
        assert_eq!(error, LaunchError { step: Step::PlaceStdio, errno: EMFILE as i32 });
        drop(launched);
        assert_eq!(read(output), "", "{kind:?}: its job ran");
        client.must_hold(&before);
    }
    client.end();
}

/// Too few streams, and bytes that are no job.
fn a_job_that_is_none() {
    let mut client = Client::start();
    for kind in Kind::ALL {
        let ways: [fn(&Launched); 2] = [
            |sandbox| sandbox.channel.send(&0_u8, &[artifact(), artifact()]).unwrap(),
            |sandbox| sandbox.channel.send(&u64::MAX, &[artifact(), artifact(), artifact()]).unwrap(),
        ];
        for hand_over in ways {
            let (sandbox, _) = client.park(spec(kind));
            hand_over(&sandbox);
            let error = client.refused(sandbox.id);
            assert_eq!(error, LaunchError { step: Step::ReceiveJob, errno: EPROTO as i32 });
        }
        let run = client.run(spec(kind), "mark");
        assert_eq!(run.stdout, "ran\n");
    }
    client.end();
}
