//! Three ways out that real escapes took, tried by a native job, and what it met.

use anyhow::{Context, bail};
use nix::errno::Errno;
use serde_json::{Map, Value, json};

use super::server::Server;
use super::{Stage, job};
use crate::bundled::PROBE;

/// What of the host a job must not get at.
const SECRETS: [&str; 6] =
    ["/etc/shadow", "/root", "/proc/1/environ", "/proc/sys/kernel/core_pattern", "/sys/fs/cgroup", "/dev/kmsg"];

/// Runs the attacks. The error is one that succeeded.
pub(super) fn show(stage: &mut Stage, server: &Server) -> anyhow::Result<()> {
    stage.title("Three attacks, from native code")?;
    steal(stage, server)?;
    connect(stage, server)?;
    call(stage, server)
}

fn steal(stage: &mut Stage, server: &Server) -> anyhow::Result<()> {
    stage.line("A job that opens the host's secrets:")?;
    let mut words = vec!["open"];
    words.extend(SECRETS);
    for (path, errnos) in probe(server, &words)? {
        let errno = errnos["read"].as_i64().unwrap_or(0);
        if errno == 0 || errnos["write"] == 0 {
            bail!("a job opened {path}");
        }
        stage.line(format!("  {path:<32}{}", name(errno)))?;
    }
    Ok(())
}

fn connect(stage: &mut Stage, server: &Server) -> anyhow::Result<()> {
    stage.line("\nA job that looks for a network, a hypervisor, the kernel's own sockets:")?;
    for (family, errno) in probe(server, &["sockets"])? {
        let errno = errno.as_i64().unwrap_or(0);
        if errno == 0 && family != "unix" {
            bail!("a job got a socket of the family {family}");
        }
        let found = if errno == 0 { "yes, and nobody in the job's own namespace to talk to" } else { name(errno) };
        stage.line(format!("  {family:<32}{found}"))?;
    }
    Ok(())
}

fn call(stage: &mut Stage, server: &Server) -> anyhow::Result<()> {
    let calls = probe(server, &["forbidden-calls"])?;
    let refusals = [Errno::EPERM as i64, Errno::ENOSYS as i64];
    if let Some((call, errno)) = calls.iter().find(|(_, errno)| !refusals.contains(&errno.as_i64().unwrap_or(0))) {
        bail!("the system call {call} was not refused: {errno}");
    }
    stage.line(format!(
        "\nA job that makes the {} system calls and variants which escapes begin with\n  (mount, ptrace, bpf, io_uring_setup, unshare, setns, keyctl, userfaultfd, …): every one refused.",
        calls.len()
    ))
}

/// Runs the probe and gives the object that it says.
fn probe(server: &Server, words: &[&str]) -> anyhow::Result<Map<String, Value>> {
    let record = job(server, PROBE.name, &json!(words), &json!({}), b"")?;
    let output = record["output"].as_str().with_context(|| record["outcome"].to_string())?;
    Ok(serde_json::from_str(output)?)
}

fn name(errno: i64) -> &'static str {
    Errno::from_raw(i32::try_from(errno).unwrap_or(0)).desc()
}
