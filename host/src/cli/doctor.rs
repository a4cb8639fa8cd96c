//! `holm doctor`: what this machine can do, and how to mend what it cannot.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use holm_sandbox::policy::Policy;
use holm_sandbox::probe::{self, Check, Status, TrialError};
use holm_sandbox::spec::Kind;
use holm_sandbox::uids::LOCK_DIR;
use serde_json::json;

use super::serve::{launcher_config, start_launcher};
use super::{EX_OSERR, EX_UNAVAILABLE, Fatal, OrExit};
use crate::config::Config;
use crate::job::{OWN_ENV, USUAL_ENV};
use crate::store::DataDir;

/// What to tell, and how.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print what a job of each kind can reach: mounts, devices, Landlock rules, limits, system calls, environment
    #[arg(long)]
    policy: bool,
    /// Where servers on this host agree about uids
    #[arg(long, value_name = "DIR", default_value = LOCK_DIR, env = "HOLM_LOCK_DIR", hide = true)]
    lock_dir: PathBuf,
}

/// Looks at the machine and prints what it finds. 0 only if jobs can be fully isolated.
pub(super) fn run(args: &DoctorArgs) -> Result<u8, Fatal> {
    if args.policy {
        return print_policy(args.json);
    }
    let mut checks = probe::machine(&args.lock_dir);
    if checks.iter().all(|check| check.status != Status::Fail) {
        checks.push(trial(args));
    }
    let good = checks.iter().all(|check| check.status != Status::Fail);
    let text = if args.json {
        let report = json!({"isolates": good, "checks": checks});
        serde_json::to_string_pretty(&report).or_exit(EX_OSERR)?
    } else {
        table(&checks, good)
    };
    writeln!(io::stdout(), "{text}").or_exit(EX_OSERR)?;
    Ok(if good { 0 } else { EX_UNAVAILABLE })
}

/// The policy, from the tables that are enforced.
fn print_policy(as_json: bool) -> Result<u8, Fatal> {
    let kinds = Kind::ALL.map(Policy::of);
    let names: Vec<&str> = USUAL_ENV.iter().map(|(name, _)| *name).chain(OWN_ENV).collect();
    let text = if as_json {
        serde_json::to_string_pretty(&json!({"kinds": kinds, "environment": names})).or_exit(EX_OSERR)?
    } else {
        let kinds = kinds.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        format!("{kinds}\nenvironment of a job: {}, and what the plugin and the request set", names.join(", "))
    };
    writeln!(io::stdout(), "{text}").or_exit(EX_OSERR)?;
    Ok(0)
}

/// All layers together: a sandbox is made, read back from the kernel, and thrown away.
fn trial(args: &DoctorArgs) -> Check {
    let name = "trial sandbox";
    match try_trial(args) {
        Ok(namespaces) => Check {
            name,
            status: Status::Ok,
            found: format!("every layer applied and read back from the kernel; {namespaces} new namespaces"),
            mend: String::new(),
        },
        Err(error) => Check {
            name,
            status: Status::Fail,
            found: format!("{error:#}"),
            mend: "the step named is the layer that this kernel or container does not allow".into(),
        },
    }
}

fn try_trial(args: &DoctorArgs) -> anyhow::Result<usize> {
    let temporary = std::env::temp_dir().join(format!("holm-doctor-{}", std::process::id()));
    let result = in_directory(args, &temporary);
    let _ = std::fs::remove_dir_all(&temporary);
    result
}

fn in_directory(args: &DoctorArgs, temporary: &std::path::Path) -> anyhow::Result<usize> {
    let dir = DataDir::hold(temporary)?;
    let config = Config { lock_dir: args.lock_dir.clone(), ..Config::default() };
    let (launcher, mut child) = start_launcher(launcher_config(&config, &dir))?;
    let result: Result<_, TrialError> = probe::trial(&launcher);
    drop(launcher);
    child.wait()?;
    Ok(result?.namespaces.named().len())
}

fn table(checks: &[Check], good: bool) -> String {
    let mut lines = Vec::new();
    for check in checks {
        let mark = match check.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        lines.push(format!("{mark}  {:<14} {}", check.name, check.found));
        if !check.mend.is_empty() {
            lines.push(format!("      {:<14} to mend: {}", "", check.mend));
        }
    }
    let verdict = if good {
        "Jobs can be fully isolated on this machine."
    } else {
        "Jobs cannot be isolated on this machine; `holm serve` will refuse to start."
    };
    lines.push(String::new());
    lines.push(verdict.to_owned());
    lines.join("\n")
}
