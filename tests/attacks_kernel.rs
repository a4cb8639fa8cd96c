//! The parts of the kernel through which containers were left before, tried with arguments that do something. The rows
//! S1–S4, S7 and S9–S15; `attacks_calls.rs` has the others.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where
#![allow(clippy::print_stdout)] // what was not shown outside is told

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use support::Server;
use support::attack::{NotShown, Outside, inside, never_shown, on_own_ground, outside, shown};

const ENOENT: i64 = 2;
const EPERM: i64 = 1;
const ENOTTY: i64 = 25;
const EROFS: i64 = 30;

const NOT_SHOWN: NotShown = &[
    ("S1 memory", "on a machine where the hierarchy is mounted with others, or by v2, it cannot be mounted alone"),
    ("S3 user by setns", "the kernel lets nobody enter the user namespace that he is in: EINVAL"),
    ("S3 time by clone", "the old call has no room for its flag"),
    ("S2 pivot_root", "the argument must be below the root, which the attack has just changed: ENOENT"),
    ("S2 open_tree_attr", "the path is gone after the attack's own chroot; older kernels do not have it at all"),
    ("S10 TIOCLINUX", "known by virtual consoles only, and the test makes a pseudo-terminal"),
    ("S11 writing", "nothing is written to the host's knobs: that they open is enough"),
    ("S12 writable mapping of the program", "a running program is open to be read, here as everywhere"),
    ("S14 using a device", "the nodes made outside are not opened: /dev/mem of a host is no test's business"),
    ("S15 absent files", "each kernel has its own of them; those that it has are read"),
];

/// Fails unless every answer inside is this errno, and none outside, those apart that cannot be shown.
#[track_caller]
fn refused_with(row: &str, errno: i64, inside: &Value, outside: &Value) {
    assert!(!inside.as_object().unwrap().is_empty());
    for (name, answer) in inside.as_object().unwrap() {
        assert_eq!(answer, &json!(errno), "{row}: {name}");
        shown(NOT_SHOWN, &format!("{row} {name}"), outside[name] == 0);
    }
}

#[test]
fn s1_no_cgroup_hierarchy_can_be_mounted_and_no_release_agent_reached() {
    let server = Server::start().with_probe();
    let (inside, outside) = (inside(&server, &["release-agent"]), on_own_ground(&["release-agent"]));
    for (controller, answers) in inside.as_object().unwrap() {
        assert_eq!(answers, &json!({"mount": EPERM, "agent": ENOENT}), "{controller}");
        shown(NOT_SHOWN, &format!("S1 {controller}"), outside[controller] == json!({"mount": 0, "agent": 0}));
    }
}

#[test]
fn s2_nothing_can_be_mounted_by_old_calls_or_new_ones() {
    let server = Server::start().with_probe();
    refused_with("S2", EPERM, &inside(&server, &["mounts"]), &on_own_ground(&["mounts"]));
}

#[test]
fn s3_no_namespace_can_be_made_or_entered_by_any_call() {
    let server = Server::start().with_probe();
    let (mut inside, mut outside) = (inside(&server, &["namespaces"]), on_own_ground(&["namespaces"]));
    for all in [&mut inside, &mut outside] {
        let nested = all.as_object_mut().unwrap().remove("a network of a user's").unwrap();
        assert!([json!(0), json!(EPERM)].contains(&nested));
    }
    assert_eq!(inside.as_object().unwrap().len(), 8);
    for (name, ways) in inside.as_object().unwrap() {
        for (way, errno) in ways.as_object().unwrap() {
            let expected = match (name.as_str(), way.as_str()) {
                (_, "clone3") => 38,
                ("time", "clone") => 22, // not made
                _ => EPERM,
            };
            assert_eq!(errno, &json!(expected), "{name} by {way}");
            shown(NOT_SHOWN, &format!("S3 {name} by {way}"), outside[name][way] == 0);
        }
    }
}

#[test]
fn s3_no_namespace_of_a_users_makes_a_network_whose_administrator_it_is() {
    let server = Server::start().with_probe();
    assert_eq!(on_own_ground(&["namespaces"])["a network of a user's"], 0);
    assert_eq!(inside(&server, &["namespaces"])["a network of a user's"], EPERM);
}

#[test]
fn s4_no_ring_can_be_made_or_used() {
    let server = Server::start().with_probe();
    refused_with("S4", EPERM, &inside(&server, &["rings"]), &outside(&["rings"]));
}

