//! Uploads that cannot run, or that never arrive whole: each says what is wrong and where, and the old revision stays.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use serde_json::{Value, json};
use support::raw::{BOUNDARY, Raw, multipart};
use support::{Answer, Server, native, wait_until, wasm, wat};

const PATH: &str = "/v1/tenants/t/plugins/p";
const JOBS: &str = "/v1/tenants/t/plugins/p/jobs";

/// A server with a plugin `p` that gives its input back.
fn start() -> Server {
    let server = Server::start().with_probe();
    server.upload("t", "p", &native("echo"));
    server
}

/// Fails unless `p` is what it was, runs, and nothing of what was refused lies about.
#[track_caller]
fn assert_unchanged(server: &Server, before: &Value) {
    assert_eq!(server.get(PATH).expect(200).json(), *before);
    assert_eq!(server.operator("POST", JOBS, &[], b"hello").expect(200).text(), "hello");
    wait_until("nothing lies in tmp", || (server.data().join("tmp").read_dir().unwrap().count() == 0).then_some(()));
    assert_eq!(stored(server).len(), 2, "the two that were good");
    server.assert_healthy();
}

/// The names of the stored artifacts.
fn stored(server: &Server) -> Vec<String> {
    let dir = server.data().join("artifacts/t").read_dir().unwrap();
    dir.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Uploads what cannot run, over the old revision and under a new name. Its refusal must have all these words.
#[track_caller]
fn refuse(server: &Server, artifact: &[u8], words: &[&str]) {
    let before = server.get(PATH).expect(200).json();
    for path in [PATH, "/v1/tenants/t/plugins/new"] {
        let answer = server.operator("PUT", path, &[], artifact);
        assert_eq!(answer.problem(422), "invalid_artifact");
        let detail = answer.json()["detail"].as_str().unwrap().to_owned();
        for word in words {
            assert!(detail.contains(word), "`{word}` is not in: {detail}");
        }
    }
    server.get("/v1/tenants/t/plugins/new").problem(404);
    assert_unchanged(server, &before);
}

/// The bytes with others written over them.
fn with(mut bytes: Vec<u8>, offset: usize, new: &[u8]) -> Vec<u8> {
    bytes[offset..offset + new.len()].copy_from_slice(new);
    bytes
}

#[test] // W9
fn what_is_no_program_is_called_by_its_name() {
    let server = start();
    refuse(&server, b"", &["empty"]);
    refuse(&server, b"hello\n", &["text"]);
    refuse(&server, b"#!/bin/sh\necho hello\n", &["script"]);
    refuse(&server, b"\x1f\x8b\x08\0\0\0\0\0", &["gzip"]);
    refuse(&server, b"PK\x03\x04", &["zip"]);
    refuse(&server, b"MZ\x90\0\x03\0\0\0", &["Windows"]);
    refuse(&server, &[0; 100], &["format"]);
    refuse(&server, b"\x7fEL", &["format"]);
}

#[test]
fn a_truncated_program_is_refused_wherever_it_ends() {
    let server = start();
    let whole = native("word-count");
    for length in [4, 16, 63, 64, 100, 1000, whole.len() / 2] {
        refuse(&server, &whole[..length], &["truncated"]);
    }
}

#[test]
fn a_program_for_another_machine_is_refused_by_its_name() {
    let server = start();
    // offsets and numbers of the ELF header (System V ABI, chapter 4)
    let (class, encoding, abi, kind, machine) = (4, 5, 7, 16, 18);
    refuse(&server, &with(native("word-count"), machine, &183_u16.to_le_bytes()), &["aarch64", "x86-64"]);
    refuse(&server, &with(native("word-count"), machine, &3_u16.to_le_bytes()), &["i386"]);
    refuse(&server, &with(native("word-count"), machine, &0xfff1_u16.to_le_bytes()), &["machine 65521"]);
    refuse(&server, &with(native("word-count"), class, &[1]), &["32-bit"]);
    refuse(&server, &with(native("word-count"), encoding, &[2]), &["big-endian"]);
    refuse(&server, &with(native("word-count"), abi, &[200]), &["ABI 200"]);
    refuse(&server, &with(native("word-count"), kind, &1_u16.to_le_bytes()), &["object file"]);
    refuse(&server, &with(native("word-count"), kind, &4_u16.to_le_bytes()), &["core dump"]);
}

#[test]
fn a_dynamic_program_is_refused_with_its_interpreter() {
    let server = start();
    let ls = std::fs::read("/bin/ls").unwrap();
    refuse(&server, &ls, &["/lib64/ld-linux-x86-64.so.2", "statically"]);
}

#[test]
fn a_module_that_does_not_link_is_refused_with_the_names_of_its_imports() {
    let server = start();
    let module = r#"(module
        (import "env" "frobnicate" (func))
        (import "wasi_snapshot_preview1" "fd_levitate" (func))
        (import "wasi_snapshot_preview2" "fd_write" (func))
        (func (export "_start")))"#;
    refuse(&server, module.as_bytes(), &["frobnicate", "env", "fd_levitate", "wasi_snapshot_preview2"]);
    let wrong_type = r#"(module
        (import "wasi_snapshot_preview1" "fd_write" (func (param i64)))
        (func (export "_start")))"#;
    refuse(&server, wrong_type.as_bytes(), &["fd_write"]);
}

