//! What holds when there is a lot: of requests, of tenants, of parked sandboxes, of jobs in one go, of bytes; against
//! `wasmtime serve` and the raw floor.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measurement that cannot go on should say where
#![allow(clippy::cast_precision_loss)] // numbers to be printed

mod support;

use std::thread::{scope, sleep};
use std::time::Duration;

use holm::bundled::{ECHO_NATIVE, ECHO_WASM, HTTP_HELLO};
use support::figures::Figures;
use support::floor::{self, FLOOR, Floor};
use support::peers::WasmtimeServe;
use support::programs::EMPTY_MODULE;
use support::server::{Server, TENANT, below};
use support::times::{Times, interleave, print_table, ratio, rounds, timed};
use support::{proc, setting};

/// Requests a second of the open loop.
const RATE: u32 = 100;

/// Connections of the closed loop.
const CONNECTIONS: usize = 16;

/// Turns of the sides under load, and how long one of a side takes.
const TURNS: usize = 4;
const TURN: Duration = Duration::from_millis(2500);

/// Tenants where there are many.
const TENANTS: usize = 1000;

/// Tenants that have sandboxes parked, and plugins of each: no plugin is asked for so often here that more than one waits.
const PARKING_TENANTS: usize = 5;
const PARKING_PLUGINS: usize = 100;

/// What a job gives and takes at once.
const BODY: usize = 64 << 20;

const MIB: f64 = (1 << 20) as f64;

type Measure = fn(&mut Figures);

/// What is measured. Names of them as arguments have only those measured: `cargo bench --bench scale -- soak`.
const PARTS: [(&str, Measure); 6] = [
    ("open-loop", open_loop),
    ("closed-loop", closed_loop),
    ("bodies", bodies),
    ("tenants", tenants),
    ("parked", parked),
    ("soak", soak),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if words.first().is_some_and(|word| word == FLOOR) {
        return floor::serve();
    }
    println!("\n{}", proc::machine());
    let mut figures = Figures::of_this_run();
    let asked_for = |name: &str| words.is_empty() || words.iter().any(|word| word == name);
    for (_, measure) in PARTS.into_iter().filter(|(name, _)| asked_for(name)) {
        measure(&mut figures);
    }
    figures.print();
}

/// A server with the function.
fn with_function(settings: &[(&str, &str)]) -> Server {
    let server = Server::start(settings);
    server.upload(TENANT, "hello", HTTP_HELLO.artifact);
    server
}

/// A function at a rate that the clock gives. What is late counts from when it was due.
fn open_loop(figures: &mut Figures) {
    let server = with_function(&[]);
    let (own, peer) = (server.function("hello"), WasmtimeServe::start(HTTP_HELLO.artifact));
    let (mut times, mut theirs) = (Vec::new(), Vec::new());
    for turn in 0..=TURNS {
        let one = own.open_loop(RATE, TURN);
        let other = peer.as_ref().map(|peer| peer.requests.open_loop(RATE, TURN));
        // in the first, sandboxes begin to be parked
        if turn > 0 {
            times.extend(one);
            theirs.extend(other.unwrap_or_default());
        }
    }
    let times = Times::new("Holm, `/fn`, a warm sandbox each", times);
    match peer {
        Ok(_) => {
            let theirs = Times::new("wasmtime serve", theirs);
            print_table(&format!("A Wasm component at {RATE} requests/s, open loop"), [&theirs, &times]);
            figures.measured("fn-p50", ratio(times.p50(), theirs.p50()));
            figures.measured("fn-p99", ratio(times.p99(), theirs.p99()));
        }
        Err(reason) => {
            print_table(&format!("A Wasm component at {RATE} requests/s, open loop"), [&times]);
            ["fn-p50", "fn-p99"].into_iter().for_each(|name| figures.absent(name, &reason));
        }
    }
}

