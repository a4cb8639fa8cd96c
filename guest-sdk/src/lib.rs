//! What a plugin author writes against. The same source builds to WebAssembly and to a static native program.
//!
//! A command is a function from a job's input to its output:
//!
//! ```no_run
//! use std::io::{Read, Write};
//! use std::process::ExitCode;
//!
//! use holm_sdk::{Job, Result};
//!
//! fn main() -> ExitCode {
//!     holm_sdk::command(shout)
//! }
//!
//! fn shout(job: &mut Job) -> Result {
//!     let mut text = String::new();
//!     job.input().read_to_string(&mut text)?;
//!     job.output().write_all(text.to_uppercase().as_bytes())?;
//!     Ok(())
//! }
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::error::Error;
use std::io::{self, BufReader, BufWriter, StdinLock, StdoutLock, Write};
use std::process::ExitCode;

/// What a command gives: nothing, or any error. The error's text goes to standard error, and the job exits with 1.
pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// One job: its input, its output, and what it was called with.
#[derive(Debug)]
pub struct Job {
    args: Vec<String>,
    input: BufReader<StdinLock<'static>>,
    output: BufWriter<StdoutLock<'static>>,
}

impl Job {
    /// The body of the request that started the job. Streams: it may still be arriving.
    pub fn input(&mut self) -> &mut BufReader<StdinLock<'static>> {
        &mut self.input
    }

    /// The answer's body, if the job ends with success. Flushed at the end.
    pub fn output(&mut self) -> &mut BufWriter<StdoutLock<'static>> {
        &mut self.output
    }

    /// Input and output at once, for code that reads while it writes.
    pub fn streams(&mut self) -> (&mut BufReader<StdinLock<'static>>, &mut BufWriter<StdoutLock<'static>>) {
        (&mut self.input, &mut self.output)
    }

    /// The arguments, without the plugin's own name.
    #[must_use]
    pub fn args(&self) -> &[String] {
        &self.args
    }

    /// The job's id, a UUID. Empty outside of Holm.
    #[must_use]
    pub fn id(&self) -> String {
        variable("HOLM_JOB_ID")
    }

    /// The tenant whose job it is. Empty outside of Holm.
    #[must_use]
    pub fn tenant(&self) -> String {
        variable("HOLM_TENANT")
    }

    /// The name under which the plugin was uploaded. Empty outside of Holm.
    #[must_use]
    pub fn plugin(&self) -> String {
        variable("HOLM_PLUGIN")
    }

    /// The request's `Content-Type`. Empty if it had none.
    #[must_use]
    pub fn content_type(&self) -> String {
        variable("HOLM_CONTENT_TYPE")
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// Runs `command` as this program's one job. Return its value from `main`.
pub fn command(command: impl FnOnce(&mut Job) -> Result) -> ExitCode {
    let mut job = Job {
        args: std::env::args().skip(1).collect(),
        input: BufReader::new(io::stdin().lock()),
        output: BufWriter::new(io::stdout().lock()),
    };
    let result = command(&mut job).and_then(|()| Ok(job.output.flush()?));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // standard error is all that is left to tell it; there is nobody to tell if that fails
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
