//! What tenants have used: counted in memory the moment a job is over, written down soon after, off every job's path.
//!
//! A server that is killed loses at most the last [`WRITE_EVERY`]; one that stops in order loses nothing.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holm_sandbox::name::Name;
use jiff::Timestamp;

use super::record::JobRecord;
use crate::store::{Span, Store, StoreError, Totals, minute_of};

/// How often what has been counted is written down, and how often old rows are put together.
const WRITE_EVERY: Duration = Duration::from_secs(5);
const FOLD_EVERY: u32 = 720; // of those: an hour

/// Sums that may wait to be written, one for each tenant and minute. More come only where the disk has failed for long:
/// then they go to an earlier minute of their tenant.
const MOST_PENDING: usize = 100_000;

/// The accounts of all tenants.
#[derive(Debug)]
pub(super) struct Accounts {
    store: Store,
    pending: Mutex<HashMap<(Name, i64), Totals>>,
    /// Held while sums are neither pending nor surely written.
    writing: tokio::sync::Mutex<()>,
}

impl Accounts {
    pub(super) fn new(store: Store) -> Self {
        Self { store, pending: Mutex::default(), writing: tokio::sync::Mutex::default() }
    }

    /// Counts a job that is over. `tenant_io` is what the kernel has counted for the tenant and not for each job.
    pub(super) fn count(&self, tenant: &Name, record: &JobRecord, tenant_io: Option<(u64, u64)>) {
        let usage = record.usage;
        let kind = record.outcome.as_ref().map_or("", |outcome| outcome.kind());
        let totals = Totals {
            jobs: 1,
            outcomes: [(kind.to_owned(), 1)].into(),
            queue_us: usage.queue_us,
            wall_us: usage.wall_us,
            paused_us: usage.paused_us.unwrap_or(0),
            cpu_user_us: usage.cpu_user_us,
            cpu_system_us: usage.cpu_system_us,
            cpu_throttled_us: usage.cpu_throttled_us,
            memory_peak_bytes: usage.memory_peak_bytes,
            io_read_bytes: usage.io_read_bytes.or(tenant_io.map(|(read, _)| read)),
            io_write_bytes: usage.io_write_bytes.or(tenant_io.map(|(_, written)| written)),
            fuel_used: usage.fuel_used,
            input_bytes: usage.input_bytes,
            output_bytes: usage.output_bytes,
        };
        self.put((tenant.clone(), minute_of(Timestamp::now())), &totals);
    }

    fn put(&self, key: (Name, i64), totals: &Totals) {
        let mut pending = self.pending();
        let full = pending.len() >= MOST_PENDING && !pending.contains_key(&key);
        let earlier = if full { pending.keys().find(|(tenant, _)| *tenant == key.0).cloned() } else { None };
        match (full, earlier) {
            (true, None) => tracing::error!(tenant = %key.0, "what a job has used could not be counted"),
            (_, earlier) => pending.entry(earlier.unwrap_or(key)).or_default().add(totals),
        }
    }

    /// Writes down what has been counted. What cannot be written now is tried again.
    pub(super) async fn write(&self) -> Result<(), StoreError> {
        let _alone = self.writing.lock().await;
        let taken = std::mem::take(&mut *self.pending());
        if taken.is_empty() {
            return Ok(());
        }
        let minutes: Vec<_> = taken.into_iter().map(|((tenant, minute), totals)| (tenant, minute, totals)).collect();
        let written = self.store.add_usage(minutes.clone()).await;
        if written.is_err() {
            minutes.into_iter().for_each(|(tenant, minute, totals)| self.put((tenant, minute), &totals));
        }
        written
    }

    /// Writes now and then, for as long as the server runs.
    pub(super) async fn keep(&self) {
        let mut round = 0_u32;
        loop {
            if round.is_multiple_of(FOLD_EVERY)
                && let Err(error) = self.store.fold_usage(Timestamp::now()).await
            {
                tracing::warn!(%error, "old usage was not put together");
            }
            round = round.wrapping_add(1);
            tokio::time::sleep(WRITE_EVERY).await;
            if let Err(error) = self.write().await {
                tracing::warn!(%error, "what jobs have used was not written down; it is tried again");
            }
        }
    }

    /// What a tenant has used in a span of time, jobs that have ended this moment included.
    pub(super) async fn usage(&self, tenant: &Name, span: Span) -> Result<Totals, StoreError> {
        let _whole = self.writing.lock().await;
        let mut sum = self.store.usage(tenant.clone(), span).await?;
        for ((of, minute), totals) in &*self.pending() {
            if of == tenant && span.holds(*minute) {
                sum.add(totals);
            }
        }
        Ok(sum)
    }

    /// Forgets a deleted tenant's.
    pub(super) fn forget(&self, tenant: &Name) {
        self.pending().retain(|(of, _), _| of != tenant);
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<(Name, i64), Totals>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
