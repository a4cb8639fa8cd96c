//! Requests that cannot be taken: each is answered with what is wrong, and changes nothing.

mod support;

use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Value, json};
use support::raw::{Raw, head};
use support::{Answer, Server, native, wat};

const TENANT: &str = "/v1/tenants/t";
const PLUGIN: &str = "/v1/tenants/t/plugins/probe";
const JOBS: &str = "/v1/tenants/t/plugins/probe/jobs";

const JSON: (&str, &str) = ("content-type", "application/json");

const MIB: u64 = 1 << 20;

/// Every route that takes JSON, on what is there.
const JSON_ROUTES: [(&str, &str); 3] = [("PUT", TENANT), ("PATCH", TENANT), ("PATCH", PLUGIN)];

fn start() -> Server {
    Server::start().with_probe()
}

fn run(server: &Server, headers: &[(&str, &str)], input: &[u8]) -> Answer {
    server.operator("POST", JOBS, headers, input)
}

/// What tenant and plugin are set to.
fn settings(server: &Server) -> [Value; 2] {
    [server.get(TENANT).expect(200).json(), server.get(PLUGIN).expect(200).json()]
}

#[test] // H5
fn what_is_no_json_object_is_400_and_changes_nothing() {
    let server = start();
    let before = settings(&server);
    let deep = format!("{}{}", "{\"limits\":".repeat(80_000), "}".repeat(80_000));
    let bodies: [&[u8]; 16] = [
        b"",
        b" ",
        b"{",
        b"}",
        b"{}{}",
        b"{} x",
        b"[]",
        b"[{}]",
        b"null",
        b"1",
        b"\"{}\"",
        b"{\"limits\": }",
        b"{'limits': {}}",
        b"\xff\xfe{}",
        b"{\"limits\": {\"\xff\": 1}}",
        deep.as_bytes(),
    ];
    for (method, path) in JSON_ROUTES {
        for body in bodies {
            let answer = server.operator(method, path, &[JSON], body);
            let start = String::from_utf8_lossy(&body[..body.len().min(40)]);
            assert_eq!(answer.problem(400), "malformed_request", "{method} {path} {start}");
        }
    }
    assert_eq!(settings(&server), before);
    server.assert_healthy();
}

#[test]
fn unknown_fields_and_wrong_types_are_400_and_change_nothing() {
    let server = start();
    let before = settings(&server);
    let tenants = [
        json!({"nonsense": 1}),
        json!({"nonsense": null}),
        json!({"Quota": {}}),
        json!({"limits": {"memory": 1}}),
        json!({"limits": []}),
        json!({"quota": {"jobs": 1}}),
        json!({"quota": {"plugins": "1"}}),
        json!({"quota": 1}),
        json!({"job_defaults": {"memory": 1}}),
        json!({"job_defaults": {"pids": "1"}}),
        json!({"job_maximums": {"pids": true}}),
        json!({"job_maximums": {"pids": 1.5}}),
        json!({"fresh_netns": "yes"}),
    ];
    for body in tenants {
        for answer in [server.put_json(TENANT, &body), server.patch_json(TENANT, &body)] {
            assert_eq!(answer.problem(400), "malformed_request", "{body}");
        }
    }
    for body in [
        json!({"nonsense": 1}),
        json!({"nonsense": null}),
        json!({"interface": "ftp"}),
        json!({"args": "x"}),
        json!({"args": [1]}),
        json!({"env": ["A=b"]}),
        json!({"env": {"A": 1}}),
        json!({"limits": {"pids": [1]}}),
        json!({"limits": {"memory": 1}}),
        json!({"public": 1}),
        json!({"output_content_type": 1}),
        json!({"name": "other"}),
        json!({"revision": "sha256:0"}),
    ] {
        assert_eq!(server.patch_json(PLUGIN, &body).problem(400), "malformed_request", "{body}");
    }
    // a null takes away what is there; what never can be there is a mistake all the same
    for body in [
        json!({"limits": {"memory": null}}),
        json!({"quota": {"jobs": null}}),
        json!({"job_defaults": {"memory": null}}),
        json!({"job_maximums": {"pids": 5, "memory": null}}),
    ] {
        assert_eq!(server.patch_json(TENANT, &body).problem(400), "malformed_request", "{body}");
    }
    assert_eq!(server.patch_json(PLUGIN, &json!({"limits": {"memory": null}})).problem(400), "malformed_request");
    let twice = server.operator("PUT", TENANT, &[JSON], b"{\"quota\": {}, \"quota\": {\"plugins\": 1}}");
    assert_eq!(twice.problem(400), "malformed_request");
    assert_eq!(settings(&server), before);
    server.patch_json(PLUGIN, &json!({"env": {"NEVER_SET": null}, "limits": {"pids": null}})).expect(200);
}

