//! `/fn`: what a guest sees of a request, what a client sees of the answer, and the job that it all is.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use support::function::{GUEST, ask, exchange, operator};
use support::raw::Raw;
use support::{Server, wait_until, wasm};

fn start() -> Server {
    Server::start().with_guest()
}

#[test]
fn the_guest_sees_path_and_query_byte_for_byte() {
    let server = start();
    for (sent, seen) in [
        ("", "/"),
        ("/", "/"),
        ("//", "//"),
        ("?x=1", "/?x=1"),
        ("/?", "/?"),
        ("/a/b%2Fc//d/?q=%20&r", "/a/b%2Fc//d/?q=%20&r"),
        ("/%00%ff%zz", "/%00%ff%zz"),
        ("/../t/./%2e%2e/", "/../t/./%2e%2e/"),
        ("/a;b=c,d:e@f?a=b=c?d/e", "/a;b=c,d:e@f?a=b=c?d/e"),
        ("/fn/other/plugin", "/fn/other/plugin"),
    ] {
        let mut raw = ask(&server, &format!("GET {sent}"), &[]);
        assert_eq!(raw.answered().expect(200).text(), format!("GET\n{seen}\nhttp\nholm\n"), "{sent:?}");
    }
    let long = format!("/{}", "a".repeat(8000));
    assert_eq!(server.call(&long).expect(200).text().lines().nth(1), Some(&*long));
    assert_eq!(server.call(&format!("/{}", "a".repeat(8200))).problem(414), "uri_too_long");
    let mut absolute = Raw::connect(&server);
    absolute.send(format!("GET http://other{GUEST}/a?b HTTP/1.1\r\nHost: holm\r\n{}\r\n\r\n", operator()).as_bytes());
    assert_eq!(absolute.answered().expect(200).text().lines().nth(1), Some("/a?b"));
    server.assert_guest_well();
}

#[test]
fn every_method_reaches_the_guest() {
    let server = start();
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE", "get", "M-SEARCH"] {
        let answer = ask(&server, &format!("{method} /a"), &[]).answered().expect(200);
        assert_eq!((answer.header("x-method"), answer.text().lines().next()), (method, Some(method)));
    }
    server.assert_guest_well();
}

#[test]
fn head_has_the_headers_of_get_and_no_body() {
    let server = start();
    let mut raw = ask(&server, "HEAD /a", &[]);
    let head = raw.head_of_answer().unwrap().expect(200);
    assert_eq!(head.header("x-method"), "HEAD");
    assert_eq!(head.header("content-length"), "", "nobody knows how long the answer to GET is");
    raw.head("GET /healthz", &[]);
    raw.answered().expect(200);
    let declared = ask(&server, "HEAD /length?declared=10&sent=10", &[]).head_of_answer().unwrap().expect(200);
    assert_eq!(declared.header("content-length"), "10");
    assert_eq!(server.finished(&declared)["outcome"], json!({"kind": "exited", "exit_code": 0}));
    server.assert_guest_well();
}

