//! Requests that are too large: up to the limit they are taken, beyond it they are refused, announced or not.

mod support;

use std::time::Instant;

use serde_json::json;
use support::raw::{Raw, head};
use support::slowness::at_most;
use support::{Answer, PATIENCE, Server, native, wat};

const TENANT: &str = "/v1/tenants/t";
const PLUGIN: &str = "/v1/tenants/t/plugins/p";
const JOBS: &str = "/v1/tenants/t/plugins/probe/jobs";

const MIB: usize = 1 << 20;

fn start() -> Server {
    Server::start().with_probe()
}

/// Sends the body in chunks, without its length.
fn chunked(server: &Server, line: &str, headers: &[&str], body: &[u8]) -> Answer {
    let mut raw = Raw::request(server, line, &[headers, &["Transfer-Encoding: chunked"]].concat());
    for chunk in body.chunks(100_000) {
        if !raw.chunk(chunk) {
            break;
        }
    }
    raw.chunk(b"");
    raw.answered()
}

/// Announces a body of so many bytes and sends none of it.
fn announced(server: &Server, line: &str, headers: &[&str], bytes: usize) -> Answer {
    let length = format!("Content-Length: {bytes}");
    Raw::request(server, line, &[headers, &[&length]].concat()).answered()
}

#[test]
fn json_has_one_mib_at_most() {
    let server = start();
    let body = |bytes: usize| format!("{{{}}}", " ".repeat(bytes - 2)).into_bytes();
    let (put, json) = (format!("PUT {TENANT}"), "Content-Type: application/json");
    server.operator("PUT", TENANT, &[], &body(MIB)).expect(200);
    chunked(&server, &put, &[json], &body(MIB)).expect(200);
    assert_eq!(announced(&server, &put, &[json], MIB + 1).problem(413), "payload_too_large");
    assert_eq!(chunked(&server, &put, &[json], &body(MIB + 1)).problem(413), "payload_too_large");
    server.assert_healthy();
}

#[test]
fn an_artifact_has_as_many_bytes_as_the_tenant_s_quota() {
    let server = start();
    server.patch_json(TENANT, &json!({"quota": {"artifact_bytes": 4096}})).expect(200);
    let artifact = |bytes: usize| {
        let text = wat("", "");
        format!("{text}{}", " ".repeat(bytes - text.len())).into_bytes()
    };
    let put = format!("PUT {PLUGIN}");
    server.operator("PUT", PLUGIN, &[], &artifact(4096)).expect(201);
    chunked(&server, &put, &[], &artifact(4096)).expect(200);
    let before = server.get(PLUGIN).json();
    for answer in [announced(&server, &put, &[], 4097), chunked(&server, &put, &[], &artifact(4097))] {
        assert_eq!((answer.problem(413), &answer.json()["maximum"]), ("payload_too_large".into(), &json!(4096)));
    }
    assert_eq!(server.get(PLUGIN).json(), before);
    assert_eq!(server.data().join("tmp").read_dir().unwrap().count(), 0);
    server.operator("POST", &format!("{PLUGIN}/jobs"), &[], b"").expect(200);
}

#[test] // H5
fn parts_of_a_form_have_the_same_limits() {
    let server = start();
    server.patch_json(TENANT, &json!({"quota": {"artifact_bytes": 4096}})).expect(200);
    let put = |parts: &[(&str, &[u8])]| {
        let (content_type, body) = support::raw::multipart(parts);
        server.operator("PUT", PLUGIN, &[("content-type", &content_type)], &body)
    };
    let (artifact, manifest) = (wat("", "").into_bytes(), vec![b' '; MIB + 1]);
    put(&[("artifact", &artifact)]).expect(201);
    assert_eq!(put(&[("artifact", &[b' '; 4097])]).problem(413), "payload_too_large");
    assert_eq!(put(&[("artifact", &artifact), ("manifest", &manifest)]).problem(413), "payload_too_large");
    assert_eq!(put(&[("artifact", &vec![b' '; 3 * MIB])]).problem(413), "payload_too_large");
    assert_eq!(server.data().join("tmp").read_dir().unwrap().count(), 0);
}

