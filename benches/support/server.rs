//! A server of the bench's own, with a client for what is not measured under load.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holm_sandbox::cgroup::Plan;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ureq::Agent;

use super::load::Requests;
use super::proc::descendants;

/// The operator's key of every server.
pub const KEY: &str = "operator-key-of-the-bench-0123456789";

/// The tenant that is measured. Its quota is no measure.
pub const TENANT: &str = "bench";

pub struct Server {
    child: Child,
    pub url: String,
    agent: Agent,
    dir: tempfile::TempDir,
}

impl Server {
    /// Starts one with these settings, and the tenant.
    pub fn start(settings: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_holm"))
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir.path().join("data"))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOLM_OPERATOR_KEY", KEY)
            .env("HOLM_LOG", "error")
            .envs(settings.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        let agent = Agent::config_builder().timeout_global(Some(Duration::from_secs(120))).build().into();
        let server = Self { child, url, agent, dir };
        server.tenant(TENANT);
        server
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The only child of the server.
    pub fn launcher(&self) -> u32 {
        descendants(self.pid())[0]
    }

    pub fn tenant(&self, name: &str) {
        let settings = br#"{"quota": {"requests_per_second": 100000}}"#;
        self.send("PUT", &format!("/v1/tenants/{name}"), "{}", settings);
    }

    pub fn upload(&self, tenant: &str, plugin: &str, artifact: &[u8]) {
        self.send("PUT", &format!("/v1/tenants/{tenant}/plugins/{plugin}"), "{}", artifact);
    }

    /// Runs a job of the tenant that is measured, and gives the length of its output.
    pub fn job(&self, plugin: &str, limits: &str, input: &[u8]) -> u64 {
        self.job_of(TENANT, plugin, limits, input)
    }

    pub fn job_of(&self, tenant: &str, plugin: &str, limits: &str, input: &[u8]) -> u64 {
        self.send("POST", &format!("/v1/tenants/{tenant}/plugins/{plugin}/jobs"), limits, input)
    }

    /// Sends a request that must succeed, and gives the length of the answer's body.
    pub fn send(&self, method: &str, path: &str, limits: &str, body: &[u8]) -> u64 {
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("authorization", format!("Bearer {KEY}"))
            .header("content-type", "application/json");
        if limits != "{}" {
            request = request.header("holm-limits", limits);
        }
        let answer = match method {
            "GET" => self.agent.run(request.body(()).unwrap()),
            _ => self.agent.run(request.body(body).unwrap()),
        };
        let mut answer = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let mut reader = answer.body_mut().as_reader();
        let mut buffer = vec![0; 256 << 10];
        let mut length = 0;
        loop {
            match reader.read(&mut buffer).unwrap() {
                0 => return length,
                n => length += n as u64,
            }
        }
    }

    /// Requests for a function of the tenant that is measured, to be sent under load.
    pub fn function(&self, plugin: &str) -> Requests {
        Requests::new(&self.url, &format!("/fn/{TENANT}/{plugin}/"), Some(KEY))
    }

    /// The directories of this server's cgroups, in every hierarchy.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let instance = fs::read_to_string(self.dir.path().join("data/instance")).unwrap();
        let mut roots: Vec<String> = Plan::for_this_process().unwrap().describe().into_values().collect();
        roots.sort();
        roots.dedup();
        roots.iter().map(|root| Path::new(root).join(format!("holm-{instance}"))).filter(|dir| dir.exists()).collect()
    }

    /// The pids of all sandboxes, parked or not.
    pub fn sandboxes(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        for dir in self.cgroups() {
            for leaf in
                below(&dir).iter().filter(|dir| dir.file_name().unwrap().as_encoded_bytes().starts_with(b"sandbox-"))
            {
                let text = fs::read_to_string(leaf.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            }
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Waits until no sandbox is parked any more and nothing that they were cloned from is left.
    pub fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.cgroups().iter().any(|dir| !below(dir).is_empty()) {
            assert!(Instant::now() < deadline, "the server keeps {:?}", self.cgroups());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// All directories below this one.
pub fn below(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![dir.to_owned()];
    let mut next = 0;
    while let Some(dir) = found.get(next) {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let dirs: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
        found.extend(dirs);
        next += 1;
    }
    found.split_off(1)
}

impl Drop for Server {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}

/// Stops a server in order.
pub fn stop(child: &mut Child) {
    let _ = std::io::stdout().flush();
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    let _ = child.wait();
}
