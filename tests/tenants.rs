//! Tenants and their keys: made, seen, changed, deleted, and under which conditions.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{OPERATOR, Server};

const JSON: (&str, &str) = ("content-type", "application/json");

#[test]
fn put_makes_a_tenant_and_then_replaces_all_of_its_settings() {
    let server = Server::start();
    let made = server.put_json("/v1/tenants/a", &json!({"quota": {"plugins": 5}})).expect(201).json();
    assert_eq!((&made["name"], &made["quota"]), (&json!("a"), &json!({"plugins": 5})));
    let replaced = server.put_json("/v1/tenants/a", &json!({"job_defaults": {"pids": 7}})).expect(200).json();
    assert_eq!(replaced["job_defaults"], json!({"pids": 7}));
    assert!(replaced["quota"]["plugins"].is_null(), "PUT replaces: {replaced}");
    assert_eq!(replaced["effective"]["quota"]["plugins"], json!({"value": 100, "set_by": "server"}));
    assert_eq!(made["created_at"], replaced["created_at"]);
    assert_eq!(server.get("/v1/tenants/a").expect(200).json(), replaced);
}

#[test]
fn every_setting_of_a_tenant_is_taken_and_shown() {
    let server = Server::start();
    let settings = json!({
        "limits": {"memory_bytes": 1 << 30, "cpu_cores": 1.5, "cpu_weight": 50, "pids": 500},
        "quota": {"jobs_running": 3, "jobs_queued": 4, "plugins": 5, "artifact_bytes": 1 << 20,
                  "requests_per_second": 6, "stored_output_bytes": 7},
        "job_defaults": {"memory_bytes": 64 << 20, "cpu_cores": 0.5, "fuel": 1000},
        "job_maximums": {"memory_bytes": 1 << 30, "wall_time_ms": 5000},
        "fresh_netns": true,
        "priority": 7,
    });
    let made = server.put_json("/v1/tenants/a", &settings).expect(201).json();
    for (key, value) in settings.as_object().unwrap() {
        assert_eq!(&made[key], value, "{key}");
    }
}

#[test]
fn effective_values_say_who_has_set_them() {
    let server = Server::start_with("[job_defaults]\npids = 32\n[job_maximums]\nwall_time_ms = 60000\n");
    server.tenant(
        "a",
        &json!({"quota": {"jobs_queued": 9}, "job_defaults": {"open_files": 99}, "job_maximums": {"pids": 16}}),
    );
    let effective = server.get("/v1/tenants/a").json()["effective"].clone();
    assert_eq!(effective["quota"]["jobs_queued"], json!({"value": 9, "set_by": "tenant"}));
    assert_eq!(effective["quota"]["jobs_running"], json!({"value": 64, "set_by": "server"}));
    let limits = &effective["job_limits"];
    assert_eq!(limits["open_files"]["default"], json!({"native": 99, "wasm": 99, "set_by": "tenant"}));
    assert_eq!(limits["pids"]["maximum"], json!({"value": 16, "set_by": "tenant"}));
    assert_eq!(limits["pids"]["default"]["native"], 16, "the server's default of 32, cut to the maximum");
    assert_eq!(limits["wall_time_ms"]["maximum"], json!({"value": 60_000, "set_by": "server"}));
    assert_eq!(limits["fuel"]["default"]["native"], Value::Null, "native jobs have none");
    assert_eq!(limits["fuel"]["default"]["wasm"], 10_000_000_000_u64);
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let server = Server::start();
    server.tenant("a", &json!({}));
    let effective = server.get("/v1/tenants/a").json()["effective"].clone();
    for (quota, value) in [
        ("jobs_running", 64_u64),
        ("jobs_queued", 256),
        ("plugins", 100),
        ("artifact_bytes", 64 << 20),
        ("requests_per_second", 500),
        ("stored_output_bytes", 1 << 30),
    ] {
        assert_eq!(effective["quota"][quota]["value"], value, "{quota}");
    }
    for (limit, native, wasm, maximum) in [
        ("memory_bytes", 128_u64 << 20, 128_u64 << 20, 4_u64 << 30),
        ("cpu_weight", 100, 100, 10_000),
        ("cpu_time_ms", 30_000, 30_000, 3_600_000),
        ("wall_time_ms", 30_000, 30_000, 3_600_000),
        ("pids", 64, 64, 4096),
        ("output_bytes", 4 << 20, 4 << 20, 256 << 20),
        ("input_bytes", 16 << 20, 16 << 20, 256 << 20),
        ("scratch_bytes", 16 << 20, 16 << 20, 1 << 30),
        ("scratch_inodes", 1024, 1024, 65_536),
        ("stack_bytes", 8 << 20, 1 << 20, 64 << 20),
    ] {
        let shown = &effective["job_limits"][limit];
        assert_eq!((&shown["default"]["native"], &shown["default"]["wasm"]), (&json!(native), &json!(wasm)), "{limit}");
        assert_eq!(shown["maximum"]["value"], maximum, "{limit}");
    }
    assert_eq!(effective["job_limits"]["open_files"]["default"]["native"], 256);
    assert_eq!(effective["job_limits"]["cpu_cores"]["default"]["native"], 1);
}

