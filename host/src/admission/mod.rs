//! Admission: which job may run now, which waits, which is turned away.
//!
//! A bounded number of jobs runs; a bounded number waits, for a bounded time. Waiting jobs are served by their tenants'
//! priority, and tenant by tenant in turn among equals, so that one tenant's backlog never delays another's single job by
//! more than one place. Where the operator wants it, a job can be made to lend its place to one of higher priority:
//!
//! ```text
//! Taken ──a job of higher priority waits──▶ Lending ──it stands still──▶ Lent ──there is room──▶ Returning ──it runs──▶ Taken
//! ```

mod books;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use holm_sandbox::name::Name;
use tokio::sync::{mpsc, oneshot};

use self::books::{Books, Waiter};
use crate::tenant::{QuotaKey, Tenant};

/// What the server can do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Jobs running.
    pub jobs_running: usize,
    /// Processes and threads that all running jobs together may have. The sum of their limits stays below it, so that
    /// no number of fork bombs can take the host's pids.
    pub pids: u64,
    /// Jobs waiting.
    pub jobs_queued: usize,
    /// How long a job may wait.
    pub queue_timeout: Duration,
}

/// What one tenant may have of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Running at once.
    pub running: u64,
    /// Waiting at once.
    pub waiting: u64,
    /// Processes and threads that all its running jobs together may have. One job may have more if it is alone.
    pub pids: u64,
}

/// One tenant may have a part of the server's pids, one in so many: its few jobs with the most processes that a job can
/// have must not take the places of everybody else's.
const PIDS_PART: u64 = 4;

/// What a job has if nobody says otherwise, its init included. A tenant that may have many jobs may have so many each.
const PIDS_EACH: u64 = 65;

/// The right to run one job. Gives its place up when dropped.
#[derive(Debug)]
pub struct Permit {
    admission: Admission,
    id: PermitId,
}

/// Which permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PermitId(u64);

/// What is to be done with a job that lends its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loan {
    /// Let it stand still. [`Admission::lent`] is to be told what has become of it.
    Freeze(PermitId),
    /// Let it go on. [`Admission::returned`] is to be told when it does.
    Thaw(PermitId),
}

/// A job that may not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// The tenant has as many jobs waiting as it may.
    #[error("the tenant's quota `jobs_queued` of {0} is used up")]
    TenantQueueFull(u64),
    /// The job waited as long as it may, and it was its own tenant's jobs that kept it.
    #[error("the tenant's quota `jobs_running` of {0} was used up for too long")]
    TenantBusy(u64),
    /// The same, by the processes that its jobs may have.
    #[error("the tenant's jobs may have {0} processes together, and others of them had these for too long")]
    TenantPids(u64),
    /// The job waited as long as it may, and its tenant is paused.
    #[error("the tenant is paused")]
    TenantPaused,
    /// The tenant asks more often than it may.
    #[error("the tenant's quota `requests_per_second` of {0} is used up")]
    TooManyRequests(u64),
    /// The server has as many jobs waiting as it takes.
    #[error("the server is full")]
    ServerFull,
    /// The job waited as long as it may.
    #[error("the server was busy for too long")]
    ServerBusy,
    /// The server is about to stop.
    #[error("the server is stopping")]
    Draining,
}

/// The books of what runs and waits. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    capacity: Capacity,
    books: Mutex<Books>,
    /// Where jobs can lend their places: whoever makes them stand still. Unbounded, as what goes in is bounded: at most
    /// one order for each job that runs.
    loans: Option<mpsc::UnboundedSender<Loan>>,
}

