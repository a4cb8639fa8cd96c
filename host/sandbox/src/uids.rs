//! Host uids for jobs: every live job has ids that no other live job on this host has.
//!
//! Kernel quotas per uid (inotify instances, keys, pipe pages, pending signals) cross all namespaces, so two jobs must
//! never share a uid, whoever's jobs and whichever server's they are. The uid space is divided into blocks. An
//! instance claims a block by an open-file-description lock on one byte of a file that all instances on the host
//! share; the kernel gives the lock up when the last process that holds the file is gone. Within its blocks an
//! instance gives each tenant runs of job slots, so that all of a tenant's uids are together.
//!
//! The same file keeps the launchers of one instance apart: each locks a byte that stands for it before it touches the
//! instance's cgroups.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::name::Name;
use crate::spec::IDS_PER_JOB;

/// The first uid for jobs. 1879048192 to 2147483646 is the range that the systemd project's table of uid ranges
/// leaves unused on Linux systems, above every range for users, containers and `/etc/subuid`.
const FIRST_UID: u32 = 0x7000_0000;

/// Uids of one block: 163 runs.
const BLOCK_UIDS: u32 = 1 << 20;

/// Number of blocks: up to 2^31, above which some programs take uids for negative.
const BLOCKS: u32 = 255;

/// Job slots in one run: as many as a tenant may have jobs running by default.
const RUN_SLOTS: u32 = 64;

const RUN_UIDS: u32 = RUN_SLOTS * IDS_PER_JOB;
const RUNS_PER_BLOCK: u32 = BLOCK_UIDS / RUN_UIDS;

/// How long the last launcher of an instance may take to end when its server has died: longer than its last wait and
/// its and its sweeper's sweep together.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(6);

/// How often that is looked at.
const PREDECESSOR_LOOK: Duration = Duration::from_millis(2);

/// Where instances on one host find each other.
pub const LOCK_DIR: &str = "/run/holm";

/// No uids could be had.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// The lock file could not be made or opened.
    #[error("open `{path}`")]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Other instances hold every block.
    #[error("all {BLOCKS} blocks of host uids are claimed by other servers on this host")]
    Exhausted,
    /// An earlier launcher still has the instance's cgroups.
    #[error("the launcher of the last server on this data directory has not ended; end it, or wait")]
    Predecessor,
}

/// The uids of this instance.
#[derive(Debug)]
pub(crate) struct UidPool {
    lock: OwnedFd,
    blocks: Vec<u32>,
    /// Run number (block × runs per block + run) to the tenant that has it.
    runs: BTreeMap<u32, Name>,
    tenants: HashMap<Name, Vec<Run>>,
}

#[derive(Debug)]
struct Run {
    number: u32,
    /// Bit n is set while slot n is taken.
    taken: u64,
}

/// The ids of one live job: `first` to `first + IDS_PER_JOB - 1` on the host. Give it back with [`UidPool::give_back`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct JobIds {
    pub(crate) first: u32,
    run: u32,
    slot: u32,
}

impl UidPool {
    /// Claims a first block, through a lock file in `dir`.
    pub(crate) fn claim(dir: &Path) -> Result<Self, UidError> {
        let path = dir.join("uid-blocks");
        let open = || -> io::Result<OwnedFd> {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
            let mut options = OpenOptions::new();
            // O_NOFOLLOW: nobody but root may write here, but nothing is lost by not trusting that
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            Ok(options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(&path)?.into())
        };
        let lock = open().map_err(|source| UidError::Open { path: path.clone(), source })?;
        let mut pool = Self { lock, blocks: Vec::new(), runs: BTreeMap::new(), tenants: HashMap::new() };
        pool.claim_block().map_err(|_| UidError::Exhausted)?;
        Ok(pool)
    }

    /// Waits until no earlier launcher of `instance` is left, nor its sweeper: both remove its cgroups by name, whoever
    /// has made them. Then is what the next one waits for.
    pub(crate) fn succeed(self, instance: &Name) -> Result<Self, UidError> {
        let deadline = Instant::now() + PREDECESSOR_PATIENCE;
        while !lock_byte(&self.lock, instance_byte(instance)) {
            if Instant::now() > deadline {
                return Err(UidError::Predecessor);
            }
            std::thread::sleep(PREDECESSOR_LOOK);
        }
        Ok(self)
    }

    /// The descriptor that holds the claim.
    pub(crate) fn claim_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    fn claim_block(&mut self) -> nix::Result<()> {
        let free = (0..BLOCKS).find(|block| !self.blocks.contains(block) && lock_byte(&self.lock, i64::from(*block)));
        self.blocks.push(free.ok_or(Errno::EUSERS)?);
        Ok(())
    }

