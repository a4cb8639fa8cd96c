//! Crowds: two servers on one host, more jobs than there is place for, clients that all go at once, and what hundreds of
//! jobs leave behind.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::inspect::{Process, Running};
use support::raw::Raw;
use support::slowness::at_most;
use support::{PATIENCE, Server, native, wait_until, wasm, wat};

const PROBE: &str = "/v1/tenants/t/plugins/probe/jobs";

/// A server with plugins of both kinds.
fn start_with(config: &str) -> Server {
    let server = Server::start_with(config).with_probe();
    server.upload("t", "echo", &wasm("echo"));
    server
}

/// Begins a job of the probe that runs until its client goes, or waits for its turn to.
fn begin(server: &Server, tenant: &str) -> Raw {
    let path = format!("POST /v1/tenants/{tenant}/plugins/probe/jobs");
    Raw::request(server, &path, &["content-length: 1", "holm-args: [\"count\"]"])
}

/// Lets a job of [`begin`] end, and gives its answer's status.
fn end(mut job: Raw) -> u16 {
    job.send(b"x");
    job.answered().status
}

#[track_caller]
fn wait_for(server: &Server, tenant: &str, state: &str, count: usize) -> Vec<Value> {
    let path = format!("/v1/tenants/{tenant}/jobs?state={state}&limit=1000");
    wait_until(&format!("{count} jobs of {tenant} are {state}"), || {
        let jobs = server.get(&path).expect(200).json()["jobs"].as_array().unwrap().clone();
        (jobs.len() == count).then_some(jobs)
    })
}

/// Waits for an answer that says when to come again, and gives its code and the quota that it names.
#[track_caller]
fn turned_away(mut raw: Raw, status: u16) -> (String, Value) {
    let answer = raw.answered();
    let code = answer.problem(status);
    assert!(answer.header("retry-after").parse::<u32>().unwrap() > 0);
    (code, answer.json()["quota"].clone())
}

/// What a server's crowd of jobs has of the host.
struct Holdings {
    pids: BTreeSet<u32>,
    cgroups: BTreeSet<String>,
    uids: Vec<Range<u32>>,
}

impl Holdings {
    fn of(server: &Server) -> Self {
        let processes: Vec<Process> = server.sandboxed().into_iter().map(Process).collect();
        let numbers = |text: &str| text.split_whitespace().map(|word| word.parse().unwrap()).collect::<Vec<u32>>();
        let maps: BTreeSet<Vec<u32>> = processes.iter().map(|process| numbers(&process.read("uid_map"))).collect();
        let uids: Vec<Range<u32>> = maps.iter().map(|map| map[1]..map[1] + map[2]).collect();
        for process in &processes {
            for uid in numbers(&process.status()["Uid"]) {
                assert!(uids.iter().any(|range| range.contains(&uid)), "{uid} is mapped for no job");
            }
        }
        let cgroups = processes.iter().flat_map(|process| process.cgroups().into_values());
        let cgroups = cgroups.filter(|path| path.contains("/holm-")).collect();
        Self { pids: processes.iter().map(|process| process.0).collect(), cgroups, uids }
    }
}

#[test]
fn two_servers_share_nothing_and_the_end_of_one_is_not_felt_by_the_other() {
    const EACH: usize = 8;
    // what lives is counted from outside, and parked sandboxes come and go
    const UNPARKED: &str = "parked_per_plugin = 0\n";
    let kept = start_with(UNPARKED);
    let crowd = |server: &Server| -> Vec<Running> {
        let long = json!({"wall_time_ms": 600_000});
        let start = |i: usize| Running::start(server, "t", ["probe", "echo"][i % 2], &json!(["count"]), &long);
        (0..EACH).map(start).collect()
    };
    let jobs = crowd(&kept);
    for killed in [false, true] {
        let mut other = start_with(&format!("{UNPARKED}drain_timeout_ms = 100"));
        let others = crowd(&other);
        let (ours, theirs) = (Holdings::of(&kept), Holdings::of(&other));
        assert_eq!((ours.uids.len(), theirs.uids.len()), (EACH, EACH));
        assert!(ours.pids.len() >= EACH && ours.pids.is_disjoint(&theirs.pids));
        assert!(ours.cgroups.len() >= EACH && ours.cgroups.is_disjoint(&theirs.cgroups));
        let mut uids = [&ours.uids[..], &theirs.uids].concat();
        uids.sort_by_key(|range| range.start);
        assert!(uids.is_sorted_by(|one, next| one.end <= next.start), "{uids:?}");

        if killed {
            other.kill();
            wait_until("the other's jobs are gone", || other.cgroups().is_empty().then_some(()));
            drop(others);
        } else {
            other.signal(Signal::SIGTERM);
            for job in others {
                assert_eq!(job.answer().expect(200).json()["outcome"]["kind"], "lost");
            }
            assert!(other.wait().success());
        }
        other.assert_nothing_left();
        assert_eq!(Holdings::of(&kept).pids, ours.pids);
        kept.assert_healthy();
    }
    for mut job in jobs {
        assert!(job.feed(b"x"));
        assert_eq!(job.finish().expect(200).json()["outcome"], json!({"kind": "exited", "exit_code": 0}));
    }
}

