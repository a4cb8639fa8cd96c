//! WASI 0.2 components: what is taken at an upload, and commands as jobs.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use serde_json::{Value, json};
use support::component::{around, command, countdown, enlarged, of_two_parts};
use support::function::http_guest;
use support::{Answer, Server, native, wasm, wat};

const PATH: &str = "/v1/tenants/t/plugins/p";
const EXITED: &str = "exited";

fn start() -> Server {
    let server = Server::start();
    server.tenant("t", &json!({}));
    server
}

fn put(server: &Server, query: &str, artifact: &[u8]) -> Answer {
    server.operator("PUT", &format!("{PATH}{query}"), &[], artifact)
}

/// Uploads an artifact that is refused, and gives what is said of it.
#[track_caller]
fn refused(server: &Server, query: &str, artifact: &[u8]) -> String {
    let answer = put(server, query, artifact);
    assert_eq!(answer.problem(422), "invalid_artifact");
    answer.json()["detail"].as_str().unwrap().to_owned()
}

/// Uploads an artifact and runs it.
fn run(server: &Server, artifact: &str, limits: &Value) -> Value {
    server.upload("t", "p", artifact.as_bytes());
    server.job("t", "p", &json!([]), limits, b"")
}

fn verb(server: &Server, words: &[&str], input: &[u8]) -> Value {
    server.job("t", "p", &json!(words), &json!({}), input)
}

fn exited(exit_code: i32) -> Value {
    json!({"kind": EXITED, "exit_code": exit_code})
}

#[test]
fn a_command_s_result_is_its_exit_code() {
    let server = start();
    for (body, exit_code) in [("i32.const 0", 0), ("i32.const 1", 1)] {
        let record = run(&server, &command("0.2.3", "", body), &json!({}));
        assert_eq!(record["outcome"], exited(exit_code));
    }
    let answer = server.operator("POST", &format!("{PATH}/jobs"), &[], b"");
    assert_eq!((answer.problem(502), &answer.json()["outcome"]), (EXITED.into(), &exited(1)));
    server.upload("t", "p", &http_guest());
    for (words, exit_code) in [(&["exit", "0"][..], 0), (&["exit", "1"], 1), (&["fail"], 1)] {
        assert_eq!(verb(&server, words, b"")["outcome"], exited(exit_code), "{words:?}");
    }
}

