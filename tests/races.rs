//! Limits that race with life: whatever is done to a job, in whatever order, while it starts, runs, ends, is killed or is
//! out of memory, it comes to one end, told once, and nothing of it is left.
//!
//! `HOLM_RACES=10000 cargo test --test races` makes that many; without it there are as many as fit into an ordinary run.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::raw::Raw;
use support::slowness::at_most;
use support::wat::command;
use support::{Server, native, wait_until};

/// Interleavings in an ordinary run.
const USUAL: usize = 600;

/// The longest that any call may take: what a freeze and a launch are given, one after the other, twice.
const CALL_WITHIN: Duration = Duration::from_secs(30);

/// Interleavings that go on at once.
const AT_ONCE: usize = 4;

fn wanted() -> usize {
    // a slow machine makes as many as take it about as long
    let slowness = usize::try_from(at_most(Duration::from_secs(1)).as_secs()).unwrap();
    std::env::var("HOLM_RACES").map_or(USUAL / slowness, |text| text.parse().expect("HOLM_RACES is a number"))
}

/// The seed of the whole run: the same unless told otherwise.
fn seed() -> u64 {
    std::env::var("HOLM_RACES_SEED").map_or(5, |text| text.parse().expect("HOLM_RACES_SEED is a number"))
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % most
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }
}

/// How often each thing has come about.
type Seen = BTreeMap<String, usize>;

/// A job that lives for some milliseconds, or until something ends it: plugin, arguments, limits.
fn job(random: &mut Random) -> (&'static str, Value, Value) {
    let lives = random.below(60).to_string();
    let jobs = [
        ("probe", json!(["sleep", lives]), json!({})),
        ("probe", json!(["spin", lives]), json!({})),
        ("probe", json!(["exit", "0"]), json!({})),
        ("probe", json!(["spin", "60000"]), json!({"wall_time_ms": 10 + random.below(80)})),
        ("probe", json!(["spin", "60000"]), json!({"cpu_time_ms": 10 + random.below(40)})),
        ("probe", json!(["allocate", "40"]), json!({"memory_bytes": 24 << 20})),
        ("probe", json!(["allocate-in-grandchild", "40"]), json!({"memory_bytes": 24 << 20})),
        ("probe", json!(["fork-bomb", "1000"]), json!({"pids": 16, "wall_time_ms": 10 + random.below(80)})),
        ("probe", json!(["hide", lives]), json!({"pids": 16})),
        ("probe", json!(["flood", "stdout", "1"]), json!({"output_bytes": 1 + random.below(1 << 20)})),
        ("probe", json!(["signal", "19"]), json!({"wall_time_ms": 10 + random.below(80)})),
        ("probe", json!(["abort"]), json!({})),
        ("loop", json!([]), json!({"fuel": 1 + random.below(100_000_000)})),
        ("loop", json!([]), json!({"wall_time_ms": 10 + random.below(80)})),
    ];
    random.of(&jobs).clone()
}

/// Something that is done to a job: method, path below it, body.
fn deed(random: &mut Random) -> (&'static str, &'static str, String) {
    let limits = [
        json!({"pids": 1 + random.below(64)}),
        json!({"memory_bytes": (4 + random.below(60)) << 20}),
        json!({"cpu_cores": 0.05, "cpu_weight": 1 + random.below(10_000)}),
        json!({"cpu_cores": 1, "cpu_time_ms": 10 + random.below(200)}),
        json!({"wall_time_ms": 10 + random.below(200)}),
        json!({"output_bytes": 1 + random.below(1 << 21), "pids": null}),
        json!({"memory_bytes": null, "wall_time_ms": 30_000}),
    ];
    let patch = json!({"limits": random.of(&limits)}).to_string();
    match random.below(16) {
        0..=4 => ("PATCH", "", patch),
        5..=8 => ("POST", "/pause", String::new()),
        9..=12 => ("POST", "/resume", String::new()),
        13 => ("GET", "/stats", String::new()),
        14 => ("GET", "/processes", String::new()),
        _ => ("POST", "/cancel", String::new()),
    }
}

