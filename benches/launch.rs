//! What a launch costs, without HTTP: until tenant code runs, and until all of the sandbox is gone; against the raw floor.
//!
//! Cold: the artifact is known, and no sandbox waits. Between one launch and the next there is a moment in which what the
//! last one left is cleared away, as between requests.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measurement that cannot go on should say where

mod support;

use std::fs::File;
use std::thread::sleep;
use std::time::Duration;

use holm_sandbox::spec::Kind;
use support::figures::Figures;
use support::floor::{self, FLOOR, Floor};
use support::launches::{Launches, file};
use support::programs::{EMPTY_MODULE, empty_program};
use support::times::{interleave, print_table, ratio, rounds};
use support::{proc, setting};

/// Between two measurements. Shorter than the silence after which the kernel lets the next attach wait.
const BREATH: Duration = Duration::from_millis(4);

const SILENCE: Duration = Duration::from_secs(1);

struct Bench {
    floor: Floor,
    launches: Launches,
    program: File,
    module: File,
    figures: Figures,
}

fn main() {
    if std::env::args().nth(1).is_some_and(|word| word == FLOOR) {
        return floor::serve();
    }
    let floor = Floor::start();
    println!("\n{}. {}", proc::machine(), floor.words());
    let mut launches = Launches::start("launch");
    let module = launches.compile(EMPTY_MODULE);
    let program = file(&empty_program());
    let mut bench = Bench { floor, launches, program, module, figures: Figures::of_this_run() };
    bench.after_another();
    bench.after_silence();
    bench.launches.end();
    bench.figures.print();
}

impl Bench {
    /// Each after the others.
    fn after_another(&mut self) {
        let names = ["floor", "native: launch", "native: until all is dead", "wasm: launch", "wasm: until all is dead"];
        let times = interleave(names, rounds(), || {
            let breath = || sleep(BREATH);
            breath();
            let floor = self.floor.once();
            breath();
            let native = self.launches.run("bench", Kind::Native, &self.program, None);
            breath();
            let wasm = self.launches.run("bench", Kind::Wasm, &self.module, None);
            [floor, native.launch, native.cycle, wasm.launch, wasm.cycle]
        });
        print_table("Cold launches of an empty program", &times);
        let [floor, native, native_cycle, wasm, wasm_cycle] = times;
        for (name, side) in [
            ("launch-native", &native),
            ("cycle-native", &native_cycle),
            ("launch-wasm", &wasm),
            ("cycle-wasm", &wasm_cycle),
        ] {
            self.figures.measured(name, ratio(side.p50(), floor.p50()));
        }
    }

    /// The first launch after nothing has happened for a while, which the floor waits for as well.
    fn after_silence(&mut self) {
        let names = ["floor after silence", "native: launch after silence", "wasm: launch after silence"];
        let times = interleave(names, setting("HOLM_BENCH_SILENCES", 12), || {
            sleep(SILENCE);
            let silent_floor = self.floor.once();
            sleep(SILENCE);
            let native = self.launches.run("bench", Kind::Native, &self.program, None);
            sleep(SILENCE);
            let wasm = self.launches.run("bench", Kind::Wasm, &self.module, None);
            [silent_floor, native.launch, wasm.launch]
        });
        print_table("The first after 1 s of silence", &times);
        self.figures.measured("launch-silence", ratio(times[2].p50(), times[0].p50()));
    }
}
