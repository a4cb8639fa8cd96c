//! The main job, through the front door: both forms of a real plugin on real input. And what a newcomer runs first.

mod support;

use std::process::Command;

use serde_json::json;
use support::{Server, native, wasm};

const TEXT: &str = include_str!("../host/LICENSE");

#[test]
fn the_same_source_gives_the_same_output_as_native_code_and_as_wasm() {
    let server = Server::start();
    server.tenant("acme", &json!({}));
    server.upload("acme", "native", &native("word-count"));
    server.upload("acme", "wasm", &wasm("word-count"));
    let run = |plugin: &str| {
        let path = format!("/v1/tenants/acme/plugins/{plugin}/jobs");
        let answer = server.operator("POST", &path, &[], TEXT.as_bytes()).expect(200);
        assert_eq!(answer.header("holm-outcome"), "exited");
        answer.text()
    };
    let output = run("native");
    assert!(output.starts_with("lines 202\nwords 1607\nbytes 11358\nthe 100\n"), "{output}");
    assert_eq!(output, run("wasm"));
}

#[test]
fn the_demo_shows_good_and_bad_jobs_and_leaves_nothing() {
    let demo = Command::new(env!("CARGO_BIN_EXE_holm")).arg("demo").output().unwrap();
    let (said, complained) = (String::from_utf8(demo.stdout).unwrap(), String::from_utf8_lossy(&demo.stderr));
    assert!(demo.status.success(), "{said}\n{complained}");
    for shown in [
        "Output of both:\n  lines 202\n  words 1607",
        "hello from `http-hello` of acme",
        "escapes begin with",
        r#""limit":"memory_bytes""#,
        r#""limit":"output_bytes""#,
        "Nothing is left of it.",
    ] {
        assert!(said.contains(shown), "{shown} is missing in:\n{said}");
    }
    assert_eq!(complained, "");
}
