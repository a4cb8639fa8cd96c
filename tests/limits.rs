//! Both sides of each limit: just under it a job works, just over it ends as promised, or is told inside.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use support::inspect::{Process, Running};
use support::wat::command;
use support::{Server, native, wasm};

const MIB: u64 = 1 << 20;

fn start() -> Server {
    Server::start().with_probe()
}

/// The record of a job of the probe that has ended well.
#[track_caller]
fn well(server: &Server, words: &[&str], limits: &Value) -> Value {
    let record = server.probe(words, limits);
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{words:?} {limits}");
    record
}

/// What a job of the probe that has ended well said.
#[track_caller]
fn said(server: &Server, words: &[&str], limits: &Value) -> String {
    well(server, words, limits)["output"].as_str().unwrap().trim_end().to_owned()
}

/// Checks that the job ended for reaching this limit, and gives what it reached.
#[track_caller]
fn over(record: &Value, limit: &str) -> u64 {
    let outcome = &record["outcome"];
    assert_eq!((&outcome["kind"], &outcome["limit"]), (&json!("over_limit"), &json!(limit)), "{record}");
    assert_eq!(outcome["allowed"], record["limits"][limit], "{record}");
    let reached = outcome["reached"].as_u64().unwrap();
    assert!(reached >= outcome["allowed"].as_u64().unwrap(), "{record}");
    reached
}

#[track_caller]
fn used(record: &Value, key: &str) -> u64 {
    record["usage"][key].as_u64().unwrap_or_else(|| panic!("no {key}: {record}"))
}

/// User and system time, in microseconds.
fn cpu(record: &Value) -> u64 {
    used(record, "cpu_user_us") + used(record, "cpu_system_us")
}

#[test] // R3, R5
fn r3_memory_ends_the_whole_job_and_its_peak_is_never_more() {
    let server = start();
    for limit in [8 * MIB, 32 * MIB, 128 * MIB] {
        let (limits, mib) = (json!({"memory_bytes": limit}), limit / MIB);
        // the program's copy, its stacks and page tables are some 2.5 MiB
        let (under, over_it) = ((mib * 5 / 8).to_string(), (mib + 1).to_string());
        let record = well(&server, &["allocate", &under], &limits);
        assert_eq!(record["output"], format!("{under}\n"));
        let peak = used(&record, "memory_peak_bytes");
        assert!((limit * 5 / 8..=limit).contains(&peak), "{peak} of {limit}");
        for way in ["allocate", "allocate-in-child", "allocate-in-grandchild"] {
            let record = server.probe(&[way, &over_it], &limits);
            over(&record, "memory_bytes");
            assert!(used(&record, "memory_peak_bytes") <= limit, "{record}");
            assert_eq!(record["output"], "", "{way}: nobody is left to say what became of it");
            assert!(used(&record, "wall_us") < 4_000_000, "{way}: the main process did not wait out its sleep");
        }
    }
    well(&server, &["exit", "0"], &json!({"memory_bytes": 4 * MIB}));
    server.assert_healthy();
}

#[test]
fn r3_files_in_tmp_are_memory_too() {
    let server = start();
    let (limits, bytes) = (json!({"memory_bytes": 16 * MIB, "scratch_bytes": 64 * MIB}), |mib: u64| mib * MIB);
    let under = bytes(8).to_string();
    assert_eq!(said(&server, &["write-tmp", &under], &limits), format!("{under} not refused"));
    let record = server.probe(&["write-tmp", &bytes(20).to_string()], &limits);
    over(&record, "memory_bytes");
    assert!(used(&record, "memory_peak_bytes") <= 16 * MIB, "{record}");
}

