//! What a job costs over HTTP, native and WebAssembly; against the raw floor in the same run.

#![allow(clippy::unwrap_used)] // a measurement that cannot go on should say where

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use support::{EMPTY_MODULE, Side, clone_exit_wait, empty_program, interleave, print_table};
use ureq::Agent;

const KEY: &str = "operator-key-of-the-bench-0123456789";

fn main() {
    let server = Server::start();
    server.send("PUT", "/v1/tenants/bench", b"{}", 201);
    server.send("PUT", "/v1/tenants/bench/plugins/native", &empty_program(), 201);
    server.send("PUT", "/v1/tenants/bench/plugins/wasm", EMPTY_MODULE.as_bytes(), 201);
    let job = |plugin: &str| server.send("POST", &format!("/v1/tenants/bench/plugins/{plugin}/jobs"), b"", 200);
    let times = interleave(vec![
        Side { name: "floor: clone3(7 namespaces) + exit + wait", run: Box::new(clone_exit_wait) },
        Side { name: "HTTP: GET /healthz", run: Box::new(|| server.send("GET", "/healthz", b"", 200)) },
        Side { name: "HTTP: native job, cold", run: Box::new(|| job("native")) },
        Side { name: "HTTP: wasm job, cold", run: Box::new(|| job("wasm")) },
    ]);
    print_table("Invoke: an empty job over HTTP, one at a time", &times);
}

struct Server {
    child: Child,
    url: String,
    agent: Agent,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_holm"))
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir.path())
            .env("HOLM_OPERATOR_KEY", KEY)
            .env("HOLM_LOG", "error")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        Self { child, url, agent: Agent::new_with_defaults(), _dir: dir }
    }

    fn send(&self, method: &str, path: &str, body: &[u8], status: u16) {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("authorization", format!("Bearer {KEY}"))
            .header("content-type", "application/json");
        let answer = if method == "GET" {
            self.agent.run(request.body(()).unwrap())
        } else {
            self.agent.run(request.body(body).unwrap())
        };
        let mut answer = answer.unwrap();
        assert_eq!(answer.status(), status);
        answer.body_mut().read_to_vec().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
