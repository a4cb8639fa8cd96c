//! Every layer around a sandbox, read from the kernel: of every kind, while all of them are alive at once.
//!
//! One server runs native jobs, WebAssembly jobs and a compilation at the same time, of two tenants. What the host's root
//! sees of their processes is written down once; each test then looks at one layer of all of them.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::LazyLock;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::inspect::{Mount, Process, Running};
use support::{Server, native, wait_until, wat};

/// Whose process it is: the tenant's program or the host's own code around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Init,
    Native,
    Wasm,
    Compiler,
}

/// What was seen of one process while it was alive.
#[derive(Debug)]
struct Seen {
    who: Who,
    /// Processes of the same sandbox have the same number.
    sandbox: usize,
    pid: u32,
    status: BTreeMap<String, String>,
    namespaces: BTreeMap<&'static str, u64>,
    fds: BTreeMap<u32, String>,
    cgroups: BTreeMap<String, String>,
    mounts: Vec<Mount>,
    files: BTreeMap<&'static str, String>,
    /// The owner of its files in `/proc`.
    proc_owner: u32,
}

const FILES: [&str; 11] = [
    "uid_map",
    "gid_map",
    "oom_score_adj",
    "environ",
    "cmdline",
    "stat",
    "limits",
    "net/dev",
    "net/fib_trie",
    "net/if_inet6",
    "net/unix",
];

impl Seen {
    fn of(who: Who, sandbox: usize, process: Process) -> Self {
        Self {
            who,
            sandbox,
            pid: process.0,
            status: process.status(),
            namespaces: process.namespaces(),
            fds: process.fds(),
            cgroups: process.cgroups(),
            mounts: process.mounts(),
            files: FILES.into_iter().map(|file| (file, process.read(file))).collect(),
            proc_owner: process.proc_owner(),
        }
    }

    fn status(&self, key: &str) -> &str {
        self.status.get(key).unwrap_or_else(|| panic!("no `{key}` in the status of {self:?}"))
    }

    /// The three numbers of its `uid_map` or `gid_map`, which must have one line.
    fn map(&self, file: &str) -> (u32, u32, u32) {
        let lines: Vec<&str> = self.files[file].lines().collect();
        let [line] = lines[..] else { panic!("{file} of {self:?}") };
        let numbers: Vec<u32> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
        let [inside, outside, count] = numbers[..] else { panic!("{line}") };
        (inside, outside, count)
    }

    /// Soft and hard value of a line of `limits`.
    fn rlimit(&self, name: &str) -> (&str, &str) {
        let line = self.files["limits"].lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let mut words = line.split_whitespace();
        (words.next().unwrap(), words.next().unwrap())
    }
}

/// Everything that was seen.
struct Look {
    seen: Vec<Seen>,
    /// The records of the jobs, by sandbox.
    records: BTreeMap<usize, Value>,
    instance: String,
    launcher: BTreeMap<&'static str, u64>,
    host: BTreeMap<&'static str, u64>,
    /// Keys by uid, while all lived.
    keys: BTreeMap<u32, u32>,
}

static LOOK: LazyLock<Look> = LazyLock::new(Look::take);

const JOBS: [(&str, &str, Who); 5] = [
    ("acme", "native", Who::Native),
    ("acme", "native", Who::Native),
    ("other", "native", Who::Native),
    ("acme", "wasm", Who::Wasm),
    ("other", "wasm", Who::Wasm),
];

impl Look {
    fn take() -> Self {
        let server = Server::start();
        for tenant in ["acme", "other"] {
            server.tenant(tenant, &json!({}));
            server.upload(tenant, "native", &native("probe"));
            server.upload(tenant, "wasm", wat::after_input(&[], "", "").as_bytes());
        }
        let jobs = JOBS.map(|(tenant, plugin, _)| {
            Running::start(&server, tenant, plugin, &json!(["report-and-wait"]), &json!({}))
        });
        let mut seen = Vec::new();
        for (sandbox, (job, (_, _, who))) in jobs.iter().zip(JOBS).enumerate() {
            for process in job.processes(&server) {
                let init = who == Who::Native && process.inside_pid() == 1;
                seen.push(Seen::of(if init { Who::Init } else { who }, sandbox, process));
            }
        }
        seen.push(Seen::compiler(&server));
        let parent = seen[0].status("PPid").parse().unwrap();
        let look = Self {
            seen,
            records: jobs.iter().map(|job| job.record.clone()).enumerate().collect(),
            instance: fs::read_to_string(server.data().join("instance")).unwrap(),
            launcher: Process(parent).namespaces(),
            host: Process::own().namespaces(),
            keys: keys_by_uid(),
        };
        for job in jobs {
            job.finish().expect(200);
        }
        look
    }

