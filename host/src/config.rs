//! Configuration: a TOML file, over it the environment (`HOLM_…`), over it the command line.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::limit::{Given, LimitError, Maximums};
use crate::telemetry::LogFormat;

/// All settings of a server, with their defaults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where to listen. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where all data is.
    pub data_dir: PathBuf,
    /// A file that holds the operator's key.
    pub operator_key_file: Option<PathBuf>,
    /// Listen on other than loopback addresses without TLS.
    pub plain_http: bool,
    /// The user that the server runs as; the data directory's owner if not given.
    pub user: Option<String>,
    /// What to log: a level, or directives as `tracing-subscriber` has them.
    pub log: String,
    /// `text` or `json`.
    pub log_format: LogFormat,
    /// Jobs running at once.
    pub jobs_running: usize,
    /// Jobs waiting at once.
    pub jobs_queued: usize,
    /// How long a job may wait.
    pub queue_timeout_ms: u64,
    /// While a job waits for a place, let a running one of a tenant of lower `priority` stand still and lend its own.
    pub freeze_lower_priority: bool,
    /// Connections at once.
    pub connections: usize,
    /// From the first byte of a request to the end of its headers.
    pub header_timeout_ms: u64,
    /// Between the requests of a connection.
    pub idle_timeout_ms: u64,
    /// The least rate at which a client sends a body and takes an answer.
    pub body_bytes_per_second: u64,
    /// Waiting for a client's bytes that is free before the rate counts.
    pub body_grace_ms: u64,
    /// The longest that a body may keep the server waiting.
    pub body_timeout_ms: u64,
    /// How long running jobs may take to end when the server stops.
    pub drain_timeout_ms: u64,
    /// Sandboxes of one plugin that are made ahead and wait for jobs, at most. 0 makes each for its job.
    pub parked_per_plugin: usize,
    /// Sandboxes of all plugins that wait for jobs, at most.
    pub parked_sandboxes: usize,
    /// How long sandboxes wait after their plugin's last job.
    pub parked_idle_ms: u64,
    /// Zygotes, each a process that has one WebAssembly plugin loaded and is what its sandboxes are cloned from, at most.
    pub zygotes: usize,
    /// How long a zygote is kept after its plugin's last job.
    pub zygote_idle_ms: u64,
    /// Memory of the host that should be available. When there is less, nothing is parked, and idle zygotes are ended.
    pub memory_reserve_bytes: u64,
    /// Memory of one compilation.
    pub compile_memory_bytes: u64,
    /// CPU time of one compilation.
    pub compile_cpu_time_ms: u64,
    /// Wall-clock time of one compilation.
    pub compile_wall_time_ms: u64,
    /// Size of one compiled module.
    pub compile_artifact_bytes: u64,
    /// Limits of jobs for which nobody gives any.
    pub job_defaults: Map<String, Value>,
    /// The greatest limits of jobs.
    pub job_maximums: Map<String, Value>,
    /// Where servers on this host agree about uids.
    pub lock_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            data_dir: PathBuf::from("/var/lib/holm"),
            operator_key_file: None,
            plain_http: false,
            user: None,
            log: "info".into(),
            log_format: LogFormat::Text,
            jobs_running: 256,
            jobs_queued: 1024,
            queue_timeout_ms: 10_000,
            freeze_lower_priority: false,
            connections: 4096,
            header_timeout_ms: 10_000,
            idle_timeout_ms: 75_000,
            body_bytes_per_second: 1024,
            body_grace_ms: 10_000,
            body_timeout_ms: 300_000,
            drain_timeout_ms: 10_000,
            parked_per_plugin: 4,
            parked_sandboxes: 64,
            parked_idle_ms: 2000,
            zygotes: 256,
            zygote_idle_ms: 10_000,
            memory_reserve_bytes: 256 << 20,
            compile_memory_bytes: 1 << 30,
            compile_cpu_time_ms: 60_000,
            compile_wall_time_ms: 60_000,
            compile_artifact_bytes: 256 << 20,
            job_defaults: Map::new(),
            job_maximums: Map::new(),
            lock_dir: PathBuf::from(holm_sandbox::uids::LOCK_DIR),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read the configuration `{path}`")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file, or a variable, does not parse.
    #[error("{origin}: {detail}")]
    Parse {
        /// Where it stands.
        origin: String,
        /// What is wrong.
        detail: String,
    },
    /// A value that cannot be.
    #[error("`{key}` is {given}; {demand}")]
    Value {
        /// Which setting.
        key: &'static str,
        /// What was given.
        given: String,
        /// What it must be.
        demand: &'static str,
    },
    /// Default or maximum limits that are wrong.
    #[error("`{key}`: {error}")]
    Limits {
        /// Which of the two.
        key: &'static str,
        /// What is wrong.
        error: LimitError,
    },
    /// An address that all the world could reach, without TLS.
    #[error(
        "`{0}` is not a loopback address, and this version serves no TLS: put a proxy that does in front and let it reach a loopback address, or accept keys and data in the clear with --plain-http"
    )]
    PlainHttp(SocketAddr),
}

