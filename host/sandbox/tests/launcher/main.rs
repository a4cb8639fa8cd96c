//! The launcher and its sandboxes, driven as the server drives them, without HTTP and without a runtime.
//!
//! The test binary is its own launcher: started under the name [`LAUNCHER`] it serves; otherwise it runs the tests. So it
//! has a `main` of its own: a launcher must be one before there is a second thread.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod client;
mod death;
mod escape;
mod faults;
mod hostile;
mod inside;
mod left;
mod lies;
mod orders;
mod owed;
#[path = "../../../../tests/support/slowness.rs"]
mod slowness;
mod steps;
mod stuck;
mod zygotes;

use libtest_mimic::{Arguments, Trial};
use nix::unistd::{Gid, setgroups};

/// What a launcher is called; the numbers of the system calls that a test wants to be asked about follow.
const LAUNCHER: &str = "holm-test-launcher";

/// A supplementary group of the launcher, which no sandbox may have.
const LAUNCHER_GROUP: u32 = 4242;

fn main() {
    let name = std::env::args().next().unwrap_or_default();
    if let Some(calls) = name.strip_prefix(LAUNCHER) {
        std::process::exit(launcher(calls));
    }
    let mut trials = Vec::new();
    trials.extend(steps::trials());
    trials.extend(zygotes::trials());
    trials.extend(lies::trials());
    trials.extend(hostile::trials());
    trials.extend(death::trials());
    trials.extend(escape::trials());
    trials.extend(orders::trials());
    trials.extend(owed::trials());
    // the longest begin first
    trials.splice(0..0, stuck::trials());
    let names: Vec<String> = trials.iter().map(|trial| trial.name().to_owned()).collect();
    trials.push(trial("every_step_fails_in_some_test", move || steps::every_step_fails_in_some_test(&names)));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn launcher(calls: &str) -> i32 {
    setgroups(&[Gid::from_raw(LAUNCHER_GROUP)]).unwrap();
    let calls: Vec<u32> = calls.trim().split_terminator(',').map(|call| call.parse().unwrap()).collect();
    if !calls.is_empty() {
        faults::listen(&calls);
    }
    holm_sandbox::launcher::launcher_main(&inside::Actions)
}

/// A test: `name` is its property, `test` panics where that does not hold.
fn trial(name: &str, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}
