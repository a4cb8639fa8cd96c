//! HTTP functions: the guest that the tests call, and the jobs that its calls are.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::raw::Raw;
use super::{Answer, OPERATOR, Server, wait_until};

/// The path of tenant `t`'s function. What follows it is the guest's.
pub const GUEST: &str = "/fn/t/guest";

/// The component with a behaviour for each path and each verb; `tests/fixtures/http-guest` is its source.
pub fn http_guest() -> Vec<u8> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    fs::read(fixtures.join("http-guest/http-guest.wasm")).unwrap()
}

impl Server {
    /// A tenant `t` with the guest as its function `guest`.
    pub fn with_guest(self) -> Self {
        self.tenant("t", &json!({}));
        let path = "/v1/tenants/t/plugins/guest?interface=http";
        self.operator("PUT", path, &[], &http_guest()).expect(201);
        self
    }

    /// Sets limits of the guest's jobs.
    #[track_caller]
    pub fn limit_guest(&self, limits: &Value) {
        self.patch_json("/v1/tenants/t/plugins/guest", &json!({"limits": limits})).expect(200);
    }

    /// GETs a path of the guest, with the operator's key.
    pub fn call(&self, path: &str) -> Answer {
        self.get(&format!("{GUEST}{path}"))
    }

    /// The record of the job that gave this answer, once it is over.
    #[track_caller]
    pub fn finished(&self, answer: &Answer) -> Value {
        let id = answer.header("holm-job-id");
        wait_until(&format!("the job {id:?} is over"), || {
            let record = self.get(&format!("/v1/jobs/{id}")).expect(200).json();
            (record["state"] == "finished").then_some(record)
        })
    }

    /// The newest job of tenant `t`, once it is over.
    #[track_caller]
    pub fn last_finished(&self) -> Value {
        wait_until("the job is over", || {
            let job = self.get("/v1/tenants/t/jobs?limit=1").json()["jobs"][0].clone();
            (job["state"] == "finished").then_some(job)
        })
    }

    /// Fails unless the guest still answers, nothing of other calls runs, and nobody has to look at the log.
    #[track_caller]
    pub fn assert_guest_well(&self) {
        let answer = self.call("/early").expect(200);
        assert_eq!(answer.text(), "early");
        self.finished(&answer);
        wait_until("nothing of any job is left", || self.sandboxed().is_empty().then_some(()));
        let log = self.log();
        assert!(!log.contains(" ERROR ") && !log.contains("panicked"), "{log}");
    }
}

/// A request with the operator's key to a path of the guest, of which the head has been sent.
pub fn ask(server: &Server, method_and_path: &str, headers: &[&str]) -> Raw {
    let (method, path) = method_and_path.split_once(' ').unwrap();
    Raw::request(server, &format!("{method} {GUEST}{path}"), headers)
}

/// A request without a body as it stands on the wire, and everything that comes back until the connection closes.
pub fn exchange(server: &Server, line: &str, headers: &[&str]) -> Vec<u8> {
    let mut raw = Raw::connect(server);
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    raw.send(format!("{line}\r\n{headers}Connection: close\r\n\r\n").as_bytes());
    raw.to_the_end()
}

/// The header line of a key.
pub fn bearer(key: &str) -> String {
    format!("Authorization: Bearer {key}")
}

/// That of the operator's key.
pub fn operator() -> String {
    bearer(OPERATOR)
}
