//! Native programs: the last step before one is the exec.

use std::ffi::CString;
use std::io;

use nix::errno::Errno;
use nix::unistd::execve;

use crate::invocation::Invocation;

/// Replaces this process by the program at `path`. Returns only if that failed, with the reason.
///
/// The errors that tell of the program and not of the machine are `ENOEXEC` (a header that the kernel refuses),
/// `EACCES`, `ENOMEM` (it does not fit its memory limit) and `E2BIG` (arguments and environment too long).
#[must_use]
pub fn exec(path: &str, invocation: &Invocation) -> io::Error {
    match try_exec(path, invocation) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

fn try_exec(path: &str, invocation: &Invocation) -> io::Result<std::convert::Infallible> {
    let c_string = |text: String| CString::new(text).map_err(|_| io::Error::from(Errno::EINVAL));
    let path = c_string(path.to_owned())?;
    let args: Vec<CString> = invocation.args.iter().cloned().map(c_string).collect::<io::Result<_>>()?;
    let env = invocation.env.iter().map(|(key, value)| c_string(format!("{key}={value}")));
    let env: Vec<CString> = env.collect::<io::Result<_>>()?;
    Ok(execve(&path, &args, &env)?)
}
