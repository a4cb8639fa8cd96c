//! The main job, through the front door: both forms of a real plugin on real input.

mod support;

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
