//! No sequence of API calls leaks a process, a cgroup, a mount or a descriptor, is answered as the server's own fault, or
//! leaves a job with no outcome or two: random calls from several clients at once against one server.
//!
//! A failure prints its seed. `HOLM_TESTS_SEED=N` makes each client draw the same calls again; how those of the clients
//! fall between each other is the machine's to say.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use support::inspect::Process;
use support::raw::{Raw, multipart};
use support::{Answer, OPERATOR, Server, native, wait_until, wasm};

const CLIENTS: u64 = 4;
const CALLS: usize = 200;

/// No client begins another call after this.
const LONGEST: Duration = Duration::from_secs(15);

const TENANTS: [&str; 2] = ["t", "u"];
/// What is uploaded to the last two may have to be compiled, which takes most of the time.
const PLUGINS: [&str; 9] = ["native", "native", "native", "native", "native", "other", "other", "wasm", "http"];

#[test]
fn no_sequence_of_calls_leaks_or_is_the_servers_own_fault() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    let seed = std::env::var("HOLM_TESTS_SEED").map_or(now.into(), |seed| seed.parse::<u64>().unwrap());
    eprintln!("HOLM_TESTS_SEED={seed}");
    let server = Server::start().with_probe();
    let artifacts = Artifacts::read();
    // one call of each kind first: what the server opens once and keeps is no leak
    let mut client = Client::new(&server, &artifacts, seed);
    client.all_kinds();
    let before = settled(&server, &mut client);

    let seen = Mutex::new(client.jobs);
    std::thread::scope(|scope| {
        for number in 1..=CLIENTS {
            let (server, artifacts, seen) = (&server, &artifacts, &seen);
            scope.spawn(move || {
                let mut client = Client::new(server, artifacts, seed.wrapping_add(number.wrapping_mul(0x9e37_79b9)));
                let end = Instant::now() + LONGEST;
                for _ in (0..CALLS).take_while(|_| Instant::now() < end) {
                    client.call();
                }
                seen.lock().unwrap().append(&mut client.jobs);
            });
        }
    });

    let mut client = Client::new(&server, &artifacts, seed);
    let after = settled(&server, &mut client);
    for (what, count) in &after {
        let had = before.get(what).copied().unwrap_or_default();
        assert!(*count <= had, "{what}: {had} before, {count} after\n{before:?}\n{after:?}");
    }
    each_job_ended_once(&server.log(), &seen.into_inner().unwrap());
    server.tenant("t", &json!({}));
    server.upload("t", "probe", &artifacts.native);
    server.assert_healthy();
}

/// Deletes every tenant, waits until nothing of a job is left, and counts what server and launcher hold.
fn settled(server: &Server, client: &mut Client<'_>) -> BTreeMap<String, usize> {
    for tenant in TENANTS {
        client.send("DELETE", &format!("/v1/tenants/{tenant}"), &[], b"");
    }
    wait_until("every job's process is gone", || server.sandboxed().is_empty().then_some(()));
    wait_until("every tenant's cgroup is gone", || {
        server.cgroups().iter().all(|root| subdirectories(root) == 0).then_some(())
    });
    let tmp = server.data().join("tmp");
    wait_until("no temporary file is left", || (fs::read_dir(&tmp).unwrap().count() == 0).then_some(()));
    // connections are closed, and pools of threads shrink, a moment after the last answer
    let mut held = BTreeMap::new();
    wait_until("the descriptors are as few as they get", || {
        let last = std::mem::replace(&mut held, holdings(server));
        std::thread::sleep(Duration::from_millis(100));
        (last == held).then_some(())
    });
    held
}

fn subdirectories(dir: &std::path::Path) -> usize {
    fs::read_dir(dir).map_or(0, |entries| entries.flatten().filter(|entry| entry.path().is_dir()).count())
}

