//! Sandboxes that never become ready, jobs that do not want to end, and a server that does not listen.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use holm_sandbox::limits::Limits;
use holm_sandbox::protocol::{FromLauncher, ToLauncher};
use holm_sandbox::spec::{Kind, SandboxId, SandboxSpec};
use holm_sandbox::usage::{Exit, KillCause};
use holm_sandbox::wire::Packets;
use holm_sandbox::{LaunchError, Step};
use libtest_mimic::Trial;
use nix::errno::Errno;

use crate::client::{Client, Launched, artifact, give, limits, spec};
use crate::faults::sandbox;
use crate::slowness::at_most;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("stuck_sandboxes_hold_nobody_up_and_are_refused_at_their_deadline", stuck_sandboxes),
        trial("a_job_deaf_to_signals_ends_at_its_wall_time", || deaf_job_ends_by(KillCause::WallTime)),
        trial("a_job_deaf_to_signals_ends_at_its_cpu_time", || deaf_job_ends_by(KillCause::CpuTime)),
        trial("a_job_deaf_to_signals_ends_when_the_server_says_so", || deaf_job_ends_by(KillCause::Requested)),
        trial("a_stuck_sandbox_can_be_killed", a_stuck_sandbox_can_be_killed),
        trial("a_server_that_does_not_read_gets_every_answer_later", answers_wait),
        trial("a_server_that_never_reads_is_taken_for_dead", a_server_that_never_reads),
    ]
}

fn named(program: &str, kind: Kind) -> SandboxSpec {
    SandboxSpec { program: program.parse().unwrap(), ..spec(kind) }
}

/// One is stopped, one loads for ever, one hangs in its first step, before its gate.
fn stuck_sandboxes() {
    const DEADLINE: Duration = Duration::from_secs(10);
    let hang = sandbox(libc::SYS_close_range).hangs();
    let mut client = Client::start_under(&[hang]);
    for kind in [Kind::Native, Kind::Wasm] {
        client.run(spec(kind), "mark");
    }
    let before = client.held();

    let begun = Instant::now();
    client.arm(&[hang]);
    let mut stuck = vec![client.launch(spec(Kind::Wasm))];
    crate::client::wait_until("it hangs", || client.struck() > 0);
    client.disarm();
    stuck.push(client.launch(named("stopped", Kind::Native)));
    for kind in Kind::ALL {
        stuck.push(client.launch(named("endless", kind)));
    }
    for kind in Kind::ALL {
        assert_eq!(client.run(spec(kind), "mark").stdout, "ran\n");
    }
    assert!(begun.elapsed() < at_most(DEADLINE / 2), "others waited {:?} for the stuck ones", begun.elapsed());

    for _ in 0..stuck.len() {
        let FromLauncher::Refused { id, error } = client.recv() else { panic!("not refused") };
        assert_eq!(error, LaunchError { step: Step::BecomeReady, errno: Errno::ETIMEDOUT as i32 });
        assert!(begun.elapsed() >= DEADLINE && begun.elapsed() < DEADLINE + at_most(Duration::from_secs(2)));
        stuck.retain(|stuck| stuck.id != id);
    }
    assert!(stuck.is_empty());
    client.must_hold(&before);
    client.end();
}

fn deaf_job_ends_by(cause: KillCause) {
    const SHORT: Duration = Duration::from_millis(300);
    let limits = match cause {
        KillCause::WallTime => Limits { wall_time: SHORT, ..limits() },
        KillCause::CpuTime => Limits { cpu_time: SHORT, ..limits() },
        _ => limits(),
    };
    let mut client = Client::start();
    for kind in [Kind::Native, Kind::Wasm] {
        let (launched, _) = client.park(SandboxSpec { limits, ..spec(kind) });
        let _output = give(&launched.channel, "spin deaf");
        assert_eq!(client.recv(), FromLauncher::Started(launched.id));
        if cause == KillCause::Requested {
            std::thread::sleep(SHORT);
            client.send(&ToLauncher::Kill(launched.id));
        }
        let report = client.ended(launched.id);
        assert_eq!((report.exit, report.killed), (Exit::Signaled(libc::SIGKILL), Some(cause)), "{kind:?}");
        let wall = Duration::from_micros(report.usage.wall_us);
        // what the launch used of the CPU counts too, and not as wall time
        let least = if cause == KillCause::CpuTime { SHORT / 2 } else { SHORT };
        assert!(wall >= least && wall < at_most(Duration::from_secs(5)), "{wall:?}");
    }
    client.held();
    client.end();
}

fn a_stuck_sandbox_can_be_killed() {
    let mut client = Client::start();
    for program in ["stopped", "endless"] {
        let Launched { id, .. } = client.launch(named(program, Kind::Native));
        crate::client::wait_until("it is there", || client.instance.processes().len() == 2);
        client.send(&ToLauncher::Kill(id));
        let report = client.ended(id);
        assert_eq!((report.started, report.killed), (false, Some(KillCause::Requested)));
    }
    client.end();
}

/// A launch that cannot be, for an answer.
fn refused_launch(client: &mut Client, fds: &[OwnedFd]) -> (SandboxId, std::io::Result<()>) {
    let id = client.new_id();
    let mut spec = spec(Kind::Native);
    spec.limits.pids = 0;
    (id, client.socket().send(&ToLauncher::Launch { id, spec }, fds))
}

fn two_fds() -> [OwnedFd; 2] {
    [Packets::pair().unwrap().0.into(), artifact()]
}

fn answers_wait() {
    const MANY: u64 = 5_000; // a socket takes some hundreds
    let mut client = Client::start();
    let (running, _) = client.park(spec(Kind::Wasm));
    let fds = two_fds();
    let ids: Vec<SandboxId> = (0..MANY)
        .map(|_| {
            let (id, sent) = refused_launch(&mut client, &fds);
            sent.expect("the launcher has stopped reading");
            id
        })
        .collect();
    for id in ids {
        assert_eq!(client.refused(id).step, Step::CheckSpec);
    }
    client.send(&ToLauncher::Kill(running.id));
    client.ended(running.id);
    client.end();
}

fn a_server_that_never_reads() {
    const MOST_WAITING: u64 = 1 << 17;
    let mut client = Client::start();
    let _running = client.park(spec(Kind::Wasm));
    let fds = two_fds();
    let mut sent = 0;
    while refused_launch(&mut client, &fds).1.is_ok() {
        sent += 1;
        assert!(sent < 2 * MOST_WAITING, "the launcher keeps it all");
    }
    assert!(sent >= MOST_WAITING, "the launcher gave up after {sent}");
    client.must_end();
}
