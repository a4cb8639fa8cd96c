//! Attacks, each seen twice: outside of a sandbox, where it works, and as a job.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::Server;

/// The probe as a plain process of the host's root, in an empty directory that is its `TMPDIR` too.
pub struct Outside {
    pub dir: TempDir,
}

impl Outside {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("BUNDLED_PLUGINS")).join("probe"));
        command.args(words).env_clear().env("TMPDIR", self.dir.path()).current_dir(self.dir.path());
        command
    }

    /// What it says of an attack, which must not fail to be made.
    #[track_caller]
    pub fn run(&self, words: &[&str]) -> Value {
        let output = self.command(words).output().unwrap();
        let (said, complaint) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{words:?}: {}\n{said}\n{complaint}", output.status);
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{words:?}: {error}\n{said}\n{complaint}"))
    }

    /// The same in namespaces of its own, for what would change the host.
    #[track_caller]
    pub fn run_on_own_ground(&self, words: &[&str]) -> Value {
        self.run(&[&["on-own-ground"], words].concat())
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

/// What the probe says of an attack outside of any sandbox.
#[track_caller]
pub fn outside(words: &[&str]) -> Value {
    Outside::new().run(words)
}

/// The same in namespaces of its own.
#[track_caller]
pub fn on_own_ground(words: &[&str]) -> Value {
    Outside::new().run_on_own_ground(words)
}

/// What the probe of tenant `t` says of an attack that it makes as a job. The job must end as it likes.
#[track_caller]
pub fn inside(server: &Server, words: &[&str]) -> Value {
    inside_with(server, words, &json!({}))
}

#[track_caller]
pub fn inside_with(server: &Server, words: &[&str], limits: &Value) -> Value {
    let record = server.probe(words, limits);
    assert_eq!(record["outcome"], json!({"kind": "exited", "exit_code": 0}), "{words:?}: {record}");
    let said = record["output"].as_str().unwrap();
    serde_json::from_str(said).unwrap_or_else(|error| panic!("{words:?}: {error}\n{said}"))
}

/// Rows, or parts of rows, whose attack cannot be seen to work on every machine, and why.
pub type NotShown = &'static [(&'static str, &'static str)];

/// Fails unless the attack of `row` was seen to work, or is one of those that this machine cannot show.
#[track_caller]
#[allow(clippy::print_stdout)] // what was not shown is for whoever runs the tests to read
pub fn shown(not_shown: NotShown, row: &str, worked: bool) {
    let known = not_shown.iter().find(|(name, _)| *name == row);
    match (worked, known) {
        (true, _) => {}
        (false, Some((_, why))) => println!("NOT SHOWN OUTSIDE: {row}: {why}"),
        (false, None) => panic!("{row} did not work outside of a sandbox: what is refused inside shows nothing"),
    }
}

/// Adds what stays to be said whatever the machine: rows that are never tried outside, and why.
pub fn never_shown(not_shown: NotShown, row: &str) {
    shown(not_shown, row, false);
}
