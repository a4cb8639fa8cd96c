//! What a job gets from its request, its plugin, its tenant and the server: arguments, environment, limits.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeMap;

use serde_json::{Value, json};
use support::{Answer, Server, native, wat};

const PROBE: &str = "/v1/tenants/t/plugins/probe";
const JOBS: &str = "/v1/tenants/t/plugins/probe/jobs";

fn run(server: &Server, headers: &[(&str, &str)]) -> Answer {
    server.operator("POST", JOBS, headers, b"")
}

/// The limits that a job of the probe had, the request giving `limits`.
fn limits(server: &Server, limits: &Value) -> Value {
    server.probe(&["exit", "0"], limits)["limits"].clone()
}

/// The environment that a job of the probe sees.
fn environment(server: &Server, headers: &[(&str, &str)]) -> (String, BTreeMap<String, String>) {
    let headers: Vec<_> = headers.iter().copied().chain([("holm-args", r#"["report"]"#)]).collect();
    let answer = run(server, &headers).expect(200);
    let env = answer.json()["env"].as_object().unwrap().clone();
    let env = env.into_iter().map(|(name, value)| (name, value.as_str().unwrap().to_owned())).collect();
    (answer.header("holm-job-id").to_owned(), env)
}

#[test]
fn argv_is_the_plugin_s_name_and_the_arguments() {
    let server = Server::start().with_probe();
    server.upload("t", "other-name", &native("probe"));
    for name in ["probe", "other-name"] {
        let report = server.job("t", name, &json!(["report"]), &json!({}), b"");
        let report: Value = serde_json::from_str(report["output"].as_str().unwrap()).unwrap();
        assert_eq!(report["args"], json!([name, "report"]));
        let odd = server.job("t", name, &json!(["", "a b", "-x", "\\ $HOME '\""]), &json!({}), b"");
        assert_eq!(odd["stderr_tail"], r#"probe: no verb ["", "a b", "-x", "\\ $HOME '\""]"#.to_owned() + "\n");
    }
}

#[test]
fn a_request_s_arguments_replace_the_plugin_s() {
    let server = Server::start().with_probe();
    server.patch_json(PROBE, &json!({"args": ["args"]})).expect(200);
    assert_eq!(run(&server, &[]).expect(200).json(), json!(["probe", "args"]));
    let escaped =
        run(&server, &[("holm-args", r#"["stderr", "\u00e4\ud83d\ude00 \"\\"]"#), ("prefer", "return=representation")]);
    assert_eq!(escaped.expect(200).json()["stderr_tail"], "ä😀 \"\\");
    assert_eq!(run(&server, &[("holm-args", "[]")]).json()["stderr_tail"], "probe: no verb []\n");
}

#[test]
fn the_environment_is_exactly_what_the_contract_lists() {
    let server = Server::start().with_probe();
    let (id, env) = environment(&server, &[("content-type", "text/x-thing; a=b")]);
    let expected = [
        ("HOLM_JOB_ID", id.as_str()),
        ("HOLM_TENANT", "t"),
        ("HOLM_PLUGIN", "probe"),
        ("HOLM_CONTENT_TYPE", "text/x-thing; a=b"),
        ("PATH", "/bin"),
        ("HOME", "/tmp"),
        ("TMPDIR", "/tmp"),
        ("LANG", "C.UTF-8"),
    ];
    let expected: BTreeMap<String, String> = expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    assert_eq!(env, expected);
    assert_eq!(environment(&server, &[]).1["HOLM_CONTENT_TYPE"], "");
}

#[test]
fn a_request_s_environment_is_laid_over_the_plugin_s() {
    let server = Server::start().with_probe();
    server.patch_json(PROBE, &json!({"env": {"A": "plugin", "B": "plugin", "LANG": "de"}})).expect(200);
    let (_, env) = environment(&server, &[("holm-env", r#"{"B": "request", "C": "\u00e4=\n", "D": ""}"#)]);
    let own: Vec<&str> = ["A", "B", "C", "D", "LANG"].map(|name| env[name].as_str()).into();
    assert_eq!(own, ["plugin", "request", "ä=\n", "", "de"]);
    let (_, env) = environment(&server, &[]);
    assert_eq!((env["B"].as_str(), env.contains_key("C")), ("plugin", false), "a request changes nothing for the next");
}

#[test]
fn nobody_sets_the_host_s_own_variables() {
    let server = Server::start().with_probe();
    for name in ["HOLM_TENANT", "HOLM_JOB_ID", "HOLM_NEW"] {
        let env = json!({ name: "x" });
        assert_eq!(run(&server, &[("holm-env", &env.to_string())]).problem(422), "invalid_settings", "{name}");
        assert_eq!(server.patch_json(PROBE, &json!({ "env": env })).problem(422), "invalid_settings", "{name}");
    }
    environment(&server, &[("holm-env", r#"{"XHOLM_TENANT": "x"}"#)]);
}

#[test]
fn the_first_given_limit_holds_request_plugin_tenant_server() {
    let server = Server::start_with("[job_defaults]\npids = 11\nopen_files = 111\n").with_probe();
    assert_eq!(limits(&server, &json!({}))["pids"], 11, "the server's");
    assert_eq!(limits(&server, &json!({}))["scratch_inodes"], 1024, "the contract's");
    server.tenant("t", &json!({"job_defaults": {"pids": 12}}));
    assert_eq!(limits(&server, &json!({}))["pids"], 12, "the tenant's");
    server.patch_json(PROBE, &json!({"limits": {"pids": 13}})).expect(200);
    assert_eq!(limits(&server, &json!({}))["pids"], 13, "the plugin's");
    assert_eq!(limits(&server, &json!({"pids": 14}))["pids"], 14, "the request's");
    assert_eq!(limits(&server, &json!({"pids": 14}))["open_files"], 111, "each by itself");
    server.patch_json(PROBE, &json!({"limits": null})).expect(200);
    server.patch_json("/v1/tenants/t", &json!({"job_defaults": null})).expect(200);
    assert_eq!(limits(&server, &json!({}))["pids"], 11, "and back");
}

#[test]
fn limits_show_what_applies_to_the_runtime() {
    let server = Server::start().with_probe();
    server.upload("t", "wasm", wat("", "").as_bytes());
    let native = limits(&server, &json!({}));
    assert!(native.get("fuel").is_none(), "{native}");
    assert_eq!((&native["stack_bytes"], &native["cpu_cores"]), (&json!(8 << 20), &json!(1)));
    let wasm = server.job("t", "wasm", &json!([]), &json!({"fuel": 5000, "cpu_cores": 0.25}), b"")["limits"].clone();
    assert_eq!(
        (&wasm["stack_bytes"], &wasm["fuel"], &wasm["cpu_cores"]),
        (&json!(1 << 20), &json!(5000), &json!(0.25))
    );
}

#[test]
fn a_stored_value_above_a_maximum_that_was_lowered_later_is_cut_to_it() {
    let server = Server::start().with_probe();
    server.tenant("t", &json!({"job_defaults": {"open_files": 200}}));
    server.patch_json(PROBE, &json!({"limits": {"pids": 50}})).expect(200);
    server.patch_json("/v1/tenants/t", &json!({"job_maximums": {"pids": 20, "open_files": 30}})).expect(200);
    let now = limits(&server, &json!({}));
    assert_eq!((&now["pids"], &now["open_files"]), (&json!(20), &json!(30)), "the plugin's, and the tenant's");
    assert_eq!(server.get(PROBE).json()["effective_limits"]["pids"], 20);
    assert_eq!(server.get(PROBE).json()["limits"]["pids"], 50, "what was set is kept");
    // it is in nobody's way
    server.patch_json(PROBE, &json!({"args": ["exit", "0"]})).expect(200);
    server.upload("t", "probe", &native("probe"));
    server.patch_json("/v1/tenants/t", &json!({"fresh_netns": true})).expect(200);
    // what is given now is never cut
    let refused = run(&server, &[("holm-limits", r#"{"pids": 21}"#)]);
    assert_eq!(refused.problem(422), "limit_out_of_range");
    for (path, patch) in
        [(PROBE, json!({"limits": {"pids": 49}})), ("/v1/tenants/t", json!({"job_defaults": {"pids": 21}}))]
    {
        assert_eq!(server.patch_json(path, &patch).problem(422), "limit_out_of_range", "{path}");
    }
    server.patch_json("/v1/tenants/t", &json!({"job_maximums": null})).expect(200);
    assert_eq!(limits(&server, &json!({}))["pids"], 50);
}

#[test]
fn a_server_s_maximum_binds_every_tenant() {
    let server = Server::start_with("[job_maximums]\nwall_time_ms = 5000\n").with_probe();
    assert_eq!(limits(&server, &json!({}))["wall_time_ms"], 5000);
    assert_eq!(limits(&server, &json!({"wall_time_ms": 4000}))["wall_time_ms"], 4000);
    let refused = run(&server, &[("holm-limits", r#"{"wall_time_ms": 5001}"#)]);
    assert_eq!((refused.problem(422), &refused.json()["maximum"]), ("limit_out_of_range".into(), &json!(5000)));
    let raised = server.put_json("/v1/tenants/u", &json!({"job_maximums": {"wall_time_ms": 5001}}));
    assert_eq!(raised.problem(422), "limit_out_of_range");
    server.put_json("/v1/tenants/u", &json!({"job_maximums": {"wall_time_ms": 4999}})).expect(201);
}

#[test]
fn a_tenant_s_new_settings_hold_for_its_next_job() {
    let server = Server::start().with_probe();
    server.patch_json("/v1/tenants/t", &json!({"job_maximums": {"input_bytes": 3}})).expect(200);
    assert_eq!(server.operator("POST", JOBS, &[("holm-args", r#"["count"]"#)], b"abc").expect(200).text(), "3\n");
    let refused = server.operator("POST", JOBS, &[("holm-args", r#"["count"]"#)], b"abcd");
    assert_eq!(refused.problem(413), "payload_too_large");
}
