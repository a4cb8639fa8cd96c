//! Parked sandboxes: confined, loaded, read back by the launcher, and waiting for a job that has not come yet.
//!
//! A parked sandbox is one like any other, made a little earlier: it serves one job and dies. Plugins that are asked for
//! again and again have a few of them, the more the more often; plugins that are not have none.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holm_sandbox::name::Name;
use holm_sandbox::spec::SandboxSpec;
use holm_sandbox::usage::Isolation;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Launcher, Sandbox, SandboxError, Stdio};

/// How long after a sandbox was taken another one is made in its place: the job that took it has both CPUs of a small
/// machine until then.
const REFILL_AFTER: Duration = Duration::from_millis(2);

/// How long after a job was seen to wait for a sandbox of its own it is looked whether one still does.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How much of the near future is provided for: jobs that come within this time find a sandbox each. Some ten launches.
const LEAD: Duration = Duration::from_millis(50);

/// The time over which the rate of jobs is averaged.
const MEMORY: Duration = Duration::from_secs(1);

/// How long nothing is parked for a plugin after a sandbox for it could not be made.
const BACK_OFF: Duration = Duration::from_secs(1);

/// What one parked sandbox is taken to use of its tenant's ceiling: measured are under 2 MiB, and two processes.
const PARKED_BYTES: u64 = 4 << 20;
const PARKED_PIDS: u32 = 2;

/// Streams are made ahead for as long as no more sandboxes than that are parked: three pipes each, and of 1,024 pipes of one
/// user on the kernel makes them smaller (`pipe-user-pages-soft`, `pipe(7)`).
const STREAMS_AHEAD: usize = 128;

/// The parts of a tenant's ceilings that its parked sandboxes may use: one in so many. A job that finds a little less memory
/// hardly knows; one that forks for as long as it may counts.
const MEMORY_PART: u64 = 8;
const PIDS_PART: u32 = 64;

/// How many sandboxes are parked, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParkingRules {
    /// For one plugin at most. Zero parks none.
    pub per_plugin: usize,
    /// For all plugins together at most.
    pub in_all: usize,
    /// After the plugin's last job.
    pub idle: Duration,
}

/// A sandbox that waits for a job.
#[derive(Debug)]
pub struct Parked {
    /// It.
    pub sandbox: Sandbox,
    /// What the kernel says of its layers.
    pub isolation: Isolation,
    /// Its job's streams, if they have been made ahead.
    pub streams: Option<Stdio>,
}

/// All parked sandboxes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Parking(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    launcher: Launcher,
    rules: ParkingRules,
    lots: Mutex<Lots>,
    /// Jobs that wait for a sandbox of their own. None is parked meanwhile.
    waiting: AtomicUsize,
}

#[derive(Debug, Default)]
struct Lots {
    /// By tenant and plugin.
    lots: HashMap<(Name, Name), Lot>,
    /// Parked in all of them, or about to be.
    parked: usize,
    /// Nothing is parked any more.
    closed: bool,
}

/// One plugin's.
#[derive(Debug)]
struct Lot {
    /// What they are made of. One that is parked serves only jobs that would have had exactly the same made for them.
    recipe: SandboxSpec,
    /// Another recipe that has been asked for since the last use of this one: the second time it takes its place.
    next: Option<SandboxSpec>,
    /// What to make more of, once the recipe has been asked for twice.
    artifact: Option<Arc<File>>,
    parked: Vec<Parked>,
    refilling: bool,
    rate: Rate,
    not_before: Instant,
}

/// A moving average of events per second.
#[derive(Clone, Copy, Debug)]
struct Rate {
    per_second: f64,
    last: Instant,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self { per_second: 0.0, last: now }
    }

    fn at(&self, now: Instant) -> f64 {
        self.per_second * (-(now - self.last).as_secs_f64() / MEMORY.as_secs_f64()).exp()
    }

    fn count(&mut self, now: Instant) {
        *self = Self { per_second: self.at(now) + 1.0 / MEMORY.as_secs_f64(), last: now };
    }
}

impl Lot {
    fn new(recipe: SandboxSpec, now: Instant) -> Self {
        let mut rate = Rate::new(now);
        rate.count(now);
        Self { recipe, next: None, artifact: None, parked: Vec::new(), refilling: false, rate, not_before: now }
    }

    /// How many it should have.
    fn wanted(&self, rules: &ParkingRules, now: Instant) -> usize {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a small number that is not negative
        let expected = 1 + (self.rate.at(now) * LEAD.as_secs_f64()) as usize;
        expected.min(rules.per_plugin).min(room(&self.recipe))
    }
}

