//! Launches, tenant by tenant in turn. The launcher does one after the other, in the order in which it is asked: a tenant
//! with many jobs at once would have all others wait for all of them.

use std::time::Duration;

use holm_sandbox::name::Name;

use crate::admission::{Admission, AdmissionError, Allowance, Capacity, Permit};
use crate::tenant::Tenant;

/// Launches that have been asked for and are not over, for each CPU: one that the launcher makes, and one that finishes
/// itself meanwhile. One tenant may have half of them, so that another one's first never waits for more than one.
const AT_ONCE_PER_CPU: usize = 2;

/// How long a launch may wait for its turn. Every job that the server may run can come first, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who may launch now. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    admission: Admission,
    of_one: u64,
}

impl Turns {
    pub(super) fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let capacity = Capacity {
            jobs_running: (cpus * AT_ONCE_PER_CPU).max(2),
            pids: u64::MAX,
            jobs_queued: usize::MAX, // who waits here has been admitted before
            queue_timeout: PATIENCE,
        };
        Self { admission: Admission::new(capacity), of_one: cpus as u64 }
    }

    /// Waits for the tenant's next turn, which is over when the permit is dropped.
    ///
    /// # Errors
    /// It has waited for too long.
    pub(super) async fn take(&self, tenant: &Tenant) -> Result<Permit, AdmissionError> {
        let allowance = Allowance { running: self.of_one, waiting: u64::MAX, pids: 0 };
        self.admission.admit_within(tenant, allowance, 0).await
    }

    /// Forgets a deleted tenant.
    pub(super) fn forget(&self, tenant: &Name) {
        self.admission.forget(tenant);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;
    use crate::tenant::{Caller, TenantRow, TenantSettings};

    fn tenant(name: &str) -> Tenant {
        let (settings, created_at) = (TenantSettings::default(), Timestamp::UNIX_EPOCH);
        Caller::Operator
            .tenant(Some(Arc::new(TenantRow { name: name.parse().unwrap(), settings, created_at })))
            .unwrap()
    }

    #[tokio::test]
    async fn a_tenant_with_many_launches_leaves_a_turn_to_another() {
        let turns = Turns::new();
        let (many, one) = (tenant("many"), tenant("one"));
        let mut held = Vec::new();
        for _ in 0..turns.of_one {
            held.push(turns.take(&many).await.unwrap());
        }
        let waiting = tokio::spawn({
            let turns = turns.clone();
            async move { turns.take(&many).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        let at_once = tokio::time::timeout(Duration::from_secs(5), turns.take(&one)).await;
        assert!(at_once.is_ok_and(|turn| turn.is_ok()));
        held.pop();
        assert!(waiting.await.unwrap().is_ok());
    }
}