    fn of(&self, who: Who) -> impl Iterator<Item = &Seen> {
        self.seen.iter().filter(move |seen| seen.who == who)
    }
}

impl Seen {
    /// Catches a compiler at its work, looks at it, and ends it.
    fn compiler(server: &Server) -> Self {
        std::thread::scope(|scope| {
            let path = "/v1/tenants/acme/plugins/slow";
            let upload = scope.spawn(|| server.operator("PUT", path, &[], &wat::slow_to_compile(1500)));
            // the compiler starts threads once it has the tenant's bytes
            let compiling = wait_until("a module is compiled", || {
                let all = server.sandboxed().into_iter().map(Process);
                let of = |process: &Process| process.try_status().unwrap_or_default();
                all.map(|process| (process, of(&process)))
                    .find(|(_, status)| {
                        let field = |key: &str| status.get(key).map_or("", String::as_str);
                        field("Name") == "holm-compile" && field("Threads") != "1"
                    })
                    .map(|(process, _)| process)
            });
            let pid = Pid::from_raw(compiling.0.cast_signed());
            kill(pid, Signal::SIGSTOP).unwrap();
            let seen = Self::of(Who::Compiler, JOBS.len(), compiling);
            kill(pid, Signal::SIGKILL).unwrap();
            assert_eq!(upload.join().unwrap().problem(422), "invalid_artifact", "a compiler that died");
            seen
        })
    }
}

/// How many keys each uid has, from `/proc/key-users`: `uid: usage nkeys/nikeys …`.
fn keys_by_uid() -> BTreeMap<u32, u32> {
    let text = fs::read_to_string("/proc/key-users").unwrap();
    let parse = |line: &str| {
        let (uid, rest) = line.split_once(':')?;
        let keys = rest.split_whitespace().nth(1)?.split('/').next()?;
        Some((uid.trim().parse().ok()?, keys.parse().ok()?))
    };
    text.lines().filter_map(parse).collect()
}

#[test]
fn all_kinds_were_alive_together() {
    let count = |who| LOOK.of(who).count();
    assert_eq!([Who::Init, Who::Native, Who::Wasm, Who::Compiler].map(count), [3, 3, 2, 1]);
}

#[test]
fn each_sandbox_has_seven_namespaces_that_nobody_else_has() {
    let mut inodes: BTreeMap<(&str, u64), usize> = BTreeMap::new();
    for seen in &LOOK.seen {
        assert_eq!(seen.namespaces.len(), 7);
        for (name, inode) in &seen.namespaces {
            assert_ne!(LOOK.host[name], *inode, "{name} of {:?} is the host's", seen.who);
            assert_ne!(LOOK.launcher[name], *inode, "{name} of {:?} is the launcher's", seen.who);
            let owner = *inodes.entry((name, *inode)).or_insert(seen.sandbox);
            assert_eq!(owner, seen.sandbox, "{name} is shared by two sandboxes");
        }
    }
    assert_eq!(inodes.len(), 7 * (JOBS.len() + 1));
}

#[test]
fn the_record_shows_the_namespaces_that_the_kernel_shows() {
    for seen in LOOK.seen.iter().filter(|seen| seen.who != Who::Compiler) {
        let isolation = &LOOK.records[&seen.sandbox]["isolation"];
        assert_eq!(isolation["namespaces"], json!(seen.namespaces), "{:?}", seen.who);
        let facts = [
            ("seccomp", json!("filter")),
            ("no_new_privs", json!(true)),
            ("capabilities", json!("0")),
            ("landlock", json!(true)),
        ];
        for (key, expected) in facts {
            assert_eq!(isolation[key], expected, "{key} of {:?}", seen.who);
        }
        let (inside, outside, count) = seen.map("uid_map");
        assert_eq!(isolation["uid_map"], format!("{inside} {outside} {count}"));
        for (controller, path) in isolation["cgroups"].as_object().unwrap() {
            assert_eq!(path, &json!(seen.cgroups[controller]), "{controller} of {:?}", seen.who);
        }
    }
}

