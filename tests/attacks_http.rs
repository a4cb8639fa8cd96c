//! Clients that attack the server itself: smuggled requests, headers that lead into a guest or out of it,
//! bodies made to be expensive, keys that nearly fit. Rows H1 to H6 of the threats; more of them in `bad_clients.rs`,
//! `bad_input.rs` and `too_large.rs`.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use support::raw::{BOUNDARY, Raw, head};
use support::slowness::at_most;
use support::{OPERATOR, Server, native};

const TENANT: &str = "/v1/tenants/t";
const ECHO: &str = "/v1/tenants/t/plugins/echo/jobs";

fn start_with(config: &str) -> Server {
    let server = Server::start_with(config).with_probe();
    server.upload("t", "echo", &native("echo"));
    server
}

fn start() -> Server {
    start_with("")
}

/// Sends a request by hand, and gives the status of each answer until the server closes.
fn throw(server: &Server, bytes: &[u8]) -> Vec<u16> {
    let mut raw = Raw::connect(server);
    raw.offer(bytes);
    raw.finish();
    let answers = String::from_utf8_lossy(&raw.to_the_end()).into_owned();
    answers.match_indices("HTTP/1.").map(|(at, _)| answers[at + 9..at + 12].parse().unwrap()).collect()
}

#[test]
fn h3_no_oddity_of_framing_hides_a_second_request() {
    let server = start();
    let smuggled = head("DELETE /v1/tenants/t", &[]);
    let post = |headers: &[&str], body: &str| (head(&format!("POST {ECHO}"), headers) + body).into_bytes();
    let chunked = "Transfer-Encoding: chunked";
    for (what, bytes) in [
        (
            "length and chunks",
            post(&[&format!("Content-Length: {}", smuggled.len() + 5), chunked], &format!("0\r\n\r\n{smuggled}")),
        ),
        ("two lengths", post(&["Content-Length: 0", &format!("Content-Length: {}", smuggled.len())], &smuggled)),
        ("a folded header", post(&["X-A: b\r\n Content-Length: 0", "Content-Length: 5"], "hello")),
        ("a space before the colon", post(&["Content-Length : 0", chunked], &format!("0\r\n\r\n{smuggled}"))),
        ("an unknown coding", post(&["Transfer-Encoding: xchunked"], &smuggled)),
        ("a coding with a tab", post(&["Transfer-Encoding:\tchunked\u{b}"], &format!("0\r\n\r\n{smuggled}"))),
        (
            "two codings",
            post(&["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], &format!("0\r\n\r\n{smuggled}")),
        ),
        ("a size that overflows", post(&[chunked], &format!("10000000000000000\r\n{smuggled}"))),
        ("a size with a sign", post(&[chunked], &format!("+5\r\nhello\r\n0\r\n\r\n{smuggled}"))),
        ("a line feed for an end", post(&[chunked], &format!("5\nhello\n0\n\n{smuggled}"))),
        ("a carriage return in a header", post(&["X-A: b\rContent-Length: 0", "Content-Length: 5"], "hello")),
    ] {
        let statuses = throw(&server, &bytes);
        println!("{what}: {statuses:?}");
        assert!(statuses.len() == 1 || statuses.iter().all(|status| *status != 204), "{what}: {statuses:?}");
        server.get(TENANT).expect(200);
    }
    // extensions are dropped, however long a reasonable one is; and an endless one ends the connection
    let extended = post(&[chunked, "connection: close"], "5;a=b;c=\"d\"\r\nhello\r\n0\r\n\r\n");
    let mut raw = Raw::connect(&server);
    raw.send(&extended);
    assert_eq!(raw.answered().expect(200).text(), "hello");
    let endless = post(&[chunked], &format!("5;{}\r\nhello\r\n0\r\n\r\n{smuggled}", "a".repeat(1 << 20)));
    println!("a megabyte of extension: {:?}", throw(&server, &endless));
    server.get(TENANT).expect(200);
    server.assert_healthy();
}

#[test]
fn h4_http_2_is_not_spoken_whether_by_preface_or_by_upgrade() {
    let server = start();
    let statuses = throw(&server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    assert!(statuses.iter().all(|status| (400..500).contains(status)), "{statuses:?}");
    let upgrade = ["Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"];
    let mut raw = Raw::request(&server, "GET /healthz", &upgrade);
    assert_eq!(raw.answered().status, 200, "it is answered as what it is");
    // a flood of frames after the preface is read by nobody
    let mut flood = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    flood.extend(b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\0".repeat(10_000));
    let mut raw = Raw::connect(&server);
    raw.offer(&flood);
    let answer = raw.to_the_end();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{:?}", String::from_utf8_lossy(&answer));
    server.assert_healthy();
}

#[test]
fn h5_no_header_of_a_client_becomes_another_variable_or_another_header() {
    let server = start();
    server.upload("t", "env", &native("probe"));
    server.patch_json("/v1/tenants/t/plugins/env", &json!({"args": ["report"]})).expect(200);
    let environment = |content_type: &str| {
        let headers =
            [("content-type", content_type), ("x-holm-tenant", "other"), ("path", "/evil"), ("holm_tenant", "x")];
        let report = server.operator("POST", "/v1/tenants/t/plugins/env/jobs", &headers, b"").expect(200).json();
        report["env"].clone()
    };
    let plain = environment("text/plain");
    for odd in ["a=b", "a\tHOLM_TENANT=other", "$(id)", "text/plain; x=\"y; z\"", "%0aHOLM_TENANT=other", "\\nA=b"] {
        let mut env = environment(odd);
        assert_eq!(env["HOLM_CONTENT_TYPE"], odd);
        for key in ["HOLM_CONTENT_TYPE", "HOLM_JOB_ID"] {
            env[key] = plain[key].clone();
        }
        assert_eq!(env, plain, "{odd:?} is one value and nothing else");
    }
    // what ends a line never comes in
    for bytes in [&b"a\nHOLM_TENANT: other"[..], b"a\0b", b"a\rb: c"] {
        let request = [
            format!("POST {ECHO} HTTP/1.1\r\nHost: holm\r\nAuthorization: Bearer {OPERATOR}\r\nContent-Type: ")
                .as_bytes(),
            bytes,
            b"\r\nContent-Length: 0\r\n\r\n",
        ]
        .concat();
        let statuses = throw(&server, &request);
        assert!(statuses.len() <= 1, "{statuses:?}");
    }
    // nor does it go out: by a plugin's settings, or by what a job writes
    for value in ["text/plain\r\nSet-Cookie: a=b", "a\nb", "a\0b"] {
        let answer = server.patch_json("/v1/tenants/t/plugins/echo", &json!({ "output_content_type": value }));
        assert_eq!(answer.problem(422), "invalid_settings", "{value:?}");
    }
    let answer = server.operator("POST", ECHO, &[], b"x\r\n\r\nHTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\n\r\n").expect(200);
    assert!(answer.headers.get("set-cookie").is_none());
    server.assert_healthy();
}

#[test]
fn h5_forms_and_json_made_to_be_expensive_are_refused_soon() {
    let server = start();
    let form = format!("multipart/form-data; boundary={BOUNDARY}");
    let part = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n\r\n");
    let nested =
        format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"manifest\"\r\nContent-Type: {form}\r\n\r\n");
    let headers = format!("--{BOUNDARY}\r\n{}\r\n", "X-A: b\r\n".repeat(100_000));
    for (what, body) in [
        ("100,000 parts", part.repeat(100_000)),
        ("parts in parts", nested.repeat(1000)),
        ("no end", format!("{part}{}", "-".repeat(4 << 20))),
        ("boundaries that nearly are some", format!("{part}{}", format!("\r\n--{}", &BOUNDARY[1..]).repeat(100_000))),
        ("100,000 headers of a part", headers),
    ] {
        let begun = Instant::now();
        let answer = server.operator("PUT", "/v1/tenants/t/plugins/form", &[("content-type", &form)], body.as_bytes());
        assert!(matches!(answer.status, 400 | 413 | 422), "{what}: {}", answer.text());
        assert!(begun.elapsed() < at_most(Duration::from_secs(5)), "{what}: {:?}", begun.elapsed());
    }
    for (what, body) in [
        ("arrays in arrays", format!("{}{}", "[".repeat(200_000), "]".repeat(200_000))),
        ("objects in objects", format!("{}1{}", "{\"quota\":".repeat(50_000), "}".repeat(50_000))),
        ("keys twice", r#"{"fresh_netns": true, "fresh_netns": false}"#.to_owned()),
        ("keys twice, deeper", r#"{"quota": {"jobs_running": 1, "jobs_running": 200}}"#.to_owned()),
        ("half a surrogate", r#"{"\ud800": 1}"#.to_owned()),
    ] {
        let answer = server.operator("PUT", TENANT, &[("content-type", "application/json")], body.as_bytes());
        assert!(matches!(answer.status, 400 | 422), "{what}: {} {}", answer.status, answer.text());
    }
    let twice = [("holm-limits", r#"{"pids": 1, "pids": 64}"#)];
    assert_eq!(server.operator("POST", ECHO, &twice, b"").problem(400), "malformed_request");
    let overlong = b"{\"\xc0\xaf\": 1}";
    assert_eq!(server.operator("PUT", TENANT, &[("content-type", "application/json")], overlong).status, 400);
    server.assert_healthy();
}

#[test]
fn h6_no_key_but_the_whole_one_and_no_second_one_opens_anything() {
    let server = start();
    server.tenant("other", &json!({}));
    let (key, theirs) = (server.key("t"), server.key("other"));
    let get = |lines: &[String]| {
        let head = format!("GET {TENANT} HTTP/1.1\r\nHost: holm\r\nConnection: close\r\n{}\r\n", lines.concat());
        let mut raw = Raw::connect(&server);
        raw.send(head.as_bytes());
        raw.answered().status
    };
    let line = |value: &str| format!("Authorization: {value}\r\n");
    assert_eq!(get(&[line(&format!("Bearer {key}"))]), 200);
    let upper = key.to_uppercase();
    for value in [
        String::new(),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        format!("Bearer {}", &key[..key.len() - 1]),
        format!("Bearer {}", &key[..key.len() / 2]),
        format!("Bearer {key}x"),
        format!("Bearer {key} {key}"),
        format!("Bearer {key},Bearer {key}"),
        format!("Bearer {upper}"),
        format!("Basic {key}"),
        key.clone(),
        format!("Bearer \"{key}\""),
    ] {
        assert_eq!(get(&[line(&value)]), 401, "{:?}", value.replace(&key, "KEY"));
    }
    for pair in [[&key, &theirs], [&theirs, &key], [&key, &key]] {
        let status = get(&pair.map(|key| line(&format!("Bearer {key}"))));
        assert!(matches!(status, 400 | 401), "{status}");
    }
    assert_eq!(get(&[format!("Proxy-Authorization: Bearer {key}\r\n")]), 401);
    assert_eq!(get(&[format!("X-Authorization: Bearer {key}\r\n"), line("Bearer x")]), 401);
    server.assert_healthy();
}
