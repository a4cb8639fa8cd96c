//! Which system calls each kind of sandbox may make, and why. Everything else is refused with `EPERM`, `clone3` with
//! `ENOSYS` (libraries then fall back to `clone`, whose flags a filter can see), and x32 and i386 are killed.

use super::bpf::{Test, Verdict};
use crate::spec::Kind;

/// One line of the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The call's name in the kernel.
    pub(crate) name: &'static str,
    /// Its number on x86-64.
    pub(crate) number: u32,
    /// Why it is on the list, and under which condition.
    pub(crate) reason: &'static str,
    pub(super) verdict: Verdict,
    pub(super) phase: Phase,
    /// For calls of set-up: what the last filter makes of them.
    pub(super) after: Verdict,
}

impl Entry {
    /// Whether only some arguments are let through.
    #[must_use]
    pub(crate) fn conditional(&self) -> bool {
        matches!(self.verdict, If(..)) || matches!(self.after, If(..))
    }
}

/// Until when a call is let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// By tenant code too.
    Job,
    /// By the host's own code before it, then no more.
    Setup,
}

const EPERM: u16 = errno(libc::EPERM);
const ENOSYS: u16 = errno(libc::ENOSYS);
const EAFNOSUPPORT: u16 = errno(libc::EAFNOSUPPORT);
const ENOTTY: u16 = errno(libc::ENOTTY);

#[allow(clippy::cast_possible_truncation)] // the kernel's own bound on errnos is 4095
const fn errno(number: libc::c_int) -> u16 {
    assert!(number > 0 && number < 4096);
    number.cast_unsigned() as u16
}

/// What becomes of a call that is not on the list.
pub(super) const REFUSED: Verdict = Verdict::Errno(EPERM);

const fn bits(value: libc::c_int) -> u32 {
    value.cast_unsigned()
}

/// Every flag of `clone` that makes a namespace. `CLONE_NEWTIME` is none of them: the old call has no room for it.
const NAMESPACES: u32 = bits(
    libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP,
);

/// Threads and processes only.
static PLAIN_CLONE: Test = Test::Masked { arg: 0, mask: NAMESPACES, value: 0 };

/// Unix sockets of the three ordinary types and no protocol.
static UNIX_SOCKET: Test = Test::All(&[
    Test::Masked { arg: 0, mask: u32::MAX, value: bits(libc::AF_UNIX) },
    Test::OneOf { arg: 1, values: &UNIX_TYPES },
    Test::Masked { arg: 2, mask: u32::MAX, value: 0 },
]);

/// Each type with each of its flags, in full: a type that is refused alone must be so with a flag too.
const UNIX_TYPES: [u32; 12] = {
    let types = [bits(libc::SOCK_STREAM), bits(libc::SOCK_DGRAM), bits(libc::SOCK_SEQPACKET)];
    let flags =
        [0, bits(libc::SOCK_CLOEXEC), bits(libc::SOCK_NONBLOCK), bits(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)];
    let mut all = [0; 12];
    let mut i = 0;
    while i < all.len() {
        all[i] = types[i / flags.len()] | flags[i % flags.len()];
        i += 1;
    }
    all
};

/// No out-of-band data: its handling on Unix sockets was a way into the kernel (CVE-2025-38236).
static NO_OOB_ARG2: Test = Test::Masked { arg: 2, mask: bits(libc::MSG_OOB), value: 0 };
static NO_OOB_ARG3: Test = Test::Masked { arg: 3, mask: bits(libc::MSG_OOB), value: 0 };

/// The requests that ordinary programs make on pipes and sockets, and `isatty`.
static PLAIN_IOCTL: Test = Test::OneOf {
    arg: 1,
    values: &[
        0x5401, /* TCGETS */
        0x5413, /* TIOCGWINSZ */
        0x541b, /* FIONREAD */
        0x5421, /* FIONBIO */
        0x5450, /* FIONCLEX */
        0x5451, /* FIOCLEX */
    ],
};

/// Not the commands that take kernel memory on somebody's account (`F_SETPIPE_SZ`: on that of the pipe's maker, the
/// server) or that reach other openers of a file (leases, `F_NOTIFY`).
static PLAIN_FCNTL: Test =
    Test::NoneOf { arg: 1, values: &[bits(libc::F_SETPIPE_SZ), bits(libc::F_SETLEASE), bits(libc::F_NOTIFY)] };

