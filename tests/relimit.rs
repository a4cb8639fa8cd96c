//! Limits of jobs that run, changed by PATCH: felt from inside at once, or refused by name.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::inspect::Running;
use support::raw::Raw;
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

/// Changes limits of a job, which must go on.
#[track_caller]
fn limit(server: &Server, job: &Running, limits: &Value) -> Value {
    let record = server.limit_job(job, limits).expect(200).json();
    assert_eq!(record["state"], "running", "{record}");
    for (key, value) in limits.as_object().unwrap() {
        assert!(value.is_null() || record["limits"][key] == *value, "{key}: {record}");
    }
    assert_eq!(server.record(job.id())["limits"], record["limits"]);
    record
}

/// Changes a limit to what the job has passed already, which ends it.
#[track_caller]
fn end_by(server: &Server, job: Running, key: &str, value: u64) -> Value {
    let record = server.limit_job(&job, &json!({ key: value })).expect(200).json();
    assert_eq!(record["state"], "finished", "{record}");
    let outcome = &record["outcome"];
    assert_eq!((&outcome["kind"], &outcome["limit"]), (&json!("over_limit"), &json!(key)), "{record}");
    assert_eq!((&outcome["allowed"], &record["limits"][key]), (&json!(value), &json!(value)), "{record}");
    assert!(outcome["reached"].as_u64().unwrap() >= value, "{record}");
    assert_eq!(server.record(job.id()), record);
    let answer = job.answer();
    if answer.status == 200 {
        assert_eq!(answer.json()["outcome"], *outcome);
    }
    record
}

/// Has an obedient job carry out an order, and waits until it has.
#[track_caller]
fn tell(server: &Server, job: &mut Running, order: &str, done: impl Fn(&Value) -> bool) {
    assert!(job.feed(format!("{order}\n").as_bytes()));
    let mut stats = Value::Null;
    wait_until(&format!("`{order}` is done: {stats}"), || {
        stats = server.stats(job);
        done(&stats).then_some(())
    });
}

#[track_caller]
fn said(record: &Value) -> Value {
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
    serde_json::from_str(record["output"].as_str().unwrap().trim_start_matches('x')).unwrap()
}

fn number(stats: &Value, key: &str) -> u64 {
    stats[key].as_u64().unwrap_or_else(|| panic!("no {key}: {stats}"))
}

#[test]
fn cpu_cores_hold_from_the_next_period_on() {
    let server = start();
    let job =
        run(&server, &["spin", "60000"], &json!({"cpu_cores": 1, "cpu_time_ms": 600_000, "wall_time_ms": 600_000}));
    let rate = |cores: f64| {
        limit(&server, &job, &json!({"cpu_cores": if cores < 1.0 { json!(cores) } else { json!(1) }}));
        std::thread::sleep(Duration::from_millis(200)); // what is left of a period that began before
        let (begun, before) = (Instant::now(), job.cpu_time(&server));
        job.wait_for_cpu(&server, Duration::from_secs_f64(cores.min(0.5)));
        (job.cpu_time(&server) - before).as_secs_f64() / begun.elapsed().as_secs_f64()
    };
    let (half, tenth) = (rate(0.5), rate(0.1));
    // a busy machine may give less, and never gives more; a period may be had ahead
    assert!(half < 0.6 && tenth < 0.2, "{half} {tenth}");
    let throttled = number(&server.stats(&job), "cpu_throttled_us");
    assert!(throttled > 100_000, "{throttled}");
    // more than it could have if it were still held to what it was cut to
    wait_until("it has more again", || (rate(1.0) > 0.25).then_some(()));
    server.order(job.id(), "cancel").expect(200);
    server.assert_healthy();
}

#[test]
fn pids_hold_for_the_next_fork() {
    let server = start();
    let mut job = run(&server, &["obey"], &json!({"pids": 10}));
    // what it writes after an order shows that it has carried it out
    let forks = |job: &mut Running, order: &str, written: u64| {
        tell(&server, job, order, |_| true);
        tell(&server, job, "write 1", |stats| stats["output_bytes"] == written);
        server.stats(job)["pids"].clone()
    };
    assert_eq!(forks(&mut job, "fork 100", 1), 10);
    limit(&server, &job, &json!({"pids": 25}));
    assert_eq!(forks(&mut job, "fork 100", 2), 25);
    // those that are there stay; no more are made until there are fewer
    limit(&server, &job, &json!({"pids": 5}));
    assert_eq!(forks(&mut job, "fork 3", 3), 25);
    let record = job.finish().expect(200).json();
    assert_eq!(said(&record), json!([9, true, 15, true, 0, true]));
    assert_eq!(record["usage"]["pids_peak"], 25, "{record}");
    server.assert_healthy();
}

