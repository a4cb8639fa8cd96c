//! Tenants that are paused as a whole: everything of them stands still, what comes meanwhile waits, and nobody else
//! notices.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::inspect::{Process, Running};
use support::loops::Loop;
use support::raw::Raw;
use support::slowness::at_most;
use support::wat::command;
use support::{Server, native, wait_until, wasm};

const PROBE: &str = "/v1/tenants/t/plugins/probe/jobs";

/// Jobs whose input does not end are to run for as long as a busy machine takes. Nothing is parked: what lives is counted
/// from outside.
const PATIENT: &str = "body_grace_ms = 120000\nparked_per_plugin = 0\n";

/// A server with two tenants, `t` and `other`, that have the probe each.
fn start_with(config: &str) -> Server {
    let server = Server::start_with(config).with_probe();
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    server
}

fn run(server: &Server, tenant: &str, words: &[&str], limits: &Value) -> Running {
    Running::start(server, tenant, "probe", &json!(words), limits)
}

fn exits(server: &Server, tenant: &str) {
    let record = server.job(tenant, "probe", &json!(["exit", "0"]), &json!({}), b"");
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
}

/// A job of the probe of tenant `t` that has been asked for and not answered.
fn asked_for(server: &Server) -> Raw {
    Raw::request(server, &format!("POST {PROBE}"), &["content-length: 0", "holm-args: [\"exit\", \"0\"]"])
}

#[test]
fn everything_of_a_paused_tenant_stands_still_and_goes_on_after() {
    let server = start_with(PATIENT);
    server.upload("t", "loop", command(&[], "", "(loop $l (br $l))").as_bytes());
    let spin = run(&server, "t", &["spin", "60000"], &json!({}));
    let bomb = run(&server, "t", &["hide", "60000"], &json!({"pids": 24, "cpu_cores": 2}));
    let guest = Running::start(&server, "t", "loop", &json!([]), &json!({}));
    let neighbour = run(&server, "other", &["spin", "60000"], &json!({}));
    server.pause_tenant("t", true);
    for job in [&spin, &bomb, &guest] {
        assert_eq!(server.record(job.id())["state"], "paused");
    }
    for job in [&spin, &guest] {
        server.limit_wall_time(job, Duration::from_millis(500));
    }
    let before = [&spin, &bomb, &guest].map(|job| job.cpu_time(&server));
    neighbour.wait_for_cpu(&server, Duration::from_millis(200));
    exits(&server, "other");
    std::thread::sleep(Duration::from_millis(1000)); // longer than they may run
    assert_eq!([&spin, &bomb, &guest].map(|job| job.cpu_time(&server)), before);
    assert_eq!(server.get("/v1/tenants/t").expect(200).json()["paused"], true);
    assert_eq!(server.get("/v1/tenants/other").expect(200).json()["paused"], false);
    server.pause_tenant("t", true); // it is
    server.pause_tenant("t", false);
    for job in [spin, guest] {
        let record = job.answer().expect(200).json();
        assert_eq!(record["outcome"]["limit"], "wall_time_ms", "{record}");
        assert!(record["usage"]["paused_us"].as_u64().unwrap() >= 1_000_000, "{record}");
    }
    server.pause_tenant("t", false);
    for job in [bomb, neighbour] {
        server.order(job.id(), "cancel").expect(200);
    }
    server.assert_healthy();
}

#[test]
fn jobs_of_a_paused_tenant_wait_and_run_when_it_is_resumed() {
    let server = start_with(PATIENT);
    server.pause_tenant("t", true);
    let mut waiting = [(); 3].map(|()| asked_for(&server));
    wait_until("they wait", || {
        let jobs = server.get("/v1/tenants/t/jobs?state=queued").json();
        (jobs["jobs"].as_array().unwrap().len() == 3).then_some(())
    });
    exits(&server, "other");
    // what is uploaded for it is compiled after, and what needs no compiling is taken at once
    server.upload("t", "native", &native("echo"));
    let guest = wasm("word-count");
    std::thread::scope(|scope| {
        let upload = scope.spawn(|| server.operator("PUT", "/v1/tenants/t/plugins/guest", &[], &guest));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!upload.is_finished());
        server.pause_tenant("t", false);
        assert_eq!(upload.join().unwrap().status, 201);
    });
    for request in &mut waiting {
        request.answered().expect(200);
    }
    exits(&server, "t");
    server.assert_healthy();
}

#[test]
fn jobs_that_wait_too_long_for_their_tenant_are_told_why() {
    let server = start_with("queue_timeout_ms = 300\nparked_per_plugin = 0\n");
    server.pause_tenant("t", true);
    let mut request = asked_for(&server);
    let refused = request.answered();
    assert_eq!(refused.problem(503), "tenant_paused");
    assert_eq!(refused.header("retry-after"), "5");
    exits(&server, "other");
    server.pause_tenant("t", false);
    exits(&server, "t");
    server.assert_healthy();
}

