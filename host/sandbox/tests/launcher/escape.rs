//! What would code reach that broke out of the WebAssembly runtime, or out of the compiler? Native code in their places.

use std::ffi::CStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use holm_sandbox::spec::Kind;
use libtest_mimic::Trial;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::kill;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{Pid, execve, pipe, setuid};

use crate::client::{Client, spec};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("s8_native_code_in_place_of_the_wasm_runtime_reaches_its_tmp_alone", || reaches(Kind::Wasm)),
        trial("s8_native_code_in_place_of_the_compiler_reaches_nothing_but_threads", || reaches(Kind::Compile)),
    ]
}

fn reaches(kind: Kind) {
    const EPERM: i32 = 1;
    const ENOENT: i32 = 2;
    const EACCES: i32 = 13;
    const EROFS: i32 = 30;
    let mut client = Client::start();
    let run = client.run(spec(kind), "escape");
    let answers: Vec<(&str, &str)> = run.stdout.lines().map(|line| line.split_once(": ").unwrap()).collect();
    assert_eq!(answers.len(), 15, "{}", run.stdout);
    for (attempt, errno) in answers {
        let expected = match (attempt, kind) {
            ("write /tmp", Kind::Wasm) | ("a thread", Kind::Compile) => 0,
            ("read the root" | "read the proof of Landlock", Kind::Wasm) => EACCES,
            ("read /proc", Kind::Wasm) => ENOENT, // there is none
            ("write elsewhere", Kind::Wasm) => EROFS,
            _ => EPERM,
        };
        assert_eq!(errno, expected.to_string(), "{kind:?}: {attempt}");
    }
    client.end();
}

/// Inside: prints the errno of each attempt, 0 for success.
pub(crate) fn tell() {
    let io = |result: io::Result<()>| result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0);
    let nix = |result: nix::Result<()>| result.map_or_else(|errno| errno as i32, |()| 0);
    let none = None::<&str>;
    let no_words: [&CStr; 0] = [];
    let attempts = [
        ("read the root", io(fs::read_dir("/").map(drop))),
        ("read /proc", io(fs::read("/proc/self/status").map(drop))),
        ("write /tmp", io(fs::write("/tmp/file", "x"))),
        ("write elsewhere", io(fs::write("/file", "x"))),
        ("read the proof of Landlock", io(fs::read("/.landlock").map(drop))),
        ("a thread", io(std::thread::Builder::new().spawn(|| ()).map(|thread| thread.join().unwrap()))),
        ("a program", nix(execve(c"/bin/sh", &no_words, &no_words).map(|never| match never {}))),
        ("a pipe", nix(pipe().map(drop))),
        ("a socket", nix(socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).map(drop))),
        ("a Unix socket", nix(socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).map(drop))),
        ("a Unix pair", io(UnixStream::pair().map(drop))),
        ("a namespace", nix(unshare(CloneFlags::CLONE_NEWUSER))),
        ("a mount", nix(mount(none, "/tmp", Some("tmpfs"), MsFlags::empty(), none))),
        ("a signal", nix(kill(Pid::this(), None))),
        ("another id", nix(setuid(0.into()))),
    ];
    let mut out = io::stdout();
    for (attempt, errno) in attempts {
        writeln!(out, "{attempt}: {errno}").unwrap();
    }
}
