//! Jobs that will not end, and ends that cross each other: every job is killed whole, once, and told once. Rows L1 to L8
//! of the threats.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::inspect::{Process, Running};
use support::plain::{Plain, outside};
use support::raw::Raw;
use support::slowness::at_most;
use support::{Server, wait_until};

/// Without parked sandboxes: what lives is counted from outside.
fn start() -> Server {
    Server::start_with("parked_per_plugin = 0\n").with_probe()
}

fn cancel(server: &Server, id: &str) -> u16 {
    server.operator("POST", &format!("/v1/jobs/{id}/cancel"), &[], b"").status
}

/// Starts a job and waits until it holds what it does.
fn hold(server: &Server, words: &[&str], limits: &Value) -> Running {
    let job = Running::start(server, "t", "probe", &json!(words), limits);
    wait_until("the job has hidden", || {
        let name = |pid: &u32| Process(*pid).try_status().map(|status| status["Name"].clone());
        server.sandboxed().iter().any(|pid| name(pid).as_deref() == Some("holding")).then_some(())
    });
    job
}

#[test] // L1, L2, L5, L6
fn l2_daemons_siblings_deaf_stopped_and_ever_new_processes_die_with_their_job() {
    // outside, what hides outlives the process that made it
    let mut hidden = Plain::start(0, &["leave-behind", "2", "400"]);
    hidden.line();
    drop(hidden);
    let server = start();
    for (how, limits) in [
        ("end", json!({"pids": 24})),
        ("cancel", json!({"pids": 24})),
        ("deadline", json!({"pids": 24, "wall_time_ms": 1500})),
        ("client", json!({"pids": 24})),
    ] {
        let job = hold(&server, &["hide", "60000"], &limits);
        let leaf = job.cgroup_file(&server, "cgroup.procs");
        assert!(server.sandboxed().len() >= 6, "{how}: {:?}", server.sandboxed());
        let kind = match how {
            "end" => job.finish().expect(200).json()["outcome"]["kind"].clone(),
            "cancel" => {
                assert_eq!(cancel(&server, job.id()), 200);
                assert!(server.sandboxed().is_empty(), "when it is answered, all are dead");
                job.answer().expect(200).json()["outcome"]["kind"].clone()
            }
            "deadline" => job.answer().expect(200).json()["outcome"]["kind"].clone(),
            _ => {
                let id = job.id().to_owned();
                drop(job);
                wait_until("the job is over", || {
                    let record = server.get(&format!("/v1/jobs/{id}")).json();
                    (record["state"] == "finished").then(|| record["outcome"]["kind"].clone())
                })
            }
        };
        let expected = match how {
            "end" => "exited",
            "deadline" => "over_limit",
            _ => "cancelled",
        };
        assert_eq!(kind, expected, "{how}");
        assert!(server.sandboxed().is_empty(), "{how}");
        // L8: the directory is tried again until the kernel lets it go
        wait_until("the cgroup is gone", || (!leaf.exists()).then_some(()));
    }
    server.assert_healthy();
}

#[test] // L3, L6, L8
fn l3_a_storm_of_forks_is_over_when_the_cancel_is_answered_thirty_times() {
    assert_eq!(outside(&["fork", "100"]), "101");
    let server = start();
    let mut worst = Duration::ZERO;
    for round in 0..30 {
        let words = json!(["after-input", "fork-bomb", "1000"]);
        let mut job = Running::start(&server, "t", "probe", &words, &json!({"pids": 64, "cpu_cores": 2}));
        // at a different moment of the storm each time
        job.feed(b"x");
        let id = job.id().to_owned();
        let request = std::thread::scope(|scope| {
            let storm = scope.spawn(|| job.finish());
            if round % 3 > 0 {
                wait_until("the storm has begun", || (server.sandboxed().len() > 2 * round).then_some(()));
            }
            let begun = Instant::now();
            assert_eq!(cancel(&server, &id), 200, "round {round}");
            worst = worst.max(begun.elapsed());
            assert!(server.sandboxed().is_empty(), "round {round}: {:?}", server.sandboxed());
            storm.join().unwrap()
        });
        assert_eq!(request.expect(200).json()["outcome"], json!({"kind": "cancelled"}), "round {round}");
    }
    println!("a storm is over {worst:?} after its cancel at worst");
    assert!(worst < at_most(Duration::from_secs(2)), "{worst:?}");
    wait_until("no leaf is left", || {
        let leaves = |root: &PathBuf| {
            fs::read_dir(root.join("t")).into_iter().flatten().flatten().any(|leaf| leaf.path().is_dir())
        };
        (!server.cgroups().iter().any(leaves)).then_some(())
    });
    server.assert_healthy();
}