#[test]
fn a_hundred_ids_are_mapped_to_ones_that_no_other_job_and_no_user_of_the_host_has() {
    let mut ranges: BTreeMap<usize, (u32, u32)> = BTreeMap::new();
    for seen in &LOOK.seen {
        let (inside, first, count) = seen.map("uid_map");
        assert_eq!((inside, count), (0, 100), "{:?}", seen.who);
        assert_eq!(seen.map("gid_map"), (inside, first, count), "{:?}", seen.who);
        ranges.insert(seen.sandbox, (first, first + count));
    }
    let ranges: Vec<(u32, u32)> = ranges.into_values().collect();
    for (i, a) in ranges.iter().enumerate() {
        for b in &ranges[i + 1..] {
            assert!(a.1 <= b.0 || b.1 <= a.0, "{a:?} and {b:?} overlap");
        }
    }
    for file in ["/etc/passwd", "/etc/group"] {
        for line in fs::read_to_string(file).unwrap().lines() {
            let id: u32 = line.split(':').nth(2).unwrap().parse().unwrap();
            assert!(ranges.iter().all(|(first, end)| !(*first..*end).contains(&id)), "{line}");
        }
    }
}

#[test]
fn everything_runs_as_one_id_that_is_not_root_and_in_no_group() {
    for seen in &LOOK.seen {
        let (_, first, _) = seen.map("uid_map");
        for field in ["Uid", "Gid"] {
            let ids: BTreeSet<u32> = seen.status(field).split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(ids, [first + 1].into(), "{field} of {:?}", seen.who);
        }
        assert_eq!(seen.status("Groups"), "", "{:?}", seen.who);
    }
}

#[test]
fn no_capability_is_left_in_any_set() {
    for seen in &LOOK.seen {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(seen.status(set), "0000000000000000", "{set} of {:?}", seen.who);
        }
    }
}

#[test]
fn no_exec_gives_privilege_and_two_filters_stand_before_the_kernel() {
    for seen in &LOOK.seen {
        let fields = ["NoNewPrivs", "Seccomp", "Seccomp_filters"].map(|key| seen.status(key));
        assert_eq!(fields, ["1", "2", "2"], "{:?}", seen.who);
    }
}

#[test]
fn the_hosts_own_code_in_a_sandbox_can_be_looked_into_by_nobody() {
    for seen in &LOOK.seen {
        // the owner is the host's root where a process is not dumpable; the tenant's own program may be its own
        let (_, first, _) = seen.map("uid_map");
        let expected = if seen.who == Who::Native { first + 1 } else { 0 };
        assert_eq!(seen.proc_owner, expected, "{:?}", seen.who);
    }
}

#[test]
fn each_sandbox_sees_the_published_mounts_and_no_other() {
    for seen in &LOOK.seen {
        let (_, first, _) = seen.map("uid_map");
        let native = matches!(seen.who, Who::Native | Who::Init);
        let mut expected = vec![("/", "tmpfs", if native { "ro nosuid nodev" } else { "ro nosuid nodev noexec" })];
        if native {
            expected.push(("/dev", "tmpfs", "ro nosuid noexec"));
            expected.push(("/proc", "proc", "ro nosuid nodev noexec"));
        }
        if seen.who != Who::Compiler {
            expected.push(("/tmp", "tmpfs", "rw nosuid nodev noexec"));
        }
        let found: Vec<(&str, &str, String)> = seen
            .mounts
            .iter()
            .map(|mount| {
                let options: Vec<&str> =
                    mount.options.iter().map(String::as_str).filter(|o| *o != "relatime").collect();
                (mount.at.as_str(), mount.kind.as_str(), options.join(" "))
            })
            .collect();
        let expected: Vec<_> = expected.into_iter().map(|(at, kind, options)| (at, kind, options.to_owned())).collect();
        assert_eq!(found, expected, "{:?}", seen.who);

        let options = |at: &str| seen.mounts.iter().find(|mount| mount.at == at).map(|mount| mount.fs_options.clone());
        let owner = |id: u32| [format!("uid={id}"), format!("gid={id}")];
        let root = options("/").unwrap();
        if seen.who == Who::Wasm {
            // it is a copy of its zygote's, whose ids are no job's
            let uid: u32 = root.iter().find_map(|option| option.strip_prefix("uid=")).unwrap().parse().unwrap();
            assert!(LOOK.seen.iter().all(|seen| uid < seen.map("uid_map").1 || uid >= seen.map("uid_map").1 + 100));
        } else {
            assert!(owner(first).iter().all(|option| root.contains(option)), "{root:?}");
        }
        if let Some(tmp) = options("/tmp") {
            let wanted = ["size=16384k", "nr_inodes=1025", "mode=700"].map(str::to_owned);
            assert!(wanted.iter().chain(&owner(first + 1)).all(|option| tmp.contains(option)), "{tmp:?}");
        }
        if let Some(proc) = options("/proc") {
            assert!(["hidepid=invisible", "subset=pid"].iter().all(|o| proc.contains(&(*o).to_owned())), "{proc:?}");
        }
    }
}