#[test]
fn a_command_has_streams_arguments_and_environment() {
    let server = start();
    assert_eq!(server.upload("t", "p", &http_guest())["interface"], "command", "it has both");
    let input: Vec<u8> = (b' '..=b'~').cycle().take(1 << 20).collect();
    let record = verb(&server, &["echo"], &input);
    assert_eq!(record["outcome"], exited(0));
    assert!(record["output"].as_str().unwrap().as_bytes() == input);
    assert_eq!((&record["usage"]["input_bytes"], &record["usage"]["output_bytes"]), (&json!(1 << 20), &json!(1 << 20)));
    assert_eq!(verb(&server, &["echo"], b"")["output"], "", "an empty input is at its end at once");
    assert_eq!(verb(&server, &["stderr", "oh no"], b"")["stderr_tail"], "oh no");

    let args = json!(["environment", "a b"]).to_string();
    let headers = [("holm-args", &*args), ("holm-env", r#"{"OWN": "1"}"#), ("content-type", "text/x")];
    let answer = server.operator("POST", &format!("{PATH}/jobs"), &headers, b"").expect(200);
    let seen = format!(
        r#"["p", "environment", "a b"] [("HOLM_CONTENT_TYPE", "text/x"), ("HOLM_JOB_ID", "{}"), ("HOLM_PLUGIN", "p"), "#,
        answer.header("holm-job-id")
    ) + r#"("HOLM_TENANT", "t"), ("HOME", "/tmp"), ("LANG", "C.UTF-8"), ("OWN", "1"), ("PATH", "/bin"), ("TMPDIR", "/tmp")]"#;
    assert_eq!(answer.text(), seen);
}

#[test]
fn a_command_has_its_scratch_and_no_network() {
    let server = start();
    server.upload("t", "p", &http_guest());
    assert_eq!(verb(&server, &["scratch"], b"")["output"], "kept for as long as the job");
    let refused = verb(&server, &["connect"], b"");
    assert!(["PermissionDenied", "NetworkUnreachable"].contains(&refused["output"].as_str().unwrap()), "{refused}");
}

#[test]
fn traps_are_named() {
    let server = start();
    for (fields, body, trap) in [
        ("", "unreachable", "unreachable_code_reached"),
        ("", "(i32.div_s (i32.const 1) (i32.const 0))", "integer_division_by_zero"),
        ("(memory 1)", "(i32.load (i32.const 65536))", "memory_out_of_bounds"),
        ("(func $f (call $f))", "(call $f) i32.const 0", "stack_overflow"),
        // neither of the two that a result has
        ("", "i32.const 2", "host_error"),
    ] {
        let record = run(&server, &command("0.2.0", fields, body), &json!({}));
        assert_eq!(
            (&record["outcome"]["kind"], &record["outcome"]["trap"]),
            (&json!("trapped"), &json!(trap)),
            "{body}"
        );
    }
}

#[test]
fn fuel_is_exact_and_the_same_every_time() {
    let server = start();
    let text = command("0.2.0", "", &countdown(1_000_000));
    let fuel = run(&server, &text, &json!({}))["usage"]["fuel_used"].as_u64().unwrap();
    assert!(fuel > 1_000_000);
    let record = server.job("t", "p", &json!([]), &json!({"fuel": fuel}), b"");
    assert_eq!((&record["outcome"], &record["usage"]["fuel_used"]), (&exited(0), &json!(fuel)));
    // what follows the last branch of a function is counted, but not looked at any more
    let record = server.job("t", "p", &json!([]), &json!({"fuel": fuel - 20}), b"");
    assert_eq!(
        (&record["outcome"]["kind"], &record["outcome"]["limit"], &record["outcome"]["allowed"]),
        (&json!("over_limit"), &json!("fuel"), &json!(fuel - 20))
    );

    server.upload("t", "p", &http_guest());
    let input = vec![b'x'; 300_000];
    let used: Vec<Value> = (0..3).map(|_| verb(&server, &["echo"], &input)["usage"]["fuel_used"].clone()).collect();
    assert!(used[0].is_u64() && used.iter().all(|fuel| *fuel == used[0]), "{used:?}");
}

#[test]
fn memory_over_its_limit_ends_the_job_however_it_is_asked_for() {
    let server = start();
    let pages = |n: u32| format!("(memory {n})");
    let two = "(core module $big (memory 600)) (core instance (instantiate $big)) (core instance (instantiate $big))";
    let grow = "(drop (memory.grow (i32.const 2000))) i32.const 0";
    for (before, fields, body, over) in [
        ("", pages(200), "i32.const 0", false),
        ("", pages(2000), "i32.const 0", true),
        ("", pages(1), grow, true),
        // 37.5 MiB each: one of them would do
        (two, String::new(), "i32.const 0", true),
    ] {
        let record = run(&server, &around(before, "0.2.0", &fields, body), &json!({"memory_bytes": 64 << 20}));
        let limit = if over { json!("memory_bytes") } else { Value::Null };
        assert_eq!(record["outcome"]["limit"], limit, "{fields} {body}: {record}");
    }
    server.upload("t", "p", &http_guest());
    assert_eq!(verb(&server, &["grow"], b"")["outcome"]["limit"], "memory_bytes");
}

#[test]
fn the_interface_is_what_is_exported_unless_it_is_said() {
    let server = start();
    let text = command("0.2.0", "", "i32.const 0");
    for (artifact, query, interface) in [
        (text.as_bytes(), "", "command"),
        (text.as_bytes(), "?interface=command", "command"),
        (&http_guest(), "", "command"),
        (&http_guest(), "?interface=http", "http"),
        (&wasm("http-hello"), "", "http"),
        (&wasm("http-hello"), "?interface=http", "http"),
    ] {
        server.operator("DELETE", PATH, &[], b"");
        assert_eq!(put(&server, query, artifact).expect(201).json()["interface"], interface, "{query}");
    }
}

#[test]
fn an_interface_that_is_not_exported_is_named_and_the_old_revision_stays() {
    let server = start();
    put(&server, "?interface=http", &wasm("http-hello")).expect(201);
    let before = server.get(PATH).json();
    let text = command("0.2.0", "", "i32.const 0");
    let module = wat("", "nop");
    for artifact in [text.as_bytes(), module.as_bytes()] {
        // it is asked for here, and kept from before there
        for query in ["?interface=http", ""] {
            assert!(refused(&server, query, artifact).contains("wasi:http/incoming-handler"));
        }
    }
    let said = refused(&server, "?interface=command", &wasm("http-hello"));
    assert!(said.contains("wasi:cli/run"), "{said}");
    assert_eq!(put(&server, "?interface=http", &native("echo")).problem(422), "not_available");
    assert_eq!(server.get(PATH).json(), before);
    server.get("/fn/t/p/").expect(200);
}

#[test]
fn an_interface_can_be_changed_to_one_that_is_exported() {
    let server = start();
    server.upload("t", "p", &http_guest());
    let patch = |interface: Value| server.patch_json(PATH, &json!({"interface": interface}));
    let job = || server.operator("POST", &format!("{PATH}/jobs"), &[], b"as a job");
    let call = || server.get("/fn/t/p/early");
    assert_eq!((job().expect(200).text(), call().problem(409)), ("as a job".into(), "wrong_interface".into()));
    assert_eq!(patch(json!("http")).expect(200).json()["interface"], "http");
    assert_eq!((call().expect(200).text(), job().problem(409)), ("early".into(), "wrong_interface".into()));
    server.upload("t", "p", &http_guest());
    assert_eq!(call().expect(200).text(), "early", "an artifact alone keeps it");
    assert_eq!(patch(Value::Null).expect(200).json()["interface"], "command", "back to what is exported");
    job().expect(200);
    assert_eq!(patch(json!("socket")).problem(400), "malformed_request");

    server.upload("t", "p", command("0.2.0", "", "i32.const 0").as_bytes());
    assert_eq!(patch(json!("http")).problem(422), "invalid_settings");
    server.upload("t", "hello", &wasm("http-hello"));
    let hello = server.patch_json("/v1/tenants/t/plugins/hello", &json!({"interface": "command"}));
    assert_eq!(hello.problem(422), "invalid_settings");
}

#[test]
fn versions_of_0_2_are_the_same_and_other_exports_are_nobody_s() {
    let server = start();
    for patch in ["0", "1", "6", "12", "99"] {
        let import = format!(
            r#"(import "wasi:cli/environment@0.2.{patch}" (instance
                (export "initial-cwd" (func (result (option string))))))"#
        );
        let record = run(&server, &around(&import, &format!("0.2.{patch}"), "", "i32.const 0"), &json!({}));
        assert_eq!(record["outcome"], exited(0), "{patch}");
    }
    let text = command("0.2.0", "", "i32.const 0");
    let more = text.trim_end().strip_suffix(')').unwrap().to_owned()
        + r#"(export "acme:own/thing@3.1.4" (instance $cli)) (export "plain" (func $run)))"#;
    assert_eq!(run(&server, &more, &json!({}))["outcome"], exited(0));
}

