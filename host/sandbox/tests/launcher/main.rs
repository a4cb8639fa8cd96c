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
    let mut worst = Duration::ZERO;
    for _ in 0..20 {
        let t = std::time::Instant::now();
        let r = client.run(spec("acme", Kind::Wasm), "nothing");
        worst = worst.max(t.elapsed());
        eprintln!("{:?} {:?}", t.elapsed(), r.report.usage);
    }
}
