//! The figures that Holm is to reach, and the one table in which all benches of a run tell which were.
//!
//! `cargo bench` runs each bench as a process of its own: they hand the table on in a file, which counts as long as it is of
//! the same `cargo`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::parent_id;

/// What a figure is to be.
#[derive(Clone, Copy)]
enum Target {
    AtMost(f64),
    /// The second is what is aimed for.
    AtLeast(f64, Option<f64>),
    Shown,
}

use Target::{AtLeast, AtMost, Shown};

/// Name in the benches, what it is, its unit, its target.
const FIGURES: [(&str, &str, &str, Target); 22] = [
    ("launch-wasm", "cold Wasm job, launch p50 ÷ floor", "", AtMost(1.5)),
    ("launch-silence", "first cold Wasm job after 1 s of silence, launch p50 ÷ floor after as much", "", Shown),
    ("launch-native", "cold native job, launch p50, exec and root included ÷ floor", "", AtMost(2.0)),
    ("cycle-wasm", "cold Wasm job until all of it is dead, p50 ÷ floor", "", Shown),
    ("cycle-native", "cold native job until all of it is dead, p50 ÷ floor", "", Shown),
    ("fn-p50", "warm Wasm component through `/fn`, 100 requests/s, p50 ÷ `wasmtime serve`", "", AtMost(1.0)),
    ("fn-p99", "the same, p99", "", AtMost(2.0)),
    ("rate-peer", "requests/s of it at 16 connections ÷ `wasmtime serve`", "", AtLeast(0.25, Some(0.5))),
    ("rate-floor", "the same ÷ raw clone3 by 2 workers", "", AtLeast(0.6, Some(0.8))),
    ("native-crun", "empty native job over HTTP, cold, p50 ÷ `crun run`", "", AtMost(0.08)),
    ("native-runc", "the same ÷ `runc run`", "", Shown),
    ("native-bwrap", "the same ÷ `bwrap`", "", Shown),
    ("warm-native-crun", "the same, warm ÷ `crun run`", "", Shown),
    ("parked-module", "private memory of one more parked sandbox, Wasm module", "MiB", AtMost(1.0)),
    ("parked-component", "the same, Wasm component", "MiB", AtMost(1.0)),
    ("parked", "sandboxes parked at once", "", AtLeast(500.0, None)),
    ("tenants", "warm p50 with 1,000 tenants ÷ with 1", "", AtMost(1.2)),
    ("soak", "things that many jobs in one go have made more", "", AtMost(0.0)),
    ("soak-jobs", "jobs in that go", "", Shown),
    ("body-native", "64 MiB through a native job", "MB/s", Shown),
    ("body-wasm", "64 MiB through a Wasm job", "MB/s", Shown),
    ("body-memory", "growth of the server's memory meanwhile", "MiB", AtMost(1.0)),
];

/// The figures of this run.
pub struct Figures {
    run: String,
    measured: BTreeMap<String, String>,
}

impl Figures {
    /// Those that benches of the same run have measured before.
    pub fn of_this_run() -> Self {
        let cargo = parent_id();
        let stat = fs::read_to_string(format!("/proc/{cargo}/stat")).unwrap_or_default();
        let started = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(19)).unwrap_or_default();
        let run = format!("{cargo} {started}");
        let text = fs::read_to_string(file()).unwrap_or_default();
        let (first, rest) = text.split_once('\n').unwrap_or_default();
        let rest = if first == run { rest } else { "" };
        let measured = rest.lines().filter_map(|line| line.split_once('\t'));
        let measured = measured.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { run, measured }
    }

    pub fn measured(&mut self, name: &str, value: f64) {
        self.set(name, value.to_string());
    }

    /// It cannot be measured here, and why.
    pub fn absent(&mut self, name: &str, reason: &str) {
        self.set(name, reason.to_owned());
    }

    fn set(&mut self, name: &str, value: String) {
        assert!(FIGURES.iter().any(|figure| figure.0 == name), "`{name}` is no figure");
        self.measured.insert(name.to_owned(), value);
    }

    /// Hands the figures on to the next bench, and prints all that there are.
    pub fn print(&self) {
        let lines: String = self.measured.iter().map(|(name, value)| format!("{name}\t{value}\n")).collect();
        fs::write(file(), format!("{}\n{lines}", self.run)).unwrap();
        println!("\nWhat was reached, in this run so far\n");
        println!("| figure | measured | target | reached? |\n|---|---:|---:|---|");
        for (name, what, unit, target) in FIGURES {
            let Some(value) = self.measured.get(name) else { continue };
            let (value, reached) = match value.parse() {
                Ok(value) => (with_unit(value, unit), target.reached(value)),
                Err(_) => (format!("absent: {value}"), "not measured"),
            };
            println!("| {what} | {value} | {} | {reached} |", target.words(unit));
        }
    }
}

impl Target {
    fn reached(self, value: f64) -> &'static str {
        match self {
            AtMost(most) if value <= most => "yes",
            AtLeast(_, Some(aim)) if value >= aim => "yes, and the aim",
            AtLeast(least, _) if value >= least => "yes",
            AtMost(_) | AtLeast(..) => "no",
            Shown => "",
        }
    }

    fn words(self, unit: &str) -> String {
        match self {
            AtMost(most) => format!("≤ {most} {unit}"),
            AtLeast(least, None) => format!("≥ {least} {unit}"),
            AtLeast(least, Some(aim)) => format!("≥ {least}, aim {aim} {unit}"),
            Shown => "printed".into(),
        }
    }
}

fn with_unit(value: f64, unit: &str) -> String {
    let number = if value.fract() == 0.0 || value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") };
    format!("{number} {unit}")
}

fn file() -> String {
    format!("{}/figures", env!("CARGO_TARGET_TMPDIR"))
}