/// Names, signals at parent death, `dumpable`, timer slack, and questions.
static PLAIN_PRCTL: Test = Test::OneOf {
    arg: 0,
    values: &[
        bits(libc::PR_SET_NAME),
        bits(libc::PR_GET_NAME),
        bits(libc::PR_SET_PDEATHSIG),
        bits(libc::PR_GET_PDEATHSIG),
        bits(libc::PR_SET_DUMPABLE),
        bits(libc::PR_GET_DUMPABLE),
        bits(libc::PR_SET_NO_NEW_PRIVS),
        bits(libc::PR_GET_NO_NEW_PRIVS),
        bits(libc::PR_GET_SECCOMP),
        bits(libc::PR_CAPBSET_READ),
        bits(libc::PR_SET_TIMERSLACK),
        bits(libc::PR_GET_TIMERSLACK),
        bits(libc::PR_SET_CHILD_SUBREAPER),
        bits(libc::PR_GET_CHILD_SUBREAPER),
        bits(libc::PR_SET_THP_DISABLE),
        bits(libc::PR_GET_THP_DISABLE),
        bits(libc::PR_SET_VMA),
    ],
};

/// Only the caller's own limits: the init has the same uid.
static OWN_PRLIMIT: Test = Test::Masked { arg: 0, mask: u32::MAX, value: 0 };

/// Only asking, or setting plain Linux; no `READ_IMPLIES_EXEC`, no `ADDR_NO_RANDOMIZE`.
static PLAIN_PERSONALITY: Test = Test::OneOf { arg: 0, values: &[0, u32::MAX] };

/// The calling process's own threads only; the global commands interrupt every CPU of the host.
static PRIVATE_MEMBARRIER: Test =
    Test::OneOf { arg: 0, values: &[0 /* QUERY */, 8 /* PRIVATE_EXPEDITED */, 16 /* REGISTER_PRIVATE_EXPEDITED */] };

/// Not merged with equal pages of other jobs: how long a write takes would tell what these hold.
static NO_MERGING: Test = Test::NoneOf { arg: 2, values: &[bits(libc::MADV_MERGEABLE)] };

/// No new executable memory: for a process whose code is all there when the guest starts.
static NO_EXEC_MAPPING: Test = Test::Masked { arg: 2, mask: bits(libc::PROT_EXEC), value: 0 };

/// Threads, not processes.
static THREADS_ONLY: Test = Test::Masked {
    arg: 0,
    mask: NAMESPACES | bits(libc::CLONE_THREAD | libc::CLONE_VM),
    value: bits(libc::CLONE_THREAD | libc::CLONE_VM),
};

/// Nothing of `prctl` but the caller's own name.
static NAME_ONLY: Test = Test::Masked { arg: 0, mask: u32::MAX, value: bits(libc::PR_SET_NAME) };

/// Nothing but the wake-up that `abort` sends to its own thread group.
static ABORT_ONLY: Test = Test::Masked { arg: 2, mask: u32::MAX, value: bits(libc::SIGABRT) };

struct Line {
    name: &'static str,
    number: libc::c_long,
    verdict: Verdict,
    phase: Phase,
    after: Verdict,
    reason: &'static str,
}

macro_rules! lines {
    ($($verdict:expr, $phase:ident, $after:expr, $reason:literal: $($name:ident = $number:expr),+;)+) => {
        &[$($(Line {
            name: stringify!($name),
            number: $number,
            verdict: $verdict,
            phase: Phase::$phase,
            after: $after,
            reason: $reason,
        },)+)+]
    };
}

use Verdict::{Allow, If};

