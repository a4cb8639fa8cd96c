//! WebAssembly that attacks its compiler, its meter, its host calls, its files: rows W1 to W13 of the threats.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::plain::outside;
use support::slowness::at_most;
use support::wat::command;
use support::{Server, native, wasm};

const MIB: u64 = 1 << 20;

fn start() -> Server {
    Server::start().with_probe()
}

/// Runs a guest to its end.
#[track_caller]
fn run(server: &Server, artifact: &str, limits: &Value) -> Value {
    server.upload("t", "p", artifact.as_bytes());
    server.job("t", "p", &json!([]), limits, b"")
}

/// The most fuel that there is: no guest of these tests uses it up.
fn endless(mut limits: Value) -> Value {
    limits["fuel"] = json!((1_u64 << 53) - 1);
    limits
}

/// Modules that are small to send and long to compile.
fn bombs() -> Vec<(&'static str, String)> {
    let start = |fields: &str, body: &str| format!("(module {fields} (func (export \"_start\") {body}))");
    let repeat = |text: &str, times: usize| text.repeat(times);
    vec![
        ("nested blocks", start("", &(repeat("(block ", 20_000) + &repeat(")", 20_000)))),
        ("locals", start("", &format!("(local {})", repeat("i64 ", 60_000)))),
        ("functions", start(&repeat("(func)", 100_000), "")),
        ("one jump table", start("", &format!("(block $b (br_table {} (i32.const 1)))", repeat("$b ", 120_000)))),
        (
            "elements",
            start(&format!("(func $f) (table 100000 funcref) (elem (i32.const 0) {})", repeat("$f ", 100_000)), ""),
        ),
        ("segments", start(&format!("(memory 1) {}", repeat("(data (i32.const 0) \"x\")", 100_000)), "")),
        (
            "a chain of selects",
            start(
                "",
                &format!(
                    "(local i32) {}",
                    repeat("(local.set 0 (select (local.get 0) (i32.const 1) (i32.eqz (local.get 0))))", 20_000)
                ),
            ),
        ),
        (
            "instances",
            format!(
                "(component (core module $m (memory 1) (func (export \"f\"))) {})",
                (0..10_000).map(|i| format!("(core instance $i{i} (instantiate $m))")).collect::<String>()
            ),
        ),
    ]
}

#[test]
fn w1_compile_bombs_end_within_the_compiler_s_limits_and_others_upload_meanwhile() {
    let server = Server::start_with("compile_cpu_time_ms = 4000\ncompile_wall_time_ms = 6000").with_probe();
    server.tenant("other", &json!({}));
    let good = command(&[], "", "");
    for (what, bomb) in bombs() {
        std::thread::scope(|scope| {
            let begun = Instant::now();
            let bomb = scope.spawn(|| server.operator("PUT", "/v1/tenants/t/plugins/bomb", &[], bomb.as_bytes()));
            let mut others = 0;
            while !bomb.is_finished() || others == 0 {
                server.upload("other", "good", good.as_bytes());
                others += 1;
            }
            let answer = bomb.join().unwrap();
            let took = begun.elapsed();
            println!("{what}: {} after {took:?}; meanwhile {others} uploads of another tenant", answer.status);
            assert!(took < at_most(Duration::from_secs(12)), "{what}: {took:?}");
            match answer.status {
                200 | 201 => {}
                _ => assert_eq!(answer.problem(422), "invalid_artifact", "{what}"),
            }
        });
    }
    server.assert_healthy();
}

