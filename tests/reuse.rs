//! What jobs are made from ahead, zygotes and parked sandboxes: that they are there, that they go, and that nothing of one
//! job reaches another through them.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nix::libc;
use serde_json::{Value, json};
use support::inspect::{Process, Running};
use support::slowness::at_most;
use support::{Server, native, wait_until, wat};

/// What no page of another job may hold. It is never written down in one piece where a job's process could have it from.
fn secret() -> String {
    ["the-secret", "of-one-job", "and-no-other"].join("/")
}

/// Fails inside if a job before it has left anything: a byte in 40 MiB of memory, a file, a longer list of arguments.
const TIDY: (&str, &str) = (
    r#"(import "wasi_snapshot_preview1" "path_open"
            (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
       (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))"#,
    r#"
    (data (i32.const 32) "left")
    (global $found (mut i64) (i64.const 0))
    (func $look (local $at i32)
        (global.set $found (i64.const 0))
        (local.set $at (i32.const 64))
        (loop $more
            (global.set $found (i64.or (global.get $found) (i64.load (local.get $at))))
            (local.set $at (i32.add (local.get $at) (i32.const 8)))
            (br_if $more (i32.lt_u (local.get $at) (i32.const 41943040)))))
    (func $create (result i32)
        (call $path_open (i32.const 3) (i32.const 0) (i32.const 32) (i32.const 4) (i32.const 5)
            (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 16)))
    (func $tidy
        (if (i32.lt_s (memory.grow (i32.const 639)) (i32.const 0)) (then (call $proc_exit (i32.const 10))))
        (call $look)
        (if (i64.ne (global.get $found) (i64.const 0)) (then (call $proc_exit (i32.const 11))))
        (memory.fill (i32.const 64) (i32.const 255) (i32.const 41942976))
        (call $look)
        (if (i64.eqz (global.get $found)) (then (call $proc_exit (i32.const 12))))
        (if (call $create) (then (call $proc_exit (i32.const 13))))
        (if (i32.eqz (call $create)) (then (call $proc_exit (i32.const 14))))
        (drop (call $args_sizes_get (i32.const 16) (i32.const 20)))
        (if (i32.ne (i32.load (i32.const 16)) (i32.const 2)) (then (call $proc_exit (i32.const 15)))))"#,
);

/// [`TIDY`] as a module.
fn tidy() -> String {
    let (imports, fields) = TIDY;
    wat(fields, "(call $tidy)").replacen("(module", &format!("(module {imports}"), 1)
}

/// Runs a job after the other until each way of coming to a sandbox has been seen; gives their records.
fn until_parked(server: &Server, plugin: &str, args: &Value) -> Vec<Value> {
    let mut records = Vec::new();
    wait_until("a job gets a parked sandbox", || {
        records.push(server.job("acme", plugin, args, &json!({}), b""));
        let last = &records[records.len() - 1];
        assert_eq!(last["outcome"]["exit_code"], 0, "{last:#}");
        (records.len() >= 6 && last["start"] == "parked").then_some(())
    });
    records
}

/// The processes that the server keeps for jobs to come, by this name.
fn kept(server: &Server, name: &str) -> Vec<Process> {
    let mut pids = Vec::new();
    server.cgroups().iter().for_each(|root| collect(root, &mut pids));
    pids.sort_unstable();
    pids.dedup();
    let named = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    pids.into_iter().filter(named).map(Process).collect()
}

fn collect(dir: &Path, pids: &mut Vec<u32>) {
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().is_dir()).for_each(|entry| collect(&entry.path(), pids));
}

/// How often these bytes are in a process's memory. `None` if it has ended.
fn count_in_memory(process: Process, bytes: &[u8]) -> Option<usize> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.0)).ok().filter(|maps| !maps.is_empty())?;
    let memory = fs::File::open(format!("/proc/{}/mem", process.0)).ok()?;
    let mut found = 0;
    for line in maps.lines().filter(|line| !line.contains("[v")) {
        let mut words = line.split(' ');
        let (range, mode) = (words.next().unwrap(), words.next().unwrap());
        if !mode.starts_with('r') {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut buffer = vec![0; 1 << 20];
        let mut at = start;
        while at < end {
            let length = buffer.len().min(usize::try_from(end - at).unwrap());
            // a page that nobody has touched may lie beyond the end of a file
            let Ok(read) = memory.read_at(&mut buffer[..length], at) else { break };
            found += buffer[..read].windows(bytes.len()).filter(|window| *window == bytes).count();
            if read == 0 {
                break;
            }
            at += read as u64;
        }
    }
    Some(found)
}

