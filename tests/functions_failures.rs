//! `/fn`: guests that fail before they answer, and guests that fail while they do.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use serde_json::{Value, json};
use support::Server;
use support::function::{GUEST, ask, operator};
use support::raw::Raw;

fn start() -> Server {
    let server = Server::start().with_guest();
    server.limit_guest(&json!({"wall_time_ms": 1000, "fuel": 50_000_000, "memory_bytes": 32 << 20}));
    server
}

/// Fails unless the outcome has all of these members.
#[track_caller]
fn check_outcome(record: &Value, expected: &Value) {
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&record["outcome"][key], value, "{}", record["outcome"]);
    }
}

#[test]
fn a_failure_before_the_head_is_a_problem_that_says_why() {
    let server = start();
    let over = |limit: &str| json!({"kind": "over_limit", "limit": limit});
    let trap = |code: &str| json!({"kind": "trapped", "trap": code});
    for (path, status, code, outcome) in [
        ("/before?end=trap", 502, "trapped", trap("unreachable_code_reached")),
        ("/before?end=fail", 502, "exited", json!({"kind": "exited", "exit_code": 1})),
        ("/before?end=exit", 502, "bad_response", json!({"kind": "exited", "exit_code": 0})),
        ("/before?end=wait", 504, "over_limit", over("wall_time_ms")),
        ("/before?end=spin", 502, "over_limit", over("fuel")),
        ("/before?end=grow", 502, "over_limit", over("memory_bytes")),
        ("/unset", 502, "trapped", trap("no_response")),
        ("/error", 502, "trapped", trap("no_response")),
    ] {
        let mut raw = ask(&server, &format!("GET {path}"), &[]);
        let answer = raw.answered();
        assert_eq!(answer.problem(status), code, "{path}");
        let record = server.finished(&answer);
        check_outcome(&record, &outcome);
        let body = answer.json();
        if code != "bad_response" {
            assert_eq!((&body["outcome"], &body["usage"]), (&record["outcome"], &record["usage"]), "{path}");
            assert_eq!(body["job_id"], record["id"]);
        }
        raw.head("GET /healthz", &[]);
        raw.answered().expect(200);
    }
    server.assert_guest_well();
}

#[test]
fn the_guest_s_own_words_reach_its_owner() {
    let server = start();
    let body = server.call("/error").json();
    assert!(body["outcome"]["backtrace"].as_str().unwrap().contains("a guest's own words"), "{body}");
    let body = ask(&server, "DELETE /no-such-behaviour/..", &[]).answered().expect(200);
    assert!(body.text().starts_with("DELETE\n"));
    let panicked = server.operator("GET", &format!("{GUEST}/length?declared=x"), &[], b"");
    assert!(panicked.json()["stderr_tail"].as_str().unwrap().contains("panicked at"), "{}", panicked.text());
    server.assert_guest_well();
}

#[test]
fn a_failure_after_the_head_cuts_the_answer_off() {
    let server = start();
    let over = |limit: &str| json!({"kind": "over_limit", "limit": limit});
    for (path, outcome) in [
        ("/between?end=trap", json!({"kind": "trapped", "trap": "unreachable_code_reached"})),
        ("/between?end=exit", json!({"kind": "exited", "exit_code": 0})),
        ("/between?end=fail", json!({"kind": "exited", "exit_code": 1})),
        ("/between?end=wait", over("wall_time_ms")),
        ("/between?end=spin", over("fuel")),
        ("/between?end=grow", over("memory_bytes")),
        ("/unfinished", json!({"kind": "exited", "exit_code": 0})),
    ] {
        let mut raw = ask(&server, &format!("GET {path}"), &[]);
        let head = raw.head_of_answer().unwrap().expect(200);
        let (whole, body) = raw.pieces();
        assert!(!whole, "{path}: a client would take {body:?} for everything");
        assert!(b"some".starts_with(&body), "{path}: {body:?}");
        check_outcome(&server.finished(&head), &outcome);
    }
    server.assert_guest_well();
}

#[test]
fn an_answer_shorter_than_its_length_is_cut_off() {
    let server = start();
    let mut raw = ask(&server, "GET /length?declared=10&sent=4", &[]);
    let head = raw.head_of_answer().unwrap().expect(200);
    assert_eq!(head.header("content-length"), "10");
    assert!(b"xxxx".starts_with(&raw.to_the_end()));
    server.finished(&head);
    let longer = server.call("/length?declared=4&sent=10");
    assert!(longer.status == 502 || longer.text() == "xxxx", "{longer:?}");
    server.assert_guest_well();
}

#[test]
fn what_is_sent_before_a_failure_is_sent_at_once() {
    let server = start();
    for end in ["wait", "spin"] {
        let mut raw = ask(&server, &format!("GET /between?end={end}"), &[]);
        raw.head_of_answer().unwrap().expect(200);
        assert_eq!(raw.piece().unwrap(), b"some", "{end}");
        assert_eq!(server.get("/v1/tenants/t/jobs?limit=1").json()["jobs"][0]["state"], "running", "{end}");
        assert_eq!(raw.piece(), None);
        server.last_finished();
    }
    server.assert_guest_well();
}

#[test]
fn a_client_of_http_1_0_sees_a_failure_as_one_too() {
    let server = start();
    let mut raw = Raw::connect(&server);
    raw.send(format!("GET {GUEST}/between?end=trap HTTP/1.0\r\n{}\r\n\r\n", operator()).as_bytes());
    assert!(raw.is_reset(), "its end looks like that of a whole answer");
    server.assert_guest_well();
}

#[test]
fn a_failure_after_the_answer_is_for_the_record_alone() {
    let server = start();
    for (end, outcome) in [
        ("trap", json!({"kind": "trapped", "trap": "unreachable_code_reached"})),
        ("fail", json!({"kind": "exited", "exit_code": 1})),
        ("wait", json!({"kind": "over_limit", "limit": "wall_time_ms"})),
        ("spin", json!({"kind": "over_limit", "limit": "fuel"})),
    ] {
        let mut raw = ask(&server, &format!("GET /after?ms=1&end={end}"), &[]);
        let answer = raw.answered().expect(200);
        assert_eq!(answer.text(), "done");
        check_outcome(&server.finished(&answer), &outcome);
    }
    server.assert_guest_well();
}
