//! `/fn`: bodies that flow both ways, what ends them, and what they cost the server.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::function::{GUEST, ask, operator};
use support::inspect::Process;
use support::raw::Raw;
use support::slowness::at_most;
use support::{Server, wait_until};

const CHUNKED: &str = "Transfer-Encoding: chunked";

fn start() -> Server {
    Server::start().with_guest()
}

#[test]
fn an_answer_begins_before_its_request_has_ended() {
    let server = start();
    let mut raw = ask(&server, "POST /echo", &[CHUNKED]);
    assert!(raw.chunk(b"first"));
    raw.head_of_answer().unwrap().expect(200);
    assert_eq!(raw.piece().unwrap(), b"first");
    assert!(raw.chunk(b"second"));
    assert_eq!(raw.piece().unwrap(), b"second");
    assert!(raw.chunk(b""));
    assert_eq!(raw.pieces(), (true, Vec::new()));
    assert_eq!(server.last_finished()["usage"]["output_bytes"], 11);
    raw.head("GET /healthz", &[]);
    raw.answered().expect(200);
    server.assert_guest_well();
}

/// Echoes so many bytes, which are sent and received at once.
fn echo(server: &Server, length: usize) {
    let mut raw = ask(server, "POST /echo", &[&format!("Content-Length: {length}")]);
    let mut sender = raw.twin();
    let body: Vec<u8> = (0..=250_u8).cycle().take(length).collect();
    let expected = body.clone();
    let sent = thread::spawn(move || body.chunks(64 << 10).for_each(|piece| sender.send(piece)));
    raw.head_of_answer().unwrap().expect(200);
    let (whole, body) = raw.pieces();
    assert!(whole && body == expected, "{} of {length} bytes", body.len());
    sent.join().unwrap();
}

#[test]
fn megabytes_flow_through_a_server_that_keeps_none_of_them() {
    const LENGTH: usize = 20 << 20;
    let server = start();
    server.limit_guest(&json!({"input_bytes": LENGTH, "output_bytes": LENGTH}));
    let peak_kib = || {
        let peak = &Process(server.pid()).status()["VmHWM"];
        peak.trim_end_matches(" kB").trim().parse::<u64>().unwrap()
    };
    echo(&server, 1 << 20);
    let before = peak_kib();
    echo(&server, LENGTH);
    let grown = peak_kib() - before;
    assert!(grown < 4 << 10, "the server grew by {grown} KiB");
    let record = server.last_finished();
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}));
    assert_eq!((&record["usage"]["input_bytes"], &record["usage"]["output_bytes"]), (&json!(LENGTH), &json!(LENGTH)));
    server.assert_guest_well();
}

#[test]
fn too_much_input_is_413_whether_announced_or_not() {
    let server = start();
    server.limit_guest(&json!({"input_bytes": 1000}));
    let exact = server.operator("POST", &format!("{GUEST}/count"), &[], &[0; 1000]).expect(200);
    assert_eq!(exact.text(), "1000");
    server.finished(&exact);
    let jobs = || server.get("/v1/tenants/t/jobs").json()["jobs"].as_array().unwrap().len();
    let before = jobs();
    let announced = ask(&server, "POST /count", &["Content-Length: 1001"]).answered();
    assert_eq!((announced.problem(413), &announced.json()["maximum"]), ("payload_too_large".into(), &json!(1000)));
    assert_eq!(jobs(), before, "no job was started");

    let mut raw = ask(&server, "POST /count", &[CHUNKED]);
    assert!(raw.chunk(&[0; 1000]));
    raw.chunk(b"x");
    let answer = raw.answered();
    assert_eq!(answer.problem(413), "payload_too_large");
    let record = server.finished(&answer);
    assert_eq!(
        record["outcome"],
        json!({"kind": "over_limit", "limit": "input_bytes", "allowed": 1000, "reached": 1001})
    );
    server.assert_guest_well();
}