/// As many requests as a number of connections can, one after the other.
fn closed_loop(figures: &mut Figures) {
    let server = with_function(&[]);
    let (own, peer) = (server.function("hello"), WasmtimeServe::start(HTTP_HELLO.artifact));
    let mut workers = [Floor::start(), Floor::start()];
    println!("\n{}", workers[0].words());
    let [mut holm, mut theirs, mut raw] = [const { Vec::new() }; 3];
    for turn in 0..=TURNS {
        let one = own.closed_loop(CONNECTIONS, usize::MAX, TURN).0;
        let other = peer.as_ref().map(|peer| peer.requests.closed_loop(CONNECTIONS, usize::MAX, TURN).0);
        let floor = floor::rate(&mut workers, TURN);
        if turn > 0 {
            holm.push(one);
            theirs.extend(other);
            raw.push(floor);
        }
    }
    println!("\nSustained, {CONNECTIONS} connections, {TURNS} turns of {TURN:?} each, interleaved\n");
    println!("| | median a second | least | most |\n|---|---:|---:|---:|");
    let median = |name: &str, rates: &mut Vec<f64>| {
        rates.sort_unstable_by(f64::total_cmp);
        let (least, most) = (rates[0], rates[rates.len() - 1]);
        let median = f64::midpoint(rates[(rates.len() - 1) / 2], rates[rates.len() / 2]);
        println!("| {name} | {median:.0} | {least:.0} | {most:.0} |");
        median
    };
    let one = median("Holm, `/fn`", &mut holm);
    figures.measured("rate-floor", one / median("raw clone3 by 2 workers", &mut raw));
    match peer {
        Ok(_) => figures.measured("rate-peer", one / median("wasmtime serve", &mut theirs)),
        Err(reason) => figures.absent("rate-peer", &reason),
    }
}

