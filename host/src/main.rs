//! The `holm` program. It is its own launcher: started under another name, it becomes that.

#![forbid(unsafe_code)]

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: holm_sandbox::Allocator = holm_sandbox::Allocator;

fn main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|name| name == holm::inside::LAUNCHER) {
        return ExitCode::from(u8::try_from(holm::inside::launcher_main()).unwrap_or(u8::MAX));
    }
    holm::cli::main()
}
