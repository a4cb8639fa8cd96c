//! Escapes through the code that sets a sandbox up, hands it its streams, collects its output and cleans up after it:
//! the rows E1–E12. Each is seen to work on a set-up that is careless, made by the test, and to fail on Holm's.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where
#![allow(clippy::print_stdout)] // what was not shown outside is told

mod support;

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::attack::{NotShown, Outside, inside, inside_with, never_shown, outside};
use support::inspect::{Process, Running};
use support::slowness::at_most;
use support::{OPERATOR, Server, native, wait_until};

const ENOENT: i64 = 2;
const EPERM: i64 = 1;
const EACCES: i64 = 13;
const EROFS: i64 = 30;
const EAFNOSUPPORT: i64 = 97;

const NOT_SHOWN: NotShown = &[
    (
        "E7",
        "a race of the host's mkdir needs a host that resolves the tenant's paths; the walk that it abuses is shown",
    ),
    ("E10 metadata", "this machine's network has none that a test may call; a listener on loopback stands for it"),
];

#[test]
fn e1_no_program_of_the_host_can_be_written_over_through_proc() {
    let host = Outside::new();
    let program = host.path("launcher");
    fs::write(&program, native("probe")).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut victim = std::process::Command::new(&program);
    victim.args(["sleep", "20000"]);
    // another test's fork may hold the file open to write for a moment
    let mut victim = wait_until("the victim starts", || victim.spawn().ok());
    let told = host.run(&["overwrite-program", &victim.id().to_string()]);
    victim.wait().unwrap();
    assert_eq!(told, json!({"read": 0, "write": 26, "write after its end": 0}));
    assert!(fs::read(&program).unwrap().starts_with(b"overwritten"));

    let server = Server::start().with_probe();
    let before = fs::read(env!("CARGO_BIN_EXE_holm")).unwrap();
    let none = json!({"read": ENOENT, "write": ENOENT, "write after its end": ENOENT});
    for pid in ["1", &server.launcher().0.to_string(), &server.pid().to_string()] {
        assert_eq!(inside(&server, &["overwrite-program", pid]), none, "{pid}");
    }
    // its own, which is a copy that nobody else has
    let own = inside(&server, &["overwrite-program", "self"]);
    assert_eq!((&own["write"], &own["write after its end"]), (&json!(EACCES), &json!(EACCES)), "{own}");
    assert!(fs::read(env!("CARGO_BIN_EXE_holm")).unwrap() == before);
    server.assert_healthy();
}

#[test]
fn e2_no_descriptor_and_no_directory_of_the_host_is_left_open() {
    let host = Outside::new();
    fs::create_dir(host.path("root")).unwrap();
    fs::write(host.path("secret"), "secret").unwrap();
    let leaky = host.run(&["leak", &host.path(""), "descriptors"]);
    let ways: Vec<&str> = leaky["ways out"].as_array().unwrap().iter().map(|way| way.as_str().unwrap()).collect();
    assert!(ways.contains(&"9 secret") && ways.contains(&"cwd secret"), "{ways:?}");
    assert!(ways.contains(&"cwd ../../../../../../../etc/passwd"), "{ways:?}");

    let server = Server::start().with_probe();
    let told = inside(&server, &["descriptors"]);
    let pipe = json!({"kind": "10000", "fs": "0x50495045"});
    assert_eq!(told["open"], json!({"0": pipe, "1": pipe, "2": pipe}));
    assert_eq!(told["ways out"], json!([]));
    assert_eq!(told["parent is root"], true, "{told}");
}

#[test]
fn e3_neither_the_init_nor_its_memory_can_be_held() {
    let victim = outside(&["attach", "0"]);
    let server = Server::start().with_probe();
    let init = inside(&server, &["attach", "1"]);
    for way in ["attach", "seize", "process_vm_readv", "pidfd_getfd", "kcmp"] {
        assert_eq!((&victim[way], &init[way]), (&json!(0), &json!(EPERM)), "{way}");
    }
    for way in ["mem to read", "mem to write", "environ"] {
        assert_eq!((&victim[way], &init[way]), (&json!(0), &json!(ENOENT)), "{way}: hidden");
    }
}

