//! Compilation: a job of its own, in a sandbox of its tenant, under limits that the server sets.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::time::Duration;

use holm_runtime::invocation::{Exports, Invocation, Report};
use holm_sandbox::limits::Limits;
use holm_sandbox::name::Name;
use holm_sandbox::spec::{ArtifactId, Kind, SandboxSpec};
use holm_sandbox::usage::{KillCause, SandboxReport};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;

use crate::admission::{Admission, AdmissionError, Allowance, Capacity};
use crate::launcher::{Launcher, SandboxError, Stdio};
use crate::store::{DataDir, TempFile};
use crate::tenant::Tenant;

/// What one compilation may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompileLimits {
    /// Memory.
    pub memory_bytes: u64,
    /// CPU time of all compiler threads.
    pub cpu_time: Duration,
    /// Wall-clock time.
    pub wall_time: Duration,
    /// Size of the compiled form.
    pub artifact_bytes: u64,
}

/// Threads of one compilation, more than hosts have CPUs for.
const PIDS: u32 = 256;

/// A compilation that gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The module is not valid or does not link: what and where.
    #[error("{0}")]
    Invalid(String),
    /// It would take more than is allowed.
    #[error("compiling it takes more than {0}")]
    OverLimit(String),
    /// Too much is being compiled already, by this tenant or by all.
    #[error("no place to compile in: {0}")]
    Busy(AdmissionError),
    /// The host's own fault.
    #[error("compile")]
    Host(#[source] anyhow::Error),
}

/// Runs compilations, a bounded number at once.
#[derive(Debug)]
pub struct Compiler {
    launcher: Launcher,
    limits: CompileLimits,
    admission: Admission,
    engine: String,
    millicores: u32,
    stop: CancellationToken,
}

/// Compilations of one tenant: one at a time, so that a tenant who uploads what takes for ever to compile keeps only
/// itself waiting.
const ALLOWANCE: Allowance = Allowance { running: 1, waiting: 16, pids: 0 };

/// Compilations at once for each CPU. More than one, as not every one that runs is of somebody who is in a hurry.
const RUNNING_PER_CPU: usize = 2;

/// Uploads that may wait for their compilation. Each holds a connection and a temporary file.
const MAX_WAITING: usize = 256;

/// How long an upload may wait: twice what the largest modules seen take to compile on two CPUs.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(20);

