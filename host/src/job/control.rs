//! What can be done with a job while it runs: let it stand still and go on, change its limits, look at it.
//!
//! Each change is made in a task of its own, one after the other for one job, and told when the kernel holds it: whoever
//! asked for it may go away at any moment. No wait here is without an end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use holm_sandbox::name::Name;
use holm_sandbox::protocol::{Answer, OrderError};
use holm_sandbox::usage::ProcessInfo;
use serde_json::{Map, Value};
use tokio::sync::MutexGuard;
use tokio::time::timeout;
use uuid::Uuid;

use super::entry::{Entry, Holds, Phase};
use super::record::{JobRecord, State, StatsRecord};
use super::run::own_pids;
use super::{Jobs, Stop};
use crate::admission::{AdmissionError, Loan, PermitId};
use crate::launcher::{Controls, Launcher, OrderFailure};
use crate::limit::{Limit, LimitError, Limits, Maximums};

/// How long a job may take to come into its sandbox, and to end once it is ending: what the launcher gives a launch, and
/// a little for the rest.
const LAUNCH_WITHIN: Duration = Duration::from_secs(12);
const END_WITHIN: Duration = Duration::from_secs(12);

/// How long other changes of the same job may take.
const TURN_WITHIN: Duration = Duration::from_secs(12);

/// How old what is shown of a job may be. A look at its figures costs the launcher some 0.1 ms, one at a thousand processes
/// 70: in this way no client can have much of its time.
const STATS_FRESH: Duration = Duration::from_millis(10);
const PROCESSES_FRESH: Duration = Duration::from_millis(200);

/// How long after a job could not lend its place it may be asked again.
const LOAN_AGAIN: Duration = Duration::from_secs(1);