#[test]
fn w2_what_fuel_does_not_see_is_ended_by_time() {
    let server = start();
    let big = "(memory.grow (i32.const 1000))";
    let table = "(table $t 900000 funcref)";
    let many_segments = "(data (i32.const 64) \"x\")".repeat(50_000);
    for (what, imports, fields, start) in [
        (
            "fill",
            &[][..],
            "",
            format!("(drop {big}) (loop $l (memory.fill (i32.const 64) (i32.const 1) (i32.const 65000000)) (br $l))"),
        ),
        (
            "copy",
            &[],
            "",
            format!(
                "(drop {big}) (loop $l (memory.copy (i32.const 64) (i32.const 4096) (i32.const 65000000)) (br $l))"
            ),
        ),
        (
            "table fill",
            &[],
            table,
            "(loop $l (table.fill $t (i32.const 0) (ref.null func) (i32.const 900000)) (br $l))".into(),
        ),
        (
            "table copy",
            &[],
            table,
            "(loop $l (table.copy (i32.const 0) (i32.const 1) (i32.const 899999)) (br $l))".into(),
        ),
        ("grow by nothing", &[], "", "(loop $l (drop (memory.grow (i32.const 0))) (br $l))".into()),
        (
            "refused growth",
            &[],
            "(table $t 1 funcref)",
            "(loop $l (drop (table.grow $t (ref.null func) (i32.const 2000000))) (br $l))".into(),
        ),
        ("start function", &[], "(func $s (loop $l (br $l))) (start $s)", String::new()),
        ("segments, then a loop", &[], &many_segments, "(loop $l (br $l))".into()),
        (
            "host calls",
            &["random_get"],
            "",
            "(loop $l (drop (call $random_get (i32.const 1024) (i32.const 65536))) (br $l))".into(),
        ),
    ] {
        let module = command(imports, fields, &start);
        let record = run(&server, &module, &endless(json!({"cpu_time_ms": 300, "wall_time_ms": 20_000})));
        let outcome = &record["outcome"];
        assert_eq!(
            (&outcome["kind"], &outcome["limit"]),
            (&json!("over_limit"), &json!("cpu_time_ms")),
            "{what}: {record}"
        );
        assert!(outcome["reached"].as_u64().unwrap() < 500, "{what}: {record}");
        let record = run(&server, &module, &endless(json!({"wall_time_ms": 200})));
        let outcome = &record["outcome"];
        assert_eq!(
            (&outcome["kind"], &outcome["limit"]),
            (&json!("over_limit"), &json!("wall_time_ms")),
            "{what}: {record}"
        );
        assert!(outcome["reached"].as_u64().unwrap() < 1000, "{what}: {record}");
    }
    // one clock subscription, relative, an hour: asleep it uses neither fuel nor CPU
    let sleep = "(i64.store (i32.const 64) (i64.const 0)) (i32.store (i32.const 80) (i32.const 1))
        (i64.store (i32.const 88) (i64.const 3600000000000))
        (drop (call $poll_oneoff (i32.const 64) (i32.const 256) (i32.const 1) (i32.const 8)))";
    let record = run(&server, &command(&["poll_oneoff"], "", sleep), &json!({"wall_time_ms": 200}));
    assert_eq!(record["outcome"]["limit"], "wall_time_ms", "{record}");
    server.assert_healthy();
}

#[test]
fn w3_memories_and_tables_that_are_too_large_never_begin() {
    let server = start();
    let record = run(&server, &command(&[], "", "").replace("\"memory\") 2", "\"memory\") 65536"), &json!({}));
    assert_eq!(
        (&record["outcome"]["limit"], &record["outcome"]["reached"]),
        (&json!("memory_bytes"), &json!(1_u64 << 32))
    );
    for table in
        ["(table 4294967295 funcref)", "(table 10000001 externref)", "(table 600000 funcref) (table 600000 funcref)"]
    {
        let upload = server.operator("PUT", "/v1/tenants/t/plugins/p", &[], command(&[], table, "").as_bytes());
        if upload.status == 422 {
            continue;
        }
        let outcome = server.job("t", "p", &json!([]), &json!({}), b"")["outcome"].clone();
        assert_eq!(outcome["kind"], "not_runnable", "{table}: {outcome}");
    }
    server.assert_healthy();
}

