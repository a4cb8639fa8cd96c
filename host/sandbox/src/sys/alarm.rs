//! An end to system calls that a signal interrupts, and nothing else would.

use std::time::Duration;

use super::check;

/// Does nothing: that it is there is what keeps the signal from ending the process.
extern "C" fn wake(_: libc::c_int) {}

/// Runs `work`, in which a system call that is interrupted by signals fails with `EINTR` once `time` is over. A call
/// that begins later fails as well: the alarm rings again and again until this returns.
///
/// # Errors
/// The alarm cannot be set; then `work` has not been run.
pub(crate) fn within<T>(time: Duration, work: impl FnOnce() -> T) -> nix::Result<T> {
    // SAFETY: all-zero is an empty mask and no flags; without SA_RESTART the kernel repeats no call by itself.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = wake as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: `action` outlives the call, and the handler touches nothing.
    check(unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) }.into())?;
    set_timer(time)?;
    let done = work();
    set_timer(Duration::ZERO)?;
    Ok(done)
}

/// Rings after `time`, and as often again until it is set anew; never if that is zero.
fn set_timer(time: Duration) -> nix::Result<()> {
    let value = libc::timeval {
        tv_sec: time.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_usec: time.subsec_micros().into(),
    };
    let timer = libc::itimerval { it_interval: value, it_value: value };
    // SAFETY: `timer` outlives the call; what was set before is not asked for.
    check(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) }.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use nix::errno::Errno;
    use nix::sys::wait::{WaitStatus, waitpid};

    use super::*;
    use crate::sys::process::exit_now;

    /// In a process of one thread, as the launcher is: the signal goes to any.
    #[test]
    fn a_call_without_an_end_gets_one_and_others_are_let_be() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        // SAFETY: the child makes system calls only.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let begun = Instant::now();
                let blocked = within(Duration::from_millis(20), || nix::unistd::read(&reader, &mut [0]));
                let ended = blocked == Ok(Err(Errno::EINTR)) && begun.elapsed() >= Duration::from_millis(20);
                let let_be = within(Duration::from_secs(60), || nix::unistd::write(&writer, b"x")) == Ok(Ok(1));
                exit_now(i32::from(!(ended && let_be)))
            }
            nix::unistd::ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
            }
        }
    }
}