#[test]
fn patch_merges_and_null_restores_the_default() {
    let server = Server::start();
    server.tenant("a", &json!({"quota": {"plugins": 5, "jobs_queued": 6}, "job_defaults": {"pids": 7}}));
    let patched = server.patch_json("/v1/tenants/a", &json!({"quota": {"plugins": 8}})).expect(200).json();
    assert_eq!(patched["quota"], json!({"plugins": 8, "jobs_queued": 6}), "what is not named stays");
    assert_eq!(patched["job_defaults"], json!({"pids": 7}));
    let patch = json!({"quota": {"plugins": null}, "job_defaults": null});
    let patched = server.patch_json("/v1/tenants/a", &patch).expect(200).json();
    assert_eq!(patched["quota"], json!({"jobs_queued": 6}));
    assert!(patched["job_defaults"].is_null(), "{patched}");
    assert_eq!(patched["effective"]["quota"]["plugins"], json!({"value": 100, "set_by": "server"}));
    assert_eq!(patched["effective"]["job_limits"]["pids"]["default"]["native"], 64);
    assert_eq!(server.get("/v1/tenants/a").json(), patched);
    let same = server.patch_json("/v1/tenants/a", &json!({})).expect(200).json();
    assert_eq!(same, patched, "an empty patch changes nothing");
    server.patch_json("/v1/tenants/b", &json!({})).problem(404);
}

#[test]
fn patches_at_once_are_all_laid_over_each_other() {
    let server = Server::start().with_probe();
    std::thread::scope(|scope| {
        for (i, key) in ["plugins", "jobs_running", "jobs_queued", "requests_per_second"].into_iter().enumerate() {
            let server = &server;
            scope.spawn(move || {
                for round in 0..10 {
                    let name = format!("V{i}_{round}");
                    server.patch_json("/v1/tenants/t", &json!({"quota": {key: 1000 + round}})).expect(200);
                    server.patch_json("/v1/tenants/t/plugins/probe", &json!({"env": {name: ""}})).expect(200);
                }
            });
        }
    });
    let quota = json!({"plugins": 1009, "jobs_running": 1009, "jobs_queued": 1009, "requests_per_second": 1009});
    assert_eq!(server.get("/v1/tenants/t").json()["quota"], quota);
    assert_eq!(server.get("/v1/tenants/t/plugins/probe").json()["env"].as_object().unwrap().len(), 40);
}

#[test]
fn a_patch_that_would_make_bad_settings_changes_nothing() {
    let server = Server::start();
    server.tenant("a", &json!({"job_defaults": {"pids": 7}}));
    let before = server.get("/v1/tenants/a").json();
    let patch = json!({"quota": {"plugins": 9}, "job_maximums": {"pids": 6}, "job_defaults": {"pids": 8}});
    assert_eq!(server.patch_json("/v1/tenants/a", &patch).problem(422), "limit_out_of_range");
    assert_eq!(server.get("/v1/tenants/a").json(), before);
}

