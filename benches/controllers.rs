//! What each controller costs a job, and what all of them cost together.
//!
//! First each by itself, on cgroups of the bench's own: a cgroup made, its limit written, a process attached, all taken
//! away. Then whole launches, as the server has them made: where only the controllers that every job needs are to be seen
//! against where every one is mounted and set for the tenant.

#![allow(clippy::unwrap_used)] // a measurement that cannot go on should say where
#![allow(clippy::print_stdout, clippy::print_stderr)] // it prints its tables, and what could not be set

mod support;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use holm::inside::{LAUNCHER, launcher_main};
use holm_runtime::invocation::Invocation;
use holm_sandbox::ceiling::{DeviceNumber, DeviceRule, IoLimit};
use holm_sandbox::cgroup::hierarchy::Layout;
use holm_sandbox::launcher::spawn;
use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::probe::wait_up;
use holm_sandbox::protocol::{FromLauncher, LauncherConfig, ToLauncher, VERSION};
use holm_sandbox::spec::{ArtifactId, Kind, SandboxId, SandboxSpec};
use holm_sandbox::uids::LOCK_DIR;
use holm_sandbox::usage::Exit;
use holm_sandbox::wire::Packets;
use holm_sandbox::workload::JobMessage;
use support::{empty_program, rounds};

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
    if args[0] == LAUNCHER {
        std::process::exit(launcher_main());
    }
    if let [_, side, name] = &args[..]
        && side == SIDE
    {
        return Bench::start(name).serve();
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
    let mut few = Launches::start("few", FEWER, dir.path());
    let mut all = Launches::start("all", MORE, dir.path());
    let set = all.ask("set all");
    let mut times = [const { Vec::new() }; 3];
    for round in 0..rounds() + 5 {
        let one = [few.ask("run few"), all.ask("run none"), all.ask("run all")];
        // the first rounds fault pages in and make directories
        if round >= 5 {
            times.iter_mut().zip(one).for_each(|(times, ns)| times.push(Duration::from_nanos(ns.parse().unwrap())));
        }
    }
    println!("\nWhole launches of an empty native program ({} rounds, interleaved)\n", rounds());
    println!("Set for the tenant: {set}.\n");
    println!("| | p50 µs | p99 µs | jobs/s | jobs/s ÷ first |\n|---|---:|---:|---:|---:|");
    let names = [
        "only cpu, cpuacct, memory, pids, freezer to be seen",
        "every controller mounted, none set",
        "every controller mounted and set",
    ];
    times.iter_mut().for_each(|times| times.sort_unstable());
    let p50 = |times: &Vec<Duration>| times[times.len() / 2].as_secs_f64();
    let first = p50(&times[0]);
    for (name, times) in names.iter().zip(&times) {
        let (middle, worst) = (p50(times), times[times.len() * 99 / 100].as_secs_f64() * 1e6);
        println!("| {name} | {:.0} | {worst:.0} | {:.0} | {:.2} |", middle * 1e6, 1.0 / middle, first / middle);
    }
}

/// A process that launches, with hierarchies of its own to be seen.
struct Launches {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Launches {
    /// Starts one in a mount namespace in which `script` has been run.
    fn start(name: &str, script: &str, dir: &Path) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(own).args([SIDE, name]);
        let mut child =
            command.env("D", dir).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start `unshare`");
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, orders, answers }
    }

    fn ask(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

impl Drop for Launches {
    fn drop(&mut self) {
        // the end of its orders; what has gone wrong there has been told there
        let _ = writeln!(self.orders, "end");
        let _ = self.child.wait();
    }
}

struct Bench {
    launcher: Packets,
    child: Child,
    program: File,
    next: u64,
}

impl Bench {
    fn start(name: &str) -> Self {
        let (launcher, child) = spawn(LAUNCHER).unwrap();
        let instance = format!("bench-{name}-{}", std::process::id()).parse().unwrap();
        let config = LauncherConfig {
            version: VERSION,
            instance,
            lock_dir: LOCK_DIR.into(),
            ahead: true,
            zygotes: 16,
            zygote_idle: Duration::from_secs(10),
            memory_reserve: 1,
            preferred: false,
        };
        launcher.send(&ToLauncher::Configure(config), &[] as &[OwnedFd]).unwrap();
        wait_up(&launcher).unwrap();
        let mut program = tempfile::tempfile().unwrap();
        program.write_all(&empty_program()).unwrap();
        program.rewind().unwrap();
        Self { launcher, child, program, next: 1 }
    }

    /// Does what it is told, a line each: sets everything for a tenant, or launches for one and tells how long that took.
    fn serve(mut self) {
        for line in io::stdin().lines() {
            let line = line.unwrap();
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["set", tenant] => println!("{}", self.set_everything(tenant).join(", ")),
                ["run", tenant] => {
                    let begun = Instant::now();
                    self.run(tenant);
                    println!("{}", begun.elapsed().as_nanos());
                }
                _ => break,
            }
        }
        let Self { launcher, mut child, .. } = self;
        drop(launcher);
        assert!(child.wait().unwrap().success());
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
                FromLauncher::CeilingSet { result: Err(error), .. } => eprintln!("not set: {error}"),
                other => panic!("{other:?}"),
            }
        }
        taken
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
        artifact: ArtifactId([0; 32]),
        fresh_network: false,
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
