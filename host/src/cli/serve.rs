//! `holm serve`: from a machine that has been checked to a server that has given up every privilege, and back.

use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use holm_sandbox::launcher::spawn;
use holm_sandbox::probe::{self, Check, Status};
use holm_sandbox::protocol::{LauncherConfig, ToLauncher, VERSION};
use holm_sandbox::wire::Packets;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::privilege::{Identity, make_data_dir, raise_open_files};
use super::{EX_CONFIG, EX_OSERR, EX_SOFTWARE, EX_UNAVAILABLE, Fatal, OrExit};
use crate::admission::{Admission, Capacity};
use crate::config::Config;
use crate::inside::LAUNCHER;
use crate::job::Jobs;
use crate::launcher::{Launcher, LauncherGone, Parking, ParkingRules};
use crate::limit::Given;
use crate::server::{App, AppParts, ConnectionRules, Crowd, PaceRule, serve};
use crate::store::{DataDir, DataDirError, Store};
use crate::telemetry;
use crate::tenant::{Key, OperatorKey};
use crate::upload::{CompileLimits, Compiler};

/// How long the launcher may take to end once the server has let go of it.
const LAUNCHER_PATIENCE: Duration = Duration::from_secs(5);

/// How long jobs that have been killed may take to be over.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// The environment variable with the operator's key.
const OPERATOR_KEY: &str = "HOLM_OPERATOR_KEY";

/// A server that is ready to run: all that needed privilege has been done.
struct Ready {
    config: Config,
    dir: DataDir,
    operator: OperatorKey,
    listener: TcpListener,
    launcher: Packets,
    child: Child,
    engine: String,
}

/// Runs the server until it is told to stop. Gives the exit code.
pub(super) fn run(config: Config) -> Result<u8, Fatal> {
    telemetry::start(&config.log, config.log_format).or_exit(EX_CONFIG)?;
    let ready = prepare(config)?;
    // only now are there threads: what has been given up before is given up by all of them
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(worker_threads()).enable_all().build().or_exit(EX_OSERR)?;
    let code = runtime.block_on(live(ready))?;
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(code)
}

/// Half of the CPUs: the jobs need some too, and what one thread hands to another it has to wake first. On 2 CPUs one thread
/// instead of two takes a quarter less CPU time for each job.
fn worker_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get().div_ceil(2))
}

/// Everything that needs privilege, then its end. One thread until here.
fn prepare(config: Config) -> Result<Ready, Fatal> {
    check_machine(&config.lock_dir)?;
    let path = make_data_dir(&config.data_dir).or_exit(EX_OSERR)?;
    let identity = Identity::choose(config.user.as_deref(), &path).or_exit(EX_CONFIG)?;
    let dir = DataDir::hold(&path).map_err(|error| {
        let code = if matches!(error, DataDirError::Held(_)) { EX_UNAVAILABLE } else { EX_OSERR };
        Fatal { code, error: error.into() }
    })?;
    let operator = operator_key(&config, &dir).or_exit(EX_CONFIG)?;
    let listener = TcpListener::bind(config.listen)
        .with_context(|| format!("listen on {}; give another address with --listen", config.listen));
    let listener = listener.or_exit(EX_UNAVAILABLE)?;
    let (launcher, child) = start_launcher(launcher_config(&config, &dir)).or_exit(EX_UNAVAILABLE)?;
    probe::trial(&launcher)
        .context("a trial sandbox could not be isolated; `holm doctor` tells more")
        .or_exit(EX_UNAVAILABLE)?;
    let engine = holm_runtime::wasm::fingerprint().or_exit(EX_SOFTWARE)?;
    let config = config.within(raise_open_files());
    identity.take_over(&path).or_exit(EX_OSERR)?;
    identity.assume(&path).context("give up privilege").or_exit(EX_OSERR)?;
    Ok(Ready { config, dir, operator, listener, launcher, child, engine })
}

/// Refuses a machine that cannot isolate jobs, naming everything that is missing at once.
fn check_machine(lock_dir: &Path) -> Result<(), Fatal> {
    let failed: Vec<Check> =
        probe::machine(lock_dir).into_iter().filter(|check| check.status == Status::Fail).collect();
    if failed.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        failed.iter().map(|c| format!("\n  {}: {}\n      mend: {}", c.name, c.found, c.mend)).collect();
    let error = anyhow!("this machine cannot isolate jobs, so nothing is served:{}", lines.concat());
    Err(Fatal { code: EX_UNAVAILABLE, error })
}

/// What the launcher has to know of the server's configuration.
pub(super) fn launcher_config(config: &Config, dir: &DataDir) -> LauncherConfig {
    LauncherConfig {
        version: VERSION,
        instance: dir.instance().clone(),
        lock_dir: config.lock_dir.clone(),
        ahead: true,
        preferred: true,
        zygotes: config.zygotes,
        zygote_idle: Duration::from_millis(config.zygote_idle_ms),
        memory_reserve: config.memory_reserve_bytes,
    }
}