#[test] // W3, W2
fn w3_a_guest_s_memory_grows_to_the_limit_and_no_further() {
    let server = start();
    let grow = |pages: u32| {
        let touch = format!("(if (i32.eq (memory.grow (i32.const {pages})) (i32.const -1)) (then unreachable))");
        let fill = format!("(memory.fill (i32.const 131072) (i32.const 1) (i32.const {}))", pages << 16);
        server.upload("t", "grow", command(&[], "", &(touch + &fill)).as_bytes());
        server.job("t", "grow", &json!([]), &json!({"memory_bytes": 32 * MIB}), b"")
    };
    let record = grow(470); // 472 of 512 pages
    assert_eq!(record["outcome"]["kind"], "exited");
    assert!((470 << 16..=32 * MIB).contains(&used(&record, "memory_peak_bytes")), "{record}");
    assert_eq!(over(&grow(511), "memory_bytes"), 513 << 16, "what it asked for");
    let touched = grow(510); // the guest may have all of it, the kernel counts the runtime too
    over(&touched, "memory_bytes");
    assert!(used(&touched, "memory_peak_bytes") <= 32 * MIB, "{touched}");
    server.upload("t", "grow", command(&[], "", "").replace("\"memory\") 2", "\"memory\") 513").as_bytes());
    let record = server.job("t", "grow", &json!([]), &json!({"memory_bytes": 32 * MIB}), b"");
    assert_eq!(over(&record, "memory_bytes"), 513 << 16, "it cannot even begin");
    server.assert_healthy();
}

#[test]
fn r6_cpu_time_of_every_process_counts_and_ends_the_job() {
    let server = start();
    for way in ["burn", "burn-in-grandchild"] {
        let record = well(&server, &[way, "200"], &json!({"cpu_time_ms": 400}));
        assert!((200_000..400_000).contains(&cpu(&record)), "{way}: {record}");
        let record = server.probe(&[way, "60000"], &json!({"cpu_time_ms": 200}));
        let reached = over(&record, "cpu_time_ms");
        assert!(reached < 300 && cpu(&record) / 1000 == reached, "{way}: {record}");
    }
    let threads = server.probe(&["spin-threads", "4", "60000"], &json!({"cpu_time_ms": 200, "cpu_cores": 2}));
    assert!(over(&threads, "cpu_time_ms") < 300, "{threads}");
    server.assert_healthy();
}

#[test]
fn r1_processes_and_threads_are_as_many_as_pids_and_no_more() {
    let server = start();
    for pids in [1, 2, 16, 64] {
        let limits = json!({ "pids": pids });
        for verb in ["fork", "threads"] {
            let record = well(&server, &[verb, "100"], &limits);
            assert_eq!((&record["output"], used(&record, "pids_peak")), (&json!(format!("{pids}\n")), pids), "{verb}");
        }
        let record = well(&server, &["fork", &(pids - 1).to_string()], &limits);
        assert_eq!(used(&record, "pids_peak"), pids, "all that it wanted");
    }
    server.upload("t", "guest", command(&[], "", "").as_bytes());
    let record = server.job("t", "guest", &json!([]), &json!({"pids": 1}), b"");
    assert_eq!((&record["outcome"]["kind"], used(&record, "pids_peak")), (&json!("exited"), 1), "WebAssembly");
    server.assert_healthy();
}

#[test]
fn r10_output_is_cut_at_its_limit_to_the_byte() {
    let server = start();
    for (mib, stream) in [(1, "stdout"), (1, "stderr"), (3, "stdout")] {
        let exactly = json!({"output_bytes": mib * MIB});
        let record = well(&server, &["flood", stream, &mib.to_string()], &exactly);
        let kept = if stream == "stdout" { mib * MIB } else { 0 };
        assert_eq!((used(&record, "output_bytes"), record["output"].as_str().unwrap().len() as u64), (kept, kept));
        for less in [mib * MIB - 1, mib * MIB / 2 + 77, 1] {
            let record = server.probe(&["flood", stream, &mib.to_string()], &json!({"output_bytes": less}));
            over(&record, "output_bytes");
            let kept = if stream == "stdout" { less } else { 0 };
            assert_eq!(record["output"].as_str().unwrap().len() as u64, kept, "{stream} {less}");
            let tail = if stream == "stdout" { 0 } else { less.min(4096) };
            assert_eq!(record["stderr_tail"].as_str().unwrap().len() as u64, tail, "{stream} {less}");
        }
    }
    server.upload("t", "echo", &wasm("echo"));
    let echo = |bytes| server.job("t", "echo", &json!([]), &json!({"output_bytes": 100_000}), &vec![b'x'; bytes]);
    assert_eq!(echo(100_000)["outcome"]["kind"], "exited");
    let record = echo(100_001);
    assert_eq!(over(&record, "output_bytes"), 100_001);
    assert_eq!(record["output"].as_str().unwrap().len(), 100_000);
    server.assert_healthy();
}