#[test]
fn what_is_on_its_way_into_a_sandbox_comes_there_when_the_tenant_is_resumed() {
    let server = start_with(PATIENT);
    for round in 0..10 {
        let mut request = asked_for(&server);
        std::thread::sleep(Duration::from_micros(700 * round)); // at another moment of its launch each time
        server.pause_tenant("t", true);
        exits(&server, "other");
        server.pause_tenant("t", false);
        request.answered().expect(200);
    }
    // and can be ended meanwhile
    for round in 0..10 {
        let mut request = asked_for(&server);
        std::thread::sleep(Duration::from_micros(700 * round));
        server.pause_tenant("t", true);
        let jobs = server.get("/v1/tenants/t/jobs?limit=1").json()["jobs"].clone();
        let id = jobs[0]["id"].as_str().unwrap().to_owned();
        let ended = server.order(&id, "cancel");
        assert!([200, 409].contains(&ended.status), "{}", ended.text());
        request.answered();
        assert!(server.sandboxed().is_empty());
        server.pause_tenant("t", false);
    }
    server.assert_healthy();
}

#[test]
fn the_launcher_s_death_takes_along_what_is_on_its_way_into_a_paused_sandbox() {
    let mut server = start_with(PATIENT);
    // at whatever moment of their launch some of them stand still
    let requests = [(); 12].map(|()| asked_for(&server));
    server.pause_tenant("t", true);
    server.launcher().signal(Signal::SIGKILL);
    assert!(!server.wait().success());
    drop(requests);
    wait_until("no cgroup is left", || server.cgroups().is_empty().then_some(()));
}

