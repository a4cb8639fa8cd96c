//! A tenant's devices: which it can open and how, how fast it gets at them, each felt from inside a job.
//!
//! The block devices are loop devices of the test's own.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use serde_json::{Value, json};
use support::loops::Loop;
use support::{Server, native};

const MIB: u64 = 1 << 20;

fn start(limits: &Value) -> Server {
    let server = Server::start();
    server.tenant("t", &json!({ "limits": limits }));
    server.upload("t", "probe", &native("probe"));
    server
}

#[track_caller]
fn said(server: &Server, words: &[&str]) -> Value {
    let record = server.probe(words, &json!({}));
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{words:?}: {record}");
    serde_json::from_str(record["output"].as_str().unwrap()).unwrap()
}

fn rule(device: &Loop, access: &str) -> Value {
    json!({"type": "block", "device": device.number, "access": access})
}

/// Operations and bytes a second that a job gets.
fn rate(server: &Server, way: &str, device: &Loop, block: u64) -> (f64, f64) {
    let path = format!("/dev/{}", device.name());
    let told = said(server, &["direct", way, &path, &block.to_string(), "2500"]);
    let operations = told["blocks"].as_f64().unwrap() * 1e6 / told["us"].as_f64().unwrap();
    (operations, operations * block as f64)
}

#[test]
fn a_listed_device_has_a_node_of_the_job_s_own_and_opens_as_listed() {
    let (listed, read_only, other) = (Loop::new(MIB), Loop::new(MIB), Loop::new(MIB));
    let server = start(&json!({"devices": [rule(&listed, "rw"), rule(&read_only, "r")]}));
    let node = |device: &Loop| said(&server, &["node", &format!("/dev/{}", device.name()), "r", "w", "rw"]);
    assert_eq!(node(&listed), json!({"errnos": [0, 0, 0], "own": true, "mode": "600"}));
    let (read_only, denied) = (node(&read_only), json!(libc::EACCES));
    assert_eq!((&read_only["mode"], &read_only["errnos"]), (&json!("400"), &json!([0, denied, denied])));
    let names = said(&server, &["list", "/dev"]);
    assert!(!names.as_array().unwrap().contains(&json!(other.name())), "{names}");
    assert!(names.as_array().unwrap().contains(&json!("null")), "{names}");
    // without a list, the standard six alone
    server.patch_json("/v1/tenants/t", &json!({"limits": {"devices": null}})).expect(200);
    let names = said(&server, &["list", "/dev"]);
    assert!(!names.as_array().unwrap().contains(&json!(listed.name())), "{names}");
    let six = said(&server, &["open", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"]);
    assert!(six.as_object().unwrap().values().all(|way| *way == json!({"read": 0, "write": 0})), "{six}");
}

#[test]
fn a_device_that_is_taken_off_the_list_is_refused_to_jobs_that_have_its_node() {
    let device = Loop::new(MIB);
    let server = start(&json!({"devices": [rule(&device, "rw")]}));
    let path = format!("/dev/{}", device.name());
    let wait = json!(["after-input", "node", &path, "r", "w"]);
    let opens = |limits: &Value| {
        let job = support::inspect::Running::start(&server, "t", "probe", &wait, &json!({}));
        server.patch_json("/v1/tenants/t", &json!({ "limits": limits })).expect(200);
        let record = job.finish().expect(200).json();
        serde_json::from_str::<Value>(record["output"].as_str().unwrap()).unwrap()["errnos"].clone()
    };
    assert_eq!(opens(&json!({})), json!([0, 0]));
    assert_eq!(opens(&json!({"devices": [rule(&device, "r")]})), json!([0, libc::EPERM]));
    server.patch_json("/v1/tenants/t", &json!({"limits": {"devices": [rule(&device, "rw")]}})).expect(200);
    assert_eq!(opens(&json!({"devices": null})), json!([libc::EPERM, libc::EPERM]));
}

#[test]
fn reads_and_writes_are_held_to_their_rates() {
    let device = Loop::new(64 * MIB);
    let free = start(&json!({"devices": [rule(&device, "rw")]}));
    let (_, fast) = rate(&free, "read", &device, 64 << 10);
    assert!(fast > 8.0 * MIB as f64, "without a rate: {fast}");
    let near = |found: f64, expected: u64, what: &str| {
        assert!((found / expected as f64 - 1.0).abs() <= 0.15, "{what}: {found} is not {expected}");
    };
    let set = |limits: Value| {
        let mut io = json!({"device": device.number});
        io.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
        free.patch_json("/v1/tenants/t", &json!({"limits": {"io": [io]}})).expect(200);
    };
    set(json!({"read_bps": 2 * MIB}));
    near(rate(&free, "read", &device, 64 << 10).1, 2 * MIB, "bytes read");
    set(json!({"write_bps": MIB}));
    near(rate(&free, "write", &device, 64 << 10).1, MIB, "bytes written");
    set(json!({"read_iops": 100, "write_iops": 50}));
    near(rate(&free, "read", &device, 4096).0, 100, "reads");
    near(rate(&free, "write", &device, 4096).0, 50, "writes");
    free.patch_json("/v1/tenants/t", &json!({"limits": {"io": null}})).expect(200);
    let (_, again) = rate(&free, "read", &device, 64 << 10);
    assert!(again > 8.0 * MIB as f64, "without a rate again: {again}");
}

#[test]
fn two_jobs_of_a_tenant_share_its_rate_and_another_tenant_has_its_own() {
    let device = Loop::new(64 * MIB);
    let limits = json!({"devices": [rule(&device, "r")], "io": [{"device": device.number, "read_bps": 2 * MIB}]});
    let server = start(&limits);
    server.tenant("other", &json!({"limits": {"devices": [rule(&device, "r")]}}));
    server.upload("other", "probe", &native("probe"));
    let path = format!("/dev/{}", device.name());
    let words = json!(["direct", "read", path, "65536", "2500"]);
    let bytes = |tenant: &str| -> f64 {
        let record = server.job(tenant, "probe", &words, &json!({}), b"");
        let told: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
        told["blocks"].as_f64().unwrap() * 65536.0 * 1e6 / told["us"].as_f64().unwrap()
    };
    let (mine, others) = std::thread::scope(|scope| {
        let jobs = ["t", "t", "other"].map(|tenant| {
            scope.spawn({
                let bytes = &bytes;
                move || bytes(tenant)
            })
        });
        let [first, second, other] = jobs.map(|job| job.join().unwrap());
        (first + second, other)
    });
    // jobs that begin one after the other overlap for most of the time, and share for all of that
    assert!(mine < 1.5 * 2.0 * MIB as f64 && mine > 2.0 * MIB as f64 * 0.85, "{mine}");
    assert!(others > 2.0 * mine, "{others} {mine}");
}