impl Admission {
    /// With nothing running.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self(Arc::new(Inner { capacity, books: Mutex::default(), loans: None }))
    }

    /// The same, where jobs lend their places to those of higher priority. The receiver must be served.
    #[must_use]
    pub fn with_loans(capacity: Capacity) -> (Self, mpsc::UnboundedReceiver<Loan>) {
        let (loans, orders) = mpsc::unbounded_channel();
        (Self(Arc::new(Inner { capacity, books: Mutex::default(), loans: Some(loans) })), orders)
    }

    /// Counts a request of the tenant against its rate.
    ///
    /// # Errors
    /// [`AdmissionError::TooManyRequests`].
    pub fn count_request(&self, tenant: &Tenant) -> Result<(), AdmissionError> {
        let rate = tenant.quota().get(QuotaKey::RequestsPerSecond);
        let granted = self.books().take_token(tenant.name(), rate, Instant::now());
        if granted { Ok(()) } else { Err(AdmissionError::TooManyRequests(rate)) }
    }

    /// Waits for a place for a job of the tenant with up to `pids` processes.
    ///
    /// # Errors
    /// See [`AdmissionError`]. Dropping the future gives the place in the queue up.
    pub async fn admit(&self, tenant: &Tenant, pids: u64) -> Result<Permit, AdmissionError> {
        let quota = tenant.quota();
        let (running, waiting) = (quota.get(QuotaKey::JobsRunning), quota.get(QuotaKey::JobsQueued));
        let part = self.0.capacity.pids / PIDS_PART;
        let allowance = Allowance { running, waiting, pids: part.max(running.saturating_mul(PIDS_EACH)) };
        self.admit_within(tenant, allowance, pids).await
    }

    /// The same, with other numbers than the tenant's quota for jobs.
    ///
    /// # Errors
    /// See [`AdmissionError`].
    pub async fn admit_within(
        &self,
        tenant: &Tenant,
        allowance: Allowance,
        pids: u64,
    ) -> Result<Permit, AdmissionError> {
        let (id, granted) = self.enqueue(tenant, pids, allowance)?;
        let _place = Place { admission: self, tenant: tenant.name(), id };
        match tokio::time::timeout(self.0.capacity.queue_timeout, granted).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(AdmissionError::Draining),
            Err(_) => Err(self.books().why_so_long(tenant.name(), allowance, pids)),
        }
    }

    /// Lets no job of a tenant begin, or lets them again.
    pub fn pause(&self, tenant: &Name, paused: bool) {
        self.change(|books| books.pause(tenant, paused));
    }

    /// Whether no job of a tenant may begin.
    #[must_use]
    pub fn is_paused(&self, tenant: &Name) -> bool {
        self.books().is_paused(tenant)
    }

    /// Lets a job that runs have up to `pids` processes. Having had more before counts on: they may still be there.
    ///
    /// # Errors
    /// [`AdmissionError::ServerFull`].
    pub fn resize(&self, permit: PermitId, pids: u64) -> Result<(), AdmissionError> {
        if self.books().resize(permit, pids, self.0.capacity.pids) { Ok(()) } else { Err(AdmissionError::ServerFull) }
    }

    /// A job that was to lend its place stands still, or cannot be made to.
    pub fn lent(&self, permit: PermitId, frozen: bool) {
        self.change(|books| books.lent(permit, frozen, Instant::now()));
    }

    /// Looks once more who may have a place: a job that could not lend its own may be asked again.
    pub fn look_again(&self) {
        self.change(|_| {});
    }

    /// A job that had lent its place runs again.
    pub fn returned(&self, permit: PermitId) {
        self.books().returned(permit);
    }

    /// Turns away everybody who waits, and everybody who comes.
    pub fn drain(&self) {
        // those who lent their places have them back as far as there is room, the others as jobs end
        self.change(Books::drain);
    }

    /// Jobs running and jobs waiting.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        self.books().load()
    }

    /// Forgets a deleted tenant.
    pub fn forget(&self, tenant: &Name) {
        self.books().forget(tenant);
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the books, then gives places to those who can have one now.
    fn change(&self, change: impl FnOnce(&mut Books)) {
        let unwanted = {
            let mut books = self.books();
            change(&mut books);
            books.serve(self)
        };
        // permits for those who have just left: their places are given up after the lock on the books
        drop(unwanted);
    }

    fn enqueue(
        &self,
        tenant: &Tenant,
        pids: u64,
        allowance: Allowance,
    ) -> Result<(u64, oneshot::Receiver<Permit>), AdmissionError> {
        let (grant, granted) = oneshot::channel();
        let (name, priority) = (tenant.name(), tenant.priority());
        let mut books = self.books();
        let id = books.enqueue(name, |id| Waiter { id, pids, allowance, priority, grant })?;
        let unwanted = books.serve(self);
        // it had to be put in line to see whether there is a place at once; if not, is there one in line?
        let (waiting, queued) = books.waiting(name);
        let error = if waiting as u64 > allowance.waiting {
            AdmissionError::TenantQueueFull(allowance.waiting)
        } else if queued > self.0.capacity.jobs_queued {
            AdmissionError::ServerFull
        } else {
            drop(books);
            drop(unwanted);
            return Ok((id, granted));
        };
        let _ = books.leave(name, id);
        drop(books);
        drop(unwanted);
        Err(error)
    }

    fn lend(&self, loan: Loan) {
        if let Some(loans) = &self.0.loans {
            // fails only when the server is ending
            let _ = loans.send(loan);
        }
    }
}

impl Permit {
    /// Which one it is.
    #[must_use]
    pub fn id(&self) -> PermitId {
        self.id
    }
}

