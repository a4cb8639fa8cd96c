//! What every black-box test needs: a server of its own, a client, plugins, and eyes for what is left behind.
//!
//! Each server has its own data directory, port and cgroup instance, so tests run in parallel and beside other servers.

#![allow(dead_code, unreachable_pub)] // each test file uses its own part of it
#![allow(clippy::unwrap_used)] // a test that cannot go on should say where
#![allow(clippy::cast_possible_truncation, clippy::wrong_self_convention)] // numbers and names of tests alone

pub mod attack;
pub mod component;
pub mod control;
pub mod elf;
pub mod family;
pub mod function;
pub mod inspect;
pub mod loops;
pub mod plain;
pub mod raw;
pub mod slowness;
pub mod wat;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use holm_sandbox::cgroup::Plan;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use slowness::at_most;
use tempfile::TempDir;
use ureq::Agent;

/// The operator's key of every test server.
pub const OPERATOR: &str = "operator-key-of-the-tests-0123456789abcdef";

/// How long a server may take to begin or to end, on a machine of the usual speed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The server's default for how long a client may be slow.
const BODY_GRACE: Duration = Duration::from_secs(10);

/// A running server. Stopped in order when dropped; the drop fails the test if anything is left of it.
pub struct Server {
    child: Option<Child>,
    stdout: Option<BufReader<ChildStdout>>,
    pub url: String,
    pub dir: TempDir,
    agent: Agent,
}

/// An answer to a request.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The answer, if it has this status.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    /// The code of a problem with this status. Checks that it is a well-formed one.
    #[track_caller]
    pub fn problem(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.header("content-type"), "application/problem+json");
        let body = self.json();
        assert_eq!(body["status"], status);
        assert_eq!(body["type"], format!("/problems/{}", body["code"].as_str().unwrap()));
        assert!(body["title"].is_string() && body["detail"].is_string(), "{body}");
        body["code"].as_str().unwrap().to_owned()
    }
}

