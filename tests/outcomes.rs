//! Every failure that a tenant can cause is an outcome of the right kind, and nobody else's trouble.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use serde_json::{Value, json};
use support::elf::{Elf, Segment};
use support::wat::command;
use support::{Answer, Server};

fn start() -> Server {
    Server::start().with_probe()
}

/// How a job of the probe ends.
#[track_caller]
fn probe(server: &Server, words: &[&str]) -> Value {
    server.probe(words, &json!({}))["outcome"].clone()
}

/// Uploads a plugin `p`, and gives the record of a job of it.
#[track_caller]
fn run(server: &Server, artifact: &[u8], limits: &Value) -> Value {
    server.upload("t", "p", artifact);
    server.job("t", "p", &json!([]), limits, b"")
}

/// How a module ends that has this start.
#[track_caller]
fn wasm(server: &Server, imports: &[&str], fields: &str, start: &str) -> Value {
    run(server, command(imports, fields, start).as_bytes(), &json!({}))["outcome"].clone()
}

fn exited(code: i32) -> Value {
    json!({"kind": "exited", "exit_code": code})
}

fn signaled(signal: i32) -> Value {
    json!({"kind": "signaled", "signal": signal})
}

#[test]
fn an_exit_code_is_the_program_s_own() {
    let server = start();
    for code in [0, 1, 70, 71, 126, 255] {
        assert_eq!(probe(&server, &["exit", &code.to_string()]), exited(code));
        let exit = format!("(call $proc_exit (i32.const {code})) unreachable");
        assert_eq!(wasm(&server, &["proc_exit"], "", &exit), exited(code), "WebAssembly");
    }
    assert_eq!(wasm(&server, &[], "", ""), exited(0), "a start that returns");
    let early = "(func $s (call $proc_exit (i32.const 3))) (start $s)";
    assert_eq!(wasm(&server, &["proc_exit"], early, "unreachable"), exited(3), "in the start section");
    assert_eq!(
        wasm(&server, &["proc_exit"], "", "(call $proc_exit (i32.const 256))")["exit_code"],
        256,
        "is no success"
    );
    assert_eq!(probe(&server, &["exit-in-thread", "6"]), exited(6), "by a thread that outlives the first one");
    server.assert_healthy();
}

#[test]
fn a_signal_is_the_one_that_ended_the_program() {
    let server = start();
    // of every kind: with and without a core, and the first and last that have no name
    for signal in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 24, 25, 31, 32, 33, 34, 64] {
        assert_eq!(probe(&server, &["signal", &signal.to_string()]), signaled(signal));
    }
    assert_eq!(probe(&server, &["abort"]), signaled(6));
    assert_eq!(probe(&server, &["abort-in-thread"]), signaled(6));
    assert_eq!(probe(&server, &["segfault"]), signaled(11));
    assert_eq!(probe(&server, &["use-stack", "9000"]), signaled(11));
    assert_eq!(probe(&server, &["x32-call"]), signaled(31), "an ABI that no filter of ours describes");
    assert_eq!(probe(&server, &["i386-call"]), signaled(31));
    server.assert_healthy();
}

#[test]
fn l5_signals_to_everything_stay_in_the_job() {
    let server = start();
    let struck = server.probe(&["strike-init"], &json!({}));
    assert_eq!((&struck["outcome"], &struck["output"]), (&exited(0), &json!("the init lives\n")));
    assert_eq!(probe(&server, &["killed-by-child"]), signaled(9), "kill(-1) does not spare the main process");
    for signal in ["9", "34"] {
        assert_eq!(probe(&server, &["signal-in-grandchild", signal]), exited(0), "an orphan's end is not the job's");
    }
    server.assert_healthy();
}

#[test]
fn l5_a_job_that_stops_itself_is_ended_by_its_deadline() {
    let server = start();
    let outcome = server.probe(&["signal", "19"], &json!({"wall_time_ms": 200}))["outcome"].clone();
    assert_eq!((&outcome["kind"], &outcome["limit"]), (&json!("over_limit"), &json!("wall_time_ms")));
    server.assert_healthy();
}