/// A large body through a job and back, and what of it the server keeps in memory.
fn bodies(figures: &mut Figures) {
    let server = Server::start(&[]);
    let limits = format!(r#"{{"input_bytes": {BODY}, "output_bytes": {BODY}}}"#);
    let body = vec![7; BODY];
    println!("\n64 MiB through a job that gives its input back\n");
    println!("| | MB/s | the server's memory before, MiB | its peak meanwhile |\n|---|---:|---:|---:|");
    let mut most = 0.0_f64;
    for (plugin, name) in [(ECHO_NATIVE, "body-native"), (ECHO_WASM, "body-wasm")] {
        server.upload(TENANT, plugin.name, plugin.artifact);
        let run = || assert_eq!(server.job(plugin.name, &limits, &body), BODY as u64);
        run(); // its buffers are there from now on
        let before = proc::resident_bytes(server.pid()) as f64 / MIB;
        proc::forget_peak(server.pid());
        let time = timed(run);
        let peak = proc::peak_bytes(server.pid()) as f64 / MIB;
        let rate = BODY as f64 / 1e6 / time.as_secs_f64();
        println!("| {} | {rate:.0} | {before:.2} | {peak:.2} |", plugin.name);
        figures.measured(name, rate);
        most = most.max(peak - before);
    }
    figures.measured("body-memory", most);
}

/// What it costs a job that there are many tenants.
fn tenants(figures: &mut Figures) {
    let (few, many) = (with_function(&[]), with_function(&[]));
    // one is the tenant that is measured
    let registering = timed(|| {
        in_parallel(TENANTS - 1, |number| {
            let name = format!("tenant-{number}");
            many.tenant(&name);
            many.upload(&name, "module", EMPTY_MODULE.as_bytes());
        });
    });
    println!("\n{} tenants and plugins were registered in {:.0} s.", TENANTS - 1, registering.as_secs_f64());
    let call = |server: &Server| server.send("GET", &format!("/fn/{TENANT}/hello/"), "{}", b"");
    let names = ["1 tenant", "1,000 tenants"];
    let times = interleave(names, rounds() * 2, || {
        [&few, &many].map(|server| {
            sleep(Duration::from_millis(5));
            timed(|| call(server))
        })
    });
    print_table("A warm Wasm component by `/fn`, one plugin a tenant", &times);
    figures.measured("tenants", ratio(times[1].p50(), times[0].p50()));
}

/// Does something for each number, a few at a time.
fn in_parallel(numbers: usize, work: impl Fn(usize) + Sync) {
    const AT_ONCE: usize = 4;
    let work = &work;
    scope(|scope| {
        for first in 0..AT_ONCE {
            scope.spawn(move || (first..numbers).step_by(AT_ONCE).for_each(work));
        }
    });
}

/// What a sandbox costs that waits, and how many can.
fn parked(figures: &mut Figures) {
    let most = PARKING_TENANTS * PARKING_PLUGINS;
    let all = (most + 50).to_string();
    let server = with_function(&[
        ("HOLM_PARKED_SANDBOXES", &all),
        ("HOLM_PARKED_IDLE_MS", "600000"),
        ("HOLM_ZYGOTES", &all),
        ("HOLM_ZYGOTE_IDLE_MS", "600000"),
    ]);
    println!("\nParked sandboxes\n\n| | parked | private memory of one, MiB |\n|---|---:|---:|");
    server.function("hello").open_loop(RATE, TURN);
    let components = parked_soon(&server, 4);
    figures.measured("parked-component", private_memory("Wasm component", &components));

    let place = |number: usize| (format!("tenant-{}", number % PARKING_TENANTS), format!("module-{number}"));
    (0..PARKING_TENANTS).for_each(|number| server.tenant(&place(number).0));
    in_parallel(most, |number| server.upload(&place(number).0, &place(number).1, EMPTY_MODULE.as_bytes()));
    let available = proc::available_bytes();
    // the second job of a plugin has one parked for the third
    for (tenant, plugin) in (0..most).flat_map(|number| [number, number]).map(place) {
        server.job_of(&tenant, &plugin, "{}", b"");
    }
    let all = parked_soon(&server, most + components.len());
    let modules: Vec<u32> = all.iter().filter(|pid| !components.contains(pid)).copied().collect();
    figures.measured("parked", all.len() as f64);
    figures.measured("parked-module", private_memory("Wasm modules, one of each plugin", &modules));
    let taken = available.saturating_sub(proc::available_bytes()) as f64 / MIB / modules.len().max(1) as f64;
    println!("\nThe machine has {taken:.2} MiB less for each, its plugin's zygote and what the kernel keeps included.");
    println!("The launcher has {} descriptors open.", proc::open_files(server.launcher()));
}

/// The sandboxes that wait: once there are as many as this, or no more come.
fn parked_soon(server: &Server, expected: usize) -> Vec<u32> {
    for _ in 0..20 {
        sleep(Duration::from_millis(200));
        if server.sandboxes().len() >= expected {
            break;
        }
    }
    server.sandboxes()
}

/// The mean of some processes, in MiB.
fn private_memory(what: &str, pids: &[u32]) -> f64 {
    let sum: u64 = pids.iter().map(|pid| proc::private_bytes(*pid)).sum();
    let mean = sum as f64 / MIB / pids.len().max(1) as f64;
    println!("| {what} | {} | {mean:.3} |", pids.len());
    mean
}

/// Many jobs in one go, and what is more than before when they are over. `HOLM_BENCH_JOBS` says how many.
fn soak(figures: &mut Figures) {
    let jobs = setting("HOLM_BENCH_JOBS", 5000);
    let server = with_function(&[("HOLM_PARKED_IDLE_MS", "500"), ("HOLM_ZYGOTE_IDLE_MS", "500")]);
    let function = server.function("hello");
    let run = |jobs: usize| function.closed_loop(CONNECTIONS, jobs.div_ceil(CONNECTIONS), Duration::from_secs(3600));
    run(2000); // by then it keeps as many records as it ever will
    let before = Held::by(&server);
    let (rate, done) = run(jobs);
    let after = Held::by(&server);
    println!("\n{done} jobs in one go, {rate:.0} a second\n");
    println!("| | before | after | may grow by |\n|---|---:|---:|---:|");
    let mut grown = 0;
    for ((name, before, most), (_, after, _)) in before.0.iter().zip(&after.0) {
        println!("| {name} | {before:.1} | {after:.1} | {most} |");
        grown += u32::from(after - before > *most);
    }
    figures.measured("soak", f64::from(grown));
    figures.measured("soak-jobs", done as f64);
}

/// What a server and its launcher hold: its name, how much, and by how much it may differ from one moment to the next.
struct Held([(&'static str, f64, f64); 9]);

impl Held {
    /// Once nothing is parked any more.
    fn by(server: &Server) -> Self {
        server.settle();
        // the kernel lets go of a removed cgroup later, many at once one after the other
        let mut cgroups_before = usize::MAX;
        while proc::kernel_cgroups() < cgroups_before {
            cgroups_before = proc::kernel_cgroups();
            sleep(Duration::from_millis(500));
        }
        let (pid, launcher) = (server.pid(), server.launcher());
        let mib = |bytes: u64| bytes as f64 / MIB;
        let cgroups: usize = server.cgroups().iter().map(|dir| below(dir).len()).sum();
        Self([
            ("descriptors of the server", proc::open_files(pid) as f64, 0.0),
            ("descriptors of the launcher", proc::open_files(launcher) as f64, 0.0),
            ("processes of both", proc::descendants(pid).len() as f64, 0.0),
            ("mounts that the server sees", proc::mounts(pid) as f64, 0.0),
            ("mounts that the launcher sees", proc::mounts(launcher) as f64, 0.0),
            ("cgroups of the server", cgroups as f64, 0.0),
            // of the whole machine: others make some, and the kernel keeps a removed one until its last page is reclaimed
            ("`num_cgroups` of all controllers", proc::kernel_cgroups() as f64, 50.0),
            ("memory of the server, MiB", mib(proc::resident_bytes(pid)), 1.0),
            ("memory of the launcher, MiB", mib(proc::resident_bytes(launcher)), 1.0),
        ])
    }
}