#[test]
fn a_server_runs_and_queues_so_many_jobs_and_turns_the_next_away() {
    let server = start_with("jobs_running = 2\njobs_queued = 3");
    let mut jobs: Vec<Raw> = (0..5).map(|_| begin(&server, "t")).collect();
    wait_for(&server, "t", "running", 2);
    wait_for(&server, "t", "queued", 3);
    for _ in 0..3 {
        assert_eq!(turned_away(begin(&server, "t"), 503), ("server_full".to_owned(), Value::Null));
    }
    assert_eq!(server.get("/v1/tenants/t/jobs").json()["jobs"].as_array().unwrap().len(), 5, "who never came in");
    jobs.iter_mut().for_each(|job| job.send(b"x"));
    assert_eq!(jobs.iter_mut().map(|job| job.answered().status).collect::<Vec<_>>(), [200; 5]);
    server.assert_healthy();
}

#[test]
fn a_tenant_s_quotas_turn_its_own_jobs_away_and_nobody_else_s() {
    let server = start_with("queue_timeout_ms = 500");
    server.tenant("t", &json!({"quota": {"jobs_running": 1, "jobs_queued": 2}}));
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    let running = begin(&server, "t");
    wait_for(&server, "t", "running", 1);
    let queued = [begin(&server, "t"), begin(&server, "t")];
    wait_for(&server, "t", "queued", 2);
    assert_eq!(turned_away(begin(&server, "t"), 429), ("quota_exceeded".to_owned(), json!("jobs_queued")));
    let others: Vec<Raw> = (0..3).map(|_| begin(&server, "other")).collect();
    assert_eq!(others.into_iter().map(end).collect::<Vec<_>>(), [200; 3]);
    for raw in queued {
        assert_eq!(turned_away(raw, 429), ("quota_exceeded".to_owned(), json!("jobs_running")), "it waited too long");
    }
    wait_for(&server, "t", "queued", 0);
    assert_eq!(end(running), 200);
    server.assert_healthy();
}

#[test]
fn r1_one_tenant_s_jobs_with_the_most_processes_leave_room_for_others() {
    let server = start_with("queue_timeout_ms = 1000");
    server.tenant("t", &json!({"job_defaults": {"pids": 4096}}));
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    // more than a machine with 32,768 pids has room for
    let greedy: Vec<Raw> = (0..8).map(|_| begin(&server, "t")).collect();
    wait_until("they have all that they can have", || {
        let jobs = server.get("/v1/tenants/t/jobs?state=queued").json();
        jobs["jobs"].as_array().unwrap().iter().any(|job| job["id"].is_string()).then_some(())
    });
    for _ in 0..5 {
        assert_eq!(end(begin(&server, "other")), 200);
    }
    assert_eq!(turned_away(begin(&server, "t"), 429), ("quota_exceeded".to_owned(), json!("pids")));
    drop(greedy);
    wait_for(&server, "t", "finished", 1);
    server.assert_healthy();
}

