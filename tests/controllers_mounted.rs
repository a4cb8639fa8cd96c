//! Controllers that are used where they are mounted: found when they are, done without or otherwise when they are not.
//!
//! What is mounted or unmounted here is so in a mount namespace that only the server of the test is in.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use support::inspect::{Running, mounts};
use support::loops::Loop;
use support::plain::Plain;
use support::{Server, native};

const MIB: u64 = 1 << 20;

/// Whether doctor says that this machine offers a controller as it is.
fn offered(name: &str) -> bool {
    let output = Command::new(env!("CARGO_BIN_EXE_holm")).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let check = report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap().clone();
    check["status"] == "ok"
}

/// Starts a server whose mount namespace is its own, and was changed by `script` before. `$D` is the test's directory.
fn start_after(script: &str) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let plain = Server::command(&dir, "");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"]);
    command.arg(plain.get_program()).args(plain.get_args()).env_clear().env("D", dir.path());
    for (name, value) in plain.get_envs() {
        command.env(name, value.unwrap());
    }
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.path().join("log")).unwrap();
    command.stdin(std::process::Stdio::null()).stderr(log);
    Server::spawn(command, dir)
}

/// Starts a server that has this controller: of the machine as it is, or else mounted for it.
fn start_with(name: &str) -> Server {
    match offered(name) {
        true => Server::start(),
        false => start_after(&format!("mkdir $D/{name}; mount -t cgroup -o {name} none $D/{name}")),
    }
}

fn with_tenant(server: &Server, limits: &Value) {
    server.tenant("t", &json!({ "limits": limits }));
    server.upload("t", "probe", &native("probe"));
}

#[track_caller]
fn said(server: &Server, words: &[&str]) -> Value {
    let record = server.probe(words, &json!({}));
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{words:?}: {record}");
    serde_json::from_str(record["output"].as_str().unwrap()).unwrap()
}

/// Huge pages of 2 MiB that the machine keeps for this test. Given back when dropped.
struct HugePages(u64);

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn reserve(more: u64) -> Self {
        let before: u64 = fs::read_to_string(HUGE_PAGES).unwrap().trim().parse().unwrap();
        fs::write(HUGE_PAGES, (before + more).to_string()).unwrap();
        let reserved = Self(before);
        let now: u64 = fs::read_to_string(HUGE_PAGES).unwrap().trim().parse().unwrap();
        assert_eq!(now, before + more, "the machine has no room for huge pages");
        reserved
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(HUGE_PAGES, self.0.to_string()).unwrap();
    }
}

#[test]
fn huge_pages_are_had_up_to_the_limit_and_none_without_one() {
    let _pages = HugePages::reserve(8);
    let server = start_with("hugetlb");
    with_tenant(&server, &json!({"hugetlb": {"2MB": 4 * MIB}}));
    let map = |mib: u64| said(&server, &["huge-map", &(mib * MIB).to_string()]);
    assert_eq!(map(4), json!({"bytes": 4 * MIB}));
    assert_eq!(map(6), json!({"errno": libc::ENOMEM}));
    server.patch_json("/v1/tenants/t", &json!({"limits": {"hugetlb": {"2MB": 6 * MIB}}})).expect(200);
    assert_eq!(map(6), json!({"bytes": 6 * MIB}));
    server.patch_json("/v1/tenants/t", &json!({"limits": {"hugetlb": null}})).expect(200);
    assert_eq!(map(2), json!({"errno": libc::ENOMEM}));
    let unknown = server.patch_json("/v1/tenants/t", &json!({"limits": {"hugetlb": {"64KB": 65536}}}));
    assert_eq!(unknown.problem(422), "limit_out_of_range");
    let unknown = unknown.json();
    assert!(unknown["given"] == "64KB" && unknown["possible"].as_str().unwrap().contains("2MB"), "{unknown}");
    server.assert_healthy();
}

/// The directory of a job's cgroup in the hierarchy of v2.
fn v2_dir(job: &Running) -> PathBuf {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let v2 = mounts(text.lines()).into_iter().find(|mount| mount.kind == "cgroup2").expect("a v2 hierarchy is mounted");
    let path = job.record["isolation"]["cgroups"]["unified"].as_str().unwrap();
    Path::new(&v2.at).join(path.trim_start_matches('/'))
}

/// What comes with a packet of a process of the host's that is put into this cgroup.
fn packet_from(cgroup: &Path) -> Value {
    let plain = Plain::start(0, &["packet"]);
    fs::write(cgroup.join("cgroup.procs"), plain.pid().to_string()).unwrap();
    serde_json::from_str(&plain.finish()).unwrap()
}

#[test]
fn packets_carry_class_and_priority_by_programs_where_nothing_is_mounted() {
    let server = Server::start();
    with_tenant(&server, &json!({"net_class": 0x0010_0001, "net_priority": 5}));
    let outside: Value = serde_json::from_str(&support::plain::outside(&["packet"])).unwrap();
    assert_eq!(outside, json!({"mark": 0, "priority": 0}));
    let job = Running::start(&server, "t", "probe", &json!(["report-and-wait"]), &json!({}));
    let dir = v2_dir(&job);
    assert_eq!(packet_from(&dir), json!({"mark": 0x0010_0001, "priority": 5}));
    // at once when they change, and gone when they are taken away
    let set = |limits: Value| server.patch_json("/v1/tenants/t", &json!({ "limits": limits })).expect(200);
    set(json!({"net_class": u32::MAX, "net_priority": null}));
    assert_eq!(packet_from(&dir), json!({"mark": u32::MAX, "priority": 0}));
    set(json!({"net_class": null}));
    assert_eq!(packet_from(&dir), json!({"mark": 0, "priority": 0}));
    job.finish().expect(200);
    server.assert_healthy();
}

