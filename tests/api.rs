//! The service as a whole: its health, its own description, which methods there are, and who may do what.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use serde_json::{Value, json};
use support::raw::Raw;
use support::{Answer, OPERATOR, Server, native};

/// A key in the shape of a real one that nobody has.
const NOBODY: &str = "holm_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// A job that nobody has run.
const NO_JOB: &str = "01970000-0000-7000-8000-000000000000";

/// A server with one of everything, and the names of it.
struct Furnished {
    server: Server,
    key_id: String,
    job_id: String,
}

impl Furnished {
    fn new() -> Self {
        let server = Server::start().with_probe();
        let key = server.operator("POST", "/v1/tenants/t/keys", &[], b"").expect(201).json();
        let job = server.probe(&["exit", "0"], &json!({}));
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Self { server, key_id: text(&key["id"]), job_id: text(&job["id"]) }
    }

    /// A documented path with the names of what is there.
    fn fill_in(&self, path: &str) -> String {
        let id = if path.contains("/keys/") { &self.key_id } else { &self.job_id };
        path.replace("{t}", "t").replace("{p}", "probe").replace("{id}", id)
    }
}

fn document(server: &Server) -> Value {
    server.send("", "GET", "/openapi.json", &[], b"").expect(200).json()
}

/// Path and methods (in capitals, sorted) of everything that is documented, but for `/fn`: what is there is the guests'.
fn documented(document: &Value) -> Vec<(String, Vec<String>)> {
    let methods = |item: &Value| {
        let known = ["get", "put", "post", "patch", "delete"];
        let mut methods: Vec<String> =
            known.iter().filter(|method| item[**method].is_object()).map(|method| method.to_uppercase()).collect();
        methods.sort();
        methods
    };
    let paths = document["paths"].as_object().unwrap().iter().filter(|(path, _)| !path.starts_with("/fn/"));
    paths.map(|(path, item)| (path.clone(), methods(item))).collect()
}

fn allowed(answer: &Answer) -> Vec<String> {
    let mut methods: Vec<String> = answer.header("allow").split(',').map(|word| word.trim().to_owned()).collect();
    methods.sort();
    methods
}

#[test]
fn health_and_readiness_are_told_to_anyone() {
    let server = Server::start();
    for path in ["/healthz", "/readyz", "/openapi.json"] {
        for key in ["", NOBODY, OPERATOR] {
            server.send(key, "GET", path, &[], b"").expect(200);
        }
    }
}

#[test]
fn every_documented_route_exists() {
    let furnished = Furnished::new();
    let document = document(&furnished.server);
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"), "{}", document["openapi"]);
    let mut routes: Vec<(String, String)> = Vec::new();
    for (path, methods) in documented(&document) {
        routes.extend(methods.into_iter().map(|method| (method, furnished.fill_in(&path))));
    }
    // what takes things away comes last, and the tenant last of all
    routes.sort_by_key(|(method, path)| (method == "DELETE", std::cmp::Reverse(path.len())));
    assert!(routes.len() >= 20, "{routes:?}");
    for (method, path) in routes {
        let answer = furnished.server.operator(&method, &path, &[], b"");
        assert!(!matches!(answer.status, 404 | 405 | 500), "{method} {path}: {} {}", answer.status, answer.text());
    }
}

#[test]
fn every_route_of_the_contract_that_is_built_is_documented() {
    let server = Server::start();
    let document = document(&server);
    let function = document["paths"]["/fn/{t}/{p}/{path}"].as_object().unwrap();
    for method in ["get", "head", "post", "put", "patch", "delete", "options"] {
        assert!(function[method].is_object(), "{method}");
    }
    let documented = documented(&document);
    for (path, methods) in [
        ("/healthz", &["GET"][..]),
        ("/readyz", &["GET"]),
        ("/openapi.json", &["GET"]),
        ("/v1/tenants", &["GET"]),
        ("/v1/tenants/{t}", &["DELETE", "GET", "PATCH", "PUT"]),
        ("/v1/tenants/{t}/keys", &["GET", "POST"]),
        ("/v1/tenants/{t}/keys/{id}", &["DELETE"]),
        ("/v1/tenants/{t}/plugins", &["GET"]),
        ("/v1/tenants/{t}/plugins/{p}", &["DELETE", "GET", "PATCH", "PUT"]),
        ("/v1/tenants/{t}/plugins/{p}/jobs", &["POST"]),
        ("/v1/tenants/{t}/jobs", &["GET"]),
        ("/v1/tenants/{t}/pause", &["POST"]),
        ("/v1/tenants/{t}/resume", &["POST"]),
        ("/v1/tenants/{t}/usage", &["GET"]),
        ("/v1/jobs/{id}", &["GET", "PATCH"]),
        ("/v1/jobs/{id}/cancel", &["POST"]),
        ("/v1/jobs/{id}/pause", &["POST"]),
        ("/v1/jobs/{id}/resume", &["POST"]),
        ("/v1/jobs/{id}/stats", &["GET"]),
        ("/v1/jobs/{id}/processes", &["GET"]),
    ] {
        let found = documented.iter().find(|(documented, _)| documented == path);
        assert_eq!(
            found.map(|(_, methods)| methods.as_slice()),
            Some(&methods.iter().map(ToString::to_string).collect::<Vec<_>>()[..]),
            "{path}"
        );
    }
}

