//! What the controllers of a single job do and count, against measurements from outside of its cgroup.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use support::inspect::{Process, Running};
use support::{Server, wait_until};

const MIB: u64 = 1 << 20;

/// Measurements are made one at a time: they would be each other's noise.
fn start() -> (Server, MutexGuard<'static, ()>) {
    static ONE: Mutex<()> = Mutex::new(());
    let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    (Server::start_with("body_grace_ms = 120000\nparked_per_plugin = 0\n").with_probe(), alone)
}

fn run(server: &Server, words: &[&str], limits: &Value) -> Running {
    Running::start(server, "t", "probe", &json!(words), limits)
}

/// User and system time, in microseconds.
fn cpu(usage: &Value) -> f64 {
    usage["cpu_user_us"].as_f64().unwrap() + usage["cpu_system_us"].as_f64().unwrap()
}

/// What the scheduler says that these processes have run, which knows nothing of cgroups. The threads of each must be its
/// first alone.
fn scheduled(processes: &[Process]) -> f64 {
    let nanoseconds = |process: &Process| process.read("schedstat").split(' ').next().unwrap().parse::<f64>().unwrap();
    processes.iter().map(nanoseconds).sum::<f64>() / 1000.0
}

/// The part of a CPU that they have in common which each of two jobs gets, as a ratio, while they use `time` of it.
fn ratio(server: &Server, [one, other]: [&Running; 2], time: Duration) -> f64 {
    let processes = [one, other].map(|job| job.processes(server));
    let times = || [0, 1].map(|i| scheduled(&processes[i]));
    let before = times();
    wait_until("they have used their time", || {
        let now = times();
        let used = [now[0] - before[0], now[1] - before[1]];
        (used[0] + used[1] >= time.as_secs_f64() * 1e6).then_some(used[1] / used[0])
    })
}

#[allow(clippy::print_stdout)] // what was measured is for whoever runs the tests to read
fn assert_near(found: f64, expected: f64, tolerance: f64, what: &str) {
    println!("{what}: {found:.3} for {expected}");
    assert!((found / expected - 1.0).abs() <= tolerance, "{what}: {found} is not {expected}");
}

#[test]
fn jobs_share_a_cpu_as_their_weights_say_and_at_once_when_they_change() {
    let (server, _alone) = start();
    let spin = |weight: u32| {
        let limits = json!({"cpu_weight": weight, "cpu_time_ms": 600_000, "wall_time_ms": 600_000});
        run(&server, &["spin-on", "0", "600000"], &limits)
    };
    let (light, heavy) = (spin(100), spin(400));
    assert_near(ratio(&server, [&light, &heavy], Duration::from_secs(2)), 4.0, 0.15, "1:4");
    server.limit_job(&light, &json!({"cpu_weight": 400})).expect(200);
    server.limit_job(&heavy, &json!({"cpu_weight": 100})).expect(200);
    assert_near(ratio(&server, [&heavy, &light], Duration::from_secs(2)), 4.0, 0.15, "4:1");
    server.limit_job(&light, &json!({"cpu_weight": 100})).expect(200);
    assert_near(ratio(&server, [&heavy, &light], Duration::from_secs(2)), 1.0, 0.15, "1:1");
    for job in [light, heavy] {
        server.order(job.id(), "cancel").expect(200);
    }
    server.assert_healthy();
}

#[test]
fn cpu_time_is_that_of_the_scheduler_within_5_percent_while_a_job_runs() {
    let (server, _alone) = start();
    let job = run(&server, &["spin", "60000"], &json!({}));
    for _ in 0..3 {
        let processes = job.processes(&server);
        // the scheduler is asked on both sides, as the job goes on meanwhile
        let look = || (scheduled(&processes), cpu(&server.stats(&job)), scheduled(&processes));
        let (before, start, soon) = look();
        job.wait_for_cpu(&server, Duration::from_millis(500));
        let (late, end, after) = look();
        let (least, most) = (late - soon, after - before);
        assert_near(end - start, (end - start).clamp(least, most), 0.05, "stats to scheduler");
    }
    server.order(job.id(), "cancel").expect(200);
}

