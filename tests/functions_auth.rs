//! `/fn`: who may call what, and that no key of this server ever reaches a guest.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use serde_json::json;
use support::function::{GUEST, bearer, exchange, http_guest};
use support::{OPERATOR, Server, native};

const PLUGIN: &str = "/v1/tenants/t/plugins/guest";

fn start() -> Server {
    Server::start().with_guest()
}

fn set_public(server: &Server, public: bool) {
    server.patch_json(PLUGIN, &json!({"public": public})).expect(200);
}

/// A whole answer but for the time of day.
fn without_date(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    text.split_inclusive("\r\n").filter(|line| !line.to_lowercase().starts_with("date:")).collect()
}

#[test]
fn without_a_key_what_is_not_public_is_401_to_the_last_byte_be_it_there_or_not() {
    let server = start();
    server.upload("t", "echo", &native("echo"));
    let ask = |method: &str, path: &str, headers: &[&str]| {
        let headers: Vec<&str> = [&["Host: holm"], headers].concat();
        without_date(&exchange(&server, &format!("{method} {path} HTTP/1.1"), &headers))
    };
    let there = ask("GET", &format!("{GUEST}/early"), &[]);
    assert!(there.starts_with("HTTP/1.1 401") && there.contains("www-authenticate: Bearer\r\n"), "{there}");
    assert!(there.contains(r#""code":"unauthenticated""#), "{there}");
    for path in
        ["/fn/t/nothing/early", "/fn/t/echo/", "/fn/nobody/guest", "/fn/T/guest/", "/fn/%74/guest/", "/fn/t/guest?x"]
    {
        assert_eq!(ask("GET", path, &[]), there, "{path}");
    }
    for method in ["POST", "OPTIONS", "PURGE"] {
        assert_eq!(ask(method, GUEST, &[]), there, "{method}");
    }
    let unknown = bearer(&"x".repeat(48));
    let twice = format!("{0}\r\n{0}", bearer(OPERATOR));
    for header in [&*unknown, "Authorization: Basic eDp5", "Authorization: Bearer", &twice] {
        assert_eq!(ask("GET", GUEST, &[header]), there, "{header}");
    }
    assert_eq!(ask("POST", GUEST, &["Content-Length: 999999999999"]), there, "before any look at the body");
    assert!(server.get("/v1/tenants/t/jobs").json()["jobs"].as_array().unwrap().is_empty());
}

#[test]
fn another_tenant_s_function_is_not_there() {
    let server = start();
    server.tenant("other", &json!({}));
    let (own, other) = (server.key("t"), server.key("other"));
    assert_eq!(server.send(&own, "GET", &format!("{GUEST}/early"), &[], b"").expect(200).text(), "early");
    let get = |key: &str, path: &str| server.send(key, "GET", path, &[], b"");
    let foreign = get(&other, GUEST);
    assert_eq!(foreign.problem(404), "not_found");
    for (key, path) in
        [(&other, "/fn/t/nothing"), (&other, "/fn/other/guest"), (&own, "/fn/t/nothing"), (&own, "/fn/nobody/guest")]
    {
        let answer = get(key, path);
        assert_eq!((answer.status, &answer.body), (404, &foreign.body), "{path}");
    }
    assert_eq!(get(OPERATOR, "/fn/t/nothing").problem(404), "not_found");
}

#[test]
fn what_is_public_anyone_may_call_until_it_is_no_more() {
    let server = start();
    server.tenant("other", &json!({}));
    let path = format!("{GUEST}/early");
    set_public(&server, true);
    for key in ["", &server.key("t"), &server.key("other"), OPERATOR, "no-key-at-all"] {
        assert_eq!(server.send(key, "GET", &path, &[], b"").expect(200).text(), "early", "{key}");
    }
    for path in ["/fn/t/other", "/v1/tenants/t/plugins/guest", "/v1/tenants/t/jobs"] {
        assert_eq!(server.send("", "GET", path, &[], b"").problem(401), "unauthenticated", "{path}");
    }
    set_public(&server, false);
    assert_eq!(server.send("", "GET", &path, &[], b"").problem(401), "unauthenticated");
    server.operator("PUT", &format!("{PLUGIN}?public=true"), &[], &http_guest()).expect(200);
    server.send("", "GET", &path, &[], b"").expect(200);
    server.operator("DELETE", PLUGIN, &[], b"").expect(204);
    assert_eq!(server.send("", "GET", &path, &[], b"").problem(401), "unauthenticated");
}

#[test]
fn a_plugin_is_called_in_the_way_of_its_interface_only() {
    let server = start();
    server.upload("t", "echo", &native("echo"));
    assert_eq!(server.get("/fn/t/echo").problem(409), "wrong_interface");
    assert_eq!(server.operator("POST", &format!("{PLUGIN}/jobs"), &[], b"").problem(409), "wrong_interface");
    server.patch_json("/v1/tenants/t/plugins/echo", &json!({"public": true})).expect(200);
    assert_eq!(server.send("", "GET", "/fn/t/echo", &[], b"").problem(409), "wrong_interface");
}

/// The `Authorization` headers that the guest sees of a request with these.
fn seen(server: &Server, headers: &[&str]) -> Vec<String> {
    let headers: Vec<&str> = [&["Host: holm"], headers].concat();
    let answer = exchange(server, &format!("GET {GUEST}/headers HTTP/1.1"), &headers);
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer.lines().filter_map(|line| line.strip_prefix("authorization: ")).map(str::to_owned).collect()
}

#[test]
fn a_public_guest_sees_credentials_that_are_its_own_affair() {
    let server = start();
    set_public(&server, true);
    for value in ["Basic dXNlcjpwYXNz", "Bearer some-token-of-the-guest-s-own", "Digest a=\"b\", c=\"d\""] {
        assert_eq!(seen(&server, &[&format!("Authorization: {value}")]), [value]);
    }
}

#[test]
fn no_key_of_this_server_reaches_a_guest() {
    let server = start();
    server.tenant("other", &json!({}));
    let (own, other) = (server.key("t"), server.key("other"));
    for key in [&own, OPERATOR] {
        assert!(seen(&server, &[&bearer(key)]).is_empty(), "not public: {key}");
    }
    set_public(&server, true);
    for key in [&own, &other, OPERATOR] {
        for form in [
            bearer(key),
            format!("authorization: bearer {key}"),
            format!("Authorization: Bearer  {key} "),
            format!("Authorization: Bearer\t{key}"),
            format!("Authorization: Token {key}"),
            format!("Authorization: {key}"),
            format!("Authorization: Bearer {key}, Basic x"),
            format!("Authorization: Basic x\r\nAuthorization: Bearer {key}"),
            format!("{0}\r\n{0}", bearer(key)),
        ] {
            let seen = seen(&server, &[&form]);
            assert!(!seen.iter().any(|value| value.contains(key)), "{form}: {seen:?}");
        }
    }
}

#[test]
fn strangers_are_told_no_more_of_a_failure_than_its_code_and_job() {
    let server = start();
    set_public(&server, true);
    server.tenant("other", &json!({}));
    let (own, other) = (server.key("t"), server.key("other"));
    server.limit_guest(&json!({"wall_time_ms": 1000, "input_bytes": 10}));
    for (path, status, code) in [
        ("/before?end=trap", 502, "trapped"),
        ("/before?end=fail", 502, "exited"),
        ("/before?end=exit", 502, "bad_response"),
        ("/before?end=wait", 504, "over_limit"),
        ("/error", 502, "trapped"),
        ("/status?code=103", 502, "trapped"),
    ] {
        let path = format!("{GUEST}{path}");
        for key in ["", &other, "no-key"] {
            let answer = server.send(key, "GET", &path, &[], b"");
            assert_eq!(answer.problem(status), code, "{path}");
            let body = answer.json();
            let members: Vec<&String> = body.as_object().unwrap().keys().collect();
            let expected = ["type", "title", "status", "detail", "code", "job_id"];
            let without_job = &expected[..5];
            assert!(members == expected || members == without_job, "{path}: {body}");
            assert_eq!(body["detail"], body["title"], "{path}");
            assert!(!answer.header("holm-job-id").is_empty());
        }
        let trusted = server.send(&own, "GET", &path, &[], b"");
        assert_eq!(trusted.problem(status), code, "{path}");
        assert_ne!(trusted.json()["detail"], trusted.json()["title"], "{path}");
    }
    let trusted = server.send(&own, "GET", &format!("{GUEST}/before?end=trap"), &[], b"").json();
    assert_eq!(trusted["outcome"]["trap"], "unreachable_code_reached");
    assert!(trusted["usage"]["fuel_used"].as_u64().unwrap() > 0 && trusted["stderr_tail"].is_string());
}
