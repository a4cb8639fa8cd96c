//! Zygotes: each step that one takes fails, so do those with which it is made and asked; and one that dies takes nothing
//! along.

use holm_sandbox::spec::{ArtifactId, Kind};
use holm_sandbox::{LaunchError, Step};
use libtest_mimic::Trial;
use nix::errno::Errno::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::{Client, spec, wait_until};
use crate::faults::{When, launcher, sire, zygote};
use crate::steps::{Case, WASM, case, is};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("two_zygotes_that_cannot_answer_are_enough", two_zygotes_that_cannot_answer),
        trial("a_zygote_that_is_killed_takes_no_sandbox_along_and_is_replaced", killed),
        trial("sandboxes_of_one_artifact_have_one_zygote_and_others_another", one_for_each_artifact),
    ]
}

/// The same of a sandbox whose maps its zygote has written.
fn verify_spawned(name: &'static str, when: When, step: Step) -> Case {
    case(name, WASM, launcher(libc::SYS_openat).when(when).nth(1).fails(EMFILE), step, EMFILE)
}

/// A case in which the zygote has to be made first.
pub(crate) fn new_zygote(case: Case) -> Case {
    Case { kinds: WASM, spec: |spec| spec.artifact = ArtifactId([8; 32]), ..case }
}

/// What fails when a zygote is made, in it, or when it is asked.
pub(crate) fn cases() -> Vec<Case> {
    use Step::*;
    let new = |name, fault, step, errno| new_zygote(case(name, WASM, fault, step, errno));
    let prctl = |name, step, when| new(name, zygote(libc::SYS_prctl).when(when).fails(EINVAL), step, EINVAL);
    vec![
        Case {
            spec: |spec| spec.tenant = "another".parse().unwrap(),
            ..case("clone3_of_the_family_fails", WASM, launcher(libc::SYS_clone3).fails(EAGAIN), MakeFamily, EAGAIN)
        },
        Case {
            spec: |spec| spec.tenant = "another".parse().unwrap(),
            ..case(
                "opening_the_family_s_uid_map_fails",
                WASM,
                launcher(libc::SYS_openat).when(|call| call.text(1).ends_with("/uid_map")).fails(EACCES),
                MapIds,
                EACCES,
            )
        },
        new("clone3_of_the_zygote_s_sire_fails", launcher(libc::SYS_clone3).fails(EAGAIN), MakeZygote, EAGAIN),
        new("waiting_for_the_zygote_s_sire_fails", launcher(libc::SYS_waitid).fails(EINVAL), MakeZygote, EINVAL),
        new("setns_of_the_zygote_s_sire_fails", sire(libc::SYS_setns).fails(EPERM), MakeZygote, EPERM),
        new("clone3_of_the_zygote_fails", sire(libc::SYS_clone3).fails(EAGAIN), MakeZygote, EAGAIN),
        new("sendmsg_of_the_zygote_s_sire_fails", sire(libc::SYS_sendmsg).fails(ENOBUFS), MakeZygote, EPIPE),
        new("close_range_of_the_zygote_fails", zygote(libc::SYS_close_range).nth(1).fails(EINVAL), CloseFds, EINVAL),
        new(
            "rt_sigaction_of_the_zygote_fails",
            zygote(libc::SYS_rt_sigaction).nth(1).fails(EINVAL),
            TakeIdentity,
            EINVAL,
        ),
        new("setns_of_the_zygote_fails", zygote(libc::SYS_setns).nth(1).fails(EPERM), EnterFamily, EPERM),
        new("setresuid_of_the_zygote_fails", zygote(libc::SYS_setresuid).nth(1).fails(EAGAIN), TakeIdentity, EAGAIN),
        new("keyctl_of_the_zygote_fails", zygote(libc::SYS_keyctl).fails(EDQUOT), JoinKeyring, EDQUOT),
        new(
            "opening_the_zygote_s_oom_score_adj_fails",
            zygote(libc::SYS_openat).when(|call| call.text(1).ends_with("oom_score_adj")).fails(EACCES),
            RaiseOomScore,
            EACCES,
        ),
        new("unshare_of_the_zygote_fails", zygote(libc::SYS_unshare).nth(1).fails(ENOSPC), EnterFamily, ENOSPC),
        new(
            "the_zygote_s_unshare_of_the_network_fails",
            zygote(libc::SYS_unshare).nth(2).fails(ENOSPC),
            MakeNetwork,
            ENOSPC,
        ),
        new("sethostname_of_the_zygote_fails", zygote(libc::SYS_sethostname).fails(EPERM), SetHostname, EPERM),
        new("the_zygote_s_fsopen_of_proc_fails", zygote(libc::SYS_fsopen).nth(1).fails(EPERM), MountProc, EPERM),
        new("the_zygote_s_fsopen_of_its_root_fails", zygote(libc::SYS_fsopen).nth(2).fails(ENODEV), MakeRoot, ENODEV),
        new("move_mount_of_the_zygote_fails", zygote(libc::SYS_move_mount).fails(EBUSY), MakeRoot, EBUSY),
        new("mkdirat_of_the_zygote_fails", zygote(libc::SYS_mkdirat).fails(ENOSPC), MakeRoot, ENOSPC),
        new("mount_setattr_of_the_zygote_fails", zygote(libc::SYS_mount_setattr).fails(EPERM), SealRoot, EPERM),
        new("pivot_root_of_the_zygote_fails", zygote(libc::SYS_pivot_root).fails(EINVAL), PivotRoot, EINVAL),
        new("umount2_of_the_zygote_fails", zygote(libc::SYS_umount2).fails(EBUSY), PivotRoot, EBUSY),
        new("capset_of_the_zygote_fails", zygote(libc::SYS_capset).nth(1).fails(EPERM), DropCapabilities, EPERM),
        prctl("the_zygote_s_prctl_no_new_privs_fails", SetNoNewPrivs, |call| is(call, libc::PR_SET_NO_NEW_PRIVS)),
        new("seccomp_of_the_zygote_fails", zygote(libc::SYS_seccomp).fails(EINVAL), InstallBaseFilter, EINVAL),
        prctl("the_zygote_s_prctl_pdeathsig_fails", BindToLauncher, |call| is(call, libc::PR_SET_PDEATHSIG)),
        new(
            "reading_the_zygote_s_namespaces_fails",
            launcher(libc::SYS_readlink).when(|call| call.text(0).ends_with("/ns/ipc")).fails(EACCES),
            VerifyNamespaces,
            EACCES,
        ),
        case("clone3_in_the_zygote_fails", WASM, zygote(libc::SYS_clone3).fails(EAGAIN), Clone, EAGAIN),
        case(
            "writing_the_uid_map_in_the_zygote_fails",
            WASM,
            zygote(libc::SYS_write).when(|call| call.file(0).ends_with("/uid_map")).fails(EPERM),
            MapIds,
            EPERM,
        ),
        case(
            "opening_the_gid_map_in_the_zygote_fails",
            WASM,
            zygote(libc::SYS_openat).when(|call| call.text(1).ends_with("/gid_map")).fails(EACCES),
            MapIds,
            EACCES,
        ),
        case("asking_the_zygote_fails", WASM, launcher(libc::SYS_sendmsg).nth(1).fails(ENOBUFS), Spawn, ENOBUFS),
        case(
            "looking_at_what_was_spawned_fails",
            WASM,
            launcher(libc::SYS_openat).when(|call| call.text(1).contains("/fdinfo/")).fails(EMFILE),
            Spawn,
            EMFILE,
        ),
        verify_spawned(
            "opening_the_spawned_one_s_status_fails",
            |call| call.text(1).ends_with("/status"),
            VerifyPrivilege,
        ),
        verify_spawned("opening_the_spawned_one_s_uid_map_fails", |call| call.text(1).ends_with("/uid_map"), VerifyIds),
        verify_spawned(
            "opening_the_spawned_one_s_mounts_fails",
            |call| call.text(1).ends_with("/mountinfo"),
            VerifyMounts,
        ),
        verify_spawned(
            "opening_the_spawned_one_s_membership_fails",
            |call| call.text(1).ends_with("/cgroup"),
            VerifyCgroup,
        ),
    ]
}