impl Server {
    /// Starts a server with everything at its default.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// Starts a server with further configuration, in TOML.
    pub fn start_with(config: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), config)
    }

    /// Starts a server in a directory that may have been another's before.
    pub fn start_in(dir: TempDir, config: &str) -> Self {
        Self::spawn(Self::command(&dir, config), dir)
    }

    /// Starts a server by a command that was made for this directory.
    pub fn spawn(mut command: Command, dir: TempDir) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let Some(url) = line.trim().strip_prefix("listening on ") else {
            let log = fs::read_to_string(dir.path().join("log")).unwrap();
            panic!("the server did not start: {line:?}, {}\n{log}", child.wait().unwrap());
        };
        let agent =
            Agent::config_builder().http_status_as_error(false).timeout_global(Some(at_most(2 * PATIENCE))).build();
        let url = url.to_owned();
        Self { child: Some(child), stdout: Some(stdout), url, dir, agent: agent.into() }
    }

    /// The command line of a server in `dir`, on a free port. Its log goes to `DIR/log`, shown when a test fails.
    pub fn command(dir: &TempDir, config: &str) -> Command {
        let file = dir.path().join("holm.toml");
        // clients that say nothing for a while are part of many tests
        let grace = at_most(BODY_GRACE);
        let slow = grace > BODY_GRACE && !config.contains("body_grace_ms");
        let patient = if slow { format!("body_grace_ms = {}\n", grace.as_millis()) } else { String::new() };
        fs::write(&file, patient + config).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(dir.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_holm"));
        command.arg("serve").arg("--config").arg(&file).args(["--listen", "127.0.0.1:0", "--data-dir"]);
        command.arg(dir.path().join("data"));
        command.env_clear().env("HOLM_OPERATOR_KEY", OPERATOR).env("PATH", std::env::var_os("PATH").unwrap());
        command.stdin(Stdio::null()).stderr(log);
        command
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// The host and port, for tests that speak HTTP by hand.
    pub fn address(&self) -> String {
        self.url.strip_prefix("http://").unwrap().to_owned()
    }

    /// Sends a request with `key`, if it is not empty.
    #[track_caller]
    pub fn send(&self, key: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.try_send(key, method, path, headers, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Sends a request with `key`, if it is not empty. The error is an answer that does not come, or breaks off.
    pub fn try_send(
        &self,
        key: &str,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, ureq::Error> {
        let uri = format!("{}{path}", self.url);
        let mut request = ureq::http::Request::builder().method(method).uri(uri);
        if !key.is_empty() {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = if body.is_empty() && matches!(method, "GET" | "HEAD" | "DELETE" | "OPTIONS") {
            self.agent.run(request.body(()).unwrap())
        } else {
            self.agent.run(request.body(body).unwrap())
        };
        let mut response = response?;
        let mut body = Vec::new();
        response.body_mut().as_reader().read_to_end(&mut body)?;
        Ok(Answer { status: response.status().as_u16(), headers: response.headers().clone(), body })
    }

    /// The same with the operator's key.
    pub fn operator(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.send(OPERATOR, method, path, headers, body)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.operator("GET", path, &[], b"")
    }

    /// Makes or replaces a tenant.
    #[track_caller]
    pub fn tenant(&self, name: &str, settings: &Value) {
        let answer = self.put_json(&format!("/v1/tenants/{name}"), settings);
        assert!(matches!(answer.status, 200 | 201), "{}", answer.text());
    }

    pub fn put_json(&self, path: &str, body: &Value) -> Answer {
        self.operator("PUT", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    pub fn patch_json(&self, path: &str, body: &Value) -> Answer {
        self.operator("PATCH", path, &[("content-type", "application/merge-patch+json")], body.to_string().as_bytes())
    }

    /// Makes a key for a tenant.
    #[track_caller]
    pub fn key(&self, tenant: &str) -> String {
        let answer = self.operator("POST", &format!("/v1/tenants/{tenant}/keys"), &[], b"").expect(201);
        answer.json()["key"].as_str().unwrap().to_owned()
    }

    /// Uploads a plugin, which must succeed.
    #[track_caller]
    pub fn upload(&self, tenant: &str, name: &str, artifact: &[u8]) -> Value {
        let answer = self.operator("PUT", &format!("/v1/tenants/{tenant}/plugins/{name}"), &[], artifact);
        assert!(matches!(answer.status, 200 | 201), "{}", answer.text());
        answer.json()
    }

    /// A tenant `t` with the probe as its plugin.
    pub fn with_probe(self) -> Self {
        self.tenant("t", &json!({}));
        self.upload("t", "probe", &native("probe"));
        self
    }

    /// Runs the probe of tenant `t` and gives the whole record.
    #[track_caller]
    pub fn probe(&self, words: &[&str], limits: &Value) -> Value {
        self.job("t", "probe", &json!(words), limits, b"")
    }

    /// Runs a job and gives the whole record, whatever its outcome.
    #[track_caller]
    pub fn job(&self, tenant: &str, plugin: &str, args: &Value, limits: &Value, input: &[u8]) -> Value {
        let (args, limits) = (args.to_string(), limits.to_string());
        let headers = [("prefer", "return=representation"), ("holm-args", &args), ("holm-limits", &limits)];
        self.operator("POST", &format!("/v1/tenants/{tenant}/plugins/{plugin}/jobs"), &headers, input)
            .expect(200)
            .json()
    }

    /// Waits until the tenant has a job in this state, and gives its record.
    #[track_caller]
    pub fn wait_for_job(&self, tenant: &str, state: &str) -> Value {
        let path = format!("/v1/tenants/{tenant}/jobs?state={state}");
        wait_until(&format!("a job of {tenant} is {state}"), || {
            let jobs = self.get(&path).expect(200).json();
            jobs["jobs"].as_array().unwrap().first().cloned()
        })
    }

    /// Fails unless the probe of tenant `t` runs, and nothing has happened that a person should look at.
    #[track_caller]
    pub fn assert_healthy(&self) {
        assert_eq!(self.probe(&["exit", "0"], &json!({}))["outcome"]["kind"], "exited");
        let log = self.log();
        assert!(!log.contains(" ERROR ") && !log.contains("panicked"), "{log}");
    }

    /// Sends a signal to the server.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    /// Waits for the server's end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        wait_until("the server ends", || child.try_wait().unwrap())
    }

    /// What the server has printed on standard output after its first line.
    pub fn rest_of_stdout(&mut self) -> String {
        let mut rest = String::new();
        self.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
        rest
    }

    /// Ends the server as an operator would, checks that nothing is left, and gives the directory.
    pub fn stop(mut self) -> TempDir {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "{status}\n{}", self.log());
        self.assert_nothing_left();
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    /// The directories of this server's cgroups, in every hierarchy.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let instance = fs::read_to_string(self.data().join("instance")).unwrap_or_default();
        if instance.is_empty() {
            return Vec::new();
        }
        let plan = Plan::for_this_process().unwrap();
        let mut roots: Vec<PathBuf> = plan.describe().into_values().map(PathBuf::from).collect();
        roots.sort();
        roots.dedup();
        roots.into_iter().map(|root| root.join(format!("holm-{instance}"))).filter(|dir| dir.exists()).collect()
    }

    /// The processes of this server's jobs, those of sandboxes that have no job yet not among them.
    pub fn sandboxed(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        for root in self.cgroups() {
            collect_pids(&root, &mut pids);
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Fails unless processes, cgroups and temporary files of this server are gone, or go within a moment.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        wait_until("no cgroup is left", || self.cgroups().is_empty().then_some(()));
        let tmp = self.data().join("tmp");
        let left: Vec<_> = fs::read_dir(&tmp).map(|dir| dir.flatten().collect()).unwrap_or_default();
        assert!(left.is_empty(), "temporary files are left: {left:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*self.dir.path().to_string_lossy()), "a mount is left");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
        let deadline = Instant::now() + at_most(PATIENCE);
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let status = child.wait();
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
            return;
        }
        assert!(status.as_ref().is_ok_and(ExitStatus::success), "the server ended with {status:?}\n{}", self.log());
        assert!(!self.log().contains("panicked"), "{}", self.log());
        self.assert_nothing_left();
    }
}

/// Adds the processes in and below the cgroup `dir`. A sandbox that is being made, or waits for its job, has a process
/// of a name that none with a job has.
fn collect_pids(dir: &Path, pids: &mut Vec<u32>) {
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    // one that has gone since has no name any more
    let named = |pid: u32| Some((pid, fs::read_to_string(format!("/proc/{pid}/comm")).ok()?));
    let own: Vec<(u32, String)> = procs.lines().filter_map(|line| named(line.parse().ok()?)).collect();
    const NO_JOB: [&str; 4] = ["holm-launcher", "holm-parked", "holm-zygote", "holm-family"];
    if !own.iter().any(|(_, name)| NO_JOB.contains(&name.trim_end())) {
        pids.extend(own.iter().map(|(pid, _)| pid));
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_pids(&entry.path(), pids);
        }
    }
}

/// Asks until there is an answer, or the time is up.
#[track_caller]
pub fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + at_most(PATIENCE);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "it took too long until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// One of this repository's plugins as a static native program.
pub fn native(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("BUNDLED_PLUGINS")).join(name)).unwrap()
}

/// One of this repository's plugins as WebAssembly.
pub fn wasm(name: &str) -> Vec<u8> {
    let plugins = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins");
    fs::read(plugins.join(name).join(format!("{name}.wasm"))).unwrap()
}

/// A complete WebAssembly command from the body of its `_start`. It has one page of memory, `$write` for
/// `fd_write(1, iovec at 0, 1, 64)`, and whatever `fields` add.
pub fn wat(fields: &str, start: &str) -> String {
    format!(
        r#"(module
            (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
            (memory (export "memory") 1)
            (func $write (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 64))))
            {fields}
            (func (export "_start") {start}))"#
    )
}