#[test]
fn what_is_not_documented_answers_404() {
    let furnished = Furnished::new();
    let document = document(&furnished.server);
    let job = |rest: &str| format!("/v1/jobs/{}/{rest}", furnished.job_id);
    let routes = [
        ("GET", "/metrics".to_owned(), "/metrics"),
        ("GET", job("output"), "/v1/jobs/{id}/output"),
        ("GET", job("logs"), "/v1/jobs/{id}/logs"),
        ("GET", "/fn/t/probe/x".to_owned(), "/fn/{t}/{p}/{path}"),
        ("GET", "/".to_owned(), "/"),
        ("GET", "/v1".to_owned(), "/v1"),
        ("GET", "/v1/tenants/".to_owned(), "/v1/tenants/"),
        ("GET", "/v2/tenants".to_owned(), "/v2/tenants"),
        ("GET", "/openapi.json/..".to_owned(), "/openapi.json/.."),
    ];
    for (method, path, template) in routes {
        if document["paths"][template].is_object() {
            continue; // built since: the other tests of this file look at it
        }
        let answer = furnished.server.operator(method, &path, &[], b"");
        assert_eq!(answer.problem(404), "not_found", "{method} {path}");
    }
}

#[test]
fn the_document_lists_every_code_that_an_answer_can_have() {
    let server = Server::start().with_probe();
    let document = document(&server);
    let codes = document["components"]["schemas"]["ProblemCode"]["enum"].as_array().unwrap();
    let seen = [
        server.get("/nowhere").problem(404),
        server.operator("PUT", "/healthz", &[], b"").problem(405),
        server.send("", "GET", "/v1/tenants", &[], b"").problem(401),
        server.put_json("/v1/tenants/t", &json!({"x": 1})).problem(400),
        server.operator("PUT", "/v1/tenants/t/plugins/p", &[], b"").problem(422),
        server.operator("POST", "/v1/tenants/t/plugins/probe/jobs", &[], b"").problem(502),
    ];
    for code in seen {
        assert!(codes.contains(&json!(code)), "{code} is not in {codes:?}");
    }
}

#[test]
fn a_method_that_a_route_does_not_have_is_405_and_options_is_204_both_with_the_ones_it_has() {
    let furnished = Furnished::new();
    for (path, mut expected) in documented(&document(&furnished.server)) {
        if expected.contains(&"GET".to_owned()) {
            expected.push("HEAD".to_owned());
            expected.sort();
        }
        let path = furnished.fill_in(&path);
        for method in ["GET", "PUT", "POST", "PATCH", "DELETE", "HEAD", "TRACE"] {
            if expected.iter().any(|allowed| allowed == method) {
                continue;
            }
            let answer = furnished.server.operator(method, &path, &[], b"");
            if method != "HEAD" {
                assert_eq!(answer.problem(405), "method_not_allowed");
            }
            assert_eq!((answer.status, allowed(&answer)), (405, expected.clone()), "{method} {path}");
        }
        let options = furnished.server.operator("OPTIONS", &path, &[], b"").expect(204);
        assert_eq!(allowed(&options), expected, "OPTIONS {path}");
        assert!(options.body.is_empty());
    }
}

#[test]
fn head_is_get_without_the_body() {
    let furnished = Furnished::new();
    let server = &furnished.server;
    for (path, methods) in documented(&document(server)) {
        if !methods.contains(&"GET".to_owned()) {
            continue;
        }
        let path = furnished.fill_in(&path);
        let (get, head) = (server.get(&path).expect(200), server.operator("HEAD", &path, &[], b"").expect(200));
        assert!(head.body.is_empty() && !get.body.is_empty(), "{path}");
        for name in ["content-type", "content-length", "etag"] {
            assert_eq!(get.header(name), head.header(name), "{name} of {path}");
        }
    }
    let missing = server.operator("HEAD", "/v1/tenants/nobody", &[], b"");
    assert_eq!((missing.status, missing.body.len()), (404, 0));
}

