//! Deaths without warning: of the server, its launcher, its sweeper, a sandbox; and what stays of an upload.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::family::locked_bytes;
use support::inspect::{Process, Running};
use support::raw::Raw;
use support::slowness::at_most;
use support::{Server, native, wait_until, wasm, wat};
use tempfile::TempDir;

const ECHO: &str = "/v1/tenants/t/plugins/echo";

/// The contract's time from the death of a server to that of everything it had.
const GONE_WITHIN: Duration = Duration::from_secs(2);

/// A server with plugins of both kinds.
fn start() -> Server {
    prepare(Server::start())
}

fn prepare(server: Server) -> Server {
    let server = server.with_probe();
    server.upload("t", "echo", &wasm("echo"));
    server
}

/// A server that agrees about uids with nobody else, and the file in which it claims them.
fn start_alone() -> (Server, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let locks = dir.path().join("locks");
    let config = format!("lock_dir = {:?}\ndrain_timeout_ms = 60000", locks.to_str().unwrap());
    let server = prepare(Server::start_in(dir, &config));
    assert_eq!(locked_bytes(&locks.join("uid-blocks")), [0]);
    (server, locks.join("uid-blocks"))
}

/// Jobs of each kind with all sorts of processes, none of which ends soon; and the processes.
fn crowd(server: &Server) -> (Vec<Running>, Vec<Process>) {
    let start = |plugin: &str, args: Value| Running::start(server, "t", plugin, &args, &json!({"pids": 16}));
    let jobs = vec![
        start("echo", json!([])),
        start("echo", json!([])),
        start("probe", json!(["count"])),
        start("probe", json!(["spin-in-grandchild", "60000"])),
        start("probe", json!(["fork-bomb", "4"])),
    ];
    let processes = wait_until("the bomb has gone off", || {
        let processes: Vec<Process> = server.sandboxed().into_iter().map(Process).collect();
        // two of echo; an init and a program; an init, a program and its grandchild; sixteen and their init
        (processes.len() >= 2 + 2 + 3 + 16).then_some(processes)
    });
    (jobs, processes)
}

/// The server is dead. Fails unless everything else of it is gone in the time that the contract gives.
#[track_caller]
fn gone_in_time(server: &Server, since: Instant, processes: &[Process]) {
    wait_until("every process has ended", || (!processes.iter().any(|process| process.lives())).then_some(()));
    wait_until("every cgroup is gone", || server.cgroups().is_empty().then_some(()));
    assert!(since.elapsed() < at_most(GONE_WITHIN), "{:?}", since.elapsed());
    server.assert_nothing_left();
}

/// Starts a server where another one was, and sees that it works.
#[track_caller]
fn start_again(dir: TempDir) -> Server {
    let server = Server::start_in(dir, "");
    server.assert_healthy();
    assert_eq!(server.job("t", "echo", &json!([]), &json!({}), b"again")["output"], "again");
    assert_eq!(server.data().join("tmp").read_dir().unwrap().count(), 0);
    server
}

#[test]
fn l11_a_killed_server_s_jobs_cgroups_and_uids_are_gone_within_two_seconds() {
    let (mut server, locks) = start_alone();
    let (jobs, mut processes) = crowd(&server);
    let mut upload = Raw::request(&server, &format!("PUT {ECHO}"), &["transfer-encoding: chunked"]);
    assert!(upload.chunk(&wat::slow_to_compile(4000)) && upload.chunk(b""));
    processes.extend([server.wait_for_compiler(), server.launcher(), server.sweeper()]);

    let since = Instant::now();
    server.kill();
    wait_until("every process has ended", || (!processes.iter().any(|process| process.lives())).then_some(()));
    wait_until("every cgroup is gone", || server.cgroups().is_empty().then_some(()));
    assert!(since.elapsed() < at_most(GONE_WITHIN), "{:?}", since.elapsed());
    assert_eq!(locked_bytes(&locks), [] as [i64; 0]);
    assert!(upload.answer().is_none());
    drop(jobs);
    start_again(server.take_dir());
}

