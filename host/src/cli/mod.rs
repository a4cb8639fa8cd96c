//! The command line.

mod demo;
mod doctor;
mod privilege;
mod serve;

use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, ConfigError};

/// Functions of many tenants, each job in a process of its own.
#[derive(Debug, Parser)]
#[command(name = "holm", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server
    Serve(Settings),
    /// Start a throw-away server, run jobs on it over HTTP, show what they use and what each limit does
    Demo,
    /// Tell what this machine can and cannot do, and how to mend it
    Doctor(doctor::DoctorArgs),
}

/// Settings that can stand on the command line.
#[derive(Debug, Args)]
struct Settings {
    /// Configuration file, TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where all data is [default: /var/lib/holm]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where to listen; port 0 takes a free one [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// The user that the server runs as [default: the owner of the data directory]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Listen on other than loopback addresses without TLS
    #[arg(long)]
    plain_http: bool,
}

impl Settings {
    fn load(&self) -> Result<Config, ConfigError> {
        let text = |text: String| toml::Value::String(text);
        let mut flags = Vec::new();
        flags.extend(self.data_dir.as_ref().map(|dir| ("data_dir", text(dir.to_string_lossy().into_owned()))));
        flags.extend(self.listen.map(|listen| ("listen", text(listen.to_string()))));
        flags.extend(self.user.clone().map(|user| ("user", text(user))));
        flags.extend(self.plain_http.then_some(("plain_http", toml::Value::Boolean(true))));
        Config::load(self.config.as_deref(), std::env::vars_os(), &flags)
    }
}

/// An error that ends the program, with the exit code of `sysexits.h` that fits it.
#[derive(Debug)]
struct Fatal {
    code: u8,
    error: anyhow::Error,
}

/// The command line is wrong.
const EX_USAGE: u8 = 64;
/// This machine cannot do what is needed.
const EX_UNAVAILABLE: u8 = 69;
/// Something inside failed.
const EX_SOFTWARE: u8 = 70;
/// The operating system refused something.
const EX_OSERR: u8 = 71;
/// The configuration is wrong.
const EX_CONFIG: u8 = 78;

/// Gives an error an exit code.
trait OrExit<T> {
    fn or_exit(self, code: u8) -> Result<T, Fatal>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, code: u8) -> Result<T, Fatal> {
        self.map_err(|error| Fatal { code, error: error.into() })
    }
}

/// Runs the program. Its errors go to standard error, a line each.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // also the text of `--help`, which is no error
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EX_USAGE } else { 0 });
        }
    };
    let result = match cli.command {
        Command::Serve(settings) => settings.load().or_exit(EX_CONFIG).and_then(serve::run),
        Command::Demo => demo::run(),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(Fatal { code, error }) => {
            complain(&error);
            ExitCode::from(code)
        }
    }
}

#[allow(clippy::print_stderr)] // there may be no log yet
fn complain(error: &anyhow::Error) {
    let mut line = error.to_string();
    let mut source: Option<&(dyn Error + 'static)> = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    eprintln!("holm: {line}");
}
