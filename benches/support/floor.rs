//! The raw floor: `clone3` into seven namespaces, exit, wait. No cgroup, no root, no filter, no exec.
//!
//! A clone costs the more, the more memory the process that clones has touched. So a fresh process does it, which tells how
//! much that is.

use std::process::Command;
use std::time::{Duration, Instant};

use super::obedient::{Obedient, obey};
use super::proc::private_bytes;
use super::times::timed;

/// The first argument of the process that clones.
pub const FLOOR: &str = "floor";

pub struct Floor {
    process: Obedient,
    /// Private memory of the process that clones.
    pub private_bytes: u64,
}

impl Floor {
    pub fn start() -> Self {
        let mut process = Obedient::start(Command::new(std::env::current_exe().unwrap()).arg(FLOOR));
        let private_bytes = process.ask("memory").parse().unwrap();
        Self { process, private_bytes }
    }

    /// How long one takes.
    pub fn once(&mut self) -> Duration {
        Duration::from_nanos(self.process.ask("once").parse().unwrap())
    }

    /// What `floor` is, for a title.
    pub fn words(&self) -> String {
        let kib = self.private_bytes >> 10;
        format!("The floor is clone3 into 7 namespaces + exit + wait, by a process with {kib} KiB of private memory.")
    }
}

/// Clones a second that as many workers make beside each other.
pub fn rate(workers: &mut [Floor], time: Duration) -> f64 {
    let order = format!("{}", time.as_millis());
    workers.iter_mut().for_each(|worker| worker.process.tell(&order));
    let counts = workers.iter_mut().map(|worker| worker.process.hear().parse::<f64>().unwrap());
    counts.sum::<f64>() / time.as_secs_f64()
}

/// What the process that clones does.
pub fn serve() {
    obey(|order| match order {
        "memory" => private_bytes(std::process::id()).to_string(),
        "once" => timed(clone_exit_wait).as_nanos().to_string(),
        ms => {
            let (begun, time) = (Instant::now(), Duration::from_millis(ms.parse().unwrap()));
            let mut count = 0;
            while begun.elapsed() < time {
                clone_exit_wait();
                count += 1;
            }
            count.to_string()
        }
    });
}

fn clone_exit_wait() {
    let flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP;
    // SAFETY: `clone_args` is a struct of integers for which all-zero is the documented default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(flags.cast_unsigned());
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: no memory is shared with the child, which does nothing but end; this process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if pid == 0 {
        // SAFETY: ends the child without touching anything.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: a null status is allowed; the pid is our child's.
    let waited = unsafe { libc::waitpid(libc::pid_t::try_from(pid).unwrap_or(-1), std::ptr::null_mut(), 0) };
    assert_eq!(i64::from(waited), pid);
}
