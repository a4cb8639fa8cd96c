//! The system call filter of a sandbox, in two parts.
//!
//! The large allow-list is installed first and is what a zygote will hand on to its children. It still lets through
//! the few calls that finish a sandbox (`setup` in the policy). The small last filter takes those away again; the
//! kernel applies the strictest of all filters, so the two together are the policy.

mod bpf;
pub(crate) mod policy;

use libc::sock_filter;

use self::bpf::Verdict;
use self::policy::{Entry, Phase};
use crate::spec::Kind;
use crate::sys::seccomp::install;

/// Both filters of one kind of sandbox, compiled ahead of the clone.
#[derive(Debug)]
pub(crate) struct Filters {
    base: Vec<sock_filter>,
    last: Vec<sock_filter>,
}

impl Filters {
    pub(crate) fn compile(kind: Kind) -> Self {
        let entries = policy::entries(kind);
        let allowed: Vec<(u32, Verdict)> = entries.iter().map(|e| (e.number, e.verdict)).collect();
        let setup = entries.iter().filter(|e| e.phase == Phase::Setup);
        let taken_away: Vec<(u32, Verdict)> = setup.map(|e| (e.number, e.after)).collect();
        Self { base: bpf::compile(&allowed, policy::REFUSED), last: bpf::compile(&taken_away, Verdict::Allow) }
    }

    /// Installs the allow-list. From here on only the policy's calls work, those of set-up included.
    pub(crate) fn install_base(&self) -> nix::Result<()> {
        install(&self.base)
    }

    /// Takes the calls of set-up away.
    pub(crate) fn install_last(&self) -> nix::Result<()> {
        install(&self.last)
    }
}

/// Lets this process do nothing from here on but read what is open, and end. Needs `no_new_privs`. The kernel's own strict
/// mode cannot be had beneath a filter of whoever started the server.
pub(crate) fn allow_reading_alone() -> nix::Result<()> {
    let mut allowed = [libc::SYS_read, libc::SYS_rt_sigreturn, libc::SYS_exit, libc::SYS_exit_group];
    allowed.sort_unstable();
    let numbered = |number: libc::c_long| u32::try_from(number).map(|number| (number, Verdict::Allow));
    let verdicts: Result<Vec<_>, _> = allowed.into_iter().map(numbered).collect();
    install(&bpf::compile(&verdicts.map_err(|_| nix::errno::Errno::EINVAL)?, Verdict::Kill))
}

/// The number of filters that [`Filters`] installs, for the check of `/proc/PID/status`.
pub(crate) const FILTERS: u32 = 2;

/// The published policy of one kind: every system call that tenant code may make, whether under a condition, and why.
#[must_use]
pub(crate) fn published(kind: Kind) -> Vec<Entry> {
    policy::entries(kind).into_iter().filter(|e| e.phase == Phase::Job || e.after != policy::REFUSED).collect()
}

#[cfg(test)]
mod tests {
    use super::bpf::AUDIT_ARCH_X86_64;
    use super::bpf::interpreter::run;
    use super::*;

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

    /// What the two filters say together: the stricter one, of two refusals the one of the filter installed last.
    fn verdict(filters: &Filters, arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let (base, last) = (run(&filters.base, arch, number, args), run(&filters.last, arch, number, args));
        match (base, last) {
            (KILL, _) | (_, KILL) => KILL,
            (refused, ALLOW) => refused,
            (_, refused) => refused,
        }
    }