/// For every kind: what a process needs to exist at all.
static COMMON: &[Line] = lines! {
    Allow, Job, Allow, "read and write open descriptors":
        read = libc::SYS_read, write = libc::SYS_write, readv = libc::SYS_readv, writev = libc::SYS_writev,
        pread64 = libc::SYS_pread64, pwrite64 = libc::SYS_pwrite64, preadv = libc::SYS_preadv,
        pwritev = libc::SYS_pwritev, lseek = libc::SYS_lseek, close = libc::SYS_close,
        close_range = libc::SYS_close_range, dup = libc::SYS_dup, dup2 = libc::SYS_dup2, dup3 = libc::SYS_dup3;
    If(&PLAIN_FCNTL, EPERM), Job, Allow, "descriptor flags and locks; not F_SETPIPE_SZ, F_SETLEASE, F_NOTIFY":
        fcntl = libc::SYS_fcntl;
    If(&PLAIN_IOCTL, ENOTTY), Job, Allow, "isatty, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX; ENOTTY for all else":
        ioctl = libc::SYS_ioctl;
    Allow, Job, Allow, "metadata of open files and of the job's own tree":
        fstat = libc::SYS_fstat, newfstatat = libc::SYS_newfstatat, statx = libc::SYS_statx,
        fstatfs = libc::SYS_fstatfs, getcwd = libc::SYS_getcwd;
    Allow, Job, Allow, "memory, charged to the job's cgroup":
        munmap = libc::SYS_munmap, mremap = libc::SYS_mremap, brk = libc::SYS_brk;
    If(&NO_MERGING, EPERM), Job, Allow, "advice on memory; not MADV_MERGEABLE": madvise = libc::SYS_madvise;
    Allow, Job, Allow, "signals within the job":
        rt_sigaction = libc::SYS_rt_sigaction, rt_sigprocmask = libc::SYS_rt_sigprocmask,
        rt_sigreturn = libc::SYS_rt_sigreturn, sigaltstack = libc::SYS_sigaltstack,
        restart_syscall = libc::SYS_restart_syscall;
    Allow, Job, Allow, "threads' locks":
        futex = libc::SYS_futex, set_robust_list = libc::SYS_set_robust_list, rseq = libc::SYS_rseq,
        sched_yield = libc::SYS_sched_yield, sched_getaffinity = libc::SYS_sched_getaffinity,
        set_tid_address = libc::SYS_set_tid_address;
    Allow, Job, Allow, "clocks and sleep":
        clock_gettime = libc::SYS_clock_gettime, clock_getres = libc::SYS_clock_getres,
        clock_nanosleep = libc::SYS_clock_nanosleep, nanosleep = libc::SYS_nanosleep,
        gettimeofday = libc::SYS_gettimeofday, time = libc::SYS_time;
    Allow, Job, Allow, "wait for descriptors":
        poll = libc::SYS_poll, ppoll = libc::SYS_ppoll, epoll_create1 = libc::SYS_epoll_create1,
        epoll_ctl = libc::SYS_epoll_ctl, epoll_wait = libc::SYS_epoll_wait, epoll_pwait = libc::SYS_epoll_pwait,
        epoll_pwait2 = libc::SYS_epoll_pwait2, eventfd2 = libc::SYS_eventfd2;
    Allow, Job, Allow, "who and where am I":
        getpid = libc::SYS_getpid, gettid = libc::SYS_gettid, getuid = libc::SYS_getuid, geteuid = libc::SYS_geteuid,
        getgid = libc::SYS_getgid, getegid = libc::SYS_getegid, uname = libc::SYS_uname, getcpu = libc::SYS_getcpu;
    Allow, Job, Allow, "random numbers": getrandom = libc::SYS_getrandom;
    Allow, Job, Allow, "end": exit = libc::SYS_exit, exit_group = libc::SYS_exit_group;
};

/// The job's own files: `/tmp`, and what is readable in its root.
static FILES: &[Line] = lines! {
    Allow, Job, Allow, "files below `/`; Landlock and the mounts decide which":
        openat = libc::SYS_openat, openat2 = libc::SYS_openat2, getdents64 = libc::SYS_getdents64,
        readlinkat = libc::SYS_readlinkat, mkdirat = libc::SYS_mkdirat, unlinkat = libc::SYS_unlinkat,
        renameat = libc::SYS_renameat, renameat2 = libc::SYS_renameat2, linkat = libc::SYS_linkat,
        symlinkat = libc::SYS_symlinkat, ftruncate = libc::SYS_ftruncate, fallocate = libc::SYS_fallocate,
        utimensat = libc::SYS_utimensat, fsync = libc::SYS_fsync, fdatasync = libc::SYS_fdatasync,
        fadvise64 = libc::SYS_fadvise64;
};