#[test]
fn headers_of_the_connection_and_of_the_host_do_not_reach_the_guest() {
    let server = start();
    let mut raw = ask(
        &server,
        "GET /headers",
        &[
            "Connection: keep-alive, X-Private",
            "Connection: other",
            "X-Private: 1",
            "Other: 1",
            "Keep-Alive: timeout=5",
            "TE: trailers",
            "Trailer: x-checksum",
            "Upgrade: websocket",
            "Proxy-Authorization: Basic eA==",
            "Proxy-Connection: keep-alive",
            "Holm-Limits: {\"fuel\": 1}",
            "Holm-Job-Id: forged",
            "Content-Type: text/x",
            "Cookie: a=b",
            "X-Twice: 1",
            "x-twice: 2",
            "X-Odd: \u{e4}",
            "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ],
    );
    let answer = raw.answered().expect(200);
    let expected = [
        "content-type: text/x",
        "cookie: a=b",
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "x-odd: \u{e4}",
        "x-twice: 1",
        "x-twice: 2",
    ];
    assert_eq!(answer.text().lines().collect::<Vec<_>>(), expected);
    let limits = &server.finished(&answer)["limits"];
    assert_eq!(limits["fuel"], 10_000_000_000_u64, "a call has no limits of its own");
    server.assert_guest_well();
}

#[test]
fn as_many_headers_as_a_request_may_have_reach_the_guest() {
    let server = start();
    let headers: Vec<String> = (0..120).map(|n| format!("X-{n}: {}", "v".repeat(500))).collect();
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    let answer = ask(&server, "GET /headers", &headers).answered().expect(200);
    assert_eq!(answer.text().lines().count(), 120);
    server.assert_guest_well();
}

#[test]
fn a_guest_cannot_speak_for_the_host_or_the_connection() {
    let server = start();
    for name in ["holm-job-id", "Holm-Outcome", "holm-anything", "te", "trailer", "expect"] {
        let answer = server.call(&format!("/header?name={name}&value=forged")).expect(200);
        assert_eq!(answer.text(), "set", "{name}");
        assert!(!answer.headers.values().any(|value| value == "forged"), "{name}: {:?}", answer.headers);
        server.finished(&answer);
    }
    for (name, value, verdict) in [
        ("connection", "close", "HeaderError::Forbidden"),
        ("transfer-encoding", "chunked", "HeaderError::Forbidden"),
        ("upgrade", "websocket", "HeaderError::Forbidden"),
        ("x-a", "b%0d%0aSet-Cookie:%20c=d", "HeaderError::InvalidSyntax"),
        ("x-a", "b%00", "HeaderError::InvalidSyntax"),
        ("x%0aa", "b", "HeaderError::InvalidSyntax"),
    ] {
        let answer = server.call(&format!("/header?name={name}&value={value}")).expect(200);
        assert_eq!((&*answer.text(), answer.header("set-cookie")), (verdict, ""), "{name}");
    }
    let answer = server.call("/header?name=x-content-type-options&value=none").expect(200);
    assert_eq!(answer.headers.get_all("x-content-type-options").iter().collect::<Vec<_>>(), ["nosniff"]);
    assert_eq!(server.call("/header?name=X-Own&value=1").expect(200).header("x-own"), "1");
    server.assert_guest_well();
}

#[test]
fn what_a_response_may_have_of_headers_passes_and_more_does_not() {
    let server = start();
    let answer = server.call("/headers-out?count=120&size=100").expect(200);
    assert_eq!(
        answer
            .headers
            .keys()
            .filter(|name| name.as_str().starts_with("x-") && name.as_str() != "x-content-type-options")
            .count(),
        120
    );
    for path in ["/headers-out?count=200", "/headers-out?count=10&size=8000"] {
        let answer = server.call(path);
        assert_eq!(answer.problem(502), "bad_response", "{path}");
        server.finished(&answer);
    }
    server.assert_guest_well();
}

#[test]
fn a_final_status_is_passed_on_and_an_informational_one_is_not() {
    let server = start();
    for status in [200, 201, 299, 301, 400, 401, 404, 418, 500, 502, 599, 999] {
        let answer = ask(&server, &format!("GET /status?code={status}"), &[]).answered();
        assert_eq!((answer.status, answer.text()), (status, "body".into()));
        assert_eq!(server.finished(&answer)["outcome"], json!({"kind": "exited", "exit_code": 0}));
    }
    for status in [204, 304] {
        let mut raw = ask(&server, &format!("GET /status?code={status}"), &[]);
        let answer = raw.head_of_answer().unwrap().expect(status);
        assert_eq!((answer.header("content-length"), answer.header("transfer-encoding")), ("", ""));
        raw.head("GET /healthz", &[]);
        assert_eq!(raw.answered().expect(200).text(), "ok\n");
    }
    for status in [100, 101, 102, 103, 199] {
        let mut raw = ask(&server, &format!("GET /status?code={status}"), &[]);
        let answer = raw.answered();
        assert_eq!(answer.problem(502), "trapped", "{status}");
        assert_eq!(server.finished(&answer)["outcome"]["trap"], "no_response");
        raw.head("GET /healthz", &[]);
        raw.answered().expect(200);
    }
    server.assert_guest_well();
}

#[test]
fn a_client_of_http_1_0_is_answered_in_its_own_version() {
    let server = start();
    let line = format!("GET {GUEST}/a HTTP/1.0");
    let text = String::from_utf8(exchange(&server, &line, &[&operator()])).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 OK"), "{head}");
    assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
    assert_eq!(body, "GET\n/a\nhttp\nlocalhost\n");
    server.assert_guest_well();
}

#[test]
fn a_host_header_that_is_none_harms_its_sender_alone() {
    let server = start();
    for (host, status) in [
        (&b"Host: \xff"[..], 400),
        (b"Host: a\r\nHost: b", 400),
        (b"Host: a b/c?d#e", 400),
        (b"Host:", 200),
        (b"Host: [::1]:80", 200),
    ] {
        let mut raw = Raw::connect(&server);
        raw.send(format!("GET {GUEST}/a HTTP/1.1\r\n{}\r\n", operator()).as_bytes());
        raw.send(host);
        raw.send(b"\r\n\r\n");
        assert_eq!(raw.answered().status, status, "{:?}", String::from_utf8_lossy(host));
    }
    server.assert_guest_well();
}

#[test]
fn every_request_is_a_job_in_a_process_of_its_own() {
    let server = start();
    let mut raw: Vec<Raw> = (0..2).map(|_| ask(&server, "GET /after?ms=600000", &[])).collect();
    let answers: Vec<_> = raw.iter_mut().map(|raw| raw.answered().expect(200)).collect();
    assert_eq!(server.sandboxed().len(), 2, "an HTTP guest is one process");
    let records = answers.iter().map(|answer| {
        assert_eq!(answer.text(), "done");
        server.get(&format!("/v1/jobs/{}", answer.header("holm-job-id"))).expect(200).json()
    });
    let records: Vec<Value> = records.collect();
    for namespace in ["user", "pid", "mnt", "uts", "ipc", "net", "cgroup"] {
        let inodes: BTreeSet<u64> =
            records.iter().map(|record| record["isolation"]["namespaces"][namespace].as_u64().unwrap()).collect();
        assert_eq!(inodes.len(), 2, "{namespace}");
    }
    for record in &records {
        assert_eq!((&record["state"], &record["plugin"]), (&json!("running"), &json!("guest")));
        assert_eq!(record["isolation"]["seccomp"], "filter");
        let id = record["id"].as_str().unwrap();
        server.operator("POST", &format!("/v1/jobs/{id}/cancel"), &[], b"").expect(200);
    }
    server.assert_guest_well();
}

#[test]
fn a_call_s_record_has_its_usage() {
    let server = start();
    let call = || {
        let answer = server.operator("POST", &format!("{GUEST}/echo"), &[("content-type", "text/x")], b"hello");
        assert_eq!(answer.text(), "hello");
        server.finished(&answer.expect(200))
    };
    let (record, again) = (call(), call());
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}));
    let usage = &record["usage"];
    assert_eq!((&usage["input_bytes"], &usage["output_bytes"], &usage["pids_peak"]), (&json!(5), &json!(5), &json!(1)));
    for figure in ["launch_us", "wall_us", "memory_peak_bytes", "fuel_used"] {
        assert!(usage[figure].as_u64().unwrap() > 0, "{figure}: {usage}");
    }
    assert_eq!(usage["fuel_used"], again["usage"]["fuel_used"]);
    let jobs = server.get("/v1/tenants/t/jobs?plugin=guest").expect(200).json();
    let ids: Vec<&Value> = jobs["jobs"].as_array().unwrap().iter().map(|job| &job["id"]).collect();
    assert_eq!(ids, [&again["id"], &record["id"]]);
    server.assert_guest_well();
}