#[test]
fn r10_a_flood_leaves_the_server_s_memory_as_it_was() {
    let server = start();
    let resident = || -> u64 {
        let line = Process(server.pid()).status()["VmRSS"].clone();
        line.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    };
    let flood = |stream: &str, limit: u64| {
        let (args, limits) =
            (json!(["flood", stream, "256"]).to_string(), json!({ "output_bytes": limit }).to_string());
        let headers = [("holm-args", args.as_str()), ("holm-limits", &limits)];
        let answer = server.operator("POST", "/v1/tenants/t/plugins/probe/jobs", &headers, b"");
        assert_eq!(
            (answer.problem(502), &answer.json()["outcome"]["limit"]),
            ("over_limit".into(), &json!("output_bytes"))
        );
    };
    flood("stdout", MIB);
    let before = resident();
    let done = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(resident());
                std::thread::sleep(Duration::from_millis(1));
            }
            most
        });
        for (stream, limit) in [("stdout", MIB), ("stderr", MIB), ("stdout", 128 * MIB), ("stderr", 256 * MIB - 1)] {
            flood(stream, limit);
        }
        done.store(true, Ordering::Relaxed);
        watch.join().unwrap()
    });
    assert!(most < before + 8 * MIB, "{before} bytes before, {most} at most");
    server.assert_healthy();
}

#[test]
fn w12_fuel_is_exact_and_the_same_every_time() {
    let server = start();
    server.upload("t", "count", &wasm("word-count"));
    server.upload("t", "loop", command(&[], "(global $n (mut i32) (i32.const 1000))", FINITE).as_bytes());
    let text = include_bytes!("../host/LICENSE");
    for plugin in ["count", "loop"] {
        let run = |limits: Value| server.job("t", plugin, &json!([]), &limits, text);
        let fuel = used(&run(json!({})), "fuel_used");
        assert!(fuel > 1000, "{fuel}");
        for limits in [json!({}), json!({"cpu_cores": 0.1}), json!({"memory_bytes": 64 * MIB}), json!({ "fuel": fuel })]
        {
            let record = run(limits);
            assert_eq!((&record["outcome"]["kind"], used(&record, "fuel_used")), (&json!("exited"), fuel), "{plugin}");
        }
        for less in [fuel - 1, fuel / 2, 1] {
            let record = run(json!({ "fuel": less }));
            assert_eq!((over(&record, "fuel"), used(&record, "fuel_used")), (less, less), "{plugin}");
        }
    }
    server.assert_healthy();
}

const FINITE: &str = "
    (loop $again
        (global.set $n (i32.sub (global.get $n) (i32.const 1)))
        (br_if $again (global.get $n)))";

#[test]
fn r8_open_files_are_as_many_as_the_limit_and_no_more() {
    let server = start();
    for files in [16, 64, 1000] {
        let limits = json!({ "open_files": files });
        assert_eq!(
            said(&server, &["open-files", &(files - 3).to_string()], &limits),
            format!("{} not refused", files - 3)
        );
        let refused = said(&server, &["open-files", "2000"], &limits);
        assert_eq!(refused, format!("{} Too many open files (os error 24)", files - 3), "three are its streams");
    }
    server.assert_healthy();
}

/// A guest that makes files in `/tmp` until that is refused, leaves them open if told so, and exits with the errno.
fn files_in_tmp(open: bool) -> String {
    let close = if open { "" } else { "(drop (call $fd_close (i32.load (i32.const 64))))" };
    command(
        &["path_open", "fd_close", "proc_exit"],
        r#"(data (i32.const 128) "00000") (global $made (mut i32) (i32.const 0)) (global $errno (mut i32) (i32.const 0))"#,
        &format!(
            "(loop $next
                (i32.store16 (i32.const 128) (i32.add (i32.const 0x4141) (i32.add
                    (i32.rem_u (global.get $made) (i32.const 26))
                    (i32.shl (i32.div_u (global.get $made) (i32.const 26)) (i32.const 8)))))
                (global.set $errno (call $path_open (i32.const 3) (i32.const 0) (i32.const 128) (i32.const 5)
                    (i32.const 9) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 64)))
                (if (i32.eqz (global.get $errno)) (then
                    {close}
                    (global.set $made (i32.add (global.get $made) (i32.const 1)))
                    (call $out (i32.const 128) (i32.const 5))
                    (br $next))))
            (call $proc_exit (global.get $errno))"
        ),
    )
}

