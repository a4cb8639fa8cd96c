//! Sandboxes as the host's root sees them, from the kernel alone, and jobs that stand still to be looked at.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::Value;

use super::raw::Raw;
use super::{Answer, Server, wait_until};

/// A job that runs until it is told to finish. Its program must wait for the end of its input.
pub struct Running {
    request: Raw,
    /// Its record, as it was when its code had started.
    pub record: Value,
}

impl Running {
    /// Starts a job with an input that does not end, and waits until its code runs.
    pub fn start(server: &Server, tenant: &str, plugin: &str, args: &Value, limits: &Value) -> Self {
        let path = format!("/v1/tenants/{tenant}/jobs?state=running&plugin={plugin}&limit=1000");
        let running = || server.get(&path).expect(200).json()["jobs"].as_array().unwrap().clone();
        let before: Vec<Value> = running().into_iter().map(|job| job["id"].clone()).collect();
        let (args, limits) = (format!("holm-args: {args}"), format!("holm-limits: {limits}"));
        let headers = ["prefer: return=representation", "transfer-encoding: chunked", &args, &limits];
        let request = Raw::request(server, &format!("POST /v1/tenants/{tenant}/plugins/{plugin}/jobs"), &headers);
        let record = wait_until("the job runs", || {
            running().into_iter().find(|job| job["started_at"].is_string() && !before.contains(&job["id"]))
        });
        Self { request, record }
    }

    pub fn id(&self) -> &str {
        self.record["id"].as_str().unwrap()
    }

    /// Its processes, in the order of their pids inside.
    pub fn processes(&self, server: &Server) -> Vec<Process> {
        let cgroup = self.record["isolation"]["cgroups"]["pids"].as_str().unwrap();
        let pids = server.sandboxed().into_iter().map(Process);
        let mut own: Vec<Process> = pids.filter(|process| process.cgroups()["pids"] == cgroup).collect();
        own.sort_by_key(Process::inside_pid);
        own
    }

    /// A file of its own cgroup, in the hierarchy that has one of this name.
    #[track_caller]
    pub fn cgroup_file(&self, server: &Server, file: &str) -> PathBuf {
        self.any_cgroup_file(server, &[file])
    }

    /// The same, of the first of these names that there is: v1 and v2 differ.
    #[track_caller]
    pub fn any_cgroup_file(&self, server: &Server, names: &[&str]) -> PathBuf {
        let cgroup = self.record["isolation"]["cgroups"]["pids"].as_str().unwrap();
        let (_, below) = cgroup.split_once("/holm-").unwrap();
        let (_, leaf) = below.split_once('/').unwrap();
        let roots = server.cgroups();
        let mut files = names.iter().flat_map(|name| roots.iter().map(move |root| root.join(leaf).join(name)));
        files.find(|path| path.exists()).unwrap_or_else(|| panic!("no {names:?} in any hierarchy"))
    }

    /// Sends more of the input.
    pub fn feed(&mut self, bytes: &[u8]) -> bool {
        self.request.chunk(bytes)
    }

    /// Ends its input and gives the answer.
    pub fn finish(mut self) -> Answer {
        self.request.chunk(b"");
        self.request.answered()
    }

    /// The answer to a job that ends by itself.
    pub fn answer(mut self) -> Answer {
        self.request.answered()
    }
}

/// A process of this host.
#[derive(Clone, Copy, Debug)]
pub struct Process(pub u32);

impl Process {
    /// The one that asks.
    pub fn own() -> Self {
        Self(std::process::id())
    }

    fn path(self, file: &str) -> String {
        format!("/proc/{}/{file}", self.0)
    }

    #[track_caller]
    pub fn read(self, file: &str) -> String {
        let path = self.path(file);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// `None` once the process is gone.
    pub fn try_status(self) -> Option<BTreeMap<String, String>> {
        let text = fs::read_to_string(self.path("status")).ok()?;
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        Some(fields.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect())
    }

    pub fn status(self) -> BTreeMap<String, String> {
        self.try_status().unwrap()
    }

    /// Its pid in the innermost namespace that it is in.
    pub fn inside_pid(&self) -> u32 {
        self.status()["NSpid"].split_whitespace().last().unwrap().parse().unwrap()
    }

    pub fn namespaces(self) -> BTreeMap<&'static str, u64> {
        let inode = |name: &str| fs::metadata(self.path(&format!("ns/{name}"))).unwrap().ino();
        ["user", "pid", "mnt", "uts", "ipc", "net", "cgroup"].into_iter().map(|name| (name, inode(name))).collect()
    }

    /// Each open descriptor and what it is.
    pub fn fds(self) -> BTreeMap<u32, String> {
        let number = |name: &std::ffi::OsStr| name.to_string_lossy().parse().unwrap();
        let target = |entry: &fs::DirEntry| fs::read_link(entry.path()).unwrap().display().to_string();
        let entries = fs::read_dir(self.path("fd")).unwrap().map(Result::unwrap);
        entries.map(|entry| (number(&entry.file_name()), target(&entry))).collect()
    }

    /// The cgroup of each controller; that of v2 under `unified`, and on pure v2 under the names of all that limit jobs.
    pub fn cgroups(self) -> BTreeMap<String, String> {
        let text = fs::read_to_string(self.path("cgroup")).unwrap_or_default();
        let mut cgroups = BTreeMap::new();
        for line in text.lines() {
            let [_, controllers, path] = line.splitn(3, ':').collect::<Vec<_>>()[..] else { panic!("{line}") };
            for controller in controllers.split(',') {
                let name = if controller.is_empty() { "unified" } else { controller };
                cgroups.insert(name.to_owned(), path.to_owned());
            }
        }
        // a process that is gone is in none
        let rest = cgroups.get("unified").cloned().unwrap_or_default();
        for controller in ["cpu", "cpuacct", "memory", "pids", "freezer"] {
            cgroups.entry(controller.to_owned()).or_insert_with(|| rest.clone());
        }
        cgroups
    }

    /// Mount point, options of the mount, type and options of the file system, of every mount that it sees.
    pub fn mounts(self) -> Vec<Mount> {
        mounts(self.read("mountinfo").lines())
    }

    /// The owner of its files in `/proc`: the host's root, if nobody may look into the process.
    pub fn proc_owner(self) -> u32 {
        fs::metadata(self.path("environ")).unwrap().uid()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mount {
    pub at: String,
    pub options: Vec<String>,
    pub kind: String,
    pub fs_options: Vec<String>,
}

/// The mounts in the lines of a `mountinfo`.
pub fn mounts<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<Mount> {
    let words = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
    let mut found: Vec<Mount> = lines
        .map(|line| {
            let (left, right) = line.split_once(" - ").unwrap();
            let (left, right): (Vec<_>, Vec<_>) = (left.split(' ').collect(), right.split(' ').collect());
            Mount {
                at: left[4].to_owned(),
                options: words(left[5]),
                kind: right[0].to_owned(),
                fs_options: words(right[2]),
            }
        })
        .collect();
    found.sort();
    found
}
