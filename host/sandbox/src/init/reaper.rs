//! The init of a native sandbox: pid 1 of its namespace, whose only work is to reap.
//!
//! Without it the tenant's program would be pid 1 itself, for which the kernel ignores signals without a handler:
//! `abort()` would end as SIGSEGV and a SIGTERM to itself would do nothing. It tells the launcher how the program
//! ended over the gate, which the program never had; its own end then takes the whole namespace with it.

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::gate::{FromSandbox, SandboxGate};
use crate::sys::process::{exit_now, wait_for_any};

/// Reaps orphans until `main` has ended, reports its end, and ends.
pub(crate) fn reap_until(main: Pid, gate: &SandboxGate) -> ! {
    let exit = loop {
        match wait_for_any() {
            Ok((pid, exit)) if pid == main => break exit,
            Ok(_) | Err(Errno::EINTR) => {}
            // ECHILD cannot be: `main` is our child until it is reaped
            Err(_) => exit_now(71),
        }
    };
    // should the launcher be gone, nobody needs to know
    let _ = gate.tell(FromSandbox::Exited(exit));
    exit_now(0)
}