#[test] // R8, R9, W5
fn a_guest_is_told_of_too_many_files_and_inodes() {
    let server = start();
    let run = |artifact: &str, limits: Value| {
        server.upload("t", "files", artifact.as_bytes());
        let record = server.job("t", "files", &json!([]), &limits, b"");
        (record["outcome"]["exit_code"].clone(), used(&record, "output_bytes") / 5)
    };
    const NO_SPACE: u16 = 51; // errno `nospc` of wasip1
    const IO: u16 = 29; // `io`: the engine's file system has no word for EMFILE
    assert_eq!(run(&files_in_tmp(false), json!({"scratch_inodes": 100})), (json!(NO_SPACE), 100));
    let (errno, opened) = run(&files_in_tmp(true), json!({"open_files": 64}));
    assert_eq!(errno, IO);
    assert!((60..=80).contains(&opened), "{opened}: the runtime holds some itself");
    server.assert_healthy();
}

#[test]
fn r9_tmp_holds_as_much_as_the_limit_and_no_more() {
    let server = start();
    for bytes in [4096, 65_536, 4 * MIB] {
        let limits = json!({ "scratch_bytes": bytes });
        assert_eq!(said(&server, &["write-tmp", &bytes.to_string()], &limits), format!("{bytes} not refused"));
        let refused = said(&server, &["write-tmp", &(2 * bytes).to_string()], &limits);
        assert_eq!(refused, format!("{bytes} No space left on device (os error 28)"));
    }
    for inodes in [16, 100, 1024] {
        let limits = json!({ "scratch_inodes": inodes });
        let most = inodes - 1; // the directory that they are in is one
        assert_eq!(said(&server, &["make-files", &most.to_string()], &limits), format!("{most} not refused"));
        let refused = said(&server, &["make-files", &inodes.to_string()], &limits);
        assert_eq!(refused, format!("{most} No space left on device (os error 28)"));
    }
    server.assert_healthy();
}

#[test]
fn w7_the_stack_is_as_deep_as_the_limit() {
    let server = start();
    for mib in [1, 8, 32] {
        let limits = json!({"stack_bytes": mib * MIB});
        let (under, over_it) = ((mib * 1024 * 7 / 8).to_string(), (mib * 1024 + 64).to_string());
        assert_eq!(said(&server, &["use-stack", &under], &limits), under);
        assert_eq!(
            server.probe(&["use-stack", &over_it], &limits)["outcome"],
            json!({"kind": "signaled", "signal": 11})
        );
    }
    let recursion = "(func $f (param i32) (if (local.get 0) (then (call $f (i32.sub (local.get 0) (i32.const 1))))))";
    server.upload("t", "deep", command(&[], recursion, "(call $f (i32.const 100000))").as_bytes());
    let run =
        |stack: u64| server.job("t", "deep", &json!([]), &json!({ "stack_bytes": stack }), b"")["outcome"].clone();
    assert_eq!(run(64 * MIB)["kind"], "exited");
    assert_eq!(run(65_536)["trap"], "stack_overflow");
    server.assert_healthy();
}

#[test]
fn input_is_taken_to_the_limit_and_no_further() {
    let server = start();
    server.upload("t", "echo", &native("echo"));
    let run = |bytes: usize| {
        let headers = [("holm-limits", r#"{"input_bytes": 1000}"#)];
        server.operator("POST", "/v1/tenants/t/plugins/echo/jobs", &headers, &vec![b'x'; bytes])
    };
    assert_eq!(run(1000).expect(200).body.len(), 1000);
    assert_eq!(run(1001).problem(413), "payload_too_large");
    server.assert_healthy();
}

#[test]
fn a_tenants_cpu_may_be_less_than_a_jobs_and_become_less_while_jobs_run() {
    let server = start();
    let ends = |what: &str| assert_eq!(server.probe(&["exit", "0"], &json!({}))["outcome"]["kind"], "exited", "{what}");
    for cores in [json!(0.5), json!(0.1), json!(2), json!(null)] {
        let running = Running::start(&server, "t", "probe", &json!(["count"]), &json!({"cpu_cores": 1}));
        server.patch_json("/v1/tenants/t", &json!({"limits": {"cpu_cores": cores}})).expect(200);
        ends(&format!("beside a job from before: {cores}"));
        running.finish().expect(200);
        ends(&format!("{cores}"));
    }
    server.assert_healthy();
}
