//! Clients that break the protocol, dawdle, or go away: each harms itself alone.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::raw::{Raw, head};
use support::{Server, native, wait_until};

const TENANT: &str = "/v1/tenants/t";
const PROBE: &str = "/v1/tenants/t/plugins/probe/jobs";
const ECHO: &str = "/v1/tenants/t/plugins/echo/jobs";

fn start_with(config: &str) -> Server {
    let server = Server::start_with(config).with_probe();
    server.upload("t", "echo", &native("echo"));
    server
}

fn start() -> Server {
    start_with("")
}

/// Waits until the server has closed a connection.
#[track_caller]
fn wait_for_close(what: &str, raw: &mut Raw) {
    wait_until(&format!("{what} is cut off"), || raw.is_closed().then_some(()));
}

/// Waits until the newest job is over, and gives its record.
#[track_caller]
fn last_finished(server: &Server) -> Value {
    wait_until("the job is over", || {
        let job = server.get("/v1/tenants/t/jobs?limit=1").json()["jobs"][0].clone();
        (job["state"] == "finished").then_some(job)
    })
}

#[test]
fn a_body_shorter_than_its_length_changes_nothing() {
    let server = start();
    let before = server.get(TENANT).json();
    let mut half_closed = Raw::request(&server, &format!("PUT {TENANT}"), &["Content-Length: 100"]);
    half_closed.send(b"{\"fresh_netns\": true}");
    half_closed.finish();
    if let Some(answer) = half_closed.answer() {
        assert_eq!(answer.problem(400), "malformed_request");
    }
    let mut gone = Raw::request(&server, &format!("PUT {TENANT}"), &["Content-Length: 100"]);
    gone.send(b"{\"fresh_netns\": true}");
    drop(gone);
    assert_eq!(server.get(TENANT).json(), before);
    server.assert_healthy();
}

#[test]
fn h3_what_comes_beyond_the_length_is_no_part_of_the_body() {
    let server = start();
    let mut raw = Raw::connect(&server);
    raw.send(head(&format!("POST {ECHO}"), &["Content-Length: 5"]).as_bytes());
    raw.send(b"helloGARBAGE\r\n\r\n");
    assert_eq!(raw.answered().expect(200).text(), "hello");
    assert_eq!(raw.answered().status, 400);
    assert!(raw.to_the_end().is_empty());
    server.assert_healthy();
}

#[test] // H3, H5
fn h3_pipelined_requests_are_answered_in_order() {
    let server = start();
    let mut raw = Raw::connect(&server);
    let requests: String = ["one", "two", "three"]
        .map(|text| head(&format!("POST {ECHO}"), &[&format!("Content-Length: {}", text.len())]) + text)
        .concat();
    raw.send(requests.as_bytes());
    for text in ["one", "two", "three"] {
        assert_eq!(raw.answered().expect(200).text(), text);
    }
}

#[test]
fn h3_a_request_with_two_framings_cannot_smuggle_another_one() {
    let server = start();
    let smuggled = head("DELETE /v1/tenants/t", &[]);
    let body = format!("0\r\n\r\n{smuggled}");
    let (length, chunked) = (format!("Content-Length: {}", body.len()), "Transfer-Encoding: chunked");
    for headers in [[length.as_str(), chunked], [chunked, length.as_str()]] {
        let mut raw = Raw::request(&server, &format!("POST {ECHO}"), &headers);
        raw.offer(body.as_bytes());
        let answer = raw.answered();
        assert!(matches!((answer.status, answer.body.len()), (200, 0) | (400, _)), "{answer:?}");
        assert!(raw.to_the_end().is_empty(), "what follows is not answered");
        server.get(TENANT).expect(200);
    }
    server.assert_healthy();
}

#[test]
fn h3_framing_that_is_none_is_400() {
    let server = start();
    for header in [
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: -1",
        "Content-Length: +5",
        "Content-Length: 0x5",
        "Content-Length: 5, 6",
        "Content-Length: 99999999999999999999999",
        "Content-Length:",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked, gzip",
    ] {
        let mut raw = Raw::request(&server, &format!("POST {ECHO}"), &[header]);
        raw.offer(b"hello");
        assert_eq!(raw.answered().status, 400, "{header}");
        assert!(raw.to_the_end().is_empty(), "{header}");
    }
    for chunks in
        ["zz\r\nhello\r\n0\r\n\r\n", "-5\r\nhello\r\n0\r\n\r\n", "fffffffffffffffff\r\nx", "5\r\nhelloxx0\r\n\r\n"]
    {
        let mut raw = Raw::request(&server, &format!("PUT {TENANT}"), &["Transfer-Encoding: chunked"]);
        raw.offer(chunks.as_bytes());
        assert_eq!(raw.answered().problem(400), "malformed_request", "{chunks:?}");
    }
    server.assert_healthy();
}