#[test]
fn r9_an_output_that_nobody_takes_has_its_job_s_place_and_disk_for_no_more_of_them() {
    let server = start_with("queue_timeout_ms = 500");
    server.tenant("t", &json!({"quota": {"jobs_running": 2}}));
    let flood =
        [r#"Holm-Args: ["flood", "stdout", "32"]"#, r#"Holm-Limits: {"output_bytes": 67108864}"#, "content-length: 0"];
    let flood = || Raw::request(&server, &format!("POST {PROBE}"), &flood);
    let mut slow = [flood(), flood()];
    wait_for(&server, "t", "finished", 2);
    assert_eq!(turned_away(flood(), 429), ("quota_exceeded".to_owned(), json!("jobs_running")));
    let bytes: Vec<usize> = slow.iter_mut().map(|raw| raw.answered().expect(200).body.len()).collect();
    assert_eq!(bytes, [32 << 20; 2]);
    assert_eq!(flood().answered().expect(200).body.len(), 32 << 20);
    drop(flood());
    server.assert_healthy();
}

#[test]
fn h2_one_tenant_s_slow_requests_leave_connections_and_disk_for_others() {
    let server = start_with("connections = 100");
    server.tenant("t", &json!({"quota": {"jobs_running": 1, "jobs_queued": 1}}));
    let key = server.key("t");
    let slow = |line: &str| {
        let mut raw = Raw::connect(&server);
        let head = format!("{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 1000\r\n\r\n");
        raw.send(head.as_bytes());
        raw
    };
    let uploads: Vec<Raw> = (0..32).map(|_| slow("PUT /v1/tenants/t/plugins/p")).collect();
    wait_until("all of them are received", || {
        (server.data().join("tmp").read_dir().unwrap().count() == 32).then_some(())
    });
    let put = || slow("PUT /v1/tenants/t/plugins/p");
    assert_eq!(turned_away(put(), 429), ("quota_exceeded".to_owned(), json!("uploads_at_once")));
    // 66 in all: as many as it may have jobs, and 64
    let patches: Vec<Raw> = (0..34).map(|_| slow("PATCH /v1/tenants/t/plugins/probe")).collect();
    wait_until("there is no place left for it", || {
        let answer = server.send(&key, "GET", "/v1/tenants/t", &[], b"");
        (answer.status == 429 && answer.json()["quota"] == "requests_at_once").then_some(())
    });
    assert_eq!(end(begin(&server, "t")), 200, "the operator is nobody's tenant");
    server.assert_healthy();
    drop((uploads, patches));
    wait_until("its places are free again", || {
        (server.send(&key, "GET", "/v1/tenants/t", &[], b"").status == 200).then_some(())
    });
}

#[test]
fn who_waits_too_long_for_a_place_on_a_full_server_is_told_to_come_again() {
    let server = start_with("jobs_running = 1\nqueue_timeout_ms = 300");
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    let running = begin(&server, "t");
    wait_for(&server, "t", "running", 1);
    assert_eq!(turned_away(begin(&server, "other"), 503), ("server_full".to_owned(), Value::Null));
    assert_eq!(end(running), 200);
    assert_eq!(end(begin(&server, "other")), 200);
}

#[test]
fn a_backlog_delays_another_tenant_s_job_by_one_place_at_most() {
    let server = start_with("jobs_running = 1\nqueue_timeout_ms = 120000");
    server.tenant("small", &json!({}));
    server.upload("small", "probe", &native("probe"));
    let first = begin(&server, "t");
    wait_for(&server, "t", "running", 1);
    let mut backlog: Vec<Raw> = (0..50).map(|_| begin(&server, "t")).collect();
    wait_for(&server, "t", "queued", 50);
    let mut small: Vec<Raw> = (0..2).map(|_| begin(&server, "small")).collect();
    wait_for(&server, "small", "queued", 2);
    for raw in backlog.iter_mut().chain(&mut small) {
        raw.send(b"x"); // each ends as soon as it runs
    }
    assert_eq!(end(first), 200);
    for mut raw in backlog.into_iter().chain(small) {
        raw.answered().expect(200);
    }
    let started = |tenant: &str| -> Vec<Timestamp> {
        let jobs = server.get(&format!("/v1/tenants/{tenant}/jobs?limit=100")).json();
        let time = |job: &Value| job["started_at"].as_str().unwrap().parse().unwrap();
        let mut times: Vec<Timestamp> = jobs["jobs"].as_array().unwrap().iter().map(time).collect();
        times.sort();
        times
    };
    let (large, small) = (started("t"), started("small"));
    assert_eq!((large.len(), small.len()), (51, 2));
    // of the backlog, one may run before each of the small tenant's jobs; the first one was there before all
    for (i, time) in small.iter().enumerate() {
        assert!(*time < large[i + 2], "the small tenant's job {i} waited for more than one of the backlog");
    }
}

#[test] // L3, L7
fn l3_twenty_clients_that_hang_up_at_once_take_their_jobs_along_bombs_and_all() {
    let server = start_with("");
    let limits = "holm-limits: {\"pids\": 24}";
    let args = [
        "[\"fork-bomb\", \"5\"]",
        "[\"spin-in-grandchild\", \"60000\"]",
        "[\"hold-output\", \"60000\"]",
        "[\"count\"]",
    ];
    let clients: Vec<Raw> = (0..20)
        .map(|i| {
            let args = format!("holm-args: {}", args[i % 4]);
            Raw::request(&server, &format!("POST {PROBE}"), &["transfer-encoding: chunked", &args, limits])
        })
        .collect();
    wait_until("five bombs have gone off", || (server.sandboxed().len() >= 5 * 25).then_some(()));
    drop(clients);
    let jobs = wait_for(&server, "t", "finished", 20);
    assert!(server.sandboxed().is_empty());
    for job in jobs {
        // those that end at once may have
        assert!(matches!(job["outcome"]["kind"].as_str(), Some("cancelled" | "exited")), "{job}");
        assert!(job["usage"]["pids_peak"].as_u64().unwrap() <= 24);
    }
    server.assert_healthy();
}

/// What a server and its launcher have of the host.
fn figures(server: &Server) -> [(&'static str, usize); 6] {
    let descriptors = |process: Process| fs::read_dir(format!("/proc/{}/fd", process.0)).unwrap().count();
    let (launcher, cgroups) = (server.launcher(), server.cgroups());
    [
        ("descriptors", descriptors(server.process())),
        ("the launcher's descriptors", descriptors(launcher)),
        ("the launcher's mounts", launcher.mounts().len()),
        ("cgroups", cgroups.iter().map(|root| directories(root)).sum()),
        ("sandboxed processes", server.sandboxed().len()),
        ("temporary files", server.data().join("tmp").read_dir().unwrap().count()),
    ]
}

fn directories(root: &Path) -> usize {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    1 + below.map(|entry| directories(&entry.path())).sum::<usize>()
}

#[test]
fn l8_three_hundred_jobs_leave_as_many_descriptors_mounts_and_cgroups_as_before() {
    let server = start_with("");
    let run = |each: usize| {
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let server = &server;
                scope.spawn(move || {
                    for i in 0..each {
                        let (plugin, code) = [("echo", 200), ("probe", 502), ("probe", 200)][(thread + i) % 3];
                        let path = format!("POST /v1/tenants/t/plugins/{plugin}/jobs");
                        let args = format!("holm-args: [\"exit\", \"{}\"]", u8::from(code == 502));
                        let headers = ["content-length: 5", "connection: close", &args];
                        let mut raw = Raw::request(server, &path, &headers);
                        raw.send(b"hello");
                        raw.answered().expect(code);
                    }
                });
            }
        });
    };
    run(5);
    let before = wait_until("the server is at rest", || {
        let figures = figures(&server);
        // a tenant's cgroups linger for a moment
        (figures[3].1 == server.cgroups().len()).then_some(figures)
    });
    run(38);
    let deadline = Instant::now() + at_most(PATIENCE / 2);
    wait_until("as little is there again", || {
        let after = figures(&server);
        let flat = after.iter().zip(&before).all(|(after, before)| after.1 <= before.1);
        assert!(flat || Instant::now() < deadline, "{after:?} after {before:?}");
        flat.then_some(())
    });
    server.assert_healthy();
}