impl Compiler {
    /// `engine` is the fingerprint of this server's WebAssembly engine.
    #[must_use]
    pub fn new(launcher: Launcher, limits: CompileLimits, engine: String) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            launcher,
            limits,
            admission: Admission::new(Capacity {
                jobs_running: cpus * RUNNING_PER_CPU,
                pids: u64::MAX,
                jobs_queued: MAX_WAITING,
                queue_timeout: QUEUE_TIMEOUT,
            }),
            engine,
            millicores: u32::try_from(cpus * 1000).unwrap_or(u32::MAX),
            stop: CancellationToken::new(),
        }
    }

    /// The fingerprint of the engine that artifacts are made for.
    #[must_use]
    pub fn engine(&self) -> &str {
        &self.engine
    }

    /// Compiles `source` for `tenant` into a temporary file, and tells how the artifact can be called.
    ///
    /// # Errors
    /// See [`CompileError`].
    pub async fn compile(
        &self,
        dir: &DataDir,
        tenant: &Tenant,
        source: File,
    ) -> Result<(TempFile, Exports), CompileError> {
        let _permit = self.admission.admit_within(tenant, ALLOWANCE, 0).await.map_err(CompileError::Busy)?;
        let out = TempFile::make(dir).map_err(|error| CompileError::Host(error.into()))?;
        tokio::select! {
            made = self.run(tenant, source, &out) => {
                let exports = made?;
                out.finish().map_err(|error| CompileError::Host(error.into()))?;
                Ok((out, exports))
            }
            () = self.stop.cancelled() => Err(CompileError::Busy(AdmissionError::Draining)),
        }
    }

    /// Lets no compilation of a tenant begin, or lets them again.
    pub fn pause(&self, tenant: &Name, paused: bool) {
        self.admission.pause(tenant, paused);
    }

    /// Forgets a deleted tenant.
    pub fn forget(&self, tenant: &Name) {
        self.admission.forget(tenant);
    }

    /// Ends every compilation because the server stops.
    pub fn end_all(&self) {
        self.admission.drain();
        self.stop.cancel();
    }

    async fn run(&self, tenant: &Tenant, source: File, out: &TempFile) -> Result<Exports, CompileError> {
        let host = |error: anyhow::Error| CompileError::Host(error);
        let sandbox = |error: SandboxError| CompileError::Host(error.into());
        let mut running = self.launcher.launch(self.spec(tenant), source).map_err(sandbox)?;
        running.ready().await.map_err(sandbox)?;
        let Stdio { stdout, theirs: [_, theirs, _], .. } = Stdio::make().map_err(|error| host(error.into()))?;
        let null = || OpenOptions::new().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let (stdin, stderr) = (null().map_err(|e| host(e.into()))?, null().map_err(|e| host(e.into()))?);
        running.give(&Invocation::default(), [stdin, theirs, stderr]).map_err(sandbox)?;

        let killer = running.killer();
        let copy = copy_up_to(stdout, out.file(), self.limits.artifact_bytes, || killer.kill());
        let (copied, ended) = tokio::join!(copy, running.run(|| {}));
        let (report, end) = ended.map_err(sandbox)?;
        let written = copied.map_err(|error| host(error.into()))?;
        self.verdict(end, report, written)
    }

    fn spec(&self, tenant: &Tenant) -> SandboxSpec {
        let limits = Limits {
            memory_bytes: self.limits.memory_bytes,
            cpu_millicores: self.millicores,
            cpu_weight: 100,
            cpu_time: self.limits.cpu_time,
            wall_time: self.limits.wall_time,
            pids: PIDS,
            scratch_bytes: *Limits::SCRATCH_BYTES.start(),
            scratch_inodes: *Limits::SCRATCH_INODES.start(),
            open_files: 64,
            stack_bytes: 8 << 20,
        };
        let program = COMPILER.parse().unwrap_or_else(|_| unreachable!("`{COMPILER}` is a name"));
        SandboxSpec {
            tenant: tenant.name().clone(),
            ceiling: tenant.ceiling(),
            kind: Kind::Compile,
            program,
            // each has a sandbox to itself
            artifact: ArtifactId([0; 32]),
            fresh_network: true,
            limits,
        }
    }

    fn verdict(&self, end: SandboxReport, report: Option<Report>, written: u64) -> Result<Exports, CompileError> {
        let over = |what: String| Err(CompileError::OverLimit(what));
        if written > self.limits.artifact_bytes {
            return over(format!("{} bytes of compiled code", self.limits.artifact_bytes));
        }
        match (end.killed, report) {
            (Some(KillCause::Memory), _) => over(format!("{} bytes of memory", self.limits.memory_bytes)),
            (Some(KillCause::WallTime), _) => over(format!("{:?}", self.limits.wall_time)),
            (Some(KillCause::CpuTime), _) => over(format!("{:?} of CPU time", self.limits.cpu_time)),
            (None, Some(Report::Compiled { bytes, exports })) if bytes == written => Ok(exports),
            (None, Some(Report::Invalid(why))) => Err(CompileError::Invalid(why)),
            // the compiler itself broke on these bytes: the tenant's module is at fault as far as the tenant can tell
            (None | Some(KillCause::Outside), None) => {
                Err(CompileError::Invalid(format!("the compiler failed on this module ({:?})", end.exit)))
            }
            (killed, report) => Err(CompileError::Host(anyhow::anyhow!("killed {killed:?}, reported {report:?}"))),
        }
    }
}

/// The program's name in the sandbox's specification.
const COMPILER: &str = "compiler";

/// Copies a stream into a file. Beyond `limit` it calls `over` once and drops the rest. Gives the bytes that came.
async fn copy_up_to(mut stream: pipe::Receiver, file: &File, limit: u64, over: impl FnOnce()) -> std::io::Result<u64> {
    let mut file = tokio::fs::File::from_std(file.try_clone()?);
    let kept = tokio::io::copy(&mut tokio::io::AsyncReadExt::take(&mut stream, limit), &mut file).await?;
    file.flush().await?;
    let mut file = file.into_std().await;
    file.seek(SeekFrom::Start(0))?;
    if kept < limit {
        return Ok(kept);
    }
    let mut over = Some(over);
    let mut more = [0; 4096];
    let mut beyond = 0;
    loop {
        match tokio::io::AsyncReadExt::read(&mut stream, &mut more).await? {
            0 => return Ok(kept + beyond),
            n => {
                beyond += n as u64;
                if let Some(over) = over.take() {
                    over();
                }
            }
        }
    }
}
