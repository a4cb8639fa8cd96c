//! What the tests run inside sandboxes: small actions in Rust, in place of a program or a module.

use std::fs;
use std::os::fd::OwnedFd;

use holm_sandbox::spec::SandboxSpec;
use holm_sandbox::workload::{Job, Task, Workload};

pub struct Actions;

impl Workload for Actions {
    fn prepare(&self, _spec: &SandboxSpec, _artifact: OwnedFd) -> nix::Result<Box<dyn Task>> {
        Ok(Box::new(Action))
    }
}

struct Action;

impl Task for Action {
    fn run(self: Box<Self>, job: Job) -> i32 {
        let action = String::from_utf8(job.payload).unwrap();
        job.started.signal();
        match action.as_str() {
            "nothing" => 0,
            "report" => {
                println!("{}", fs::read_to_string("/proc/self/mountinfo").unwrap_or_else(|e| e.to_string()));
                for dir in ["/", "/tmp", "/dev", "/proc", "/bin"] {
                    let list = fs::read_dir(dir).map(|d| d.map(|e| e.unwrap().file_name()).collect::<Vec<_>>());
                    println!("{dir}: {list:?}");
                }
                0
            }
            other => panic!("no action {other}"),
        }
    }
}