/// Does one thing to a job, whose answer must come in time and be one that can be.
fn act(server: &Server, id: &str, deed: &(&'static str, &'static str, String)) -> String {
    let (method, below, body) = deed;
    let json = [("content-type", "application/json")];
    let begun = Instant::now();
    let answer = server.operator(method, &format!("/v1/jobs/{id}{below}"), &json, body.as_bytes());
    assert!(begun.elapsed() < at_most(CALL_WITHIN), "{deed:?} took {:?}", begun.elapsed());
    let said = match answer.status {
        200 => answer.json()["state"].as_str().unwrap_or("listed").to_owned(),
        status => answer.problem(status),
    };
    let possible: &[&str] = match (*method, *below) {
        ("PATCH", _) => {
            &["running", "paused", "finished", "job_finished", "job_not_begun", "busy", "limit_out_of_range"]
        }
        (_, "/pause") => &["paused", "job_finished", "job_not_begun", "busy", "not_frozen"],
        // another may have paused it again by then
        (_, "/resume") => &["running", "paused", "job_finished", "job_not_begun", "busy", "tenant_paused"],
        (_, "/stats") => &["queued", "running", "paused", "finished"],
        (_, "/cancel") => &["finished", "job_finished"],
        _ => &["listed", "busy"],
    };
    assert!(possible.contains(&&*said), "{deed:?}: {} {}", answer.status, answer.text());
    format!("{}: {said}", if below.is_empty() { "limit" } else { &below[1..] })
}

/// One job, and what two clients do to it meanwhile. Gives what was seen.
fn interleaving(server: &Server, tenant: &str, random: &mut Random) -> Seen {
    let (plugin, args, limits) = job(random);
    let (args, limits) = (format!("holm-args: {args}"), format!("holm-limits: {limits}"));
    let headers = ["content-length: 0", "prefer: return=representation", &args, &limits];
    let newest = || server.get(&format!("/v1/tenants/{tenant}/jobs?limit=1")).json()["jobs"][0]["id"].clone();
    let before = newest();
    let mut request = Raw::request(server, &format!("POST /v1/tenants/{tenant}/plugins/{plugin}/jobs"), &headers);
    let id = wait_until("the job is known", || {
        let id = newest();
        (id != before).then(|| id.as_str().unwrap().to_owned())
    });
    let mut plans = [(); 2].map(|()| {
        let count = 1 + random.below(4);
        (0..count).map(|_| (Duration::from_micros(random.below(12_000)), deed(random))).collect::<Vec<_>>()
    });
    // a tenant that is paused for a moment, or a client that goes away
    let (pauses, hangs_up) = (random.below(12) == 0, random.below(12) == 0);
    if pauses {
        plans[1].truncate(1);
    }
    let mut seen = Seen::new();
    std::thread::scope(|scope| {
        let clients = plans.map(|plan| {
            let id = &id;
            scope.spawn(move || {
                plan.iter()
                    .map(|(wait, deed)| {
                        std::thread::sleep(*wait); // the race itself, not a wait for anything
                        act(server, id, deed)
                    })
                    .collect::<Vec<_>>()
            })
        });
        if pauses {
            for paused in [true, false] {
                let what = if paused { "pause" } else { "resume" };
                let answer = server.operator("POST", &format!("/v1/tenants/{tenant}/{what}"), &[], b"");
                *seen.entry(format!("tenant {what}: {}", answer.status)).or_default() += 1;
                assert!([200, 409].contains(&answer.status), "{}", answer.text());
            }
        }
        for said in clients.into_iter().flat_map(|client| client.join().unwrap()) {
            *seen.entry(said).or_default() += 1;
        }
    });
    end(server, &id, request_of(hangs_up, &mut request), &mut seen);
    seen
}

/// The job's own request, unless its client goes away.
fn request_of(hangs_up: bool, request: &mut Raw) -> Option<&mut Raw> {
    (!hangs_up).then_some(request)
}

