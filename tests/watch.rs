//! Jobs looked at while they run: what they use, and which processes they have.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::inspect::Running;
use support::raw::Raw;
use support::slowness::at_most;
use support::wat::command;
use support::{Server, wait_until};

const MIB: u64 = 1 << 20;

/// Jobs whose input does not end are to run for as long as a busy machine takes.
const PATIENT: &str = "body_grace_ms = 120000\n";

fn start() -> Server {
    Server::start_with(PATIENT).with_probe()
}

fn run(server: &Server, words: &[&str], limits: &Value) -> Running {
    Running::start(server, "t", "probe", &json!(words), limits)
}

fn number(stats: &Value, key: &str) -> u64 {
    stats[key].as_u64().unwrap_or_else(|| panic!("no {key}: {stats}"))
}

/// User and system time.
fn cpu(stats: &Value) -> u64 {
    number(stats, "cpu_user_us") + number(stats, "cpu_system_us")
}

/// Has an obedient job carry out an order, and gives what it uses once that shows.
#[track_caller]
fn tell(server: &Server, job: &mut Running, order: &str, done: impl Fn(&Value) -> bool) -> Value {
    assert!(job.feed(format!("{order}\n").as_bytes()));
    wait_until(&format!("`{order}` shows"), || {
        let stats = server.stats(job);
        done(&stats).then_some(stats)
    })
}

fn processes(server: &Server, id: &str) -> Vec<Value> {
    server.get(&format!("/v1/jobs/{id}/processes")).expect(200).json()["processes"].as_array().unwrap().clone()
}

#[test]
fn what_a_job_uses_shows_while_it_uses_it() {
    let server = start();
    let mut job = run(&server, &["obey"], &json!({"pids": 20}));
    let first = server.stats(&job);
    assert_eq!((&first["id"], &first["state"]), (&job.record["id"], &json!("running")));
    assert_eq!((&first["pids"], &first["input_bytes"], &first["output_bytes"]), (&json!(1), &json!(0), &json!(0)));
    let stats = tell(&server, &mut job, "allocate 40", |stats| number(stats, "memory_bytes") >= 40 * MIB);
    assert!(number(&stats, "memory_peak_bytes") >= 40 * MIB, "{stats}");
    let stats = tell(&server, &mut job, "free", |stats| number(stats, "memory_bytes") < 20 * MIB);
    assert!(number(&stats, "memory_peak_bytes") >= 40 * MIB, "{stats}");
    let stats = tell(&server, &mut job, "fork 6", |stats| stats["pids"] == 7);
    assert_eq!(stats["pids_peak"], 7);
    let before = cpu(&stats);
    tell(&server, &mut job, "burn 200", |stats| cpu(stats) >= before + 200_000);
    let stats = tell(&server, &mut job, "write 12345", |stats| stats["output_bytes"] == 12_345);
    assert!(number(&stats, "input_bytes") > 30, "{stats}");
    assert!(number(&stats, "wall_us") > 200_000 && number(&stats, "launch_us") > 0, "{stats}");
    for absent in ["fuel_used", "io_read_bytes", "paused_us", "outcome"] {
        assert!(stats.get(absent).is_none(), "{absent}: {stats}");
    }
    let id = job.id().to_owned();
    let record = job.finish().expect(200).json();
    let last = server.get(&format!("/v1/jobs/{id}/stats")).expect(200).json();
    assert_eq!(last["state"], "finished");
    for (key, value) in record["usage"].as_object().unwrap() {
        assert_eq!(last[key], *value, "{key}");
    }
    for absent in ["memory_bytes", "pids", "pressure"] {
        assert!(last.get(absent).is_none(), "{absent}: {last}");
    }
    server.assert_healthy();
}

#[test]
fn a_job_in_line_uses_nothing_yet() {
    let server = Server::start_with(&format!("{PATIENT}jobs_running = 1\n")).with_probe();
    let running = run(&server, &["report-and-wait"], &json!({}));
    let headers = ["content-length: 0", "holm-args: [\"exit\", \"0\"]"];
    let mut queued = Raw::request(&server, "POST /v1/tenants/t/plugins/probe/jobs", &headers);
    let id = server.wait_for_job("t", "queued")["id"].as_str().unwrap().to_owned();
    let stats = server.get(&format!("/v1/jobs/{id}/stats")).expect(200).json();
    assert_eq!((&stats["state"], &stats["wall_us"]), (&json!("queued"), &json!(0)));
    for absent in ["cpu_user_us", "memory_bytes", "pids", "pressure"] {
        assert!(stats.get(absent).is_none(), "{absent}: {stats}");
    }
    assert!(processes(&server, &id).is_empty());
    running.finish().expect(200);
    queued.answered().expect(200);
}

#[test]
fn waiting_for_the_cpu_shows_as_pressure_where_the_kernel_tells_it() {
    let server = start();
    let job = run(&server, &["spin-threads", "4", "60000"], &json!({"cpu_cores": 1}));
    job.wait_for_cpu(&server, Duration::from_millis(300));
    let stats = server.stats(&job);
    let v2 = job.record["isolation"]["cgroups"].get("unified").is_some();
    let doctor = Command::new(env!("CARGO_BIN_EXE_holm")).args(["doctor", "--json"]).output().unwrap();
    let doctor: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let check = |name: &str| {
        doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap()["status"].clone()
    };
    let told = Path::new("/proc/pressure/cpu").exists() && v2;
    assert_eq!(check("pressure") == "ok", told, "{doctor}");
    assert_eq!(check("freezer") == "ok", v2, "{doctor}");
    if told {
        let pressure = wait_until("it waits for its turn", || {
            let pressure = server.stats(&job)["pressure"].clone();
            (number(&pressure["cpu"]["some"], "total_us") > 100_000).then_some(pressure)
        });
        for resource in ["cpu", "memory", "io"] {
            let some = &pressure[resource]["some"];
            for key in ["avg10", "avg60", "avg300"] {
                assert!((0.0..=100.0).contains(&some[key].as_f64().unwrap()), "{resource} {key}: {pressure}");
            }
        }
        assert_eq!(pressure["io"]["some"]["total_us"], 0, "it has no device");
    } else {
        assert!(stats.get("pressure").is_none(), "{stats}");
    }
    server.order(job.id(), "cancel").expect(200);
}