/// Sends bytes and nothing more. Gives the status of each answer that comes.
fn throw(server: &Server, bytes: &[u8]) -> Vec<u16> {
    let mut raw = Raw::connect(server);
    raw.offer(bytes);
    raw.finish();
    let answers = String::from_utf8_lossy(&raw.to_the_end()).into_owned();
    let statuses = answers.match_indices("HTTP/1.").map(|(at, _)| answers[at + 9..at + 12].parse().unwrap());
    statuses.collect()
}

#[test]
fn h5_requests_that_are_none_are_refused() {
    let server = start();
    for line in [
        "GET",
        "GET /",
        "GET / HTTP/9.9",
        "GET / HTP/1.1",
        " GET / HTTP/1.1",
        "GET  / HTTP/1.1",
        "GET /\0 HTTP/1.1",
        "GET /\u{e4} HTTP/1.1",
        "G\u{e4}T / HTTP/1.1",
        "GET / HTTP/1.1 x",
        "GET / HTTP/1.1\r\nno colon",
        "GET / HTTP/1.1\r\n: no name",
        "GET / HTTP/1.1\r\nA B: c",
        "GET / HTTP/1.1\r\nA: b\0",
        "\x16\x03\x01\x02\0\x01\0\x01\u{fc}\x03\x03",
        "PRI * HTTP/2.0\r\n\r\nSM",
        "{\"method\": \"GET\"}",
    ] {
        let statuses = throw(&server, format!("{line}\r\n\r\n").as_bytes());
        assert!(statuses.iter().all(|status| (400..500).contains(status)), "{line:?}: {statuses:?}");
    }
    for (line, status) in [
        ("GET healthz HTTP/1.1", 400),
        ("GET * HTTP/1.1", 404),
        ("OPTIONS * HTTP/1.1", 404),
        ("CONNECT holm:80 HTTP/1.1", 404),
    ] {
        let statuses = throw(&server, format!("{line}\r\nHost: holm\r\n\r\n").as_bytes());
        assert!(statuses.iter().all(|got| (400..500).contains(got)), "{line}: {statuses:?}, about {status}");
    }
    let mut old = Raw::connect(&server);
    old.send(b"GET /healthz HTTP/1.0\r\n\r\n");
    assert_eq!(old.answered().status, 200);
    server.assert_healthy();
}

#[test]
fn h5_no_garbage_makes_a_server_error() {
    let server = start();
    let mut seed = 0x9e37_79b9_u32;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); // Numerical Recipes, chapter 7
        (seed >> 8) as usize % below
    };
    let requests = [
        head("GET /v1/tenants", &["If-Match: \"x\"", "Prefer: return=representation"]).into_bytes(),
        (head("PUT /v1/tenants/garbage", &["Content-Length: 21"]) + "{\"fresh_netns\": true}").into_bytes(),
        (head("PUT /v1/tenants/t/plugins/garbage?public=true", &["Transfer-Encoding: chunked"])
            + "5\r\nhello\r\n0\r\n\r\n")
            .into_bytes(),
        head("GET /v1/tenants/t/jobs?limit=5&state=finished", &["Expect: 100-continue"]).into_bytes(),
    ];
    for round in 0..400 {
        let mut bytes: Vec<u8> = match round % 4 {
            0 => (0..random(300)).map(|_| u8::try_from(random(256)).unwrap()).collect(),
            _ => requests[random(requests.len())].clone(),
        };
        if round % 4 == 1 {
            bytes.truncate(random(bytes.len()));
        }
        if round % 4 > 1 {
            for _ in 0..=random(10) {
                let at = random(bytes.len());
                bytes[at] = u8::try_from(random(256)).unwrap();
            }
        }
        let statuses = throw(&server, &bytes);
        assert!(statuses.iter().all(|status| *status < 500), "{statuses:?}: {:?}", String::from_utf8_lossy(&bytes));
    }
    server.assert_healthy();
}

#[test]
fn h1_headers_that_do_not_come_to_an_end_are_cut_off() {
    let server = start_with("header_timeout_ms = 400");
    let mut good = Raw::connect(&server);
    good.head("GET /healthz", &[]);
    good.answered().expect(200);

    let mut silent = Raw::connect(&server);
    let mut slow = Raw::connect(&server);
    slow.send(b"GET /healthz HTTP/1.1\r\nX-Slow: ");
    let begun = Instant::now();
    wait_until("the client that sends a byte at a time is cut off", || {
        (!slow.offer(b"x") || slow.is_closed()).then_some(())
    });
    assert!(begun.elapsed() >= Duration::from_millis(400), "{:?}", begun.elapsed());
    wait_for_close("the silent client", &mut silent);
    // the one that has served its time between requests is not
    good.head("GET /healthz", &[]);
    good.answered().expect(200);
    // but its next request has to come as fast as any
    good.send(b"GET /hea");
    wait_for_close("half a second request", &mut good);
    server.assert_healthy();
}