#[test]
fn l5_a_stopped_job_and_one_that_stops_everything_hold_up_nobody() {
    let server = start();
    let long = u64::try_from(at_most(Duration::from_secs(3)).as_millis()).unwrap();
    let stopped = Running::start(&server, "t", "probe", &json!(["signal", "19"]), &json!({"wall_time_ms": long}));
    let begun = Instant::now();
    for _ in 0..10 {
        assert_eq!(server.probe(&["exit", "0"], &json!({}))["outcome"]["kind"], "exited");
    }
    assert!(begun.elapsed() < at_most(Duration::from_secs(3)), "{:?}", begun.elapsed());
    assert_eq!(cancel(&server, stopped.id()), 200);
    assert_eq!(stopped.answer().expect(200).json()["outcome"], json!({"kind": "cancelled"}));
    server.assert_healthy();
}

#[test]
fn l6_no_signal_meets_a_process_that_has_a_dead_one_s_pid() {
    let server = start();
    // what must not be hit: a job that waits all along, and a process of the test's own
    let bystander = Running::start(&server, "t", "probe", &json!(["count"]), &json!({"wall_time_ms": 600_000}));
    let own = Plain::start(0, &["cat"]);
    for _ in 0..8 {
        let churn = hold(&server, &["hide", "60000"], &json!({"pids": 24, "cpu_cores": 2}));
        let orphans = Running::start(&server, "t", "probe", &json!(["orphans", "100000"]), &json!({}));
        for job in [&churn, &orphans] {
            assert_eq!(cancel(&server, job.id()), 200);
        }
    }
    assert!(bystander.processes(&server).len() == 2, "it lives");
    assert_eq!(bystander.finish().expect(200).json()["outcome"]["kind"], "exited");
    assert_eq!(own.finish(), "", "it ends by itself");
    server.assert_healthy();
}

/// A process in a frozen cgroup of the freezer of v1, where there is one.
struct Frozen {
    dir: PathBuf,
}

impl Frozen {
    fn put(pid: u32) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let is_freezer = |line: &&str| line.split(' ').nth(3).is_some_and(|o| o.split(',').any(|o| o == "freezer"));
        let own = mounts.lines().filter(|line| line.contains(" cgroup ")).find(is_freezer)?;
        let dir = PathBuf::from(own.split(' ').nth(1)?).join(format!("holm-test-{pid}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
        fs::write(dir.join("freezer.state"), "FROZEN").unwrap();
        wait_until("it is frozen", || {
            fs::read_to_string(dir.join("freezer.state")).unwrap().starts_with("FROZEN").then_some(())
        });
        Some(Self { dir })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("freezer.state"), "THAWED");
        wait_until("its cgroup can be removed", || fs::remove_dir(&self.dir).ok());
    }
}

