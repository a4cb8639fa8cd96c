//! What tenants have used: sums of what the kernel counted for each of their jobs, by time, kept beyond a restart.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::inspect::Running;
use support::loops::Loop;
use support::slowness::at_most;
use support::{Server, native, wait_until, wasm};

fn start() -> Server {
    let server = Server::start().with_probe();
    server.upload("t", "echo", &wasm("echo"));
    server
}

#[track_caller]
fn usage(server: &Server, query: &str) -> Value {
    server.get(&format!("/v1/tenants/t/usage{query}")).expect(200).json()
}

/// Runs jobs of many kinds, and gives their records.
fn jobs(server: &Server) -> Vec<Value> {
    let mut records = Vec::new();
    for (words, limits) in [
        (&["exit", "0"][..], json!({})),
        (&["exit", "3"], json!({})),
        (&["burn", "100"], json!({})),
        (&["burn-in-grandchild", "100"], json!({})),
        (&["spin-threads", "2", "200"], json!({"cpu_cores": 0.5})),
        (&["allocate", "50"], json!({"memory_bytes": 16 << 20})),
        (&["flood", "stdout", "1"], json!({"output_bytes": 1 << 21})),
        (&["sleep", "60000"], json!({"wall_time_ms": 100})),
        (&["abort"], json!({})),
    ] {
        records.push(server.probe(words, &limits));
    }
    records.push(server.job("t", "echo", &json!([]), &json!({}), b"hello"));
    let paused = Running::start(server, "t", "probe", &json!(["cat"]), &json!({}));
    server.pause(&paused);
    std::thread::sleep(Duration::from_millis(50));
    server.resume(&paused);
    records.push(paused.finish().expect(200).json());
    records
}

/// Fails unless `sum` is that of the usage in these records.
#[track_caller]
fn assert_sum(sum: &Value, records: &[Value]) {
    assert_eq!(sum["jobs"], records.len(), "{sum}");
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for record in records {
        *kinds.entry(record["outcome"]["kind"].as_str().unwrap()).or_default() += 1;
    }
    assert_eq!(sum["outcomes"], json!(kinds), "{sum}");
    let figures = |key: &'static str| records.iter().filter_map(move |record| record["usage"][key].as_u64());
    for key in [
        "queue_us",
        "wall_us",
        "paused_us",
        "cpu_user_us",
        "cpu_system_us",
        "cpu_throttled_us",
        "fuel_used",
        "input_bytes",
        "output_bytes",
    ] {
        // of WebAssembly alone
        let none = key == "fuel_used" && figures(key).next().is_none();
        let expected = if none { Value::Null } else { figures(key).sum::<u64>().into() };
        assert_eq!(sum[key], expected, "{key}: {sum}");
    }
    assert_eq!(sum["memory_peak_bytes"], figures("memory_peak_bytes").max().unwrap(), "{sum}");
    for absent in ["io_read_bytes", "io_write_bytes"] {
        assert!(sum.get(absent).is_none(), "{absent}: {sum}");
    }
}

#[test]
fn the_sum_is_that_of_all_jobs_however_they_ended_and_outlasts_the_server() {
    let server = start();
    let nothing = usage(&server, "");
    assert_eq!((&nothing["tenant"], &nothing["jobs"]), (&json!("t"), &json!(0)));
    assert!(nothing.get("cpu_user_us").is_none(), "{nothing}");
    let mut records = jobs(&server);
    assert_sum(&usage(&server, ""), &records);
    let server = Server::start_in(server.stop(), "");
    assert_sum(&usage(&server, ""), &records);
    records.push(server.probe(&["burn", "50"], &json!({})));
    assert_sum(&usage(&server, ""), &records);
    // one that ends because the server does
    let last = Running::start(&server, "t", "probe", &json!(["report-and-wait"]), &json!({}));
    let dir = std::thread::scope(|scope| {
        let stop = scope.spawn(|| server.stop());
        records.push(last.finish().expect(200).json());
        stop.join().unwrap()
    });
    let server = Server::start_in(dir, "");
    assert_sum(&usage(&server, ""), &records);
}

#[test]
fn a_server_that_is_killed_loses_no_more_than_the_last_seconds() {
    let mut server = start();
    let records = [server.probe(&["burn", "20"], &json!({})), server.probe(&["exit", "1"], &json!({}))];
    let database = server.data().join("holm.db-wal");
    let written = || database.metadata().and_then(|file| file.modified()).ok();
    let before = written();
    wait_until("it is written down", || (written() != before).then_some(()));
    std::thread::sleep(at_most(Duration::from_millis(200))); // the end of the transaction
    server.signal(Signal::SIGKILL);
    server.wait();
    let server = Server::start_in(server.take_dir(), "");
    assert_sum(&usage(&server, ""), &records);
}