#[test]
fn an_invalid_module_is_refused_with_the_place() {
    let server = start();
    let whole = wasm("echo");
    refuse(&server, &whole[..whole.len() / 2], &["offset 0x"]);
    refuse(&server, &with(whole.clone(), 8, &[0xff]), &["offset 0x8"]);
    refuse(&server, &whole[..6], &["8 bytes"]);
    refuse(&server, &with(whole, 4, &[9, 0, 0, 0]), &["version"]);
    let type_error = "(module (func (export \"_start\") (drop (i32.add (i32.const 1) (i64.const 2)))))";
    refuse(&server, type_error.as_bytes(), &["type mismatch", "at offset "]);
}

#[test]
fn wrong_text_is_refused_with_the_line() {
    let server = start();
    refuse(&server, b"(module\n  (func\n    (i32.frob)))", &["i32.frob", ":3:"]);
    refuse(&server, b"(module\n  (func", &[":2:"]);
    refuse(&server, b"(modul)", &["modul", ":1:"]);
    refuse(&server, b"(module (func (call $nobody)))", &["nobody", ":1:"]);
}

#[test]
fn a_component_without_an_export_to_call_is_refused() {
    let server = start();
    for empty in [&b"\0asm\x0d\0\x01\0"[..], b"(component)"] {
        refuse(&server, empty, &["wasi:cli/run", "wasi:http/incoming-handler"]);
    }
}

#[test]
fn a_module_without_a_start_is_refused() {
    let server = start();
    refuse(&server, b"(module (func (export \"main\")))", &["_start", "main"]);
    refuse(&server, b"(module (func (export \"_start\") (param i32)))", &["_start", "parameters"]);
    refuse(&server, b"(module (memory (export \"_start\") 1))", &["_start"]);
}

#[test]
fn w1_a_module_that_takes_too_much_to_compile_is_refused_with_the_limit() {
    for (config, word) in [
        ("compile_artifact_bytes = 1000", "1000 bytes of compiled code"),
        ("compile_memory_bytes = 4194304", "4194304 bytes of memory"),
        ("compile_cpu_time_ms = 10", "CPU time"),
        ("compile_wall_time_ms = 10", "10ms"),
    ] {
        let server = Server::start_with(config).with_probe();
        server.upload("t", "p", &native("echo"));
        refuse(&server, &wasm("word-count"), &[word]);
    }
    start().upload("t", "p", &wasm("word-count"));
}