/// What could not be done with a job.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It is over.
    #[error("the job is over already")]
    Finished,
    /// It waits for a place, or for its sandbox.
    #[error("the job has not begun")]
    NotBegun,
    /// Another change of the same takes too long.
    #[error("another change of the same is still under way")]
    Busy,
    /// A process of it did not stop in time. It goes on.
    #[error("a process did not stop in time, as it is in a system call that nothing interrupts; everything goes on")]
    NotFrozen,
    /// Its tenant is paused, so that it cannot go on.
    #[error("the tenant is paused")]
    TenantPaused,
    /// Its place is lent to a job of a tenant of higher priority, so that it cannot go on.
    #[error("its place is lent to a job of a tenant of higher priority")]
    Lent,
    /// Limits that cannot be.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The kernel refuses a limit.
    #[error("`{limit}` was refused by the kernel: {reason}")]
    Refused {
        /// Which limit.
        limit: String,
        /// The kernel's reason.
        reason: String,
    },
    /// There is no room for as many processes.
    #[error(transparent)]
    NoRoom(#[from] AdmissionError),
    /// The launcher fails.
    #[error("the launcher")]
    Launcher(#[source] OrderFailure),
}

impl Jobs {
    /// Lets nothing of a job run until it is resumed. Its wall clock stands meanwhile.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn pause(&self, id: &Uuid) -> Result<JobRecord, ControlError> {
        let entry = self.entry(id)?;
        on_its_own(async move {
            let mut holds = entry.turn().await?;
            hold(&entry, &mut holds, |holds| holds.request = true).await?;
            still_there(&entry)
        })
        .await
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn resume(&self, id: &Uuid) -> Result<JobRecord, ControlError> {
        let entry = self.entry(id)?;
        on_its_own(async move {
            let mut holds = entry.turn().await?;
            if entry.tenant_paused.load(Ordering::SeqCst) {
                return Err(ControlError::TenantPaused);
            }
            hold(&entry, &mut holds, |holds| holds.request = false).await?;
            if holds.lent { Err(ControlError::Lent) } else { still_there(&entry) }
        })
        .await
    }

    /// Changes limits of a job that runs; see [`Limits::changed`]. A job that has passed one already ends, and is over
    /// when this returns.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn change_limits(
        &self,
        id: &Uuid,
        json: Map<String, Value>,
        maximums: Maximums,
    ) -> Result<JobRecord, ControlError> {
        let (jobs, entry) = (self.clone(), self.entry(id)?);
        on_its_own(async move {
            let _turn = entry.turn().await?;
            let now = entry.limits();
            let limits = now.changed(&json, &entry.defaults, &entry.first_limits, &maximums)?;
            let controls = entry.in_its_sandbox().await?;
            if limits == now {
                return Ok(entry.record());
            }
            jobs.make_room(&entry, &limits)?;
            limit(&entry, controls, &now, limits).await
        })
        .await
    }

    /// What a job uses, and has used so far. `None` if there is no such job any more.
    pub async fn stats(&self, id: &Uuid) -> Option<StatsRecord> {
        let entry = self.0.registry.get(id)?;
        let live = match (entry.phase(), entry.controls()) {
            (Phase::InSandbox, Some(controls)) => {
                let look = async {
                    // in this order: whoever sees what a job has said sees too what it did before
                    let bytes = entry.flows.bytes();
                    controls.stats().await.map(|stats| (stats, bytes))
                };
                let looked = entry.stats.within(entry.changes(), STATS_FRESH, TURN_WITHIN, look).await;
                looked.and_then(Result::ok)
            }
            _ => None,
        };
        if live.is_none() && entry.phase() == Phase::InSandbox {
            // its sandbox has just ended, and what it used is about to be written down
            let _ = timeout(END_WITHIN, entry.finished()).await;
        }
        Some(StatsRecord::new(&entry.record(), live.as_ref()))
    }

    /// The processes of a job that is in its sandbox; none of another.
    ///
    /// # Errors
    /// [`ControlError::Busy`] or [`ControlError::Launcher`].
    pub async fn processes(&self, id: &Uuid) -> Result<Vec<ProcessInfo>, ControlError> {
        let Some(entry) = self.0.registry.get(id) else { return Ok(Vec::new()) };
        let (Phase::InSandbox, Some(controls)) = (entry.phase(), entry.controls()) else { return Ok(Vec::new()) };
        let looked = entry.processes.within(entry.changes(), PROCESSES_FRESH, TURN_WITHIN, controls.processes()).await;
        match looked.ok_or(ControlError::Busy)? {
            Ok(mut processes) => {
                processes.sort_by_key(|process| process.pid);
                Ok(processes)
            }
            Err(OrderFailure::Refused(OrderError::Ended)) => Ok(Vec::new()),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Lets nothing of a tenant run, what is still to come included, or lets it go on. Jobs that are submitted meanwhile
    /// wait. What stood still before stands still after.
    ///
    /// # Errors
    /// [`ControlError::NotFrozen`], [`ControlError::Busy`] or [`ControlError::Launcher`]; then all is as it was before.
    pub async fn pause_tenant(&self, launcher: &Launcher, name: &Name, paused: bool) -> Result<(), ControlError> {
        let before = self.0.admission.is_paused(name);
        self.hold_new_ones(name, paused || before);
        match launcher.freeze_tenant(name.clone(), paused).await {
            Ok(()) => {
                self.0.registry.paused(name).store(paused, Ordering::SeqCst);
                self.hold_new_ones(name, paused);
                Ok(())
            }
            Err(failure) => {
                self.hold_new_ones(name, before);
                Err(failure.into())
            }
        }
    }

    pub(super) fn hold_new_ones(&self, tenant: &Name, paused: bool) {
        self.0.admission.pause(tenant, paused);
        self.0.compiler.pause(tenant, paused);
    }

    /// Sees to it that jobs lend their places and get them back, for as long as the server runs.
    pub async fn serve_loans(self, mut loans: tokio::sync::mpsc::UnboundedReceiver<Loan>) {
        while let Some(loan) = loans.recv().await {
            let jobs = self.clone();
            tokio::spawn(async move { jobs.serve_loan(loan).await });
        }
    }

    async fn serve_loan(&self, loan: Loan) {
        match loan {
            Loan::Freeze(permit) => {
                let lent = self.lend(permit, true).await;
                self.0.admission.lent(permit, lent.is_ok());
                if lent.is_err() {
                    tokio::time::sleep(LOAN_AGAIN).await;
                    self.0.admission.look_again();
                }
            }
            Loan::Thaw(permit) => {
                if let Err(error @ (ControlError::Launcher(_) | ControlError::Busy)) = self.lend(permit, false).await {
                    tracing::error!(%error, "a job whose place was lent does not go on");
                }
                self.0.admission.returned(permit);
            }
        }
    }

    async fn lend(&self, permit: PermitId, lent: bool) -> Result<(), ControlError> {
        let holder = self.0.registry.all_live().into_iter().find(|entry| entry.permit.get() == Some(&permit));
        let entry = holder.ok_or(ControlError::Finished)?;
        let mut holds = entry.turn().await?;
        hold(&entry, &mut holds, |holds| holds.lent = lent).await
    }

    fn entry(&self, id: &Uuid) -> Result<Arc<Entry>, ControlError> {
        self.0.registry.get(id).ok_or(ControlError::Finished)
    }

    fn make_room(&self, entry: &Entry, limits: &Limits) -> Result<(), AdmissionError> {
        let pids = limits.get(Limit::Pids) + own_pids(limits.runtime());
        entry.permit.get().map_or(Ok(()), |permit| self.0.admission.resize(*permit, pids))
    }
}

impl Entry {
    /// Waits for those who change it already.
    async fn turn(&self) -> Result<MutexGuard<'_, Holds>, ControlError> {
        timeout(TURN_WITHIN, self.turn.lock()).await.map_err(|_| ControlError::Busy)
    }

    /// Waits for it to come into its sandbox, if it is on its way there.
    async fn in_its_sandbox(&self) -> Result<&Controls, ControlError> {
        let _ = timeout(LAUNCH_WITHIN, self.leaves(Phase::Launching)).await;
        match (self.phase(), self.controls()) {
            (Phase::InSandbox, Some(controls)) => Ok(controls),
            (Phase::Over, _) => Err(ControlError::Finished),
            _ => Err(ControlError::NotBegun),
        }
    }

    /// What a job that is ending has come to.
    async fn after_its_end(&self) -> Result<JobRecord, ControlError> {
        timeout(END_WITHIN, self.finished()).await.map_err(|_| ControlError::Busy)?;
        Ok(self.record())
    }
}

/// Changes who wants it to stand still, and lets it do so, or go on, accordingly.
async fn hold(entry: &Arc<Entry>, holds: &mut Holds, change: impl FnOnce(&mut Holds)) -> Result<(), ControlError> {
    let mut wanted = *holds;
    change(&mut wanted);
    let controls = entry.in_its_sandbox().await?;
    if wanted.any() != entry.is_frozen() {
        let (stands, frozen) = (entry.clone(), wanted.any());
        let then = Box::new(move |result: &Result<Answer, OrderError>| {
            if result.is_ok() {
                stands.set_frozen(frozen);
            }
        });
        controls.freeze(frozen, then).await?;
    }
    *holds = wanted;
    Ok(())
}

/// The record of a job that has not ended in the meantime.
fn still_there(entry: &Entry) -> Result<JobRecord, ControlError> {
    let record = entry.record();
    if record.state == State::Finished { Err(ControlError::Finished) } else { Ok(record) }
}

/// Puts a job under other limits: the kernel first, then what the server itself counts.
async fn limit(
    entry: &Arc<Entry>,
    controls: &Controls,
    now: &Limits,
    limits: Limits,
) -> Result<JobRecord, ControlError> {
    let mut ends = false;
    if limits.for_sandbox() == now.for_sandbox() {
        entry.set_limits(limits.clone());
    } else {
        let (target, limits) = (entry.clone(), limits.clone());
        let for_sandbox = limits.for_sandbox();
        let then = Box::new(move |result: &Result<Answer, OrderError>| {
            if result.is_ok() {
                target.set_limits(limits);
            }
        });
        ends = controls.limit(for_sandbox, then).await?;
    }
    let flows = &entry.flows;
    let (input, output) = (limits.get(Limit::InputBytes), limits.get(Limit::OutputBytes));
    if !flows.input.limit_to(input) {
        ends |= entry.stop(Stop::InputOver { reached: flows.input.bytes(), allowed: input });
    }
    let within = [&flows.output, &flows.errors].map(|flow| flow.limit_to(output));
    if within.contains(&false) {
        ends |= entry.stop(Stop::OutputOver { allowed: output });
    }
    if ends { entry.after_its_end().await } else { Ok(entry.record()) }
}

/// Runs `work` to its end, whether or not anybody still waits for it.
async fn on_its_own<T: Send + 'static>(
    work: impl Future<Output = Result<T, ControlError>> + Send + 'static,
) -> Result<T, ControlError> {
    tokio::spawn(work).await.unwrap_or(Err(ControlError::Launcher(OrderFailure::NoAnswer)))
}

impl From<OrderFailure> for ControlError {
    fn from(failure: OrderFailure) -> Self {
        match failure {
            OrderFailure::Refused(OrderError::Ended) => Self::Finished,
            OrderFailure::Refused(OrderError::NotFrozen) => Self::NotFrozen,
            OrderFailure::Refused(OrderError::Overtaken) => Self::Busy,
            OrderFailure::Refused(OrderError::Refused { what, errno }) if Limit::from_key(&what).is_some() => {
                Self::Refused { limit: what, reason: nix::errno::Errno::from_raw(errno).desc().to_owned() }
            }
            failure => Self::Launcher(failure),
        }
    }
}
