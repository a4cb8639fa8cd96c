//! What each controller costs a job, and what all of them cost together.
//!
//! First each by itself, on cgroups of the bench's own: a cgroup made, its limit written, a process attached, all taken
//! away. Then whole launches, as the server has them made: where only the controllers that every job needs are to be seen
//! against where every one is mounted and set for the tenant.

#![allow(clippy::unwrap_used)] // a measurement that cannot go on should say where
#![allow(clippy::print_stdout)] // it prints its tables

mod support;

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use holm::inside::{LAUNCHER, launcher_main};
use holm_runtime::invocation::Invocation;
use holm_sandbox::ceiling::{DeviceNumber, DeviceRule, IoLimit};
use holm_sandbox::cgroup::hierarchy::Layout;
use holm_sandbox::launcher::spawn;
use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::probe::wait_up;
use holm_sandbox::protocol::{FromLauncher, LauncherConfig, ToLauncher, VERSION};
use holm_sandbox::spec::{Kind, SandboxId, SandboxSpec};
use holm_sandbox::uids::LOCK_DIR;
use holm_sandbox::usage::Exit;
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::JobMessage;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use support::{Side, empty_program, interleave, rounds};

/// The controllers that every job has a cgroup of its own for.
const OF_JOBS: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "freezer"];

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
    if std::env::args().next().as_deref() == Some(LAUNCHER) {
        std::process::exit(launcher_main());
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
        let timed = |work: &dyn Fn()| {
            let begun = Instant::now();
            work();
            begun.elapsed()
        };
        let attach = |dir: &Path| fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
        let make = timed(&|| fs::create_dir(&dir).unwrap());
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
        let limit = timed(&|| limits.iter().for_each(|(_, file, value)| fs::write(dir.join(file), value).unwrap()));
        let attached = timed(&|| attach(&dir));
        attach(&self.base);
        let remove = timed(&|| fs::remove_dir(&dir).unwrap());
        [make, limit, attached, remove]
    }
}

// all together

fn all_together() {
    let few = Bench::start_among("few", |mounted| OF_JOBS.iter().any(|name| mounted.contains(name)), &[]);
    let mut all = Bench::start_among("all", |_| true, &["hugetlb", "net_cls", "net_prio"]);
    let set = all.set_everything("all");
    let (few, all) = (std::cell::RefCell::new(few), std::cell::RefCell::new(all));
    let times = interleave(vec![
        Side {
            name: "only cpu, cpuacct, memory, pids, freezer to be seen",
            run: Box::new(|| few.borrow_mut().run("few")),
        },
        Side { name: "every controller mounted, none set", run: Box::new(|| all.borrow_mut().run("none")) },
        Side { name: "every controller mounted and set", run: Box::new(|| all.borrow_mut().run("all")) },
    ]);
    println!("\nWhole launches of an empty native program ({} rounds, interleaved)\n", rounds());
    println!("set for the tenant: {}\n", set.join(", "));
    println!("| | p50 µs | p99 µs | jobs/s | jobs/s ÷ first |\n|---|---:|---:|---:|---:|");
    let rate = |part: &support::Times| 1.0 / part.at(0.5).as_secs_f64();
    for side in &times {
        let (p50, p99) = (side.at(0.5).as_secs_f64() * 1e6, side.at(0.99).as_secs_f64() * 1e6);
        println!("| {} | {p50:.0} | {p99:.0} | {:.0} | {:.2} |", side.name, rate(side), rate(side) / rate(&times[0]));
    }
    few.into_inner().end();
    all.into_inner().end();
}

struct Bench {
    launcher: Packets,
    child: Child,
    program: File,
    next: u64,
}