    /// Takes the ids for one more job of `tenant`. `EUSERS` when the host has none left.
    pub(crate) fn take(&mut self, tenant: &Name) -> nix::Result<JobIds> {
        let full = |run: &Run| run.taken == u64::MAX;
        if self.tenants.get(tenant).is_none_or(|runs| runs.iter().all(full)) {
            let number = self.free_run()?;
            self.runs.insert(number, tenant.clone());
            self.tenants.entry(tenant.clone()).or_default().push(Run { number, taken: 0 });
        }
        let runs = self.tenants.get_mut(tenant).ok_or(Errno::EUSERS)?;
        let run = runs.iter_mut().find(|run| !full(run)).ok_or(Errno::EUSERS)?;
        let slot = run.taken.trailing_ones();
        run.taken |= 1 << slot;
        let (block, within) = (run.number / RUNS_PER_BLOCK, run.number % RUNS_PER_BLOCK);
        let first = FIRST_UID + block * BLOCK_UIDS + within * RUN_UIDS + slot * IDS_PER_JOB;
        Ok(JobIds { first, run: run.number, slot })
    }

    fn free_run(&mut self) -> nix::Result<u32> {
        let find = |pool: &Self| {
            let numbers = pool.blocks.iter().flat_map(|block| {
                let start = block * RUNS_PER_BLOCK;
                start..start + RUNS_PER_BLOCK
            });
            numbers.into_iter().find(|number| !pool.runs.contains_key(number))
        };
        if let Some(number) = find(self) {
            return Ok(number);
        }
        self.claim_block()?;
        find(self).ok_or(Errno::EUSERS)
    }

    /// Gives a dead job's ids back.
    pub(crate) fn give_back(&mut self, ids: &JobIds) {
        let Some(tenant) = self.runs.get(&ids.run).cloned() else {
            return;
        };
        let Some(runs) = self.tenants.get_mut(&tenant) else {
            return;
        };
        if let Some(run) = runs.iter_mut().find(|run| run.number == ids.run) {
            run.taken &= !(1 << ids.slot);
        }
        runs.retain(|run| {
            if run.taken == 0 {
                self.runs.remove(&run.number);
            }
            run.taken != 0
        });
        if runs.is_empty() {
            self.tenants.remove(&tenant);
        }
    }
}

/// The byte that stands for an instance, far behind those of the blocks: its name's FNV-1a hash.
fn instance_byte(instance: &Name) -> i64 {
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = instance.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    (hash >> 2).cast_signed() | 1 << 61
}

/// Tries to lock byte `at` of the file for this open file description.
#[allow(clippy::cast_possible_truncation)] // the C struct has these small constants as shorts
fn lock_byte(fd: &OwnedFd, at: i64) -> bool {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(fd, FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn dir(test: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("holm-uids-{test}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn no_two_live_jobs_share_a_uid() {
        let dir = dir("share");
        let (a, b): (Name, Name) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut one = UidPool::claim(&dir).unwrap();
        let mut two = UidPool::claim(&dir).unwrap();
        let mut seen = HashSet::new();
        let mut held = Vec::new();
        for i in 0..200 {
            let tenant = if i % 2 == 0 { &a } else { &b };
            for pool in [&mut one, &mut two] {
                let ids = pool.take(tenant).unwrap();
                assert!(seen.insert(ids.first / IDS_PER_JOB), "{ids:?} taken twice");
                held.push(ids);
            }
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_tenant_has_its_uids_together_and_gives_them_back() {
        let dir = dir("back");
        let mut pool = UidPool::claim(&dir).unwrap();
        let (a, b): (Name, Name) = ("a".parse().unwrap(), "b".parse().unwrap());
        let ids: Vec<JobIds> = (0..RUN_SLOTS).map(|_| pool.take(&a).unwrap()).collect();
        assert_eq!(ids[63].first - ids[0].first, 63 * IDS_PER_JOB);
        let other = pool.take(&b).unwrap();
        assert!(other.first >= ids[0].first + RUN_UIDS);
        for ids in &ids {
            pool.give_back(ids);
        }
        pool.give_back(&other);
        assert!(pool.runs.is_empty() && pool.tenants.is_empty());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_instance_has_one_launcher_at_a_time() {
        let dir = dir("succeed");
        let claim = |name: &str| UidPool::claim(&dir).unwrap().succeed(&name.parse().unwrap());
        let (first, other) = (claim("a").unwrap(), claim("b").unwrap());
        let (begun, wait) = (Instant::now(), Duration::from_millis(50));
        let second = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(wait);
                drop(first);
            });
            claim("a")
        });
        assert!(second.is_ok() && begun.elapsed() >= wait);
        drop(other);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_full_block_makes_the_pool_claim_another() {
        let dir = dir("full");
        let mut pool = UidPool::claim(&dir).unwrap();
        let tenants: Vec<Name> = (0..=RUNS_PER_BLOCK).map(|i| format!("t{i}").parse().unwrap()).collect();
        let firsts: HashSet<u32> = tenants.iter().map(|t| pool.take(t).unwrap().first).collect();
        assert_eq!(firsts.len(), tenants.len());
        assert_eq!(pool.blocks.len(), 2);
        fs::remove_dir_all(dir).unwrap();
    }
}
