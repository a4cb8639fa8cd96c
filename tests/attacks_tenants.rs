//! One tenant's job against another's: what the kernel counts for a user, what two processes could meet at, and what
//! one could leave to the next. Each attack works between two plain processes of one user, and between two jobs it does
//! not. Rows X1 to X12, I1, I2 and T1 of the threats.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::inspect::Running;
use support::plain::{NOBODY_ELSE, Plain, outside};
use support::{OPERATOR, Server, native, wait_until};

/// A server whose tenants `t` and `other` both have the probe.
fn start() -> Server {
    let server = Server::start().with_probe();
    server.tenant("other", &json!({}));
    server.upload("other", "probe", &native("probe"));
    server
}

/// Starts a job of the probe, and waits until it holds what it took.
fn hold(server: &Server, tenant: &str, words: &[&str]) -> Running {
    let job = Running::start(server, tenant, "probe", &json!(words), &json!({"open_files": 4096}));
    wait_until("the job holds what it took", || {
        let name = |process: &support::inspect::Process| process.try_status().map(|status| status["Name"].clone());
        job.processes(server).iter().any(|process| name(process).as_deref() == Some("holding")).then_some(())
    });
    job
}

/// Ends a job, and gives what it said.
fn said(job: Running) -> String {
    let record = job.finish().expect(200).json();
    assert_eq!(record["outcome"]["exit_code"], 0, "{record}");
    record["output"].as_str().unwrap().trim_end().to_owned()
}

/// What two plain processes of one user say, the second while the first one holds what it took.
fn two_outside(words: &[&str]) -> [String; 2] {
    let mut first = Plain::start(NOBODY_ELSE, words);
    let taken = first.line();
    let mut second = Plain::start(NOBODY_ELSE, words);
    let left = second.line();
    first.finish();
    second.finish();
    [taken, left]
}

/// What a job says alone, and what three say while the ones before hold what they took: of the same tenant and of another.
fn four_inside(server: &Server, words: &[&str]) -> [String; 4] {
    let alone = said(hold(server, "t", words));
    let jobs = ["t", "t", "other"].map(|tenant| hold(server, tenant, words));
    let [first, second, third] = jobs.map(said);
    [alone, first, second, third]
}