/// A place in line, given up when dropped. Once served, the place is the permit's.
struct Place<'a> {
    admission: &'a Admission,
    tenant: &'a Name,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let left = self.admission.books().leave(self.tenant, self.id);
        if left {
            // it may have been in others' way
            self.admission.look_again();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.change(|books| books.release(self.id));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;
    use crate::tenant::{Caller, TenantRow, TenantSettings};

    fn tenant(name: &str, running: u64, queued: u64) -> Tenant {
        let settings = format!(r#"{{"quota": {{"jobs_running": {running}, "jobs_queued": {queued}}}}}"#);
        let settings: TenantSettings = serde_json::from_str(&settings).unwrap();
        let row = TenantRow { name: name.parse().unwrap(), settings, created_at: Timestamp::UNIX_EPOCH };
        Caller::Operator.tenant(Some(Arc::new(row))).unwrap()
    }

    fn admission(jobs_running: usize, pids: u64, jobs_queued: usize) -> Admission {
        Admission::new(Capacity { jobs_running, pids, jobs_queued, queue_timeout: Duration::from_millis(50) })
    }

    #[tokio::test]
    async fn a_permit_is_a_place_and_dropping_it_frees_it() {
        let admission = admission(1, 1000, 10);
        let a = tenant("a", 9, 9);
        let permit = admission.admit(&a, 10).await.unwrap();
        assert_eq!(admission.load(), (1, 0));
        assert_eq!(admission.admit(&a, 10).await.unwrap_err(), AdmissionError::ServerBusy);
        drop(permit);
        assert!(admission.admit(&a, 10).await.is_ok());
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn the_sum_of_pids_is_bounded() {
        let admission = admission(9, 100, 10);
        let a = tenant("a", 9, 9);
        let large = admission.admit(&a, 60).await.unwrap();
        assert_eq!(admission.admit(&a, 60).await.unwrap_err(), AdmissionError::ServerBusy);
        let _small = admission.admit(&a, 40).await.unwrap();
        drop(large);
        assert!(admission.admit(&a, 60).await.is_ok());
    }

    #[tokio::test]
    async fn r1_one_tenant_s_large_jobs_leave_room_for_others() {
        let admission = admission(99, 1000, 99);
        let (a, b) = (tenant("a", 3, 9), tenant("b", 3, 9));
        let huge = admission.admit(&a, 900).await.unwrap();
        assert_eq!(admission.admit(&a, 90).await.unwrap_err(), AdmissionError::TenantPids(250));
        let (refused, ()) = tokio::join!(admission.admit(&a, 90), async {
            tokio::task::yield_now().await;
            assert!(admission.admit(&b, 90).await.is_ok(), "others do not wait behind it");
        });
        assert!(refused.is_err());
        drop(huge);
        let _two = (admission.admit(&a, 90).await.unwrap(), admission.admit(&a, 90).await.unwrap());
        assert_eq!(admission.admit(&a, 90).await.unwrap_err(), AdmissionError::TenantPids(250));
        let many = tenant("c", 9, 9);
        let mut held = Vec::new();
        for _ in 0..9 {
            held.push(admission.admit(&many, 65).await.unwrap());
        }
    }

    #[tokio::test]
    async fn who_leaves_the_front_of_the_line_lets_the_others_go() {
        let admission = admission(99, 100, 99);
        let (a, b, c) = (tenant("a", 9, 9), tenant("b", 9, 9), tenant("c", 9, 9));
        let _running = admission.admit(&a, 50).await.unwrap();
        let (front, behind) = tokio::join!(admission.admit(&b, 60), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            admission.admit(&c, 10).await
        });
        assert_eq!(front.unwrap_err(), AdmissionError::ServerBusy);
        assert!(behind.is_ok());
    }

    #[tokio::test]
    async fn quotas_say_which_one() {
        let admission = admission(9, 1000, 9);
        let a = tenant("a", 1, 1);
        let _running = admission.admit(&a, 1).await.unwrap();
        let (waits, refused) = tokio::join!(admission.admit(&a, 1), async {
            tokio::task::yield_now().await;
            admission.admit(&a, 1).await
        });
        assert_eq!(refused.unwrap_err(), AdmissionError::TenantQueueFull(1));
        assert_eq!(waits.unwrap_err(), AdmissionError::TenantBusy(1));
        assert!(admission.admit(&tenant("b", 1, 1), 1).await.is_ok(), "another tenant is not kept waiting");
        assert_eq!(admission.load(), (1, 0));
    }

    #[tokio::test]
    async fn a_full_queue_is_refused_at_once() {
        let admission = admission(1, 1000, 1);
        let a = tenant("a", 9, 9);
        let _running = admission.admit(&a, 1).await.unwrap();
        let (_, refused) = tokio::join!(admission.admit(&a, 1), async {
            tokio::task::yield_now().await;
            admission.admit(&a, 1).await
        });
        assert_eq!(refused.unwrap_err(), AdmissionError::ServerFull);
    }

    #[tokio::test]
    async fn tenants_are_served_in_turn() {
        let admission = admission(1, 1000, 100);
        let (a, b) = (tenant("a", 9, 99), tenant("b", 9, 99));
        let first = admission.admit(&a, 1).await.unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for (i, tenant) in [&a, &a, &a, &b].into_iter().enumerate() {
            let (admission, tenant, order) = (admission.clone(), tenant.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                let permit = admission.admit(&tenant, 1).await.unwrap();
                order.lock().unwrap().push(format!("{}{i}", tenant.name()));
                drop(permit);
            }));
            tokio::task::yield_now().await;
        }
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["a0", "b3", "a1", "a2"]);
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_frees_its_place() {
        let admission = admission(1, 1000, 1);
        let a = tenant("a", 9, 9);
        let running = admission.admit(&a, 1).await.unwrap();
        let waiting = tokio::spawn({
            let (admission, a) = (admission.clone(), a.clone());
            async move { admission.admit(&a, 1).await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert_eq!(admission.load(), (1, 1));
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        assert_eq!(admission.load(), (1, 0));
        drop(running);
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn draining_turns_everybody_away() {
        let admission = admission(1, 1000, 9);
        let a = tenant("a", 9, 9);
        let running = admission.admit(&a, 1).await.unwrap();
        let (waited, ()) = tokio::join!(admission.admit(&a, 1), async {
            tokio::task::yield_now().await;
            admission.drain();
        });
        assert_eq!(waited.unwrap_err(), AdmissionError::Draining);
        assert_eq!(admission.admit(&a, 1).await.unwrap_err(), AdmissionError::Draining);
        drop(running);
        assert_eq!(admission.load(), (0, 0));
    }

    fn ranked(name: &str, priority: u32) -> Tenant {
        let settings: TenantSettings = serde_json::from_str(&format!("{{\"priority\": {priority}}}")).unwrap();
        let row = TenantRow { name: name.parse().unwrap(), settings, created_at: Timestamp::UNIX_EPOCH };
        Caller::Operator.tenant(Some(Arc::new(row))).unwrap()
    }

    fn lending(jobs_running: usize, pids: u64) -> (Admission, mpsc::UnboundedReceiver<Loan>) {
        let queue_timeout = Duration::from_secs(60);
        Admission::with_loans(Capacity { jobs_running, pids, jobs_queued: 9, queue_timeout })
    }

    /// Waits in line, in a task of its own, for a place.
    async fn in_line(
        admission: &Admission,
        tenant: &Tenant,
        pids: u64,
    ) -> tokio::task::JoinHandle<Result<Permit, AdmissionError>> {
        let (_, before) = admission.load();
        let (line, tenant) = (admission.clone(), tenant.clone());
        let waits = tokio::spawn(async move { line.admit(&tenant, pids).await });
        while admission.load().1 == before {
            tokio::task::yield_now().await;
        }
        waits
    }

    #[tokio::test]
    async fn the_highest_priority_is_served_first() {
        let admission = admission(1, 1000, 100);
        let first = admission.admit(&ranked("a", 1), 1).await.unwrap();
        let mut tasks = Vec::new();
        let order = Arc::new(Mutex::new(Vec::new()));
        for (name, priority) in [("a", 1), ("b", 5), ("c", 5), ("b", 5), ("d", 9)] {
            let (admission, order) = (admission.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                let permit = admission.admit(&ranked(name, priority), 1).await.unwrap();
                order.lock().unwrap().push(name);
                drop(permit);
            }));
            tokio::task::yield_now().await;
        }
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["d", "b", "c", "b", "a"]);
    }

    #[tokio::test]
    async fn a_place_is_lent_upwards_once_its_holder_stands_still_and_comes_back() {
        let (admission, mut loans) = lending(1, 100);
        let (low, high) = (ranked("low", 1), ranked("high", 2));
        let lender = admission.admit(&low, 10).await.unwrap();
        let equal = in_line(&admission, &low, 10).await;
        assert!(loans.try_recv().is_err(), "nobody lends to an equal");
        let waits = in_line(&admission, &high, 10).await;
        assert_eq!(loans.try_recv(), Ok(Loan::Freeze(lender.id())));
        assert_eq!(admission.load(), (1, 2), "not before it stands still");
        admission.lent(lender.id(), true);
        let borrower = waits.await.unwrap().unwrap();
        assert_eq!(admission.load(), (1, 1));
        drop(borrower);
        assert_eq!(loans.try_recv(), Ok(Loan::Thaw(lender.id())), "before an equal that came later");
        assert_eq!(admission.load(), (1, 1));
        admission.returned(lender.id());
        drop(lender);
        drop(equal.await.unwrap().unwrap());
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn a_holder_that_cannot_stand_still_or_has_gone_is_in_nobody_s_way() {
        let (admission, mut loans) = lending(2, 100);
        let (low, high) = (ranked("low", 1), ranked("high", 2));
        let (first, second) = (admission.admit(&low, 10).await.unwrap(), admission.admit(&low, 10).await.unwrap());
        let waits = in_line(&admission, &high, 10).await;
        assert_eq!(loans.try_recv(), Ok(Loan::Freeze(second.id())), "the one that has run less");
        admission.lent(second.id(), false);
        assert_eq!(loans.try_recv(), Ok(Loan::Freeze(first.id())), "the other one, then");
        let gone = first.id();
        drop(first);
        let borrower = waits.await.unwrap().unwrap();
        admission.lent(gone, true);
        assert_eq!(admission.load(), (2, 0));
        // a lender that ends while its place is lent leaves the other its place
        let waits = in_line(&admission, &ranked("higher", 3), 10).await;
        assert_eq!(
            loans.try_recv(),
            Ok(Loan::Freeze(borrower.id())),
            "the one that refused is not asked again so soon"
        );
        admission.lent(borrower.id(), true);
        let highest = waits.await.unwrap().unwrap();
        drop(borrower);
        assert_eq!(admission.load(), (2, 0));
        drop((highest, second));
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn no_more_places_are_asked_for_than_can_be_used() {
        let (admission, mut loans) = lending(3, 100);
        let (low, high) = (ranked("low", 1), ranked("high", 2));
        let mut lenders = Vec::new();
        for _ in 0..3 {
            lenders.push(admission.admit(&low, 20).await.unwrap());
        }
        // one more fits by its pids, a second does not
        let waits = in_line(&admission, &high, 40).await;
        assert!(loans.try_recv().is_ok() && loans.try_recv().is_err());
        waits.abort();
        let _ = waits.await;
        admission.lent(lenders[2].id(), true);
        assert_eq!(loans.try_recv(), Ok(Loan::Thaw(lenders[2].id())), "nobody waits any more");
        admission.returned(lenders[2].id());
        let waits = in_line(&admission, &high, 50).await;
        assert!(loans.try_recv().is_err(), "its pids are more than there are");
        drop(lenders);
        drop(waits.await.unwrap().unwrap());
        assert_eq!(admission.load(), (0, 0));
    }

    #[tokio::test]
    async fn a_paused_tenant_s_jobs_wait_and_say_why() {
        let admission = admission(2, 1000, 10);
        let (a, b) = (tenant("a", 9, 9), tenant("b", 9, 9));
        admission.pause(a.name(), true);
        assert_eq!(admission.admit(&a, 1).await.unwrap_err(), AdmissionError::TenantPaused);
        assert!(admission.admit(&b, 1).await.is_ok(), "another tenant is not kept waiting");
        let waits = in_line(&admission, &a, 1).await;
        admission.pause(a.name(), false);
        drop(waits.await.unwrap().unwrap());
        admission.pause(a.name(), true);
        admission.forget(a.name());
        assert!(admission.admit(&a, 1).await.is_ok(), "the next of its name begins anew");
    }

    #[tokio::test]
    async fn pids_grow_as_far_as_there_is_room_and_never_shrink() {
        let admission = admission(9, 100, 10);
        let a = tenant("a", 9, 9);
        let (one, two) = (admission.admit(&a, 40).await.unwrap(), admission.admit(&a, 40).await.unwrap());
        assert_eq!(admission.resize(one.id(), 61), Err(AdmissionError::ServerFull));
        assert_eq!(admission.resize(one.id(), 60), Ok(()));
        assert_eq!(admission.resize(one.id(), 1), Ok(()), "its processes may still be there");
        assert_eq!(admission.resize(two.id(), 41), Err(AdmissionError::ServerFull));
        drop(one);
        assert_eq!(admission.resize(two.id(), 100), Ok(()));
        drop(two);
        assert!(admission.admit(&a, 100).await.is_ok());
    }
}