/// Native programs: what Rust, Go and C programs use in a container without network.
static NATIVE: &[Line] = lines! {
    Allow, Job, Allow, "memory, executable too: native code may write code":
        mmap = libc::SYS_mmap, mprotect = libc::SYS_mprotect, msync = libc::SYS_msync, mlock = libc::SYS_mlock,
        mlock2 = libc::SYS_mlock2, munlock = libc::SYS_munlock, memfd_create = libc::SYS_memfd_create;
    If(&PRIVATE_MEMBARRIER, EPERM), Job, Allow, "barriers among the process's own threads":
        membarrier = libc::SYS_membarrier;
    Allow, Job, Allow, "the same calls on files, in their older forms":
        open = libc::SYS_open, creat = libc::SYS_creat, stat = libc::SYS_stat, lstat = libc::SYS_lstat,
        access = libc::SYS_access, faccessat = libc::SYS_faccessat, faccessat2 = libc::SYS_faccessat2,
        getdents = libc::SYS_getdents, chdir = libc::SYS_chdir, fchdir = libc::SYS_fchdir, mkdir = libc::SYS_mkdir,
        rmdir = libc::SYS_rmdir, rename = libc::SYS_rename, link = libc::SYS_link, unlink = libc::SYS_unlink,
        symlink = libc::SYS_symlink, readlink = libc::SYS_readlink, truncate = libc::SYS_truncate,
        umask = libc::SYS_umask, statfs = libc::SYS_statfs, utime = libc::SYS_utime, utimes = libc::SYS_utimes,
        futimesat = libc::SYS_futimesat, preadv2 = libc::SYS_preadv2, pwritev2 = libc::SYS_pwritev2,
        readahead = libc::SYS_readahead;
    Allow, Job, Allow, "modes and owners, within the job's own ids":
        chmod = libc::SYS_chmod, fchmod = libc::SYS_fchmod, fchmodat = libc::SYS_fchmodat, fchmodat2 = 452,
        chown = libc::SYS_chown, fchown = libc::SYS_fchown, lchown = libc::SYS_lchown, fchownat = libc::SYS_fchownat;
    Allow, Job, Allow, "locks on the job's own files: no inode is shared with another job": flock = libc::SYS_flock;
    Allow, Job, Allow, "pipes": pipe = libc::SYS_pipe, pipe2 = libc::SYS_pipe2;
    If(&UNIX_SOCKET, EAFNOSUPPORT), Job, Allow, "Unix sockets (stream, datagram, seqpacket) within the job":
        socket = libc::SYS_socket, socketpair = libc::SYS_socketpair;
    Allow, Job, Allow, "Unix sockets within the job":
        bind = libc::SYS_bind, connect = libc::SYS_connect, listen = libc::SYS_listen, accept = libc::SYS_accept,
        accept4 = libc::SYS_accept4, getsockname = libc::SYS_getsockname, getpeername = libc::SYS_getpeername,
        getsockopt = libc::SYS_getsockopt, setsockopt = libc::SYS_setsockopt, shutdown = libc::SYS_shutdown;
    If(&NO_OOB_ARG3, EPERM), Job, Allow, "Unix sockets within the job; no out-of-band data":
        sendto = libc::SYS_sendto, recvfrom = libc::SYS_recvfrom, sendmmsg = libc::SYS_sendmmsg,
        recvmmsg = libc::SYS_recvmmsg;
    If(&NO_OOB_ARG2, EPERM), Job, Allow, "Unix sockets within the job; no out-of-band data":
        sendmsg = libc::SYS_sendmsg, recvmsg = libc::SYS_recvmsg;
    Allow, Job, Allow, "wait for descriptors, timers and signals":
        select = libc::SYS_select, pselect6 = libc::SYS_pselect6, epoll_create = libc::SYS_epoll_create,
        eventfd = libc::SYS_eventfd, signalfd = libc::SYS_signalfd, signalfd4 = libc::SYS_signalfd4,
        timerfd_create = libc::SYS_timerfd_create, timerfd_settime = libc::SYS_timerfd_settime,
        timerfd_gettime = libc::SYS_timerfd_gettime, inotify_init = libc::SYS_inotify_init,
        inotify_init1 = libc::SYS_inotify_init1, inotify_add_watch = libc::SYS_inotify_add_watch,
        inotify_rm_watch = libc::SYS_inotify_rm_watch;
    Allow, Job, Allow, "timers, bounded by RLIMIT_SIGPENDING":
        alarm = libc::SYS_alarm, getitimer = libc::SYS_getitimer, setitimer = libc::SYS_setitimer,
        timer_create = libc::SYS_timer_create, timer_settime = libc::SYS_timer_settime,
        timer_gettime = libc::SYS_timer_gettime, timer_getoverrun = libc::SYS_timer_getoverrun,
        timer_delete = libc::SYS_timer_delete, times = libc::SYS_times;
    If(&PLAIN_CLONE, EPERM), Job, Allow, "processes and threads, counted by the pids controller; no namespaces":
        clone = libc::SYS_clone;
    Allow, Job, Allow, "processes, counted by the pids controller":
        fork = libc::SYS_fork, vfork = libc::SYS_vfork, wait4 = libc::SYS_wait4, waitid = libc::SYS_waitid;
    Allow, Job, Allow, "programs of the job's own root; no_new_privs holds": execve = libc::SYS_execve,
        execveat = libc::SYS_execveat;
    Allow, Job, Allow, "signals: the pid namespace holds only the job":
        kill = libc::SYS_kill, tkill = libc::SYS_tkill, tgkill = libc::SYS_tgkill,
        rt_sigqueueinfo = libc::SYS_rt_sigqueueinfo, rt_tgsigqueueinfo = libc::SYS_rt_tgsigqueueinfo,
        rt_sigpending = libc::SYS_rt_sigpending, rt_sigsuspend = libc::SYS_rt_sigsuspend,
        rt_sigtimedwait = libc::SYS_rt_sigtimedwait, pause = libc::SYS_pause, pidfd_open = libc::SYS_pidfd_open,
        pidfd_send_signal = libc::SYS_pidfd_send_signal;
    Allow, Job, Allow, "ids, groups, sessions and priorities of the job's own processes":
        getppid = libc::SYS_getppid, getpgid = libc::SYS_getpgid, getpgrp = libc::SYS_getpgrp,
        setpgid = libc::SYS_setpgid, getsid = libc::SYS_getsid, setsid = libc::SYS_setsid,
        getgroups = libc::SYS_getgroups, getresuid = libc::SYS_getresuid, getresgid = libc::SYS_getresgid,
        capget = libc::SYS_capget, getpriority = libc::SYS_getpriority, setpriority = libc::SYS_setpriority,
        sched_setaffinity = libc::SYS_sched_setaffinity, sched_getparam = libc::SYS_sched_getparam,
        sched_getscheduler = libc::SYS_sched_getscheduler, sched_get_priority_max = libc::SYS_sched_get_priority_max,
        sched_get_priority_min = libc::SYS_sched_get_priority_min;
    Allow, Job, Allow, "the process's own figures and limits":
        getrusage = libc::SYS_getrusage, getrlimit = libc::SYS_getrlimit, setrlimit = libc::SYS_setrlimit,
        sysinfo = libc::SYS_sysinfo;
    If(&OWN_PRLIMIT, EPERM), Job, Allow, "the process's own limits (pid 0)": prlimit64 = libc::SYS_prlimit64;
    If(&PLAIN_PRCTL, EPERM), Job, Allow, "names, parent-death signal, dumpable, questions": prctl = libc::SYS_prctl;
    Allow, Job, Allow, "thread-local storage": arch_prctl = libc::SYS_arch_prctl,
        get_robust_list = libc::SYS_get_robust_list, futex_waitv = libc::SYS_futex_waitv;
    If(&PLAIN_PERSONALITY, EPERM), Job, Allow, "asking for the execution domain": personality = libc::SYS_personality;
    Verdict::Errno(ENOSYS), Setup, Verdict::Errno(ENOSYS), "its flags are in memory, out of a filter's sight: ENOSYS makes libraries use clone":
        clone3 = libc::SYS_clone3;
    Allow, Setup, REFUSED, "install the last filter": seccomp = libc::SYS_seccomp;
};

