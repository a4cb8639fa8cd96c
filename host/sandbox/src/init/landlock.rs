//! Landlock: even where mounts and modes would allow it, a job reads its root, runs its program and writes `/tmp`.
//!
//! Handled are all rights that the running kernel knows. Kernels before 6.7 (ABI 4) cannot restrict TCP, and before
//! 6.12 (ABI 6) neither abstract sockets nor signals; the namespaces forbid those too, and `holm doctor` names the ABI.

use std::fs::File;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::errno::Errno;

use super::root::LANDLOCK_PROOF;
use crate::spec::Kind;
use crate::sys::process::{errno_of, landlock_abi};

/// The newest ABI whose rights were vetted for this policy.
const VETTED: ABI = ABI::V6;

/// Restricts this process and all its children. Needs `no_new_privs`.
pub(crate) fn restrict(kind: Kind) -> nix::Result<()> {
    landlock_abi()?; // the library does not say why it takes Landlock for missing
    let enforced = try_restrict(kind).map_err(|error| errno_of_cause(&*error))?;
    if enforced { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
}

/// The errno beneath the library's error.
fn errno_of_cause(error: &(dyn std::error::Error + 'static)) -> Errno {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let call = causes.filter_map(|error| error.downcast_ref::<std::io::Error>()).next();
    call.map_or(Errno::EOPNOTSUPP, errno_of)
}

fn try_restrict(kind: Kind) -> Result<bool, Box<dyn std::error::Error>> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(VETTED))?
        .handle_access(AccessNet::from_all(VETTED))?
        .scope(Scope::from_all(VETTED))?
        .create()?;
    for (path, access) in rules(kind) {
        ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(path)?, access))?;
    }
    let status = ruleset.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced && status.no_new_privs)
}

/// What may be done beneath which path. Nothing gives a right on files right below `/`: `/.landlock` must stay closed.
pub(crate) fn rules(kind: Kind) -> Vec<(&'static str, BitFlags<AccessFs>)> {
    let in_tmp = AccessFs::from_all(VETTED)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    match kind {
        Kind::Native => vec![
            ("/", AccessFs::ReadDir.into()),
            ("/bin", read | AccessFs::Execute),
            ("/dev", read | AccessFs::WriteFile),
            ("/proc", read),
            ("/tmp", in_tmp),
        ],
        Kind::Wasm => vec![("/tmp", in_tmp)],
        Kind::Compile => vec![],
    }
}

/// Shows that Landlock is in force: a file whose mode and mount let everybody read it must be refused.
///
/// The kernel lists the Landlock domain of a process nowhere, so this is how it is read back.
pub(crate) fn prove() -> nix::Result<()> {
    match File::open(format!("/{LANDLOCK_PROOF}")) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => Ok(()),
        Err(error) => Err(errno_of(&error)),
        Ok(_) => Err(Errno::ENOTRECOVERABLE),
    }
}
