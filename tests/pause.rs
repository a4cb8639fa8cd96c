//! Jobs that are paused and resumed: nothing of them runs meanwhile, their clock stands, and nothing of them is lost.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::inspect::Running;
use support::loops::Loop;
use support::raw::Raw;
use support::slowness::at_most;
use support::wat::command;
use support::{Server, native, wait_until, wasm};

/// Jobs whose input does not end are to run for as long as a busy machine takes. Without parked sandboxes: what lives is
/// counted from outside.
const PATIENT: &str = "body_grace_ms = 120000\nparked_per_plugin = 0\n";

fn start() -> Server {
    Server::start_with(PATIENT).with_probe()
}

fn run(server: &Server, words: &[&str], limits: &Value) -> Running {
    Running::start(server, "t", "probe", &json!(words), limits)
}

fn states(server: &Server, state: &str) -> usize {
    server.get(&format!("/v1/tenants/t/jobs?state={state}")).expect(200).json()["jobs"].as_array().unwrap().len()
}

#[test]
fn a_paused_job_uses_no_cpu_and_its_wall_clock_stands() {
    let server = start();
    server.upload("t", "loop", command(&[], "", "(loop $l (br $l))").as_bytes());
    let native = run(&server, &["spin", "60000"], &json!({}));
    let wasm = Running::start(&server, "t", "loop", &json!([]), &json!({}));
    for job in [&native, &wasm] {
        job.wait_for_cpu(&server, Duration::from_millis(20));
        let record = server.pause(job);
        assert_eq!(record["outcome"], Value::Null, "{record}");
        server.limit_wall_time(job, Duration::from_millis(500));
    }
    assert_eq!((states(&server, "paused"), states(&server, "running")), (2, 0));
    // longer than they may run
    for job in [&native, &wasm] {
        let before = server.stats(job);
        job.assert_still(&server, Duration::from_millis(1000));
        let after = server.stats(job);
        assert_eq!((&after["state"], &after["wall_us"]), (&json!("paused"), &before["wall_us"]));
    }
    for job in [native, wasm] {
        server.resume(&job);
        let record = job.answer().expect(200).json();
        assert_eq!(record["outcome"]["limit"], "wall_time_ms", "{record}");
        let (wall, paused) =
            (record["usage"]["wall_us"].as_u64().unwrap(), record["usage"]["paused_us"].as_u64().unwrap());
        let allowed = record["limits"]["wall_time_ms"].as_u64().unwrap() * 1000;
        assert!(wall >= allowed && paused >= 1_000_000, "{record}");
        let time = |key: &str| record[key].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
        let whole = time("finished_at").as_microsecond() - time("started_at").as_microsecond();
        assert!(whole.unsigned_abs() + 200_000 >= wall + paused, "{record}");
    }
    server.assert_healthy();
}

#[test]
fn sockets_files_and_streams_are_whole_after_a_pause() {
    let server = start();
    // it ends by its own clock, which goes on
    let talk = run(&server, &["converse", "2600"], &json!({}));
    let mut cat = run(&server, &["cat"], &json!({}));
    let text: Vec<u8> = (0..=250_u8).cycle().take(200_000).collect();
    assert!(cat.feed(&text[..1000]));
    for job in [&talk, &cat] {
        server.pause(job);
    }
    // that of its limit would not let it
    server.limit_wall_time(&talk, Duration::from_millis(2000));
    // more than a pipe holds
    assert!(cat.feed(&text[1000..]));
    std::thread::sleep(Duration::from_millis(2200));
    for job in [&talk, &cat] {
        server.resume(job);
    }
    let record = talk.finish().expect(200).json();
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
    let said: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
    assert_eq!((&said["in_order"], &said["kept"]), (&json!(true), &json!(true)), "{said}");
    assert!(said["rounds"].as_u64().unwrap() > 1, "{said}");
    let answer = cat.finish().expect(200).json();
    let output =
        base64::Engine::decode(&base64::engine::general_purpose::STANDARD, answer["output_base64"].as_str().unwrap());
    assert!(output.unwrap() == text);
    server.assert_healthy();
}

#[test]
fn pausing_and_resuming_again_changes_nothing() {
    let server = start();
    let job = run(&server, &["report-and-wait"], &json!({}));
    for _ in 0..3 {
        server.resume(&job);
    }
    for _ in 0..2 {
        let first = server.pause(&job);
        assert_eq!(server.pause(&job), first);
        server.resume(&job);
        server.resume(&job);
    }
    let record = job.finish().expect(200).json();
    assert_eq!(record["outcome"]["kind"], "exited");
    server.assert_healthy();
}