/// Holm's Wasm runtime: one thread, no sockets but its channel, no new code after set-up.
static WASM: &[Line] = lines! {
    Allow, Setup, If(&NO_EXEC_MAPPING, EPERM), "memory; executable only while the artifact is mapped":
        mmap = libc::SYS_mmap, mprotect = libc::SYS_mprotect;
    If(&NO_OOB_ARG2, EPERM), Job, Allow, "the channel to the server; no out-of-band data": sendmsg = libc::SYS_sendmsg, recvmsg = libc::SYS_recvmsg;
    If(&ABORT_ONLY, EPERM), Job, Allow, "abort()": tgkill = libc::SYS_tgkill;
    Allow, Setup, REFUSED, "the first contents of a component's memory, kept in a sealed file": memfd_create = libc::SYS_memfd_create;
    Allow, Setup, REFUSED, "a zygote clones sandboxes, each into its namespaces":
        clone3 = libc::SYS_clone3, unshare = libc::SYS_unshare, setns = libc::SYS_setns;
    Allow, Setup, REFUSED, "the mounts of a sandbox":
        fsopen = libc::SYS_fsopen, fsconfig = libc::SYS_fsconfig, fsmount = libc::SYS_fsmount,
        move_mount = libc::SYS_move_mount, chdir = libc::SYS_chdir, fchdir = libc::SYS_fchdir;
    Allow, Setup, REFUSED, "its session, ids, groups and keyring, its limits and capabilities":
        setsid = libc::SYS_setsid, setgroups = libc::SYS_setgroups, setresgid = libc::SYS_setresgid,
        setresuid = libc::SYS_setresuid, keyctl = libc::SYS_keyctl, prlimit64 = libc::SYS_prlimit64,
        capget = libc::SYS_capget, capset = libc::SYS_capset;
    Allow, Setup, REFUSED, "its Landlock domain":
        landlock_create_ruleset = libc::SYS_landlock_create_ruleset, landlock_add_rule = libc::SYS_landlock_add_rule,
        landlock_restrict_self = libc::SYS_landlock_restrict_self;
    Allow, Setup, If(&NAME_ONLY, EPERM), "die with the launcher; then its own name alone": prctl = libc::SYS_prctl;
    Allow, Setup, REFUSED, "install the last filter": seccomp = libc::SYS_seccomp;
};