#[test]
fn memory_can_be_raised_and_lowered_as_far_as_it_is_not_in_use() {
    let server = start();
    let mut job = run(&server, &["obey"], &json!({"memory_bytes": 32 * MIB}));
    tell(&server, &mut job, "allocate 16", |stats| number(stats, "memory_bytes") >= 16 * MIB);
    limit(&server, &job, &json!({"memory_bytes": 128 * MIB}));
    tell(&server, &mut job, "allocate 64", |stats| number(stats, "memory_bytes") >= 80 * MIB);
    limit(&server, &job, &json!({"memory_bytes": 96 * MIB}));
    tell(&server, &mut job, "free", |stats| number(stats, "memory_bytes") < 40 * MIB);
    limit(&server, &job, &json!({"memory_bytes": 48 * MIB}));
    job.feed(b"allocate 64\n");
    let record = job.answer().expect(200).json();
    let outcome = &record["outcome"];
    assert_eq!((&outcome["limit"], &outcome["allowed"]), (&json!("memory_bytes"), &json!(48 * MIB)), "{record}");

    for paused in [false, true] {
        let mut job = run(&server, &["obey"], &json!({"memory_bytes": 128 * MIB}));
        tell(&server, &mut job, "allocate 64", |stats| number(stats, "memory_bytes") >= 64 * MIB);
        if paused {
            server.pause(&job);
        }
        end_by(&server, job, "memory_bytes", 32 * MIB);
    }
    server.assert_healthy();
}

#[test]
fn times_are_those_of_the_whole_job() {
    let server = start();
    // raised before they are over
    let job = run(&server, &["burn", "900"], &json!({"cpu_time_ms": 600, "cpu_cores": 0.5}));
    limit(&server, &job, &json!({"cpu_time_ms": 60_000}));
    let record = job.finish().expect(200).json();
    assert_eq!(record["outcome"]["kind"], "exited", "{record}");
    let job = run(&server, &["sleep", "5500"], &json!({"wall_time_ms": 5000}));
    limit(&server, &job, &json!({"wall_time_ms": 60_000}));
    let record = job.finish().expect(200).json();
    assert_eq!(record["outcome"]["kind"], "exited", "{record}");
    assert!(record["usage"]["wall_us"].as_u64().unwrap() > 5_000_000, "{record}");
    // lowered to what is over
    let job = run(&server, &["spin", "60000"], &json!({}));
    job.wait_for_cpu(&server, Duration::from_millis(100));
    end_by(&server, job, "cpu_time_ms", 50);
    let job = run(&server, &["sleep", "60000"], &json!({}));
    wait_until("it has run for a while", || (number(&server.stats(&job), "wall_us") > 200_000).then_some(()));
    end_by(&server, job, "wall_time_ms", 100);
    // lowered to what is still to come
    let job = run(&server, &["sleep", "60000"], &json!({}));
    limit(&server, &job, &json!({"wall_time_ms": 1500}));
    let record = job.answer().expect(200).json();
    assert_eq!(record["outcome"]["limit"], "wall_time_ms", "{record}");
    assert!(record["usage"]["wall_us"].as_u64().unwrap() >= 1_500_000, "{record}");
    // of a paused job, when it goes on: it stands still until then
    let job = run(&server, &["sleep", "60000"], &json!({}));
    wait_until("it has run for a while", || (number(&server.stats(&job), "wall_us") > 200_000).then_some(()));
    server.pause(&job);
    assert_eq!(server.limit_job(&job, &json!({"wall_time_ms": 100})).expect(200).json()["state"], "paused");
    server.order(job.id(), "resume");
    assert_eq!(job.answer().expect(200).json()["outcome"]["limit"], "wall_time_ms");
    server.assert_healthy();
}