/// How many of `spec` may be parked without taking much of the tenant's ceiling.
fn room(spec: &SandboxSpec) -> usize {
    let memory = spec.ceiling.memory_bytes.map(|bytes| bytes / MEMORY_PART / PARKED_BYTES);
    let pids = spec.ceiling.pids.map(|pids| u64::from(pids / PIDS_PART / PARKED_PIDS));
    [memory, pids].into_iter().flatten().min().map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX))
}

impl Parking {
    /// With nothing parked yet.
    #[must_use]
    pub fn new(launcher: Launcher, rules: ParkingRules) -> Self {
        Self(Arc::new(Inner { launcher, rules, lots: Mutex::default(), waiting: AtomicUsize::new(0) }))
    }

    /// Takes a sandbox that waits for a job of this recipe. Counts the demand in any case; `artifact` is what more of them are
    /// made with.
    pub fn take(&self, recipe: &SandboxSpec, artifact: &File) -> Option<Parked> {
        if self.0.rules.per_plugin == 0 {
            return None;
        }
        let (key, now) = (key(recipe), Instant::now());
        let mut lots = self.0.lots();
        if lots.closed {
            return None;
        }
        let Some(lot) = lots.lots.get_mut(&key) else {
            lots.lots.insert(key.clone(), Lot::new(recipe.clone(), now));
            tokio::spawn(clear_when_idle(self.0.clone(), key));
            return None;
        };
        let mut given_up = Vec::new();
        if lot.recipe != *recipe {
            if lot.next.as_ref() != Some(recipe) {
                lot.next = Some(recipe.clone());
                return None;
            }
            given_up = std::mem::replace(lot, Lot { refilling: lot.refilling, ..Lot::new(recipe.clone(), now) }).parked;
        }
        lot.next = None;
        lot.rate.count(now);
        if lot.artifact.is_none() {
            lot.artifact = artifact.try_clone().ok().map(Arc::new);
        }
        // one that has died meanwhile, of its tenant's lack of memory for instance, is as good as none
        let (taken, dead) = pop_good(&mut lot.parked, |parked| parked.sandbox.is_waiting());
        given_up.extend(dead);
        let refill = !std::mem::replace(&mut lot.refilling, true);
        lots.parked -= given_up.len() + usize::from(taken.is_some());
        drop(lots);
        if refill {
            tokio::spawn(refill_soon(self.0.clone(), key));
        }
        taken
    }

    /// Has a sandbox made for a job that waits for it.
    ///
    /// # Errors
    /// See [`Launcher::launch`] and [`Sandbox::ready`].
    pub fn launch(&self, spec: SandboxSpec, artifact: File) -> Result<(Sandbox, WaitingJob), SandboxError> {
        let waiting = WaitingJob::new(self.0.clone());
        Ok((self.0.launcher.launch(spec, artifact)?, waiting))
    }

    /// Gives up everything, for good.
    pub fn close(&self) {
        let mut lots = self.0.lots();
        *lots = Lots { closed: true, ..Lots::default() };
    }

    /// Gives up what is parked whenever the host is short of memory, and parks nothing for a while. Never ends.
    pub async fn keep_memory(&self) {
        loop {
            self.0.launcher.memory_is_short().await;
            let given_up = self.0.give_up_parked();
            tracing::debug!(given_up, "the host is short of memory: nothing is parked");
        }
    }

    /// Gives up what sandboxes of a deleted plugin are cloned from.
    pub fn forget(&self, tenant: Name, plugin: Name) {
        self.0.launcher.forget_program(tenant, plugin);
    }

    /// Gives up what is parked for a tenant, or for one of its plugins: nothing of them is to run any more.
    pub fn clear(&self, tenant: &Name, plugin: Option<&Name>) {
        let mut lots = self.0.lots();
        let mut given_up = 0;
        lots.lots.retain(|(of_tenant, of_plugin), lot| {
            let keep = of_tenant != tenant || plugin.is_some_and(|plugin| of_plugin != plugin);
            given_up += if keep { 0 } else { lot.parked.len() };
            keep
        });
        lots.parked -= given_up;
    }
}

impl Inner {
    fn lots(&self) -> MutexGuard<'_, Lots> {
        self.lots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what is parked, and does not make more for a while. How many that were.
    fn give_up_parked(&self) -> usize {
        let mut lots = self.lots();
        let mut given_up = 0;
        for lot in lots.lots.values_mut() {
            lot.not_before = Instant::now() + BACK_OFF;
            given_up += lot.parked.drain(..).count();
        }
        lots.parked -= given_up;
        given_up
    }