/// Holm's compiler: threads, no files at all.
static COMPILE: &[Line] = lines! {
    Allow, Job, Allow, "memory; executable too, as the module is mapped once to see that it links":
        mmap = libc::SYS_mmap, mprotect = libc::SYS_mprotect;
    If(&NO_OOB_ARG2, EPERM), Job, Allow, "the channel to the server; no out-of-band data": sendmsg = libc::SYS_sendmsg, recvmsg = libc::SYS_recvmsg;
    If(&THREADS_ONLY, EPERM), Job, Allow, "compiler threads, counted by the pids controller": clone = libc::SYS_clone;
    Verdict::Errno(ENOSYS), Setup, Verdict::Errno(ENOSYS), "its flags are in memory, out of a filter's sight: ENOSYS makes libraries use clone":
        clone3 = libc::SYS_clone3;
    If(&ABORT_ONLY, EPERM), Job, Allow, "abort()": tgkill = libc::SYS_tgkill;
    If(&PLAIN_PRCTL, EPERM), Job, Allow, "thread names": prctl = libc::SYS_prctl;
    Allow, Setup, REFUSED, "install the last filter": seccomp = libc::SYS_seccomp;
};

/// The policy of one kind, ascending by number.
pub(super) fn entries(kind: Kind) -> Vec<Entry> {
    let lists: &[&[Line]] = match kind {
        Kind::Native => &[COMMON, FILES, NATIVE],
        Kind::Wasm => &[COMMON, FILES, WASM],
        Kind::Compile => &[COMMON, COMPILE],
    };
    let mut entries: Vec<Entry> = lists
        .iter()
        .copied()
        .flatten()
        .map(|line| Entry {
            name: line.name,
            number: u32::try_from(line.number).unwrap_or_else(|_| unreachable!("system call numbers are small")),
            reason: line.reason,
            verdict: line.verdict,
            phase: line.phase,
            after: line.after,
        })
        .collect();
    entries.sort_by_key(|entry| entry.number);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_listed_twice() {
        for kind in Kind::ALL {
            let entries = entries(kind);
            for pair in entries.windows(2) {
                assert!(pair[0].number < pair[1].number, "{kind:?}: {} is listed twice", pair[1].name);
            }
        }
    }

    #[test]
    fn calls_that_opened_kernels_are_on_no_list() {
        let never = [
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "ptrace",
            "mount",
            "umount2",
            "pivot_root",
            "fsopen",
            "fsconfig",
            "fsmount",
            "fspick",
            "open_tree",
            "move_mount",
            "mount_setattr",
            "unshare",
            "setns",
            "keyctl",
            "add_key",
            "request_key",
            "process_vm_readv",
            "process_vm_writev",
            "pidfd_getfd",
            "kcmp",
            "memfd_secret",
            "open_by_handle_at",
            "name_to_handle_at",
            "splice",
            "vmsplice",
            "tee",
            "modify_ldt",
            "iopl",
            "ioperm",
            "init_module",
            "finit_module",
            "kexec_load",
            "quotactl",
            "swapon",
            "acct",
            "syslog",
            "reboot",
            "settimeofday",
            "sync",
            "syncfs",
            "mincore",
            "io_setup",
            "mq_open",
            "chroot",
            "mknod",
            "mknodat",
            "setuid",
            "setresuid",
            "capset",
        ];
        for kind in Kind::ALL {
            // what is there for set-up alone is taken away before there is a job
            for entry in entries(kind).into_iter().filter(|e| e.phase == Phase::Job || e.after != REFUSED) {
                assert!(!never.contains(&entry.name), "{kind:?} lists {}", entry.name);
            }
        }
    }
}
