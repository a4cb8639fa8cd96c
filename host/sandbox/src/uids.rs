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

/// Job slots in one run: as many as a tenant may have jobs running by default. Ahead of them a run has the ids of the
/// processes that jobs are cloned from, as many as one slot.
const RUN_SLOTS: u32 = 64;

/// Job slots in one run, and runs in one block, of the few ids that an ordinary user has.
const FEW_SLOTS: u32 = 8;
const FEW_RUNS: u32 = 10;

/// The ids that jobs may have on this machine, and how they are divided: all instances that share them agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    first: u32,
    blocks: u32,
    block_ids: u32,
    /// Job slots in one run, at most 64.
    run_slots: u32,
}

impl IdRange {
    /// The ids of a host: 255 blocks of 161 runs up to 2^31, above which some programs take uids for negative.
    const HOST: Self = Self { first: FIRST_UID, blocks: 255, block_ids: 1 << 20, run_slots: RUN_SLOTS };

    /// The fewest ids that can be divided.
    pub(crate) const LEAST: u32 = (1 + FEW_SLOTS) * FEW_RUNS * IDS_PER_JOB;

    /// The ids of this process's user namespace: a host's, or else what is mapped there besides root. `None` if that
    /// is not enough.
    pub(crate) fn of_this_process() -> Option<Self> {
        let read = |file| fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
        Self::of(&read("uid_map"), &read("gid_map"))
    }

    /// From the texts of `/proc/self/uid_map` and `gid_map`: lines of first id inside, first outside, number.
    fn of(uid_map: &str, gid_map: &str) -> Option<Self> {
        let (uids, gids) = (mapped(uid_map), mapped(gid_map));
        let both = |(uid, uids): &(u32, u32), (gid, gids): &(u32, u32)| {
            let (first, end) = ((*uid).max(*gid).max(1), uid.saturating_add(*uids).min(gid.saturating_add(*gids)));
            (first, end.saturating_sub(first))
        };
        let common: Vec<_> = uids.iter().flat_map(|uid| gids.iter().map(move |gid| both(uid, gid))).collect();
        let host = Self::HOST;
        let host_end = host.first + host.blocks * host.block_ids;
        if common.iter().any(|(first, count)| *first <= host.first && first.saturating_add(*count) >= host_end) {
            return Some(host);
        }
        let (first, count) = common.into_iter().max_by_key(|(_, count)| *count)?;
        let few = Self { first, blocks: (count / Self::LEAST).min(255), block_ids: Self::LEAST, run_slots: FEW_SLOTS };
        (few.blocks > 0).then_some(few)
    }

    const fn run_ids(self) -> u32 {
        (1 + self.run_slots) * IDS_PER_JOB
    }

    const fn runs_per_block(self) -> u32 {
        self.block_ids / self.run_ids()
    }
}

/// The first ids inside and the lengths of the lines of a map.
fn mapped(map: &str) -> Vec<(u32, u32)> {
    let line = |line: &str| {
        let [inside, _, count] = line.split_whitespace().collect::<Vec<_>>()[..] else { return None };
        Some((inside.parse().ok()?, count.parse().ok()?))
    };
    map.lines().filter_map(line).collect()
}

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
    #[error("all blocks of uids for jobs are claimed by other servers on this host")]
    Exhausted,
    /// The user namespace has no ids for jobs.
    #[error("fewer than {} ids besides root's are mapped in this user namespace", IdRange::LEAST)]
    TooFew,
    /// An earlier launcher still has the instance's cgroups.
    #[error("the launcher of the last server on this data directory has not ended; end it, or wait")]
    Predecessor,
}

/// The uids of this instance.
#[derive(Debug)]
pub(crate) struct UidPool {
    lock: OwnedFd,
    range: IdRange,
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
    /// Kept for its tenant, jobs or not.
    kept: bool,
}

/// The ids of one live job: `first` to `first + IDS_PER_JOB - 1` on the host. Give it back with [`UidPool::give_back`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct JobIds {
    pub(crate) first: u32,
    /// The run that they are of.
    pub(crate) run: RunIds,
    slot: u32,
}

impl JobIds {
    /// The first of them as a user namespace calls it in which the run's first id is 0.
    pub(crate) fn within_run(&self) -> u32 {
        self.first - self.run.first
    }
}

/// A run of ids, all of one tenant: `first` to `first + count - 1` on the host. Those before the first job's are for the
/// processes that jobs are cloned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RunIds {
    pub(crate) first: u32,
    pub(crate) count: u32,
    number: u32,
}

