//! A tenant's limits over all of its jobs together, as its jobs and its neighbours feel them, and changed while they run.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};
use support::inspect::{Process, Running};
use support::wat::command;
use support::{Server, native, wait_until};

const MIB: u64 = 1 << 20;

/// Two tenants, `a` and `b`, each with the probe.
fn start(limits: [Value; 2]) -> Server {
    // jobs whose input does not end are to run for as long as a busy machine takes
    let server = Server::start_with("body_grace_ms = 120000");
    for (tenant, limits) in ["a", "b"].into_iter().zip(limits) {
        server.tenant(tenant, &json!({ "limits": limits }));
        server.upload(tenant, "probe", &native("probe"));
    }
    server
}

#[track_caller]
fn limit(server: &Server, tenant: &str, limits: &Value) -> Value {
    server.patch_json(&format!("/v1/tenants/{tenant}"), &json!({ "limits": limits })).expect(200).json()
}

/// What a job of a tenant said that ended well.
#[track_caller]
fn said(server: &Server, tenant: &str, words: &[&str]) -> Value {
    let record = server.job(tenant, "probe", &json!(words), &json!({}), b"");
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{words:?}: {record}");
    serde_json::from_str(record["output"].as_str().unwrap())
        .unwrap_or_else(|error| panic!("{words:?}: {error}: {record}"))
}

/// A job that uses CPU time until it is ended, on however slow a machine.
const ENDLESS: [&str; 2] = ["spin", "3600000"];

fn endless() -> Value {
    json!({"wall_time_ms": 3_600_000, "cpu_time_ms": 3_600_000})
}

fn run(server: &Server, tenant: &str, words: &[&str], limits: &Value) -> Running {
    Running::start(server, tenant, "probe", &json!(words), limits)
}

/// CPU time that a job's processes have had so far. The threads of each must be its first alone.
fn cpu_time(processes: &[Process]) -> Duration {
    let nanoseconds = |process: &Process| process.read("schedstat").split(' ').next().unwrap().parse::<u64>().unwrap();
    Duration::from_nanos(processes.iter().map(nanoseconds).sum())
}

/// What each of these jobs uses of CPU time in the same while, in which together they use so much.
fn shares(server: &Server, jobs: &[&Running], together: Duration) -> Vec<f64> {
    let processes: Vec<Vec<Process>> = jobs.iter().map(|job| job.processes(server)).collect();
    let times = || processes.iter().map(|of_job| cpu_time(of_job)).collect::<Vec<_>>();
    let before = times();
    wait_until("they have used their time", || {
        let used: Vec<Duration> = times().iter().zip(&before).map(|(now, before)| *now - *before).collect();
        (used.iter().sum::<Duration>() >= together).then(|| used.iter().map(Duration::as_secs_f64).collect())
    })
}

/// Memory that a job's largest process has.
fn memory(server: &Server, job: &Running) -> u64 {
    let resident = |process: &Process| {
        let text = process.try_status().unwrap_or_default().get("VmRSS").cloned().unwrap_or_default();
        text.trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) << 10
    };
    job.processes(server).iter().map(resident).max().unwrap_or(0)
}

fn assert_near(found: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((found / expected - 1.0).abs() <= tolerance, "{what}: {found} is not {expected}");
}

fn cpus_of_this_machine() -> usize {
    std::thread::available_parallelism().unwrap().into()
}

#[test]
fn tenants_share_a_cpu_as_their_weights_say_however_many_jobs_they_have() {
    let server = start([json!({"cpu_weight": 50, "cpuset": "0"}), json!({"cpu_weight": 200, "cpuset": "0"})]);
    let _favoured = server.favour_jobs();
    let spin = ["spin", "25000"];
    let (a, more, b) = (
        run(&server, "a", &spin, &json!({})),
        run(&server, "a", &spin, &json!({})),
        run(&server, "b", &spin, &json!({})),
    );
    let used = shares(&server, &[&a, &more, &b], Duration::from_secs(2));
    assert_near(used[2] / (used[0] + used[1]), 4.0, 0.15, "1:4");
    // and at once when they change
    limit(&server, "a", &json!({"cpu_weight": 200}));
    limit(&server, "b", &json!({"cpu_weight": 50}));
    let used = shares(&server, &[&a, &more, &b], Duration::from_secs(2));
    assert_near((used[0] + used[1]) / used[2], 4.0, 0.15, "4:1");
    for tenant in ["a", "b"] {
        server.operator("DELETE", &format!("/v1/tenants/{tenant}"), &[], b"").expect(204);
    }
}

