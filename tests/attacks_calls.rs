//! System calls as a hostile job makes them: all numbers, all sockets, both sides of every condition, and noise.
//! The rows S5, S6, S8, S16 and S17; `attacks_kernel.rs` has the others.
//!
//! Only native code can make any call it likes. What code that broke out of the WebAssembly runtime or the compiler
//! could reach is a matter of the same tables: `host/sandbox/src/init/seccomp` runs their filters over every number, and
//! `host/sandbox/tests/launcher` native code in their place.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where
#![allow(clippy::print_stdout)] // what was not shown outside is told

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::{Value, json};
use support::Server;
use support::attack::{NotShown, inside, inside_with, never_shown, on_own_ground, outside, shown};

const EPERM: i64 = 1;
const ENOSYS: i64 = 38;
const CLONE3: u64 = 435;

/// `uretprobe` and `uprobe`: the kernel itself keeps them from filters (6.14) and answers only its own trampolines.
const OF_TRAMPOLINES: [u64; 2] = [335, 336];

/// `sync` would make the whole host wait, `rt_sigreturn` goes wherever the stack says.
const SPARED: [&str; 2] = ["162", "15"];

const NOT_SHOWN: NotShown = &[
    ("S8 sync", "is not called: it would make the whole host write"),
    ("S8 call 157 with 35", "PR_SET_MM: this machine's root lacks the capability that it takes"),
    ("S8 call 324 with 32", "the kernel itself refuses it with EPERM before its registration"),
    ("S8 call 324 with 128", "the kernel itself refuses it with EPERM before its registration"),
    ("S16 x32", "the kernel is built without it and answers ENOSYS; inside, the filter kills before that"),
    ("S5 tipc, rds, sctp, alg, xdp", "the kernel is built without them; inside, the filter answers before it looks"),
    ("S17", "random calls by root could harm the machine; that each number reaches the kernel is shown by S8"),
];

/// The published list for native jobs: number to whether only some arguments are let through.
fn published() -> BTreeMap<u64, bool> {
    let output = Command::new(env!("CARGO_BIN_EXE_holm")).args(["doctor", "--policy", "--json"]).output().unwrap();
    let policy: Value = serde_json::from_slice(&output.stdout).unwrap();
    let kinds = policy["kinds"].as_array().unwrap();
    let native = kinds.iter().find(|kind| kind["kind"] == "native").unwrap();
    let calls = native["calls"].as_array().unwrap().iter();
    calls.map(|call| (call["number"].as_u64().unwrap(), call["conditional"].as_bool().unwrap())).collect()
}

/// The answers of a sweep, by number.
fn by_number(sweep: &Value) -> BTreeMap<u64, Vec<Value>> {
    let answers = sweep.as_object().unwrap().iter();
    answers.map(|(number, all)| (number.parse().unwrap(), all.as_array().unwrap().clone())).collect()
}

#[test]
fn s8_every_system_call_is_answered_as_published() {
    let published = published();
    let server = Server::start().with_probe();
    let limits = json!({"wall_time_ms": 60_000, "cpu_time_ms": 60_000});
    let sweep = by_number(&inside_with(&server, &["sweep", "0", "1025", "6", SPARED[1]], &limits));
    assert_eq!(sweep.len(), 1024);
    for (number, answers) in &sweep {
        match published.get(number) {
            None if OF_TRAMPOLINES.contains(number) => {
                let refusals = [json!(EPERM), json!(ENOSYS), json!(6), json!("signal 4")];
                assert!(answers.iter().all(|answer| refusals.contains(answer)), "call {number}: {answers:?}");
            }
            None => assert_eq!(answers, &vec![json!(EPERM); 6], "call {number} is not published"),
            Some(_) if *number == CLONE3 => assert_eq!(answers, &vec![json!(ENOSYS); 6]),
            Some(conditional) => {
                assert!(!answers.contains(&json!("signal 31")), "call {number} is published, and killed: {answers:?}");
                let refused = answers.iter().all(|answer| *answer == json!(EPERM));
                assert!(*conditional || !refused, "call {number} is published, and refused");
            }
        }
    }
    server.assert_healthy();

    // outside each of them is at least looked at by the kernel
    let sweep = by_number(&on_own_ground(&["sweep", "0", "1025", "1", SPARED[0], SPARED[1]]));
    never_shown(NOT_SHOWN, "S8 sync");
    let refused: Vec<_> = sweep.iter().filter(|(_, answers)| answers[0] == json!(EPERM)).map(|(n, _)| n).collect();
    assert!(refused.is_empty(), "refused outside too: {refused:?}");
    let dangerous = sweep.iter().filter(|(number, answers)| {
        !published.contains_key(number) && answers[0] != json!(ENOSYS) && answers[0] != json!(EPERM)
    });
    let dangerous = dangerous.count();
    assert!(dangerous > 100, "there must be something to refuse: {dangerous}");
}

