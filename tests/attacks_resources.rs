//! Jobs that take more than they may have: of processes, memory in every form, CPU, descriptors, files, output. Each
//! attack is first shown to work in a plain process, a little past the limit. Rows R1 to R16 of the threats.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::Server;
use support::plain::{Plain, outside};
use support::raw::Raw;
use support::slowness::at_most;

const MIB: u64 = 1 << 20;

fn start() -> Server {
    Server::start().with_probe()
}

#[track_caller]
fn said(server: &Server, words: &[&str], limits: &Value) -> String {
    let record = server.probe(words, limits);
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{words:?}: {record}");
    record["output"].as_str().unwrap().trim_end().to_owned()
}

/// User and system time in milliseconds.
fn cpu(record: &Value) -> u64 {
    (record["usage"]["cpu_user_us"].as_u64().unwrap() + record["usage"]["cpu_system_us"].as_u64().unwrap()) / 1000
}

#[test]
fn r1_processes_threads_and_daemons_are_counted_alike() {
    assert_eq!(outside(&["fork", "200"]), "201", "outside nothing stops it at 200");
    assert_eq!(outside(&["threads", "200"]), "201");
    let server = start();
    for verb in ["fork", "threads"] {
        assert_eq!(said(&server, &[verb, "200"], &json!({"pids": 32})), "32", "{verb}");
    }
    let record = server.probe(&["leave-behind", "200", "20000"], &json!({"pids": 32}));
    assert_eq!((&record["outcome"]["exit_code"], &record["usage"]["pids_peak"]), (&json!(2), &json!(32)), "{record}");
    assert!(record["stderr_tail"].as_str().unwrap().contains("os error 11"), "{record}");
    assert!(server.sandboxed().is_empty(), "no daemon outlives its job");
    server.assert_healthy();
}

#[test]
fn r2_zombies_are_counted_and_orphans_are_reaped() {
    assert_eq!(outside(&["zombies", "200"]), "200 not refused");
    let server = start();
    let limits = json!({"pids": 32});
    assert_eq!(said(&server, &["zombies", "200"], &limits), "31 Resource temporarily unavailable (os error 11)");
    assert_eq!(said(&server, &["orphans", "500"], &limits), "500 not refused", "the job's init reaps them");
    assert!(server.sandboxed().is_empty());
    server.assert_healthy();
}

/// Each kind of memory, with so many steps as are past the limit of 16 MiB, and what ends it.
const KINDS: [(&str, &str, &str); 11] = [
    ("anonymous", "40", "over_limit"),
    ("shared", "40", "over_limit"),
    ("page-tables", "40", "over_limit"),
    ("mappings", "7", "over_limit"),
    ("tmp", "40", "over_limit"),
    ("memory-file", "40", "over_limit"),
    ("pipes", "40", "over_limit"),
    ("sockets", "40", "over_limit"),
    ("inodes", "4", "(os error 28)"),
    ("timers", "2", "(os error 11)"),
    ("epoll", "1500", "over_limit"),
];

#[test]
fn r3_memory_is_charged_whatever_it_is_called() {
    let server = start();
    for (kind, steps, end) in KINDS {
        assert_eq!(outside(&["hoard", kind, steps]), format!("{steps} not refused"), "{kind}, outside");
        // the kernel has a bound of its own on mappings, near 16 MiB
        let memory = if kind == "mappings" { 8 * MIB } else { 16 * MIB };
        let limits = json!({
            "memory_bytes": memory, "scratch_bytes": 64 * MIB, "scratch_inodes": 1024, "open_files": 4096
        });
        let record = server.probe(&["hoard", kind, steps], &limits);
        let (outcome, peak) = (&record["outcome"], record["usage"]["memory_peak_bytes"].as_u64().unwrap());
        println!("{kind}: {outcome} {} peak {peak}", record["output"]);
        assert!(peak <= memory, "{kind}: {record}");
        if end == "over_limit" {
            assert_eq!(
                (&outcome["kind"], &outcome["limit"]),
                (&json!("over_limit"), &json!("memory_bytes")),
                "{kind}: {record}"
            );
        } else {
            assert!(record["output"].as_str().unwrap().trim_end().ends_with(end), "{kind}: {record}");
        }
    }
    server.assert_healthy();
}

#[test]
fn r6_no_way_of_using_cpu_is_missed() {
    let server = start();
    for way in ["children", "bursts", "nice"] {
        let mut plain = Plain::start(0, &["dodge", way, "200"]);
        assert_eq!(plain.line(), "", "{way}, outside: it runs for as long as it likes");
        let record = server.probe(&["dodge", way, "20000"], &json!({"cpu_time_ms": 400, "wall_time_ms": 20_000}));
        let outcome = &record["outcome"];
        assert_eq!(
            (&outcome["kind"], &outcome["limit"]),
            (&json!("over_limit"), &json!("cpu_time_ms")),
            "{way}: {record}"
        );
        assert!((400..600).contains(&cpu(&record)), "{way}: {record}");
        let half = server.probe(&["dodge", way, "1000"], &json!({"cpu_cores": 0.3}));
        assert!(cpu(&half) < 450, "{way}: {half}");
    }
    server.assert_healthy();
}