impl UidPool {
    /// Claims a first block, through a lock file in `dir`.
    pub(crate) fn claim(dir: &Path) -> Result<Self, UidError> {
        let range = IdRange::of_this_process().ok_or(UidError::TooFew)?;
        let path = dir.join("uid-blocks");
        let open = || -> io::Result<OwnedFd> {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
            let mut options = OpenOptions::new();
            // O_NOFOLLOW: nobody but root may write here, but nothing is lost by not trusting that
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            Ok(options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(&path)?.into())
        };
        let lock = open().map_err(|source| UidError::Open { path: path.clone(), source })?;
        let mut pool = Self { lock, range, blocks: Vec::new(), runs: BTreeMap::new(), tenants: HashMap::new() };
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
        let free = (0..self.range.blocks)
            .find(|block| !self.blocks.contains(block) && lock_byte(&self.lock, i64::from(*block)));
        self.blocks.push(free.ok_or(Errno::EUSERS)?);
        Ok(())
    }

    /// Takes the ids for one more job of `tenant`. `EUSERS` when the host has none left.
    pub(crate) fn take(&mut self, tenant: &Name) -> nix::Result<JobIds> {
        let range = self.range;
        let full = |run: &Run| run.taken.count_ones() == range.run_slots;
        if self.tenants.get(tenant).is_none_or(|runs| runs.iter().all(full)) {
            let number = self.free_run()?;
            self.runs.insert(number, tenant.clone());
            self.tenants.entry(tenant.clone()).or_default().push(Run { number, taken: 0, kept: false });
        }
        let runs = self.tenants.get_mut(tenant).ok_or(Errno::EUSERS)?;
        let run = runs.iter_mut().find(|run| !full(run)).ok_or(Errno::EUSERS)?;
        let slot = run.taken.trailing_ones();
        run.taken |= 1 << slot;
        let (block, within) = (run.number / range.runs_per_block(), run.number % range.runs_per_block());
        let first = range.first + block * range.block_ids + within * range.run_ids();
        let run = RunIds { first, count: range.run_ids(), number: run.number };
        Ok(JobIds { first: first + (1 + slot) * IDS_PER_JOB, run, slot })
    }

    /// Keeps a run for the tenant that has it, or lets it go once no job has ids of it.
    pub(crate) fn keep(&mut self, run: RunIds, kept: bool) {
        self.change(run, |run| run.kept = kept);
    }

    fn free_run(&mut self) -> nix::Result<u32> {
        let runs = self.range.runs_per_block();
        let find = |pool: &Self| {
            let numbers = pool.blocks.iter().flat_map(|block| block * runs..(block + 1) * runs);
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
        self.change(ids.run, |run| run.taken &= !(1 << ids.slot));
    }

    /// Changes a run. One that nobody needs any more is any tenant's.
    fn change(&mut self, ids: RunIds, change: impl FnOnce(&mut Run)) {
        let Some(tenant) = self.runs.get(&ids.number).cloned() else { return };
        let Some(runs) = self.tenants.get_mut(&tenant) else { return };
        if let Some(run) = runs.iter_mut().find(|run| run.number == ids.number) {
            change(run);
        }
        runs.retain(|run| {
            let needed = run.taken != 0 || run.kept;
            if !needed {
                self.runs.remove(&run.number);
            }
            needed
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
        let ids: Vec<JobIds> = (0..pool.range.run_slots).map(|_| pool.take(&a).unwrap()).collect();
        let last = pool.range.run_slots - 1;
        assert_eq!(ids[last as usize].first - ids[0].first, last * IDS_PER_JOB);
        let other = pool.take(&b).unwrap();
        assert!(other.first >= ids[0].first + pool.range.run_ids());
        let run = ids[0].run;
        assert_eq!((run.first, ids[0].within_run()), (ids[0].first - IDS_PER_JOB, IDS_PER_JOB));
        pool.keep(run, true);
        for ids in &ids {
            pool.give_back(ids);
        }
        pool.give_back(&other);
        assert_eq!(pool.take(&b).unwrap().run.number, 1, "the first run is kept, without a job");
        assert_eq!(pool.take(&a).unwrap(), ids[0]);
        pool.give_back(&ids[0]);
        pool.give_back(&other);
        pool.keep(run, false);
        assert!(pool.runs.is_empty() && pool.tenants.is_empty());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_user_namespace_has_the_ids_that_are_mapped_in_both_maps() {
        let all = "         0          0 4294967295\n";
        assert_eq!(IdRange::of(all, all), Some(IdRange::HOST));
        let few = "0 1000 1\n1 100000 65536\n";
        let range = IdRange::of(few, few).unwrap();
        assert_eq!((range.first, range.blocks, range.block_ids), (1, 7, 9000));
        assert_eq!(IdRange::of(few, "0 1000 1\n500 100000 65536\n").unwrap().first, 500);
        for too_few in ["0 1000 1\n", "0 1000 1\n1 100000 8999\n", "", "nonsense"] {
            assert_eq!(IdRange::of(too_few, all), None, "{too_few}");
        }
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
        let tenants: Vec<Name> = (0..=pool.range.runs_per_block()).map(|i| format!("t{i}").parse().unwrap()).collect();
        let firsts: HashSet<u32> = tenants.iter().map(|t| pool.take(t).unwrap().first).collect();
        assert_eq!(firsts.len(), tenants.len());
        assert_eq!(pool.blocks.len(), 2);
        fs::remove_dir_all(dir).unwrap();
    }
}