#[test] // L4
fn l4_whatever_a_job_does_it_can_be_paused_and_killed_while_it_is() {
    let server = start();
    server.upload("t", "loop", command(&[], "", "(loop $l (br $l))").as_bytes());
    let many = json!({"pids": 64, "cpu_cores": 2, "memory_bytes": 268_435_456_u64});
    let jobs: [(&str, &[&str]); 7] = [
        ("probe", &["fork-bomb", "1000"]),
        ("probe", &["orphans", "1000000"]),
        ("probe", &["park-in-vfork", "60000"]),
        ("probe", &["signal", "19"]),
        ("probe", &["hide", "60000"]),
        ("probe", &["spin-threads", "16", "60000"]),
        ("loop", &[]),
    ];
    let mut worst = Duration::ZERO;
    for (plugin, words) in jobs {
        for _ in 0..3 {
            let job = Running::start(&server, "t", plugin, &json!(words), &many);
            match words.first() {
                Some(&"signal") => wait_until("it has stopped", || {
                    job.processes(&server)
                        .iter()
                        .any(|p| p.try_status().is_some_and(|s| s["State"].starts_with('T')))
                        .then_some(())
                }),
                Some(&"park-in-vfork") => {
                    wait_until("it is parked", || (!job.named(&server, "child").is_empty()).then_some(()));
                }
                _ => job.wait_for_cpu(&server, Duration::from_millis(15)),
            }
            server.pause(&job);
            job.assert_still(&server, Duration::from_millis(100));
            let begun = Instant::now();
            let record = server.order(job.id(), "cancel").expect(200).json();
            worst = worst.max(begun.elapsed());
            assert!(begun.elapsed() < at_most(Duration::from_secs(1)), "{words:?}: {:?}", begun.elapsed());
            assert!(server.sandboxed().is_empty(), "{words:?}: when it is answered, all are dead");
            assert_eq!(record["outcome"], json!({"kind": "cancelled"}), "{words:?}");
            assert_eq!(job.answer().expect(200).json()["outcome"], record["outcome"], "{words:?}");
        }
    }
    println!("a paused job is gone {worst:?} after its cancel at worst");
    server.assert_healthy();
}

#[test]
fn stopped_and_parked_processes_are_so_again_after_a_pause() {
    let server = start();
    let job = run(&server, &["park-in-vfork", "3000"], &json!({"pids": 8}));
    wait_until("it is parked", || (!job.named(&server, "child").is_empty()).then_some(()));
    server.pause(&job);
    job.assert_still(&server, Duration::from_millis(200));
    server.resume(&job);
    let record = job.answer().expect(200).json();
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");

    let stopped = run(&server, &["signal", "19"], &json!({"wall_time_ms": 3000}));
    let is_stopped = || {
        stopped
            .processes(&server)
            .iter()
            .any(|process| process.try_status().is_some_and(|s| s["State"].starts_with('T')))
    };
    wait_until("it has stopped", || is_stopped().then_some(()));
    server.pause(&stopped);
    server.resume(&stopped);
    wait_until("it is stopped", || is_stopped().then_some(()));
    assert_eq!(stopped.answer().expect(200).json()["outcome"]["limit"], "wall_time_ms");
    server.assert_healthy();
}

#[test] // L4
fn l4_a_job_in_the_hands_of_a_device_is_not_paused_and_goes_on() {
    let server = start();
    let disk = Loop::new(8 << 20);
    let rule = json!([{"type": "block", "device": disk.number, "access": "r"}]);
    // one read takes some four seconds, in which nothing can interrupt it
    let slow = json!([{"device": disk.number, "read_bps": 65_536}]);
    server.tenant("t", &json!({"limits": {"devices": rule, "io": slow}}));
    let node = format!("/dev/{}", disk.name());
    let job = run(&server, &["direct", "read", &node, "262144", "1"], &json!({}));
    let waits = |job: &Running| {
        job.processes(&server).iter().any(|process| process.try_status().is_some_and(|s| s["State"].starts_with('D')))
    };
    wait_until("it waits for its device", || waits(&job).then_some(()));
    let begun = Instant::now();
    let refused = server.order(job.id(), "pause");
    let took = begun.elapsed();
    // a machine that was busy may have let the read end in time
    if refused.status != 200 {
        assert_eq!(refused.problem(409), "not_frozen");
        assert_eq!(refused.header("retry-after"), "1");
        assert!(took < at_most(Duration::from_secs(4)), "{took:?}");
        assert_eq!(server.record(job.id())["state"], "running", "it goes on");
        println!("given up after {took:?}");
    } else {
        server.resume(&job);
    }
    let record = job.answer().expect(200).json();
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
    server.assert_healthy();
}