/// Spawns the launcher and waits until it is up.
pub(super) fn start_launcher(config: LauncherConfig) -> anyhow::Result<(Packets, Child)> {
    let (packets, child) = spawn(LAUNCHER).context("start the launcher")?;
    packets.send(&ToLauncher::Configure(config), &[] as &[OwnedFd]).context("configure the launcher")?;
    let version = probe::wait_up(&packets)?;
    tracing::debug!(cgroups = version, "launcher up");
    Ok((packets, child))
}

/// The operator's key: from the environment, from the file that the configuration names, or one that the first start
/// makes.
fn operator_key(config: &Config, dir: &DataDir) -> anyhow::Result<OperatorKey> {
    if let Ok(key) = std::env::var(OPERATOR_KEY) {
        return OperatorKey::new(&key).with_context(|| format!("take the key in {OPERATOR_KEY}"));
    }
    if let Some(path) = &config.operator_key_file {
        return read_key(path);
    }
    let path = dir.operator_key();
    if !path.exists() {
        let key = Key::generate()?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(key.reveal().as_bytes())?;
        file.sync_all()?;
        tracing::info!(path = %path.display(), "made an operator key");
    }
    read_key(&path)
}

fn read_key(path: &Path) -> anyhow::Result<OperatorKey> {
    let text = fs::read_to_string(path).with_context(|| format!("read the operator key `{}`", path.display()))?;
    OperatorKey::new(text.trim()).with_context(|| format!("take the operator key in `{}`", path.display()))
}

/// Serves until a signal or the launcher's end, then stops in order.
async fn live(ready: Ready) -> Result<u8, Fatal> {
    let Ready { config, dir, operator, listener, launcher, child, engine } = ready;
    let mut signals = Signals::listen().or_exit(EX_OSERR)?;
    let (launcher, driver) = Launcher::connect(launcher).or_exit(EX_OSERR)?;
    let mut driver = tokio::spawn(driver);
    listener.set_nonblocking(true).or_exit(EX_OSERR)?;
    let listener = tokio::net::TcpListener::from_std(listener).or_exit(EX_OSERR)?;
    let address = listener.local_addr().or_exit(EX_OSERR)?;
    let app = assemble(&config, dir, operator, launcher, engine).or_exit(EX_OSERR)?;
    pause_again(&app).await.or_exit(EX_OSERR)?;
    tokio::spawn(app.jobs.clone().keep_accounts());
    tokio::spawn(app.jobs.clone().keep_memory());

    let stop = CancellationToken::new();
    let mut serving = tokio::spawn(serve(listener, app.clone(), stop.clone()));
    announce(&format!("listening on http://{address}")).or_exit(EX_OSERR)?;
    let mut code = 0;
    tokio::select! {
        () = signals.stop() => tracing::info!("stopping"),
        gone = &mut driver => {
            complain_of(gone.ok().as_ref());
            code = EX_SOFTWARE;
        }
        served = &mut serving => {
            tracing::error!(error = ?served.map(Result::err), "the listener failed");
            code = EX_OSERR;
        }
    }
    drain(&app, &config, &mut signals, &stop, &mut serving).await;
    if let Err(error) = app.jobs.settle_accounts().await {
        tracing::error!(%error, "what the last jobs have used was not written down");
        code = EX_SOFTWARE;
    }
    drop(app);
    serving.abort();
    driver.abort();
    over(&mut driver).await; // its end closes the launcher's socket
    match end_launcher(child).await {
        Some(status) if status.success() || code != 0 => {}
        status => {
            tracing::error!(?status, "the launcher did not end in order");
            code = EX_SOFTWARE;
        }
    }
    Ok(code)
}

fn assemble(
    config: &Config,
    dir: DataDir,
    operator: OperatorKey,
    launcher: Launcher,
    engine: String,
) -> anyhow::Result<App> {
    let pid_max = fs::read_to_string("/proc/sys/kernel/pid_max").ok().and_then(|text| text.trim().parse().ok());
    let store = Store::open(dir).context("open the store")?;
    let capacity = capacity(config, pid_max.unwrap_or(LEAST_PID_MAX));
    let (admission, loans) = match config.freeze_lower_priority {
        true => {
            let (admission, loans) = Admission::with_loans(capacity);
            (admission, Some(loans))
        }
        false => (Admission::new(capacity), None),
    };
    let compiler = Arc::new(Compiler::new(launcher.clone(), compile_limits(config), engine));
    let jobs = Jobs::new(
        admission.clone(),
        Parking::new(launcher.clone(), parking_rules(config)),
        compiler.clone(),
        store.clone(),
    );
    if let Some(loans) = loans {
        tokio::spawn(jobs.clone().serve_loans(loans));
    }
    Ok(App::new(AppParts {
        store,
        jobs,
        admission,
        launcher,
        compiler,
        operator,
        job_defaults: Given::from_stored(&config.job_defaults),
        job_maximums: Given::from_stored(&config.job_maximums),
        connections: connection_rules(config),
        requests: Crowd::default(),
        uploads: Crowd::default(),
        tenant_changes: tokio::sync::Mutex::default(),
        draining: AtomicBool::new(false),
    }))
}