fn number(text: &str) -> u64 {
    text.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn x1_keys_are_taken_from_nobody_as_no_job_can_make_one() {
    let [taken, left] = two_outside(&["take", "keys", "400"]);
    assert!(number(&taken) > 0 && taken.ends_with("(os error 122)"), "outside: {taken}");
    assert_eq!(number(&left), 0, "outside the second of the same user gets none: {left}");
    let refused = "0 Operation not permitted (os error 1)";
    assert_eq!(four_inside(&start(), &["take", "keys", "400"]), [refused; 4]);
}

#[test]
fn x2_inotify_instances_of_one_job_are_not_taken_from_another() {
    let words = ["take", "inotify", "200"];
    let [taken, left] = two_outside(&words);
    assert!(number(&taken) > 0 && taken.ends_with("(os error 24)"), "outside: {taken}");
    assert_eq!(number(&left), 0, "outside the second of the same user gets none: {left}");
    let server = start();
    let [alone, rest @ ..] = four_inside(&server, &words);
    assert!(number(&alone) >= number(&taken) - 8 && alone.ends_with("(os error 24)"), "{alone}");
    assert_eq!(rest, [alone.clone(), alone.clone(), alone]);
    server.assert_healthy();
}

#[test]
fn x3_pipes_of_one_job_do_not_shrink_another_s() {
    let words = ["take", "pipes", "1100"];
    let [taken, left] = two_outside(&words);
    assert!(number(&taken) > 0 && taken.ends_with("a small pipe"), "outside: {taken}");
    assert_eq!(left, "0 a small pipe", "outside the second of the same user gets no whole one");
    let server = start();
    let [alone, rest @ ..] = four_inside(&server, &words);
    assert!(number(&alone) > 900, "{alone}");
    assert_eq!(rest, [alone.clone(), alone.clone(), alone]);
    server.assert_healthy();
}

#[test]
fn x3_signals_and_timers_of_one_job_are_not_taken_from_another() {
    let server = start();
    for kind in ["signals", "timers"] {
        let [alone, rest @ ..] = four_inside(&server, &["take", kind, "2000"]);
        assert!((900..=1024).contains(&number(&alone)) && alone.ends_with("(os error 11)"), "{kind}: {alone}");
        assert_eq!(rest, [alone.clone(), alone.clone(), alone], "{kind}");
    }
    server.assert_healthy();
}

#[test]
fn x4_whatever_a_job_locks_another_can_lock_too() {
    let words = ["lock-all", "/dev/null", "/proc/self/ns/uts"];
    let [first, second] = two_outside(&words).map(|text| serde_json::from_str::<Value>(&text).unwrap());
    assert_eq!((&first["/dev/null"][0], &second["/dev/null"][0]), (&json!(0), &json!(11)), "outside the second waits");
    assert_eq!(
        (&first["/proc/self/ns/uts"][0], &second["/proc/self/ns/uts"][0]),
        (&json!(0), &json!(11)),
        "outside namespaces are files that two processes share"
    );
    let words: Vec<&str> = "lock-all / /tmp /bin /dev /proc /bin/probe /dev/null /dev/zero /dev/full /dev/random \
        /dev/urandom /dev/tty /proc/self /proc/self/exe /proc/self/status /proc/self/mem /proc/self/ns /proc/self/ns/user \
        /proc/self/ns/pid /proc/self/ns/mnt /proc/self/ns/uts /proc/self/ns/ipc /proc/self/ns/net /proc/self/ns/cgroup \
        /proc/self/ns/time"
        .split_whitespace()
        .collect();
    let server = start();
    let [alone, rest @ ..] = four_inside(&server, &words).map(|text| serde_json::from_str::<Value>(&text).unwrap());
    let locked = |path: &str| alone[path][0] == 0;
    assert!(locked("/dev/null") && locked("/bin/probe") && locked("/tmp"), "{alone}");
    for (path, errnos) in alone.as_object().unwrap() {
        assert!(*errnos == "closed" || errnos[2] == 1, "no lease on {path}: {errnos}");
    }
    assert_eq!(rest, [alone.clone(), alone.clone(), alone], "who comes later locks the same");
    server.assert_healthy();
}

#[test]
fn x5_no_job_hears_another_s_abstract_socket() {
    let name = format!("holm-tests-{}", std::process::id());
    let mut listener = Plain::start(0, &["listen", &name]);
    assert_eq!(listener.line(), "listening");
    assert_eq!(outside(&["hear", &name]), "0", "outside it is heard");
    let server = start();
    let refused = libc::ECONNREFUSED.to_string();
    assert_eq!(said(hold_none(&server, "t", &["hear", &name])), refused, "a job does not hear the host");
    let held = hold(&server, "t", &["listen", &name]);
    for tenant in ["t", "other"] {
        assert_eq!(said(hold_none(&server, tenant, &["hear", &name])), refused);
    }
    assert_eq!(said(held), "listening");
}

/// A job that ends by itself.
fn hold_none(server: &Server, tenant: &str, words: &[&str]) -> Running {
    let words = [&["after-input"], words].concat();
    Running::start(server, tenant, "probe", &json!(words), &json!({}))
}

#[test]
fn x6_nothing_that_a_job_leaves_is_there_for_the_next() {
    let (name, key) = (format!("probe-left-{}", std::process::id()), (std::process::id() | 0x4000_0000).to_string());
    let words = ["leave", &name, &key];
    let left: Value = serde_json::from_str(&outside(&words)).unwrap();
    let tmp = format!("/tmp/{name}");
    assert!(left[&tmp] == 0 && left["shm"] == 0 && left["sem"] == 0, "outside: {left}");
    let found: Value = serde_json::from_str(&outside(&["find", &name, &key])).unwrap();
    for place in [tmp.as_str(), "shm", "sem"] {
        assert!(found.as_array().unwrap().contains(&json!(place)), "outside: {found}");
    }
    let server = start();
    let left = server.probe(&words, &json!({}))["output"].as_str().unwrap().to_owned();
    let left: Value = serde_json::from_str(&left).unwrap();
    let made: Vec<_> = left.as_object().unwrap().iter().filter(|(_, errno)| **errno == 0).map(|(at, _)| at).collect();
    assert_eq!(made, [&tmp, &format!("/dev/shm/{name}")], "the second is the first: {left}");
    for tenant in ["t", "other"] {
        let found = server.job(tenant, "probe", &json!(["find", name, key]), &json!({}), b"");
        assert_eq!(found["output"], "[]\n", "{tenant}");
    }
}

#[test]
fn x7_the_memory_of_a_job_is_never_another_s() {
    let report = |text: &str| serde_json::from_str::<Value>(text.lines().next().unwrap()).unwrap();
    let reused = report(&outside(&["mark-and-search", "77001", "8"]));
    assert_eq!(
        (&reused["read"], &reused["found"]),
        (&json!(true), &json!(true)),
        "a child of the same process finds it"
    );
    let server = start();
    for round in 0..4 {
        let seed = (77_100 + round).to_string();
        assert_eq!(server.probe(&["mark", &seed, "48"], &json!({}))["output"], format!("{}\n", 48 << 14));
        for tenant in ["t", "other"] {
            let search = server.job(tenant, "probe", &json!(["search", seed]), &json!({}), b"");
            let found = report(search["output"].as_str().unwrap());
            assert_eq!(found, json!({"read": true, "found": false, "new_is_used": false}), "{tenant}");
        }
    }
}

#[test]
fn x9_a_job_neither_learns_which_pages_are_in_memory_nor_has_equal_ones_merged() {
    let free: Value = serde_json::from_str(&outside(&["sharing"])).unwrap();
    assert_eq!(free["mincore"], 0, "outside");
    if free["madvise"] != 0 {
        println!("NOT SHOWN OUTSIDE: X9: this kernel merges no pages: {free}");
    }
    let record = start().probe(&["sharing"], &json!({}));
    let held: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
    assert_eq!(held, json!({"mincore": 1, "madvise": 1, "prctl": 1}));
}

#[test]
fn x11_another_tenant_s_job_is_as_unknown_as_one_that_never_was_and_takes_as_long_to_say() {
    let server = start();
    let key = server.key("other");
    let id = server.probe(&["exit", "0"], &json!({}))["id"].as_str().unwrap().to_owned();
    let never = "01890a5d-ac96-774b-bcce-b302099a8057";
    let ask = |id: &str| {
        let start = Instant::now();
        let answer = server.send(&key, "GET", &format!("/v1/jobs/{id}"), &[], b"");
        let took = start.elapsed();
        assert_eq!(answer.problem(404), "not_found");
        (took, answer.text().replace(id, "ID"))
    };
    let (mut theirs, mut nobodys) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        let ((one, text), (other, unknown)) = (ask(&id), ask(never));
        assert_eq!(text, unknown);
        theirs.push(one);
        nobodys.push(other);
    }
    let (theirs, nobodys) = (median(&mut theirs), median(&mut nobodys));
    println!("another's job {theirs:?}, nobody's {nobodys:?}");
    assert!(theirs.abs_diff(nobodys) < nobodys / 4, "{theirs:?} and {nobodys:?}");
    assert_eq!(server.send(OPERATOR, "GET", &format!("/v1/jobs/{id}"), &[], b"").status, 200);
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn i2_usage_is_the_kernel_s_count_of_every_process_whatever_they_say() {
    let server = start();
    for way in ["burn", "burn-in-grandchild"] {
        let usage = server.probe(&[way, "300"], &json!({}))["usage"].clone();
        let cpu = usage["cpu_user_us"].as_u64().unwrap() + usage["cpu_system_us"].as_u64().unwrap();
        assert!(cpu >= 290_000, "{way}: {cpu}");
    }
    let record = server.probe(&["allocate-in-child", "32"], &json!({}));
    let peak = record["usage"]["memory_peak_bytes"].as_u64().unwrap();
    assert!(peak >= 32 << 20, "{peak}: the child's memory, given back before the end");
}

#[test]
fn t1_no_job_speculates_past_stores_where_the_cpu_lets_that_be_forbidden() {
    let free: Value = serde_json::from_str(&outside(&["speculation"])).unwrap();
    let record = start().probe(&["speculation"], &json!({}));
    let held: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
    println!("outside {free}, in a job {held}");
    let fixed = [libc::ENXIO, libc::ENODEV].map(|errno| json!(errno)).contains(&free["set_errno"]);
    match held["store_bypass"].as_str().unwrap() {
        "thread force mitigated" | "not vulnerable" => {}
        "globally mitigated" | "vulnerable" => assert!(fixed, "it could be forbidden: {free}"),
        other => panic!("{other}: {free}"),
    }
}