/// A module that writes one letter.
fn letter(letter: char) -> Vec<u8> {
    let data = format!(r#"(data (i32.const 0) "\10\00\00\00\01\00\00\00") (data (i32.const 16) "{letter}")"#);
    wat(&data, "(call $write)").into_bytes()
}

#[test]
fn uploads_of_one_plugin_at_once_leave_one_of_them_whole_and_jobs_meanwhile_run_one_or_the_other() {
    let server = Server::start();
    server.tenant("t", &json!({}));
    let artifacts: Vec<(String, Vec<u8>)> = ['a', 'b', 'c'].map(|c| (c.to_string(), letter(c))).into();
    // what each revision writes
    let revisions: Vec<(Value, &str)> = artifacts
        .iter()
        .map(|(letter, artifact)| (server.upload("t", "p", artifact)["revision"].clone(), letter.as_str()))
        .collect();
    let run = || {
        let record = server.job("t", "p", &json!([]), &json!({}), b"");
        assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
        let writes = revisions.iter().find(|(revision, _)| *revision == record["revision"]).unwrap().1;
        assert_eq!(record["output"], writes);
        record
    };
    std::thread::scope(|scope| {
        let uploads: Vec<_> = artifacts
            .iter()
            .map(|(_, artifact)| {
                scope.spawn(|| {
                    for _ in 0..5 {
                        server.upload("t", "p", artifact);
                    }
                })
            })
            .collect();
        let mut runs = 0;
        while uploads.iter().any(|upload| !upload.is_finished()) {
            run();
            runs += 1;
        }
        assert!(runs > 0);
    });
    let last = server.get("/v1/tenants/t/plugins/p").json()["revision"].clone();
    assert_eq!(run()["revision"], last);
    assert_eq!(server.data().join("artifacts/t").read_dir().unwrap().count(), 1, "the others are gone");
    let server = Server::start_in(server.stop(), "");
    assert_eq!(server.job("t", "p", &json!([]), &json!({}), b"")["revision"], last);
}