#[test] // L2, R10
fn l2_the_main_process_ends_the_job_whatever_it_leaves_behind() {
    let server = start();
    for (words, output) in [(&["hold-output", "20000"][..], "early\n"), (&["leave-behind", "6", "20000"], "")] {
        let record = server.probe(words, &json!({}));
        assert!(server.sandboxed().is_empty(), "{words:?}");
        assert_eq!((&record["outcome"], &record["output"]), (&exited(0), &json!(output)));
        assert!(record["usage"]["wall_us"].as_u64().unwrap() < 2_000_000, "{record}");
    }
    server.assert_healthy();
}

#[test]
fn a_job_without_streams_still_ends_as_it_likes() {
    let server = start();
    let close = json!(["close-streams", "5"]);
    assert_eq!(server.job("t", "probe", &close, &json!({}), &vec![b'x'; 1 << 20])["outcome"], exited(5));
    let close = "
        (drop (call $fd_close (i32.const 0))) (drop (call $fd_close (i32.const 1)))
        (drop (call $fd_close (i32.const 2))) (call $proc_exit (i32.const 5))";
    assert_eq!(wasm(&server, &["fd_close", "proc_exit"], "", close), exited(5));
    server.assert_healthy();
}

#[test]
fn i1_a_job_cannot_forge_its_own_verdict() {
    let server = start();
    for code in [0, 7] {
        let record = server.probe(&["forge", &code.to_string()], &json!({}));
        assert_eq!(record["outcome"], exited(code));
        let said = r#"{"kind":"exited","exit_code":0}HTTP/1.1 200 OK"#;
        assert!(record["output"].as_str().unwrap().starts_with(said), "{record}");
        assert!(record["stderr_tail"].as_str().unwrap().starts_with(said), "{record}");
    }
    // the channel of its sandbox has a number too, but none that a guest can say
    let everywhere = r#"
        (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 31))
        (loop $next
            (drop (call $fd_write (global.get $fd) (i32.const 0) (i32.const 1) (i32.const 8)))
            (global.set $fd (i32.add (global.get $fd) (i32.const 1)))
            (br_if $next (i32.le_u (global.get $fd) (i32.const 64))))
        (call $proc_exit (i32.const 7))"#;
    let fields =
        r#"(global $fd (mut i32) (i32.const 0)) (data (i32.const 64) "{\"kind\":\"exited\",\"exit_code\":0}")"#;
    let forged = run(&server, command(&["proc_exit"], fields, everywhere).as_bytes(), &json!({}));
    let said = json!(r#"{"kind":"exited","exit_code":0}"#);
    assert_eq!((&forged["outcome"], &forged["output"], &forged["stderr_tail"]), (&exited(7), &said, &said));
    server.assert_healthy();
}