#[test]
fn streams_are_counted_from_their_beginning() {
    let server = start();
    let mut job = run(&server, &["obey"], &json!({"output_bytes": 1000}));
    tell(&server, &mut job, "write 900", |stats| stats["output_bytes"] == 900);
    limit(&server, &job, &json!({"output_bytes": 1_000_000}));
    tell(&server, &mut job, "write 400000", |stats| stats["output_bytes"] == 400_900);
    let record = job.finish().expect(200).json();
    assert_eq!(said(&record), json!([true, true]));

    let mut job = run(&server, &["obey"], &json!({}));
    tell(&server, &mut job, "write 5000", |stats| stats["output_bytes"] == 5000);
    limit(&server, &job, &json!({"output_bytes": 6000}));
    job.feed(b"write 2000\n");
    let record = job.answer().expect(200).json();
    assert_eq!((&record["outcome"]["limit"], &record["outcome"]["allowed"]), (&json!("output_bytes"), &json!(6000)));

    let mut job = run(&server, &["obey"], &json!({}));
    tell(&server, &mut job, "write 5000", |stats| stats["output_bytes"] == 5000);
    end_by(&server, job, "output_bytes", 4000);

    let mut job = run(&server, &["count"], &json!({"input_bytes": 1000}));
    job.feed(&[b'x'; 900]);
    limit(&server, &job, &json!({"input_bytes": 2000}));
    job.feed(&[b'x'; 900]);
    assert_eq!(job.finish().expect(200).json()["output"], "1800\n");

    let mut job = run(&server, &["count"], &json!({}));
    job.feed(&[b'x'; 900]);
    wait_until("it has come", || (server.stats(&job)["input_bytes"] == 900).then_some(()));
    end_by(&server, job, "input_bytes", 500);
    server.assert_healthy();
}

#[test]
fn null_puts_back_what_holds_without_the_request_s_own() {
    let server = start();
    server.patch_json("/v1/tenants/t", &json!({"job_defaults": {"pids": 33}})).expect(200);
    let job = run(&server, &["report-and-wait"], &json!({"pids": 7, "memory_bytes": 64 * MIB}));
    assert_eq!(limit(&server, &job, &json!({"pids": 5, "cpu_weight": 7}))["limits"]["pids"], 5);
    let record = limit(&server, &job, &json!({"pids": null, "memory_bytes": null, "cpu_weight": null}));
    let limits = &record["limits"];
    assert_eq!((&limits["pids"], &limits["memory_bytes"]), (&json!(33), &json!(128 * MIB)), "{limits}");
    assert_eq!(limits["cpu_weight"], 100);
    // nothing asked for, nothing changed
    for nothing in [json!({}), json!({"limits": {}}), json!({"limits": null})] {
        let answer = server.patch_json(&format!("/v1/jobs/{}", job.id()), &nothing).expect(200).json();
        assert_eq!(answer["limits"], *limits, "{nothing}");
    }
    assert_eq!(limit(&server, &job, limits)["limits"], *limits, "all of them said again");
    job.finish().expect(200);
}