#[test]
fn no_byte_of_a_job_is_in_what_the_next_one_is_made_from() {
    // to look through all memory takes a while
    let server = Server::start_with("parked_idle_ms = 600000\nzygote_idle_ms = 600000\n");
    server.tenant("acme", &json!({}));
    let reader = support::wat::after_input(&[], "", "");
    server.upload("acme", "wasm", reader.as_bytes());
    server.upload("acme", "native", &native("probe"));
    for plugin in ["wasm", "native"] {
        for _ in 0..3 {
            server.job("acme", plugin, &json!(["args"]), &json!({}), b"x");
        }
        // both read until the end of their input; what the last is, they come to hear of after it
        let mut job = Running::start(&server, "acme", plugin, &json!(["after-input", secret()]), &json!({}));
        assert!(job.feed(secret().as_bytes()));
        let own = |job: &Running| job.processes(&server).into_iter().filter_map(in_memory).sum::<usize>();
        // its arguments, and what it has read
        wait_until("the job has it", || (own(&job) >= 2).then_some(()));
        look_at_all_that_is_kept(&server);
        job.finish();
        look_at_all_that_is_kept(&server);
        wait_until("sandboxes are parked again", || (!kept(&server, "holm-parked").is_empty()).then_some(()));
        look_at_all_that_is_kept(&server);
        let next = Running::start(&server, "acme", plugin, &json!(["report-and-wait"]), &json!({}));
        let processes = next.processes(&server);
        assert!(!processes.is_empty());
        assert_eq!(processes.into_iter().filter_map(in_memory).sum::<usize>(), 0, "{plugin}");
        next.finish();
    }
}

fn in_memory(process: Process) -> Option<usize> {
    count_in_memory(process, secret().as_bytes())
}

fn look_at_all_that_is_kept(server: &Server) {
    let names = ["holm-zygote", "holm-family", "holm-parked"];
    let all = names.iter().flat_map(|name| kept(server, name)).chain([server.launcher()]);
    let mut looked_at = 0;
    for process in all {
        // one that is taken by a job or ends meanwhile is no longer kept
        let Some(found) = in_memory(process) else { continue };
        assert_eq!(found, 0, "{}", process.read("comm"));
        let pipes = fs::read_dir(format!("/proc/{}/fd", process.0)).into_iter().flatten().flatten();
        let targets: Vec<String> =
            pipes.filter_map(|fd| Some(fs::read_link(fd.path()).ok()?.to_string_lossy().into_owned())).collect();
        let name = fs::read_to_string(format!("/proc/{}/comm", process.0)).unwrap_or_default();
        let of_a_job = targets.iter().filter(|target| target.starts_with("pipe:") && name.trim_end() == "holm-zygote");
        assert_eq!(of_a_job.count(), 0, "{name}: {targets:?}");
        looked_at += 1;
    }
    assert!(looked_at >= 1);
}

#[test]
fn memory_files_arguments_and_peaks_of_one_job_are_not_the_next_one_s() {
    let server = Server::start();
    server.tenant("acme", &json!({}));
    server.upload("acme", "tidy", tidy().as_bytes());
    server.upload("acme", "small", wat("", "").as_bytes());
    let mut seen = HashSet::new();
    for _ in 0..2 {
        for record in until_parked(&server, "tidy", &json!(["one"])) {
            assert!(record["usage"]["memory_peak_bytes"].as_u64().unwrap() > 40 << 20, "{record:#}");
            seen.insert(record["start"].as_str().unwrap().to_owned());
        }
        for record in until_parked(&server, "small", &json!([])) {
            let usage = &record["usage"];
            assert!(usage["memory_peak_bytes"].as_u64().unwrap() < 20 << 20, "{record:#}");
            assert!(usage["cpu_ms"].as_f64().unwrap_or(0.0) < 1000.0, "{record:#}");
        }
    }
    assert_eq!(seen, HashSet::from(["cold".to_owned(), "parked".to_owned()]));
}

