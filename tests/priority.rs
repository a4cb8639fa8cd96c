//! Tenants' priorities: whose jobs are served first, and whose stand still meanwhile where the operator wants that.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::inspect::Running;
use support::raw::Raw;
use support::{Server, native, wait_until};

const PATIENT: &str = "body_grace_ms = 120000\nqueue_timeout_ms = 120000\nparked_per_plugin = 0\n";

/// A server with room for so many jobs, and the tenants `low`, `usual` and `high` of those priorities.
fn start(running: usize, freeze: bool) -> Server {
    let server = Server::start_with(&format!("{PATIENT}jobs_running = {running}\nfreeze_lower_priority = {freeze}\n"))
        .with_probe();
    for (tenant, settings) in
        [("low", json!({"priority": 10})), ("usual", json!({})), ("high", json!({"priority": 900}))]
    {
        server.tenant(tenant, &settings);
        server.upload(tenant, "probe", &native("probe"));
    }
    server
}

fn run(server: &Server, tenant: &str, words: &[&str], limits: &Value) -> Running {
    Running::start(server, tenant, "probe", &json!(words), limits)
}

/// A job that has been asked for. Its answer is its record.
fn ask(server: &Server, tenant: &str, words: &[&str]) -> Raw {
    let args = format!("holm-args: {}", json!(words));
    let headers = ["content-length: 0", "prefer: return=representation", &args];
    Raw::request(server, &format!("POST /v1/tenants/{tenant}/plugins/probe/jobs"), &headers)
}

fn state(server: &Server, job: &Running) -> Value {
    server.record(job.id())["state"].clone()
}

#[track_caller]
fn comes_to(server: &Server, job: &Running, state: &str) {
    wait_until(&format!("it is {state}"), || (self::state(server, job) == state).then_some(()));
}

#[track_caller]
fn exited(record: &Value) {
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
}

#[test]
fn waiting_jobs_are_served_by_priority_and_in_turn_among_equals() {
    let server = start(1, false);
    let holder = run(&server, "usual", &["report-and-wait"], &json!({}));
    let mut requests = Vec::new();
    for (i, tenant) in ["low", "usual", "high", "low", "high", "usual"].into_iter().enumerate() {
        requests.push((tenant, ask(&server, tenant, &["tell-time", "sleep", "30"])));
        wait_until("it waits", || {
            let queued = |tenant: &str| {
                let jobs = server.get(&format!("/v1/tenants/{tenant}/jobs?state=queued")).json();
                jobs["jobs"].as_array().unwrap().len()
            };
            (["low", "usual", "high"].map(queued).iter().sum::<usize>() == i + 1).then_some(())
        });
    }
    assert_eq!(state(&server, &holder), "running", "nobody is made to stand still");
    holder.finish().expect(200);
    let mut order: Vec<(u64, &str)> = requests
        .into_iter()
        .map(|(tenant, mut request)| {
            let record = request.answered().expect(200).json();
            (record["output"].as_str().unwrap().trim_end().parse().unwrap(), tenant)
        })
        .collect();
    order.sort_unstable();
    let order: Vec<&str> = order.into_iter().map(|(_, tenant)| tenant).collect();
    assert_eq!(order, ["high", "high", "usual", "usual", "low", "low"]);
    let shown = server.get("/v1/tenants/high").expect(200).json();
    assert_eq!(shown["effective"]["priority"], json!({"value": 900, "set_by": "tenant"}));
    let shown = server.get("/v1/tenants/usual").expect(200).json();
    assert_eq!(shown["effective"]["priority"], json!({"value": 100, "set_by": "server"}));
}

#[test]
fn a_job_lends_its_place_to_one_of_higher_priority_and_its_clock_stands() {
    let server = start(1, true);
    let low = run(&server, "low", &["converse", "2500"], &json!({}));
    low.wait_for_cpu(&server, Duration::from_millis(5));
    let high = run(&server, "high", &["report-and-wait"], &json!({}));
    assert_eq!((state(&server, &low), state(&server, &high)), (json!("paused"), json!("running")));
    server.limit_wall_time(&low, Duration::from_millis(2000));
    low.assert_still(&server, Duration::from_millis(2100));
    assert_eq!(server.order(low.id(), "resume").problem(409), "place_lent");
    // one of its own priority waits for it, and so does one of the usual one behind it
    let mut usual = ask(&server, "usual", &["exit", "0"]);
    server.wait_for_job("usual", "queued");
    high.finish().expect(200);
    exited(&usual.answered().expect(200).json());
    let record = low.finish().expect(200).json();
    exited(&record);
    assert!(record["usage"]["paused_us"].as_u64().unwrap() >= 2_100_000, "{record}");
    let said: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
    assert_eq!((&said["in_order"], &said["kept"]), (&json!(true), &json!(true)));
    server.assert_healthy();
}

