//! The life of one job, in its own task: admitted, launched, fed, read, judged, recorded.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use holm_runtime::invocation::{Invocation, Report};
use holm_sandbox::spec::{ArtifactId, Kind, SandboxSpec};
use holm_sandbox::usage::{Isolation, KillCause, SandboxReport};
use jiff::Timestamp;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::entry::Entry;
use super::line::{Line, Meter};
use super::outcome::{Evidence, Outcome, Stop, fuel_used};
use super::record::{IsolationRecord, JobRecord, Start, State, UsageRecord};
use super::{Artifact, Finished, Input, JobRequest, Jobs, Output, Streams, Supply};
use crate::admission::{AdmissionError, Permit};
use crate::launcher::{Collected, Collector, Content, Parked, Sandbox, SandboxError, Stdio, StreamError};
use crate::limit::{Limit, Runtime};
use crate::plugin::Plugin;
use crate::store::ArtifactError;
use crate::tenant::Tenant;
use crate::upload::CompileError;

/// How long after a guest's end its response may still be read to be counted; its place is not free before.
const READ_WITHIN: Duration = Duration::from_secs(1);

/// What is kept of standard error.
const STDERR_TAIL_BYTES: usize = 4096;

/// Variables that every job has unless its plugin or its request sets them.
pub const USUAL_ENV: [(&str, &str); 4] = [("PATH", "/bin"), ("HOME", "/tmp"), ("TMPDIR", "/tmp"), ("LANG", "C.UTF-8")];

/// Variables that the host sets, and nobody else can: the job's id, its tenant, its plugin, its input's content type.
pub const OWN_ENV: [&str; 4] = ["HOLM_JOB_ID", "HOLM_TENANT", "HOLM_PLUGIN", "HOLM_CONTENT_TYPE"];

/// How a job ended and what came out of it.
struct End {
    outcome: Outcome,
    usage: UsageRecord,
    output: Output,
    stderr_tail: Bytes,
    /// What the kernel has counted for the tenant, and not for each job, since its last job ended.
    tenant_io: Option<(u64, u64)>,
}

impl End {
    /// The end of a job that never ran.
    fn without_run(outcome: Outcome, usage: UsageRecord) -> Self {
        let (output, stderr_tail) = (Output::default(), Bytes::new());
        Self { outcome, usage, output, stderr_tail, tenant_io: None }
    }
}