/// What the server has open for one job: its channel, three pipes, its artifact, its output; and something to spare.
const FILES_OF_A_JOB: usize = 8;

/// The prefix of the environment's variables.
const PREFIX: &str = "HOLM_";

/// Variables that are not settings.
const NOT_SETTINGS: [&str; 2] = ["HOLM_OPERATOR_KEY", "HOLM_TESTS_ALLOW_SKIP"];

impl Config {
    /// Reads `file`, if there is one, and lays `env` and then `flags` over it: keys as in the file, values as TOML or,
    /// where they are none, as plain text.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(
        file: Option<&Path>,
        env: impl Iterator<Item = (OsString, OsString)>,
        flags: &[(&'static str, toml::Value)],
    ) -> Result<Self, ConfigError> {
        let mut table = match file {
            None => toml::Table::new(),
            Some(path) => {
                let read = std::fs::read_to_string(path);
                let text = read.map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
                let parsed = text.parse::<toml::Table>();
                let origin = path.display().to_string();
                parsed.map_err(|error| ConfigError::Parse { origin, detail: error.to_string() })?
            }
        };
        let mut origin = file.map_or_else(|| "the command line".to_owned(), |path| path.display().to_string());
        for (name, value) in env {
            let Some(name) = name.to_str().filter(|name| !NOT_SETTINGS.contains(name)) else { continue };
            let Some(key) = name.strip_prefix(PREFIX) else { continue };
            let Some(value) = value.to_str() else {
                let (origin, detail) = (name.to_owned(), "it is not UTF-8".to_owned());
                return Err(ConfigError::Parse { origin, detail });
            };
            table.insert(key.to_ascii_lowercase(), plain_or_toml(value));
            origin.push_str(&format!(" and {name}"));
        }
        for (key, value) in flags {
            table.insert((*key).to_owned(), value.clone());
        }
        let config: Self = table
            .try_into()
            .map_err(|error: toml::de::Error| ConfigError::Parse { origin, detail: in_one_line(&error) })?;
        config.check()?;
        Ok(config)
    }

    /// The same on a machine on which this process may have `files` open. Connections have half of them, jobs the other:
    /// a crowd of clients that do nothing must meet the cap of connections before there is nothing to open left, as only
    /// then the idle ones give way.
    #[must_use]
    pub fn within(mut self, files: u64) -> Self {
        let half = usize::try_from(files / 2).unwrap_or(usize::MAX).max(FILES_OF_A_JOB);
        for (key, value, most) in [
            ("connections", &mut self.connections, half),
            ("jobs_running", &mut self.jobs_running, half / FILES_OF_A_JOB),
        ] {
            if *value > most {
                tracing::warn!(files, "`{key}` is {most} and not {value}, as this process may open {files} files");
                *value = most;
            }
        }
        self
    }

    fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            ("jobs_running", self.jobs_running as u64),
            ("jobs_queued", self.jobs_queued as u64),
            ("connections", self.connections as u64),
            ("queue_timeout_ms", self.queue_timeout_ms),
            ("header_timeout_ms", self.header_timeout_ms),
            ("idle_timeout_ms", self.idle_timeout_ms),
            ("body_bytes_per_second", self.body_bytes_per_second),
            ("body_timeout_ms", self.body_timeout_ms),
            ("drain_timeout_ms", self.drain_timeout_ms),
            ("parked_idle_ms", self.parked_idle_ms),
            ("zygotes", self.zygotes as u64),
            ("zygote_idle_ms", self.zygote_idle_ms),
            ("memory_reserve_bytes", self.memory_reserve_bytes),
            ("compile_artifact_bytes", self.compile_artifact_bytes),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Value {
                key,
                given: "0".into(),
                demand: "it must be 1 or more: 0 never means unlimited",
            });
        }
        self.check_compilation()?;
        let limits = |key| move |error| ConfigError::Limits { key, error };
        let maximums = Given::read(&self.job_maximums, None, &Maximums::default()).map_err(limits("job_maximums"))?;
        let maximums = Maximums::least_of(vec![maximums]);
        Given::read(&self.job_defaults, None, &maximums).map_err(limits("job_defaults"))?;
        if !self.listen.ip().is_loopback() && !self.plain_http {
            return Err(ConfigError::PlainHttp(self.listen));
        }
        Ok(())
    }

    /// A compilation is a sandbox as any other: its limits have the sandbox's ranges.
    fn check_compilation(&self) -> Result<(), ConfigError> {
        use holm_sandbox::limits::Limits;
        let time = |ms| Limits::TIME.contains(&Duration::from_millis(ms));
        let demand = "it must be 10 to 3,600,000";
        for (key, value) in
            [("compile_cpu_time_ms", self.compile_cpu_time_ms), ("compile_wall_time_ms", self.compile_wall_time_ms)]
        {
            if !time(value) {
                return Err(ConfigError::Value { key, given: value.to_string(), demand });
            }
        }
        if !Limits::MEMORY_BYTES.contains(&self.compile_memory_bytes) {
            let (key, given) = ("compile_memory_bytes", self.compile_memory_bytes.to_string());
            return Err(ConfigError::Value { key, given, demand: "it must be 4 MiB to 4 GiB" });
        }
        Ok(())
    }
}