#[test]
fn input_has_as_many_bytes_as_the_limit() {
    let server = start();
    let (args, limits) = (r#"Holm-Args: ["count"]"#, r#"Holm-Limits: {"input_bytes": 1000}"#);
    let post = format!("POST {JOBS}");
    let headers = [("holm-args", r#"["count"]"#), ("holm-limits", r#"{"input_bytes": 1000}"#)];
    assert_eq!(server.operator("POST", JOBS, &headers, &[b'x'; 1000]).expect(200).text(), "1000\n");
    assert_eq!(chunked(&server, &post, &[args, limits], &[b'x'; 1000]).expect(200).text(), "1000\n");

    let jobs = || server.get("/v1/tenants/t/jobs").json()["jobs"].as_array().unwrap().len();
    let before = jobs();
    let announced = announced(&server, &post, &[args, limits], 1001);
    assert_eq!((announced.problem(413), jobs()), ("payload_too_large".into(), before), "nothing has run");

    for prefer in ["Prefer: return=minimal", "Prefer: return=representation"] {
        let streamed = chunked(&server, &post, &[args, limits, prefer], &[b'x'; 1001]);
        assert_eq!((streamed.problem(413), &streamed.json()["maximum"]), ("payload_too_large".into(), &json!(1000)));
        let record = server.get(&format!("/v1/jobs/{}", streamed.header("holm-job-id"))).expect(200).json();
        assert_eq!(
            record["outcome"],
            json!({"kind": "over_limit", "limit": "input_bytes", "allowed": 1000, "reached": 1001})
        );
        assert_eq!(
            (streamed.header("holm-outcome"), streamed.json()["job_id"].clone()),
            ("over_limit", record["id"].clone())
        );
        assert!(streamed.header("server-timing").starts_with("queue;dur="), "{streamed:?}");
    }
    server.assert_healthy();
}

#[test]
fn a_client_that_sends_all_before_it_reads_gets_its_refusal() {
    let server = start();
    let body = vec![b'x'; 20 * MIB];
    for (method, path, headers, status) in [
        ("PUT", TENANT, &[][..], 413),
        ("PUT", PLUGIN, &[("content-encoding", "gzip")], 415),
        ("PUT", "/v1/tenants/nobody/plugins/p", &[], 404),
        ("POST", JOBS, &[], 413),
        ("POST", JOBS, &[("holm-args", "{")], 400),
        ("POST", "/v1/nowhere", &[], 404),
    ] {
        let answer = server.operator(method, path, headers, &body);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
        assert_eq!(answer.header("connection"), "close", "{method} {path}");
    }
    server.send("", "PUT", PLUGIN, &[], &body).problem(401);
    server.assert_healthy();
}

#[test]
fn h2_a_body_without_an_end_is_not_read_for_ever() {
    let server = Server::start_with("header_timeout_ms = 500").with_probe();
    let mut raw = Raw::request(&server, &format!("PUT {TENANT}"), &["Transfer-Encoding: chunked"]);
    let (chunk, begun) = (vec![b' '; 100_000], Instant::now());
    while raw.chunk(&chunk) {
        assert!(begun.elapsed() < at_most(PATIENCE), "it takes everything");
    }
    assert_eq!(raw.answered().problem(413), "payload_too_large");
    server.assert_healthy();
}

#[test]
fn h5_a_uri_has_8_kib_at_most() {
    let server = start();
    let path = |bytes: usize| format!("/{}", "x".repeat(bytes - 1));
    assert_eq!(server.get(&path(8 * 1024)).problem(404), "not_found");
    assert_eq!(server.get(&path(8 * 1024 + 1)).problem(414), "uri_too_long");
    assert_eq!(server.get(&format!("/healthz?{}", path(8 * 1024))).problem(414), "uri_too_long");
    assert_eq!(server.send("", "GET", &path(9000), &[], b"").problem(414), "uri_too_long");
    // beyond what HTTP parsing itself takes, the status alone tells it
    for bytes in [70_000, 1_000_000] {
        let mut raw = Raw::connect(&server);
        raw.offer(head(&format!("GET {}", path(bytes)), &[]).as_bytes());
        let status = raw.answered().status;
        assert!(matches!(status, 414 | 431), "{bytes}: {status}");
    }
    server.assert_healthy();
}

#[test]
fn h5_a_request_has_128_header_fields_at_most() {
    let server = start();
    let status = |fields: usize| {
        // two are there already: `Host` and `Authorization`
        let headers: Vec<String> = (2..fields).map(|i| format!("X-{i}: y")).collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let mut raw = Raw::connect(&server);
        raw.offer(head("GET /v1/tenants", &headers).as_bytes());
        raw.answered().status
    };
    assert_eq!((status(128), status(129), status(100_000)), (200, 431, 431));
    server.assert_healthy();
}

#[test]
fn h5_the_headers_of_a_request_have_64_kib_at_most() {
    let server = start();
    // names, values, and four bytes of punctuation each; the two fields that are there already counted with them
    let own: usize = head("", &[]).len() - " HTTP/1.1\r\n".len() - 2;
    let status = |bytes: usize| {
        let mut fields: Vec<String> = (0..8).map(|i| format!("X-{i}: {}", "y".repeat(8000 - 7))).collect();
        fields.push(format!("X-9: {}", "y".repeat(bytes - own - 8 * 8000 - 7)));
        let headers: Vec<&str> = fields.iter().map(String::as_str).collect();
        let mut raw = Raw::connect(&server);
        raw.offer(head("GET /v1/tenants", &headers).as_bytes());
        raw.answered()
    };
    status(64 * 1024).expect(200);
    assert_eq!(status(64 * 1024 + 1).problem(431), "headers_too_large");
    assert_eq!((status(100_000).status, status(5 * MIB).status), (431, 431));
    server.assert_healthy();
}

#[test]
fn the_largest_artifact_of_the_default_quota_is_64_mib() {
    let server = start();
    let put = format!("PUT {PLUGIN}");
    assert_eq!(announced(&server, &put, &[], 64 * MIB + 1).problem(413), "payload_too_large");
    let mut raw = Raw::request(&server, &put, &[&format!("Content-Length: {}", 64 * MIB), "Expect: 100-continue"]);
    assert_eq!(raw.answered().status, 100);
    server.upload("t", "p", &native("echo"));
}