#[test]
fn damaged_modules_and_programs_are_refused_or_taken_but_break_nothing() {
    let server = start();
    let mut seed = 0x1234_5678_u32;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); // Numerical Recipes, chapter 7
        (seed >> 8) as usize % below
    };
    for whole in [wat("", "(call $write)").into_bytes(), wasm("echo"), native("echo")] {
        for _ in 0..12 {
            let mut damaged = whole.clone();
            for _ in 0..=random(8) {
                let at = random(damaged.len().min(4096));
                damaged[at] = u8::try_from(random(256)).unwrap();
            }
            let answer = server.operator("PUT", "/v1/tenants/t/plugins/damaged", &[], &damaged);
            match answer.status {
                200 | 201 => {}
                _ => assert_eq!(answer.problem(422), "invalid_artifact"),
            }
        }
    }
    server.assert_healthy();
}

/// Uploads a form to `p`.
fn put_form(server: &Server, parts: &[(&str, &[u8])]) -> Answer {
    let (content_type, body) = multipart(parts);
    server.operator("PUT", PATH, &[("content-type", &content_type)], &body)
}

#[test]
fn forms_with_wrong_parts_are_400() {
    let server = start();
    let before = server.get(PATH).json();
    let good = native("word-count");
    let (artifact, manifest) = (("artifact", &good[..]), ("manifest", &b"{}"[..]));
    for parts in [
        &[][..],
        &[manifest],
        &[artifact, artifact],
        &[artifact, manifest, manifest],
        &[artifact, ("extra", b"x")],
        &[("Artifact", &good)],
        &[("", &good)],
        &[artifact, ("manifest", b"")],
        &[artifact, ("manifest", b"{")],
        &[artifact, ("manifest", b"[]")],
        &[artifact, ("manifest", b"{\"nonsense\": 1}")],
        &[("manifest", b"{\"args\": 1}"), artifact],
    ] {
        let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
        assert_eq!(put_form(&server, parts).problem(400), "malformed_request", "{names:?}");
    }
    assert_unchanged(&server, &before);
    put_form(&server, &[artifact, manifest]).expect(200);
}

#[test]
fn a_manifest_that_does_not_fit_is_422() {
    let server = start();
    let before = server.get(PATH).json();
    let good = native("word-count");
    for (manifest, code) in [
        (json!({"limits": {"pids": 0}}), "limit_out_of_range"),
        (json!({"limits": {"fuel": 5}}), "not_applicable"),
        (json!({"interface": "http"}), "not_available"),
        (json!({"env": {"HOLM_TENANT": "x"}}), "invalid_settings"),
    ] {
        let text = manifest.to_string();
        let answer = put_form(&server, &[("artifact", &good), ("manifest", text.as_bytes())]);
        assert_eq!(answer.problem(422), code, "{manifest}");
    }
    assert_unchanged(&server, &before);
}

#[test] // H5
fn forms_that_are_none_are_400() {
    let server = start();
    let before = server.get(PATH).json();
    let (content_type, body) = multipart(&[("artifact", &native("word-count"))]);
    let cut = &body[..body.len() - BOUNDARY.len() - 6];
    let unnamed = format!("--{BOUNDARY}\r\nContent-Type: text/plain\r\n\r\nx\r\n--{BOUNDARY}--\r\n");
    let headless = format!("--{BOUNDARY}\r\nno header at all\r\n\r\nx\r\n--{BOUNDARY}--\r\n");
    for (what, content_type, body) in [
        ("never ends", content_type.as_str(), cut),
        ("empty", &content_type, b""),
        ("no form", &content_type, b"hello"),
        ("without a name", &content_type, unnamed.as_bytes()),
        ("bad part headers", &content_type, headless.as_bytes()),
        ("another boundary", "multipart/form-data; boundary=other", &body),
        ("no boundary", "multipart/form-data", &body),
        ("empty boundary", "multipart/form-data; boundary=", &body),
    ] {
        let answer = server.operator("PUT", PATH, &[("content-type", content_type)], body);
        assert_eq!(answer.problem(400), "malformed_request", "{what}");
    }
    assert_unchanged(&server, &before);
}

