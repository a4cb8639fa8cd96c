//! Gives its input back, byte for byte. Streams: it holds no more than a buffer of it.

use std::process::ExitCode;

use holm_sdk::{Job, Result};

fn main() -> ExitCode {
    holm_sdk::command(echo)
}

fn echo(job: &mut Job) -> Result {
    let (input, output) = job.streams();
    std::io::copy(input, output)?;
    Ok(())
}
