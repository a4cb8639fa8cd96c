//! System calls that fail, lie or hang at the test's word.
//!
//! The launcher starts under a seccomp filter that asks this process about some calls (`SECCOMP_RET_USER_NOTIF`), and its
//! sandboxes inherit it. So one call of one process can be made to fail with an errno, to do nothing and tell of
//! success, or never to return, chosen by its arguments and by the paths behind them; and from one launch to the next
//! the same launcher can be left alone again.

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use holm_sandbox::wire;
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

/// Whose calls are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Launcher,
    Zygote,
    Sire,
    Sandbox,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Fail(Errno),
    Lie,
    Hang,
}

/// Whether a call is meant.
pub(crate) type When = fn(&Call) -> bool;

/// What is to become of which call.
#[derive(Clone, Copy)]
pub(crate) struct Fault {
    who: Who,
    call: libc::c_long,
    when: When,
    nth: Option<u32>,
    act: Act,
}

/// `call` of the launcher itself.
pub(crate) fn launcher(call: libc::c_long) -> Fault {
    Fault { who: Who::Launcher, call, when: |_| true, nth: None, act: Act::Hang }
}

/// `call` of any process in a sandbox.
pub(crate) fn sandbox(call: libc::c_long) -> Fault {
    Fault { who: Who::Sandbox, ..launcher(call) }
}

/// `call` of a zygote, or of what keeps its namespaces.
pub(crate) fn zygote(call: libc::c_long) -> Fault {
    Fault { who: Who::Zygote, ..launcher(call) }
}

/// `call` of what stands between the launcher and a zygote when that is cloned.
pub(crate) fn sire(call: libc::c_long) -> Fault {
    Fault { who: Who::Sire, ..launcher(call) }
}

impl Fault {
    /// Only where this holds.
    pub(crate) fn when(self, when: When) -> Self {
        Self { when, ..self }
    }

    /// Only the `nth` of those, from 1.
    pub(crate) fn nth(self, nth: u32) -> Self {
        Self { nth: Some(nth), ..self }
    }

    pub(crate) fn fails(self, errno: Errno) -> Self {
        Self { act: Act::Fail(errno), ..self }
    }

    /// It does nothing, and returns what it returns on success.
    pub(crate) fn lies(self) -> Self {
        Self { act: Act::Lie, ..self }
    }

    pub(crate) fn hangs(self) -> Self {
        Self { act: Act::Hang, ..self }
    }
}

/// A call that waits for its answer.
pub(crate) struct Call {
    pid: Pid,
    number: libc::c_long,
    pub(crate) args: [u64; 6],
}

impl Call {
    /// The string that an argument points to.
    pub(crate) fn text(&self, arg: usize) -> String {
        const PAGE: usize = 4096;
        let mut buffer = [0; 256];
        let base = usize::try_from(self.args[arg]).unwrap();
        // in two parts, if it may lie in two pages: the next one may not be there
        let first = buffer.len().min(PAGE - base % PAGE);
        let (here, there) = buffer.split_at_mut(first);
        let read = |part: &mut [u8], base| {
            let remote = [RemoteIoVec { base, len: part.len() }];
            process_vm_readv(self.pid, &mut [IoSliceMut::new(part)], &remote).unwrap_or(0)
        };
        let mut read_bytes = read(here, base);
        if read_bytes == first && !there.is_empty() {
            read_bytes += read(there, base + first);
        }
        let end = buffer[..read_bytes].iter().position(|byte| *byte == 0).unwrap_or(read_bytes);
        String::from_utf8_lossy(&buffer[..end]).into_owned()
    }