#[test]
fn an_upload_that_is_cut_in_the_middle_leaves_the_old_revision() {
    let server = start();
    let before = server.get(PATH).json();
    let artifact = native("word-count");
    let (content_type, form) = multipart(&[("artifact", &artifact), ("manifest", b"{}")]);
    let (content_type, half) = (format!("Content-Type: {content_type}"), artifact.len() / 2);
    let put = format!("PUT {PATH}");
    let length = |bytes: &[u8]| format!("Content-Length: {}", bytes.len());
    let received = || server.data().join("tmp").read_dir().unwrap().count() > 0;

    let mut whole = Raw::request(&server, &put, &[&length(&artifact)]);
    whole.send(&artifact[..half]);
    wait_until("some of it has come", || received().then_some(()));
    drop(whole);
    assert_unchanged(&server, &before);

    let mut chunked = Raw::request(&server, &put, &["Transfer-Encoding: chunked"]);
    assert!(chunked.chunk(&artifact[..half]));
    wait_until("some of it has come", || received().then_some(()));
    drop(chunked);
    assert_unchanged(&server, &before);

    let mut form_upload = Raw::request(&server, &put, &[&length(&form), &content_type]);
    form_upload.send(&form[..half]);
    wait_until("some of it has come", || received().then_some(()));
    drop(form_upload);
    assert_unchanged(&server, &before);

    // the artifact is whole, the manifest is not
    let mut last_part = Raw::request(&server, &put, &[&length(&form), &content_type]);
    last_part.send(&form[..form.len() - 30]);
    wait_until("some of it has come", || received().then_some(()));
    drop(last_part);
    assert_unchanged(&server, &before);
}

#[test]
fn of_two_uploads_at_once_one_is_whole_and_runs() {
    let server = start();
    let (echo, count) = (native("echo"), wasm("word-count"));
    let put = |artifact: &[u8]| server.operator("PUT", "/v1/tenants/t/plugins/raced", &[], artifact);
    for round in 0..5 {
        let statuses = std::thread::scope(|scope| {
            let both = [&echo, &count].map(|artifact| scope.spawn(|| put(artifact)));
            let mut statuses = both.map(|upload| upload.join().unwrap().status);
            statuses.sort_unstable();
            statuses
        });
        assert_eq!(statuses, if round == 0 { [200, 201] } else { [200, 200] });
        let plugin = server.get("/v1/tenants/t/plugins/raced").expect(200).json();
        let output = server.operator("POST", "/v1/tenants/t/plugins/raced/jobs", &[], b"a b").expect(200).text();
        match plugin["runtime"].as_str().unwrap() {
            "native" => assert_eq!((output.as_str(), &plugin["bytes"]), ("a b", &json!(echo.len()))),
            _ => assert!(output.starts_with("lines ") && plugin["bytes"] == count.len(), "{plugin}: {output}"),
        }
        let revision = plugin["revision"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
        assert!(stored(&server).contains(&revision) && stored(&server).len() <= 3, "{:?}", stored(&server));
    }
    server.assert_healthy();
}

#[test]
fn jobs_run_whole_revisions_while_these_are_replaced() {
    let server = start();
    let (echo, count) = (native("echo"), native("word-count"));
    std::thread::scope(|scope| {
        let uploads = scope.spawn(|| {
            for i in 0..20 {
                server.operator("PUT", PATH, &[], [&count, &echo][i % 2]).expect(200);
            }
        });
        let mut runs = 0;
        while !uploads.is_finished() || runs < 5 {
            let output = server.operator("POST", JOBS, &[], b"a b").expect(200).text();
            assert!(output == "a b" || output.starts_with("lines "), "{output}");
            runs += 1;
        }
    });
    server.assert_healthy();
}