#[test]
fn a_native_program_has_three_pipes_and_its_init_nothing_but_the_gate() {
    for seen in LOOK.of(Who::Native) {
        assert_eq!(seen.fds.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
        assert!(seen.fds.values().all(|what| what.starts_with("pipe:")), "{:?}", seen.fds);
        assert_eq!(seen.fds.values().collect::<BTreeSet<_>>().len(), 3);
    }
    for seen in LOOK.of(Who::Init) {
        let mut kinds: Vec<&str> = seen.fds.values().map(|what| what.split(':').next().unwrap()).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, ["/dev/null", "/dev/null", "/dev/null", "socket"], "{:?}", seen.fds);
    }
}

#[test]
fn the_hosts_runtimes_hold_their_streams_their_channel_and_their_artifact_alone() {
    for seen in LOOK.of(Who::Wasm) {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for what in seen.fds.values() {
            let kind = if what.contains("/compiled/") { "artifact" } else { what.split(':').next().unwrap() };
            *counts.entry(kind).or_default() += 1;
        }
        // each stream twice: as the process's own, and as the guest's
        assert_eq!(counts, [("/tmp", 1), ("artifact", 1), ("pipe", 6), ("socket", 1)].into(), "{:?}", seen.fds);
        assert_eq!(seen.fds.values().filter(|what| what.starts_with("pipe:")).collect::<BTreeSet<_>>().len(), 3);
    }
    for seen in LOOK.of(Who::Compiler) {
        let open = |start: &str| seen.fds.values().filter(|what| what.starts_with(start)).count();
        let known = open("/dev/null") + open("pipe:") + open("socket:") + open("anon_inode:");
        let others: Vec<_> = seen.fds.values().filter(|what| what.starts_with('/') && *what != "/dev/null").collect();
        assert_eq!((open("/dev/null"), open("pipe:"), open("socket:"), others.len()), (2, 1, 1, 1), "{:?}", seen.fds);
        assert_eq!(known + others.len(), seen.fds.len(), "{:?}", seen.fds);
    }
}

#[test]
fn each_sandbox_is_in_a_cgroup_of_its_own_under_its_tenant_in_every_hierarchy() {
    let mut leaves: BTreeMap<&str, usize> = BTreeMap::new();
    for seen in &LOOK.seen {
        let tenant = JOBS.get(seen.sandbox).map_or("acme", |(tenant, _, _)| tenant);
        let under = format!("/holm-{}/{tenant}/", LOOK.instance.trim());
        for controller in ["cpu", "cpuacct", "memory", "pids", "freezer", "unified"] {
            let Some(path) = seen.cgroups.get(controller) else {
                assert!(pure_v1() && controller == "unified" || !pure_v1(), "no {controller} for {:?}", seen.who);
                continue;
            };
            let (_, leaf) = path.split_once(&under).unwrap_or_else(|| panic!("{controller}: {path} of {:?}", seen.who));
            assert!(!leaf.is_empty() && !leaf.contains('/'), "{path}");
            assert_eq!(*leaves.entry(leaf).or_insert(seen.sandbox), seen.sandbox, "{leaf} holds two sandboxes");
        }
        assert!(seen.cgroups.contains_key("unified") || seen.cgroups.contains_key("memory"));
    }
    assert_eq!(leaves.len(), JOBS.len() + 1);
}

/// Whether the machine has no v2 hierarchy.
fn pure_v1() -> bool {
    !fs::read_to_string("/proc/self/mountinfo").unwrap().contains(" - cgroup2 ")
}

