//! Giving up privilege: the server faces the network, so it keeps nothing that the launcher has.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, User, setgroups, setresgid, setresuid};

/// The newest Landlock whose rights were vetted for this use.
const VETTED: ABI = ABI::V6;

/// Who the server is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    uid: Uid,
    gid: Gid,
}

impl Identity {
    /// The named user, or else the owner of the data directory, which must exist.
    pub(super) fn choose(user: Option<&str>, data_dir: &Path) -> anyhow::Result<Self> {
        let Some(name) = user else {
            let metadata = fs::metadata(data_dir).with_context(|| format!("look at `{}`", data_dir.display()))?;
            return Ok(Self { uid: Uid::from_raw(metadata.uid()), gid: Gid::from_raw(metadata.gid()) });
        };
        let found = User::from_name(name)?.ok_or_else(|| anyhow!("there is no user `{name}`"))?;
        Ok(Self { uid: found.uid, gid: found.gid })
    }

    /// Gives the data directory to the server's user, if it belongs to another. Symbolic links are not followed.
    pub(super) fn take_over(&self, data_dir: &Path) -> anyhow::Result<()> {
        let metadata = fs::metadata(data_dir)?;
        if metadata.uid() == self.uid.as_raw() && own_entries(data_dir, self.uid)? {
            return Ok(());
        }
        self.give(data_dir).with_context(|| format!("give `{}` to the server's user", data_dir.display()))
    }

    fn give(&self, path: &Path) -> io::Result<()> {
        std::os::unix::fs::lchown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))?;
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                self.give(&entry?.path())?;
            }
        }
        Ok(())
    }

    /// Becomes that user for good, with no capability and none to be had, confined to the data directory.
    pub(super) fn assume(&self, data_dir: &Path) -> anyhow::Result<()> {
        setgroups(&[]).context("drop supplementary groups")?;
        // the bounding set can only be emptied while CAP_SETPCAP is held
        caps::clear(None, caps::CapSet::Bounding).context("empty the capability bounding set")?;
        setresgid(self.gid, self.gid, self.gid).context("set the group")?;
        setresuid(self.uid, self.uid, self.uid).context("set the user")?;
        for set in [caps::CapSet::Ambient, caps::CapSet::Effective, caps::CapSet::Inheritable, caps::CapSet::Permitted]
        {
            caps::clear(None, set).context("drop all capabilities")?;
        }
        prctl::set_no_new_privs().context("set no_new_privs")?;
        prctl::set_dumpable(false).context("become non-dumpable")?;
        confine_to(data_dir).context("enforce Landlock")
    }
}

/// Whether all entries right below belong to the user: what a privileged start has made does not.
fn own_entries(dir: &Path, uid: Uid) -> io::Result<bool> {
    for entry in fs::read_dir(dir)? {
        if entry?.metadata()?.uid() != uid.as_raw() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Leaves of the file system the data directory, and `/dev/null` and the time zones to read; of TCP nothing: the
/// listening socket is open already.
fn confine_to(data_dir: &Path) -> anyhow::Result<()> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(VETTED))?
        .handle_access(AccessNet::from_all(VETTED))?
        .create()?;
    let data = AccessFs::from_all(VETTED) & !AccessFs::Execute;
    ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(data_dir)?, data))?;
    let device = AccessFs::ReadFile | AccessFs::WriteFile;
    ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new("/dev/null")?, device))?;
    let status = ruleset.restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced || !status.no_new_privs {
        bail!("the kernel does not enforce it");
    }
    Ok(())
}

/// Raises the number of open files to the hard limit, and gives it.
pub(super) fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

/// The data directory, made if it is not there.
pub(super) fn make_data_dir(path: &Path) -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("make the data directory `{}`", path.display()))?;
    let path = path.canonicalize().with_context(|| format!("resolve `{}`", path.display()))?;
    Ok(path)
}