#[test]
fn a_tenant_s_jobs_together_have_no_more_cpu_than_its_cores_and_each_its_own_when_they_are_raised() {
    let server = start([json!({"cpu_cores": 0.4}), json!({})]);
    let _favoured = server.favour_jobs();
    let jobs = [(); 2].map(|()| run(&server, "a", &ENDLESS, &endless()));
    let rate = |cores: Value| {
        limit(&server, "a", &json!({ "cpu_cores": cores }));
        let begun = std::time::Instant::now();
        let used = shares(&server, &[&jobs[0], &jobs[1]], Duration::from_millis(800));
        used.iter().sum::<f64>() / begun.elapsed().as_secs_f64()
    };
    let (low, lower) = (rate(json!(0.4)), rate(json!(0.2)));
    // a busy machine may give less, and never gives more
    assert!(low < 0.44 && lower < 0.22, "{low} {lower}");
    // more than both would have if either were still held to what it was cut to, and less than two CPUs, which would leave
    // none for whoever looks
    wait_until("they have more again", || (rate(json!(0.9)) > 0.44).then_some(()));
    server.operator("DELETE", "/v1/tenants/a", &[], b"").expect(204);
}

#[test]
fn jobs_run_on_the_cpus_of_their_tenant_alone_and_move_when_they_change() {
    let server = start([json!({"cpuset": "0"}), json!({})]);
    let last = cpus_of_this_machine() - 1;
    assert!(last > 0, "this needs two CPUs");
    assert_eq!(said(&server, "a", &["cpus", "4", "200"]), json!([0]));
    limit(&server, "a", &json!({"cpuset": last.to_string()}));
    assert_eq!(said(&server, "a", &["cpus", "4", "200"]), json!([last]));
    // one that runs
    let job = run(&server, "a", &ENDLESS, &endless());
    let on = || {
        job.processes(&server)
            .last()
            .unwrap()
            .read("stat")
            .rsplit_once(')')
            .unwrap()
            .1
            .split(' ')
            .nth(37)
            .unwrap()
            .to_owned()
    };
    wait_until("it is on the last CPU", || (on() == last.to_string()).then_some(()));
    limit(&server, "a", &json!({"cpuset": "0"}));
    wait_until("it has moved", || (on() == "0").then_some(()));
    let allowed = job.processes(&server).last().unwrap().status()["Cpus_allowed_list"].clone();
    assert_eq!(allowed, "0");
    let all = limit(&server, "a", &json!({"cpuset": null}));
    assert!(all["limits"].is_null(), "{all}");
    let allowed = job.processes(&server).last().unwrap().status()["Cpus_allowed_list"].clone();
    assert_ne!(allowed, "0");
    server.order(job.id(), "cancel").expect(200);
    // a job cannot choose others
    limit(&server, "a", &json!({"cpuset": "0"}));
    let record = server.job("a", "probe", &json!(["spin-on", last.to_string(), "1"]), &json!({}), b"");
    assert_eq!(record["outcome"]["exit_code"], 2, "{record}");
    server.operator("DELETE", "/v1/tenants/a", &[], b"").expect(204);
}