#[test] // W4
fn a_trap_is_called_by_its_code() {
    let server = start();
    let zero = "(global $zero (mut i32) (i32.const 0))";
    let table = "(table 1 funcref) (elem (i32.const 0) $f) (func $f (result i32) (i32.const 0))";
    for (trap, fields, start) in [
        ("unreachable_code_reached", "", "unreachable"),
        ("integer_division_by_zero", zero, "(drop (i32.div_s (i32.const 1) (global.get $zero)))"),
        ("integer_division_by_zero", zero, "(drop (i32.rem_u (i32.const 1) (global.get $zero)))"),
        ("integer_overflow", "", "(drop (i32.div_s (i32.const 0x80000000) (i32.const -1)))"),
        ("bad_conversion_to_integer", "", "(drop (i32.trunc_f32_s (f32.const nan)))"),
        ("memory_out_of_bounds", "", "(drop (i32.load (i32.const 131069)))"),
        ("memory_out_of_bounds", "", "(i64.store offset=0xffffffff (i32.const -1) (i64.const 1))"),
        ("memory_out_of_bounds", "", "(memory.fill (i32.const 131072) (i32.const 1) (i32.const 1))"),
        ("memory_out_of_bounds", r#"(data (i32.const 131072) "x")"#, ""),
        ("table_out_of_bounds", table, "(drop (table.get (i32.const 1)))"),
        ("table_out_of_bounds", table, "(call_indirect (i32.const 1))"),
        ("indirect_call_to_null", "(table 1 funcref)", "(call_indirect (i32.const 0))"),
        ("bad_signature", table, "(call_indirect (i32.const 0))"),
        ("stack_overflow", "(func $f (call $f) (call $f))", "(call $f)"),
        ("unreachable_code_reached", "(func $s unreachable) (start $s)", ""),
    ] {
        let outcome = wasm(&server, &[], fields, start);
        assert_eq!((&outcome["kind"], &outcome["trap"]), (&json!("trapped"), &json!(trap)), "{fields} {start}");
        let backtrace = outcome["backtrace"].as_str().unwrap();
        assert!(backtrace.contains("wasm backtrace") || fields.contains("data"), "{outcome}");
    }
    server.assert_healthy();
}

#[test] // W4, W5, W6
fn w4_no_abuse_of_wasi_is_more_than_the_guest_s_own_failure() {
    let server = start();
    let numbers = ["0", "3", "4", "-1"];
    let each_pair = |call: &str| -> String {
        let pairs = numbers.iter().flat_map(|a| numbers.iter().map(move |b| (a, b)));
        pairs.map(|(a, b)| format!("(drop (call ${call} (i32.const {a}) (i32.const {b})))")).collect()
    };
    // the descriptor that is moved over another one, both ways, and used again (CVE-2025-53901)
    assert_eq!(wasm(&server, &["fd_renumber"], "", &each_pair("fd_renumber")), exited(0));
    let iovecs = "(drop (call $fd_write (i32.const 1) (i32.const 65536) (i32.const -1) (i32.const 8)))";
    assert_eq!(wasm(&server, &[], "", iovecs), exited(0));
    let polls = "
        (drop (call $poll_oneoff (i32.const 64) (i32.const 256) (i32.const 0) (i32.const 8)))
        (drop (call $poll_oneoff (i32.const -1) (i32.const 256) (i32.const -1) (i32.const 8)))
        (drop (call $poll_oneoff (i32.const 0) (i32.const 0) (i32.const 2730) (i32.const 8)))";
    let outcome = wasm(&server, &["poll_oneoff"], "", polls);
    assert!(outcome == exited(0) || outcome["kind"] == "trapped", "{outcome}");
    let seeks = "
        (drop (call $fd_seek (i32.const 1) (i64.const -1) (i32.const 9) (i32.const 8)))
        (drop (call $fd_readdir (i32.const 3) (i32.const 131071) (i32.const -1) (i64.const -1) (i32.const 8)))
        (drop (call $fd_pread (i32.const 3) (i32.const 65536) (i32.const -1) (i64.const -1) (i32.const -1)))";
    let outcome = wasm(&server, &["fd_seek", "fd_readdir", "fd_pread"], "", seeks);
    assert!(outcome == exited(0) || outcome["kind"] == "trapped", "{outcome}");
    let random = "(drop (call $random_get (i32.const 0) (i32.const -1)))";
    assert_eq!(wasm(&server, &["random_get"], "", random)["kind"], "trapped");
    server.assert_healthy();
}

#[test]
fn what_no_upload_can_see_is_not_runnable() {
    let server = start();
    // more headers than a kernel reads
    let many = Elf {
        segments: [&[Segment { in_file: 0x2_0000, in_memory: 0x2_0000, ..Segment::CODE }][..], &[Segment::NOTE; 1200]]
            .concat(),
        bytes: 0x2_0000,
        ..Elf::program()
    };
    let outcome = run(&server, &many.build(), &json!({}))["outcome"].clone();
    assert_eq!(outcome["kind"], "not_runnable");
    assert!(outcome["reason"].as_str().unwrap().contains("Exec format error"), "{outcome}");
    // more arguments than the kernel lays on so small a stack
    server.upload("t", "many-args", &Elf::program().build());
    server.patch_json("/v1/tenants/t/plugins/many-args", &json!({"args": vec![""; 60_000]})).expect(200);
    let outcome = |limits| server.job("t", "many-args", &json!([]), &limits, b"")["outcome"].clone();
    assert_eq!(outcome(json!({})), exited(0), "a request's arguments are instead of them");
    let answer = server.operator("POST", "/v1/tenants/t/plugins/many-args/jobs", &[], b"");
    answer.expect(200);
    let small = [("holm-limits", r#"{"stack_bytes": 65536}"#)];
    let answer = server.operator("POST", "/v1/tenants/t/plugins/many-args/jobs", &small, b"");
    assert_eq!(answer.problem(502), "not_runnable");
    assert!(answer.json()["outcome"]["reason"].as_str().unwrap().contains("Argument list too long"));
    // more table than any module gets
    let outcome = wasm(&server, &[], "(table 1000001 funcref)", "");
    assert_eq!(outcome["kind"], "not_runnable");
    assert!(outcome["reason"].as_str().unwrap().contains("1000001 elements"), "{outcome}");
    server.assert_healthy();
}

#[test]
fn a_program_that_no_kernel_can_map_is_refused_at_once() {
    let server = start();
    assert_eq!(run(&server, &Elf::program().build(), &json!({}))["outcome"], exited(0), "the rest of it is good");
    for (what, segment) in [
        ("misaligned", Segment { address: Segment::CODE.address + 8, ..Segment::CODE }),
        ("in the kernel's half", Segment { address: 0xffff_8000_0000_0000, ..Segment::CODE }),
        ("too long", Segment { in_memory: 1 << 47, ..Segment::CODE }),
        ("around the end", Segment { in_memory: u64::MAX - 0x1000, ..Segment::CODE }),
        ("more in the file than in memory", Segment { in_memory: 0x800, ..Segment::CODE }),
    ] {
        let elf = Elf { segments: vec![segment], ..Elf::program() };
        let answer = server.operator("PUT", "/v1/tenants/t/plugins/p", &[], &elf.build());
        assert_eq!(answer.problem(422), "invalid_artifact", "{what}");
        assert!(answer.json()["detail"].as_str().unwrap().contains("segment"), "{what}");
    }
    server.assert_healthy();
}

#[test]
fn a_program_that_barely_fits_its_memory_runs_or_is_over_its_limit() {
    let server = start();
    let mut kinds = Vec::new();
    for kib in (3200..4200).step_by(16) {
        let record =
            run(&server, &Elf { bytes: kib << 10, ..Elf::program() }.build(), &json!({"memory_bytes": 4 << 20}));
        let kind = record["outcome"]["kind"].as_str().unwrap().to_owned();
        assert!(kind == "exited" || record["outcome"]["limit"] == "memory_bytes", "{kib} KiB: {record}");
        kinds.push(kind);
    }
    assert_eq!([&*kinds[0], kinds.last().unwrap()], ["exited", "over_limit"], "{kinds:?}");
    server.assert_healthy();
}

#[test]
fn settings_that_are_too_long_together_are_refused_and_lose_no_job() {
    let server = start();
    let (long, half) = ("x".repeat(65_000), "x".repeat(40_000));
    let path = "/v1/tenants/t/plugins/probe";
    let refused = server.patch_json(path, &json!({"args": [half], "env": {"A": half}}));
    assert_eq!(refused.problem(422), "invalid_settings");
    server.patch_json(path, &json!({"args": ["exit", "0"], "env": {"A": half}})).expect(200);
    let post =
        |content_type: &str| server.operator("POST", &format!("{path}/jobs"), &[("content-type", content_type)], b"");
    post("text/plain").expect(200);
    assert_eq!(post(&half).problem(422), "invalid_settings");
    server.patch_json(path, &json!({"env": {"A": long}})).expect(200);
    post("text/plain").expect(200);
    server.assert_healthy();
}

/// The answer to a job without a preference, checked against its record.
#[track_caller]
fn bare(server: &Server, plugin: &str, args: &Value, limits: &Value) -> Answer {
    let (args, limits) = (args.to_string(), limits.to_string());
    let headers = [("holm-args", args.as_str()), ("holm-limits", &limits)];
    let answer = server.operator("POST", &format!("/v1/tenants/t/plugins/{plugin}/jobs"), &headers, b"");
    let record = server.get(&format!("/v1/jobs/{}", answer.header("holm-job-id"))).expect(200).json();
    assert_eq!(answer.header("holm-outcome"), record["outcome"]["kind"]);
    let usage: Value = serde_json::from_str(answer.header("holm-usage")).unwrap();
    assert_eq!(usage, record["usage"]);
    assert!(answer.header("server-timing").contains("run;dur="));
    let body = answer.json();
    assert_eq!((&body["outcome"], &body["usage"], &body["job_id"]), (&record["outcome"], &usage, &record["id"]));
    assert!(body["stderr_tail"].is_string(), "{body}");
    answer
}

#[test]
fn each_outcome_is_an_answer_of_its_own() {
    let server = start();
    server.upload("t", "loop", command(&[], "", "(loop $l (br $l))").as_bytes());
    server.upload("t", "trap", command(&[], "", "unreachable").as_bytes());
    let native = |words: &[&str], limits: Value| bare(&server, "probe", &json!(words), &limits);
    let wasm = |plugin: &str, limits: Value| bare(&server, plugin, &json!([]), &limits);
    for (answer, status, code, limit) in [
        (native(&["exit", "1"], json!({})), 502, "exited", None),
        (native(&["abort"], json!({})), 502, "signaled", None),
        (wasm("trap", json!({})), 502, "trapped", None),
        (wasm("loop", json!({"fuel": 1000})), 502, "over_limit", Some("fuel")),
        (wasm("loop", json!({"wall_time_ms": 50, "fuel": 1_u64 << 50})), 504, "over_limit", Some("wall_time_ms")),
        (wasm("loop", json!({"cpu_time_ms": 50, "fuel": 1_u64 << 50})), 502, "over_limit", Some("cpu_time_ms")),
        (native(&["sleep", "60000"], json!({"wall_time_ms": 50})), 504, "over_limit", Some("wall_time_ms")),
        (native(&["spin", "60000"], json!({"cpu_time_ms": 50})), 502, "over_limit", Some("cpu_time_ms")),
        (native(&["allocate", "64"], json!({"memory_bytes": 32 << 20})), 502, "over_limit", Some("memory_bytes")),
        (native(&["flood", "stdout", "2"], json!({"output_bytes": 1})), 502, "over_limit", Some("output_bytes")),
        (native(&["flood", "stderr", "2"], json!({"output_bytes": 1})), 502, "over_limit", Some("output_bytes")),
    ] {
        assert_eq!(answer.problem(status), code);
        let outcome = answer.json()["outcome"].clone();
        assert_eq!(outcome["limit"].as_str(), limit, "{outcome}");
        if limit.is_some() {
            let number = |key: &str| outcome[key].as_u64().unwrap();
            assert!(number("reached") >= number("allowed") && number("allowed") > 0, "{outcome}");
        }
    }
    server.assert_healthy();
}

#[test]
fn what_is_refused_inside_ends_nothing() {
    let server = start();
    for (words, limits) in [
        (["fork", "20"], json!({"pids": 4})),
        (["threads", "20"], json!({"pids": 4})),
        (["open-files", "100"], json!({"open_files": 16})),
        (["write-tmp", "100000"], json!({"scratch_bytes": 4096})),
        (["make-files", "100"], json!({"scratch_inodes": 16})),
    ] {
        assert_eq!(server.probe(&words, &limits)["outcome"], exited(0), "{words:?}");
    }
    server.assert_healthy();
}