#[test]
fn too_much_input_after_the_head_cuts_the_answer_off() {
    let server = start();
    server.limit_guest(&json!({"input_bytes": 1000}));
    let mut raw = ask(&server, "POST /echo", &[CHUNKED]);
    assert!(raw.chunk(b"hello"));
    raw.head_of_answer().unwrap().expect(200);
    assert_eq!(raw.piece().unwrap(), b"hello");
    raw.chunk(&[0; 1000]);
    assert!(!raw.pieces().0);
    let outcome = server.last_finished()["outcome"].clone();
    assert_eq!((&outcome["limit"], &outcome["reached"]), (&json!("input_bytes"), &json!(1005)));
    server.assert_guest_well();
}

#[test]
fn too_much_output_cuts_the_answer_off() {
    let server = start();
    server.limit_guest(&json!({"output_bytes": 100_000}));
    for path in ["/flood", "/length?declared=200000&sent=200000"] {
        let mut raw = ask(&server, &format!("GET {path}"), &[]);
        let head = raw.head_of_answer().unwrap().expect(200);
        let (whole, body) = match head.header("content-length") {
            "" => raw.pieces(),
            length => {
                let body = raw.to_the_end();
                (body.len().to_string() == length, body)
            }
        };
        assert!(!whole && body.len() <= 100_000, "{path}: {} bytes came", body.len());
        let outcome = server.finished(&head)["outcome"].clone();
        assert_eq!((&outcome["kind"], &outcome["limit"]), (&json!("over_limit"), &json!("output_bytes")), "{path}");
        assert!(outcome["reached"].as_u64().unwrap() > 100_000, "{outcome}");
    }
    let exact = server.call("/length?declared=100000&sent=100000").expect(200);
    assert_eq!(exact.body.len(), 100_000);
    assert_eq!(server.finished(&exact)["outcome"]["kind"], "exited");
    server.assert_guest_well();
}

#[test]
fn every_byte_of_a_response_is_counted_though_its_guest_has_ended_before_it_is_read() {
    let server = start();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let answer = server.call("/length?declared=3000&sent=3000").expect(200);
                    assert_eq!(answer.body.len(), 3000);
                    assert_eq!(server.finished(&answer)["usage"]["output_bytes"], 3000);
                }
            });
        }
    });
    server.assert_guest_well();
}

#[test]
fn a_client_that_hangs_up_ends_the_job() {
    let server = start();
    for (line, headers, begins) in [
        ("GET /before?end=wait", &[][..], false),
        ("GET /between?end=wait", &[], true),
        ("GET /flood", &[], true),
        ("POST /echo", &[CHUNKED], false),
        ("POST /count", &[CHUNKED], false),
    ] {
        let newest = || server.get("/v1/tenants/t/jobs?limit=1").json()["jobs"][0].clone();
        let before = newest()["id"].clone();
        let mut raw = ask(&server, line, headers);
        if begins {
            raw.head_of_answer().unwrap().expect(200);
            assert!(!raw.piece().unwrap().is_empty());
        }
        wait_until("it runs", || {
            let newest = newest();
            (newest["id"] != before && newest["started_at"].is_string()).then_some(())
        });
        drop(raw);
        assert_eq!(server.last_finished()["outcome"], json!({"kind": "cancelled"}), "{line}");
    }
    server.assert_guest_well();
}

#[test]
fn a_request_that_breaks_off_ends_the_job() {
    let server = start();
    for (headers, part) in [("Content-Length: 100", "half"), (CHUNKED, "64\r\nhalf")] {
        let mut raw = ask(&server, "POST /count", &[headers]);
        raw.send(part.as_bytes());
        raw.finish();
        if let Some(answer) = raw.answer() {
            assert_eq!(answer.problem(502), "cancelled", "{headers}");
        }
        assert_eq!(server.last_finished()["outcome"], json!({"kind": "cancelled"}), "{headers}");
    }
    server.assert_guest_well();
}

#[test]
fn a_request_that_comes_too_slowly_ends_the_job() {
    let server = Server::start_with("body_grace_ms = 300\nbody_bytes_per_second = 100000").with_guest();
    let mut raw = ask(&server, "POST /count", &["Content-Length: 1000"]);
    raw.send(b"half");
    assert_eq!(raw.answered().problem(502), "cancelled");
    assert_eq!(server.last_finished()["outcome"], json!({"kind": "cancelled"}));
    server.assert_guest_well();
}

