//! `holm demo`: a throw-away server, jobs and an HTTP function on real input, attacks that fail, and what each limit does
//! to a job that misbehaves.

mod attacks;
mod function;
mod neighbour;
mod server;

use std::io::{self, Write};
use std::sync::Arc;

use anyhow::{Context, bail};
use holm_sandbox::cgroup::Plan;
use serde_json::{Value, json};

use self::neighbour::Neighbour;
use self::server::Server;
use super::{EX_SOFTWARE, Fatal, OrExit};
use crate::bundled::{Bundled, ECHO_WASM, HTTP_HELLO, PROBE, WORD_COUNT_NATIVE, WORD_COUNT_WASM};

/// Real text: the licence of this program.
const TEXT: &str = include_str!("../../../LICENSE");

/// What is printed goes through here, so that a closed pipe is an error and no panic.
struct Stage(io::Stdout);

impl Stage {
    fn line(&mut self, text: impl AsRef<str>) -> anyhow::Result<()> {
        writeln!(self.0, "{}", text.as_ref())?;
        Ok(())
    }

    fn title(&mut self, text: &str) -> anyhow::Result<()> {
        self.line(format!("\n{text}\n{}", "─".repeat(text.chars().count())))
    }
}

/// Runs the demo. 0 only if everything went as it should.
pub(super) fn run() -> Result<u8, Fatal> {
    play(&mut Stage(io::stdout())).or_exit(EX_SOFTWARE)?;
    Ok(0)
}

fn play(stage: &mut Stage) -> anyhow::Result<()> {
    let server = Server::start()?;
    stage.line(format!("A throw-away server listens on {}. Everything below happens over HTTP.", server.url()))?;
    set_up(&server)?;
    main_job(stage, &server)?;
    function::show(stage, &server)?;
    attacks::show(stage, &server)?;
    misbehave(stage, server)
}

/// Two tenants: one with the demo's plugins, one that only ever echoes.
fn set_up(server: &Server) -> anyhow::Result<()> {
    for tenant in ["acme", "neighbour"] {
        expect(server.send("PUT", &format!("/v1/tenants/{tenant}"), &[JSON], b"{}")?, 201)?;
    }
    for plugin in [WORD_COUNT_NATIVE, WORD_COUNT_WASM, HTTP_HELLO, PROBE] {
        upload(server, "acme", plugin)?;
    }
    upload(server, "neighbour", ECHO_WASM)
}

const JSON: (&str, &str) = ("Content-Type", "application/json");

fn upload(server: &Server, tenant: &str, plugin: Bundled) -> anyhow::Result<()> {
    let path = format!("/v1/tenants/{tenant}/plugins/{}", plugin.name);
    expect(server.send("PUT", &path, &[], plugin.artifact)?, 201).map(drop)
}

fn expect(answer: server::Answer, status: u16) -> anyhow::Result<server::Answer> {
    if answer.status == status {
        return Ok(answer);
    }
    bail!("expected {status}, got {}: {}", answer.status, String::from_utf8_lossy(&answer.body))
}

/// Runs a job and gives its record, output and all.
fn job(server: &Server, plugin: &str, args: &Value, limits: &Value, input: &[u8]) -> anyhow::Result<Value> {
    let path = format!("/v1/tenants/acme/plugins/{plugin}/jobs");
    let (args, limits) = (args.to_string(), limits.to_string());
    let headers = [("Prefer", "return=representation"), ("Holm-Args", &args), ("Holm-Limits", &limits)];
    expect(server.send("POST", &path, &headers, input)?, 200)?.json()
}

/// The same source, once as a native program and once as WebAssembly, on the same input.
fn main_job(stage: &mut Stage, server: &Server) -> anyhow::Result<()> {
    stage.title("One program, two forms")?;
    stage.line(format!(
        "word-count, built from one Rust source as a static ELF ({} KiB) and as WebAssembly ({} KiB).\nInput: the text of this program's licence, {} bytes.",
        WORD_COUNT_NATIVE.artifact.len() / 1024,
        WORD_COUNT_WASM.artifact.len() / 1024,
        TEXT.len()
    ))?;
    let args = json!(["--top", "3"]);
    let mut records = Vec::new();
    for plugin in [WORD_COUNT_NATIVE, WORD_COUNT_WASM] {
        records.push(job(server, plugin.name, &args, &json!({}), TEXT.as_bytes())?);
    }
    let [native, wasm] = &records[..] else { bail!("two jobs give two records") };
    let output = native["output"].as_str().context("the job's output is text")?;
    if wasm["output"] != output {
        bail!("the two forms disagree: {output:?} and {:?}", wasm["output"]);
    }
    stage.line(format!("Output of both:\n{}", indent(output)))?;

    stage.title("What each used, from the kernel's counters")?;
    stage.line(format!("{:<22}{:>14}{:>14}", "", "native", "wasm"))?;
    for key in ["launch_us", "wall_us", "cpu_user_us", "cpu_system_us", "memory_peak_bytes", "pids_peak", "fuel_used"] {
        stage.line(format!("{key:<22}{:>14}{:>14}", cell(&native["usage"][key]), cell(&wasm["usage"][key])))?;
    }

    stage.title("Where each ran: namespaces and layers, read back from the kernel")?;
    stage.line(format!("{:<22}{:>14}{:>14}{:>14}", "namespace", "this shell", "native", "wasm"))?;
    for name in ["user", "pid", "mnt", "uts", "ipc", "net", "cgroup"] {
        let here = std::fs::read_link(format!("/proc/self/ns/{name}"))?.to_string_lossy().into_owned();
        let here: u64 = here.trim_start_matches(|c: char| c != '[').trim_matches(['[', ']']).parse()?;
        let of = |record: &Value| record["isolation"]["namespaces"][name].clone();
        if of(native) == here || of(wasm) == here {
            bail!("a job ran in this shell's own {name} namespace");
        }
        stage.line(format!("{name:<22}{here:>14}{:>14}{:>14}", cell(&of(native)), cell(&of(wasm))))?;
    }
    for key in ["uid_map", "capabilities", "no_new_privs", "seccomp", "landlock"] {
        let of = |record: &Value| cell(&record["isolation"][key]);
        stage.line(format!("{key:<22}{:>14}  {:>18}  {:>18}", "", of(native), of(wasm)))?;
    }
    stage.line(format!("cgroups ({})", Plan::for_this_process().map_or("?", |plan| plan.version())))?;
    let cgroups = native["isolation"]["cgroups"].as_object().context("the operator sees cgroups")?;
    for (controller, path) in cgroups {
        stage.line(format!("  {controller:<20}{}", cell(path)))?;
    }
    Ok(())
}