#[test]
fn s8_ways_around_confinement_are_refused_whatever_they_are_asked() {
    let server = Server::start().with_probe();
    let outside = on_own_ground(&["forbidden-calls"]);
    let inside = inside(&server, &["forbidden-calls"]);
    assert_eq!(inside.as_object().unwrap().len(), outside.as_object().unwrap().len());
    for (name, errno) in inside.as_object().unwrap() {
        let expected = if name == "clone3" { ENOSYS } else { EPERM };
        assert_eq!(errno, &json!(expected), "{name}");
        shown(NOT_SHOWN, &format!("S8 {name}"), outside[name] != json!(expected));
    }
}

#[test]
fn s16_calls_by_other_entries_of_the_processor_are_deadly() {
    let server = Server::start().with_probe();
    const X32: u64 = 0x4000_0000;
    let (first, end) = (X32.to_string(), (X32 + 600).to_string());
    let swept = |first: &str, end: &str| by_number(&inside(&server, &["sweep", first, end, "1"]));
    let sweep = swept(&first, &end);
    assert_eq!(sweep.len(), 600);
    for (number, mut answers) in sweep {
        if answers == [json!("blocked")] {
            // or has not come to its end in time, on a machine that had other things to do
            answers = swept(&number.to_string(), &(number + 1).to_string())[&number].clone();
        }
        assert_eq!(answers, [json!("signal 31")], "{number:#x}");
    }
    let killed = json!({"kind": "signaled", "signal": 31});
    for entry in ["x32-call", "i386-call"] {
        assert_eq!(server.probe(&[entry], &json!({}))["outcome"], killed, "{entry}");
    }
    let x32 = by_number(&on_own_ground(&["sweep", &first, &(X32 + 1).to_string(), "1"]));
    shown(NOT_SHOWN, "S16 x32", x32[&X32] != [json!(ENOSYS)]);
    assert!(outside(&["i386-call"]).as_i64().unwrap() > 1, "the entry of 32-bit programs works outside");
}

#[test]
fn s5_no_socket_can_be_made_but_three_kinds_of_unix_ones() {
    let server = Server::start().with_probe();
    // all families that there are and two more, all types and some that are none, protocols of each layer
    let all = ["socket-matrix", "48", "16", "0", "1", "6", "17", "58", "132", "255", "256", "4294967296"];
    let inside = inside(&server, &all);
    let unix = json!([[1, 1, 0], [1, 1, 1_u64 << 32], [1, 2, 0], [1, 2, 1_u64 << 32], [1, 5, 0], [1, 5, 1_u64 << 32]]);
    assert_eq!((&inside["made"], &inside["pairs"]), (&unix, &unix), "the kernel takes the low half alone");
    let errnos: BTreeSet<&str> = inside["errnos"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(errnos, ["0", "97"].into(), "everything else is EAFNOSUPPORT");

    // outside there are many; of what other kernels have besides, none was seen
    let outside = on_own_ground(&["socket-matrix", "46", "10", "0"]);
    let families: BTreeSet<u64> =
        outside["made"].as_array().unwrap().iter().map(|made| made[0].as_u64().unwrap()).collect();
    for (name, family) in [("inet", 2), ("inet6", 10), ("netlink", 16), ("packet", 17), ("vsock", 40)] {
        shown(NOT_SHOWN, &format!("S5 {name}"), families.contains(&family));
    }
    shown(NOT_SHOWN, "S5 tipc, rds, sctp, alg, xdp", [30, 21, 38].iter().all(|family| families.contains(family)));
}

#[test]
fn s5_type_flags_are_let_through_and_types_above_them_are_not() {
    let server = Server::start().with_probe();
    const CLOEXEC_NONBLOCK: usize = 0o2_004_000;
    let kinds = [1, 2, 3, 4, 5, 6, 10, 15, 0x10, 0x11, 0x100, 0x1001, 1 << 31 | 1];
    let words: Vec<String> =
        kinds.iter().flat_map(|kind| [*kind, kind | CLOEXEC_NONBLOCK]).map(|n| n.to_string()).collect();
    let words: Vec<&str> = ["vary", "41", "1", "1,0,0"].into_iter().chain(words.iter().map(String::as_str)).collect();
    for (kind, errno) in inside(&server, &words).as_object().unwrap() {
        let plain = [1, 2, 5].contains(&(kind.parse::<usize>().unwrap() & !CLOEXEC_NONBLOCK));
        assert_eq!(errno, &json!(if plain { 0 } else { 97 }), "type {kind}");
    }
    assert_eq!(outside(&words)["3"], 0, "a raw one is a datagram one to the kernel");
}

#[test]
fn s6_no_unix_socket_carries_out_of_band_data() {
    let server = Server::start().with_probe();
    let outside = outside(&["out-of-band"]);
    let inside = inside(&server, &["out-of-band"]);
    for (way, errno) in inside.as_object().unwrap() {
        let plain = way.starts_with("plain");
        assert_eq!(errno, &json!(if plain { 0 } else { EPERM }), "{way}");
        assert_eq!(outside[way], 0, "{way} outside");
    }
}

/// One condition: the call, which argument decides, the other ones, values let through, values refused, and how.
struct Condition {
    call: &'static str,
    at: &'static str,
    args: &'static str,
    passes: &'static [&'static str],
    refused: &'static [&'static str],
    errno: i64,
}

