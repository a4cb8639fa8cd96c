//! Plugins: uploaded, set up, replaced and deleted by their tenant.

mod support;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::raw::{Raw, multipart};
use support::{Answer, Server, native, wait_until, wasm, wat};

const PATH: &str = "/v1/tenants/t/plugins/p";

fn start() -> Server {
    let server = Server::start();
    server.tenant("t", &json!({}));
    server
}

fn revision(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Uploads a form to `path`.
fn put_form(server: &Server, path: &str, parts: &[(&str, &[u8])]) -> Answer {
    let (content_type, body) = multipart(parts);
    server.operator("PUT", path, &[("content-type", &content_type)], &body)
}

#[test]
fn a_first_upload_is_201_the_next_200_and_the_revision_is_the_digest_of_the_bytes() {
    let server = start();
    let (first, second) = (native("echo"), native("word-count"));
    let made = server.operator("PUT", PATH, &[], &first).expect(201).json();
    assert_eq!(
        (&made["name"], &made["runtime"], &made["interface"]),
        (&json!("p"), &json!("native"), &json!("command"))
    );
    assert_eq!((&made["revision"], &made["bytes"]), (&json!(revision(&first)), &json!(first.len())));
    let same = server.operator("PUT", PATH, &[], &first).expect(200).json();
    assert_eq!(same["revision"], made["revision"]);
    let replaced = server.operator("PUT", PATH, &[], &second).expect(200).json();
    assert_eq!((&replaced["revision"], &replaced["created_at"]), (&json!(revision(&second)), &made["created_at"]));
    assert_eq!(server.get(PATH).expect(200).json(), replaced);
    let answer = server.operator("POST", &format!("{PATH}/jobs"), &[], b"a b").expect(200);
    assert!(answer.text().starts_with("lines "), "the second one runs: {}", answer.text());
}

#[test]
fn what_an_artifact_is_is_told_from_its_bytes_alone() {
    let server = start();
    let text = wat("", "").into_bytes();
    for (name, artifact, content_type, runtime) in [
        ("elf", native("echo"), "application/wasm", "native"),
        ("module", wasm("echo"), "text/plain", "wasm"),
        ("text", text.clone(), "application/json", "wasm"),
        ("bare", text, "", "wasm"),
    ] {
        let path = format!("/v1/tenants/t/plugins/{name}");
        let answer = server.operator("PUT", &path, &[("content-type", content_type)], &artifact).expect(201).json();
        assert_eq!(answer["runtime"], runtime, "{name}");
        server.operator("POST", &format!("{path}/jobs"), &[], b"").expect(200);
    }
}

#[test]
fn a_form_takes_artifact_and_manifest_in_either_order() {
    let server = start();
    let artifact = native("probe");
    let manifest = json!({
        "interface": "command", "args": ["args"], "env": {"A": "b"}, "limits": {"pids": 9}, "public": false,
        "output_content_type": "application/json",
    });
    let (artifact, manifest) = (("artifact", &artifact[..]), ("manifest", manifest.to_string().into_bytes()));
    let manifest = (manifest.0, &manifest.1[..]);
    for (name, parts) in [("am", [artifact, manifest]), ("ma", [manifest, artifact])] {
        let path = format!("/v1/tenants/t/plugins/{name}");
        let made = put_form(&server, &path, &parts).expect(201).json();
        assert_eq!(made["revision"], revision(artifact.1));
        assert_eq!((&made["limits"], &made["env"]), (&json!({"pids": 9}), &json!({"A": "b"})));
        assert_eq!(made["effective_limits"]["pids"], 9);
        let job = server.operator("POST", &format!("{path}/jobs"), &[], b"").expect(200);
        assert_eq!((job.json(), job.header("content-type")), (json!([name, "args"]), "application/json"));
    }
    put_form(&server, PATH, &[artifact]).expect(201);
}

#[test]
fn an_artifact_alone_keeps_the_settings_and_a_manifest_replaces_them() {
    let server = start();
    let (artifact, other) = (native("echo"), native("word-count"));
    put_form(&server, PATH, &[("artifact", &artifact), ("manifest", br#"{"args": ["x"], "public": true}"#)])
        .expect(201);
    for kept in [
        server.operator("PUT", PATH, &[], &other).expect(200).json(),
        put_form(&server, PATH, &[("artifact", &artifact)]).expect(200).json(),
    ] {
        assert_eq!((&kept["args"], &kept["public"]), (&json!(["x"]), &json!(true)));
    }
    let replaced = put_form(&server, PATH, &[("manifest", b"{}"), ("artifact", &artifact)]).expect(200).json();
    assert_eq!((&replaced["args"], &replaced["public"]), (&json!([]), &json!(false)));
}

#[test]
fn the_query_sets_interface_and_public() {
    let server = start();
    let artifact = native("echo");
    let put = |query: &str| server.operator("PUT", &format!("{PATH}{query}"), &[], &artifact);
    assert_eq!(put("?public=true").expect(201).json()["public"], true);
    assert_eq!(put("").expect(200).json()["public"], true, "kept");
    let made = put("?public=false&interface=command").expect(200).json();
    assert_eq!((&made["public"], &made["interface"]), (&json!(false), &json!("command")));
    for bad in ["?public=maybe", "?interface=ftp", "?limits=1", "?public=true&public=true"] {
        assert_eq!(put(bad).problem(400), "malformed_request", "{bad}");
    }
    assert_eq!(server.get(PATH).json()["public"], false);
}

#[test]
fn settings_that_are_patched_during_an_upload_are_kept() {
    let server = start();
    server.upload("t", "p", &native("echo"));
    let artifact = native("word-count");
    let length = format!("Content-Length: {}", artifact.len());
    let mut upload = Raw::request(&server, &format!("PUT {PATH}"), &[&length]);
    upload.send(&artifact[..1000]);
    wait_until("the upload has begun", || (server.data().join("tmp").read_dir().unwrap().count() > 0).then_some(()));
    server.patch_json(PATH, &json!({"args": ["--top", "1"], "public": true})).expect(200);
    upload.send(&artifact[1000..]);
    let made = upload.answered().expect(200).json();
    assert_eq!(made["revision"], revision(&artifact));
    assert_eq!((&made["args"], &made["public"]), (&json!(["--top", "1"]), &json!(true)));
}

#[test]
fn patch_merges_and_null_restores_the_default() {
    let server = start();
    let artifact = native("probe");
    let manifest = br#"{"args": ["args"], "env": {"A": "1", "B": "2"}, "limits": {"pids": 9, "open_files": 99}}"#;
    put_form(&server, PATH, &[("artifact", &artifact), ("manifest", manifest)]).expect(201);
    let patch = json!({"env": {"A": null, "C": "3"}, "limits": {"pids": 10}, "output_content_type": "text/plain"});
    let patched = server.patch_json(PATH, &patch).expect(200).json();
    assert_eq!(patched["env"], json!({"B": "2", "C": "3"}));
    assert_eq!(patched["limits"], json!({"pids": 10, "open_files": 99}));
    assert_eq!((&patched["args"], &patched["output_content_type"]), (&json!(["args"]), &json!("text/plain")));
    assert_eq!(patched["revision"], revision(&artifact), "the artifact stays");
    let patch = json!({"args": null, "limits": null, "output_content_type": null, "env": null});
    let patched = server.patch_json(PATH, &patch).expect(200).json();
    assert_eq!((&patched["args"], &patched["limits"], &patched["env"]), (&json!([]), &json!({}), &json!({})));
    assert_eq!((&patched["output_content_type"], &patched["effective_limits"]["pids"]), (&Value::Null, &json!(64)));
    assert_eq!(server.get(PATH).json(), patched);
}

#[test]
fn plugins_are_listed_each_tenant_s_own() {
    let server = start();
    server.tenant("other", &json!({}));
    server.upload("other", "theirs", &native("echo"));
    for name in ["b", "a"] {
        server.upload("t", name, &native("echo"));
    }
    let listed = server.get("/v1/tenants/t/plugins").expect(200).json();
    let names: Vec<&Value> = listed["plugins"].as_array().unwrap().iter().map(|plugin| &plugin["name"]).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(listed["plugins"][0], server.get("/v1/tenants/t/plugins/a").json());
}

#[test]
fn delete_takes_the_plugin_and_the_files_that_no_other_one_has() {
    let server = start();
    let artifact = native("echo");
    server.upload("t", "p", &artifact);
    server.upload("t", "same", &artifact);
    let file = server.data().join("artifacts/t").join(hex::encode(Sha256::digest(&artifact)));
    server.operator("DELETE", PATH, &[], b"").expect(204);
    server.get(PATH).problem(404);
    server.operator("DELETE", PATH, &[], b"").problem(404);
    server.operator("POST", &format!("{PATH}/jobs"), &[], b"").problem(404);
    assert!(file.exists());
    server.operator("POST", "/v1/tenants/t/plugins/same/jobs", &[], b"").expect(200);
    server.operator("DELETE", "/v1/tenants/t/plugins/same", &[], b"").expect(204);
    assert!(!file.exists());
    server.operator("PUT", PATH, &[], &artifact).expect(201);
}

#[test]
fn delete_kills_the_plugin_s_jobs_and_no_others() {
    let server = start().with_probe();
    server.upload("t", "p", &native("probe"));
    let run = |plugin: &str, ms: &str| {
        let words = json!(["sleep", ms]).to_string();
        server.operator("POST", &format!("/v1/tenants/t/plugins/{plugin}/jobs"), &[("holm-args", &words)], b"")
    };
    std::thread::scope(|scope| {
        let (killed, kept) = (scope.spawn(|| run("p", "60000")), scope.spawn(|| run("probe", "2000")));
        wait_until("both jobs are running", || {
            let jobs = server.get("/v1/tenants/t/jobs?state=running").json();
            (jobs["jobs"].as_array().unwrap().len() == 2).then_some(())
        });
        server.operator("DELETE", PATH, &[], b"").expect(204);
        assert_eq!(killed.join().unwrap().problem(502), "cancelled");
        assert_eq!(kept.join().unwrap().status, 200);
    });
}

#[test]
fn a_replaced_revision_s_job_runs_to_its_end() {
    let server = start().with_probe();
    let old = server.get("/v1/tenants/t/plugins/probe").json()["revision"].clone();
    let record = std::thread::scope(|scope| {
        let job = scope.spawn(|| server.probe(&["sleep", "1000"], &json!({})));
        server.wait_for_job("t", "running");
        server.upload("t", "probe", &native("echo"));
        job.join().unwrap()
    });
    assert_eq!((&record["outcome"]["kind"], &record["revision"]), (&json!("exited"), &old));
    let new = server.job("t", "probe", &json!([]), &json!({}), b"hello");
    assert_eq!(new["output"], "hello");
    assert_ne!(new["revision"], old);
}

#[test]
fn changes_happen_only_in_the_state_that_the_request_is_for() {
    let server = start();
    let artifact = native("echo");
    let put = |condition: (&str, &str)| server.operator("PUT", PATH, &[condition], &artifact);
    let other = |method: &str, tag: &str| server.operator(method, PATH, &[("if-match", tag)], b"{\"args\": [\"x\"]}");
    assert_eq!(put(("if-match", "*")).problem(412), "precondition_failed");
    server.get(PATH).problem(404);
    let first = put(("if-none-match", "*")).expect(201).header("etag").to_owned();
    assert_eq!(put(("if-none-match", "*")).problem(412), "precondition_failed");
    let second = other("PATCH", &first).expect(200).header("etag").to_owned();
    assert_ne!(first, second);
    assert_eq!(server.get(PATH).header("etag"), second);
    for method in ["PATCH", "DELETE"] {
        assert_eq!(other(method, &first).problem(412), "precondition_failed", "{method}");
    }
    assert_eq!(put(("if-match", &first)).problem(412), "precondition_failed");
    assert_eq!(server.get(PATH).header("etag"), second, "nothing has changed");
    put(("if-match", &second)).expect(200);
    other("DELETE", "*").expect(204);
}

#[test]
fn one_tenant_s_plugin_is_not_another_s() {
    let server = start();
    server.tenant("other", &json!({}));
    server.upload("t", "p", &native("echo"));
    server.upload("other", "p", &native("word-count"));
    server.operator("DELETE", "/v1/tenants/other/plugins/p", &[], b"").expect(204);
    assert_eq!(server.operator("POST", &format!("{PATH}/jobs"), &[], b"mine").expect(200).text(), "mine");
}

#[test]
fn a_client_that_expects_100_is_told_to_go_on_only_if_its_body_is_wanted() {
    let server = start();
    let artifact = native("echo");
    let length = format!("Content-Length: {}", artifact.len());
    let expect = "Expect: 100-continue";
    let mut raw = Raw::request(&server, &format!("PUT {PATH}"), &[&length, expect]);
    assert_eq!(raw.answered().status, 100);
    raw.send(&artifact);
    raw.answered().expect(201);
    let mut too_large = Raw::request(&server, &format!("PUT {PATH}"), &["Content-Length: 999999999999", expect]);
    assert_eq!(too_large.answered().problem(413), "payload_too_large");
    let mut missing = Raw::request(&server, "PUT /v1/tenants/nobody/plugins/p", &[&length, expect]);
    assert_eq!(missing.answered().problem(404), "not_found");
    let mut unknown = Raw::connect(&server);
    unknown.send(format!("PUT {PATH} HTTP/1.1\r\nHost: holm\r\n{length}\r\n{expect}\r\n\r\n").as_bytes());
    assert_eq!(unknown.answered().problem(401), "unauthenticated");
}
