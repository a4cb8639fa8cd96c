//! Jobs: how they are answered, recorded, listed and cancelled.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Value, json};
use support::raw::Raw;
use support::{Answer, Server, native, wait_until};
use uuid::Uuid;

const PROBE: &str = "/v1/tenants/t/plugins/probe/jobs";
const ECHO: &str = "/v1/tenants/t/plugins/echo/jobs";

/// The answer with the record and the output in it.
const WHOLE: (&str, &str) = ("prefer", "return=representation");

fn start() -> Server {
    let server = Server::start().with_probe();
    server.upload("t", "echo", &native("echo"));
    server
}

/// Runs the probe with these words.
fn probe(server: &Server, words: &[&str], headers: &[(&str, &str)], input: &[u8]) -> Answer {
    let args = json!(words).to_string();
    let headers: Vec<_> = headers.iter().copied().chain([("holm-args", args.as_str())]).collect();
    server.operator("POST", PROBE, &headers, input)
}

#[track_caller]
fn check_facts(server: &Server, answer: &Answer) -> Value {
    let record = server.get(&format!("/v1/jobs/{}", answer.header("holm-job-id"))).expect(200).json();
    assert_eq!(answer.header("holm-outcome"), record["outcome"]["kind"]);
    let usage: Value = serde_json::from_str(answer.header("holm-usage")).unwrap();
    assert_eq!(usage, record["usage"]);
    let timing: Vec<(&str, f64)> = answer
        .header("server-timing")
        .split(", ")
        .map(|metric| metric.split_once(";dur=").unwrap())
        .map(|(name, ms)| (name, ms.parse().unwrap()))
        .collect();
    let ms = |key: &str| usage[key].as_f64().unwrap() / 1000.0;
    assert_eq!(timing, [("queue", ms("queue_us")), ("launch", ms("launch_us")), ("run", ms("wall_us"))]);
    record
}

#[test]
fn success_is_the_output_with_the_facts_in_headers() {
    let server = start();
    let answer = server.operator("POST", ECHO, &[], b"hello").expect(200);
    assert_eq!(answer.text(), "hello");
    assert_eq!(answer.header("content-type"), "application/octet-stream");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    assert_eq!((answer.header("content-length"), answer.header("vary")), ("5", "Prefer"));
    let record = check_facts(&server, &answer);
    assert_eq!((&record["usage"]["input_bytes"], &record["usage"]["output_bytes"]), (&json!(5), &json!(5)));
    assert!(record["usage"]["launch_us"].as_u64().unwrap() > 0 && record["usage"]["wall_us"].as_u64().unwrap() > 0);
}

#[test]
fn output_has_the_plugin_s_content_type() {
    let server = start();
    server
        .patch_json("/v1/tenants/t/plugins/echo", &json!({"output_content_type": "text/csv; charset=utf-8"}))
        .expect(200);
    let answer = server.operator("POST", ECHO, &[("content-type", "text/plain")], b"a,b").expect(200);
    assert_eq!(answer.header("content-type"), "text/csv; charset=utf-8");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
}

#[test]
fn another_exit_code_is_a_problem_that_tells_all() {
    let server = start();
    let answer = probe(&server, &["exit", "7"], &[], b"");
    assert_eq!(answer.problem(502), "exited");
    let (body, record) = (answer.json(), check_facts(&server, &answer));
    assert_eq!(body["outcome"], json!({"kind": "exited", "exit_code": 7}));
    assert_eq!((&body["job_id"], &body["usage"]), (&record["id"], &record["usage"]));
    assert_eq!(body["stderr_tail"], "");
    let long = format!("begin {}end", "x".repeat(5000));
    let answer = probe(&server, &["nonsense", &long], &[], b"");
    assert_eq!(answer.problem(502), "exited");
    let tail = answer.json()["stderr_tail"].as_str().unwrap().to_owned();
    assert!(tail.len() == 4096 && tail.contains("end") && !tail.contains("begin"), "{} bytes", tail.len());
}