#[test]
fn tenants_are_listed_in_the_order_of_their_names() {
    let server = Server::start();
    assert_eq!(server.get("/v1/tenants").expect(200).json(), json!({"tenants": []}));
    for name in ["b", "c", "a"] {
        server.tenant(name, &json!({}));
    }
    let listed = server.get("/v1/tenants").json();
    let names: Vec<&str> = listed["tenants"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(listed["tenants"][0], server.get("/v1/tenants/a").json());
}

#[test]
fn delete_takes_a_tenant_s_plugins_jobs_keys_and_files_with_it() {
    let server = Server::start().with_probe();
    let key = server.key("t");
    let job = server.probe(&["exit", "0"], &json!({}));
    let artifacts = server.data().join("artifacts/t");
    assert!(artifacts.exists());
    server.operator("DELETE", "/v1/tenants/t", &[], b"").expect(204);
    server.get("/v1/tenants/t").problem(404);
    server.operator("DELETE", "/v1/tenants/t", &[], b"").problem(404);
    server.send(&key, "GET", "/v1/tenants/t", &[], b"").problem(401);
    server.get(&format!("/v1/jobs/{}", job["id"].as_str().unwrap())).problem(404);
    assert!(!artifacts.exists());
    // another one of that name begins with nothing
    server.tenant("t", &json!({}));
    assert_eq!(server.get("/v1/tenants/t/plugins").json(), json!({"plugins": []}));
    assert_eq!(server.get("/v1/tenants/t/keys").json(), json!({"keys": []}));
    assert_eq!(server.get("/v1/tenants/t/jobs").json(), json!({"jobs": [], "next_cursor": null}));
    server.send(&key, "GET", "/v1/tenants/t", &[], b"").problem(401);
}

#[test]
fn delete_kills_what_runs_before_it_answers() {
    let server = Server::start().with_probe();
    let answer = std::thread::scope(|scope| {
        let job = scope.spawn(|| {
            let words = [("holm-args", r#"["sleep", "60000"]"#)];
            server.operator("POST", "/v1/tenants/t/plugins/probe/jobs", &words, b"")
        });
        server.wait_for_job("t", "running");
        server.operator("DELETE", "/v1/tenants/t", &[], b"").expect(204);
        assert!(server.sandboxed().is_empty());
        job.join().unwrap()
    });
    assert_eq!(answer.problem(502), "cancelled");
}

#[test]
fn changes_happen_only_in_the_state_that_the_request_is_for() {
    let server = Server::start();
    let send = |method: &str, condition: (&str, &str)| {
        server.operator(method, "/v1/tenants/a", &[JSON, condition], b"{\"fresh_netns\": true}")
    };
    // nothing is there yet
    assert_eq!(send("PUT", ("if-match", "*")).problem(412), "precondition_failed");
    assert_eq!(send("PUT", ("if-match", "\"x\"")).problem(412), "precondition_failed");
    server.get("/v1/tenants/a").problem(404);
    let first = send("PUT", ("if-none-match", "*")).expect(201).header("etag").to_owned();
    assert!(first.starts_with('"') && first.ends_with('"') && first.len() > 10, "{first}");
    assert_eq!(server.get("/v1/tenants/a").header("etag"), first);
    // it is there now
    assert_eq!(send("PUT", ("if-none-match", "*")).problem(412), "precondition_failed");
    server.patch_json("/v1/tenants/a", &json!({"quota": {"plugins": 3}})).expect(200);
    let second = server.get("/v1/tenants/a").header("etag").to_owned();
    assert_ne!(first, second);
    for method in ["PUT", "PATCH", "DELETE"] {
        assert_eq!(send(method, ("if-match", &first)).problem(412), "precondition_failed", "{method}");
        assert_eq!(send(method, ("if-match", &format!("W/{second}"))).problem(412), "precondition_failed", "{method}");
    }
    assert_eq!(server.get("/v1/tenants/a").header("etag"), second, "nothing has changed");
    let third = send("PUT", ("if-match", &format!("{first}, {second}"))).expect(200).header("etag").to_owned();
    send("PATCH", ("if-match", "*")).expect(200);
    send("DELETE", ("if-match", &third)).expect(204);
}

#[test]
fn a_key_is_shown_once_works_and_is_stored_only_as_a_hash() {
    let server = Server::start();
    server.tenant("a", &json!({}));
    let answer = server.operator("POST", "/v1/tenants/a/keys", &[], b"").expect(201);
    assert_eq!(answer.header("cache-control"), "no-store");
    let made = answer.json();
    let (id, key) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    assert!(key.len() >= 43 && key.bytes().all(|b| b.is_ascii_graphic()), "256 bits: {}", key.len());
    server.send(key, "GET", "/v1/tenants/a", &[], b"").expect(200);
    let listed = server.get("/v1/tenants/a/keys").expect(200);
    assert!(!listed.text().contains(key));
    assert_eq!((&listed.json()["keys"][0]["id"], listed.json()["keys"][0].as_object().unwrap().len()), (&json!(id), 2));
    assert!(!server.log().contains(key));
    assert_eq!(files_with(&server.data(), key.as_bytes()), [] as [String; 0]);
    assert_eq!(files_with(&server.data(), OPERATOR.as_bytes()), [] as [String; 0]);
}

/// The files below `dir` that hold `needle`.
fn files_with(dir: &Path, needle: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_with(&path, needle));
        } else if fs::read(&path).unwrap().windows(needle.len()).any(|window| window == needle) {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn every_key_is_another_one_and_a_deleted_one_dies_at_once_alone() {
    let server = Server::start();
    server.tenant("a", &json!({}));
    server.tenant("b", &json!({}));
    let keys = [server.key("a"), server.key("a"), server.key("b")];
    assert!(keys[0] != keys[1] && keys[1] != keys[2]);
    let listed = server.get("/v1/tenants/a/keys").json();
    let first = listed["keys"][0]["id"].as_str().unwrap();
    // another tenant's path does not reach it
    server.operator("DELETE", &format!("/v1/tenants/b/keys/{first}"), &[], b"").problem(404);
    server.send(&keys[0], "GET", "/v1/tenants/a", &[], b"").expect(200);
    server.operator("DELETE", &format!("/v1/tenants/a/keys/{first}"), &[], b"").expect(204);
    server.send(&keys[0], "GET", "/v1/tenants/a", &[], b"").problem(401);
    server.operator("DELETE", &format!("/v1/tenants/a/keys/{first}"), &[], b"").problem(404);
    server.send(&keys[1], "GET", "/v1/tenants/a", &[], b"").expect(200);
    server.send(&keys[2], "GET", "/v1/tenants/b", &[], b"").expect(200);
}