    /// The published conditions once more, in other words: whether these arguments pass, and the errno if not.
    /// `None` for a call without one.
    fn condition(kind: Kind, name: &str, args: [u64; 6]) -> Option<(bool, libc::c_int)> {
        let int = |i: usize| u32::try_from(args[i] & 0xffff_ffff).unwrap();
        let namespaces = 0x7e02_0000;
        Some(match name {
            "fcntl" => (![1024, 1026, 1031].contains(&int(1)), libc::EPERM),
            "ioctl" => ([0x5401, 0x5413, 0x541b, 0x5421, 0x5450, 0x5451].contains(&int(1)), libc::ENOTTY),
            "madvise" => (int(2) != 12, libc::EPERM),
            "membarrier" => ([0, 8, 16].contains(&int(0)), libc::EPERM),
            "socket" | "socketpair" => {
                let kind = [1, 2, 5].contains(&(int(1) & !0x8_0800));
                (int(0) == 1 && kind && int(2) == 0, libc::EAFNOSUPPORT)
            }
            "sendto" | "recvfrom" | "sendmmsg" | "recvmmsg" => (int(3) & 1 == 0, libc::EPERM),
            "sendmsg" | "recvmsg" => (int(2) & 1 == 0, libc::EPERM),
            "clone" if kind == Kind::Native => (int(0) & namespaces == 0, libc::EPERM),
            "clone" => (int(0) & namespaces == 0 && int(0) & 0x1_0100 == 0x1_0100, libc::EPERM),
            "prlimit64" => (int(0) == 0, libc::EPERM),
            "personality" => ([0, u32::MAX].contains(&int(0)), libc::EPERM),
            "mmap" | "mprotect" if kind == Kind::Wasm => (int(2) & 4 == 0, libc::EPERM),
            "tgkill" if kind != Kind::Native => (int(2) == 6, libc::EPERM),
            "prctl" if kind == Kind::Wasm => (int(0) == 15, libc::EPERM),
            "prctl" => {
                let plain = [1, 2, 3, 4, 15, 16, 21, 23, 29, 30, 36, 37, 38, 39, 41, 42, 0x5356_4d41];
                (plain.contains(&int(0)), libc::EPERM)
            }
            _ => return None,
        })
    }

    /// Arguments that are small, near the values of the conditions, have flags, or are anything, in the upper half too.
    fn arguments(random: &mut u64) -> [u64; 6] {
        std::array::from_fn(|_| {
            let mut word = || {
                *random ^= *random << 13;
                *random ^= *random >> 7;
                *random ^= *random << 17;
                *random
            };
            let low = match word() % 8 {
                0 => word() % 8,
                1 => word() % 64,
                2 => 1 << (word() % 32),
                3 => [1, 2, 3, 5][(word() % 4) as usize] | [0, 0x800, 0x8_0000, 0x8_0800][(word() % 4) as usize],
                4 => [1024, 1026, 1031, 0x5401, 0x541b, 0x5412, 0x541c, 0x5356_4d41][(word() % 8) as usize],
                5 => 0x1_0100 | ((word() % 2) << 28),
                6 => 0xffff_ffff,
                _ => word() & 0xffff_ffff,
            };
            if word() % 2 == 0 { low } else { low | word() << 32 }
        })
    }

    #[test]
    fn s8_the_filters_of_every_kind_say_of_every_number_what_is_published() {
        let mut random = 20_260_101;
        for kind in Kind::ALL {
            let filters = Filters::compile(kind);
            let published = crate::policy::Policy::of(kind).calls;
            let (mut passed, mut stopped) = (0, 0);
            for number in 0..=1024 {
                let call = published.iter().find(|call| call.number == number);
                for _ in 0..200 {
                    let args = arguments(&mut random);
                    let errno = |errno: libc::c_int| libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
                    let expected = match call {
                        None => errno(libc::EPERM),
                        Some(call) if call.name == "clone3" => errno(libc::ENOSYS),
                        Some(call) => {
                            let condition = condition(kind, call.name, args);
                            assert_eq!(condition.is_some(), call.conditional, "{kind:?} {}", call.name);
                            match condition {
                                Some((true, _)) => passed += 1,
                                Some((false, _)) => stopped += 1,
                                None => {}
                            }
                            condition.map_or(ALLOW, |(passes, refusal)| if passes { ALLOW } else { errno(refusal) })
                        }
                    };
                    let name = call.map_or("not listed", |call| call.name);
                    let said = verdict(&filters, AUDIT_ARCH_X86_64, number, args);
                    assert_eq!(said, expected, "{kind:?} {number} ({name}) with {args:x?}");
                }
            }
            assert!(passed > 50 && stopped > 50, "{kind:?}: both sides of the conditions: {passed} and {stopped}");
        }
    }

    #[test]
    fn s16_no_number_of_another_abi_passes_any_filter() {
        const I386: u32 = 3 | 0x4000_0000;
        for kind in Kind::ALL {
            let filters = Filters::compile(kind);
            for number in 0..=1024 {
                for (arch, number) in [(AUDIT_ARCH_X86_64, number | 0x4000_0000), (I386, number), (0, number)] {
                    assert_eq!(verdict(&filters, arch, number, [0; 6]), KILL, "{kind:?} {arch:#x} {number:#x}");
                }
            }
        }
    }
}