const CONDITIONS: &[Condition] = &[
    // F_DUPFD, F_GETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ, each with garbage above too
    Condition {
        call: "72",
        at: "1",
        args: "1,0,4096",
        passes: &["1", "3", "0x500000001"],
        refused: &["1024", "1026", "1031", "0x1200000407", "0xffffffff00000400"],
        errno: EPERM,
    },
    // prctl: PR_GET_NAME fails for its address; seccomp, mm, capabilities, speculation, tracers, syscall dispatch
    Condition {
        call: "157",
        at: "0",
        args: "0,0,0,0,0",
        passes: &["2", "3", "21", "39", "42", "0x900000003"],
        refused: &[
            "8",
            "10",
            "22",
            "24",
            "26",
            "28",
            "33",
            "34",
            "35",
            "40",
            "47",
            "50",
            "52",
            "53",
            "59",
            "62",
            "65",
            "0x59616d61",
            "0x900000016",
            "0xffffffff",
        ],
        errno: EPERM,
    },
    // personality: to ask, and plain Linux; READ_IMPLIES_EXEC, no randomising, other systems' ways
    Condition {
        call: "135",
        at: "0",
        args: "0",
        passes: &["0", "0xffffffff", "0xffffffffffffffff"],
        refused: &["0x400000", "0x40000", "0x440000", "0x100000", "8", "6"],
        errno: EPERM,
    },
    // membarrier: QUERY and REGISTER_PRIVATE_EXPEDITED; what interrupts every processor
    Condition {
        call: "324",
        at: "0",
        args: "0,0,0",
        passes: &["0", "16"],
        refused: &["1", "2", "4", "32", "64", "128", "256", "512", "0x100000001"],
        errno: EPERM,
    },
    // prlimit64 of RLIMIT_NOFILE, nothing told or asked: oneself by 0; by any number, also one's own or the init's
    Condition {
        call: "302",
        at: "0",
        args: "0,7,0,0",
        passes: &["0", "0x100000000"],
        refused: &["1", "2", "0x100000001"],
        errno: EPERM,
    },
];

#[test]
fn s8_conditions_on_arguments_hold_on_both_sides() {
    let server = Server::start().with_probe();
    for Condition { call, at, args, passes, refused, errno } in CONDITIONS {
        let words: Vec<&str> =
            ["vary", call, at, args].into_iter().chain(passes.iter().chain(*refused).copied()).collect();
        let (inside, outside) = (inside(&server, &words), on_own_ground(&words));
        for value in *passes {
            assert_eq!(inside[value], outside[value], "call {call} with {value} is the kernel's to answer");
            assert_ne!(inside[value], json!(errno), "call {call} with {value}");
        }
        for value in *refused {
            assert_eq!(inside[value], json!(errno), "call {call} with {value}");
            shown(NOT_SHOWN, &format!("S8 call {call} with {value}"), outside[value] != json!(errno));
        }
    }
}

#[test]
fn s8_no_device_and_no_stream_knows_a_request_but_the_harmless_ones() {
    let server = Server::start().with_probe();
    let with_garbage = |low: &[u64]| -> BTreeSet<String> {
        low.iter()
            .flat_map(|low| [*low, low | 0x5412 << 32, low | 0xffff_ffff << 32])
            .map(|n| format!("{n:#x}"))
            .collect()
    };
    let known = |words: &[&str]| -> BTreeSet<String> {
        inside(&server, words).as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    // FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: no device has more, a pipe has all
    assert_eq!(known(&["known-requests", "-"]), with_garbage(&[0x541b, 0x5421, 0x5450, 0x5451]));
    for device in ["null", "zero", "full", "random", "urandom"] {
        let found = known(&["known-requests", &format!("/dev/{device}")]);
        assert_eq!(found, with_garbage(&[0x5421, 0x5450, 0x5451]), "{device}");
    }
    // outside even the null device knows more
    assert!(outside(&["known-requests", "/dev/null"]).as_array().unwrap().len() > 9);
}

#[test]
fn s17_twenty_thousand_random_calls_harm_nobody_else() {
    let server = Server::start().with_probe();
    let limits = json!({"wall_time_ms": 20_000, "cpu_time_ms": 20_000, "memory_bytes": 32 << 20, "pids": 16});
    let record = server.probe(&["fuzz", "20000", "20260101"], &limits);
    let kind = record["outcome"]["kind"].as_str().unwrap();
    assert!(["exited", "over_limit", "signaled"].contains(&kind), "{record}");
    if kind == "exited" {
        let told: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
        assert_eq!(told["made"], 20_000);
    }
    assert!(server.sandboxed().is_empty(), "nothing is left of it");
    server.assert_healthy();
    never_shown(NOT_SHOWN, "S17");
}

#[test]
fn s_rows_of_this_file_that_are_not_shown_outside_are_these() {
    for (row, why) in NOT_SHOWN {
        println!("NOT SHOWN OUTSIDE, here or elsewhere: {row}: {why}");
    }
    assert_eq!(NOT_SHOWN.len(), 7);
}