#[test]
fn cpu_time_of_dead_grandchildren_is_counted_within_5_percent() {
    let (server, _alone) = start();
    let usage = |words: &[&str]| {
        let record = server.probe(words, &json!({"cpu_time_ms": 60_000, "wall_time_ms": 600_000}));
        assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
        cpu(&record["usage"])
    };
    // what the launch and the first process take
    let least = (0..5).map(|_| usage(&["burn-in-grandchild", "1"])).fold(f64::MAX, f64::min);
    for ms in ["1000", "2000"] {
        // each stops by its own clock, which the kernel keeps for it wherever it is
        let burnt = ms.parse::<f64>().unwrap() * 1000.0;
        assert_near(usage(&["burn-in-grandchild", ms]) - least, burnt, 0.05, "a dead grandchild");
    }
    server.assert_healthy();
}

#[test]
fn half_a_core_is_half_a_core_and_the_rest_is_told_as_throttled() {
    let (server, _alone) = start();
    let record = server.probe(&["spin", "2000"], &json!({"cpu_cores": 0.5}));
    let (used, wall) = (cpu(&record["usage"]), record["usage"]["wall_us"].as_f64().unwrap());
    // a busy machine may give less, and never gives more; how near it comes is measured in `timing`
    assert!(used / wall <= 0.55, "{record}");
    let throttled = record["usage"]["cpu_throttled_us"].as_f64().unwrap();
    assert!(throttled > 0.0 && used + throttled <= wall * 1.1, "{record}");
    server.assert_healthy();
}

/// Everything on the host's disks that server and launcher have open or keep in the data directory: bytes and files.
fn on_disk(server: &Server) -> (u64, usize) {
    let mut found = (0, 0);
    for process in [server.process(), server.launcher()] {
        for fd in fs::read_dir(format!("/proc/{}/fd", process.0)).unwrap().flatten() {
            if let Ok(file) = fs::metadata(fd.path()).map(|file| (file.is_file(), file.blocks() * 512)) {
                found.0 += if file.0 { file.1 } else { 0 };
            }
        }
    }
    let mut waiting = vec![server.data()];
    while let Some(path) = waiting.pop() {
        let Ok(about) = fs::symlink_metadata(&path) else { continue };
        if about.is_dir() {
            waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        } else {
            found.0 += about.blocks() * 512;
            found.1 += 1;
        }
    }
    found
}

#[test]
fn what_a_job_writes_is_refused_at_its_limit_and_never_on_the_host_s_disk() {
    let (server, _alone) = start();
    let before = on_disk(&server);
    let limits = json!({"scratch_bytes": 96 * MIB, "scratch_inodes": 2000, "memory_bytes": 256 * MIB});
    let job = run(&server, &["fill-tmp-and-wait"], &limits);
    let held = wait_until("it has written", || {
        let memory = server.stats(&job)["memory_bytes"].as_u64().unwrap();
        (memory >= 96 * MIB).then_some(memory)
    });
    assert!(held < 256 * MIB);
    let during = on_disk(&server);
    // the database's log grows by a few pages, when it likes
    assert!(during.0 < before.0 + MIB && during.1 <= before.1 + 2, "{before:?} {during:?}");
    let record = job.finish().expect(200).json();
    let said: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
    assert_eq!(said["bytes"], 96 * MIB, "{said}");
    assert_eq!(said["files"], 2000 - 1, "the large file is one: {said}");
    assert_eq!((&said["bytes_errno"], &said["files_errno"]), (&json!(28), &json!(28)), "ENOSPC: {said}");
    assert!(Path::new(&server.data()).exists());
    server.assert_healthy();
}
