//! Deaths: of the server, the launcher, its sweeper; and what was used by those long dead.

use std::time::Duration;

use holm_sandbox::protocol::FromLauncher;
use holm_sandbox::spec::{Kind, SandboxSpec};
use holm_sandbox::usage::Exit;
use holm_sandbox::{LaunchError, Step};
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::{Client, Launched, give, limits, spec, wait_until};
use crate::faults::{Fault, launcher};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("the_server_s_death_ends_launcher_and_sandboxes_within_2_s", the_server_dies),
        trial("the_launcher_s_death_ends_its_sandboxes_and_is_swept", the_launcher_dies),
        trial("the_next_launcher_sweeps_what_launcher_and_sweeper_left", launcher_and_sweeper_die),
        trial("cpu_time_of_dead_grandchildren_is_counted", dead_grandchildren),
        trial("a_panic_in_the_sandbox_is_refused_at_panic", a_panic),
        trial("a_host_without_free_uids_refuses_at_claim_uids", no_uids),
    ];
    for (name, fault, problem) in start_up() {
        let name = format!("a_launcher_whose_{name}_fails_says_so_and_leaves_nothing");
        trials.push(trial(&name, move || {
            let problems = Client::start_in_vain(&[fault]);
            assert!(matches!(&problems[..], [one] if one.contains(problem)), "{problems:?}");
        }));
    }
    trials
}

/// One parked, one running and deaf to signals, in each kind, and one on its way.
fn populate(client: &mut Client) -> Vec<Launched> {
    let mut sandboxes = Vec::new();
    for kind in Kind::ALL {
        sandboxes.push(client.park(spec(kind)).0);
    }
    for kind in [Kind::Native, Kind::Wasm] {
        let (launched, _) = client.park(spec(kind));
        give(&launched.channel, "spin deaf");
        assert_eq!(client.recv(), FromLauncher::Started(launched.id));
        sandboxes.push(launched);
    }
    sandboxes.push(client.launch(spec(Kind::Native)));
    sandboxes
}

fn the_server_dies() {
    let mut client = Client::start();
    let _sandboxes = populate(&mut client);
    let processes = client.instance.processes();
    assert!(processes.len() >= 7, "{processes:?}");
    client.end();
    assert!(!processes.iter().any(|pid| alive(*pid)));
}

fn the_launcher_dies() {
    let mut client = Client::start();
    let _sandboxes = populate(&mut client);
    let processes = client.instance.processes();
    kill(Pid::from_raw(client.child.id().cast_signed()), Signal::SIGKILL).unwrap();
    wait_until("the sandboxes die with it", || !processes.iter().any(|pid| alive(*pid)));
    client.must_be_swept();
}

fn launcher_and_sweeper_die() {
    let mut client = Client::start();
    let _sandboxes = populate(&mut client);
    let processes = client.instance.processes();
    let launcher = client.child.id();
    let sweeper = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let sweeper =
        sweeper.split_whitespace().map(|pid| pid.parse().unwrap()).find(|pid| !processes.contains(pid)).unwrap();
    for pid in [sweeper, launcher.cast_signed()] {
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
    client.child.wait().unwrap();
    let left = client.instance.sandboxes();
    assert!(!left.is_empty(), "somebody has swept");

    let mut next = client.start_again();
    assert!(!left.iter().any(|cgroup| cgroup.exists()), "{left:?}");
    assert!(!processes.iter().any(|pid| alive(*pid)));
    assert_eq!(next.run(spec(Kind::Native), "mark").stdout, "ran\n");
    next.end();
}

/// Neither gone nor a zombie that its parent's heir has yet to reap.
fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

fn dead_grandchildren() {
    let mut client = Client::start();
    let run = client.run(spec(Kind::Native), "orphan spins 300 ms");
    assert_eq!(run.report.exit, Exit::Exited(0));
    let used = run.report.usage.cpu_user_us.unwrap() + run.report.usage.cpu_system_us.unwrap();
    assert!((300_000..600_000).contains(&used), "{used} µs");
    assert_eq!(run.report.usage.pids_peak, Some(3), "the main process, its child, and its grandchild");
    client.end();
}

fn a_panic() {
    let mut client = Client::start();
    for kind in Kind::ALL {
        let launched = client.launch(SandboxSpec { program: "panics".parse().unwrap(), ..spec(kind) });
        let error = client.refused(launched.id);
        assert_eq!(error, LaunchError { step: Step::Panic, errno: Errno::ENOTRECOVERABLE as i32 });
    }
    assert_eq!(client.run(spec(Kind::Native), "mark").stdout, "ran\n");
    client.end();
}

/// A block of uids lasts for 161 tenants; a server on this host has all others.
fn no_uids() {
    const RUNS: usize = 161;
    let lock = launcher(libc::SYS_fcntl).when(|call| call.args[1] == 37 /* F_OFD_SETLK */).fails(Errno::EAGAIN);
    let mut client = Client::start_under(&[lock]);
    let limits = holm_sandbox::limits::Limits { wall_time: Duration::from_secs(60), ..limits() };
    let of_tenant = |n: usize| {
        let tenant = format!("tenant-{n}").parse().unwrap();
        SandboxSpec { tenant, limits, ..spec(Kind::Compile) }
    };
    let mut parked: Vec<Launched> = (0..RUNS).map(|n| client.park(of_tenant(n)).0).collect();
    client.arm(&[lock]);
    let launched = client.launch(of_tenant(RUNS));
    assert_eq!(client.refused(launched.id), LaunchError { step: Step::ClaimUids, errno: Errno::EUSERS as i32 });
    client.disarm();
    // of a tenant that has some, there are more; and what is given back can be had
    parked.push(client.park(of_tenant(0)).0);
    parked.push(client.park(of_tenant(RUNS)).0);
    client.end();
}

fn start_up() -> Vec<(&'static str, Fault, &'static str)> {
    let fails = |call| launcher(call).fails(Errno::EPERM);
    let instance = |call: &crate::faults::Call| call.text(1).starts_with("holm-test-");
    vec![
        ("instance_s_cgroup", fails(libc::SYS_mkdirat).when(instance), "make a directory in the cgroup"),
        ("session", fails(libc::SYS_setsid), "leave the terminal's session"),
        ("mount_namespace", fails(libc::SYS_unshare).nth(1), "make a private root for the launcher"),
        ("private_root", fails(libc::SYS_pivot_root), "make a private root for the launcher"),
        ("network_namespace", fails(libc::SYS_unshare).nth(2), "leave the host's network and IPC namespaces"),
        ("sweeper", fails(libc::SYS_clone), "fork the sweeper"),
        ("bounding_set", fails(libc::SYS_prctl).when(|call| call.args[0] == 24), "drop capabilities"),
        ("capability_sets", fails(libc::SYS_capset), "drop capabilities"),
        ("dumpable_flag", fails(libc::SYS_prctl).when(|call| call.args[0] == 4), "become non-dumpable"),
        ("epoll_instance", fails(libc::SYS_epoll_create1), "make an epoll instance"),
    ]
}