#[test]
fn a_tenant_over_its_own_memory_loses_a_job_of_its_own_and_no_neighbour_s() {
    let server = start([json!({"memory_bytes": 48 * MIB}), json!({})]);
    let hold = ["report-and-wait"];
    let neighbour = run(&server, "b", &hold, &json!({}));
    // two jobs that are each within their own limits, and not together
    let limits = json!({"memory_bytes": 40 * MIB});
    let first = run(&server, "a", &["allocate-and-wait", "30"], &limits);
    wait_until("it has its memory", || (memory(&server, &first) >= 30 * MIB).then_some(()));
    let second = server.job("a", "probe", &json!(["allocate", "30"]), &limits, b"");
    let first = first.finish().expect(200).json();
    let ends = [&first, &second].map(|record| record["outcome"]["kind"].as_str().unwrap());
    assert!(ends.contains(&"over_limit"), "{ends:?}");
    assert!(ends.iter().all(|end| ["over_limit", "exited"].contains(end)), "{ends:?}");
    assert_eq!(neighbour.finish().expect(200).json()["outcome"], json!({"kind": "exited", "exit_code": 0}));
    // alone it fits
    let record = server.job("a", "probe", &json!(["allocate", "30"]), &limits, b"");
    assert_eq!(record["outcome"]["kind"], "exited", "{record}");
}

#[test]
fn memory_lowered_below_what_is_in_use_ends_the_largest_job_and_no_more_than_is_needed() {
    let server = start([json!({}), json!({})]);
    let hold = |tenant, mib: &str| run(&server, tenant, &["allocate-and-wait", mib], &json!({}));
    let (small, large, neighbour) = (hold("a", "8"), hold("a", "48"), hold("b", "64"));
    for (job, mib) in [(&small, 8), (&large, 48), (&neighbour, 64)] {
        wait_until("it has its memory", || (memory(&server, job) >= mib * MIB).then_some(()));
    }
    limit(&server, "a", &json!({"memory_bytes": 32 * MIB}));
    let ended = large.answer().expect(200).json();
    assert_eq!((&ended["outcome"]["kind"], &ended["outcome"]["limit"]), (&json!("over_limit"), &json!("memory_bytes")));
    for job in [small, neighbour] {
        assert_eq!(job.finish().expect(200).json()["outcome"]["kind"], "exited");
    }
    // it holds for the next one, and can be raised again
    let record = server.job("a", "probe", &json!(["allocate", "40"]), &json!({}), b"");
    assert_eq!(record["outcome"]["kind"], "over_limit", "{record}");
    limit(&server, "a", &json!({"memory_bytes": 256 * MIB}));
    let record = server.job("a", "probe", &json!(["allocate", "40"]), &json!({}), b"");
    assert_eq!(record["outcome"]["kind"], "exited", "{record}");
    assert!(!server.log().contains(" ERROR "), "{}", server.log());
}

#[test]
fn what_is_kept_for_jobs_to_come_gives_way_to_less_memory() {
    const LEAST: u64 = 4 * MIB;
    let server = Server::start_with("zygote_idle_ms = 3600000\nparked_per_plugin = 0\n");
    server.tenant("a", &json!({}));
    // zygotes of so many plugins that they use more than the least that a tenant can be given
    for number in 0.. {
        assert!(number < 60, "they use next to nothing");
        let plugin = format!("wasm-{number}");
        // another artifact each
        server.upload("a", &plugin, command(&[], "", &format!("(drop (i32.const {number}))")).as_bytes());
        let record = server.job("a", &plugin, &json!([]), &json!({}), b"");
        assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{record}");
        if used(&server, "a") > LEAST + MIB / 2 {
            break;
        }
    }
    limit(&server, "a", &json!({"memory_bytes": LEAST}));
    wait_until("they use less", || (used(&server, "a") <= LEAST).then_some(()));
    assert_eq!(
        server.job("a", "wasm-0", &json!([]), &json!({"memory_bytes": 16 * MIB}), b"")["outcome"]["kind"],
        "exited"
    );
    server.operator("DELETE", "/v1/tenants/a", &[], b"").expect(204);
}

/// Memory that all processes of a tenant use, those that are not jobs included.
fn used(server: &Server, tenant: &str) -> u64 {
    let files = ["memory.usage_in_bytes", "memory.current"];
    let paths = server.cgroups().into_iter().flat_map(|root| files.map(|file| root.join(tenant).join(file)));
    let figures = paths.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    figures.max().unwrap_or(0)
}