impl Bench {
    /// Starts a launcher where those hierarchies are to be seen whose controllers `keep` likes, and those in `more` as
    /// well. What is mounted and unmounted for that is so for the launcher alone.
    fn start_among(name: &str, keep: impl Fn(&[&str]) -> bool, more: &[&str]) -> Self {
        let own = File::open("/proc/self/ns/mnt").unwrap();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let v1 = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).filter(|fields| fields[2] == "cgroup");
        let v1: Vec<(&str, Vec<&str>)> = v1.map(|fields| (fields[1], fields[3].split(',').collect())).collect();
        for (at, _) in v1.iter().filter(|(_, controllers)| !keep(controllers)) {
            umount2(*at, MntFlags::MNT_DETACH).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        // on pure v2 there is nothing to be mounted
        for controller in more.iter().filter(|_| !v1.is_empty()) {
            if !v1.iter().any(|(_, mounted)| mounted.contains(controller)) {
                let at = dir.path().join(controller);
                fs::create_dir(&at).unwrap();
                // one that the kernel does not have is not set either
                let _ = mount(Some("none"), &at, Some("cgroup"), MsFlags::empty(), Some(*controller));
            }
        }
        let (launcher, child) = spawn(LAUNCHER).unwrap();
        let instance = format!("bench-{name}-{}", std::process::id()).parse().unwrap();
        let config = LauncherConfig { version: VERSION, instance, lock_dir: LOCK_DIR.into(), ahead: true };
        launcher.send(&ToLauncher::Configure(config), &[] as &[OwnedFd]).unwrap();
        wait_up(&launcher).unwrap();
        setns(own.as_fd(), CloneFlags::CLONE_NEWNS).unwrap();
        let mut program = tempfile::tempfile().unwrap();
        program.write_all(&empty_program()).unwrap();
        program.rewind().unwrap();
        Self { launcher, child, program, next: 1 }
    }

    /// Sets everything for a tenant that the launcher can enforce. Gives the names.
    fn set_everything(&mut self, tenant: &str) -> Vec<&'static str> {
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
            self.next += 1;
            let (request, tenant, asked) = (self.next, tenant.parse().unwrap(), with.clone());
            let message = ToLauncher::SetCeiling { request, tenant, ceiling: asked };
            self.launcher.send(&message, &[] as &[OwnedFd]).unwrap();
            match self.recv() {
                FromLauncher::CeilingSet { result: Ok(()), .. } => {
                    ceiling = with;
                    taken.push(name);
                }
                FromLauncher::CeilingSet { result: Err(error), .. } => println!("not set: {error}"),
                other => panic!("{other:?}"),
            }
        }
        taken
    }

    fn end(self) {
        let Self { launcher, mut child, .. } = self;
        drop(launcher);
        assert!(child.wait().unwrap().success());
    }

    fn recv(&self) -> FromLauncher {
        self.launcher.recv(|_: &FromLauncher| 0).unwrap().value
    }

    /// One sandbox from the request to its report.
    fn run(&mut self, tenant: &str) {
        self.next += 1;
        let id = SandboxId(self.next);
        let (channel, theirs) = Packets::pair().unwrap();
        let fds = [OwnedFd::from(theirs), self.program.try_clone().unwrap().into()];
        self.launcher.send(&ToLauncher::Launch { id, spec: spec(tenant) }, &fds).unwrap();
        drop(fds);
        match self.recv() {
            FromLauncher::Ready { .. } => {}
            other => panic!("{other:?}"),
        }
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let invocation = Invocation { args: vec!["bench".into()], ..Invocation::default() };
        let message = JobMessage { payload: postcard::to_stdvec(&invocation).unwrap() };
        channel.send(&message, &[null(), null(), null()]).unwrap();
        assert_eq!(self.recv(), FromLauncher::Started(id));
        match self.recv() {
            FromLauncher::Ended { report, .. } => assert_eq!(report.exit, Exit::Exited(0)),
            other => panic!("{other:?}"),
        }
    }
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

fn spec(tenant: &str) -> SandboxSpec {
    let minute = Duration::from_secs(60);
    SandboxSpec {
        tenant: tenant.parse().unwrap(),
        ceiling: Ceiling::default(),
        kind: Kind::Native,
        program: "bench".parse().unwrap(),
        limits: Limits {
            memory_bytes: 128 << 20,
            cpu_millicores: 2000,
            cpu_weight: 100,
            cpu_time: minute,
            wall_time: minute,
            pids: 64,
            scratch_bytes: 16 << 20,
            scratch_inodes: 1024,
            open_files: 256,
            stack_bytes: 1 << 20,
        },
    }
}