/// What one zygote owes when it dies without a word is asked of another, and then of nobody else.
fn two_zygotes_that_cannot_answer() {
    let always = zygote(libc::SYS_sendmsg).fails(ENOBUFS);
    let mut client = Client::start_under(&[always]);
    client.run(spec(Kind::Wasm), "mark");
    client.arm(&[always]);
    let launched = client.launch(spec(Kind::Wasm));
    assert_eq!(client.refused(launched.id), LaunchError { step: Step::Spawn, errno: EPIPE as i32 });
    client.disarm();
    assert_eq!(client.run(spec(Kind::Wasm), "mark").stdout, "ran\n");
    client.held(); // nothing is left of those that nobody told of
    client.end();
}

fn killed() {
    let mut client = Client::start();
    client.run(spec(Kind::Wasm), "mark");
    let [first] = zygotes(&client)[..] else { panic!("{:?}", zygotes(&client)) };
    let (parked, isolation) = client.park(spec(Kind::Wasm));
    kill(first, Signal::SIGKILL).unwrap();
    // at whatever moment of the zygote's end this one comes
    assert_eq!(client.run(spec(Kind::Wasm), "mark").stdout, "ran\n");
    assert!(!zygotes(&client).contains(&first));
    assert_eq!(client.finish(&parked, isolation, "mark").stdout, "ran\n");
    client.held();
    client.end();
}

fn one_for_each_artifact() {
    let mut client = Client::start();
    for _ in 0..3 {
        client.run(spec(Kind::Wasm), "mark");
    }
    let [first] = zygotes(&client)[..] else { panic!("{:?}", zygotes(&client)) };
    let mut other = spec(Kind::Wasm);
    other.artifact = ArtifactId([8; 32]);
    client.run(other, "mark");
    assert_eq!(zygotes(&client).len(), 2);
    // the configuration lets there be four
    for artifact in 9..12 {
        let mut other = spec(Kind::Wasm);
        other.artifact = ArtifactId([artifact; 32]);
        client.run(other, "mark");
    }
    wait_until("the one that is of no use for the longest goes", || !zygotes(&client).contains(&first));
    assert_eq!(zygotes(&client).len(), 4);
    client.end();
}

pub(crate) fn zygotes(client: &Client) -> Vec<Pid> {
    let launcher = client.child.id();
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let name = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let zygotes = children.split_whitespace().filter(|pid| name(pid) == "holm-zygote\n");
    zygotes.map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
}