#[test]
fn the_processes_of_a_job_are_told_as_it_sees_them_and_to_the_operator_as_the_host_does() {
    let server = start();
    let own = server.key("t");
    let neighbour = run(&server, &["hide", "60000"], &json!({"pids": 20}));
    let mut job = run(&server, &["obey"], &json!({"pids": 20}));
    assert!(job.feed(b"fork 3\n"));
    let found = wait_until("they are there", || {
        let found = processes(&server, job.id());
        (found.len() == 5).then_some(found)
    });
    let pids: Vec<u64> = found.iter().map(|process| number(process, "pid")).collect();
    assert_eq!(pids[..2], [1, 2], "the init and the job: {found:?}");
    assert_eq!((&found[0]["command"], &found[1]["command"]), (&json!("holm-init"), &json!("probe")));
    assert!(found.iter().all(|process| process["threads"] == 1), "{found:?}");
    let seen: Vec<(u64, u64)> = job.processes(&server).iter().map(|p| (p.inside_pid().into(), p.0.into())).collect();
    let told: Vec<(u64, u64)> = found.iter().map(|p| (number(p, "pid"), number(p, "host_pid"))).collect();
    assert_eq!(told, seen);

    let path = format!("/v1/jobs/{}/processes", job.id());
    let to_tenant = server.send(&own, "GET", &path, &[], b"").expect(200).json();
    assert!(!to_tenant.to_string().contains("host_pid"), "{to_tenant}");
    let inside: Vec<u64> = to_tenant["processes"].as_array().unwrap().iter().map(|p| number(p, "pid")).collect();
    assert_eq!(inside, pids);
    server.tenant("other", &json!({}));
    let other = server.key("other");
    for what in ["processes", "stats"] {
        let path = format!("/v1/jobs/{}/{what}", job.id());
        assert_eq!(server.send(&other, "GET", &path, &[], b"").problem(404), "not_found");
        assert_eq!(server.send("", "GET", &path, &[], b"").problem(401), "unauthenticated");
    }
    let id = job.id().to_owned();
    job.finish().expect(200);
    assert!(processes(&server, &id).is_empty());
    server.order(neighbour.id(), "cancel").expect(200);
    server.assert_healthy();
}

#[test]
fn states_and_names_are_those_that_the_processes_have() {
    let server = start();
    server.upload("t", "guest", command(&[], "", "(loop $l (br $l))").as_bytes());
    let word = |job: &Running, command: &str, state: &str| {
        wait_until(&format!("`{command}` is {state}"), || {
            let found = processes(&server, job.id());
            found.iter().any(|process| process["command"] == command && process["state"] == state).then_some(())
        });
    };
    let spins = run(&server, &["spin", "60000"], &json!({}));
    word(&spins, "probe", "running");
    word(&spins, "holm-init", "sleeping");
    let stopped = run(&server, &["signal", "19"], &json!({}));
    word(&stopped, "probe", "stopped");
    let odd = run(&server, &["odd-name"], &json!({}));
    // 15 bytes at most, as the kernel escapes them, and what is no text replaced
    word(&odd, "a b\\n\\\\\u{fffd}\"\u{1b}c", "sleeping");
    let threads = run(&server, &["spin-threads", "3", "60000"], &json!({}));
    wait_until("it has its threads", || {
        processes(&server, threads.id()).iter().any(|process| process["threads"] == 4).then_some(())
    });
    let guest = Running::start(&server, "t", "guest", &json!([]), &json!({}));
    let found = processes(&server, guest.id());
    assert_eq!((found.len(), &found[0]["pid"], &found[0]["command"]), (1, &json!(1), &json!("holm-wasm")));
    for job in [spins, stopped, odd, threads, guest] {
        server.order(job.id(), "cancel").expect(200);
    }
    server.assert_healthy();
}

#[test]
fn a_thousand_processes_are_told_and_hold_nobody_up() {
    // on a slow machine as many as take it about as long
    let many = 1000 / usize::try_from(at_most(Duration::from_secs(1)).as_secs()).unwrap();
    let server = start();
    let mut job = run(&server, &["obey"], &json!({"pids": many + 1, "memory_bytes": 512 * MIB}));
    assert!(job.feed(format!("fork {many}\n").as_bytes()));
    wait_until("they are there", || (server.stats(&job)["pids"] == many + 1).then_some(()));
    std::thread::scope(|scope| {
        let lists = [(); 3].map(|()| scope.spawn(|| processes(&server, job.id())));
        let begun = Instant::now();
        for _ in 0..5 {
            assert_eq!(server.probe(&["exit", "0"], &json!({}))["outcome"]["kind"], "exited");
        }
        assert!(begun.elapsed() < at_most(Duration::from_secs(5)), "others waited {:?}", begun.elapsed());
        for list in lists.map(|list| list.join().unwrap()) {
            let mut pids: Vec<u64> = list.iter().map(|process| number(process, "pid")).collect();
            pids.dedup();
            assert_eq!(pids.len(), many + 2, "the init, the job, its children");
        }
    });
    server.order(job.id(), "cancel").expect(200);
    server.assert_healthy();
}
