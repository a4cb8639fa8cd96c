//! The launcher and its sandboxes, driven as the server drives them, without HTTP and without a runtime.
//!
//! The test binary is its own launcher: started under the name [`LAUNCHER`] it serves; otherwise it runs the tests.

mod client;
mod inside;

use std::time::Duration;

use holm_sandbox::spec::Kind;
use holm_sandbox::usage::Exit;

use crate::client::{Client, spec};

const LAUNCHER: &str = "holm-test-launcher";

fn main() {
    if std::env::args().next().as_deref() == Some(LAUNCHER) {
        std::process::exit(holm_sandbox::launcher::launcher_main(&inside::Actions));
    }
    let mut client = Client::start();
    for kind in Kind::ALL {
        let run = client.run(spec("acme", kind), "report");
        eprintln!("{kind:?}: {:#?} {}", run.isolation, run.stdout);
        eprintln!("{:?}", run.report);
        assert_eq!(run.report.exit, Exit::Exited(0));
    }
    s8_native_code_in_place_of_a_runtime_reaches_its_tmp_alone(&mut client);
    let mut worst = Duration::ZERO;
    for _ in 0..20 {
        let t = std::time::Instant::now();
        let r = client.run(spec("acme", Kind::Wasm), "nothing");
        worst = worst.max(t.elapsed());
        eprintln!("{:?} {:?}", t.elapsed(), r.report.usage);
    }
}

/// What would code reach that broke out of the WebAssembly runtime, or out of the compiler?
fn s8_native_code_in_place_of_a_runtime_reaches_its_tmp_alone(client: &mut Client) {
    const EPERM: i32 = 1;
    const EACCES: i32 = 13;
    for kind in [Kind::Wasm, Kind::Compile] {
        let run = client.run(spec("acme", kind), "escape");
        let answers: Vec<(&str, &str)> = run.stdout.lines().map(|line| line.split_once(": ").unwrap()).collect();
        assert_eq!(answers.len(), 15, "{}", run.stdout);
        for (attempt, errno) in answers {
            let expected = match (attempt, kind) {
                ("write /tmp", Kind::Wasm) | ("a thread", Kind::Compile) => 0,
                ("read the root" | "read the proof of Landlock", Kind::Wasm) => EACCES,
                ("read /proc", Kind::Wasm) => 2,       // there is none
                ("write elsewhere", Kind::Wasm) => 30, // a read-only mount
                _ => EPERM,
            };
            assert_eq!(errno, expected.to_string(), "{kind:?}: {attempt}");
        }
    }
}