#[test]
fn a_connection_is_kept_between_requests_until_it_has_been_idle_for_too_long() {
    let server = start_with("header_timeout_ms = 100\nidle_timeout_ms = 1000");
    let mut raw = Raw::connect(&server);
    raw.head("GET /healthz", &[]);
    raw.answered().expect(200);
    let begun = Instant::now();
    wait_for_close("the idle one", &mut raw);
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[test]
fn h2_bodies_that_come_too_slowly_are_cut_off() {
    let server = start_with("body_grace_ms = 500\nbody_bytes_per_second = 100000");
    for line in [format!("PUT {TENANT}"), "PUT /v1/tenants/t/plugins/slow".to_owned()] {
        let mut silent = Raw::request(&server, &line, &["Content-Length: 1000"]);
        assert_eq!(silent.answered().problem(408), "request_timeout", "{line}");
        wait_for_close(&line, &mut silent);
        let mut slow = Raw::request(&server, &line, &["Content-Length: 1000000"]);
        wait_until("the one that sends a byte at a time is cut off", || {
            (!slow.offer(b" ") || slow.is_closed()).then_some(())
        });
    }
    assert_eq!(server.data().join("tmp").read_dir().unwrap().count(), 0);
    let mut job = Raw::request(&server, &format!("POST {ECHO}"), &["Content-Length: 1000"]);
    let answer = job.answered();
    assert!(matches!(answer.status, 408 | 502), "{answer:?}");
    assert_eq!(last_finished(&server)["outcome"]["kind"], "cancelled");
    assert!(server.sandboxed().is_empty());
    server.assert_healthy();
}

#[test]
fn h2_a_body_that_flows_is_waited_for_but_not_for_ever() {
    let config = "body_grace_ms = 200\nbody_bytes_per_second = 1000\nbody_timeout_ms = 2000";
    let server = start_with(config);
    let put = format!("PUT {TENANT}");
    let mut flows = Raw::request(&server, &put, &["Transfer-Encoding: chunked"]);
    let begun = Instant::now();
    wait_until("it has taken five times the grace", || {
        assert!(flows.chunk(&[b' '; 100]), "it was cut off after {:?}", begun.elapsed());
        (begun.elapsed() > Duration::from_secs(1)).then_some(())
    });
    assert!(flows.chunk(b"{}") && flows.chunk(b""));
    flows.answered().expect(200);

    let mut endless = Raw::request(&server, &put, &["Transfer-Encoding: chunked"]);
    wait_until("the one without an end is cut off", || (!endless.chunk(b" ") || endless.is_closed()).then_some(()));
    server.assert_healthy();
}

/// Whether the server still holds its end of a connection open.
fn is_established(server: &Server, raw: &Raw) -> bool {
    let port = |address: &str| u16::from_str_radix(address.split_once(':').unwrap().1, 16).unwrap();
    let server_port: u16 = server.address().split_once(':').unwrap().1.parse().unwrap();
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (port(fields[1]), port(fields[2]), fields[3]) == (server_port, raw.local().port(), "01")
    })
}