/// What server and launcher have open, and how many mounts and children they have. Connections are left out: a client
/// may keep them.
fn holdings(server: &Server) -> BTreeMap<String, usize> {
    let mut held = BTreeMap::new();
    for (name, process) in [("server", server.process()), ("launcher", server.launcher())] {
        let tcp: BTreeSet<String> = ["net/tcp", "net/tcp6"]
            .into_iter()
            .flat_map(|file| process.read(file).lines().skip(1).map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|line| line.split_whitespace().nth(9).map(|inode| format!("socket:[{inode}]")))
            .collect();
        for entry in fs::read_dir(format!("/proc/{}/fd", process.0)).unwrap().flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.display().to_string();
            if !tcp.contains(&target) {
                let kind = target.trim_end_matches(|c: char| c.is_ascii_digit() || "[]".contains(c));
                *held.entry(format!("{name}: {kind}")).or_default() += 1;
            }
        }
        held.insert(format!("{name}: mounts"), process.mounts().len());
        held.insert(format!("{name}: children"), children(process));
    }
    held
}

fn children(parent: Process) -> usize {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let parent = parent.0.to_string();
    pids.filter_map(|pid| Process(pid).try_status()).filter(|status| status["PPid"] == parent).count()
}

/// The log has one end of each job that a client has heard of, and no job's end twice.
fn each_job_ended_once(log: &str, seen: &BTreeSet<String>) {
    let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains("job finished")) {
        let id = line.split_once("job=").unwrap().1.split(' ').next().unwrap();
        *ends.entry(id).or_default() += 1;
    }
    assert!(ends.values().all(|count| *count == 1), "{ends:?}");
    let lost: Vec<_> = seen.iter().filter(|id| !ends.contains_key(id.as_str())).collect();
    assert!(lost.is_empty(), "jobs without an end: {lost:?}\n{log}");
    let kind = |kind: &str| log.lines().filter(|line| line.contains(&format!("outcome=\"{kind}\""))).count();
    let kinds = ["exited", "over_limit", "cancelled"].map(|word| (word, kind(word)));
    eprintln!("{} jobs ended, {} of them seen: {kinds:?}", ends.len(), seen.len());
    assert!(kinds.iter().all(|(_, count)| *count > 0), "the calls reach less than they should: {kinds:?}");
}

struct Artifacts {
    native: Vec<u8>,
    wasm: Vec<u8>,
    http: Vec<u8>,
}

impl Artifacts {
    fn read() -> Self {
        Self { native: native("probe"), wasm: wasm("echo"), http: wasm("http-hello") }
    }
}

/// One client: random calls, and what their answers must be whatever else goes on.
struct Client<'a> {
    server: &'a Server,
    artifacts: &'a Artifacts,
    random: Random,
    /// The jobs that it has heard of.
    jobs: BTreeSet<String>,
    keys: Vec<(String, String)>,
}

impl<'a> Client<'a> {
    fn new(server: &'a Server, artifacts: &'a Artifacts, seed: u64) -> Self {
        Self { server, artifacts, random: Random(seed), jobs: BTreeSet::new(), keys: Vec::new() }
    }

    fn all_kinds(&mut self) {
        for kind in 0..15 {
            for tenant in TENANTS {
                self.server.tenant(tenant, &json!({}));
                self.call_of(kind, tenant);
            }
        }
    }

    fn call(&mut self) {
        // jobs and uploads more often than what takes their ground away
        const KINDS: [u64; 26] = [0, 1, 2, 3, 3, 4, 4, 4, 5, 6, 7, 7, 8, 8, 8, 8, 8, 9, 9, 10, 10, 11, 11, 12, 13, 14];
        let (kind, tenant) = (*self.random.of(&KINDS), *self.random.of(&TENANTS));
        self.call_of(kind, tenant);
    }

    fn call_of(&mut self, kind: u64, tenant: &str) {
        let plugin = *self.random.of(&PLUGINS);
        let home = format!("/v1/tenants/{tenant}");
        let path = format!("{home}/plugins/{plugin}");
        match kind {
            0 => drop(self.json("PUT", &home, &json!({"quota": {"jobs_running": 2}, "limits": {"pids": 200}}))),
            1 => {
                let patch = self.tenant_settings();
                self.json("PATCH", &home, &patch);
            }
            2 if self.random.below(3) == 0 => drop(self.send("DELETE", &home, &[], b"")),
            2 | 3 => self.key(tenant),
            4 => self.upload(&path, plugin),
            5 => self.garbage(&path),
            6 => drop(self.send("DELETE", &path, &[], b"")),
            7 => {
                let patch = self.plugin_settings();
                self.json("PATCH", &path, &patch);
            }
            8 if self.job(&path) == 404 => {
                self.json("PUT", &home, &json!({}));
                self.upload(&path, plugin);
                self.job(&path);
            }
            8 => {}
            9 => self.hang_up(&path),
            10 => self.cancel(tenant),
            11 => self.function(&format!("/fn/{tenant}/{plugin}/a?b=c")),
            12 => drop(self.send("GET", &format!("{home}/jobs?limit=20"), &[], b"")),
            13 => drop(self.send("GET", &format!("{home}/plugins"), &[], b"")),
            _ => {
                // a job in one request, and its ground is gone in the next
                let mut running = Raw::connect(self.server);
                running.send(support::raw::head(&format!("POST {path}/jobs"), &["content-length: 1"]).as_bytes());
                self.send("DELETE", &path, &[], b"");
                running.offer(b"x");
                if let Some(answer) = running.answer() {
                    self.check("POST", &path, &answer);
                }
            }
        }
    }