    /// What to make one more of, which counts as parked from now on. `None` ends the refilling.
    fn next_to_make(&self, key: &(Name, Name)) -> Option<(SandboxSpec, Arc<File>)> {
        let now = Instant::now();
        let mut lots = self.lots();
        let full = lots.parked >= self.rules.in_all;
        let lot = lots.lots.get_mut(key)?;
        let enough = full || lot.parked.len() >= lot.wanted(&self.rules, now) || now < lot.not_before;
        let Some(artifact) = lot.artifact.clone().filter(|_| !enough) else {
            lot.refilling = false;
            return None;
        };
        let recipe = lot.recipe.clone();
        lots.parked += 1;
        Some((recipe, artifact))
    }

    /// Makes one.
    async fn make(&self, recipe: &SandboxSpec, artifact: &File) -> Result<Parked, SandboxError> {
        let mut sandbox = self.launcher.launch(recipe.clone(), artifact.try_clone()?)?;
        let isolation = sandbox.ready().await?;
        let ahead = self.lots().parked <= STREAMS_AHEAD;
        let streams = ahead.then(Stdio::make).transpose()?;
        Ok(Parked { sandbox, isolation, streams })
    }

    /// Parks what was made, if it is still wanted.
    fn park(&self, key: &(Name, Name), recipe: &SandboxSpec, made: Result<Parked, SandboxError>) {
        let mut lots = self.lots();
        match (lots.lots.get_mut(key), made) {
            (Some(lot), Ok(made)) if lot.recipe == *recipe => return lot.parked.push(made),
            (Some(lot), Err(error)) => {
                tracing::debug!(tenant = %key.0, plugin = %key.1, %error, "no sandbox could be parked");
                lot.not_before = Instant::now() + BACK_OFF;
            }
            _ => {}
        }
        lots.parked = lots.parked.saturating_sub(1); // none if all has been given up meanwhile
    }
}

/// Makes as many sandboxes as are wanted, one after the other.
async fn refill_soon(inner: Arc<Inner>, key: (Name, Name)) {
    loop {
        sleep(REFILL_AFTER).await;
        while inner.waiting.load(Ordering::Relaxed) > 0 {
            // that job may be the plugin's last for now: were this given up, its next would find none
            sleep(LOOK_AGAIN).await;
        }
        let Some((recipe, artifact)) = inner.next_to_make(&key) else { return };
        let made = inner.make(&recipe, &artifact).await;
        inner.park(&key, &recipe, made);
    }
}

/// Gives up a plugin's sandboxes once no job has come for a while.
async fn clear_when_idle(inner: Arc<Inner>, key: (Name, Name)) {
    loop {
        let until = match inner.lots().lots.get(&key) {
            Some(lot) => lot.rate.last + inner.rules.idle,
            None => return,
        };
        if until <= Instant::now() {
            let mut lots = inner.lots();
            let given_up = lots.lots.remove(&key).map_or(0, |lot| lot.parked.len());
            lots.parked -= given_up;
            return;
        }
        sleep_until(until).await;
    }
}

/// Takes the last that is good, and those behind it that are not.
fn pop_good<T>(stack: &mut Vec<T>, mut is_good: impl FnMut(&mut T) -> bool) -> (Option<T>, Vec<T>) {
    let mut others = Vec::new();
    while let Some(mut last) = stack.pop() {
        if is_good(&mut last) {
            return (Some(last), others);
        }
        others.push(last);
    }
    (None, others)
}

fn key(recipe: &SandboxSpec) -> (Name, Name) {
    (recipe.tenant.clone(), recipe.program.clone())
}

/// A job that waits for a sandbox of its own, until this is dropped.
#[derive(Debug)]
pub struct WaitingJob(Arc<Inner>);

impl WaitingJob {
    fn new(inner: Arc<Inner>) -> Self {
        inner.waiting.fetch_add(1, Ordering::Relaxed);
        Self(inner)
    }
}

impl Drop for WaitingJob {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_takes_one_sandbox_and_leaves_the_others() {
        let mut parked = vec![1, 2, 3, 4, 5];
        assert_eq!(pop_good(&mut parked, |n| *n < 4), (Some(3), vec![5, 4]));
        assert_eq!(parked, [1, 2]);
        assert_eq!(pop_good(&mut parked, |_| false), (None, vec![2, 1]));
        assert_eq!(parked, [0; 0]);
    }
}