#[test]
fn s7_no_key_can_be_made_found_or_read() {
    let server = Server::start().with_probe();
    refused_with("S7", EPERM, &inside(&server, &["keys"]), &outside(&["keys"]));
}

#[test]
fn s9_no_process_can_be_traced_neither_the_init_nor_an_own_child() {
    let server = Server::start().with_probe();
    let calls = ["traceme", "attach", "seize", "process_vm_readv", "kcmp", "pidfd_getfd"];
    let victim = outside(&["attach", "0"]);
    for pid in ["0", "1"] {
        let inside = inside(&server, &["attach", pid]);
        for call in calls {
            assert_eq!(inside[call], EPERM, "{call} of {pid}");
            assert_eq!(victim[call], 0, "{call} outside");
        }
    }
}

#[test]
fn s10_there_is_no_terminal_and_no_way_to_type_into_one() {
    let server = Server::start().with_probe();
    let (inside, outside) = (inside(&server, &["type-keys"]), outside(&["type-keys"]));
    for (name, answer) in inside.as_object().unwrap() {
        let expected = if name == "own" { -6 } else { ENOTTY }; // ENXIO: /dev/tty without a terminal
        assert_eq!(answer, &json!(expected), "{name}");
    }
    for name in ["make", "control", "TIOCSTI", "TIOCSTI with garbage"] {
        assert_eq!(outside[name], 0, "{name} outside");
    }
    never_shown(NOT_SHOWN, "S10 TIOCLINUX");
}

#[test]
fn s11_nothing_below_proc_can_be_written_to_and_there_is_no_sys() {
    let server = Server::start().with_probe();
    let tried = inside(&server, &["open-for-writing", "/proc"]);
    // the list of what is writable by design is empty: not even a process's own files are
    assert_eq!(tried["opened"], json!([]), "{tried}");
    assert!(tried["seen"].as_u64().unwrap() > 100, "{tried}");
    // EROFS of the mount, EACCES of what is a link to a file of another owner, EPERM of what its mode forbids
    let errnos: BTreeSet<&str> = tried["refused"].as_object().unwrap().keys().map(String::as_str).collect();
    println!("refused by {:?}", tried["refused"]);
    assert!(errnos.is_subset(&["1", "2", "6", "13", "21", "26", "30"].into()) && errnos.contains("30"), "{tried}");
    assert_eq!(inside(&server, &["open", "/sys"])["/sys"], json!({"read": ENOENT, "write": ENOENT}));

    let own = outside(&["open-for-writing", "/proc/self/task"]);
    assert!(own["opened"].as_array().unwrap().len() > 5, "{own}");
    let knobs = ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/panic", "/proc/sys/vm/drop_caches"];
    let knobs_inside = inside(&server, &[&["open"], &knobs[..]].concat());
    let knobs_outside = outside(&[&["open"], &knobs[..]].concat());
    for knob in knobs {
        assert_eq!(
            (&knobs_inside[knob]["write"], &knobs_outside[knob]["write"]),
            (&json!(ENOENT), &json!(0)),
            "{knob}"
        );
    }
    never_shown(NOT_SHOWN, "S11 writing");
}

#[test]
fn s12_pages_do_not_change_hands_between_files_and_pipes() {
    let server = Server::start().with_probe();
    let mut inside = inside(&server, &["page-games"]);
    let mapping = inside.as_object_mut().unwrap().remove("writable mapping of the program").unwrap();
    assert_eq!(mapping, 13, "of a descriptor that is open to be read");
    refused_with("S12", EPERM, &inside, &outside(&["page-games"]));
    never_shown(NOT_SHOWN, "S12 writable mapping of the program");
}

#[test]
fn s13_no_descriptor_leads_to_a_cgroup() {
    const CGROUP: [&str; 2] = ["0x27e0eb", "0x63677270"];
    let on_cgroup = |told: &Value| {
        let open = told["open"].as_object().unwrap().values();
        open.filter(|what| CGROUP.contains(&what["fs"].as_str().unwrap())).count()
    };
    let server = Server::start().with_probe();
    let told = inside(&server, &["descriptors"]);
    assert_eq!((on_cgroup(&told), told["open"].as_object().unwrap().len()), (0, 3), "{told}");

    // a descriptor of one, handed on as a careless launcher would
    let cgroups = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = cgroups.lines().filter(|line| line.contains(" - cgroup")).map(|line| line.split(' ').nth(4).unwrap());
    let cgroup = mounts.into_iter().find_map(|at| fs::File::open(at).ok()).expect("a hierarchy is mounted");
    let host = Outside::new();
    let output = host.command(&["descriptors"]).stdin(cgroup).output().unwrap();
    assert_eq!(on_cgroup(&serde_json::from_slice(&output.stdout).unwrap()), 1);
}

