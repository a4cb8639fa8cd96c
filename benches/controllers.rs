//! What each controller costs a job, and what all of them cost together.
//!
//! First each by itself, on cgroups of the bench's own: a cgroup made, its limit written, a process attached, all taken
//! away. Then whole launches, as the server has them made: where only the controllers that every job needs are to be seen
//! against where every one is mounted and set for the tenant.

#![allow(clippy::unwrap_used)] // a measurement that cannot go on should say where
#![allow(clippy::print_stdout, clippy::print_stderr)] // it prints its tables, and what could not be set

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use holm_sandbox::ceiling::{DeviceNumber, DeviceRule, IoLimit};
use holm_sandbox::cgroup::hierarchy::Layout;
use holm_sandbox::limits::Ceiling;
use holm_sandbox::spec::Kind;
use support::launches::{Launches, file};
use support::obedient::{Obedient, obey};
use support::programs::empty_program;
use support::times::{interleave, print_table, rounds, timed};

/// What is written for each controller to limit a job, where something is.
const LIMITS: [(&str, &str, &str); 12] = [
    ("cpu", "cpu.cfs_quota_us", "50000"),
    ("cpu", "cpu.max", "50000 100000"),
    ("cpuset", "cpuset.cpus", "0"),
    ("memory", "memory.limit_in_bytes", "67108864"),
    ("memory", "memory.max", "67108864"),
    ("pids", "pids.max", "64"),
    ("freezer", "freezer.state", "THAWED"),
    ("devices", "devices.deny", "c 1:9 r"),
    ("hugetlb", "hugetlb.2MB.limit_in_bytes", "0"),
    ("hugetlb", "hugetlb.2MB.max", "0"),
    ("net_cls", "net_cls.classid", "1048577"),
    ("io", "io.weight", "50"),
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, side, name] = &args[..]
        && side == SIDE
    {
        return serve(name);
    }
    each_by_itself();
    all_together();
}

// each by itself

/// A controller as it is found, and the cgroup in which the bench makes its own.
struct Controller {
    name: String,
    base: PathBuf,
}

/// How long each step took, round by round.
#[derive(Default)]
struct Steps([Vec<Duration>; 4]);

fn each_by_itself() {
    let text = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).unwrap();
    let layout = Layout::discover(&text("mountinfo"), &text("cgroup")).unwrap();
    let hierarchies = layout.v1.iter().chain(&layout.v2);
    let controllers: Vec<Controller> = hierarchies
        .map(|hierarchy| Controller {
            name: match hierarchy.controllers.iter().cloned().collect::<Vec<_>>().join(",") {
                none if none.is_empty() => "v2".into(),
                names => names,
            },
            base: hierarchy.own_dir.clone(),
        })
        .filter(|controller| fs::create_dir(controller.base.join("holm-bench-try")).is_ok())
        .inspect(|controller| fs::remove_dir(controller.base.join("holm-bench-try")).unwrap())
        .collect();
    let mut sleeper = Command::new("sleep").arg("600").spawn().unwrap();
    let mut steps: Vec<Steps> = controllers.iter().map(|_| Steps::default()).collect();
    for round in 0..rounds() + 5 {
        for (controller, steps) in controllers.iter().zip(&mut steps) {
            let times = controller.cycle(sleeper.id());
            // the first rounds fault pages in
            if round >= 5 {
                steps.0.iter_mut().zip(times).for_each(|(step, time)| step.push(time));
            }
        }
    }
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    println!("\nEach controller by itself, p50 in µs ({} rounds, interleaved)\n", rounds());
    println!("| | make a cgroup | write its limit | attach a process | remove it |\n|---|---:|---:|---:|---:|");
    for (controller, steps) in controllers.iter().zip(&mut steps) {
        let p50 = |step: &mut Vec<Duration>| {
            step.sort_unstable();
            step[step.len() / 2].as_secs_f64() * 1e6
        };
        let [make, limit, attach, remove] = &mut steps.0;
        let (make, limit, attach, remove) = (p50(make), p50(limit), p50(attach), p50(remove));
        println!("| {} | {make:.1} | {limit:.1} | {attach:.1} | {remove:.1} |", controller.name);
    }
}

impl Controller {
    fn cycle(&self, pid: u32) -> [Duration; 4] {
        let dir = self.base.join(format!("holm-bench-{}", std::process::id()));
        let attach = |dir: &Path| fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
        let make = timed(|| fs::create_dir(&dir).unwrap());
        if dir.join("cpuset.effective_cpus").exists() {
            // nothing can be attached without any
            for file in ["cpuset.mems", "cpuset.cpus"] {
                fs::write(dir.join(file), fs::read_to_string(self.base.join(file)).unwrap().trim_end()).unwrap();
            }
        }
        let of_these = |(name, file, _): &&(&str, &str, &str)| {
            (self.name.split(',').any(|own| own == *name) || self.name == "v2") && dir.join(file).exists()
        };
        let limits: Vec<_> = LIMITS.iter().filter(of_these).collect();
        let limit = timed(|| limits.iter().for_each(|(_, file, value)| fs::write(dir.join(file), value).unwrap()));
        let attached = timed(|| attach(&dir));
        attach(&self.base);
        let remove = timed(|| fs::remove_dir(&dir).unwrap());
        [make, limit, attached, remove]
    }
}