    /// What an argument that is a descriptor refers to.
    pub(crate) fn file(&self, arg: usize) -> String {
        let path = format!("/proc/{}/fd/{}", self.pid, self.args[arg]);
        fs::read_link(path).map(|target| target.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// Answers the calls of a launcher and its sandboxes, until the last of them is dead.
pub(crate) struct Supervisor {
    armed: Arc<Mutex<Vec<Armed>>>,
    thread: Option<JoinHandle<()>>,
}

struct Armed {
    fault: Fault,
    seen: u32,
    hits: u32,
}

impl Supervisor {
    pub(crate) fn start(listener: OwnedFd, launcher: u32) -> Self {
        let launcher = Pid::from_raw(i32::try_from(launcher).unwrap());
        let armed = Arc::new(Mutex::new(Vec::new()));
        let shared = armed.clone();
        let thread = std::thread::spawn(move || {
            while let Some((id, call)) = receive(&listener) {
                let act = decide(&mut shared.lock().unwrap(), &call, launcher);
                answer(&listener, id, &call, act);
            }
        });
        Self { armed, thread: Some(thread) }
    }

    pub(crate) fn arm(&self, faults: &[Fault]) {
        *self.armed.lock().unwrap() = faults.iter().map(|fault| Armed { fault: *fault, seen: 0, hits: 0 }).collect();
    }

    pub(crate) fn hits(&self) -> u32 {
        self.armed.lock().unwrap().iter().map(|armed| armed.hits).sum()
    }

    /// Leaves all calls alone from now on; gives how often each fault has struck.
    pub(crate) fn disarm(&self) -> Vec<u32> {
        self.armed.lock().unwrap().drain(..).map(|armed| armed.hits).collect()
    }
}

impl Drop for Supervisor {
    /// The launcher must be dead.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn decide(armed: &mut [Armed], call: &Call, launcher: Pid) -> Option<Act> {
    let who = if call.pid == launcher { Some(Who::Launcher) } else { in_own_pid_namespace(call.pid) };
    for Armed { fault, seen, hits } in armed {
        if Some(fault.who) == who && fault.call == call.number && (fault.when)(call) {
            *seen += 1;
            if fault.nth.is_none_or(|nth| nth == *seen) {
                *hits += 1;
                return Some(fault.act);
            }
        }
    }
    None
}

/// The sweeper is the launcher's child too, and no sandbox.
fn in_own_pid_namespace(pid: Pid) -> Option<Who> {
    let namespace = |pid: &str| -> Option<PathBuf> { fs::read_link(format!("/proc/{pid}/ns/pid")).ok() };
    // its first act is to take this name, a sandbox's to take another
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    match (name.trim_end(), namespace(&pid.to_string())? == namespace("self")?) {
        ("holm-zygote", true) => Some(Who::Sire),
        (_, true) => None,
        ("holm-zygote" | "holm-family", false) => Some(Who::Zygote),
        (_, false) => Some(Who::Sandbox),
    }
}

// `linux/seccomp.h`: _IOWR('!', 0, struct seccomp_notif) and _IOWR('!', 1, struct seccomp_notif_resp)
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;

/// The next call. `None` once no process has the filter any more.
fn receive(listener: &OwnedFd) -> Option<(u64, Call)> {
    loop {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor is given, and `poll` outlives the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, -1) };
        if ready == 1 && poll.revents & libc::POLLIN == 0 {
            return None;
        }
        // SAFETY: the structure is made of integers, and the kernel wants it zeroed.
        let mut notif: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the request's number carries the size of `notif`, which outlives the call.
        if unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &raw mut notif) } == 0 {
            let pid = Pid::from_raw(notif.pid.cast_signed());
            let call = Call { pid, number: notif.data.nr.into(), args: notif.data.args };
            return Some((notif.id, call));
        }
        // the process may have been killed in between
    }
}

fn answer(listener: &OwnedFd, id: u64, call: &Call, act: Option<Act>) {
    let (val, error, flags) = match act {
        Some(Act::Hang) => return,
        Some(Act::Fail(errno)) => (0, -(errno as i32), 0),
        Some(Act::Lie) if call.number == libc::SYS_write => (call.args[2].cast_signed(), 0, 0),
        Some(Act::Lie) => (0, 0, 0),
        None => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE),
    };
    let response = libc::seccomp_notif_resp { id, val, error, flags: u32::try_from(flags).unwrap() };
    // SAFETY: the request's number carries the size of `response`, which outlives the call. An error means that the
    // process is dead.
    unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &raw const response) };
}

/// For the process that is about to be a launcher: has the calls with these numbers asked about, through a listener that
/// is sent over standard input.
pub(crate) fn listen(calls: &[u32]) {
    let statement = |code: u32, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt: 0, jf: 0, k };
    let jump_if = |k: u32, jt: u8, jf: u8| libc::sock_filter { jt, jf, ..statement(libc::BPF_JMP | libc::BPF_JEQ, k) };
    let load = |offset: u32| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let (number, first_argument) = (0, 16);
    // sending the listener is not asked about: there would be nobody to answer
    let mut program = vec![load(number), jump_if(u32::try_from(libc::SYS_sendmsg).unwrap(), 0, 3)];
    program.extend([load(first_argument), jump_if(0, 0, 1), statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW)]);
    program.push(load(number));
    for call in calls {
        program.extend([jump_if(*call, 0, 1), statement(libc::BPF_RET, libc::SECCOMP_RET_USER_NOTIF)]);
    }
    program.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW));
    let fprog = libc::sock_fprog { len: u16::try_from(program.len()).unwrap(), filter: program.as_mut_ptr() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: `fprog` points to `len` instructions that outlive the call.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const fprog) };
    assert!(listener >= 0, "install the filter: {}", Errno::last());
    // SAFETY: the call has just returned it.
    let listener = unsafe { OwnedFd::from_raw_fd(i32::try_from(listener).unwrap()) };
    wire::send(std::io::stdin(), &0_u8, &[listener]).unwrap();
}

/// The numbers of the calls that `faults` are about.
pub(crate) fn calls(faults: &[Fault]) -> Vec<u32> {
    let mut calls: Vec<u32> = faults.iter().map(|fault| u32::try_from(fault.call).unwrap()).collect();
    calls.sort_unstable();
    calls.dedup();
    calls
}