#[test]
fn a_tenant_s_jobs_together_have_as_many_processes_as_its_pids() {
    let server = start([json!({"pids": 20}), json!({})]);
    let held = run(&server, "a", &["report-and-wait"], &json!({}));
    let mine = held.processes(&server).len() as u64;
    let forked = said(&server, "a", &["fork", "100"]);
    // the second job's init is its tenant's too
    assert_eq!(forked, json!(20 - mine - 1));
    limit(&server, "a", &json!({"pids": 10}));
    assert_eq!(said(&server, "a", &["fork", "100"]), json!(10 - mine - 1));
    assert_eq!(said(&server, "b", &["fork", "40"]), json!(41), "itself and as many as it wanted");
    held.finish().expect(200);
}

#[test]
fn what_this_machine_does_not_have_is_refused_by_name_and_leaves_everything_as_it_was() {
    let server = start([json!({"pids": 20, "cpuset": "0"}), json!({})]);
    let before = server.get("/v1/tenants/a").json();
    let there = (cpus_of_this_machine() + 900).to_string();
    let absent = json!([{"device": "4000:1000000", "read_bps": 1}]);
    let rule = json!([{"type": "char", "device": "4000:77", "access": "r"}]);
    for (limits, field, given) in [
        (json!({"cpuset": there}), "limits.cpuset", &*there),
        (json!({"cpuset": format!("0,{there}"), "pids": 30}), "limits.cpuset", &*there),
        (json!({"io": absent, "pids": 30}), "limits.io", "4000:1000000"),
        (json!({"devices": rule}), "limits.devices", "4000:77"),
    ] {
        for answer in [
            server.patch_json("/v1/tenants/a", &json!({ "limits": limits })),
            server.put_json("/v1/tenants/a", &json!({ "limits": limits })),
            server.put_json("/v1/tenants/new", &json!({ "limits": limits })),
        ] {
            assert_eq!(answer.problem(422), "limit_out_of_range", "{limits}");
            let problem = answer.json();
            assert_eq!(problem["limit"], field, "{problem}");
            assert!(problem["given"].as_str().unwrap().contains(given), "{problem}");
            assert!(!problem["possible"].as_str().unwrap().is_empty(), "{problem}");
        }
    }
    let answer = server.patch_json("/v1/tenants/a", &json!({"limits": {"egress_bps": 1000, "pids": 30}}));
    assert_eq!(answer.problem(422), "not_available");
    let problem = answer.json();
    assert_eq!((&problem["field"], &problem["given"]), (&json!("limits.egress_bps"), &json!(1000)), "{problem}");
    assert_eq!(server.get("/v1/tenants/a").json(), before);
    server.get("/v1/tenants/new").problem(404);
    // what held before holds
    assert_eq!(said(&server, "a", &["cpus", "2", "50"]), json!([0]));
    assert_eq!(said(&server, "a", &["fork", "100"]), json!(19));
}

#[test]
fn limits_survive_a_restart_and_hold_from_the_first_job_on() {
    let server = start([json!({"cpuset": "0", "pids": 9}), json!({})]);
    let shown = server.get("/v1/tenants/a").json()["limits"].clone();
    let server = Server::start_in(server.stop(), "");
    assert_eq!(server.get("/v1/tenants/a").json()["limits"], shown);
    assert_eq!(said(&server, "a", &["cpus", "2", "50"]), json!([0]));
    assert_eq!(said(&server, "a", &["fork", "100"]), json!(8));
}

#[test]
fn doctor_says_of_each_controller_what_it_offers_or_how_to_get_it() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_holm")).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    for name in ["cpuset", "blkio", "devices", "hugetlb", "net_cls", "net_prio"] {
        let check = checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}: {report}"));
        let found = check["found"].as_str().unwrap();
        match check["status"].as_str().unwrap() {
            "ok" => assert!(found.contains('`') && check["mend"] == "", "{check}"),
            "warn" => assert!(found.contains("cannot be given") && check["mend"] != "", "{check}"),
            other => panic!("{other}: {check}"),
        }
    }
}
