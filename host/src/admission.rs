//! Admission: which job may run now, which waits, which is turned away.
//!
//! A bounded number of jobs runs; a bounded number waits, for a bounded time. Waiting jobs are served tenant by tenant
//! in turn, so that one tenant's backlog never delays another's single job by more than one place.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use holm_sandbox::name::Name;
use tokio::sync::oneshot;

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
    tenant: Name,
    pids: u64,
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
}

#[derive(Debug, Default)]
struct Books {
    running: usize,
    pids: u64,
    queued: usize,
    draining: bool,
    next_waiter: u64,
    tenants: HashMap<Name, TenantBooks>,
    /// The tenants with waiting jobs, the one to serve next in front.
    turn: VecDeque<Name>,
}

#[derive(Debug, Default)]
struct TenantBooks {
    running: usize,
    pids: u64,
    waiting: VecDeque<Waiter>,
    bucket: Option<Bucket>,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    pids: u64,
    allowance: Allowance,
    grant: oneshot::Sender<Permit>,
}

/// A token bucket: `tokens` are left as of `at`.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Admission {
    /// With nothing running.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self(Arc::new(Inner { capacity, books: Mutex::default() }))
    }

    /// Counts a request of the tenant against its rate.
    ///
    /// # Errors
    /// [`AdmissionError::TooManyRequests`].
    pub fn count_request(&self, tenant: &Tenant) -> Result<(), AdmissionError> {
        let rate = tenant.quota().get(QuotaKey::RequestsPerSecond);
        let mut books = self.books();
        let bucket = &mut books.tenants.entry(tenant.name().clone()).or_default().bucket;
        if take_token(bucket, rate, Instant::now()) { Ok(()) } else { Err(AdmissionError::TooManyRequests(rate)) }
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
        let (id, granted) = self.enqueue(tenant.name(), pids, allowance)?;
        let _place = Place { admission: self, tenant: tenant.name(), id };
        match tokio::time::timeout(self.0.capacity.queue_timeout, granted).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(AdmissionError::Draining),
            Err(_) => Err(self.why_so_long(tenant.name(), allowance, pids)),
        }
    }

    /// Turns away everybody who waits, and everybody who comes.
    pub fn drain(&self) {
        let mut books = self.books();
        books.draining = true;
        books.queued = 0;
        books.turn.clear();
        books.tenants.values_mut().for_each(|tenant| tenant.waiting.clear());
    }

    /// Jobs running and jobs waiting.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        let books = self.books();
        (books.running, books.queued)
    }

    /// Forgets a deleted tenant.
    pub fn forget(&self, tenant: &Name) {
        let mut books = self.books();
        if books.tenants.get(tenant).is_some_and(|t| t.running == 0 && t.waiting.is_empty()) {
            books.tenants.remove(tenant);
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enqueue(
        &self,
        tenant: &Name,
        pids: u64,
        allowance: Allowance,
    ) -> Result<(u64, oneshot::Receiver<Permit>), AdmissionError> {
        let (grant, granted) = oneshot::channel();
        let capacity = &self.0.capacity;
        let mut books = self.books();
        if books.draining {
            return Err(AdmissionError::Draining);
        }
        books.next_waiter += 1;
        let id = books.next_waiter;
        let entry = books.tenants.entry(tenant.clone()).or_default();
        let waiter = Waiter { id, pids, allowance, grant };
        let was_waiting = entry.waiting.len();
        entry.waiting.push_back(waiter);
        if was_waiting == 0 {
            books.turn.push_back(tenant.clone());
        }
        books.queued += 1;
        let unwanted = books.serve(self);
        // it had to be put in line to see whether there is a place at once; if not, is there one in line?
        let waiting = books.tenants.get(tenant).map_or(0, |entry| entry.waiting.len());
        let error = if waiting as u64 > allowance.waiting {
            AdmissionError::TenantQueueFull(allowance.waiting)
        } else if books.queued > capacity.jobs_queued {
            AdmissionError::ServerFull
        } else {
            drop(books);
            drop(unwanted);
            return Ok((id, granted));
        };
        books.leave(tenant, id);
        drop(books);
        drop(unwanted);
        Err(error)
    }

    fn why_so_long(&self, tenant: &Name, allowance: Allowance, pids: u64) -> AdmissionError {
        match self.books().tenants.get(tenant) {
            Some(entry) if entry.running as u64 >= allowance.running => AdmissionError::TenantBusy(allowance.running),
            Some(entry) if !entry.has_room(allowance, pids) => AdmissionError::TenantPids(allowance.pids),
            _ => AdmissionError::ServerBusy,
        }
    }
}

impl TenantBooks {
    /// Whether its own running jobs leave it a place.
    fn has_room(&self, allowance: Allowance, pids: u64) -> bool {
        let few = self.running == 0 || self.pids + pids <= allowance.pids;
        (self.running as u64) < allowance.running && few
    }
}

impl Books {
    /// Gives places to those who wait, a tenant at a time, until the next one does not fit. What it gives back are
    /// permits for those who have just left: to be dropped after the lock on the books.
    #[must_use]
    fn serve(&mut self, admission: &Admission) -> Vec<Permit> {
        let capacity = admission.0.capacity;
        let mut unwanted = Vec::new();
        let mut passed_over = 0;
        while passed_over < self.turn.len() {
            let Some(name) = self.turn.pop_front() else { break };
            let Some(tenant) = self.tenants.get_mut(&name) else {
                continue;
            };
            let Some(next) = tenant.waiting.front() else { continue };
            if !tenant.has_room(next.allowance, next.pids) {
                // its own jobs keep it; the others need not wait for them
                self.turn.push_back(name);
                passed_over += 1;
                continue;
            }
            // whoever comes first must fit first: else small jobs would keep a large one waiting for ever
            let too_many = self.running > 0 && self.pids + next.pids > capacity.pids;
            if self.running >= capacity.jobs_running || too_many {
                self.turn.push_front(name);
                break;
            }
            let Some(next) = tenant.waiting.pop_front() else {
                continue;
            };
            if !tenant.waiting.is_empty() {
                self.turn.push_back(name.clone());
            }
            passed_over = 0;
            self.queued -= 1;
            tenant.running += 1;
            tenant.pids += next.pids;
            self.running += 1;
            self.pids += next.pids;
            let permit = Permit { admission: admission.clone(), tenant: name, pids: next.pids };
            unwanted.extend(next.grant.send(permit).err());
        }
        unwanted
    }

    fn release(&mut self, tenant: &Name, pids: u64) {
        self.running -= 1;
        self.pids -= pids;
        if let Some(entry) = self.tenants.get_mut(tenant) {
            entry.running -= 1;
            entry.pids -= pids;
        }
    }

    /// Takes a waiter out of the line, if it is still there.
    fn leave(&mut self, tenant: &Name, id: u64) {
        let Some(entry) = self.tenants.get_mut(tenant) else {
            return;
        };
        let Some(position) = entry.waiting.iter().position(|waiter| waiter.id == id) else {
            return;
        };
        entry.waiting.remove(position);
        self.queued -= 1;
        if entry.waiting.is_empty() {
            self.turn.retain(|name| name != tenant);
        }
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
        let unwanted = {
            let mut books = self.admission.books();
            books.leave(self.tenant, self.id);
            // it may have been what the others waited for
            books.serve(self.admission)
        };
        drop(unwanted);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let unwanted = {
            let mut books = self.admission.books();
            books.release(&self.tenant, self.pids);
            books.serve(&self.admission)
        };
        drop(unwanted);
    }
}

/// Takes one token from a bucket that fills at `rate` a second and holds one second's worth.
#[allow(clippy::cast_precision_loss)] // a rate is at most 100,000
fn take_token(bucket: &mut Option<Bucket>, rate: u64, now: Instant) -> bool {
    let full = rate as f64;
    let Bucket { tokens, at } = bucket.unwrap_or(Bucket { tokens: full, at: now });
    let tokens = (tokens + now.saturating_duration_since(at).as_secs_f64() * full).min(full);
    let granted = tokens >= 1.0;
    *bucket = Some(Bucket { tokens: if granted { tokens - 1.0 } else { tokens }, at: now });
    granted
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

    #[test]
    fn a_bucket_gives_a_second_s_worth_and_fills_up_again() {
        let (mut bucket, start) = (None, Instant::now());
        assert_eq!((0..20).filter(|_| take_token(&mut bucket, 5, start)).count(), 5);
        let later = start + Duration::from_millis(400);
        assert_eq!((0..20).filter(|_| take_token(&mut bucket, 5, later)).count(), 2);
    }
}