#[test]
fn equals_wait_for_each_other_and_those_that_lent_come_first() {
    let server = start(2, true);
    let first = run(&server, "low", &["spin", "60000"], &json!({}));
    let second = run(&server, "low", &["spin", "60000"], &json!({}));
    let mut third = ask(&server, "low", &["exit", "0"]);
    server.wait_for_job("low", "queued");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((state(&server, &first), state(&server, &second)), (json!("running"), json!("running")));
    // one place is asked for, and it is that of the job which has run less
    let high = run(&server, "high", &["report-and-wait"], &json!({}));
    assert_eq!((state(&server, &first), state(&server, &second)), (json!("running"), json!("paused")));
    let higher = run(&server, "high", &["report-and-wait"], &json!({}));
    assert_eq!(state(&server, &first), "paused");
    high.finish().expect(200);
    comes_to(&server, &first, "running");
    higher.finish().expect(200);
    comes_to(&server, &second, "running");
    assert_eq!(server.wait_for_job("low", "queued")["state"], "queued", "it came last");
    for job in [&first, &second] {
        server.order(job.id(), "cancel").expect(200);
    }
    exited(&third.answered().expect(200).json());
    server.assert_healthy();
}

#[test]
fn jobs_that_have_lent_their_places_end_as_others_do() {
    let server = start(1, true);
    // cancelled while its place is lent
    let low = run(&server, "low", &["fork-bomb", "1000"], &json!({}));
    let high = run(&server, "high", &["report-and-wait"], &json!({}));
    assert_eq!(server.order(low.id(), "cancel").expect(200).json()["outcome"], json!({"kind": "cancelled"}));
    high.finish().expect(200);
    // paused by itself too: it stays so when it has its place again
    let low = run(&server, "low", &["spin", "60000"], &json!({}));
    let high = run(&server, "high", &["report-and-wait"], &json!({}));
    server.pause(&low);
    high.finish().expect(200);
    let mut usual = ask(&server, "usual", &["exit", "0"]);
    exited(&usual.answered().expect(200).json());
    low.assert_still(&server, Duration::from_millis(50));
    server.resume(&low);
    low.wait_for_cpu(&server, Duration::from_millis(10));
    // with its tenant
    let high = run(&server, "high", &["report-and-wait"], &json!({}));
    server.operator("DELETE", "/v1/tenants/low", &[], b"").expect(204);
    assert_eq!(low.answer().expect(200).json()["outcome"], json!({"kind": "cancelled"}));
    high.finish().expect(200);
    server.assert_healthy();
}

#[test]
fn a_server_with_lent_places_stops_in_time() {
    let config = format!("{PATIENT}jobs_running = 1\nfreeze_lower_priority = true\ndrain_timeout_ms = 400\n");
    let mut server = Server::start_with(&config).with_probe();
    server.tenant("high", &json!({"priority": 900}));
    server.upload("high", "probe", &native("probe"));
    let _low = run(&server, "t", &["spin", "60000"], &json!({}));
    let _high = run(&server, "high", &["spin", "60000"], &json!({}));
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success(), "{}", server.log());
    server.assert_nothing_left();
}

#[test]
fn in_a_crowd_every_job_comes_to_its_end() {
    const EACH: usize = 12;
    let server = start(3, true);
    let records: Vec<Value> = std::thread::scope(|scope| {
        let tenants = ["low", "usual", "high"].into_iter().enumerate();
        let workers = tenants.flat_map(|(i, tenant)| {
            let server = &server;
            (0..EACH).map(move |j| {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis((37 * (i * EACH + j) as u64) % 700));
                    ask(server, tenant, &["converse", "150"]).answered().expect(200).json()
                })
            })
        });
        let workers: Vec<_> = workers.collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    records.iter().for_each(exited);
    let lent = records.iter().filter(|record| record["usage"].get("paused_us").is_some()).count();
    println!("{lent} of {} jobs lent their places", records.len());
    wait_until("nothing is left", || server.sandboxed().is_empty().then_some(()));
    server.assert_healthy();
}