#[test]
fn e4_links_in_a_job_s_tree_lead_no_mount_astray() {
    // a mount by path follows the link
    let host = Outside::new();
    fs::create_dir_all(host.path("tree")).unwrap();
    fs::create_dir_all(host.path("elsewhere")).unwrap();
    symlink(host.path("elsewhere"), host.path("tree/proc")).unwrap();
    assert_eq!(fs::canonicalize(host.path("tree/proc")).unwrap(), fs::canonicalize(host.path("elsewhere")).unwrap());

    let server = Server::start().with_probe();
    let launcher = server.launcher();
    let mounts = launcher.mounts();
    for target in ["/", "/proc", "../../../../new"] {
        let record = server.probe(&["plant-links", "/tmp", target], &json!({}));
        assert_eq!(record["outcome"]["exit_code"], 0, "{record}");
    }
    let running =
        Running::start(&server, "t", "probe", &json!(["after-input", "plant-links", "/tmp", "/"]), &json!({}));
    let other = Running::start(&server, "t", "probe", &json!(["after-input", "exit", "0"]), &json!({}));
    for job in [&running, &other] {
        let seen: Vec<String> = job.processes(&server)[0].mounts().into_iter().map(|mount| mount.at).collect();
        assert_eq!(seen, ["/", "/dev", "/proc", "/tmp"]);
    }
    for job in [running, other] {
        job.finish().expect(200);
    }
    assert_eq!(launcher.mounts(), mounts);
}

#[test]
fn e5_what_is_found_at_dev_and_proc_is_what_its_name_says() {
    let server = Server::start().with_probe();
    let (tmpfs, proc) = (json!("0x1021994"), json!("0x9fa0"));
    let ground = inside(&server, &["ground"]);
    for path in ["/", "/bin", "/dev", "/dev/null", "/tmp"] {
        assert_eq!(ground[path], tmpfs, "{path}");
    }
    for path in ["/proc", "/proc/self/status"] {
        assert_eq!(ground[path], proc, "{path}");
    }
    let devices =
        json!({"null": [1, 3], "zero": [1, 5], "full": [1, 7], "random": [1, 8], "urandom": [1, 9], "tty": [5, 0]});
    assert_eq!(ground["devices"], devices);

    // and it stays so: outside a node's place can be taken
    let host = Outside::new();
    fs::write(host.path("null"), "").unwrap();
    let taken = json!({"rename": 0, "link": 0, "unlink": 0, "create": 0, "chmod": 0});
    assert_eq!(host.run(&["replace", &host.path("null")])[host.path("null")], taken);
    let refused = json!({"rename": EROFS, "link": 17, "unlink": EROFS, "create": EROFS, "chmod": EROFS});
    let paths = ["/dev/null", "/dev/stdout", "/dev/shm", "/bin/probe"];
    let told = inside(&server, &[&["replace"], &paths[..]].concat());
    for path in paths.into_iter().filter(|path| *path != "/dev/stdout" && *path != "/dev/shm") {
        assert_eq!(told[path], refused, "{path}");
    }
    for path in ["/dev/stdout", "/dev/shm"] {
        assert_eq!((&told[path]["rename"], &told[path]["unlink"]), (&json!(EROFS), &json!(EROFS)), "{path}");
    }
}

#[test]
fn e6_proc_is_the_kernel_s_and_what_protects_is_read_back_from_it() {
    // a directory of the attacker's takes every write, and nothing comes of it
    let host = Outside::new();
    fs::create_dir_all(host.path("proc/sys/user")).unwrap();
    fs::write(host.path("proc/sys/user/max_user_namespaces"), "0").unwrap();
    assert_ne!(fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap().trim(), "0");

    let server = Server::start().with_probe();
    let running = Running::start(&server, "t", "probe", &json!(["after-input", "exit", "0"]), &json!({}));
    for process in running.processes(&server) {
        let status = process.status();
        assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"], &*status["CapEff"]), ("1", "2", "0000000000000000"));
    }
    running.finish().expect(200);
    // the write of set-up took effect in the kernel: not even a sandbox without the filter could make one
    assert_eq!(inside(&server, &["ground"])["/proc/self/attr/current"], "0x9fa0");
}