#[test] // L4
fn l4_death_comes_to_what_is_frozen() {
    // outside, the freezer of v1 keeps a process alive that has been killed
    let victim = Plain::start(0, &["spin", "60000"]);
    match Frozen::put(victim.pid()) {
        Some(frozen) => {
            Process(victim.pid()).signal(Signal::SIGKILL);
            std::thread::sleep(Duration::from_millis(200));
            assert!(Process(victim.pid()).lives(), "SIGKILL waits for its thaw");
            drop(frozen);
            wait_until("it is dead", || (!Process(victim.pid()).lives()).then_some(()));
        }
        None => println!("NOT SHOWN OUTSIDE: L4: this machine has no freezer of v1"),
    }
    drop(victim);
    let server = start();
    for (how, limits) in
        [("cancel", json!({"pids": 24})), ("client", json!({"pids": 24})), ("tenant", json!({"pids": 24}))]
    {
        let job = hold(&server, &["hide", "60000"], &limits);
        let (id, leaf) = (job.id().to_owned(), job.cgroup_file(&server, "cgroup.procs"));
        server.pause(&job);
        let begun = Instant::now();
        match how {
            "cancel" => drop(server.order(&id, "cancel").expect(200)),
            "client" => drop(job),
            _ => {
                server.pause_tenant("t", true);
                server.order(&id, "cancel").expect(200);
            }
        }
        let record = server.over(&id);
        assert!(begun.elapsed() < at_most(Duration::from_secs(1)), "{how}: {:?}", begun.elapsed());
        assert_eq!(record["outcome"], json!({"kind": "cancelled"}), "{how}");
        assert!(server.sandboxed().is_empty(), "{how}");
        wait_until("the cgroup is gone", || (!leaf.exists()).then_some(()));
    }
    server.pause_tenant("t", false);
    server.assert_healthy();
}

#[test]
fn l7_two_hundred_races_of_end_cancel_and_hang_up_have_one_verdict_each() {
    let server = start();
    let mut seed = 0x2545_f491_u32;
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for round in 0..200 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); // Numerical Recipes, chapter 7
        let pause = Duration::from_micros(u64::from(seed >> 8) % 30_000);
        let deadline = if round % 2 == 0 { 30_000 } else { 20 };
        let limits = format!("holm-limits: {{\"wall_time_ms\": {deadline}}}");
        let args = format!("holm-args: [\"sleep\", \"{}\"]", (seed >> 16) % 15);
        let headers = ["content-length: 0", "prefer: return=representation", &limits, &args];
        let mut request = Raw::request(&server, "POST /v1/tenants/t/plugins/probe/jobs", &headers);
        let id = wait_until("the job is known", || {
            let jobs = server.get("/v1/tenants/t/jobs?limit=1000").json()["jobs"].as_array().unwrap().clone();
            (jobs.len() == round + 1).then(|| jobs[0]["id"].as_str().unwrap().to_owned())
        });
        std::thread::sleep(pause); // the race itself, not a wait for anything
        let answers = std::thread::scope(|scope| {
            let both = [(); 2].map(|()| scope.spawn(|| cancel(&server, &id)));
            both.map(|one| one.join().unwrap())
        });
        assert!(answers.iter().all(|status| matches!(status, 200 | 409)), "round {round}: {answers:?}");
        let record = wait_until("it is over", || {
            let record = server.get(&format!("/v1/jobs/{id}")).json();
            (record["state"] == "finished").then_some(record)
        });
        let kind = record["outcome"]["kind"].as_str().unwrap().to_owned();
        assert!(["exited", "cancelled", "over_limit"].contains(&kind.as_str()), "round {round}: {record}");
        if let Some(answer) = request.answer()
            && answer.status == 200
        {
            assert_eq!(answer.json()["outcome"], record["outcome"], "round {round}: told twice, the same");
        }
        assert_eq!(cancel(&server, &id), 409, "it stays over");
        assert_eq!(server.get(&format!("/v1/jobs/{id}")).json()["outcome"], record["outcome"], "round {round}");
        *kinds.entry(kind).or_default() += 1;
    }
    println!("{kinds:?}");
    assert!(kinds.len() >= 2, "the race was none: {kinds:?}");
    server.assert_healthy();
}