#[test]
fn l11_a_killed_launcher_takes_its_sandboxes_along_and_the_server_ends_in_order_with_an_error() {
    let (mut server, locks) = start_alone();
    let (jobs, mut processes) = crowd(&server);
    processes.push(server.sweeper());
    let since = Instant::now();
    server.launcher().signal(Signal::SIGKILL);
    for job in jobs {
        assert_eq!(job.answer().expect(200).json()["outcome"], json!({"kind": "lost"}));
    }
    assert_eq!(server.wait().code(), Some(70));
    gone_in_time(&server, since, &processes);
    assert_eq!(locked_bytes(&locks), [] as [i64; 0]);
    assert!(server.log().contains("the launcher is gone") && !server.log().contains("panicked"), "{}", server.log());
    start_again(server.take_dir());
}

#[test]
fn l11_what_nobody_is_left_to_sweep_is_swept_by_the_next_start() {
    let mut server = start();
    let (jobs, processes) = crowd(&server);
    server.sweeper().signal(Signal::SIGKILL);
    server.assert_healthy();
    let launcher = server.launcher();
    server.signal(Signal::SIGSTOP);
    launcher.signal(Signal::SIGKILL);
    wait_until("every sandbox is dead", || (!processes.iter().any(|process| process.lives())).then_some(()));
    server.signal(Signal::SIGCONT);
    assert_eq!(server.wait().code(), Some(70));
    drop(jobs);

    let left = server.cgroups();
    assert!(!left.is_empty());
    let mut survivor = Command::new("sleep").arg("60").spawn().unwrap();
    for cgroup in &left {
        // v2 allows no process right in the tenant's
        let place = cgroup.join("t/left");
        std::fs::create_dir(&place).unwrap();
        std::fs::write(place.join("cgroup.procs"), survivor.id().to_string()).unwrap();
    }
    let server = start_again(server.take_dir());
    let end = wait_until("the survivor is dead", || survivor.try_wait().unwrap());
    assert!(!end.success());
    assert!(server.sandboxed().is_empty());
}

#[test]
fn a_server_waits_for_what_is_left_of_the_last_one_on_its_data_directory() {
    let mut server = start();
    let (jobs, processes) = crowd(&server);
    let late = [server.launcher(), server.sweeper()];
    late[0].signal(Signal::SIGSTOP);
    server.kill();
    let dir = server.take_dir();
    let next = std::thread::spawn(|| start_again(dir));
    // it may not begin while somebody is there who would remove its cgroups
    std::thread::sleep(Duration::from_secs(1));
    assert!(!next.is_finished() && processes.iter().any(|process| process.lives()));
    late[0].signal(Signal::SIGCONT);
    let next = next.join().unwrap();
    assert!(!processes.iter().chain(&late).any(|process| process.lives()));
    next.assert_healthy();
    drop(jobs);
}

#[test]
fn a_server_whose_predecessor_does_not_end_refuses_to_start_and_says_why() {
    let mut server = start();
    let late = [server.launcher(), server.sweeper()];
    late[0].signal(Signal::SIGSTOP);
    server.kill();
    let dir = server.take_dir();
    let output = Server::command(&dir, "").stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(said.contains("the launcher of the last server on this data directory has not ended"), "{said}");
    late[0].signal(Signal::SIGCONT);
    start_again(dir);
    assert!(!late.iter().any(|process| process.lives()));
}