/// Of a greedy job there is much to count: memory until the kernel kills it, or CPU time until it is throttled.
#[test]
fn what_a_cgroup_has_counted_of_one_job_is_not_charged_to_the_next_that_is_in_it() {
    let server = Server::start();
    server.tenant("acme", &json!({}));
    let fill = support::wat::command(
        &["path_open"],
        r#"(data (i32.const 32) "full") (global $fd (mut i32) (i32.const 0))"#,
        "(drop (call $path_open (i32.const 3) (i32.const 0) (i32.const 32) (i32.const 4) (i32.const 1)
            (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 48)))
        (global.set $fd (i32.load (i32.const 48)))
        (i32.store (i32.const 0) (i32.const 65536))
        (i32.store (i32.const 4) (i32.const 65536))
        (loop $more
            (drop (call $fd_write (global.get $fd) (i32.const 0) (i32.const 1) (i32.const 8)))
            (br $more))",
    );
    server.upload("acme", "fill", fill.as_bytes());
    server.upload("acme", "spin", wat("", "(loop $on (br $on))").as_bytes());
    let busy = support::wat::command(
        &["clock_time_get"],
        "",
        "(loop $more
            (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 64)))
            (br_if $more (i64.lt_u (i64.load (i32.const 64)) (i64.const 16000000))))",
    );
    server.upload("acme", "busy", busy.as_bytes());
    let outcome = |record: &Value| record["outcome"]["limit"].as_str().map(str::to_owned);
    let usage = |record: &Value, key: &str| record["usage"][key].as_u64().unwrap_or(0);
    // nothing is parked for one that is new, so that the first of its jobs is given the cgroup that has just been left
    let plugins: Vec<String> = (0..4).map(|number| format!("small-{number}")).collect();
    plugins.iter().for_each(|plugin| drop(server.upload("acme", plugin, wat("", "").as_bytes())));
    let mut cgroups = Vec::new();
    for plugin in &plugins {
        let filled =
            server.job("acme", "fill", &json!([]), &json!({"memory_bytes": 16 << 20, "scratch_bytes": 64 << 20}), b"");
        assert_eq!(outcome(&filled).as_deref(), Some("memory_bytes"), "{filled:#}");
        let spun = server.job("acme", "spin", &json!([]), &json!({"cpu_cores": 0.2, "wall_time_ms": 250}), b"");
        assert_eq!(outcome(&spun).as_deref(), Some("wall_time_ms"), "{spun:#}");
        assert!(usage(&spun, "cpu_throttled_us") > 20_000, "{spun:#}");
        // one that ends by itself leaves little of its 20 ms for the rest of this tenth of a second
        server.job("acme", "busy", &json!([]), &json!({"cpu_cores": 0.2}), b"");
        // its cgroup is looked at once nobody waits
        std::thread::sleep(Duration::from_millis(10));
        for _ in 0..3 {
            let small = server.job("acme", plugin, &json!([]), &json!({"cpu_cores": 0.2}), b"");
            assert_eq!(small["outcome"]["exit_code"], 0, "{small:#}");
            assert!(usage(&small, "memory_peak_bytes") < 8 << 20, "{small:#}");
            let cpu_us = usage(&small, "cpu_user_us") + usage(&small, "cpu_system_us");
            assert!(Duration::from_micros(cpu_us) < at_most(Duration::from_millis(30)), "{small:#}");
            // on a slow machine it may have used its own 20 ms up
            assert!(cpu_us > 10_000 || usage(&small, "cpu_throttled_us") < 20_000, "{small:#}");
            assert_eq!(usage(&small, "pids_peak"), 1, "{small:#}");
            cgroups.push(small["isolation"]["cgroups"]["memory"].as_str().unwrap().to_owned());
        }
    }
    // on v2 each job's is new
    if server.cgroups().iter().any(|root| root.join("acme").join("memory.limit_in_bytes").exists()) {
        let different: HashSet<&String> = cgroups.iter().collect();
        assert!(different.len() < cgroups.len(), "no cgroup was used again: {cgroups:?}");
    }
}

#[test]
fn the_cgroups_of_a_burst_of_jobs_do_not_stay_as_long_as_their_zygote() {
    let server = Server::start_with("parked_idle_ms = 100\nzygote_idle_ms = 600000\n");
    server.tenant("acme", &json!({}));
    server.upload("acme", "small", wat("", "").as_bytes());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| (0..4).for_each(|_| drop(server.job("acme", "small", &json!([]), &json!({}), b""))));
        }
    });
    let is_leaf = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b"sandbox-");
    let leaves = |root: &std::path::PathBuf| {
        fs::read_dir(root.join("acme")).into_iter().flatten().flatten().filter(is_leaf).count()
    };
    wait_until("only those for the next jobs are left", || {
        server.cgroups().iter().all(|root| leaves(root) <= 2).then_some(())
    });
    assert!(!kept(&server, "holm-zygote").is_empty());
}