/// Lets a job that still stands go on or end, and looks at its one end.
fn end(server: &Server, id: &str, request: Option<&mut Raw>, seen: &mut Seen) {
    // what is left is ended from outside, half of it while it is paused
    let begun = Instant::now();
    let record = loop {
        let record = server.record(id);
        if record["state"] == "finished" {
            break record;
        }
        assert!(begun.elapsed() < at_most(CALL_WITHIN), "it does not end: {record}");
        if record["state"] == "paused" || begun.elapsed() > Duration::from_millis(100) {
            server.order(id, "cancel");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let kind = record["outcome"]["kind"].as_str().unwrap();
    assert!(["exited", "signaled", "cancelled", "over_limit"].contains(&kind), "{record}");
    if kind == "over_limit" {
        let limit = record["outcome"]["limit"].as_str().unwrap();
        let (reached, allowed) = (record["outcome"]["reached"].as_f64(), record["outcome"]["allowed"].as_f64());
        assert!(reached >= allowed, "{record}");
        *seen.entry(format!("over {limit}")).or_default() += 1;
    }
    *seen.entry(format!("end: {kind}")).or_default() += 1;
    if let Some(answer) = request.and_then(Raw::answer)
        && answer.status == 200
    {
        assert_eq!(answer.json()["outcome"], record["outcome"], "told twice, the same");
    }
    for (what, expected) in [("cancel", 409), ("pause", 409), ("resume", 409)] {
        assert_eq!(server.order(id, what).status, expected, "{what}: it stays over");
    }
    assert_eq!(server.record(id), record, "and as it was");
}

#[test] // L7, L4
fn l7_whatever_crosses_a_job_s_life_it_has_one_end_and_leaves_nothing() {
    let (wanted, seed) = (wanted(), seed());
    let config = "body_grace_ms = 120000\nparked_per_plugin = 2\nqueue_timeout_ms = 60000\n";
    let server = Server::start_with(config);
    let tenants = ["a", "b", "c", "d"];
    for tenant in tenants {
        server.tenant(tenant, &json!({"quota": {"jobs_running": 8}}));
        server.upload(tenant, "probe", &native("probe"));
        server.upload(tenant, "loop", command(&[], "", "(loop $l (br $l))").as_bytes());
    }
    let (next, begun) = (AtomicUsize::new(0), Instant::now());
    let mut seen = Seen::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = tenants[..AT_ONCE]
            .iter()
            .map(|tenant| {
                let (server, next) = (&server, &next);
                scope.spawn(move || {
                    let mut seen = Seen::new();
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        if i >= wanted {
                            return seen;
                        }
                        let mut random = Random(seed.wrapping_mul(1_000_003).wrapping_add(i as u64));
                        for (what, count) in interleaving(server, tenant, &mut random) {
                            *seen.entry(what).or_default() += count;
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            for (what, count) in worker.join().unwrap() {
                *seen.entry(what).or_default() += count;
            }
        }
    });
    println!("{wanted} interleavings of seed {seed} in {:?}: {seen:#?}", begun.elapsed());
    let ends = seen.keys().filter(|what| what.starts_with("end: ")).count();
    assert!(ends >= 3, "the races were none: {seen:?}");
    each_ended_once(&server.log(), wanted);
    wait_until("nothing of any job is left", || server.sandboxed().is_empty().then_some(()));
    for tenant in tenants {
        server.operator("DELETE", &format!("/v1/tenants/{tenant}"), &[], b"").expect(204);
    }
    let log = server.log();
    assert!(!log.contains(" ERROR ") && !log.contains("panicked"), "{log}");
}

/// The log has one end of each job, and no job's end twice.
fn each_ended_once(log: &str, jobs: usize) {
    let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains("job finished")) {
        let id = line.split_once("job=").unwrap().1.split(' ').next().unwrap();
        *ends.entry(id).or_default() += 1;
    }
    assert!(ends.values().all(|count| *count == 1), "{ends:?}");
    assert_eq!(ends.len(), jobs);
}