#[test]
fn a_sandbox_that_somebody_on_the_host_kills_is_lost_and_its_neighbours_go_on() {
    let server = start();
    let kept = Running::start(&server, "t", "probe", &json!(["count"]), &json!({}));
    for plugin in ["probe", "echo"] {
        let job = Running::start(&server, "t", plugin, &json!(["count"]), &json!({}));
        job.processes(&server)[0].signal(Signal::SIGKILL);
        assert_eq!(job.answer().expect(200).json()["outcome"], json!({"kind": "lost"}), "{plugin}");
    }
    let job = Running::start(&server, "t", "probe", &json!(["count"]), &json!({}));
    job.processes(&server)[1].signal(Signal::SIGKILL);
    assert_eq!(
        job.answer().expect(200).json()["outcome"],
        json!({"kind": "signaled", "signal": 9}),
        "the program itself"
    );
    assert_eq!(kept.finish().expect(200).json()["outcome"]["kind"], "exited");
    server.assert_healthy();
}

#[test] // L5
fn a_sandbox_that_stands_still_is_ended_at_its_deadline() {
    let server = start();
    for plugin in ["probe", "echo"] {
        let job = Running::start(&server, "t", plugin, &json!(["count"]), &json!({"wall_time_ms": 500}));
        for process in job.processes(&server) {
            process.signal(Signal::SIGSTOP);
        }
        assert_eq!(job.answer().expect(200).json()["outcome"]["limit"], "wall_time_ms", "{plugin}");
    }
    server.assert_healthy();
}

#[test]
fn a_server_killed_in_the_middle_of_an_upload_or_a_compilation_keeps_the_old_revision() {
    let mut server = start();
    let before = server.get(ECHO).expect(200).json();
    let mut cut = Raw::request(&server, &format!("PUT {ECHO}"), &["content-length: 1000000"]);
    cut.send(&native("echo")[..50_000]);
    let slow = wat::slow_to_compile(300);
    let mut compiled = Raw::request(&server, &format!("PUT {ECHO}"), &["transfer-encoding: chunked"]);
    assert!(compiled.chunk(&slow) && compiled.chunk(b""));
    server.wait_for_compiler().signal(Signal::SIGSTOP);
    let tmp = server.data().join("tmp");
    // the two uploads, and what the compiler is to write to
    wait_until("both have left files", || (tmp.read_dir().unwrap().count() == 3).then_some(()));
    server.kill();
    assert!(cut.answer().is_none() && compiled.answer().is_none());
    let server = start_again(server.take_dir());
    assert_eq!(server.get(ECHO).expect(200).json(), before);
    assert_eq!(server.data().join("artifacts/t").read_dir().unwrap().count(), 2, "echo and probe");
    assert_eq!(server.upload("t", "echo", &slow)["runtime"], "wasm");
}

#[test]
fn a_server_killed_at_any_moment_of_an_upload_has_the_old_revision_or_the_new_one() {
    let mut server = start();
    let mut seen = Vec::new();
    for round in 0..10 {
        let artifact = [native("word-count"), wasm("echo"), native("echo")][round % 3].clone();
        let before = server.get(ECHO).json()["revision"].clone();
        let length = format!("content-length: {}", artifact.len());
        let mut upload = Raw::request(&server, &format!("PUT {ECHO}"), &[&length]);
        assert!(upload.offer(&artifact));
        std::thread::sleep(Duration::from_millis(5 * round as u64));
        server.kill();
        let answered = upload.answer().is_some();
        server = Server::start_in(server.take_dir(), "");
        let after = server.get(ECHO).json()["revision"].clone();
        let new = json!(format!("sha256:{}", hex::encode(Sha256::digest(&artifact))));
        assert!(after == new || (after == before && !answered), "{after} for {new} after {before}");
        let job = server.job("t", "echo", &json!([]), &json!({}), b"one two");
        assert_eq!(job["outcome"], json!({"kind": "exited", "exit_code": 0}));
        assert_eq!(job["revision"], after);
        assert_eq!(server.data().join("tmp").read_dir().unwrap().count(), 0);
        seen.push(after == new);
    }
    server.assert_healthy();
    assert!(seen.contains(&true) && seen.contains(&false), "it was always too early, or always too late: {seen:?}");
}