/// Key, minimum for native plugins, and maximum of each limit that is an integer, as the contract has them.
const LIMITS: [(&str, u64, u64); 10] = [
    ("memory_bytes", 4 * MIB, 4096 * MIB),
    ("cpu_weight", 1, 10_000),
    ("cpu_time_ms", 10, 3_600_000),
    ("wall_time_ms", 10, 3_600_000),
    ("pids", 1, 4096),
    ("output_bytes", 1, 256 * MIB),
    ("input_bytes", 1, 256 * MIB),
    ("scratch_bytes", 4096, 1024 * MIB),
    ("scratch_inodes", 16, 65_536),
    ("stack_bytes", 64 * 1024, 64 * MIB),
];

/// Checks that an answer says exactly what is out of which range.
#[track_caller]
fn out_of_range(answer: &Answer, limit: &str, given: &Value, minimum: &Value, maximum: &Value) {
    assert_eq!(answer.problem(422), "limit_out_of_range", "{limit} = {given}");
    let body = answer.json();
    let said = [&body["limit"], &body["given"], &body["minimum"], &body["maximum"]];
    assert_eq!(said, [&json!(limit), given, minimum, maximum]);
}

#[test]
fn r16_the_ends_of_each_range_are_taken_and_what_lies_beyond_is_422() {
    let server = start();
    let patch = |limit: &str, value: &Value| server.patch_json(PLUGIN, &json!({"limits": {limit: value}}));
    let check = |limit: &str, least: &Value, most: &Value, beyond: [Value; 2]| {
        for value in [least, most] {
            assert_eq!(&patch(limit, value).expect(200).json()["limits"][limit], value, "{limit}");
        }
        patch(limit, &Value::Null).expect(200);
        for value in beyond {
            out_of_range(&patch(limit, &value), limit, &value, least, most);
        }
    };
    for (limit, minimum, maximum) in LIMITS {
        check(limit, &json!(minimum), &json!(maximum), [json!(minimum - 1), json!(maximum + 1)]);
    }
    let cpus = std::thread::available_parallelism().unwrap().get();
    check("cpu_cores", &json!(0.01), &json!(cpus), [json!(0.009), json!(cpus as f64 + 0.01)]);
    // no job can have more than the server itself
    let files = getrlimit(Resource::RLIMIT_NOFILE).unwrap().1.min(16_384);
    check("open_files", &json!(16), &json!(files), [json!(15), json!(files + 1)]);
    server.upload("t", "probe", wat("", "").as_bytes());
    check("fuel", &json!(1), &json!((1_u64 << 53) - 1), [json!(0), json!(1_u64 << 53)]);
    check("memory_bytes", &json!(16 * MIB), &json!(4096 * MIB), [json!(16 * MIB - 1), json!(4096 * MIB + 1)]);
}

#[test] // R16, H5
fn r16_no_value_means_unlimited_wherever_it_stands() {
    let server = start();
    let before = settings(&server);
    for (limit, minimum, maximum) in LIMITS {
        for text in ["0", "-1", "1e308", "-1e308", "18446744073709551616", "99999999999999999999999999"] {
            let limits = format!("{{\"{limit}\": {text}}}");
            let within = |field: &str| format!("{{\"{field}\": {limits}}}");
            let (minimum, maximum) = (json!(minimum), json!(maximum));
            let given: Value = serde_json::from_str(text).unwrap();
            let patch = |path: &str, field: &str| server.operator("PATCH", path, &[JSON], within(field).as_bytes());
            for answer in [
                run(&server, &[("holm-limits", &limits)], b""),
                patch(PLUGIN, "limits"),
                patch(TENANT, "job_defaults"),
                patch(TENANT, "job_maximums"),
            ] {
                out_of_range(&answer, limit, &given, &minimum, &maximum);
            }
        }
    }
    for quota in
        ["jobs_running", "jobs_queued", "plugins", "artifact_bytes", "requests_per_second", "stored_output_bytes"]
    {
        for value in [json!(0), json!(-1), json!(1e308)] {
            let answer = server.patch_json(TENANT, &json!({"quota": {quota: value}}));
            assert_eq!(answer.problem(422), "limit_out_of_range", "{quota} = {value}");
            assert_eq!((&answer.json()["limit"], &answer.json()["given"]), (&json!(format!("quota.{quota}")), &value));
        }
    }
    for limit in ["memory_bytes", "cpu_cores", "cpu_weight", "pids"] {
        for value in [json!(0), json!(-1), json!(1e308)] {
            let answer = server.patch_json(TENANT, &json!({"limits": {limit: value}}));
            assert_eq!(answer.problem(422), "limit_out_of_range", "{limit} = {value}");
        }
    }
    assert_eq!(settings(&server), before);
    assert_eq!(server.get("/v1/tenants/t/jobs").json()["jobs"], json!([]), "nothing has run");
}