#[test]
fn net_cls_and_net_prio_are_used_where_they_are_mounted() {
    if mounts(fs::read_to_string("/proc/self/mountinfo").unwrap().lines()).iter().all(|mount| mount.kind != "cgroup") {
        println!("NOT SHOWN: net_cls and net_prio are controllers of v1, and this machine has none of v1");
        return;
    }
    let mount = |name: &str| format!("mkdir $D/{name}; mount -t cgroup -o {name} none $D/{name}\n");
    let server = start_after(&(mount("net_cls") + &mount("net_prio")));
    with_tenant(&server, &json!({"net_class": 0x0010_0001, "net_priority": 5}));
    let job = Running::start(&server, "t", "probe", &json!(["report-and-wait"]), &json!({}));
    let of_tenant = |name: &str| {
        let path = job.record["isolation"]["cgroups"][name].as_str().unwrap();
        assert!(path.ends_with("/t"), "a job is in its tenant's cgroup: {path}");
        let mounted = PathBuf::from(format!("/proc/{}/root{}", server.pid(), server.dir.path().join(name).display()));
        mounted.join(path.trim_start_matches('/'))
    };
    let class = || fs::read_to_string(of_tenant("net_cls").join("net_cls.classid")).unwrap().trim().to_owned();
    assert_eq!(class(), 0x0010_0001.to_string());
    println!("NOT SHOWN: net_cls: that a packet carries the class is seen by nftables or a cgroup filter of tc alone");
    // v1 sets the priority by interface, and leaves marks alone
    assert_eq!(packet_from(&of_tenant("net_prio")), json!({"mark": 0, "priority": 5}));
    server.patch_json("/v1/tenants/t", &json!({"limits": {"net_class": 7, "net_priority": 3}})).expect(200);
    assert_eq!(class(), "7");
    assert_eq!(packet_from(&of_tenant("net_prio")), json!({"mark": 0, "priority": 3}));
    job.finish().expect(200);
    server.assert_healthy();
}

/// Where a controller of v1 is mounted on this machine.
fn mounted(name: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let has = |mount: &support::inspect::Mount| mount.kind == "cgroup" && mount.fs_options.iter().any(|o| o == name);
    mounts(text.lines()).into_iter().find(has).map(|mount| mount.at)
}

#[test]
fn what_is_not_mounted_is_done_by_a_program_or_refused_with_a_way_out() {
    let (Some(devices), Some(blkio), Some(cpuset)) = (mounted("devices"), mounted("blkio"), mounted("cpuset")) else {
        println!("NOT SHOWN: this machine has no controllers on v1 that could be unmounted: its v2 is tested as it is");
        return;
    };
    let server = start_after(&format!("umount {devices} {blkio} {cpuset}"));
    let (device, other) = (Loop::new(MIB), Loop::new(MIB));
    let rule = |device: &Loop, access: &str| json!({"type": "block", "device": device.number, "access": access});
    with_tenant(&server, &json!({"devices": [rule(&device, "rw"), rule(&other, "r")]}));
    let path = format!("/dev/{}", device.name());
    let opens = |limits: &Value| {
        let wait = json!(["after-input", "node", &path, "r", "w", "rw"]);
        let job = Running::start(&server, "t", "probe", &wait, &json!({}));
        server.patch_json("/v1/tenants/t", &json!({ "limits": limits })).expect(200);
        let record = job.finish().expect(200).json();
        serde_json::from_str::<Value>(record["output"].as_str().unwrap()).unwrap()["errnos"].clone()
    };
    let denied = libc::EPERM;
    assert_eq!(opens(&json!({})), json!([0, 0, 0]));
    assert_eq!(opens(&json!({"devices": [rule(&device, "r")]})), json!([0, denied, denied]));
    server.patch_json("/v1/tenants/t", &json!({"limits": {"devices": [rule(&device, "rw")]}})).expect(200);
    assert_eq!(opens(&json!({"devices": null})), json!([denied, denied, denied]));
    let six = said(&server, &["open", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"]);
    assert!(six.as_object().unwrap().values().all(|way| *way == json!({"read": 0, "write": 0})), "{six}");
    for (field, value, name) in [
        ("io", json!([{"device": device.number, "read_bps": 1}]), "blkio"),
        ("io_weight", json!(50), "blkio"),
        ("cpuset", json!("0"), "cpuset"),
    ] {
        let answer = server.patch_json("/v1/tenants/t", &json!({"limits": {field: &value}}));
        assert_eq!(answer.problem(422), "not_available", "{field}");
        let problem = answer.json();
        assert_eq!((&problem["field"], &problem["given"]), (&json!(format!("limits.{field}")), &value), "{problem}");
        assert!(problem["possible"].as_str().unwrap().contains("to leave it out"), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(&format!("mount -t cgroup -o {name}")), "{problem}");
    }
    server.assert_healthy();
}

#[test]
fn a_weight_for_block_devices_needs_a_scheduler_that_weighs() {
    let device = Loop::new(MIB);
    let scheduler = format!("/sys/block/{}/queue/scheduler", device.name());
    let server = Server::start();
    with_tenant(&server, &json!({}));
    let set = |weight: Value| server.patch_json("/v1/tenants/t", &json!({"limits": {"io_weight": weight}}));
    if fs::write(&scheduler, "bfq").is_err() {
        println!("NOT SHOWN: this kernel has no BFQ");
        return;
    }
    assert_eq!(set(json!(500)).expect(200).json()["limits"]["io_weight"], 500);
    fs::write(&scheduler, "none").unwrap();
    println!(
        "NOT SHOWN: io_weight: a loop device answers from memory, so no queue forms in which a weight would count"
    );
    server.assert_healthy();
}
