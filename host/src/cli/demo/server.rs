//! The throw-away server of the demo: this same program as a child, on a free port, with a data directory of its own.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use holm_sandbox::cgroup::Plan;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use ureq::Agent;

use crate::tenant::Key;

/// How long the server may take to begin and to end.
const PATIENCE: Duration = Duration::from_secs(15);

/// A running server and the operator's key for it. Stopped when dropped.
pub(super) struct Server {
    child: Child,
    directory: PathBuf,
    url: String,
    key: String,
    agent: Agent,
    _stdout: BufReader<ChildStdout>,
}

/// An answer.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

impl Answer {
    pub(super) fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| String::from_utf8_lossy(&self.body).into_owned())
    }
}

impl Server {
    pub(super) fn start() -> anyhow::Result<Self> {
        let key = Key::generate()?.reveal().to_owned();
        let directory = std::env::temp_dir().join(format!("holm-demo-{}", std::process::id()));
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(&directory)
            .env("HOLM_OPERATOR_KEY", &key)
            .env("HOLM_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the server")?;
        let stdout = child.stdout.take().ok_or_else(|| anyhow!("the server has no output"))?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let Some(url) = line.trim().strip_prefix("listening on ").map(str::to_owned) else {
            let status = child.wait()?;
            bail!("the server did not start ({status}); `holm doctor` tells why");
        };
        // statuses are answers here, not errors
        let agent = Agent::config_builder().http_status_as_error(false).build().into();
        Ok(Self { child, directory, url, key, agent, _stdout: stdout })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Sends a request with the operator's key.
    pub(super) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> anyhow::Result<Answer> {
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("Authorization", format!("Bearer {}", self.key));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = self.agent.run(request.body(body)?).with_context(|| format!("{method} {path}"))?;
        let mut body = Vec::new();
        response.body_mut().as_reader().read_to_end(&mut body)?;
        Ok(Answer { status: response.status().as_u16(), body })
    }

    /// Stops it as an operator would, and looks that it left nothing behind. Gives the time that stopping took.
    pub(super) fn stop(mut self) -> anyhow::Result<Duration> {
        let instance = fs::read_to_string(self.directory.join("instance")).context("read the instance's id")?;
        let begun = Instant::now();
        self.terminate()?;
        let took = begun.elapsed();
        for dir in Plan::for_this_process()?.describe().into_values() {
            let left = PathBuf::from(dir).join(format!("holm-{instance}"));
            if left.exists() {
                bail!("the server left the cgroup `{}` behind", left.display());
            }
        }
        fs::remove_dir_all(&self.directory).context("remove the data directory")?;
        Ok(took)
    }

    fn terminate(&mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the server ended with {status}"),
                None if Instant::now() > deadline => bail!("the server does not stop"),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.terminate();
        }
        let _ = fs::remove_dir_all(&self.directory).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        });
    }
}