#[test]
fn what_is_imported_and_not_provided_is_named_with_its_version() {
    let server = start();
    let instance = |name: &str, function: &str| format!(r#"(import "{name}" (instance (export "{function}" (func))))"#);
    for (import, named) in [
        (instance("acme:store/kv@1.2.3", "open"), "acme:store/kv@1.2.3"),
        (instance("wasi:cli/environment@0.3.0", "x"), "wasi:cli/environment@0.3.0"),
        (instance("wasi:cli/environment@0.1.0", "x"), "wasi:cli/environment@0.1.0"),
        (instance("wasi:keyvalue/store@0.2.0-draft", "open"), "wasi:keyvalue/store@0.2.0-draft"),
        (instance("wasi:cli/environment@0.2.0", "no-such-function"), "no-such-function"),
        (r#"(import "plain" (func))"#.into(), "plain"),
    ] {
        let said = refused(&server, "", around(&import, "0.2.0", "", "i32.const 0").as_bytes());
        assert!(said.contains(named), "{named}: {said}");
    }
}

#[test]
fn a_component_that_exports_nothing_to_call_is_told_what_it_exports() {
    let server = start();
    for (text, named) in [
        ("(component)".to_owned(), "wasi:cli/run"),
        (command("0.3.0", "", "i32.const 0"), "wasi:cli/run@0.3.0"),
        (command("0.1.0", "", "i32.const 0"), "wasi:cli/run@0.1.0"),
        (command("0.2.0", "", "i32.const 0").replace("wasi:cli/run@0.2.0", "acme:own/run@0.2.0"), "acme:own/run@0.2.0"),
        (command("0.2.0", "", "i32.const 0").replace("(result (result))", "(result s32)"), "wasi:cli/run@0.2.0"),
        (command("0.2.0", "", "i32.const 0").replace("(export \"run\" (func $run))", ""), "wasi:cli/run@0.2.0"),
    ] {
        let said = refused(&server, "", text.as_bytes());
        assert!(said.contains(named), "{said}");
    }
}

#[test]
fn what_is_no_whole_component_is_refused() {
    let server = start();
    let whole = http_guest();
    for length in [4, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        refused(&server, "", &whole[..length]);
    }
    let mut garbage = whole.clone();
    garbage[8..200].fill(0xff);
    refused(&server, "", &garbage);
    for version in [b"\0asm\x0c\0\x01\0", b"\0asm\x0d\0\x02\0", b"\0asm\x01\0\x01\0"] {
        refused(&server, "", &[version, &whole[8..]].concat());
    }
    let said = refused(&server, "", b"(component\n  (core module $m)\n  (nonsense))");
    assert!(said.contains(":3:"), "where it is: {said}");
    let deep = "(component ".repeat(5000) + &")".repeat(5000);
    refused(&server, "", deep.as_bytes());
    assert_eq!(server.get(PATH).status, 404);
}

#[test]
fn parts_of_a_component_call_each_other_across_their_memories() {
    let server = start();
    for (length, exit_code) in [(5, 0), (6, 1)] {
        assert_eq!(run(&server, &of_two_parts("hello", length), &json!({}))["outcome"], exited(exit_code));
    }
    // the engine sees two memories there, a guest's own module does not
    let two = command("0.2.0", "(memory 1) (memory 1)", "i32.const 0");
    assert!(refused(&server, "", two.as_bytes()).contains("memor"));
}

/// Uploads a component of the interface `http` and calls it. Gives what it answers.
#[allow(clippy::print_stdout)] // figures for whoever looks
fn compile_and_call(server: &Server, component: &[u8], path: &str) -> String {
    let begun = std::time::Instant::now();
    let uploaded = put(server, "", component).expect(201).json();
    println!("{} bytes uploaded and compiled in {:?}", component.len(), begun.elapsed());
    assert_eq!(uploaded["interface"], "http");
    let answers: Vec<String> = (0..3)
        .map(|_| {
            let answer = server.get(path).expect(200);
            let record = server.finished(&answer);
            assert_eq!(record["outcome"], exited(0));
            println!("{}", record["usage"]);
            answer.text()
        })
        .collect();
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    answers[0].clone()
}

#[test] // Python's runtime is as large, and takes the compiler half as long again
fn a_component_of_eighteen_megabytes_compiles_and_answers() {
    let server = start();
    let component = enlarged(&wasm("http-hello"), 7 << 20, 11 << 20);
    assert!(component.len() > 18 << 20);
    let small = Server::start();
    small.tenant("t", &json!({}));
    small.upload("t", "p", &wasm("http-hello"));
    let expected = small.get("/fn/t/p/?to=you").expect(200).text();
    assert_eq!(compile_and_call(&server, &component, "/fn/t/p/?to=you"), expected);
}

#[test]
fn a_large_language_runtime_compiles_and_answers() {
    let Some(file) = std::env::var_os("HOLM_PYTHON_COMPONENT") else {
        println!("SKIPPED a_large_language_runtime_compiles_and_answers: HOLM_PYTHON_COMPONENT names no component");
        return;
    };
    let answer = compile_and_call(&start(), &std::fs::read(file).unwrap(), "/fn/t/p/a?b=c");
    assert!(answer.contains("/a?b=c"), "{answer}");
}
