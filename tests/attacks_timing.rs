//! What a neighbour or a client does to the time of others, against these others' own time in the same run. One
//! measurement at a time. Rows H1 and X12 of the threats.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use support::inspect::Running;
use support::plain::outside;
use support::raw::Raw;
use support::slowness::wait_for_nobody;
use support::{Server, native};

const TENANT: &str = "/v1/tenants/t";

/// A server with the probe, to be measured alone.
fn start_with(config: &str) -> (Server, MutexGuard<'static, ()>) {
    static ONE: Mutex<()> = Mutex::new(());
    let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    (Server::start_with(config).with_probe(), alone)
}

/// How long a good client waits for an answer, on a connection of its own.
fn wait(server: &Server) -> Duration {
    wait_for_nobody();
    let begun = Instant::now();
    Raw::request(server, "GET /v1/tenants/t", &[]).answered().expect(200);
    begun.elapsed()
}

/// The 99th of a hundred.
fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() * 98 / 100]
}

#[test] // H1, H2
fn h1_thousands_of_idle_half_open_and_dripping_connections_leave_a_good_client_its_time() {
    let (server, _alone) = start_with("connections = 6000\nheader_timeout_ms = 60000\nbody_grace_ms = 60000");
    let quiet = Server::start().with_probe();
    let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    let crowd = if most >= 12_000 { 5000 } else { 1000 };
    if crowd < 5000 {
        println!("NOT SHOWN: H1: {crowd} connections instead of 5000, as this process may open {most} files");
    }
    let connections: Vec<Raw> = (0..crowd)
        .map(|i| {
            let mut raw = Raw::connect(&server);
            match i % 4 {
                0 => {}
                1 => raw.send(b"GET /v1/tenants HTTP/1.1\r\nX-Slow: "),
                2 => raw.head(&format!("PUT {TENANT}"), &["Content-Length: 100"]),
                _ => raw.finish(),
            }
            raw
        })
        .collect();
    // by turns, so that whatever else this machine does slows both down; the best of some rounds
    let mut best = [Duration::MAX; 2];
    for round in 0..60 {
        if round >= 3 && best[1] <= 2 * best[0] {
            break;
        }
        let times: Vec<[Duration; 2]> = (0..100).map(|_| [wait(&quiet), wait(&server)]).collect();
        for (i, best) in best.iter_mut().enumerate() {
            *best = p99(times.iter().map(|pair| pair[i]).collect()).min(*best);
        }
    }
    println!("p99 alone {:?}, beside {crowd} idle connections {:?}", best[0], best[1]);
    assert!(best[1] <= 2 * best[0], "{best:?}");
    drop(connections);
    server.assert_healthy();
}

#[test]
fn x12_a_storm_of_barriers_and_page_faults_leaves_a_neighbour_within_twice_its_own_time() {
    if outside(&["storm", "50"]) != "0" {
        println!("NOT SHOWN OUTSIDE: X12: this kernel has no barrier for all CPUs");
    }
    let (server, _alone) = start_with("");
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    let p95 = || {
        wait_for_nobody();
        let mut times: Vec<Duration> = (0..60)
            .map(|_| {
                let start = Instant::now();
                server.job("other", "probe", &json!(["exit", "0"]), &json!({}), b"");
                start.elapsed()
            })
            .collect();
        times.sort();
        times[times.len() * 95 / 100]
    };
    // the rest of this machine is no part of the question, nor is the worst of so few: it holds if the best of all rounds
    // say so, or half of the rounds, each of which has met the machine in one mood
    let (mut best, mut rounds, mut good) = ([Duration::MAX; 2], 0, 0);
    let holds = loop {
        let alone = p95();
        let storm = Running::start(&server, "t", "probe", &json!(["storm", "60000"]), &json!({}));
        let beside = p95();
        let id = storm.id().to_owned();
        server.operator("POST", &format!("/v1/jobs/{id}/cancel"), &[], b"").expect(200);
        assert_eq!(storm.answer().expect(200).json()["outcome"]["kind"], "cancelled");
        println!("p95 alone {alone:?}, in the storm {beside:?}");
        best = [best[0].min(alone), best[1].min(beside)];
        rounds += 1;
        good += u32::from(beside <= 2 * alone);
        if best[1] <= 2 * best[0] || (rounds >= 3 && 2 * good >= rounds) {
            break true;
        }
        if rounds == 15 {
            break false;
        }
    };
    assert!(holds, "{best:?}; {good} good rounds of {rounds}");
    let record = server.probe(&["storm", "50"], &json!({}));
    assert_eq!(record["output"], "1\n", "the barrier that reaches other jobs' CPUs is refused");
}