/// A way to misbehave, and what must come of it.
struct Misdeed {
    words: &'static str,
    args: Value,
    limits: Value,
    /// The limit that must end it; `None` if it must be held within a limit and end by another.
    ended_by: &'static str,
    shown: &'static [&'static str],
}

fn misdeeds() -> [Misdeed; 4] {
    [
        Misdeed {
            words: "spins for ever on one core, allowed a quarter of one",
            args: json!(["spin", "60000"]),
            limits: json!({"wall_time_ms": 1000, "cpu_cores": 0.25}),
            ended_by: "wall_time_ms",
            shown: &["wall_us", "cpu_user_us", "cpu_system_us", "cpu_throttled_us"],
        },
        Misdeed {
            words: "allocates without end, allowed 64 MiB",
            args: json!(["allocate", "100000"]),
            limits: json!({"memory_bytes": 64 << 20}),
            ended_by: "memory_bytes",
            shown: &["wall_us", "memory_peak_bytes"],
        },
        Misdeed {
            words: "forks without end, allowed 32 processes and one second",
            args: json!(["fork-bomb", "1000000"]),
            limits: json!({"pids": 32, "wall_time_ms": 1000}),
            ended_by: "wall_time_ms",
            shown: &["wall_us", "pids_peak"],
        },
        Misdeed {
            words: "floods its output, allowed 1 MiB",
            args: json!(["flood", "stdout", "100000"]),
            limits: json!({"output_bytes": 1 << 20}),
            ended_by: "output_bytes",
            shown: &["wall_us", "memory_peak_bytes"],
        },
    ]
}

fn misbehave(stage: &mut Stage, server: Server) -> anyhow::Result<()> {
    stage.title("Four jobs that misbehave, and a neighbour that is served all along")?;
    let server = Arc::new(server);
    let neighbour = Neighbour::start(server.clone(), "/v1/tenants/neighbour/plugins/echo-wasm/jobs");
    let mut problems = Vec::new();
    for misdeed in misdeeds() {
        let record = job(&server, PROBE.name, &misdeed.args, &misdeed.limits, b"")?;
        stage.line(format!("A job that {}.", misdeed.words))?;
        stage.line(format!("  limits   {}", misdeed.limits))?;
        stage.line(format!("  outcome  {}", record["outcome"]))?;
        let used = misdeed.shown.iter().map(|key| format!("{key} {}", cell(&record["usage"][key])));
        stage.line(format!("  usage    {}\n", used.collect::<Vec<_>>().join(", ")))?;
        if record["outcome"]["limit"] != misdeed.ended_by {
            problems.push(format!("a job that {} was not ended by {}", misdeed.words, misdeed.ended_by));
        }
        if let (Some(most), Some(peak)) = (misdeed.limits["pids"].as_u64(), record["usage"]["pids_peak"].as_u64())
            && peak > most
        {
            problems.push(format!("{peak} processes where {most} were allowed"));
        }
    }
    let service = neighbour.stop();
    stage.line(format!("The neighbour, meanwhile: {}.", service.words()))?;
    problems.extend(service.failed.first().map(|failure| format!("the neighbour was not served: {failure}")));
    if service.answered == 0 {
        problems.push("the neighbour was never served".into());
    }

    let Ok(server) = Arc::try_unwrap(server) else { bail!("the neighbour still holds the server") };
    let took = server.stop()?;
    stage.line(format!("The server stopped in {} ms. Nothing is left of it.", took.as_millis()))?;
    match problems.as_slice() {
        [] => Ok(()),
        problems => bail!("the demo failed: {}", problems.join("; ")),
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