#[test]
fn a_job_that_has_not_begun_or_is_over_cannot_be_paused() {
    let server = Server::start_with(&format!("{PATIENT}jobs_running = 1\n")).with_probe();
    let running = run(&server, &["report-and-wait"], &json!({}));
    let mut queued = Raw::request(
        &server,
        "POST /v1/tenants/t/plugins/probe/jobs",
        &["content-length: 0", "holm-args: [\"exit\", \"0\"]"],
    );
    let id = server.wait_for_job("t", "queued")["id"].as_str().unwrap().to_owned();
    for what in ["pause", "resume"] {
        assert_eq!(server.order(&id, what).problem(409), "job_not_begun", "{what}");
    }
    let finished = running.id().to_owned();
    server.pause(&running);
    // its place is its own, whether or not it runs
    assert_eq!(server.record(&id)["state"], "queued");
    server.resume(&running);
    running.finish().expect(200);
    queued.answered().expect(200);
    for id in [&finished, &id] {
        for what in ["pause", "resume"] {
            assert_eq!(server.order(id, what).problem(409), "job_finished", "{what}");
        }
    }
}

#[test]
fn a_tenant_pauses_its_own_jobs_and_sees_no_other_s() {
    let server = start();
    let own = server.key("t");
    server.tenant("other", &json!({}));
    let other = server.key("other");
    let job = run(&server, &["report-and-wait"], &json!({}));
    let path = |what: &str| format!("/v1/jobs/{}/{what}", job.id());
    for what in ["pause", "resume"] {
        assert_eq!(server.send(&other, "POST", &path(what), &[], b"").problem(404), "not_found");
        assert_eq!(server.send("", "POST", &path(what), &[], b"").problem(401), "unauthenticated");
        let record = server.send(&own, "POST", &path(what), &[], b"").expect(200).json();
        assert!(record["isolation"].get("cgroups").is_none(), "{record}");
    }
    for (key, word) in [(&own, "operator_only"), (&other, "not_found")] {
        for what in ["pause", "resume"] {
            let answer = server.send(key, "POST", &format!("/v1/tenants/t/{what}"), &[], b"");
            assert_eq!(answer.problem(if key == &own { 403 } else { 404 }), word);
        }
    }
    job.finish().expect(200);
}

#[test]
fn paused_jobs_end_with_their_client_their_plugin_and_the_server() {
    let mut server = Server::start_with(&format!("{PATIENT}drain_timeout_ms = 300\n")).with_probe();
    server.upload("t", "other", &native("probe"));
    server.upload("t", "echo", &wasm("echo"));
    let client = run(&server, &["spin", "60000"], &json!({}));
    server.pause(&client);
    let id = client.id().to_owned();
    drop(client);
    assert_eq!(server.over(&id)["outcome"], json!({"kind": "cancelled"}));

    let plugin = Running::start(&server, "t", "other", &json!(["spin", "60000"]), &json!({}));
    server.pause(&plugin);
    server.operator("DELETE", "/v1/tenants/t/plugins/other", &[], b"").expect(204);
    assert_eq!(plugin.answer().expect(200).json()["outcome"], json!({"kind": "cancelled"}));
    assert!(server.sandboxed().is_empty());

    let jobs = [
        run(&server, &["fork-bomb", "1000"], &json!({})),
        Running::start(&server, "t", "echo", &json!([]), &json!({})),
    ];
    for job in &jobs {
        server.pause(job);
    }
    let begun = Instant::now();
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success(), "{}", server.log());
    assert!(begun.elapsed() < at_most(Duration::from_secs(3)), "{:?}", begun.elapsed());
    server.assert_nothing_left();
}

#[test]
fn the_launcher_s_death_takes_paused_jobs_along() {
    let mut server = start();
    let job = run(&server, &["spin", "60000"], &json!({}));
    server.pause(&job);
    let pids = job.processes(&server);
    server.launcher().signal(Signal::SIGKILL);
    assert!(!server.wait().success());
    wait_until("its processes are gone", || pids.iter().all(|process| !process.lives()).then_some(()));
    wait_until("no cgroup is left", || server.cgroups().is_empty().then_some(()));
}