/// Tenants that were paused when the last server ended are so from the first.
async fn pause_again(app: &App) -> anyhow::Result<()> {
    for tenant in app.store.tenants().iter().filter(|tenant| app.store.is_paused(&tenant.name)) {
        let paused = app.jobs.pause_tenant(&app.launcher, &tenant.name, true).await;
        paused.with_context(|| format!("pause the tenant `{}` again", tenant.name))?;
    }
    Ok(())
}

/// What the configuration allows at once, on a host with so many pids.
fn capacity(config: &Config, pid_max: u64) -> Capacity {
    Capacity {
        jobs_running: config.jobs_running,
        pids: pid_max.saturating_sub(PID_RESERVE),
        jobs_queued: config.jobs_queued,
        queue_timeout: Duration::from_millis(config.queue_timeout_ms),
    }
}

fn parking_rules(config: &Config) -> ParkingRules {
    ParkingRules {
        per_plugin: config.parked_per_plugin,
        in_all: config.parked_sandboxes,
        idle: Duration::from_millis(config.parked_idle_ms),
    }
}

fn connection_rules(config: &Config) -> ConnectionRules {
    let pace = PaceRule {
        grace: Duration::from_millis(config.body_grace_ms),
        bytes_per_second: config.body_bytes_per_second,
        most: Duration::from_millis(config.body_timeout_ms),
    };
    ConnectionRules {
        most: config.connections,
        header_timeout: Duration::from_millis(config.header_timeout_ms),
        idle_timeout: Duration::from_millis(config.idle_timeout_ms),
        reading: pace,
        writing: pace,
    }
}

fn compile_limits(config: &Config) -> CompileLimits {
    CompileLimits {
        memory_bytes: config.compile_memory_bytes,
        cpu_time: Duration::from_millis(config.compile_cpu_time_ms),
        wall_time: Duration::from_millis(config.compile_wall_time_ms),
        artifact_bytes: config.compile_artifact_bytes,
    }
}

/// Pids that are kept for everything else on the host, and for compilations.
const PID_RESERVE: u64 = 4096;

/// What every kernel has (`PID_MAX_DEFAULT`).
const LEAST_PID_MAX: u64 = 32_768;

/// Turns new jobs away, and lets those that run and the other requests that are under way end, for as long as the
/// configuration says or until told again; then ends them. New clients are answered as long as there is a job: a
/// refusal tells them more than a closed port.
async fn drain<T>(
    app: &App,
    config: &Config,
    signals: &mut Signals,
    stop: &CancellationToken,
    serving: &mut JoinHandle<T>,
) {
    app.draining.store(true, Ordering::Relaxed);
    app.admission.drain();
    let patience = Duration::from_millis(config.drain_timeout_ms);
    let in_order = async {
        app.jobs.idle().await;
        stop.cancel();
        over(serving).await;
    };
    tokio::select! {
        () = in_order => return,
        () = tokio::time::sleep(patience) => tracing::warn!("jobs or uploads are still under way; they are ended"),
        () = signals.stop() => tracing::warn!("told to stop again; what is under way is ended"),
    }
    app.jobs.end_all();
    app.compiler.end_all();
    if tokio::time::timeout(KILL_PATIENCE, app.jobs.idle()).await.is_err() {
        tracing::error!("some jobs did not end; the launcher will see to them");
    }
    stop.cancel();
    // the answers that these ends have caused
    let _ = tokio::time::timeout(Duration::from_secs(1), over(serving)).await;
}

/// Waits for a task's end, which may have been seen before.
async fn over<T>(task: &mut JoinHandle<T>) {
    if !task.is_finished() {
        let _ = task.await;
    }
}

fn complain_of(gone: Option<&LauncherGone>) {
    let error = gone.and_then(std::error::Error::source).map(ToString::to_string);
    tracing::error!(error, "the launcher is gone, and every job with it; the server stops");
}

/// Waits for the launcher's end. `None` if it takes too long.
async fn end_launcher(mut child: Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + LAUNCHER_PATIENCE;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(_) => return None,
        }
    }
    None
}

/// The first line on standard output, for whoever started us.
#[allow(clippy::print_stdout)]
fn announce(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// A byte for each order to stop.
struct Signals(UnixStream);

impl Signals {
    fn listen() -> io::Result<Self> {
        let (orders, told) = std::os::unix::net::UnixStream::pair()?;
        pipe::register(SIGTERM, told.try_clone()?)?;
        pipe::register(SIGINT, told)?;
        orders.set_nonblocking(true)?;
        Ok(Self(UnixStream::from_std(orders)?))
    }

    /// Waits for the next order to stop.
    async fn stop(&mut self) {
        // those that have come together are one order; the other end is open for as long as this process
        if self.0.read(&mut [0; 64]).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