#[test]
fn h2_a_client_that_does_not_read_is_cut_off_and_others_are_served() {
    let server = start_with("body_grace_ms = 1000\nbody_bytes_per_second = 1000000000");
    let flood = [r#"Holm-Args: ["flood", "stdout", "24"]"#, r#"Holm-Limits: {"output_bytes": 33554432}"#];
    let whole = 24 << 20;
    let mut slow = Raw::request(&server, &format!("POST {PROBE}"), &flood);
    assert_eq!(last_finished(&server)["outcome"]["kind"], "exited");
    assert!(is_established(&server, &slow));
    let mut good = Raw::request(&server, &format!("POST {PROBE}"), &flood);
    assert_eq!(good.answered().expect(200).body.len(), whole);
    wait_until("it is cut off", || (!is_established(&server, &slow)).then_some(()));
    assert!(slow.to_the_end().len() < whole);
    server.assert_healthy();
}

#[test]
fn h1_idle_connections_beyond_the_cap_give_way_the_oldest_first() {
    let server = start_with("connections = 4");
    let get = |raw: &mut Raw| {
        raw.head("GET /healthz", &[]);
        raw.answered().expect(200);
    };
    let mut idle: Vec<Raw> = (0..4).map(|_| Raw::connect(&server)).collect();
    idle.iter_mut().for_each(get);
    let mut fifth = Raw::connect(&server);
    get(&mut fifth);
    wait_for_close("the oldest", &mut idle[0]);
    for raw in &mut idle[1..] {
        get(raw);
    }
    // a crowd that never says a word keeps nobody out either
    let crowd: Vec<Raw> = (0..40).map(|_| Raw::connect(&server)).collect();
    for _ in 0..5 {
        let mut good = Raw::connect(&server);
        get(&mut good);
    }
    drop(crowd);
}

#[test]
fn a_connection_that_is_being_served_gives_way_to_nobody() {
    let server = start_with("connections = 2");
    let args = r#"Holm-Args: ["sleep", "60000"]"#;
    // the harness's own connection has to give way first
    let mut busy: Vec<Raw> = (0..2).map(|_| Raw::request(&server, &format!("POST {PROBE}"), &[args])).collect();
    let pids = wait_until("both jobs are running", || {
        let pids = server.sandboxed();
        (pids.len() >= 4).then_some(pids)
    });
    for _ in 0..5 {
        assert!(Raw::connect(&server).to_the_end().is_empty(), "there is no place");
    }
    assert_eq!(server.sandboxed(), pids);
    assert!(!busy[0].is_closed() && !busy[1].is_closed());
    drop(busy.pop());
    wait_until("one job is gone", || (server.sandboxed().len() < pids.len()).then_some(()));
    wait_until("there is a place again", || {
        let mut raw = Raw::connect(&server);
        raw.offer(b"GET /healthz HTTP/1.1\r\nHost: holm\r\n\r\n");
        raw.answer().map(|answer| answer.expect(200))
    });
    drop(busy);
}

#[test]
fn a_client_that_hangs_up_ends_its_job() {
    let server = start();
    let raw = Raw::request(&server, &format!("POST {PROBE}"), &[r#"Holm-Args: ["sleep", "60000"]"#]);
    wait_until("it runs", || (!server.sandboxed().is_empty()).then_some(()));
    drop(raw);
    let record = last_finished(&server);
    assert_eq!(record["outcome"], json!({"kind": "cancelled"}));
    assert!(server.sandboxed().is_empty());
    server.assert_healthy();
}

#[test]
fn a_client_that_hangs_up_in_the_middle_of_its_input_ends_its_job() {
    let server = start();
    for headers in
        [["Content-Length: 1000", r#"Holm-Args: ["count"]"#], ["Transfer-Encoding: chunked", r#"Holm-Args: ["count"]"#]]
    {
        let mut raw = Raw::request(&server, &format!("POST {PROBE}"), &headers);
        raw.send(b"5\r\nhello\r\n");
        wait_until("it runs", || (!server.sandboxed().is_empty()).then_some(()));
        drop(raw);
        assert_eq!(last_finished(&server)["outcome"], json!({"kind": "cancelled"}), "{headers:?}");
        assert!(server.sandboxed().is_empty());
    }
    server.assert_healthy();
}

#[test]
fn a_client_that_hangs_up_while_it_waits_gives_its_place_up() {
    let server = start_with("jobs_running = 1");
    let sleep = [r#"Holm-Args: ["sleep", "60000"]"#];
    let running = Raw::request(&server, &format!("POST {PROBE}"), &sleep);
    let first = server.wait_for_job("t", "running");
    let queued = Raw::request(&server, &format!("POST {PROBE}"), &sleep);
    let second = server.wait_for_job("t", "queued");
    drop(queued);
    let record = last_finished(&server);
    assert_eq!((&record["id"], &record["outcome"]["kind"]), (&second["id"], &json!("cancelled")));
    assert!(record["started_at"].is_null());
    assert_eq!(server.wait_for_job("t", "running")["id"], first["id"]);
    drop(running);
    assert_eq!(
        wait_until("both are over", || {
            let jobs = server.get("/v1/tenants/t/jobs?state=finished").json()["jobs"].as_array().unwrap().len();
            (jobs == 2).then_some(jobs)
        }),
        2
    );
    server.assert_healthy();
}

#[test]
fn hundreds_that_hang_up_at_any_moment_leave_nothing_behind() {
    let server = start();
    let request = head(&format!("POST {ECHO}"), &["Content-Length: 5"]) + "hello";
    for i in 0..200 {
        let mut raw = Raw::connect(&server);
        raw.send(&request.as_bytes()[..request.len() * (i % 20 + 1) / 20]);
    }
    wait_until("every job is over", || {
        let jobs = server.get("/v1/tenants/t/jobs?limit=1000").json();
        jobs["jobs"].as_array().unwrap().iter().all(|job| job["state"] == "finished").then_some(())
    });
    assert!(server.sandboxed().is_empty());
    server.assert_healthy();
}