#[test]
fn the_network_is_a_loopback_interface_that_is_down() {
    for seen in &LOOK.seen {
        let interfaces: Vec<&str> =
            seen.files["net/dev"].lines().skip(2).map(|line| line.split(':').next().unwrap().trim()).collect();
        assert_eq!(interfaces, ["lo"], "{:?}", seen.who);
        // an interface that is up has addresses, and routes to them
        assert_eq!(
            (seen.files["net/fib_trie"].as_str(), seen.files["net/if_inet6"].as_str()),
            ("", ""),
            "{:?}",
            seen.who
        );
        assert_eq!(seen.files["net/unix"].lines().count(), 1, "a socket of the host's is in there");
    }
    // the same files of the host, where loopback is up, are not empty
    assert!(Process::own().read("net/fib_trie").contains("127.0.0.1"));
}

#[test]
fn the_kernel_takes_jobs_first_when_memory_is_short() {
    for seen in &LOOK.seen {
        assert_eq!(seen.files["oom_score_adj"].trim(), "1000", "{:?}", seen.who);
    }
}

#[test]
fn resource_limits_are_those_of_the_job() {
    for seen in &LOOK.seen {
        let files = match seen.who {
            Who::Init | Who::Native => "256",
            Who::Wasm => "272", // the runtime's own on top
            Who::Compiler => "64",
        };
        let expected = [
            ("Max open files", files),
            ("Max core file size", "0"),
            ("Max locked memory", "65536"),
            ("Max msgqueue size", "0"),
            ("Max nice priority", "0"),
            ("Max realtime priority", "0"),
            ("Max pending signals", "1024"),
            ("Max address space", "unlimited"),
        ];
        for (name, value) in expected {
            assert_eq!(seen.rlimit(name), (value, value), "{name} of {:?}", seen.who);
        }
        if seen.who == Who::Native {
            assert_eq!(seen.rlimit("Max stack size"), ("8388608", "8388608"));
        }
    }
}

#[test]
fn each_sandbox_is_a_session_of_its_own_without_a_terminal() {
    for seen in &LOOK.seen {
        let (_, after_name) = seen.files["stat"].rsplit_once(')').unwrap();
        let fields: Vec<i64> = after_name.split_whitespace().skip(2).take(4).map(|n| n.parse().unwrap()).collect();
        let [_group, session, terminal, _] = fields[..] else { panic!("{after_name}") };
        let leader = LOOK.seen.iter().find(|other| other.sandbox == seen.sandbox).unwrap();
        assert_eq!((session, terminal), (i64::from(leader.pid), 0), "{:?}", seen.who);
        assert_eq!(seen.status("NSsid").split_whitespace().last(), Some("1"), "{:?}", seen.who);
    }
}

#[test]
fn each_sandbox_has_a_session_keyring_of_its_own() {
    for seen in &LOOK.seen {
        let (_, first, _) = seen.map("uid_map");
        // the compiler is dead by the time of the count; of the others the ring belongs to their namespace's root
        if seen.who != Who::Compiler {
            assert!(LOOK.keys.get(&first).is_some_and(|keys| *keys >= 1), "{:?}: {:?}", seen.who, LOOK.keys);
        }
    }
}

#[test]
fn nothing_of_the_servers_environment_is_in_any_sandbox() {
    for seen in &LOOK.seen {
        let environ = &seen.files["environ"];
        if seen.who == Who::Native {
            let id = LOOK.records[&seen.sandbox]["id"].as_str().unwrap();
            let tenant = JOBS[seen.sandbox].0;
            let expected = format!(
                "HOLM_CONTENT_TYPE=\0HOLM_JOB_ID={id}\0HOLM_PLUGIN=native\0HOLM_TENANT={tenant}\0HOME=/tmp\0LANG=C.UTF-8\0PATH=/bin\0TMPDIR=/tmp\0"
            );
            let sorted = |text: &str| text.split('\0').map(str::to_owned).collect::<BTreeSet<_>>();
            assert_eq!(sorted(environ), sorted(&expected));
        } else {
            assert_eq!(environ, "", "{:?}", seen.who);
        }
    }
}

#[test]
fn signals_are_neither_ignored_nor_blocked_by_inheritance() {
    const SIGPIPE: u64 = 1 << 12; // Rust's own start-up code ignores it
    for seen in &LOOK.seen {
        let ignored = u64::from_str_radix(seen.status("SigIgn"), 16).unwrap();
        let own = if seen.who == Who::Native { SIGPIPE } else { 0 };
        assert_eq!(ignored & !own, 0, "{ignored:x} of {:?}", seen.who);
        // the C library blocks all of them for the moment in which the compiler makes a thread
        if seen.who != Who::Compiler {
            assert_eq!(seen.status("SigBlk"), "0000000000000000", "{:?}", seen.who);
        }
    }
}
