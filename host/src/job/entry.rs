//! One job as long as it is known: its record, how far it has come, and what can be done with it meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use holm_sandbox::name::Name;
use holm_sandbox::usage::{ProcessInfo, Stats};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::outcome::Stop;
use super::record::{JobRecord, State};
use crate::admission::PermitId;
use crate::launcher::{Controls, Flow};
use crate::limit::{Limit, Limits};

/// One job.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: Uuid,
    pub(super) tenant: Name,
    pub(super) plugin: Name,
    record: Mutex<JobRecord>,
    /// The limits with which it was submitted, and those that it would have had if its request had given none.
    pub(super) first_limits: Limits,
    pub(super) defaults: Limits,
    /// Bytes through its streams.
    pub(super) flows: Flows,
    /// Asks the job's task to end it.
    pub(super) cancel: CancellationToken,
    /// Why it was ended. Set at most once.
    pub(super) stop: OnceLock<Stop>,
    phase: watch::Sender<Phase>,
    /// Its place among those that run, once it has one.
    pub(super) permit: OnceLock<PermitId>,
    /// Its sandbox, once that has the job.
    controls: OnceLock<Controls>,
    /// Held by whoever changes how it runs: one after the other.
    pub(super) turn: tokio::sync::Mutex<Holds>,
    /// What it used, the bytes of its streams, and which processes it had, when somebody last looked.
    pub(super) stats: Look<(Stats, (u64, u64))>,
    pub(super) processes: Look<Vec<ProcessInfo>>,
    /// How often it has been made to stand still, to go on, or to have other limits.
    changes: AtomicU64,
    /// Its own sandbox is frozen.
    frozen: AtomicBool,
    /// Its tenant is.
    pub(super) tenant_paused: Arc<AtomicBool>,
}

/// What was seen when somebody last looked, for those who look again at once: each look costs the launcher time that is
/// everybody's. Held while one looks.
#[derive(Debug)]
pub(super) struct Look<T>(tokio::sync::Mutex<Option<Seen<T>>>);

#[derive(Debug)]
struct Seen<T> {
    at: Instant,
    /// How often the job had been changed by then.
    changes: u64,
    value: T,
}

impl<T> Default for Look<T> {
    fn default() -> Self {
        Self(tokio::sync::Mutex::default())
    }
}

impl<T: Clone> Look<T> {
    /// What was seen less than `fresh` ago and after the last of so many `changes`, or else what `look` sees now. `None` if
    /// it cannot be had within `patience`.
    pub(super) async fn within<E>(
        &self,
        changes: u64,
        fresh: Duration,
        patience: Duration,
        look: impl Future<Output = Result<T, E>>,
    ) -> Option<Result<T, E>> {
        let mut seen = tokio::time::timeout(patience, self.0.lock()).await.ok()?;
        if let Some(seen) = seen.as_ref().filter(|seen| seen.at.elapsed() < fresh && seen.changes == changes) {
            return Some(Ok(seen.value.clone()));
        }
        let (at, looked) = (Instant::now(), look.await);
        if let Ok(value) = &looked {
            *seen = Some(Seen { at, changes, value: value.clone() });
        }
        Some(looked)
    }
}

/// Who wants a job to stand still, its tenant apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holds {
    /// A request to pause it.
    pub(super) request: bool,
    /// Its place is lent to a job of higher priority.
    pub(super) lent: bool,
}

impl Holds {
    pub(super) fn any(self) -> bool {
        self.request || self.lent
    }
}

/// How far a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It waits for a place.
    Queued,
    /// Its sandbox is being made.
    Launching,
    /// It is in its sandbox.
    InSandbox,
    /// It is over.
    Over,
}

/// What goes in and out of a job.
#[derive(Debug)]
pub(super) struct Flows {
    pub(super) input: Flow,
    pub(super) output: Arc<Flow>,
    pub(super) errors: Arc<Flow>,
}

impl Flows {
    /// Of input and of standard output.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.input.bytes(), self.output.bytes())
    }
}