#[test]
fn s14_no_device_can_be_made_and_none_is_there_but_the_six() {
    let server = Server::start().with_probe();
    let (made, outside) = (inside(&server, &["nodes"]), on_own_ground(&["nodes"]));
    assert_eq!(made.as_object().unwrap().len(), 6);
    for (name, answers) in made.as_object().unwrap() {
        assert_eq!(answers, &json!({"mknod": EPERM, "mknodat": EPERM, "there": false}), "{name}");
        assert_eq!(outside[name], json!({"mknod": 0, "mknodat": 0, "there": true}), "{name}");
    }
    never_shown(NOT_SHOWN, "S14 using a device");

    let devices: Vec<String> =
        fs::read_dir("/dev").unwrap().map(|entry| entry.unwrap().path().display().to_string()).collect();
    let words: Vec<&str> = ["open"].into_iter().chain(devices.iter().map(String::as_str)).collect();
    let opened = inside(&server, &words);
    assert!(devices.len() > 10);
    let known = ["null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout", "stderr", "shm"];
    for device in devices.iter().filter(|device| !known.iter().any(|name| **device == format!("/dev/{name}"))) {
        assert_eq!(opened[device], json!({"read": ENOENT, "write": ENOENT}), "{device}");
    }
    let list: BTreeSet<String> = serde_json::from_value(inside(&server, &["list", "/dev"])).unwrap();
    assert_eq!(list, known.map(str::to_owned).into());
    let rewritten = inside(&server, &["replace", "/dev/null"]);
    let expected = json!({"rename": EROFS, "link": 17, "unlink": EROFS, "create": EROFS, "chmod": EROFS});
    assert_eq!(rewritten["/dev/null"], expected);
}

/// Files from which containers learnt about their host or its kernel.
const TELLING: [&str; 40] = [
    "/proc/kallsyms",
    "/proc/interrupts",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/keys",
    "/proc/key-users",
    "/proc/locks",
    "/proc/mounts",
    "/proc/modules",
    "/proc/kcore",
    "/proc/kmsg",
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/stat",
    "/proc/uptime",
    "/proc/version",
    "/proc/vmstat",
    "/proc/slabinfo",
    "/proc/zoneinfo",
    "/proc/diskstats",
    "/proc/partitions",
    "/proc/swaps",
    "/proc/iomem",
    "/proc/ioports",
    "/proc/softirqs",
    "/proc/buddyinfo",
    "/proc/pagetypeinfo",
    "/proc/cgroups",
    "/proc/devices",
    "/proc/filesystems",
    "/proc/consoles",
    "/proc/sys/kernel/random/boot_id",
    "/proc/sys/kernel/osrelease",
    "/proc/bus/pci/devices",
    "/proc/sysvipc/shm",
    "/sys/class/powercap",
    "/sys/kernel/vmcoreinfo",
];

#[test]
fn s15_files_that_tell_of_the_host_are_absent() {
    let server = Server::start().with_probe();
    let words: Vec<&str> = ["open"].into_iter().chain(TELLING).collect();
    let inside = inside(&server, &words);
    let mut there = 0;
    for file in TELLING {
        // `mounts` is a link to the process's own, which are the published ones
        let absent = if file == "/proc/mounts" { &inside[file]["write"] } else { &inside[file]["read"] };
        assert!([json!(ENOENT), json!(EROFS)].contains(absent), "{file}: {}", inside[file]);
        there += usize::from(fs::metadata(file).is_ok());
    }
    assert!(there > 25, "most of them tell something outside: {there}");
    never_shown(NOT_SHOWN, "S15 absent files");
    let syslog = Command::new(Outside::new().command(&[]).get_program()).arg("forbidden-calls").output().unwrap();
    let outside: Value = serde_json::from_slice(&syslog.stdout).unwrap();
    assert_ne!(outside["syslog"], EPERM, "the kernel's log is there to be read outside");
}

#[test]
fn s_rows_of_this_file_that_are_not_shown_outside_are_these() {
    for (row, why) in NOT_SHOWN {
        println!("NOT SHOWN OUTSIDE, here or elsewhere: {row}: {why}");
    }
    assert_eq!(NOT_SHOWN.len(), 10);
}