#[test]
fn a_tenant_s_maximum_binds_requests_plugins_and_defaults() {
    let server = start();
    server.patch_json(TENANT, &json!({"job_maximums": {"pids": 8}})).expect(200);
    run(&server, &[("holm-limits", r#"{"pids": 8}"#), ("holm-args", r#"["exit", "0"]"#)], b"").expect(200);
    for answer in [
        run(&server, &[("holm-limits", r#"{"pids": 9}"#)], b""),
        server.patch_json(PLUGIN, &json!({"limits": {"pids": 9}})),
        server.patch_json(TENANT, &json!({"job_defaults": {"pids": 9}})),
    ] {
        out_of_range(&answer, "pids", &json!(9), &json!(1), &json!(8));
    }
}

#[test]
fn fuel_for_a_native_plugin_is_422_and_for_wasm_it_is_not() {
    let server = start();
    server.upload("t", "wasm", wat("", "").as_bytes());
    let limits = [("holm-limits", r#"{"fuel": 1000000}"#)];
    for answer in [run(&server, &limits, b""), server.patch_json(PLUGIN, &json!({"limits": {"fuel": 5}}))] {
        assert_eq!((answer.problem(422), &answer.json()["limit"]), ("not_applicable".into(), &json!("fuel")));
    }
    server.operator("POST", "/v1/tenants/t/plugins/wasm/jobs", &limits, b"").expect(200);
    server.patch_json("/v1/tenants/t/plugins/wasm", &json!({"limits": {"fuel": 5}})).expect(200);
    // a native program in the place of one that has a limit on its fuel
    let replaced = server.operator("PUT", "/v1/tenants/t/plugins/wasm", &[], &native("probe"));
    assert_eq!(replaced.problem(422), "not_applicable");
    assert_eq!(server.get("/v1/tenants/t/plugins/wasm").json()["runtime"], "wasm");
}

#[test]
fn settings_that_this_server_cannot_enforce_are_422_by_name() {
    let server = start();
    let before = settings(&server);
    let body = json!({"limits": {"egress_bps": 1}});
    for answer in [server.put_json(TENANT, &body), server.patch_json(TENANT, &body)] {
        assert_eq!(
            (answer.problem(422), &answer.json()["field"]),
            ("not_available".into(), &json!("limits.egress_bps"))
        );
    }
    let http = server.patch_json(PLUGIN, &json!({"interface": "http"}));
    assert_eq!(http.problem(422), "not_available");
    let http = server.operator("PUT", &format!("{PLUGIN}?interface=http"), &[], &native("echo"));
    assert_eq!(http.problem(422), "not_available");
    assert_eq!(settings(&server), before);
}

#[test]
fn a_priority_is_a_whole_number_up_to_1000() {
    let server = start();
    for good in [json!(0), json!(1000), json!(5.0)] {
        assert_eq!(server.patch_json(TENANT, &json!({ "priority": good })).expect(200).json()["priority"], good);
    }
    for bad in [json!(-1), json!(1001), json!(1e300), json!(u64::MAX)] {
        let answer = server.patch_json(TENANT, &json!({ "priority": bad }));
        out_of_range(&answer, "priority", &bad, &json!(0), &json!(1000));
    }
    for malformed in [json!("high"), json!(1.5), json!([1]), json!(true)] {
        let answer = server.patch_json(TENANT, &json!({ "priority": malformed }));
        assert_eq!(answer.problem(400), "malformed_request", "{malformed}");
    }
    assert!(server.patch_json(TENANT, &json!({"priority": null})).expect(200).json().get("priority").is_none());
}

#[test]
fn settings_that_would_not_survive_an_exec_or_a_header_are_422() {
    let server = start();
    let long = "x".repeat(70_000);
    for body in [
        json!({"args": ["a\0b"]}),
        json!({"args": [long]}),
        json!({"env": {"": "x"}}),
        json!({"env": {"A=B": "x"}}),
        json!({"env": {"A": "x\0"}}),
        json!({"output_content_type": "text"}),
        json!({"output_content_type": "text/plain\r\nX-Evil: 1"}),
        json!({"output_content_type": ""}),
    ] {
        assert_eq!(server.patch_json(PLUGIN, &body).problem(422), "invalid_settings", "{body}");
    }
    for headers in [("holm-args", r#"["a\u0000b"]"#), ("holm-env", r#"{"": "x"}"#), ("holm-env", r#"{"A=B": ""}"#)] {
        assert_eq!(run(&server, &[headers], b"").problem(422), "invalid_settings", "{headers:?}");
    }
}

#[test]
fn names_are_short_lower_case_and_no_paths() {
    let server = start();
    let long = "x".repeat(63);
    for good in ["a", "0", "a-b", "a-", long.as_str()] {
        server.put_json(&format!("/v1/tenants/{good}"), &json!({})).expect(201);
        server.upload("t", good, wat("", "").as_bytes());
        server.operator("POST", &format!("/v1/tenants/t/plugins/{good}/jobs"), &[], b"").expect(200);
    }
    let too_long = "x".repeat(64);
    for bad in ["A", "-a", "a_b", "a.b", "%2e%2e", "a%2fb", "a%20b", "a%00", "%c3%a4", "..%2f..%2fetc", &too_long] {
        let (tenant, plugin) = (format!("/v1/tenants/{bad}"), format!("/v1/tenants/t/plugins/{bad}"));
        assert_eq!(server.put_json(&tenant, &json!({})).problem(422), "invalid_name", "{bad}");
        assert_eq!(server.operator("PUT", &plugin, &[], wat("", "").as_bytes()).problem(422), "invalid_name", "{bad}");
        for path in [tenant, plugin] {
            assert_eq!(server.get(&path).problem(404), "not_found", "{path}");
            assert_eq!(server.operator("DELETE", &path, &[], b"").problem(404), "not_found", "{path}");
        }
    }
    assert_eq!(server.put_json("/v1/tenants/%ff", &json!({})).problem(404), "not_found", "what does not decode");
}

#[test]
fn json_routes_take_json_and_no_other_type() {
    let server = start();
    for (method, path) in JSON_ROUTES {
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"] {
            server.operator(method, path, &[("content-type", good)], b"{}").expect(200);
        }
        server.operator(method, path, &[], b"{}").expect(200);
        for bad in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonp",
            "application/xml",
            "json",
            "multipart/form-data; boundary=x",
        ] {
            let answer = server.operator(method, path, &[("content-type", bad)], b"{}");
            assert_eq!(answer.problem(415), "unsupported_media_type", "{method} {path} {bad}");
        }
    }
}

#[test]
fn no_body_may_be_encoded() {
    let server = start();
    let before = settings(&server);
    for (method, path) in JSON_ROUTES.into_iter().chain([("PUT", PLUGIN), ("POST", JOBS)]) {
        for encoding in ["gzip", "br", "identity", "nonsense"] {
            let answer = server.operator(method, path, &[("content-encoding", encoding)], b"{}");
            assert_eq!(answer.problem(415), "unsupported_media_type", "{method} {path} {encoding}");
        }
    }
    assert_eq!(settings(&server), before);
}

#[test]
fn headers_of_a_job_are_ascii_json_of_the_right_shape() {
    let server = start();
    for (name, values) in [
        (
            "holm-limits",
            &["", "x", "[]", "1", "null", "{", "{} {}", r#"{"pids": null}"#, r#"{"pids": "1"}"#, r#"{"memory": 1}"#][..],
        ),
        ("holm-args", &["", "x", "{}", "\"x\"", "[1]", "[null]", "[", "[]]"]),
        ("holm-env", &["", "x", "[]", r#"{"A": 1}"#, r#"{"A": null}"#, "{"]),
    ] {
        for value in values {
            assert_eq!(run(&server, &[(name, value)], b"").problem(400), "malformed_request", "{name}: {value}");
        }
    }
    assert_eq!(server.get("/v1/tenants/t/jobs").json()["jobs"], json!([]), "nothing has run");
}

#[test] // H5
fn headers_of_a_job_come_once_and_in_ascii() {
    let server = start();
    for (name, value) in [("Holm-Limits", "{}"), ("Holm-Args", r#"["exit", "0"]"#), ("Holm-Env", "{}")] {
        let once = format!("{name}: {value}");
        let mut raw = Raw::request(&server, &format!("POST {JOBS}"), &[&once, &once]);
        assert_eq!(raw.answered().problem(400), "malformed_request", "{name} twice");
    }
    for bad in [&b"Holm-Args: [\"\xc3\xa4\"]"[..], b"Holm-Args: [\"\xff\"]", b"Holm-Env: {\"\xc3\xa4\": \"x\"}"] {
        let mut raw = Raw::connect(&server);
        let head = head(&format!("POST {JOBS}"), &["@"]);
        let (before, after) = head.split_once('@').unwrap();
        raw.send(&[before.as_bytes(), bad, after.as_bytes()].concat());
        assert_eq!(raw.answered().problem(400), "malformed_request", "{bad:?}");
    }
    server.assert_healthy();
}

#[test]
fn headers_of_a_job_have_16_kib_at_most() {
    let server = start();
    let args = |bytes: usize| format!("[\"exit\", \"0\"{}]", " ".repeat(bytes - 13));
    let (most, more) = (args(16 * 1024), args(16 * 1024 + 1));
    assert_eq!(most.len(), 16 * 1024);
    run(&server, &[("holm-args", &most)], b"").expect(200);
    assert_eq!(run(&server, &[("holm-args", &more)], b"").problem(400), "malformed_request");
}