#[test]
fn a_stretch_of_time_is_rounded_outwards_and_holds_the_jobs_that_ended_in_it() {
    let server = start();
    let before = Timestamp::now();
    let record = server.probe(&["burn", "30"], &json!({}));
    let after = Timestamp::now();
    let at = |time: Timestamp, minutes: i64| time + jiff::SignedDuration::from_mins(minutes);
    let query = |from: Timestamp, to: Timestamp| usage(&server, &format!("?from={from}&to={to}"));
    let exact = query(before, after);
    assert_sum(&exact, std::slice::from_ref(&record));
    let time = |key: &str| exact[key].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert!(time("from") <= before && time("to") >= after, "{exact}");
    assert!(time("from").as_second() % 60 == 0 && time("to").as_second() % 60 == 0, "{exact}");
    assert!(time("from") > at(before, -2) && time("to") < at(after, 2), "{exact}");
    for (from, to) in
        [(at(before, -10), at(before, -5)), (at(after, 5), at(after, 10)), (at(before, -9000), at(before, -100))]
    {
        assert_eq!(query(from, to)["jobs"], 0, "{from} {to}");
    }
    assert_eq!(query(at(before, -600_000), at(after, 600_000))["jobs"], 1);
    assert_eq!(usage(&server, &format!("?from={before}"))["jobs"], 1);
    assert_eq!(usage(&server, &format!("?to={}", at(after, 1)))["jobs"], 1);
    for (query, status, code) in [
        (format!("?from={after}&to={before}"), 422, "invalid_range"),
        (format!("?from={before}&to={before}"), 422, "invalid_range"),
        (format!("?from={}", at(after, 60)), 422, "invalid_range"),
        ("?from=yesterday".to_owned(), 400, "malformed_request"),
        ("?to=".to_owned(), 400, "malformed_request"),
        ("?since=2026-01-01T00:00:00Z".to_owned(), 400, "malformed_request"),
    ] {
        let answer = server.get(&format!("/v1/tenants/t/usage{query}"));
        assert_eq!(answer.problem(status), code, "{query}");
    }
}

#[test]
fn a_tenant_sees_its_own_sum_and_the_next_of_its_name_begins_anew() {
    let server = start();
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    server.probe(&["burn", "30"], &json!({}));
    let (own, other) = (server.key("t"), server.key("other"));
    let path = "/v1/tenants/t/usage";
    assert_eq!(server.send(&own, "GET", path, &[], b"").expect(200).json()["jobs"], 1);
    assert_eq!(server.send(&other, "GET", path, &[], b"").problem(404), "not_found");
    assert_eq!(server.send("", "GET", path, &[], b"").problem(401), "unauthenticated");
    assert_eq!(server.get("/v1/tenants/other/usage").expect(200).json()["jobs"], 0);
    server.operator("DELETE", "/v1/tenants/t", &[], b"").expect(204);
    server.get(path).problem(404);
    server.tenant("t", &json!({}));
    assert_eq!(usage(&server, "")["jobs"], 0);
    let server = Server::start_in(server.stop(), "");
    assert_eq!(usage(&server, "")["jobs"], 0);
}

#[test]
fn bytes_of_block_devices_are_counted_where_the_kernel_does() {
    const BYTES: u64 = 4 << 20;
    let server = start();
    let disk = Loop::new(BYTES);
    let rule = json!([{"type": "block", "device": disk.number, "access": "rw"}]);
    server.tenant("t", &json!({"limits": {"devices": rule}}));
    let node = format!("/dev/{}", disk.name());
    let read = server.probe(&["direct", "read", &node, "1048576", "50"], &json!({}));
    assert_eq!(read["outcome"]["kind"], "exited", "{read}");
    let said: Value = serde_json::from_str(read["output"].as_str().unwrap()).unwrap();
    let bytes = said["blocks"].as_u64().unwrap() << 20;
    let sum = usage(&server, "");
    let counted = sum["io_read_bytes"].as_u64().unwrap_or_else(|| panic!("not counted: {sum}"));
    assert!((bytes..bytes + BYTES).contains(&counted), "{bytes}: {sum}");
    // v1 counts them for the tenant alone
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    assert_eq!(read["usage"].get("io_read_bytes"), v2.then_some(&json!(counted)), "{read}");
    let write = server.probe(&["direct", "write", &node, "1048576", "50"], &json!({}));
    assert_eq!(write["outcome"]["kind"], "exited", "{write}");
    let said: Value = serde_json::from_str(write["output"].as_str().unwrap()).unwrap();
    let sum = usage(&server, "");
    assert!(sum["io_write_bytes"].as_u64().unwrap() >= said["blocks"].as_u64().unwrap() << 20, "{sum}");
    server.assert_healthy();
}