#[test]
fn every_answer_forbids_content_sniffing() {
    let furnished = Furnished::new();
    for path in ["/healthz", "/openapi.json", "/v1/tenants/t", "/nowhere"] {
        assert_eq!(furnished.server.get(path).header("x-content-type-options"), "nosniff", "{path}");
    }
}

/// Requests to all kinds of routes, on a tenant by that name.
fn requests_on(tenant: &str) -> Vec<(&'static str, String)> {
    let below = |rest: &str| format!("/v1/tenants/{tenant}{rest}");
    vec![
        ("GET", below("")),
        ("PUT", below("")),
        ("PATCH", below("")),
        ("DELETE", below("")),
        ("GET", below("/keys")),
        ("POST", below("/keys")),
        ("DELETE", below(&format!("/keys/{NO_JOB}"))),
        ("GET", below("/plugins")),
        ("GET", below("/plugins/probe")),
        ("PUT", below("/plugins/probe")),
        ("PATCH", below("/plugins/probe")),
        ("DELETE", below("/plugins/probe")),
        ("POST", below("/plugins/probe/jobs")),
        ("GET", below("/jobs")),
        ("GET", below("/jobs?nonsense=1")),
        ("POST", below("/pause")),
        ("POST", below("/resume")),
        ("GET", below("/usage")),
        ("GET", below("/usage?nonsense=1")),
        ("PUT", below("/plugins/probe?nonsense=1")),
    ]
}

#[test]
fn without_a_valid_key_everything_is_401_whether_it_exists_or_not() {
    let server = Server::start().with_probe();
    for tenant in ["t", "nobody", "NO-NAME"] {
        for (method, path) in requests_on(tenant) {
            for key in ["", NOBODY] {
                // also a body that could not be taken
                let answer = server.send(key, method, &path, &[("content-type", "image/png")], b"{");
                assert_eq!(answer.problem(401), "unauthenticated", "{method} {path}");
                assert_eq!(answer.header("www-authenticate"), "Bearer");
            }
        }
    }
    server.send("", "GET", "/v1/tenants", &[], b"").problem(401);
    server.send("", "GET", &format!("/v1/jobs/{NO_JOB}"), &[], b"").problem(401);
    for key in ["", NOBODY] {
        assert_eq!(server.send(key, "GET", "/v1/nothing/at/all", &[], b"").header("www-authenticate"), "Bearer");
    }
    server.get("/v1/nothing/at/all").problem(404);
    server.get("/v1/tenants/t/plugins/probe").expect(200);
}

#[test]
fn h6_only_one_whole_bearer_key_is_taken() {
    let server = Server::start();
    let status = |headers: &[&str]| {
        let mut raw = Raw::connect(&server);
        let lines: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        raw.send(format!("GET /v1/tenants HTTP/1.1\r\nHost: holm\r\n{lines}\r\n").as_bytes());
        raw.answered().status
    };
    let good = format!("Authorization: Bearer {OPERATOR}");
    assert_eq!(status(&[&good]), 200);
    assert_eq!(status(&[&format!("authorization: bearer {OPERATOR}")]), 200, "neither name nor scheme have a case");
    for bad in [
        format!("Authorization: Basic {OPERATOR}"),
        format!("Authorization: {OPERATOR}"),
        format!("Authorization: Bearer {}", &OPERATOR[..OPERATOR.len() - 1]),
        format!("Authorization: Bearer {OPERATOR}x"),
        format!("Authorization: Bearer {}", OPERATOR.to_uppercase()),
        format!("Authorization: Bearer {OPERATOR},{OPERATOR}"),
        "Authorization: Bearer".to_owned(),
        "Authorization: Bearer \u{e4}".to_owned(),
        format!("X-Authorization: Bearer {OPERATOR}"),
    ] {
        assert_eq!(status(&[&bad]), 401, "{bad}");
    }
    assert_eq!(status(&[&good, &good]), 401, "two headers are none");
}