#[test]
fn w5_host_calls_take_no_more_than_the_job_s_memory() {
    let server = start();
    let grow = "(drop (memory.grow (i32.const 900)))";
    // 16,384 vectors that all name the same 32 MiB: half a terabyte to write
    let iovecs = format!(
        "{grow} (loop $l (i32.store offset=1024 (i32.mul (global.get $n) (i32.const 8)) (i32.const 1048576))
            (i32.store offset=1028 (i32.mul (global.get $n) (i32.const 8)) (i32.const 33554432))
            (global.set $n (i32.add (global.get $n) (i32.const 1)))
            (br_if $l (i32.lt_u (global.get $n) (i32.const 16384))))
        (drop (call $fd_write (i32.const 1) (i32.const 1024) (i32.const 16384) (i32.const 8)))"
    );
    let random = format!("{grow} (drop (call $random_get (i32.const 64) (i32.const 58000000)))");
    let path = format!(
        "{grow} (memory.fill (i32.const 64) (i32.const 97) (i32.const 58000000))
        (call $proc_exit (call $path_open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 58000000)
            (i32.const 9) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 16)))"
    );
    let counter = "(global $n (mut i32) (i32.const 0))";
    for (what, imports, start) in [
        ("iovecs", &[][..], iovecs),
        ("random bytes", &["random_get"], random),
        ("a path", &["path_open", "proc_exit"], path),
    ] {
        let record = run(&server, &command(imports, counter, &start), &json!({"memory_bytes": 96 * MIB}));
        let (kind, peak) = (&record["outcome"]["kind"], record["usage"]["memory_peak_bytes"].as_u64().unwrap());
        assert!(["exited", "trapped", "over_limit"].contains(&kind.as_str().unwrap()), "{what}: {record}");
        assert!(peak <= 96 * MIB && *kind != json!("over_limit") || what == "iovecs", "{what}: {record}");
        assert!(record["outcome"]["exit_code"] != 0 || what == "iovecs", "{what}: {record}");
    }
    server.assert_healthy();
}

#[test]
fn w6_no_name_leads_out_of_tmp() {
    let server = start();
    let call = |name: &str, call: &str| {
        let fields = r#"(data (i32.const 128) "../etc/passwd") (data (i32.const 160) "/etc/passwd")
            (data (i32.const 192) "link") (data (i32.const 224) "../../bin/x")"#;
        let record =
            run(&server, &command(&[name, "proc_exit"], fields, &format!("(call $proc_exit {call})")), &json!({}));
        assert_eq!(record["outcome"]["kind"], "exited", "{record}");
        record["outcome"]["exit_code"].as_i64().unwrap()
    };
    const NOT_CAPABLE: i64 = 76;
    const PERM: i64 = 63;
    let outside = |errno: i64| [NOT_CAPABLE, PERM].contains(&errno);
    for (at, length) in [(128, 13), (160, 11), (224, 11)] {
        // to read, to create, to truncate
        for (oflags, rights) in [(0, 2), (1, 64), (8, 64), (9, 66)] {
            let open = format!(
                "(call $path_open (i32.const 3) (i32.const 1) (i32.const {at}) (i32.const {length})
                    (i32.const {oflags}) (i64.const {rights}) (i64.const 0) (i32.const 0) (i32.const 64))"
            );
            assert!(outside(call("path_open", &open)), "{at} {oflags}");
        }
        let rename = format!(
            "(call $path_rename (i32.const 3) (i32.const {at}) (i32.const {length}) (i32.const 3) (i32.const 192) (i32.const 4))"
        );
        assert!(outside(call("path_rename", &rename)), "{at}");
        let link = format!(
            "(call $path_link (i32.const 3) (i32.const 0) (i32.const {at}) (i32.const {length}) (i32.const 3) (i32.const 192) (i32.const 4))"
        );
        assert!(outside(call("path_link", &link)), "{at}");
    }
    let symlink = "(call $path_symlink (i32.const 160) (i32.const 11) (i32.const 3) (i32.const 192) (i32.const 4))";
    assert!(outside(call("path_symlink", symlink)), "an absolute target");
    server.assert_healthy();
}