#[test]
fn time_in_which_a_client_does_not_read_is_the_job_s() {
    let server = start();
    server.limit_guest(&json!({"wall_time_ms": 700, "output_bytes": 256 << 20, "fuel": 1_000_000_000_000_u64}));
    let mut raw = ask(&server, &format!("GET /flood?bytes={}", 128 << 20), &[]);
    let head = raw.head_of_answer().unwrap().expect(200);
    let record = server.finished(&head);
    assert_eq!(
        (&record["outcome"]["kind"], &record["outcome"]["limit"]),
        (&json!("over_limit"), &json!("wall_time_ms"))
    );
    assert!(!raw.pieces().0);
    server.assert_guest_well();
}

#[test]
fn an_answer_that_does_not_wait_for_the_request_comes_through() {
    let server = start();
    let body = vec![b'x'; 1 << 20];
    for round in 0..10 {
        let mut raw = ask(&server, "POST /early", &[&format!("Content-Length: {}", body.len())]);
        raw.offer(&body);
        let answer = raw.answered().expect(200);
        assert_eq!(answer.text(), "early", "{round}");
        assert_eq!(server.finished(&answer)["outcome"], json!({"kind": "exited", "exit_code": 0}));
    }
    let mut raw = ask(&server, "POST /early-then-read", &[CHUNKED]);
    assert_eq!(raw.answered().expect(200).text(), "early");
    server.assert_guest_well();
}

#[test]
fn a_job_may_work_on_after_its_answer_is_complete() {
    let server = start();
    let begun = Instant::now();
    let mut raw = ask(&server, "GET /after?ms=1500", &[]);
    let answer = raw.answered().expect(200);
    assert_eq!(answer.text(), "done");
    assert!(begun.elapsed() < at_most(Duration::from_millis(1500)), "the answer waited for the job");
    let id = answer.header("holm-job-id");
    assert_eq!(server.get(&format!("/v1/jobs/{id}")).json()["state"], "running");
    drop(raw);
    let record = server.finished(&answer);
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "nobody's hanging up ends it");
    assert!(record["usage"]["wall_us"].as_u64().unwrap() >= 1_500_000);
    assert_eq!(record["usage"]["output_bytes"], 4);
    server.assert_guest_well();
}

#[test]
fn a_client_that_asks_first_is_told_to_go_on_only_when_its_body_is_wanted() {
    let server = start();
    server.limit_guest(&json!({"input_bytes": 1000}));
    let mut raw = ask(&server, "POST /count", &["Content-Length: 5", "Expect: 100-continue"]);
    assert_eq!(raw.head_of_answer().unwrap().status, 100);
    raw.send(b"hello");
    assert_eq!(raw.answered().expect(200).text(), "5");
    let mut long = ask(&server, "POST /count", &["Content-Length: 1001", "Expect: 100-continue"]);
    assert_eq!(long.answered().problem(413), "payload_too_large");
    let mut stranger = Raw::connect(&server);
    stranger.send(
        format!("POST {GUEST}/count HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
            .as_bytes(),
    );
    assert_eq!(stranger.answered().problem(401), "unauthenticated");
    server.assert_guest_well();
}

#[test]
fn requests_follow_one_another_on_one_connection() {
    let server = start();
    let mut raw = Raw::connect(&server);
    let request = |body: &str| {
        format!(
            "POST {GUEST}/echo HTTP/1.1\r\nHost: a\r\n{}\r\nContent-Length: {}\r\n\r\n{body}",
            operator(),
            body.len()
        )
    };
    raw.send(["one", "two", ""].map(request).concat().as_bytes());
    for body in ["one", "two", ""] {
        assert_eq!(raw.answered().expect(200).text(), body);
    }
    server.assert_guest_well();
}

#[test]
fn trailers_end_with_the_connection() {
    let server = start();
    let mut raw = ask(&server, "POST /trailers", &[CHUNKED, "TE: trailers"]);
    raw.send(b"0\r\nx-trailer: 1\r\n\r\n");
    let answer = raw.answered().expect(200);
    assert_eq!(answer.text(), "body");
    raw.head("GET /healthz", &[]);
    raw.answered().expect(200);
    server.assert_guest_well();
}