#[test]
fn e7_no_path_is_made_on_the_host() {
    // what makes a directory by a tenant's path makes it where the tenant's link leads
    let host = Outside::new();
    fs::create_dir_all(host.path("tree")).unwrap();
    fs::create_dir_all(host.path("outside")).unwrap();
    symlink(host.path("outside"), host.path("tree/a")).unwrap();
    fs::create_dir_all(host.path("tree/a/made")).unwrap();
    assert!(fs::metadata(host.path("outside/made")).is_ok());
    never_shown(NOT_SHOWN, "E7");

    let server = Server::start().with_probe();
    let root = format!("/proc/{}/root", server.launcher().0);
    let names = |dir: &str| {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = (names(&root), names(&format!("{root}/new")));
    assert_eq!(before, (vec!["new".into(), "proc".into()], vec![]));
    for target in ["/new", "/proc/1/root", "/../../new"] {
        server.probe(&["plant-links", "/tmp", target], &json!({}));
        server.probe(&["disguise-output", "/tmp", target], &json!({}));
    }
    assert_eq!((names(&root), names(&format!("{root}/new"))), before);
    server.assert_healthy();
}

#[test]
fn e8_output_comes_through_pipes_and_nothing_in_a_job_s_tree_is_followed() {
    let host = Outside::new();
    fs::write(host.path("secret"), "the host's secret").unwrap();
    fs::create_dir(host.path("job")).unwrap();
    let made = host.command(&["disguise-output", &host.path("job"), &host.path("secret")]).output().unwrap();
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(made["links"], json!([0, 0, 0, 0]));
    assert_eq!((&made["fifo"], &made["device"], &made["hard link"]), (&json!(0), &json!(0), &json!(0)));
    let collected = fs::read_to_string(host.path("job/output")).unwrap();
    assert_eq!(collected, "the host's secret", "a collector that follows gives the secret away");

    let server = Server::start().with_probe();
    let started = Instant::now();
    let record = server.probe(&["disguise-output", "/tmp", &host.path("secret")], &json!({}));
    assert!(started.elapsed() < at_most(Duration::from_secs(3)), "{:?}", started.elapsed());
    let output = record["output"].as_str().unwrap();
    let made: Value = serde_json::from_str(output).unwrap();
    assert_eq!((&made["links"], &made["hard link"]), (&json!([0, 0, 0, 0]), &json!(ENOENT)), "{made}");
    assert_eq!((&made["fifo"], &made["device"]), (&json!(EPERM), &json!(EPERM)));
    assert!(!output.contains("this went to a file"), "what it wrote elsewhere is not output");
    assert!(!record.to_string().contains("the host's secret"));
    server.assert_healthy();
}

#[test]
fn e9_a_tree_that_no_path_reaches_is_gone_with_its_mount() {
    let most = "24000";
    let tree = Outside::new().run_on_own_ground(&["deep-and-wide", most]);
    assert_eq!(tree, json!({"depth": 12_000, "width": 12_000, "remove by path": 36}), "ENAMETOOLONG to a walk by path");

    let server = Server::start().with_probe();
    let limits = json!({"scratch_inodes": 65_536, "memory_bytes": 512 << 20, "scratch_bytes": 256 << 20, "wall_time_ms": 60_000});
    let tree = inside_with(&server, &["deep-and-wide", most], &limits);
    assert_eq!(tree, json!({"depth": 12_000, "width": 12_000, "remove by path": 36}));
    // to the limit of inodes: all of it is gone soon after its last process
    let started = Instant::now();
    let record = server.probe(&["deep-and-wide", "200000"], &limits);
    let took = started.elapsed();
    let told: Value = serde_json::from_str(record["output"].as_str().unwrap()).unwrap();
    assert_eq!(
        told,
        json!({"depth": 12_000, "width": 65_536 - 12_000 - 1, "remove by path": 36}),
        "the link is one too"
    );
    let after = took - Duration::from_micros(record["usage"]["wall_us"].as_u64().unwrap());
    assert!(after < at_most(Duration::from_secs(3)), "{after:?}");
    assert!(server.sandboxed().is_empty());
    server.assert_healthy();
}

#[test]
fn e10_nothing_that_listens_on_the_host_can_be_reached() {
    let host = Outside::new();
    let server = Server::start().with_probe();
    let name = format!("holm-test-{}", std::process::id());
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let _by_path = UnixListener::bind(host.path("socket")).unwrap();
    let (address, name, path) = (server.address(), format!("@{name}"), host.path("socket"));
    let reached = host.run(&["connect", &address, &name, &path]);
    assert_eq!(reached, json!({&*address: 0, &*name: 0, &*path: 0}));

    let mut words = vec!["connect", &*address, &*name, &*path];
    words.extend(["169.254.169.254:80", "10.0.0.1:5432", "[::1]:8080", "127.0.0.1:22"]);
    let told = inside(&server, &words);
    for (target, errno) in told.as_object().unwrap() {
        let expected = match target.as_bytes()[0] {
            b'@' => 111, // ECONNREFUSED: its network namespace has no such name
            b'/' => ENOENT,
            _ => EAFNOSUPPORT,
        };
        assert_eq!(errno, &json!(expected), "{target}");
    }
    never_shown(NOT_SHOWN, "E10 metadata");
    // nor would there be a way: no route, no address, no neighbour
    let running = Running::start(&server, "t", "probe", &json!(["after-input", "exit", "0"]), &json!({}));
    for process in running.processes(&server) {
        assert_eq!(process.read("net/route"), "");
        assert_eq!((process.read("net/fib_trie"), process.read("net/if_inet6")), (String::new(), String::new()));
        assert_eq!(process.read("net/unix").lines().count(), 1);
    }
    running.finish().expect(200);
    assert!(Process::own().read("net/unix").lines().count() > 2);
}

#[test]
fn e11_no_privilege_comes_back_by_files_or_calls() {
    let host = Outside::new().run_on_own_ground(&["regain-privilege"]);
    for way in ["copy", "mark", "attribute", "exit code of the marked", "setuid", "setgroups"] {
        assert_eq!(host[way], 0, "{way} outside");
    }
    let server = Server::start().with_probe();
    let told = inside(&server, &["regain-privilege"]);
    let expected = json!({
        "copy": 0,
        "mark": 0,
        "attribute": EPERM,
        "exit code of the marked": 200 + EACCES,
        "capset": EPERM,
        "ambient": EPERM,
        "setuid": EPERM,
        "setgroups": EPERM,
    });
    assert_eq!(told, expected);
}

#[test]
fn e12_nothing_of_the_hosts_environment_is_in_a_job_and_it_leaves_no_core() {
    let reversed: String = OPERATOR.chars().rev().collect();
    let host = Outside::new();
    let leaky = host.command(&["search-memory", &reversed]).env("SECRET", OPERATOR).output().unwrap();
    let found: Value = serde_json::from_slice(&leaky.stdout).unwrap();
    assert!(found["memory"].as_array().unwrap().contains(&json!("[stack]")), "{found}");
    assert!(found["files"].as_array().unwrap().contains(&json!("environ")), "{found}");

    let server = Server::start().with_probe(); // has the key in its environment
    assert!(server.process().read("environ").contains(OPERATOR));
    let told = inside(&server, &["search-memory", &reversed]);
    assert_eq!(told, json!({"memory": [], "files": []}));

    assert_eq!(host.run_on_own_ground(&["leave-core"]), json!({"raise the limit": 0, "cores": 1}));
    assert_eq!(inside(&server, &["leave-core"]), json!({"raise the limit": EPERM, "cores": 0}));
    let keys = inside(&server, &["keys"]);
    assert_eq!(keys["search"], EPERM, "the keyring of whoever started the server");
}

#[test]
fn e_rows_that_are_not_shown_outside_are_these() {
    for (row, why) in NOT_SHOWN {
        println!("NOT SHOWN OUTSIDE, here or elsewhere: {row}: {why}");
    }
    assert_eq!(NOT_SHOWN.len(), 2);
}