/// Every process of tenant `t`, with the CPU time that it has had: of jobs, and of whatever waits for them.
fn everything(server: &Server) -> Vec<(u32, String)> {
    let mut found: Vec<u32> = Vec::new();
    for root in server.cgroups() {
        let leaves = fs::read_dir(root.join("t")).into_iter().flatten().flatten();
        for leaf in leaves.filter(|leaf| leaf.path().is_dir()) {
            let procs = fs::read_to_string(leaf.path().join("cgroup.procs")).unwrap_or_default();
            found.extend(procs.lines().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    found.sort_unstable();
    found.dedup();
    let used =
        |pid: u32| fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?.split(' ').next().map(str::to_owned);
    found.into_iter().filter_map(|pid| Some((pid, used(pid)?))).collect()
}

#[test]
fn what_is_kept_ready_for_jobs_stands_still_too_and_serves_after() {
    let server = start_with("body_grace_ms = 120000\nparked_idle_ms = 60000\n");
    let spin = run(&server, "t", &["spin", "60000"], &json!({}));
    for _ in 0..10 {
        exits(&server, "t");
        std::thread::sleep(Duration::from_millis(30));
    }
    server.pause_tenant("t", true);
    let before = everything(&server);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(everything(&server), before);
    assert!(before.len() >= 2, "{before:?}");
    println!("{} processes stood still", before.len());
    server.pause_tenant("t", false);
    exits(&server, "t");
    server.order(spin.id(), "cancel").expect(200);
    server.assert_healthy();
}

#[test]
fn a_job_s_own_pause_and_its_tenant_s_do_not_touch_each_other() {
    let server = start_with(PATIENT);
    let [own, other] = [(); 2].map(|()| run(&server, "t", &["spin", "60000"], &json!({})));
    server.pause(&own);
    server.pause_tenant("t", true);
    for job in [&own, &other] {
        assert_eq!(server.order(job.id(), "resume").problem(409), "tenant_paused");
    }
    server.order(other.id(), "pause").expect(200);
    server.pause_tenant("t", false);
    for job in [&own, &other] {
        assert_eq!(server.record(job.id())["state"], "paused");
        job.assert_still(&server, Duration::from_millis(50));
    }
    for job in [&own, &other] {
        server.resume(job);
        job.wait_for_cpu(&server, Duration::from_millis(10));
    }
    // looked at and limited anew while the tenant is paused
    server.pause_tenant("t", true);
    let record = server.limit_job(&own, &json!({"pids": 7})).expect(200).json();
    assert_eq!((&record["state"], &record["limits"]["pids"]), (&json!("paused"), &json!(7)));
    assert_eq!(server.stats(&own)["state"], "paused");
    let list = server.get(&format!("/v1/jobs/{}/processes", own.id())).expect(200).json();
    assert_eq!(list["processes"].as_array().unwrap().len(), 2);
    server.patch_json("/v1/tenants/t", &json!({"limits": {"pids": 100, "cpu_cores": 0.5}})).expect(200);
    let begun = Instant::now();
    assert_eq!(server.order(own.id(), "cancel").expect(200).json()["outcome"], json!({"kind": "cancelled"}));
    assert!(begun.elapsed() < at_most(Duration::from_secs(1)), "{:?}", begun.elapsed());
    server.pause_tenant("t", false);
    server.order(other.id(), "cancel").expect(200);
    server.assert_healthy();
}

#[test]
fn a_pause_outlasts_the_server() {
    let server = start_with(PATIENT);
    server.pause_tenant("t", true);
    let server = Server::start_in(server.stop(), PATIENT);
    assert_eq!(server.get("/v1/tenants/t").expect(200).json()["paused"], true);
    let mut request = asked_for(&server);
    server.wait_for_job("t", "queued");
    exits(&server, "other");
    server.pause_tenant("t", false);
    request.answered().expect(200);
    // settings are another matter
    server.tenant("t", &json!({"quota": {"jobs_running": 5}}));
    server.pause_tenant("t", true);
    server.tenant("t", &json!({}));
    server.patch_json("/v1/tenants/t", &json!({"quota": {"jobs_running": 6}})).expect(200);
    assert_eq!(server.get("/v1/tenants/t").expect(200).json()["paused"], true);
    assert_eq!(server.patch_json("/v1/tenants/t", &json!({"paused": false})).problem(400), "malformed_request");
    server.pause_tenant("t", false);
    exits(&server, "t");
}

#[test]
fn a_paused_tenant_can_be_deleted_and_its_name_is_free_of_the_pause() {
    let server = start_with(PATIENT);
    let jobs =
        [&["fork-bomb", "1000"][..], &["hide", "60000"]].map(|words| run(&server, "t", words, &json!({"pids": 64})));
    server.pause_tenant("t", true);
    let mut waiting = asked_for(&server);
    server.wait_for_job("t", "queued");
    let begun = Instant::now();
    server.operator("DELETE", "/v1/tenants/t", &[], b"").expect(204);
    assert!(begun.elapsed() < at_most(Duration::from_secs(5)), "{:?}", begun.elapsed());
    assert!(server.sandboxed().is_empty());
    for job in jobs {
        assert_eq!(job.answer().expect(200).json()["outcome"], json!({"kind": "cancelled"}));
    }
    assert_eq!(waiting.answered().problem(502), "cancelled");
    for what in ["pause", "resume"] {
        assert_eq!(server.operator("POST", &format!("/v1/tenants/t/{what}"), &[], b"").problem(404), "not_found");
    }
    let server = server.with_probe();
    assert_eq!(server.get("/v1/tenants/t").expect(200).json()["paused"], false);
    exits(&server, "t");
    server.assert_healthy();
}

#[test]
fn a_server_with_a_paused_tenant_stops_in_time() {
    let mut server = start_with(&format!("{PATIENT}drain_timeout_ms = 300\n"));
    let _jobs = [&["fork-bomb", "1000"][..], &["spin", "60000"]].map(|words| run(&server, "t", words, &json!({})));
    server.pause_tenant("t", true);
    let begun = Instant::now();
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success(), "{}", server.log());
    assert!(begun.elapsed() < at_most(Duration::from_secs(3)), "{:?}", begun.elapsed());
    server.assert_nothing_left();
    // an idle one at once
    let mut server = start_with(PATIENT);
    server.pause_tenant("t", true);
    let begun = Instant::now();
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success());
    assert!(begun.elapsed() < at_most(Duration::from_secs(1)), "{:?}", begun.elapsed());
    server.assert_nothing_left();
}

#[test] // L4
fn l4_a_tenant_with_a_job_in_the_hands_of_a_device_goes_on_as_a_whole() {
    let server = start_with(PATIENT);
    let disk = Loop::new(8 << 20);
    let rule = json!([{"type": "block", "device": disk.number, "access": "r"}]);
    let slow = json!([{"device": disk.number, "read_bps": 65_536}]);
    server.tenant("t", &json!({"limits": {"devices": rule, "io": slow}}));
    let node = format!("/dev/{}", disk.name());
    let spin = run(&server, "t", &["spin", "60000"], &json!({}));
    let reader = run(&server, "t", &["direct", "read", &node, "262144", "1"], &json!({}));
    wait_until("it waits for its device", || {
        let states = reader.processes(&server).into_iter().filter_map(Process::try_status);
        states.into_iter().any(|status| status["State"].starts_with('D')).then_some(())
    });
    let begun = Instant::now();
    let refused = server.operator("POST", "/v1/tenants/t/pause", &[], b"");
    assert!(begun.elapsed() < at_most(Duration::from_secs(4)), "{:?}", begun.elapsed());
    // a machine that was busy may have let the read end in time
    if refused.status != 200 {
        assert_eq!(refused.problem(409), "not_frozen");
        assert_eq!(server.get("/v1/tenants/t").expect(200).json()["paused"], false);
        spin.wait_for_cpu(&server, Duration::from_millis(20));
        exits(&server, "t");
    }
    server.pause_tenant("t", false);
    assert_eq!(reader.answer().expect(200).json()["outcome"], json!({"kind": "exited", "exit_code": 0}));
    server.order(spin.id(), "cancel").expect(200);
    server.assert_healthy();
}
