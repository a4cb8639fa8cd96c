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

/// The number of filters that [`Filters`] installs, for the check of `/proc/PID/status`.
pub(crate) const FILTERS: u32 = 2;

/// The published policy of one kind: every system call that tenant code may make, whether under a condition, and why.
#[must_use]
pub(crate) fn published(kind: Kind) -> Vec<Entry> {
    policy::entries(kind).into_iter().filter(|e| e.phase == Phase::Job || e.after != policy::REFUSED).collect()
}