/// The library's words, which come in lines.
fn in_one_line(error: &toml::de::Error) -> String {
    error.to_string().trim_end().replace('\n', " ")
}

/// A value that parses as TOML is that; everything else is the text itself.
fn plain_or_toml(text: &str) -> toml::Value {
    let parsed = format!("x = {text}").parse::<toml::Table>();
    parsed.ok().and_then(|mut table| table.remove("x")).unwrap_or_else(|| toml::Value::String(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(toml: &str, env: &[(&str, &str)], flags: &[(&'static str, toml::Value)]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("holm.toml");
        std::fs::write(&path, toml).unwrap();
        let env = env.iter().map(|(k, v)| (OsString::from(k), OsString::from(v)));
        Config::load(Some(&path), env, flags)
    }

    #[test]
    fn flags_beat_the_environment_and_that_beats_the_file() {
        let file = "listen = '127.0.0.1:1'\njobs_running = 1\njobs_queued = 1\n[job_defaults]\npids = 7\n";
        let env =
            [("HOLM_LISTEN", "127.0.0.1:2"), ("HOLM_JOBS_RUNNING", "2"), ("HOLM_OPERATOR_KEY", "x"), ("PATH", "y")];
        let config = load(file, &env, &[("listen", toml::Value::String("127.0.0.1:3".into()))]).unwrap();
        assert_eq!((config.listen.port(), config.jobs_running, config.jobs_queued), (3, 2, 1));
        assert_eq!(config.job_defaults["pids"], 7);
        assert_eq!(config.connections, 4096);
    }

    #[test]
    fn few_open_files_are_divided() {
        let config = Config::default().within(20_000);
        assert_eq!((config.connections, config.jobs_running), (4096, 256));
        let config = Config::default().within(1024);
        assert_eq!((config.connections, config.jobs_running), (512, 64));
        let config = Config::default().within(0);
        assert_eq!((config.connections, config.jobs_running), (8, 1));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (toml, word) in [
            ("jobs_runing = 1", "jobs_runing"),
            ("jobs_running = 'many'", "jobs_running"),
            ("jobs_running = -1", "jobs_running"),
            ("jobs_running = 0", "jobs_running"),
            ("compile_memory_bytes = 1", "compile_memory_bytes"),
            ("compile_wall_time_ms = 1", "compile_wall_time_ms"),
            ("[job_maximums]\npids = 0", "job_maximums"),
            ("[job_maximums]\npids = 5\n[job_defaults]\npids = 6", "job_defaults"),
            ("[[[", "holm.toml"),
        ] {
            let error = load(toml, &[], &[]).unwrap_err().to_string();
            assert!(error.contains(word), "{toml}: {error}");
        }
        assert!(matches!(load("", &[("HOLM_JOBS_RUNNING", "0")], &[]), Err(ConfigError::Value { .. })));
    }

    #[test]
    fn the_world_is_not_served_in_the_clear_by_accident() {
        let open = "listen = '0.0.0.0:80'";
        assert!(matches!(load(open, &[], &[]), Err(ConfigError::PlainHttp(_))));
        assert!(load(open, &[("HOLM_PLAIN_HTTP", "true")], &[]).is_ok());
        assert!(load("listen = '[::1]:80'", &[], &[]).is_ok());
    }
}