#[test]
fn what_a_guest_prints_is_no_part_of_its_answer() {
    let server = start();
    let answer = server.call("/print").expect(200);
    assert_eq!(answer.text(), "body");
    assert_eq!(server.finished(&answer)["usage"]["output_bytes"], 4);
    server.assert_guest_well();
}

#[test]
fn a_guest_reaches_nobody() {
    let server = start();
    assert_eq!(server.call("/outgoing").expect(200).text(), "ErrorCode::HttpRequestDenied");
    server.assert_guest_well();
}

#[test]
fn the_bundled_function_greets_echoes_and_lists_headers() {
    let server = Server::start();
    server.tenant("acme", &json!({}));
    assert_eq!(server.upload("acme", "hello", &wasm("http-hello"))["interface"], "http");
    let hello = server.get("/fn/acme/hello?x=1").expect(200);
    assert_eq!(hello.text(), "hello from `hello` of acme, who was asked for /?x=1\n");
    assert_eq!(server.operator("PUT", "/fn/acme/hello/echo", &[], b"a body").expect(200).text(), "a body");
    let headers = server.operator("GET", "/fn/acme/hello/headers", &[("x-a", "b")], b"").expect(200);
    assert!(headers.text().contains("x-a: b\n") && !headers.text().contains("authorization"), "{}", headers.text());
    server.get("/fn/acme/hello/nowhere").expect(404);
    wait_until("nothing of any job is left", || server.sandboxed().is_empty().then_some(()));
}