/// A job that the host could not run, or not to its end. The operator is told why; the tenant is told that it is lost.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("sandbox: {0}")]
    Sandbox(#[from] SandboxError),
    #[error("streams: {0}")]
    Stream(#[from] StreamError),
    #[error("wait to be launched: {0}")]
    Turn(#[source] AdmissionError),
    #[error("make the streams: {0}")]
    Pipe(#[source] std::io::Error),
    #[error("open the artifact: {0}")]
    Artifact(#[from] ArtifactError),
    #[error("compile the artifact again: {0}")]
    Compile(#[from] CompileError),
}

/// Runs `request` to its end. The error is a job that was never admitted, and of which nothing remains.
pub(super) async fn run(
    jobs: Jobs,
    entry: Arc<Entry>,
    request: JobRequest,
    supply: Supply,
) -> Result<Finished, AdmissionError> {
    let submitted = Instant::now();
    let pids = request.limits.get(Limit::Pids) + own_pids(request.plugin.runtime);
    let admitted = tokio::select! {
        permit = jobs.0.admission.admit(&request.tenant, pids) => Some(permit),
        () = entry.cancel.cancelled() => None,
    };
    let mut usage = UsageRecord { queue_us: micros(submitted), ..UsageRecord::default() };
    let end = match admitted {
        Some(Err(refusal)) => {
            jobs.0.registry.withdraw(&entry);
            return Err(refusal);
        }
        None => End::without_run(Outcome::Cancelled, usage),
        Some(Ok(permit)) => {
            entry.admitted(permit.id(), usage.queue_us);
            match launch(&jobs, &entry, &request, supply, permit, &mut usage).await {
                Ok(end) => end,
                Err(fault) => {
                    tracing::error!(job = %entry.id, tenant = %entry.tenant, plugin = %entry.plugin, %fault, "job lost");
                    End::without_run(Outcome::Lost, usage)
                }
            }
        }
    };
    let record = conclude(&jobs, &entry, &end);
    Ok(Finished { record, output: end.output, stderr_tail: end.stderr_tail })
}

/// Writes the last state of the record, and the job's one line in the log.
fn conclude(jobs: &Jobs, entry: &Entry, end: &End) -> JobRecord {
    jobs.0.registry.finish(entry, |record| {
        record.state = State::Finished;
        record.outcome = Some(end.outcome.clone());
        record.usage = end.usage;
        record.finished_at = Some(Timestamp::now());
        // before anybody hears of its end
        jobs.0.accounts.count(&entry.tenant, record, end.tenant_io);
    });
    let usage = end.usage;
    tracing::info!(
        job = %entry.id, tenant = %entry.tenant, plugin = %entry.plugin,
        outcome = end.outcome.kind(), limit = end.outcome.limit(),
        queue_us = usage.queue_us, launch_us = usage.launch_us, wall_us = usage.wall_us, paused_us = usage.paused_us,
        cpu_user_us = usage.cpu_user_us, cpu_system_us = usage.cpu_system_us,
        cpu_throttled_us = usage.cpu_throttled_us, memory_peak_bytes = usage.memory_peak_bytes,
        pids_peak = usage.pids_peak, fuel_used = usage.fuel_used,
        io_read_bytes = usage.io_read_bytes, io_write_bytes = usage.io_write_bytes,
        input_bytes = usage.input_bytes, output_bytes = usage.output_bytes,
        "job finished"
    );
    entry.record()
}

/// Gets a sandbox and runs the job in it. Every process of the job is dead when this returns.
async fn launch(
    jobs: &Jobs,
    entry: &Arc<Entry>,
    request: &JobRequest,
    supply: Supply,
    permit: Permit,
    usage: &mut UsageRecord,
) -> Result<End, Fault> {
    let asked = Instant::now();
    let Supply { artifact, streams } = supply;
    let artifact = runnable(jobs, &request.tenant, &request.plugin, artifact).await?;
    let spec = spec(request);
    let invocation = invocation(entry, request);
    let (manned, start) = match parked(jobs, &spec, &artifact, &invocation).await? {
        Some(manned) => (manned, Start::Parked),
        None => match made(jobs, entry, &request.tenant, spec, artifact, &invocation).await? {
            Ok(manned) => (manned, Start::Cold),
            Err(Unmanned::Cancelled) => return Ok(End::without_run(Outcome::Cancelled, *usage)),
            Err(Unmanned::TooSmall(report)) => return Ok(too_small_to_begin(entry, request, &report, usage)),
        },
    };
    let Manned { isolation, sandbox, .. } = &manned;
    entry.update(|record| {
        record.isolation = Some(IsolationRecord::from(isolation.clone()));
        record.start = Some(start);
    });
    entry.in_sandbox(sandbox.controls());
    let end = run_in(jobs, entry, request, streams, (manned, asked), usage).await?;
    Ok(End { output: end.output.in_place(permit), ..end })
}

/// A sandbox that has been given its job.
struct Manned {
    sandbox: Sandbox,
    /// What the kernel says of its layers.
    isolation: Isolation,
    stdin: pipe::Sender,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
}

/// A sandbox that came to no job, by no fault of the host.
enum Unmanned {
    Cancelled,
    /// The job's memory limit did not let it come so far.
    TooSmall(SandboxReport),
}

/// Gives the job to a sandbox that has been waiting for one, if there is any.
async fn parked(
    jobs: &Jobs,
    spec: &SandboxSpec,
    artifact: &File,
    invocation: &Invocation,
) -> Result<Option<Manned>, Fault> {
    while let Some(Parked { sandbox, isolation, streams }) = jobs.0.parking.take(spec, artifact) {
        let streams = streams.map_or_else(Stdio::make, Ok).map_err(Fault::Pipe)?;
        let Stdio { stdin, stdout, stderr, theirs } = streams;
        // else it has died this moment, and nothing of the job has begun
        if sandbox.give(invocation, theirs).is_ok() {
            return Ok(Some(Manned { sandbox, isolation, stdin, stdout, stderr }));
        }
    }
    Ok(None)
}

/// Has a sandbox made for the job. It finds the job waiting when it is admitted, and not a moment before that.
async fn made(
    jobs: &Jobs,
    entry: &Entry,
    tenant: &Tenant,
    spec: SandboxSpec,
    artifact: File,
    invocation: &Invocation,
) -> Result<Result<Manned, Unmanned>, Fault> {
    let turn = tokio::select! {
        turn = jobs.0.turns.take(tenant) => turn.map_err(Fault::Turn)?,
        () = entry.cancel.cancelled() => return Ok(Err(Unmanned::Cancelled)),
    };
    let (mut sandbox, _waiting) = jobs.0.parking.launch(spec, artifact)?;
    let Stdio { stdin, stdout, stderr, theirs } = Stdio::make().map_err(Fault::Pipe)?;
    let given = sandbox.give(invocation, theirs);
    let ready = tokio::select! {
        ready = sandbox.ready() => ready,
        () = entry.cancel.cancelled() => {
            sandbox.end().await;
            return Ok(Err(Unmanned::Cancelled));
        }
    };
    let isolation = match ready {
        Ok(isolation) => isolation,
        Err(SandboxError::Died(report)) if report.killed == Some(KillCause::Memory) => {
            return Ok(Err(Unmanned::TooSmall(*report)));
        }
        Err(error) => return Err(error.into()),
    };
    drop(turn);
    // a sandbox that was not made tells why before that
    given?;
    Ok(Ok(Manned { sandbox, isolation, stdin, stdout, stderr }))
}

/// Follows a job to its end.
async fn run_in(
    jobs: &Jobs,
    entry: &Arc<Entry>,
    request: &JobRequest,
    streams: Streams,
    (manned, asked): (Manned, Instant),
    usage: &mut UsageRecord,
) -> Result<End, Fault> {
    let Manned { mut sandbox, stdin, stdout, stderr, .. } = manned;
    let killer = sandbox.killer();
    let stop = |why: Stop| {
        // the first reason stands; killing twice does no harm
        let _ = entry.stop.set(why);
        killer.kill();
    };
    let meter = Meter::new(entry.clone(), killer.clone());
    let flows = &entry.flows;
    let spool = jobs.0.store.dir().tmp();
    let (reader, read) = oneshot::channel();
    let command = match streams {
        Streams::Command(input) => {
            drop(reader);
            Some((input, stdin, stdout))
        }
        Streams::Http(hand_over) => {
            // should the caller be gone, so are the guest's streams, and soon the guest
            let line = Line { to_guest: stdin, from_guest: stdout, meter: meter.clone(), reader };
            let _ = hand_over.send(line);
            None
        }
    };
    let (input, stdout) = match command {
        Some((input, stdin, stdout)) => (Some((input, stdin)), Some(stdout)),
        None => (None, None),
    };
    let out = async {
        match stdout {
            Some(stdout) => watched(Collector::everything(flows.output.clone(), &spool), stdout, &stop).await,
            None => Ok(Collected { bytes: 0, content: Content::Memory(Bytes::new()) }),
        }
    };
    let err = watched(Collector::tail(flows.errors.clone(), STDERR_TAIL_BYTES), stderr, &stop);
    let mut launch_us = None;
    let life = sandbox.run(|| {
        let us = micros(asked);
        launch_us = Some(us);
        entry.update(|record| {
            record.started_at = Some(Timestamp::now());
            record.usage.launch_us = us;
        });
    });
    let feed = async {
        if let Some((input, stdin)) = input {
            feed(input, stdin, &meter).await;
        }
        pending::<()>().await;
    };
    let cancel = async {
        entry.cancel.cancelled().await;
        killer.kill();
        pending::<()>().await;
    };
    let (life, out, err) = tokio::select! {
        ended = async { tokio::join!(life, out, err) } => ended,
        // neither of these two ends: they only last as long as the job
        () = async { tokio::join!(feed, cancel); } => unreachable!("the watchers wait for ever"),
    };
    let (report, end) = life?;
    let (out, err): (Collected, Collected) = (out?, err?);

    // what a guest wrote last may still be on its way to a client; then it is counted as far as it has come
    let _ = tokio::time::timeout(READ_WITHIN, read).await;
    usage.measure(&end.usage);
    usage.launch_us = launch_us.unwrap_or_else(|| micros(asked));
    usage.input_bytes = flows.input.bytes();
    usage.output_bytes = flows.output.bytes();
    usage.fuel_used = fuel_used(request.plugin.runtime, &request.limits, report.as_ref());
    let longer = usage.output_bytes.max(flows.errors.bytes());
    let outcome = judge(entry, request, &end, report.as_ref(), longer);
    let Content::Memory(stderr_tail) = err.content else { unreachable!("a tail is kept in memory") };
    Ok(End { outcome, usage: *usage, output: out.content.into(), stderr_tail, tenant_io: end.tenant_io })
}

/// The end of a job whose memory limit did not even let its sandbox come to its start.
fn too_small_to_begin(entry: &Entry, request: &JobRequest, end: &SandboxReport, usage: &mut UsageRecord) -> End {
    usage.measure(&end.usage);
    End::without_run(judge(entry, request, end, None, 0), *usage)
}

/// By the limits that held at the end.
fn judge(
    entry: &Entry,
    request: &JobRequest,
    end: &SandboxReport,
    report: Option<&Report>,
    output_bytes: u64,
) -> Outcome {
    let (runtime, limits, stop) = (request.plugin.runtime, &entry.limits(), entry.stop.get().copied());
    Evidence { runtime, limits, end, report, stop, output_bytes }.outcome()
}

/// Collects a stream; a stream that is too long, or cannot be kept, ends the job.
async fn watched(collector: Collector, stream: pipe::Receiver, stop: &impl Fn(Stop)) -> Result<Collected, StreamError> {
    let collected = collector.collect(stream, |allowed| stop(Stop::OutputOver { allowed })).await;
    if collected.is_err() {
        stop(Stop::HostFailed);
    }
    collected
}

/// Copies the input to the job as it arrives. Does not return once the job is to end: its input must not come to an end
/// before that, or it would take what it has for everything.
async fn feed(mut input: Input, mut stdin: pipe::Sender, meter: &Meter) {
    while let Some(chunk) = input.next().await {
        let Ok(chunk) = chunk else {
            meter.input_broken();
            return pending().await;
        };
        if meter.count_input(chunk.len()).is_err() {
            return pending().await;
        }
        if stdin.write_all(&chunk).await.is_err() {
            // the job has closed its input, as `head` does: what comes now is nobody's
            return;
        }
    }
}

/// What the sandbox is to run. A module that was compiled on another engine or machine is compiled again.
async fn runnable(jobs: &Jobs, tenant: &Tenant, plugin: &Plugin, artifact: Artifact) -> Result<File, Fault> {
    let source = match artifact {
        Artifact::Runnable(file) => return Ok(file),
        Artifact::Source(file) => file,
    };
    let (compiler, dir) = (&jobs.0.compiler, jobs.0.store.dir());
    let (made, _) = compiler.compile(dir, tenant, source).await?;
    let file = made.reopen()?;
    let (name, engine) = (tenant.name().clone(), compiler.engine().to_owned());
    if let Err(error) = jobs.0.store.keep_compiled(name, plugin.revision, made, engine).await {
        // this job has its file; the next one tries again
        tracing::warn!(tenant = %tenant.name(), revision = %plugin.revision, %error, "a compiled module was not kept");
    }
    Ok(file)
}

/// Processes of the host's own in the sandbox of a job.
pub(super) fn own_pids(runtime: Runtime) -> u64 {
    kind(runtime).own_pids().into()
}

fn kind(runtime: Runtime) -> Kind {
    match runtime {
        Runtime::Native => Kind::Native,
        Runtime::Wasm => Kind::Wasm,
    }
}

fn spec(request: &JobRequest) -> SandboxSpec {
    SandboxSpec {
        tenant: request.tenant.name().clone(),
        ceiling: request.tenant.ceiling(),
        kind: kind(request.plugin.runtime),
        program: request.plugin.name.clone(),
        artifact: ArtifactId(*request.plugin.revision.bytes()),
        fresh_network: request.tenant.wants_fresh_networks(),
        limits: request.limits.for_sandbox(),
    }
}

/// Arguments, environment and fuel. The job's own variables come last, so that nothing can stand in their place.
fn invocation(entry: &Entry, request: &JobRequest) -> Invocation {
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let mut env: BTreeMap<String, String> = USUAL_ENV.into_iter().map(owned).collect();
    env.extend(request.env.clone());
    let id = entry.id.to_string();
    let own = [&id, entry.tenant.as_str(), entry.plugin.as_str(), &request.content_type];
    env.extend(OWN_ENV.into_iter().zip(own).map(owned));
    let mut args = vec![entry.plugin.to_string()];
    args.extend(request.args.clone());
    let interface = request.plugin.interface.into();
    Invocation { args, env: env.into_iter().collect(), fuel: request.limits.get(Limit::Fuel), interface }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