#[test]
fn w7_a_host_call_on_a_stack_that_is_nearly_full_is_the_guest_s_own_failure() {
    let server = start();
    let recursion = "(func $f (param i32) (drop (call $random_get (i32.const 64) (i32.const 64)))
        (call $out (i32.const 64) (i32.const 1))
        (call $f (i32.add (local.get 0) (i32.const 1))))";
    for stack in [65_536, 1 << 20, 8 << 20] {
        let module = command(&["random_get"], recursion, "(call $f (i32.const 0))");
        let record = run(&server, &module, &json!({"stack_bytes": stack}));
        assert_eq!(record["outcome"]["trap"], "stack_overflow", "{stack}: {record}");
        assert!(record["usage"]["output_bytes"].as_u64().unwrap() > 100, "{record}");
    }
    server.assert_healthy();
}

#[test]
fn w8_around_a_guest_stands_less_than_around_native_code() {
    // that the kernel enforces these tables is shown for both kinds in `layers.rs`
    let policy = std::process::Command::new(env!("CARGO_BIN_EXE_holm")).args(["doctor", "--policy", "--json"]).output();
    let policy: Value = serde_json::from_slice(&policy.unwrap().stdout).unwrap();
    let of = |kind: &str| policy["kinds"].as_array().unwrap().iter().find(|one| one["kind"] == kind).unwrap().clone();
    let calls = |kind: &str| -> BTreeMap<String, bool> {
        let all = of(kind)["calls"].as_array().unwrap().clone();
        let call = |call: &Value| (call["name"].as_str().unwrap().to_owned(), call["conditional"] == true);
        all.iter().map(call).collect()
    };
    let (native, wasm) = (calls("native"), calls("wasm"));
    for (name, conditional) in &wasm {
        let there = native.get(name).unwrap_or_else(|| panic!("`{name}` is for guests alone"));
        assert!(*conditional || !there, "`{name}` has more for guests");
    }
    for name in ["execve", "execveat", "fork", "vfork", "clone", "clone3", "kill", "socket", "connect", "bind", "pipe2"]
    {
        assert!(!wasm.contains_key(name), "{name}");
    }
    assert!(wasm["mmap"] && wasm["mprotect"], "only what is not executable");
    assert_eq!((of("wasm")["devices"].clone(), of("wasm")["landlock"].as_array().unwrap().len()), (json!([]), 1));
}

/// The compiled form of the only WebAssembly plugin of tenant `t`.
fn compiled(server: &Server) -> PathBuf {
    let only = |dir: &Path| fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    only(&only(&server.data().join("compiled")).join("t"))
}

#[test]
fn w9_compiled_code_and_half_breeds_are_never_taken_for_plugins() {
    let server = start();
    server.upload("t", "p", command(&[], "", "").as_bytes());
    let code = fs::read(compiled(&server)).unwrap();
    assert!(code.starts_with(b"\x7fELF"), "what the engine makes is an ELF file itself");
    let (module, program) = (wasm("echo"), native("echo"));
    for (what, bytes) in [
        ("compiled code", code.clone()),
        ("compiled code behind a module's magic", [&module[..8], &code].concat()),
        ("a module behind a program's magic", [&program[..4], &module].concat()),
        ("a module behind a program's header", [&program[..64], &module].concat()),
        ("a program behind a module's header", [&module[..8], &program].concat()),
    ] {
        let answer = server.operator("PUT", "/v1/tenants/t/plugins/half", &[], &bytes);
        assert_eq!(answer.problem(422), "invalid_artifact", "{what}");
    }
    // what follows a program is not looked at: it is a program and runs as one
    let tail = [&program[..], &module].concat();
    assert_eq!(server.upload("t", "half", &tail)["runtime"], "native");
    assert_eq!(server.job("t", "half", &json!([]), &json!({}), b"x")["output"], "x");
    server.assert_healthy();
}