#[test]
fn what_cannot_be_is_refused_by_name_and_leaves_everything_as_it_was() {
    let server = start();
    server.patch_json("/v1/tenants/t", &json!({"job_maximums": {"pids": 100}})).expect(200);
    let job = run(&server, &["report-and-wait"], &json!({}));
    server.upload("t", "guest", command(&["fd_read"], "", "(loop $l (br $l))").as_bytes());
    let guest = Running::start(&server, "t", "guest", &json!([]), &json!({"memory_bytes": 64 * MIB}));
    let before = [&job, &guest].map(|job| server.record(job.id())["limits"].clone());
    let cpus = std::thread::available_parallelism().unwrap().get();
    for (job, limits, limit, minimum, maximum) in [
        (&job, json!({"pids": 0}), "pids", json!(1), json!(100)),
        (&job, json!({"pids": 101, "cpu_weight": 3}), "pids", json!(1), json!(100)),
        (&job, json!({"cpu_weight": 3, "memory_bytes": 1}), "memory_bytes", json!(4 * MIB), json!(4096 * MIB)),
        (&job, json!({"cpu_cores": cpus + 1}), "cpu_cores", json!(0.01), json!(cpus)),
        (&job, json!({"wall_time_ms": -1}), "wall_time_ms", json!(10), json!(3_600_000)),
        (&job, json!({"output_bytes": 1e300}), "output_bytes", json!(1), json!(256 * MIB)),
        (&guest, json!({"memory_bytes": 8 * MIB}), "memory_bytes", json!(16 * MIB), json!(4096 * MIB)),
        // the guest's own memory is bounded from within by what held at the start
        (&guest, json!({"memory_bytes": 65 * MIB}), "memory_bytes", json!(16 * MIB), json!(64 * MIB)),
    ] {
        let answer = server.limit_job(job, &limits);
        assert_eq!(answer.problem(422), "limit_out_of_range", "{limits}");
        let problem = answer.json();
        assert_eq!((&problem["limit"], &problem["given"]), (&json!(limit), &limits[limit]), "{problem}");
        assert_eq!((&problem["minimum"], &problem["maximum"]), (&minimum, &maximum), "{problem}");
    }
    for (job, limit, value) in [
        (&job, "scratch_bytes", json!(8 * MIB)),
        (&job, "scratch_inodes", json!(17)),
        (&job, "open_files", json!(17)),
        (&job, "stack_bytes", json!(MIB)),
        (&guest, "fuel", json!(5)),
    ] {
        let answer = server.limit_job(job, &json!({ limit: value, "pids": 3 }));
        assert_eq!(answer.problem(422), "not_changeable", "{limit}");
        let problem = answer.json();
        assert_eq!((&problem["limit"], &problem["given"]), (&json!(limit), &value), "{problem}");
        assert!(problem["possible"].as_array().unwrap().contains(&json!("memory_bytes")), "{problem}");
    }
    assert_eq!(server.limit_job(&job, &json!({"fuel": 5})).problem(422), "not_applicable");
    let path = format!("/v1/jobs/{}", job.id());
    for malformed in [
        json!({"limit": {}}),
        json!({"limits": {"pid": 5}}),
        json!({"limits": {"pid": null}}),
        json!({"limits": {"pids": "5"}}),
        json!({"limits": {"pids": 5.5}}),
        json!({"limits": 5}),
        json!({"limits": []}),
        json!({"state": "paused"}),
        json!([]),
    ] {
        let answer = server.patch_json(&path, &malformed);
        assert_eq!(answer.problem(400), "malformed_request", "{malformed}");
    }
    for (type_, body, status) in [
        ("text/plain", &b"{}"[..], 415),
        ("application/json", b"{", 400),
        ("application/json", b"", 400),
        ("application/json", br#"{"limits": {"pids": 5, "pids": 6}}"#, 400),
    ] {
        server.operator("PATCH", &path, &[("content-type", type_)], body).problem(status);
    }
    assert_eq!([&job, &guest].map(|job| server.record(job.id())["limits"].clone()), before);
    server.order(guest.id(), "cancel").expect(200);
    job.finish().expect(200);
    server.assert_healthy();
}

#[test]
fn a_job_that_has_not_begun_or_is_over_has_the_limits_that_it_has() {
    let server = Server::start_with(&format!("{PATIENT}jobs_running = 1\n")).with_probe();
    let running = run(&server, &["report-and-wait"], &json!({}));
    let headers = ["content-length: 0", "holm-args: [\"exit\", \"0\"]"];
    let mut queued = Raw::request(&server, "POST /v1/tenants/t/plugins/probe/jobs", &headers);
    let id = server.wait_for_job("t", "queued")["id"].as_str().unwrap().to_owned();
    let patch = json!({"limits": {"pids": 3}});
    assert_eq!(server.patch_json(&format!("/v1/jobs/{id}"), &patch).problem(409), "job_not_begun");
    let own = running.id().to_owned();
    running.finish().expect(200);
    queued.answered().expect(200);
    for id in [id, own] {
        assert_eq!(server.patch_json(&format!("/v1/jobs/{id}"), &patch).problem(409), "job_finished");
        assert_eq!(server.record(&id)["limits"]["pids"], 64);
    }
    server.tenant("other", &json!({}));
    let other = server.key("other");
    let job = run(&server, &["report-and-wait"], &json!({}));
    let path = format!("/v1/jobs/{}", job.id());
    let json = [("content-type", "application/json")];
    assert_eq!(server.send(&other, "PATCH", &path, &json, patch.to_string().as_bytes()).problem(404), "not_found");
    let own = server.key("t");
    server.send(&own, "PATCH", &path, &json, patch.to_string().as_bytes()).expect(200);
    job.finish().expect(200);
}
