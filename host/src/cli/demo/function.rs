//! An HTTP function: a standard component behind `/fn`, a process of its own for each request.

use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::Value;

use super::server::Server;
use super::{Stage, TEXT, cell, expect};
use crate::bundled::HTTP_HELLO;

/// Calls the component, and shows what each of its requests used.
pub(super) fn show(stage: &mut Stage, server: &Server) -> anyhow::Result<()> {
    stage.title("An HTTP function")?;
    let size = HTTP_HELLO.artifact.len() / 1024;
    stage.line(format!("http-hello, a standard wasi:http component ({size} KiB), called by its URL:"))?;
    for name in ["you", "me"] {
        let path = format!("/fn/acme/http-hello/?to={name}");
        let greeting = expect(server.send("GET", &path, &[], b"")?, 200)?;
        let greeting = String::from_utf8_lossy(&greeting.body);
        stage.line(format!("  GET  {path:<31} 200 {}", greeting.trim()))?;
    }
    let echo = expect(server.send("POST", "/fn/acme/http-hello/echo", &[], TEXT.as_bytes())?, 200)?;
    if echo.body != TEXT.as_bytes() {
        bail!("the component gave back other bytes than it was sent");
    }
    stage.line(format!("  POST /fn/acme/http-hello/echo        200 {} bytes, the same as were sent", TEXT.len()))?;

    stage.line("Each of them ran in a process cloned for it alone:")?;
    stage.line(format!(
        "  {:<16}{:>12}{:>12}{:>20}{:>12}",
        "pid namespace", "launch_us", "wall_us", "memory_peak_bytes", "fuel_used"
    ))?;
    let jobs = finished(server)?;
    for job in &jobs {
        let used = |key: &str| cell(&job["usage"][key]);
        let namespace = cell(&job["isolation"]["namespaces"]["pid"]);
        let [launch, wall, memory, fuel] = ["launch_us", "wall_us", "memory_peak_bytes", "fuel_used"].map(used);
        stage.line(format!("  {namespace:<16}{launch:>12}{wall:>12}{memory:>20}{fuel:>12}"))?;
    }
    let failed = |job: &&Value| job["outcome"]["exit_code"] != 0;
    match jobs.iter().find(failed) {
        Some(job) => bail!("a request's job did not end well: {}", job["outcome"]),
        None => Ok(()),
    }
}

/// The three jobs, once their records are complete: a job may outlive its answer by a moment.
fn finished(server: &Server) -> anyhow::Result<Vec<Value>> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let list = server.send("GET", "/v1/tenants/acme/jobs?plugin=http-hello&state=finished", &[], b"")?.json()?;
        match list["jobs"].as_array() {
            Some(jobs) if jobs.len() == 3 => return Ok(jobs.clone()),
            _ if Instant::now() > deadline => bail!("the requests' jobs do not end: {list}"),
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