// all together

/// The first argument of a process of this program that launches what it is told to.
const SIDE: &str = "side";

/// Leaves only those hierarchies of v1 in sight that every job needs.
const FEWER: &str = r#"sed -n 's/^[^ ]* \([^ ]*\) cgroup .*/\1/p' /proc/mounts | while read -r at; do
    case ${at##*/} in *cpu | *cpuacct | cpu,cpuacct | memory | pids | freezer) ;; *) umount "$at" ;; esac
done
exec "$@""#;

/// Mounts those of v1 that are not mounted as often as not. On pure v2 there is nothing to be mounted.
const MORE: &str = r#"grep -q ' cgroup ' /proc/mounts && for name in hugetlb net_cls net_prio; do
    grep -q " cgroup .*[, ]$name[, ]" /proc/mounts || { mkdir -p "$D/$name" && mount -t cgroup -o "$name" none "$D/$name"; }
done
exec "$@""#;

fn all_together() {
    let dir = tempfile::tempdir().unwrap();
    let mut few = launching("few", FEWER, dir.path());
    let mut all = launching("all", MORE, dir.path());
    let set = all.ask("set all");
    let names = [
        "only cpu, cpuacct, memory, pids, freezer to be seen",
        "every controller mounted, none set",
        "every controller mounted and set",
    ];
    let times = interleave(names, rounds(), || {
        let one = [few.ask("run few"), all.ask("run none"), all.ask("run all")];
        one.map(|ns| Duration::from_nanos(ns.parse().unwrap()))
    });
    print_table("Whole launches of an empty native program", &times);
    println!("\nSet for the tenant: {set}.");
}

/// A process that launches, with hierarchies of its own to be seen: in a mount namespace in which `script` has been run.
fn launching(name: &str, script: &str, dir: &Path) -> Obedient {
    let own = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(own).args([SIDE, name]);
    Obedient::start(command.env("D", dir))
}

/// What such a process does: sets everything for a tenant, or launches for one and tells how long that took.
fn serve(name: &str) {
    let mut launches = Launches::start(name);
    let program = file(&empty_program());
    obey(|order| match order.split_once(' ').unwrap() {
        ("set", tenant) => set_everything(&mut launches, tenant).join(", "),
        (_, tenant) => launches.run(tenant, Kind::Native, &program, None).cycle.as_nanos().to_string(),
    });
    launches.end();
}

/// Sets everything for a tenant that the launcher can enforce. Gives the names.
fn set_everything(launches: &mut Launches, tenant: &str) -> Vec<&'static str> {
    type Set = fn(&mut Ceiling);
    let mut ceiling = Ceiling::default();
    let settings: [(&str, Set); 9] = [
        ("memory_bytes", |c| c.memory_bytes = Some(1 << 30)),
        ("cpu_cores, cpu_weight", |c| (c.cpu_millicores, c.cpu_weight) = (Some(64_000), Some(200))),
        ("pids", |c| c.pids = Some(1000)),
        ("cpuset", |c| c.cpuset = all_cpus().parse().ok()),
        ("io", |c| c.io = disk().into_iter().map(io_limit).collect()),
        ("io_weight", |c| c.io_weight = Some(200)),
        ("devices", |c| c.devices = vec![rule()]),
        ("hugetlb", |c| c.hugetlb = [("2MB".to_owned(), 2 << 20)].into()),
        ("net_class, net_priority", |c| (c.net_class, c.net_priority) = (Some(1_048_577), Some(5))),
    ];
    let mut taken = Vec::new();
    for (name, set) in settings {
        let mut with = ceiling.clone();
        set(&mut with);
        match launches.set_ceiling(tenant, with.clone()) {
            Ok(()) => {
                ceiling = with;
                taken.push(name);
            }
            Err(error) => eprintln!("not set: {error}"),
        }
    }
    taken
}

fn all_cpus() -> String {
    fs::read_to_string("/sys/devices/system/cpu/online").unwrap().trim_end().to_owned()
}

/// A whole disk, if there is one.
fn disk() -> Option<DeviceNumber> {
    let disks = fs::read_dir("/sys/block").ok()?.flatten().filter(|disk| disk.path().join("device").exists());
    disks.into_iter().find_map(|disk| fs::read_to_string(disk.path().join("dev")).ok()?.trim_end().parse().ok())
}

fn io_limit(device: DeviceNumber) -> IoLimit {
    IoLimit { device, read_bps: Some(1 << 40), write_bps: Some(1 << 40), read_iops: None, write_iops: None }
}

/// The kernel's log, which an empty program does not read.
fn rule() -> DeviceRule {
    DeviceRule { block: false, device: DeviceNumber { major: 1, minor: 11 }, read: true, write: false }
}