#[test]
fn x11_what_is_another_tenants_is_404_exactly_as_what_does_not_exist() {
    let server = Server::start().with_probe();
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    let key = server.key("t");
    let facts = |answer: &Answer| {
        let mut headers: Vec<_> = answer.headers.iter().filter(|(name, _)| *name != "date").collect();
        headers.sort_by_key(|(name, _)| name.as_str());
        format!("{} {headers:?} {}", answer.status, answer.text())
    };
    let pairs = requests_on("other").into_iter().zip(requests_on("nobody"));
    for ((method, others), (_, nobodys)) in pairs {
        let answers = [others, nobodys].map(|path| server.send(&key, method, &path, &[], b"{"));
        assert_eq!(answers[0].problem(404), "not_found", "{method}");
        assert_eq!(facts(&answers[0]), facts(&answers[1]), "{method}");
    }
    let job = server.job("other", "probe", &json!(["exit", "0"]), &json!({}), b"");
    let id = job["id"].as_str().unwrap();
    for (method, rest) in [("GET", ""), ("POST", "/cancel")] {
        let answers =
            [id, NO_JOB, "no-id"].map(|id| server.send(&key, method, &format!("/v1/jobs/{id}{rest}"), &[], b""));
        assert_eq!(answers[0].problem(404), "not_found");
        assert_eq!(facts(&answers[0]), facts(&answers[1]));
        assert_eq!(facts(&answers[0]), facts(&answers[2]));
    }
    server.get(&format!("/v1/jobs/{id}")).expect(200);
}

#[test]
fn operator_routes_are_403_for_the_tenant_itself_and_404_where_there_is_nothing() {
    let server = Server::start().with_probe();
    let key = server.key("t");
    let keys = server.get("/v1/tenants/t/keys").json();
    let own_key = format!("/v1/tenants/t/keys/{}", keys["keys"][0]["id"].as_str().unwrap());
    for (method, path) in [
        ("GET", "/v1/tenants"),
        ("PUT", "/v1/tenants/t"),
        ("PATCH", "/v1/tenants/t"),
        ("DELETE", "/v1/tenants/t"),
        ("GET", "/v1/tenants/t/keys"),
        ("POST", "/v1/tenants/t/keys"),
        ("DELETE", &own_key),
        ("POST", "/v1/tenants/t/pause"),
        ("POST", "/v1/tenants/t/resume"),
    ] {
        // the body is not looked at any more
        let answer = server.send(&key, method, path, &[("content-type", "image/png")], b"{");
        assert_eq!(answer.problem(403), "operator_only", "{method} {path}");
    }
    for id in [NO_JOB, "no-id"] {
        let answer = server.send(&key, "DELETE", &format!("/v1/tenants/t/keys/{id}"), &[], b"");
        assert_eq!(answer.problem(404), "not_found", "{id}");
    }
    server.send(&key, "GET", "/v1/tenants/t", &[], b"").expect(200);
}

#[test]
fn a_missing_resource_comes_before_a_bad_body() {
    let server = Server::start().with_probe();
    let bad = [("content-type", "image/png"), ("content-encoding", "gzip"), ("holm-args", "{")];
    for (method, path) in [
        ("PATCH", "/v1/tenants/nobody"),
        ("PUT", "/v1/tenants/nobody/plugins/p"),
        ("PATCH", "/v1/tenants/t/plugins/nothing"),
        ("PATCH", "/v1/jobs/01970000-0000-7000-8000-000000000000"),
        ("POST", "/v1/tenants/t/plugins/nothing/jobs"),
        ("POST", "/v1/tenants/nobody/plugins/probe/jobs"),
    ] {
        assert_eq!(server.operator(method, path, &bad, b"{").problem(404), "not_found", "{method} {path}");
    }
}

#[test]
fn a_tenant_does_everything_of_its_own_with_its_key() {
    let server = Server::start().with_probe();
    let key = server.key("t");
    let send = |method: &str, path: &str, body: &[u8]| server.send(&key, method, path, &[], body);
    send("GET", "/v1/tenants/t", b"").expect(200);
    send("PUT", "/v1/tenants/t/plugins/mine", &native("echo")).expect(201);
    send("PATCH", "/v1/tenants/t/plugins/mine", b"{\"args\": []}").expect(200);
    send("GET", "/v1/tenants/t/plugins/mine", b"").expect(200);
    send("GET", "/v1/tenants/t/plugins", b"").expect(200);
    let job = send("POST", "/v1/tenants/t/plugins/mine/jobs", b"hello").expect(200);
    assert_eq!(job.text(), "hello");
    send("GET", &format!("/v1/jobs/{}", job.header("holm-job-id")), b"").expect(200);
    send("GET", &format!("/v1/jobs/{}/stats", job.header("holm-job-id")), b"").expect(200);
    send("GET", &format!("/v1/jobs/{}/processes", job.header("holm-job-id")), b"").expect(200);
    send("GET", "/v1/tenants/t/jobs", b"").expect(200);
    send("GET", "/v1/tenants/t/usage", b"").expect(200);
    send("DELETE", "/v1/tenants/t/plugins/mine", b"").expect(204);
}