#[test]
fn r7_no_job_makes_the_kernel_work_for_it_elsewhere_or_comes_before_others() {
    let free: Value = serde_json::from_str(&outside(&["off-account"])).unwrap();
    assert_eq!((&free["sync"], &free["syncfs"]), (&json!(0), &json!(0)), "outside: {free}");
    if free["nice"] != 0 || free["real_time"] != 0 {
        println!("NOT SHOWN OUTSIDE: R7: this machine lets nobody come first: {free}");
    }
    let held: Value = serde_json::from_str(&said(&start(), &["off-account"], &json!({}))).unwrap();
    assert_eq!(held["sync"], 1);
    assert_eq!(held["syncfs"], 1);
    assert!([1, 13].contains(&held["nice"].as_i64().unwrap()) && held["real_time"] == 1, "{held}");
}

#[test]
fn r8_descriptors_on_their_way_and_in_each_other_are_bounded() {
    let mut free = Plain::start(0, &["hoard", "descriptors-in-flight", "200"]);
    assert_eq!(free.line(), "200 not refused", "outside 1,600 descriptors are on their way");
    let server = start();
    let limits = json!({"open_files": 64});
    let refused = said(&server, &["hoard", "descriptors-in-flight", "200"], &limits);
    assert!(refused.ends_with("(os error 109)") || refused.ends_with("(os error 24)"), "{refused}");
    let steps: u64 = refused.split(' ').next().unwrap().parse().unwrap();
    assert!(8 * steps <= 2 * 64 + 8 && 2 * steps <= 64, "{refused}");
    // the kernel's own bound, in and out
    let nested = [outside(&["nest-epoll", "20"]), said(&server, &["nest-epoll", "20"], &json!({}))];
    assert!(nested.iter().all(|text| text.ends_with("(os error 40)")), "{nested:?}");
    println!("NOT SHOWN OUTSIDE: R8: the kernel bounds the nesting of epoll for all: {}", nested[0]);
    server.assert_healthy();
}

#[test]
fn r9_no_file_is_larger_than_tmp_however_it_is_made() {
    let size = 8 * MIB;
    let free: Value = serde_json::from_str(&outside(&["large-files", &(2 * size).to_string()])).unwrap();
    assert_eq!(free["allocate"], 0, "outside: {free}");
    assert_eq!(outside(&["make-files", "1500"]), "1500 not refused");
    let server = start();
    let held = said(&server, &["large-files", &(2 * size).to_string()], &json!({ "scratch_bytes": size }));
    let held: Value = serde_json::from_str(&held).unwrap();
    assert_eq!(held["allocate"], libc::ENOSPC, "{held}");
    assert_eq!(
        (&held["sparse"], &held["read"], &held["zero"]),
        (&json!(0), &json!(0), &json!(0)),
        "a hole is no space"
    );
    assert_eq!(held["attribute"], 1, "{held}");
    let files = said(&server, &["make-files", "100000"], &json!({"scratch_inodes": 1024}));
    assert_eq!(files, "1023 No space left on device (os error 28)");
    server.assert_healthy();
}

#[test]
fn r10_one_line_of_a_gigabyte_ends_at_the_limit_and_a_slow_drip_keeps_nobody_waiting() {
    let server = start();
    for stream in ["stdout", "stderr"] {
        let begun = Instant::now();
        let record = server.probe(&["flood", stream, "1024"], &json!({"output_bytes": MIB}));
        let outcome = &record["outcome"];
        assert_eq!(outcome["limit"], "output_bytes", "{stream}: {record}");
        let kept = if stream == "stdout" { MIB } else { 0 };
        assert_eq!(record["output"].as_str().unwrap().len() as u64, kept, "{stream}");
        // what it still wrote until it was dead is counted and thrown away
        assert!((MIB + 1..64 * MIB).contains(&outcome["reached"].as_u64().unwrap()), "{stream}: {outcome}");
        assert!(begun.elapsed() < at_most(Duration::from_secs(5)), "{stream}: {:?}", begun.elapsed());
    }
    // bytes of every value come out as they went in
    let record = server.probe(&["drip", "512", "0"], &json!({}));
    assert_eq!(record["usage"]["output_bytes"], 512, "{record}");
    let drip = Raw::request(
        &server,
        "POST /v1/tenants/t/plugins/probe/jobs",
        &["content-length: 0", r#"holm-args: ["drip", "100000", "10000"]"#],
    );
    let id = server.wait_for_job("t", "running")["id"].as_str().unwrap().to_owned();
    let begun = Instant::now();
    for _ in 0..10 {
        said(&server, &["exit", "0"], &json!({}));
    }
    assert!(begun.elapsed() < at_most(Duration::from_secs(5)), "{:?}", begun.elapsed());
    assert_eq!(server.get(&format!("/v1/jobs/{id}")).json()["state"], "running");
    drop(drip);
    server.assert_healthy();
}

#[test]
fn r16_no_word_for_endless_is_a_limit() {
    let server = start();
    for value in [
        "0",
        "-1",
        "-0",
        "1e308",
        "1e999",
        "NaN",
        "Infinity",
        "\"64\"",
        "null",
        "[]",
        "{}",
        "true",
        "1.5",
        "18446744073709551616",
    ] {
        for limit in ["memory_bytes", "cpu_time_ms", "wall_time_ms", "pids", "output_bytes", "open_files"] {
            let limits = format!("{{\"{limit}\": {value}}}");
            let answer = server.operator("POST", "/v1/tenants/t/plugins/probe/jobs", &[("holm-limits", &limits)], b"");
            assert!(matches!(answer.status, 400 | 422), "{limits}: {}", answer.text());
        }
    }
    assert!(server.get("/v1/tenants/t/jobs").json()["jobs"].as_array().unwrap().is_empty(), "none has run");
}