    /// Sends a request and checks what every answer must hold.
    fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let answer = self.server.operator(method, path, headers, body);
        self.check(method, path, &answer);
        answer
    }

    fn check(&mut self, method: &str, path: &str, answer: &Answer) {
        let said = || format!("{method} {path}: {} {}", answer.status, answer.text());
        if answer.header("content-type") == "application/problem+json" {
            let code = answer.problem(answer.status);
            assert!(!["internal", "lost", "unauthenticated", "draining"].contains(&&*code), "{}", said());
        } else {
            assert!(answer.status < 500, "{}", said());
        }
        // what was never admitted has no job
        if !answer.header("holm-outcome").is_empty() {
            self.jobs.insert(answer.header("holm-job-id").to_owned());
        }
    }

    fn json(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        self.send(method, path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// Makes a key, or uses and deletes one.
    fn key(&mut self, tenant: &str) {
        if self.keys.len() > 2 {
            let (key, id) = self.keys.remove(0);
            let answer = self.server.send(&key, "GET", &format!("/v1/tenants/{tenant}/plugins"), &[], b"");
            assert!([200, 401, 403, 404, 429].contains(&answer.status), "{}", answer.text());
            self.send("DELETE", &format!("/v1/tenants/{tenant}/keys/{id}"), &[], b"");
            return;
        }
        let answer = self.send("POST", &format!("/v1/tenants/{tenant}/keys"), &[], b"");
        if answer.status == 201 {
            let made = answer.json();
            self.keys.push((made["key"].as_str().unwrap().into(), made["id"].as_str().unwrap().into()));
        }
    }

    fn upload(&mut self, path: &str, plugin: &str) {
        let artifacts = self.artifacts;
        let all = [&artifacts.native, &artifacts.wasm, &artifacts.http];
        let artifact = match plugin {
            "wasm" | "http" => *self.random.of(&all),
            _ => &artifacts.native,
        };
        if self.random.below(2) == 0 {
            self.send("PUT", path, &[], artifact);
            return;
        }
        let manifest = self.plugin_settings().to_string();
        let (content_type, body) = multipart(&[("manifest", manifest.as_bytes()), ("artifact", artifact)]);
        self.send("PUT", path, &[("content-type", &content_type)], &body);
    }

    fn garbage(&mut self, path: &str) {
        let whole = if self.random.below(3) > 0 { &self.artifacts.native } else { &self.artifacts.wasm };
        let mut broken = whole[..self.random.below(whole.len().min(200_000))].to_vec();
        for _ in 0..self.random.below(20) {
            let at = self.random.below(broken.len() + 1);
            let byte = self.random.below(256);
            if let (Some(place), Ok(byte)) = (broken.get_mut(at), u8::try_from(byte)) {
                *place = byte;
            }
        }
        self.send("PUT", path, &[], &broken);
    }

    /// Runs a job and gives the answer's status.
    fn job(&mut self, path: &str) -> u16 {
        const VERBS: [&str; 14] = [
            r#"["exit", "0"]"#,
            r#"["exit", "3"]"#,
            r#"["cat"]"#,
            r#"["count"]"#,
            r#"["sleep", "50"]"#,
            r#"["sleep", "400"]"#,
            r#"["spin", "100"]"#,
            r#"["allocate", "64"]"#,
            r#"["fork", "80"]"#,
            r#"["write-tmp", "1000000"]"#,
            r#"["flood", "stdout", "2"]"#,
            r#"["abort"]"#,
            r#"["leave-behind", "3", "2000"]"#,
            r#"["no such verb"]"#,
        ];
        let args = *self.random.of(&VERBS);
        let limits = self.limits().to_string();
        let input = vec![b'i'; self.random.below(200_000)];
        let mut headers = vec![("holm-args", args), ("holm-limits", &limits)];
        if self.random.below(2) == 0 {
            headers.push(("prefer", "return=representation"));
        }
        self.send("POST", &format!("{path}/jobs"), &headers, &input).status
    }

    /// Calls a plugin by HTTP. An answer that has begun breaks off with the job behind it.
    fn function(&mut self, path: &str) {
        let body = vec![b'x'; self.random.below(100_000)];
        let method = *self.random.of(&["GET", "POST", "DELETE", "PATCH"]);
        if let Ok(answer) = self.server.try_send(OPERATOR, method, path, &[], &body) {
            self.check(method, path, &answer);
        }
    }

    /// Begins a job or an upload, and goes in the middle of it.
    fn hang_up(&mut self, path: &str) {
        let line = if self.random.below(3) == 0 { format!("PUT {path}") } else { format!("POST {path}/jobs") };
        let headers = ["transfer-encoding: chunked", "holm-args: [\"count\"]"];
        let mut raw = Raw::request(self.server, &line, &headers);
        raw.chunk(&vec![b'y'; 1 + self.random.below(50_000)]);
        std::thread::sleep(Duration::from_millis(self.random.below(30) as u64));
    }

    /// Ends one of the tenant's running jobs, if there is one.
    fn cancel(&mut self, tenant: &str) {
        let list = self.send("GET", &format!("/v1/tenants/{tenant}/jobs?state=running"), &[], b"");
        let jobs = if list.status == 200 { list.json()["jobs"].as_array().unwrap().clone() } else { Vec::new() };
        let Some(job) = jobs.first() else { return };
        let id = job["id"].as_str().unwrap();
        self.jobs.insert(id.to_owned());
        let answer = self.send("POST", &format!("/v1/jobs/{id}/cancel"), &[], b"");
        if answer.status == 200 {
            assert_eq!(answer.json()["state"], "finished", "{}", answer.text());
        }
    }

    fn limits(&mut self) -> Value {
        let mut limits = json!({});
        let draws: [(&str, &[u64]); 8] = [
            ("memory_bytes", &[4 << 20, 16 << 20, 32 << 20, 128 << 20, 1]),
            ("cpu_weight", &[1, 100, 10_000]),
            ("cpu_time_ms", &[10, 50, 1000]),
            ("wall_time_ms", &[10, 100, 1000, 0]),
            ("pids", &[1, 2, 64]),
            ("output_bytes", &[1, 1000, 1 << 20]),
            ("input_bytes", &[1, 1000, 1 << 20]),
            ("fuel", &[1, 1_000_000, 10_000_000_000]),
        ];
        for (key, values) in draws {
            if self.random.below(6) == 0 {
                limits[key] = (*self.random.of(values)).into();
            }
        }
        limits
    }

    fn plugin_settings(&mut self) -> Value {
        let mut settings = json!({"limits": self.limits()});
        match self.random.below(5) {
            0 => settings["public"] = true.into(),
            1 => settings["args"] = json!(["cat"]),
            2 => settings["interface"] = (*self.random.of(&["http", "command", "none"])).into(),
            3 => settings["limits"] = json!({"pids": null}),
            _ => settings["env"] = json!({"A": "b", "C": null}),
        }
        settings
    }

    fn tenant_settings(&mut self) -> Value {
        let limits = self.limits();
        match self.random.below(4) {
            0 => json!({"job_defaults": limits}),
            1 => json!({"job_maximums": {"wall_time_ms": 2000, "memory_bytes": 64 << 20}}),
            2 => json!({"limits": {"memory_bytes": 2_u64 << 30, "cpu_cores": 0.5, "pids": null}}),
            _ => json!({"limits": null, "job_maximums": null, "job_defaults": null, "quota": {"jobs_running": 3}}),
        }
    }
}

/// `SplitMix64`: random enough for a test, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `most`, or 0.
    fn below(&mut self, most: usize) -> usize {
        usize::try_from(self.next() % (most.max(1) as u64)).unwrap()
    }

    fn of<'t, T>(&mut self, all: &'t [T]) -> &'t T {
        &all[self.below(all.len())]
    }
}