#[test]
fn too_long_is_504_and_every_other_limit_502() {
    let server = start();
    let wall = probe(&server, &["sleep", "60000"], &[("holm-limits", r#"{"wall_time_ms": 100}"#)], b"");
    assert_eq!(wall.problem(504), "over_limit");
    assert_eq!(wall.json()["outcome"]["limit"], "wall_time_ms");
    check_facts(&server, &wall);
    let output = probe(&server, &["flood", "stdout", "1"], &[("holm-limits", r#"{"output_bytes": 1000}"#)], b"");
    assert_eq!(output.problem(502), "over_limit");
    assert_eq!(output.json()["outcome"]["limit"], "output_bytes");
}

#[test]
fn a_representation_is_the_record_with_the_output_whatever_the_outcome() {
    let server = start();
    let answer = server.operator("POST", ECHO, &[WHOLE], "hällo\0".as_bytes()).expect(200);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!((answer.header("preference-applied"), answer.header("vary")), ("return=representation", "Prefer"));
    let mut body = answer.json();
    assert_eq!((&body["output"], &body["stderr_tail"]), (&json!("hällo\0"), &json!("")));
    assert!(body.get("output_base64").is_none());
    for added in ["output", "stderr_tail"] {
        body.as_object_mut().unwrap().remove(added);
    }
    assert_eq!(body, check_facts(&server, &answer));

    let failed = probe(&server, &["stderr", "oh no"], &[WHOLE], b"").expect(200).json();
    assert_eq!((&failed["output"], &failed["stderr_tail"]), (&json!(""), &json!("oh no")));
    let failed = probe(&server, &["exit", "3"], &[WHOLE], b"").expect(200);
    assert_eq!(failed.json()["outcome"], json!({"kind": "exited", "exit_code": 3}));
    assert_eq!(failed.header("holm-outcome"), "exited");
}

#[test]
fn output_that_is_no_text_is_in_base64() {
    let server = start();
    let bytes: Vec<u8> = (0..=255).collect();
    let body = server.operator("POST", ECHO, &[WHOLE], &bytes).expect(200).json();
    assert!(body.get("output").is_none());
    assert_eq!(STANDARD.decode(body["output_base64"].as_str().unwrap()).unwrap(), bytes);
}

#[test]
fn preferences_other_than_representation_change_nothing() {
    let server = start();
    for preference in ["respond-async", "respond-async, wait=5", "return=minimal", "wait=0", "nonsense"] {
        let answer = server.operator("POST", ECHO, &[("prefer", preference)], b"hello").expect(200);
        assert_eq!(answer.text(), "hello", "{preference}");
        assert_eq!((answer.header("preference-applied"), answer.header("location")), ("", ""), "{preference}");
        check_facts(&server, &answer);
    }
    let both = [("prefer", "respond-async"), ("prefer", "Return=Representation")];
    assert_eq!(server.operator("POST", ECHO, &both, b"hello").expect(200).json()["output"], "hello");
}

#[test]
fn large_output_comes_through_bare_and_in_a_representation() {
    let server = start();
    let limits = ("holm-limits", r#"{"output_bytes": 8388608}"#);
    let text = "Zeile für Zeile, 😀\n".repeat(300_000).into_bytes(); // over 6 MiB
    let bytes: Vec<u8> = (0..=255_u8).cycle().take(5 << 20).collect();
    for content in [&text, &bytes] {
        let bare = server.operator("POST", ECHO, &[limits], content).expect(200);
        assert!(bare.body == *content, "{} of {} bytes", bare.body.len(), content.len());
        assert_eq!(bare.header("content-length"), content.len().to_string());
        assert_eq!(check_facts(&server, &bare)["usage"]["output_bytes"], content.len());
    }
    let whole = server.operator("POST", ECHO, &[limits, WHOLE], &text).expect(200).json();
    assert!(whole["output"].as_str().unwrap().as_bytes() == text);
    let whole = server.operator("POST", ECHO, &[limits, WHOLE], &bytes).expect(200).json();
    assert!(STANDARD.decode(whole["output_base64"].as_str().unwrap()).unwrap() == bytes);
    assert_eq!(server.data().join("tmp").read_dir().unwrap().count(), 0, "what it waited in has no name");
}

#[test]
fn input_of_some_mib_comes_through_and_is_counted() {
    let server = start();
    let input = vec![b'x'; 12 << 20];
    let answer = probe(&server, &["count"], &[], &input).expect(200);
    assert_eq!(answer.text(), format!("{}\n", input.len()));
    assert_eq!(check_facts(&server, &answer)["usage"]["input_bytes"], input.len());
}

#[test]
fn input_reaches_the_job_while_it_is_still_arriving() {
    let server = start();
    let mut raw =
        Raw::request(&server, &format!("POST {PROBE}"), &["Transfer-Encoding: chunked", r#"Holm-Args: ["read", "5"]"#]);
    assert!(raw.chunk(b"hel") && raw.chunk(b"lo"));
    // the body has no end yet
    let answer = raw.answered().expect(200);
    assert_eq!(answer.text(), "5\n");
    assert_eq!(check_facts(&server, &answer)["usage"]["input_bytes"], 5);
}

#[test]
fn an_empty_body_is_the_end_of_input_at_once() {
    let server = start();
    assert_eq!(probe(&server, &["count"], &[], b"").expect(200).text(), "0\n");
    let mut raw = Raw::request(&server, &format!("POST {PROBE}"), &[r#"Holm-Args: ["count"]"#]);
    assert_eq!(raw.answered().expect(200).text(), "0\n", "no body at all");
}

#[test]
fn a_job_need_not_read_its_input() {
    let server = start();
    let input = vec![b'x'; 8 << 20];
    assert_eq!(probe(&server, &["exit", "0"], &[], &input).expect(200).text(), "");
    assert_eq!(probe(&server, &["read", "3"], &[], &input).expect(200).text(), "3\n");
}

#[test]
fn a_record_tells_everything_and_the_operator_more() {
    let server = start();
    let key = server.key("t");
    let revision = server.get("/v1/tenants/t/plugins/echo").json()["revision"].clone();
    let answer = server.send(&key, "POST", ECHO, &[WHOLE], b"x").expect(200);
    let path = format!("/v1/jobs/{}", answer.header("holm-job-id"));
    let record = server.get(&path).expect(200).json();
    assert_eq!((&record["tenant"], &record["plugin"], &record["revision"]), (&json!("t"), &json!("echo"), &revision));
    assert_eq!((&record["state"], &record["attempt"]), (&json!("finished"), &json!(1)));
    assert_eq!(record["limits"]["memory_bytes"], 128 << 20);
    assert_eq!(record["id"].as_str().unwrap().parse::<Uuid>().unwrap().get_version_num(), 7);
    let times = ["created_at", "started_at", "finished_at"].map(|key| record[key].as_str().unwrap().to_owned());
    assert!(times.iter().all(|time| time.ends_with('Z')), "{times:?}");
    let times = times.map(|time| time.parse::<Timestamp>().unwrap());
    assert!(times.is_sorted(), "{times:?}");
    let isolation = &record["isolation"];
    assert_eq!(
        (&isolation["seccomp"], &isolation["no_new_privs"], &isolation["landlock"]),
        (&json!("filter"), &json!(true), &json!(true))
    );
    assert_eq!((&isolation["capabilities"], isolation["namespaces"].as_object().unwrap().len()), (&json!("0"), 7));
    assert!(isolation["uid_map"].as_str().unwrap().starts_with("0 "), "{isolation}");
    assert!(isolation["cgroups"]["memory"].as_str().unwrap().contains("/t/"), "{isolation}");

    let list = server.send(&key, "GET", "/v1/tenants/t/jobs", &[], b"").json()["jobs"][0].clone();
    for shown in [server.send(&key, "GET", &path, &[], b"").expect(200).json(), answer.json(), list] {
        assert!(shown["isolation"]["uid_map"].is_null() && shown["isolation"]["cgroups"].is_null(), "{shown}");
        assert_eq!(shown["isolation"]["namespaces"], isolation["namespaces"]);
    }
    assert_eq!(server.get("/v1/tenants/t/jobs").json()["jobs"][0], record);
}

#[test]
fn jobs_are_listed_newest_first_page_by_page() {
    let server = start();
    let ids: Vec<String> = (0..5)
        .map(|i| {
            server.operator("POST", [ECHO, PROBE][i % 2], &[WHOLE], b"").expect(200).header("holm-job-id").to_owned()
        })
        .collect();
    let list = |query: &str| server.get(&format!("/v1/tenants/t/jobs{query}")).expect(200).json();
    let of = |page: &Value| -> Vec<String> {
        page["jobs"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
    };
    let newest: Vec<String> = ids.iter().rev().cloned().collect();
    assert_eq!(of(&list("")), newest);
    assert_eq!(of(&list("?plugin=probe")), [ids[3].clone(), ids[1].clone()]);
    assert_eq!(of(&list("?state=finished&plugin=echo")), [ids[4].clone(), ids[2].clone(), ids[0].clone()]);
    assert_eq!(of(&list("?state=running")), [] as [String; 0]);
    let (mut cursor, mut seen) = (String::new(), Vec::new());
    for expected in [2, 2, 1] {
        let page = list(&format!("?limit=2{cursor}"));
        assert_eq!(of(&page).len(), expected);
        seen.extend(of(&page));
        cursor = page["next_cursor"].as_str().map(|id| format!("&cursor={id}")).unwrap_or_default();
    }
    assert_eq!((seen, cursor.as_str()), (newest, ""), "the last page has no next");
    for bad in ["?state=odd", "?limit=0", "?limit=1001", "?limit=x", "?cursor=x", "?other=1"] {
        assert_eq!(server.get(&format!("/v1/tenants/t/jobs{bad}")).problem(400), "malformed_request", "{bad}");
    }
}

/// Starts a job in the background, waits until it is in the list as `state`, and gives its id to `then`. Gives the
/// job's own answer.
fn meanwhile(server: &Server, state: &str, then: impl FnOnce(&str)) -> Answer {
    std::thread::scope(|scope| {
        let job = scope.spawn(|| probe(server, &["sleep", "60000"], &[], b""));
        let record = server.wait_for_job("t", state);
        then(record["id"].as_str().unwrap());
        job.join().unwrap()
    })
}

fn cancel(server: &Server, id: &str) -> Answer {
    server.operator("POST", &format!("/v1/jobs/{id}/cancel"), &[], b"")
}

#[test] // L7
fn cancel_answers_when_a_running_job_is_dead() {
    let server = start();
    let answer = meanwhile(&server, "running", |id| {
        wait_until("it runs", || (!server.sandboxed().is_empty()).then_some(()));
        let record = cancel(&server, id).expect(200).json();
        assert!(server.sandboxed().is_empty());
        assert_eq!(
            (&record["id"], &record["state"], &record["outcome"]),
            (&json!(id), &json!("finished"), &json!({"kind": "cancelled"}))
        );
        assert_eq!(cancel(&server, id).problem(409), "job_finished");
    });
    assert_eq!(answer.problem(502), "cancelled");
    check_facts(&server, &answer);
}

#[test]
fn l7_cancel_answers_when_a_job_that_is_being_launched_is_dead() {
    let server = start();
    for _ in 0..10 {
        let answer = meanwhile(&server, "running", |id| {
            cancel(&server, id).expect(200);
            assert!(server.sandboxed().is_empty());
        });
        assert_eq!(answer.problem(502), "cancelled");
    }
}

#[test]
fn l7_cancel_takes_a_waiting_job_out_of_the_queue() {
    let server = Server::start_with("jobs_running = 1").with_probe();
    let running = meanwhile(&server, "running", |running| {
        let queued = meanwhile(&server, "queued", |queued| {
            let record = cancel(&server, queued).expect(200).json();
            assert_eq!((&record["state"], &record["outcome"]["kind"]), (&json!("finished"), &json!("cancelled")));
            assert!(record["started_at"].is_null() && record["isolation"].is_null(), "{record}");
            assert_eq!(cancel(&server, queued).problem(409), "job_finished");
        });
        assert_eq!(queued.problem(502), "cancelled");
        assert_eq!(server.get(&format!("/v1/jobs/{running}")).json()["state"], "running");
        cancel(&server, running).expect(200);
    });
    assert_eq!(running.problem(502), "cancelled");
}

#[test]
fn l7_a_finished_job_cannot_be_cancelled_and_keeps_its_outcome() {
    let server = start();
    let id = server.probe(&["exit", "0"], &json!({}))["id"].as_str().unwrap().to_owned();
    assert_eq!(cancel(&server, &id).problem(409), "job_finished");
    assert_eq!(server.get(&format!("/v1/jobs/{id}")).json()["outcome"]["kind"], "exited");
    assert_eq!(cancel(&server, &Uuid::now_v7().to_string()).problem(404), "not_found");
}

#[test]
fn a_tenant_cancels_its_own_job_only() {
    let server = start();
    server.tenant("other", &json!({}));
    let (own, other) = (server.key("t"), server.key("other"));
    let answer = meanwhile(&server, "running", |id| {
        let path = format!("/v1/jobs/{id}/cancel");
        server.send(&other, "POST", &path, &[], b"").problem(404);
        assert_eq!(server.get(&format!("/v1/jobs/{id}")).json()["state"], "running");
        let record = server.send(&own, "POST", &path, &[], b"").expect(200).json();
        assert!(record["isolation"]["uid_map"].is_null() && record["isolation"]["cgroups"].is_null(), "{record}");
    });
    assert_eq!(answer.problem(502), "cancelled");
}

#[test]
fn nothing_of_a_job_is_left_soon_after_its_answer() {
    let server = start();
    probe(&server, &["exit", "0"], &[], b"").expect(200);
    assert!(server.sandboxed().is_empty(), "every process is dead when it is answered");
    wait_until("its cgroups are gone", || {
        let leaves = server.cgroups().into_iter().flat_map(|root| root.join("t").read_dir().ok());
        (leaves.flatten().flatten().filter(|entry| entry.path().is_dir()).count() == 0).then_some(())
    });
}