impl Entry {
    /// `record` is that of a job which waits for a place.
    pub(super) fn new(
        (tenant, plugin): (Name, Name),
        record: JobRecord,
        defaults: Limits,
        tenant_paused: Arc<AtomicBool>,
    ) -> Self {
        let limits = record.limits.clone();
        let flow = |limit| Flow::new(limits.get(limit));
        let output = || Arc::new(flow(Limit::OutputBytes));
        Self {
            id: record.id,
            tenant,
            plugin,
            record: Mutex::new(record),
            flows: Flows { input: flow(Limit::InputBytes), output: output(), errors: output() },
            first_limits: limits,
            defaults,
            cancel: CancellationToken::new(),
            stop: OnceLock::new(),
            phase: watch::Sender::new(Phase::Queued),
            permit: OnceLock::new(),
            controls: OnceLock::new(),
            turn: tokio::sync::Mutex::default(),
            stats: Look::default(),
            processes: Look::default(),
            changes: AtomicU64::new(0),
            frozen: AtomicBool::new(false),
            tenant_paused,
        }
    }

    /// What is known of it now.
    pub(super) fn record(&self) -> JobRecord {
        let mut record = self.locked().clone();
        record.state = self.shown(record.state);
        record
    }

    /// Where it is in its life.
    pub(super) fn state(&self) -> State {
        let state = self.locked().state;
        self.shown(state)
    }

    /// Of a job that runs it depends on others whether it does.
    fn shown(&self, state: State) -> State {
        let stands = self.is_frozen() || self.tenant_paused.load(Ordering::SeqCst);
        if state == State::Running && stands { State::Paused } else { state }
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut JobRecord)) {
        change(&mut self.locked());
    }

    fn locked(&self) -> MutexGuard<'_, JobRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limits that hold for it now.
    pub(super) fn limits(&self) -> Limits {
        self.locked().limits.clone()
    }

    /// Other limits hold for it from now on.
    pub(super) fn set_limits(&self, limits: Limits) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.update(|record| record.limits = limits);
    }

    /// Another number whenever it has been changed while it runs, or its tenant paused or resumed.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst) << 1 | u64::from(self.tenant_paused.load(Ordering::SeqCst))
    }

    /// Whether its own sandbox stands still.
    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst)
    }

    /// The kernel says that its sandbox stands still, or goes on.
    pub(super) fn set_frozen(&self, frozen: bool) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.frozen.store(frozen, Ordering::SeqCst);
    }

    /// Its place is given; the sandbox is on its way.
    pub(super) fn admitted(&self, permit: PermitId, queue_us: u64) {
        let _ = self.permit.set(permit);
        self.update(|record| {
            record.state = State::Running;
            record.usage.queue_us = queue_us;
        });
        self.phase.send_replace(Phase::Launching);
    }

    /// Its sandbox has the job.
    pub(super) fn in_sandbox(&self, controls: Controls) {
        let _ = self.controls.set(controls);
        self.phase.send_replace(Phase::InSandbox);
    }

    pub(super) fn over(&self) {
        self.phase.send_replace(Phase::Over);
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits while it is in this phase.
    pub(super) async fn leaves(&self, phase: Phase) {
        // the sender is `self`, so the channel cannot close before
        let _ = self.phase.subscribe().wait_for(|now| *now != phase).await;
    }

    pub(super) fn controls(&self) -> Option<&Controls> {
        self.controls.get()
    }

    /// Asks for its end. False if it has ended.
    pub(super) fn stop(&self, why: Stop) -> bool {
        if self.locked().state == State::Finished {
            return false;
        }
        // the first reason stands, and its order to end the job too
        let _ = self.stop.set(why);
        self.cancel.cancel();
        true
    }

    /// Waits until it is over.
    pub(super) async fn finished(&self) {
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Over).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_looks_again_at_once_sees_the_same_unless_something_was_changed() {
        let (looks, looked) = (Look::default(), std::sync::atomic::AtomicU64::new(0));
        let look = async |changes| {
            let now = async { Ok::<_, ()>(looked.fetch_add(1, Ordering::SeqCst)) };
            looks.within(changes, Duration::from_secs(3600), Duration::from_secs(1), now).await
        };
        assert_eq!((look(0).await, look(0).await), (Some(Ok(0)), Some(Ok(0))));
        assert_eq!((look(1).await, look(1).await), (Some(Ok(1)), Some(Ok(1))));
        let failed = async { Err::<u64, _>("gone") };
        assert_eq!(looks.within(2, Duration::ZERO, Duration::from_secs(1), failed).await, Some(Err("gone")));
        // somebody else looks, and does not come to an end
        let _other = looks.0.lock().await;
        assert_eq!(look(3).await, None);
    }
}
