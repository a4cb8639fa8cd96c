//! Started by an ordinary user: in a user namespace of its own, in which Holm is root over the subordinate ids that
//! `/etc/subuid` and `/etc/subgid` grant that user. `newuidmap` and `newgidmap` check the grant and write the maps.
//!
//! Without such ids every job would have the same uid, so there is no such mode: then nothing is served.

use std::convert::Infallible;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, User, getegid, geteuid, setresgid, setresuid};

use crate::sys::process::{SingleThreaded, exit_now, fork};
use crate::uids::{self, IdRange};

/// Where the servers of an ordinary user agree about uids, below the user's home directory: in the one place that they
/// all share, as they share the ids.
const LOCK_DIR: &str = ".local/state/holm";

/// The environment variable that says so to the program in its new namespace.
const LOCK_DIR_VARIABLE: &str = "HOLM_LOCK_DIR";

/// The inode of the initial user namespace (`PROC_USER_INIT_INO`, linux/proc_ns.h).
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// An ordinary user cannot run Holm here.
#[derive(Debug, thiserror::Error)]
pub enum RootlessError {
    /// The kernel or a security module forbids user namespaces to ordinary users, or something else is out of order.
    #[error("{what}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There is no usable grant.
    #[error(
        "`{file}` grants user `{user}` fewer than {} ids; add some: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
        IdRange::LEAST
    )]
    NoIds {
        /// Where grants stand.
        file: &'static str,
        /// Who has none.
        user: String,
    },
    /// `newuidmap` or `newgidmap` has refused, and said why on standard error, or is not there.
    #[error("newuidmap and newgidmap, of Debian's package `uidmap`, did not map the subordinate ids (see above)")]
    NotMapped,
}

/// Whether this process is an ordinary user's, without privilege.
#[must_use]
pub fn needed() -> bool {
    !geteuid().is_root() && !caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).unwrap_or(false)
}

/// Whether this process is in the host's user namespace, whose root may do what no other may: make device nodes.
#[must_use]
pub fn on_host() -> bool {
    fs::metadata("/proc/self/ns/user").is_ok_and(|namespace| namespace.ino() == INITIAL_USER_NAMESPACE)
}

/// Executes this program anew, with the same arguments, as root of a new user namespace. Only comes back with an error.
/// Servers agree about uids in `lock_dir`, or where that is the host's, in the user's home directory.
///
/// # Errors
/// See [`RootlessError`]; this process is then as it was, or in a namespace in which it can do nothing.
pub fn enter(lock_dir: &Path) -> Result<Infallible, RootlessError> {
    let call = |what| move |source: io::Error| RootlessError::Call { what, source };
    let proof = SingleThreaded::prove().map_err(|errno| call("count threads")(errno.into()))?;
    let user = User::from_uid(geteuid()).ok().flatten();
    let user = user.ok_or_else(|| call("look up the own user")(Errno::ENOENT.into()))?;
    let uids = Subordinate::of(&user, "/etc/subuid")?;
    let gids = Subordinate::of(&user, "/etc/subgid")?;
    map_from_outside(&proof, &uids.map(geteuid().as_raw()), &gids.map(getegid().as_raw()))?;
    let (root, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(group, group, group)
        .and_then(|()| setresuid(root, root, root))
        .map_err(|errno| call("become root of the user namespace")(errno.into()))?;
    // after an exec the namespace owns the process's memory too, so that its files in `/proc` are its root's
    // by its path: `/proc/self/exe` leads to the mount of the namespace that was left, which cannot be cloned here
    let mut again = Command::new(std::env::current_exe().map_err(call("find this program"))?);
    let mut words = std::env::args_os();
    words.next().map(|name| again.arg0(name));
    again.args(words);
    let chosen = lock_dir != Path::new(uids::LOCK_DIR);
    again.env(LOCK_DIR_VARIABLE, if chosen { lock_dir.to_owned() } else { user.dir.join(LOCK_DIR) });
    Err(call("execute this program again")(again.exec()))
}

/// Enters new user and mount namespaces, which a child that stays outside has mapped by the tools.
fn map_from_outside(proof: &SingleThreaded, uid_map: &[String], gid_map: &[String]) -> Result<(), RootlessError> {
    let call = |what| move |source: io::Error| RootlessError::Call { what, source };
    let (mut entered, mut enter) = io::pipe().map_err(call("make a pipe"))?;
    let this = Pid::this();
    let Some(outside) = fork(proof).map_err(|errno| call("fork")(errno.into()))? else {
        drop(enter);
        // end-of-file instead of a byte: it has not entered
        let told = entered.read_exact(&mut [0]).is_ok();
        let mapped = told && map_by("newuidmap", this, uid_map) && map_by("newgidmap", this, gid_map);
        exit_now(i32::from(!mapped));
    };
    drop(entered);
    let unshared = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS);
    let told = unshared.map_err(io::Error::from).and_then(|()| enter.write_all(&[1]));
    drop(enter);
    let status = waitpid(outside, None);
    told.map_err(call("make a user namespace as an ordinary user"))?;
    if matches!(status, Ok(WaitStatus::Exited(_, 0))) { Ok(()) } else { Err(RootlessError::NotMapped) }
}

fn map_by(tool: &str, pid: Pid, map: &[String]) -> bool {
    Command::new(tool).arg(pid.to_string()).args(map).status().is_ok_and(|status| status.success())
}

/// A run of ids that a user may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Subordinate {
    first: u32,
    count: u32,
}

impl Subordinate {
    fn of(user: &User, file: &'static str) -> Result<Self, RootlessError> {
        let text = fs::read_to_string(file).unwrap_or_default(); // no file, no grants
        let found = Self::find(&text, &user.name, user.uid.as_raw());
        found.ok_or_else(|| RootlessError::NoIds { file, user: user.name.clone() })
    }

    /// The longest of the user's grants in `text`, lines of `name-or-uid:first:count` (`subuid(5)`).
    fn find(text: &str, name: &str, uid: u32) -> Option<Self> {
        let grant = |line: &str| {
            let [owner, first, count] = line.trim().split(':').collect::<Vec<_>>()[..] else { return None };
            let granted = owner == name || owner.parse() == Ok(uid);
            let grant = Self { first: first.parse().ok()?, count: count.parse().ok()? };
            (granted && grant.count >= IdRange::LEAST).then_some(grant)
        };
        text.lines().filter_map(grant).max_by_key(|grant| grant.count)
    }

    /// Arguments of `newuidmap`: the user is root inside, and the grant is what comes after.
    fn map(self, own: u32) -> Vec<String> {
        [0, own, 1, 1, self.first, self.count].iter().map(u32::to_string).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_grant_to_the_user_by_name_or_number_is_taken() {
        let text = "# a comment\nother:1:99999999\nann:100000:65536\n1000:300000:131072\nann:5\nann:x:70000\n";
        let found = |name, uid| Subordinate::find(text, name, uid).map(|grant| grant.first);
        assert_eq!(found("ann", 1000), Some(300_000));
        assert_eq!(found("ann", 1001), Some(100_000));
        assert_eq!(found("bob", 1001), None);
        assert_eq!(Subordinate::find("ann:1:100\n", "ann", 1), None, "too few for anything");
    }

    #[test]
    fn the_host_s_namespace_is_told_from_another() {
        // the first process that is seen is in the same one, unless this runs as an ordinary user
        let first = fs::metadata("/proc/1/ns/user").map(|namespace| namespace.ino());
        if let Ok(first) = first {
            assert_eq!(on_host(), first == INITIAL_USER_NAMESPACE);
        }
    }
}
