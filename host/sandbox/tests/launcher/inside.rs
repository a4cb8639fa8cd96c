//! What the tests run inside sandboxes: small actions in Rust, in place of a program or a module.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Duration;

use holm_sandbox::spec::SandboxSpec;
use holm_sandbox::workload::{Job, Task, Workload};
use nix::errno::Errno;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, raise, sigprocmask};
use nix::sys::time::TimeValLike;
use nix::unistd::{ForkResult, fork};

pub(crate) struct Actions;

impl Workload for Actions {
    /// What happens here is chosen by the program's name.
    fn prepare(&self, spec: &SandboxSpec, _artifact: OwnedFd) -> nix::Result<Box<dyn Task>> {
        match spec.program.as_str() {
            "broken" => Err(Errno::ENOEXEC),
            "panics" => panic!("the artifact is not to its taste"),
            "stopped" => raise(Signal::SIGSTOP).map(|()| Box::new(Action) as Box<dyn Task>),
            "endless" => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            _ => Ok(Box::new(Action)),
        }
    }
}

struct Action;

impl Task for Action {
    fn settle(&mut self, _: &SandboxSpec) -> nix::Result<()> {
        Ok(())
    }

    fn run(self: Box<Self>, job: Job) -> i32 {
        let action = String::from_utf8(job.payload).unwrap();
        job.started.signal();
        match action.as_str() {
            "mark" => std::io::stdout().write_all(b"ran\n").unwrap(),
            "spin deaf" => {
                sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None).unwrap();
                loop {
                    std::hint::spin_loop();
                }
            }
            "40 children wait" => wait_with_children(40),
            "orphan spins 300 ms" => spin_in_an_orphan(Duration::from_millis(300)),
            "escape" => crate::escape::tell(),
            other => panic!("no action {other}"),
        }
        0
    }
}

/// A grandchild spins, long after its own parent is dead. This process only waits for its end.
fn spin_in_an_orphan(cpu_time: Duration) {
    let (wait, alive) = nix::unistd::pipe().unwrap();
    // SAFETY: this process has one thread.
    if let ForkResult::Child = unsafe { fork() }.unwrap() {
        // SAFETY: nor has its child more.
        if let ForkResult::Child = unsafe { fork() }.unwrap() {
            let used = || {
                let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
                Duration::from_micros((usage.user_time() + usage.system_time()).num_microseconds().cast_unsigned())
            };
            while used() < cpu_time {}
        }
        std::process::exit(0);
    }
    drop(alive);
    nix::unistd::read(&wait, &mut [0]).unwrap();
}

fn wait_with_children(count: usize) {
    for _ in 0..count {
        // SAFETY: this process has one thread.
        if let ForkResult::Child = unsafe { fork() }.unwrap() {
            break;
        }
    }
    std::thread::sleep(Duration::from_secs(60));
}
