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
            "escape" => {
                for (attempt, errno) in escape() {
                    println!("{attempt}: {errno}");
                }
                0
            }
            other => panic!("no action {other}"),
        }
    }
}

/// What native code reaches in place of the runtime that should be here: the errno of each attempt, 0 for success.
fn escape() -> Vec<(&'static str, i32)> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let io = |result: std::io::Result<()>| result.map_or_else(|e| e.raw_os_error().unwrap_or(-1), |()| 0);
    let nix = |result: nix::Result<()>| result.map_or_else(|errno| errno as i32, |()| 0);
    let none = None::<&str>;
    vec![
        ("read the root", io(fs::read_dir("/").map(drop))),
        ("read /proc", io(fs::read("/proc/self/status").map(drop))),
        ("write /tmp", io(fs::write("/tmp/file", "x"))),
        ("write elsewhere", io(fs::write("/file", "x"))),
        ("read the proof of Landlock", io(fs::read("/.landlock").map(drop))),
        ("a thread", io(std::thread::Builder::new().spawn(|| ()).map(|thread| thread.join().unwrap()))),
        ("a program", nix_of(nix::unistd::execve::<&std::ffi::CStr, &std::ffi::CStr>(c"/bin/sh", &[], &[]))),
        ("a pipe", nix(nix::unistd::pipe().map(drop))),
        ("a socket", nix(socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).map(drop))),
        ("a Unix socket", nix(socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).map(drop))),
        ("a Unix pair", io(std::os::unix::net::UnixStream::pair().map(drop))),
        ("a namespace", nix(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER))),
        ("a mount", nix(nix::mount::mount(none, "/tmp", Some("tmpfs"), nix::mount::MsFlags::empty(), none))),
        ("a signal", nix(nix::sys::signal::kill(nix::unistd::Pid::this(), None))),
        ("another id", nix(nix::unistd::setuid(0.into()))),
    ]
}

fn nix_of(never: nix::Result<std::convert::Infallible>) -> i32 {
    match never {
        Err(errno) => errno as i32,
        Ok(never) => match never {},
    }
}