#[test]
fn w10_each_proposal_that_is_not_promised_is_refused_by_its_name() {
    let server = start();
    let module = |fields: &str, body: &str| format!("(module {fields} (func (export \"_start\") {body}))");
    for (names, text) in [
        (&["threads", "shared"][..], module("(memory 1 1 shared)", "")),
        (&["threads", "atomic"], module("(memory 1)", "(drop (i32.atomic.load (i32.const 0)))")),
        (&["gc"], module("(type (struct (field i32)))", "")),
        (&["gc", "function references", "reference"], module("(type $f (func)) (func (param (ref $f)))", "")),
        (&["memory64", "64-bit"], module("(memory i64 1)", "")),
        (&["multi-memory", "multiple memories", "multi memory"], module("(memory 1) (memory 1)", "")),
        (&["tail call"], module("(func $f)", "(return_call $f)")),
        (&["exceptions"], module("(tag)", "")),
        (&["exceptions"], module("", "(try_table)")),
        (&["stack switching", "stack-switching", "continuation"], module("(type $f (func)) (type (cont $f))", "")),
        (
            &["relaxed SIMD", "relaxed simd"],
            module("", "(drop (i8x16.relaxed_swizzle (v128.const i64x2 0 0) (v128.const i64x2 0 0)))"),
        ),
        (&["custom page sizes", "custom-page-sizes"], module("(memory 1 (pagesize 1))", "")),
        (&["wide arithmetic", "wide-arithmetic"], module("", "i64.const 1 i64.const 1 i64.mul_wide_s drop drop")),
    ] {
        let answer = server.operator("PUT", "/v1/tenants/t/plugins/p", &[], text.as_bytes());
        assert_eq!(answer.problem(422), "invalid_artifact", "{text}");
        let detail = answer.json()["detail"].as_str().unwrap().to_owned();
        println!("{}: {detail}", names[0]);
        assert!(names.iter().any(|name| detail.contains(name)), "{names:?}: {detail}");
    }
    server.assert_healthy();
}

#[test]
fn w11_every_guest_has_an_engine_of_its_own_and_code_of_another_engine_is_never_loaded() {
    let server = start();
    // the same types in another order: an index of one is another type in the other
    let types = |order: [&str; 3]| {
        let fields = format!("{} (table funcref (elem $f)) (func $f (type $c) (i32.const 7))", order.concat());
        command(&["proc_exit"], &fields, "(call $proc_exit (call_indirect (type $c) (f64.const 1) (i32.const 0)))")
    };
    let [a, b, c] =
        ["(type $a (func (param i64)))", "(type $b (func (result f32)))", "(type $c (func (param f64) (result i32)))"];
    for (name, order) in [("one", [a, b, c]), ("two", [c, b, a])] {
        server.upload("t", name, types(order).as_bytes());
    }
    std::thread::scope(|scope| {
        for name in ["one", "two", "one", "two"] {
            let server = &server;
            scope.spawn(move || {
                for stack in [65_536, 1 << 20, 4 << 20] {
                    let record = server.job("t", name, &json!([]), &json!({"stack_bytes": stack}), b"");
                    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 7}), "{name}");
                }
            });
        }
    });
}

#[test]
fn w13_a_guest_s_clocks_go_in_steps_of_100_microseconds() {
    let server = start();
    // the least step that any of 2,000 readings shows, by each of the two clocks
    let readings = "
        (loop $l
            (drop (call $clock_time_get (global.get $clock) (i64.const 1) (i32.const 64)))
            (if (i64.ne (i64.rem_u (i64.load (i32.const 64)) (i64.const 100000)) (i64.const 0)) (then unreachable))
            (global.set $n (i32.add (global.get $n) (i32.const 1)))
            (br_if $l (i32.lt_u (global.get $n) (i32.const 2000))))";
    for clock in [0, 1] {
        let fields = format!("(global $n (mut i32) (i32.const 0)) (global $clock i32 (i32.const {clock}))");
        let record = run(&server, &command(&["clock_time_get"], &fields, readings), &json!({}));
        assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "clock {clock}");
    }
    let fine = |text: &str| text.trim().parse::<u64>().unwrap() < 100_000;
    assert!(fine(&outside(&["clock-step"])), "the host's clock is finer");
    assert!(fine(server.probe(&["clock-step"], &json!({}))["output"].as_str().unwrap()), "and so is native code's");
}
