//! What a job can reach, published: read from the same tables that confine it.

use std::fmt::{self, Display};

use serde::Serialize;

use crate::init::identity::RLIMITS;
use crate::init::root::{DEVICES, mounts};
use crate::init::{landlock, seccomp};
use crate::spec::{JOB_ID, Kind};

/// All that one kind of sandbox lets through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// `native`, `wasm` or `compile`.
    pub kind: &'static str,
    /// The uid and gid that the code has inside.
    pub uid: u32,
    /// What is mounted, the root first.
    pub mounts: Vec<Mount>,
    /// The nodes in `/dev` of every job; a tenant's `devices` add to them.
    pub devices: Vec<Device>,
    /// What Landlock lets be done beneath which path. What is not listed is refused.
    pub landlock: Vec<Rule>,
    /// Resource limits that every job has.
    pub rlimits: Vec<Rlimit>,
    /// System calls, by number. What is not listed is refused with `EPERM`.
    pub calls: Vec<Call>,
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where.
    pub at: String,
    /// The file system.
    pub fs: String,
    /// As `mount(8)` writes them.
    pub options: Vec<&'static str>,
    /// What it is for.
    pub why: &'static str,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name in `/dev`.
    pub name: &'static str,
    /// Its numbers.
    pub major: u64,
    /// See `major`.
    pub minor: u64,
}

/// A rule of Landlock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Beneath this path.
    pub beneath: &'static str,
    /// These rights, in the library's words.
    pub rights: String,
}

/// A resource limit, soft and hard alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rlimit {
    /// Its name.
    pub name: String,
    /// Its value, in the unit that `setrlimit(2)` gives it.
    pub value: u64,
    /// What it is for.
    pub why: &'static str,
}

/// A system call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// Its number on x86-64.
    pub number: u32,
    /// Whether only some arguments are let through; the reason says which.
    pub conditional: bool,
    /// What it is for.
    pub why: &'static str,
}

impl Policy {
    /// The policy of one kind.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        let devices = if kind == Kind::Native { &DEVICES[..] } else { &[] };
        Self {
            kind: match kind {
                Kind::Native => "native",
                Kind::Wasm => "wasm",
                Kind::Compile => "compile",
            },
            uid: JOB_ID,
            mounts: mounts(kind)
                .iter()
                .map(|mount| Mount {
                    at: text(mount.at),
                    fs: text(mount.fs),
                    options: mount.attr.words(),
                    why: mount.why,
                })
                .collect(),
            devices: devices
                .iter()
                .map(|&(name, major, minor)| Device { name, major: major.into(), minor: minor.into() })
                .collect(),
            landlock: landlock::rules(kind)
                .into_iter()
                .map(|(beneath, rights)| Rule { beneath, rights: rights.to_string() })
                .collect(),
            rlimits: RLIMITS.map(|(name, value, why)| Rlimit { name: format!("{name:?}"), value, why }).into(),
            calls: seccomp::published(kind)
                .into_iter()
                .map(|entry| Call {
                    name: entry.name,
                    number: entry.number,
                    conditional: entry.conditional(),
                    why: entry.reason,
                })
                .collect(),
        }
    }
}

impl Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: runs as uid {} of its own user namespace, without capabilities", self.kind, self.uid)?;
        writeln!(f, "  mounts")?;
        for Mount { at, fs, options, why } in &self.mounts {
            writeln!(f, "    {at:<8} {fs:<6} {:<26} {why}", options.join(","))?;
        }
        if !self.devices.is_empty() {
            let names: Vec<String> =
                self.devices.iter().map(|d| format!("{} ({}:{})", d.name, d.major, d.minor)).collect();
            writeln!(f, "  devices\n    {}", names.join(", "))?;
        }
        writeln!(f, "  landlock: nothing else may be opened")?;
        for Rule { beneath, rights } in &self.landlock {
            writeln!(f, "    {beneath:<8} {rights}")?;
        }
        writeln!(f, "  resource limits")?;
        for Rlimit { name, value, why } in &self.rlimits {
            writeln!(f, "    {name:<18} {value:<7} {why}")?;
        }
        writeln!(f, "  system calls: {}; all else is refused", self.calls.len())?;
        for Call { name, number, conditional, why } in &self.calls {
            let mark = if *conditional { "some" } else { "" };
            writeln!(f, "    {number:>4} {name:<24} {mark:<5} {why}")?;
        }
        Ok(())
    }
}