#[test]
fn a_network_namespace_is_recycled_where_that_is_allowed_and_said_so() {
    let server = Server::start();
    for (tenant, fresh) in [("acme", false), ("pure", true)] {
        server.tenant(tenant, &json!({"fresh_netns": fresh}));
        server.upload(tenant, "small", wat("", "").as_bytes());
        let told = |record: Value| record["isolation"]["network"].as_str().unwrap().to_owned();
        let all: Vec<String> =
            (0..12).map(|_| told(server.job(tenant, "small", &json!([]), &json!({}), b""))).collect();
        let expected = if fresh { HashSet::from(["fresh"]) } else { HashSet::from(["fresh", "recycled"]) };
        assert_eq!(all.iter().map(String::as_str).collect::<HashSet<_>>(), expected, "{tenant}: {all:?}");
    }
}

#[test]
fn random_numbers_of_one_zygote_s_jobs_differ() {
    let server = Server::start();
    server.tenant("acme", &json!({}));
    let random = support::wat::command(
        &["random_get"],
        "",
        "(drop (call $random_get (i32.const 1024) (i32.const 32))) (call $out (i32.const 1024) (i32.const 32))",
    );
    server.upload("acme", "random", random.as_bytes());
    let mut seen = HashSet::new();
    for _ in 0..12 {
        let answer = server.operator("POST", "/v1/tenants/acme/plugins/random/jobs", &[], b"").expect(200);
        assert_eq!(answer.body.len(), 32);
        assert!(seen.insert(answer.body), "two jobs were given the same random numbers");
    }
}

#[test]
fn an_idle_tenant_holds_no_process() {
    let server = Server::start_with("parked_idle_ms = 100\nzygote_idle_ms = 100\n");
    server.tenant("acme", &json!({}));
    server.upload("acme", "small", wat("", "").as_bytes());
    until_parked(&server, "small", &json!([]));
    wait_until("nothing is kept", || {
        let names = ["holm-zygote", "holm-family", "holm-parked"];
        names.iter().all(|name| kept(&server, name).is_empty()).then_some(())
    });
    server.job("acme", "small", &json!([]), &json!({}), b"");
}

#[test]
fn nothing_is_kept_where_the_host_is_short_of_memory() {
    let server = Server::start_with("memory_reserve_bytes = 1125899906842624\n");
    server.tenant("acme", &json!({}));
    server.upload("acme", "small", wat("", "").as_bytes());
    for _ in 0..6 {
        let record = server.job("acme", "small", &json!([]), &json!({}), b"");
        assert_eq!(record["outcome"]["exit_code"], 0, "{record:#}");
    }
    // long before any of it would have been idle for too long
    let begun = std::time::Instant::now();
    wait_until("nothing is kept", || {
        let names = ["holm-zygote", "holm-family", "holm-parked"];
        names.iter().all(|name| kept(&server, name).is_empty()).then_some(())
    });
    assert!(begun.elapsed() < at_most(Duration::from_secs(8)), "{:?}", begun.elapsed());
}

#[test]
fn the_code_that_all_sandboxes_share_can_be_written_by_nobody() {
    let server = Server::start();
    let launcher = server.launcher();
    let maps = launcher.read("maps");
    let is_copy = |path: &str| path == "/program";
    let mut own = 0;
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|may| may.contains('x'))) {
        let (place, may) = (line.split(' ').next().unwrap(), line.split(' ').nth(1).unwrap());
        assert!(!may.contains('w'), "{line}");
        // in a file on a file system of its own, which has no other name than this one
        let file = format!("/proc/{}/map_files/{place}", launcher.0);
        if line.split_whitespace().nth(5).is_some_and(is_copy) {
            own += 1;
            let open = fs::OpenOptions::new().write(true).open(&file);
            assert_eq!(open.err().and_then(|error| error.raw_os_error()), Some(libc::EROFS), "{line}");
        }
    }
    if fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap() {
        assert_eq!(own, 1, "{maps}");
    }
    assert!(!launcher.fds().values().any(|file| is_copy(file)), "{:?}", launcher.fds());
}
