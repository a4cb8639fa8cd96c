//! The books of admission: who runs, who waits, whose place is lent. No waiting here, and no clock but what is handed in.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use holm_sandbox::name::Name;
use tokio::sync::oneshot;

use super::{Admission, AdmissionError, Allowance, Loan, Permit, PermitId};

/// How long a job that could not be made to stand still is not asked again to lend its place.
const ASK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Books {
    /// Jobs that run: those that have lent their places do not.
    running: usize,
    pids: u64,
    queued: usize,
    draining: bool,
    next_id: u64,
    tenants: HashMap<Name, TenantBooks>,
    /// The tenants with waiting jobs, the one to serve next in front.
    turn: VecDeque<Name>,
    holders: BTreeMap<PermitId, Holder>,
    paused: HashSet<Name>,
}

#[derive(Debug, Default)]
struct TenantBooks {
    running: usize,
    pids: u64,
    waiting: VecDeque<Waiter>,
    bucket: Option<Bucket>,
}

/// A job that waits for a place.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) id: u64,
    pub(super) pids: u64,
    pub(super) allowance: Allowance,
    pub(super) priority: u32,
    pub(super) grant: oneshot::Sender<Permit>,
}

/// A job that has a permit.
#[derive(Debug)]
struct Holder {
    tenant: Name,
    pids: u64,
    priority: u32,
    place: Place,
    /// It is not asked for its place before.
    not_before: Option<Instant>,
}

/// What has become of a holder's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Taken,
    Lending,
    Lent,
    Returning,
}

impl TenantBooks {
    /// How many jobs with so many processes its own running jobs leave places for.
    fn room(&self, allowance: Allowance, pids: u64) -> u64 {
        let by_pids = match allowance.pids.saturating_sub(self.pids).checked_div(pids) {
            Some(0) if self.running == 0 => 1,
            many => many.unwrap_or(u64::MAX),
        };
        allowance.running.saturating_sub(self.running as u64).min(by_pids)
    }
}

/// A token bucket: `tokens` are left as of `at`.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Books {
    pub(super) fn load(&self) -> (usize, usize) {
        (self.running, self.queued)
    }

    /// Jobs that wait, of a tenant and of all.
    pub(super) fn waiting(&self, tenant: &Name) -> (usize, usize) {
        (self.tenants.get(tenant).map_or(0, |entry| entry.waiting.len()), self.queued)
    }

    pub(super) fn take_token(&mut self, tenant: &Name, rate: u64, now: Instant) -> bool {
        take_token(&mut self.tenants.entry(tenant.clone()).or_default().bucket, rate, now)
    }

    pub(super) fn drain(&mut self) {
        self.draining = true;
        self.queued = 0;
        self.turn.clear();
        self.tenants.values_mut().for_each(|tenant| tenant.waiting.clear());
    }

    pub(super) fn forget(&mut self, tenant: &Name) {
        self.paused.remove(tenant);
        if self.tenants.get(tenant).is_some_and(|t| t.running == 0 && t.waiting.is_empty()) {
            self.tenants.remove(tenant);
        }
    }

    pub(super) fn pause(&mut self, tenant: &Name, paused: bool) {
        if paused {
            self.paused.insert(tenant.clone());
        } else {
            self.paused.remove(tenant);
        }
    }

    pub(super) fn is_paused(&self, tenant: &Name) -> bool {
        self.paused.contains(tenant)
    }

    pub(super) fn why_so_long(&self, tenant: &Name, allowance: Allowance, pids: u64) -> AdmissionError {
        match self.tenants.get(tenant) {
            _ if self.is_paused(tenant) => AdmissionError::TenantPaused,
            Some(entry) if entry.running as u64 >= allowance.running => AdmissionError::TenantBusy(allowance.running),
            Some(entry) if entry.room(allowance, pids) == 0 => AdmissionError::TenantPids(allowance.pids),
            _ => AdmissionError::ServerBusy,
        }
    }

    /// Puts a job in line.
    pub(super) fn enqueue(&mut self, tenant: &Name, waiter: impl FnOnce(u64) -> Waiter) -> Result<u64, AdmissionError> {
        if self.draining {
            return Err(AdmissionError::Draining);
        }
        self.next_id += 1;
        let entry = self.tenants.entry(tenant.clone()).or_default();
        if entry.waiting.is_empty() {
            self.turn.push_back(tenant.clone());
        }
        entry.waiting.push_back(waiter(self.next_id));
        self.queued += 1;
        Ok(self.next_id)
    }

    /// Takes a waiter out of the line. False if it is not there any more.
    pub(super) fn leave(&mut self, tenant: &Name, id: u64) -> bool {
        let Some(entry) = self.tenants.get_mut(tenant) else { return false };
        let Some(position) = entry.waiting.iter().position(|waiter| waiter.id == id) else { return false };
        entry.waiting.remove(position);
        self.queued -= 1;
        if entry.waiting.is_empty() {
            self.turn.retain(|name| name != tenant);
        }
        true
    }

    /// Gives places to those who wait, one after the other, until the next one does not fit. What it gives back are
    /// permits for those who have just left: to be dropped after the lock on the books.
    #[must_use]
    pub(super) fn serve(&mut self, admission: &Admission) -> Vec<Permit> {
        let capacity = admission.0.capacity;
        let mut unwanted = Vec::new();
        loop {
            let next = self.next();
            let fits = next.as_ref().filter(|next| self.pids == 0 || self.pids + next.pids <= capacity.pids);
            if self.running >= capacity.jobs_running {
                if fits.is_some() {
                    self.ask_for_place(admission, capacity.jobs_running);
                }
                break;
            }
            // whoever had a place before has it back before an equal gets one
            if let Some(id) = self.to_return(fits.map(|next| next.priority)) {
                self.set_place(id, Place::Returning);
                self.running += 1;
                admission.lend(Loan::Thaw(id));
                continue;
            }
            // whoever comes first must fit first: else small jobs would keep a large one waiting for ever
            let Some(turn) = fits.map(|next| next.turn) else { break };
            unwanted.extend(self.grant(admission, turn));
        }
        unwanted
    }

    /// The job to be served next: the first in turn of the highest priority, among those that their own tenants' jobs
    /// do not keep waiting.
    fn next(&self) -> Option<Next> {
        let mut best: Option<Next> = None;
        for (turn, name) in self.turn.iter().enumerate() {
            let Some((waiter, _)) = self.eligible(name) else { continue };
            if best.as_ref().is_none_or(|best| waiter.priority > best.priority) {
                best = Some(Next { turn, pids: waiter.pids, priority: waiter.priority });
            }
        }
        best
    }

    /// The first waiting job of a tenant, and how many of them may run at once with what runs already.
    fn eligible(&self, name: &Name) -> Option<(&Waiter, usize)> {
        let tenant = self.tenants.get(name).filter(|_| !self.paused.contains(name))?;
        let waiter = tenant.waiting.front()?;
        let room = tenant.room(waiter.allowance, waiter.pids);
        (room > 0).then(|| (waiter, tenant.waiting.len().min(usize::try_from(room).unwrap_or(usize::MAX))))
    }

    /// Gives a place to the first waiting job of the tenant at this position in turn.
    fn grant(&mut self, admission: &Admission, turn: usize) -> Option<Permit> {
        let name = self.turn.remove(turn)?;
        let tenant = self.tenants.get_mut(&name)?;
        let waiter = tenant.waiting.pop_front()?;
        if !tenant.waiting.is_empty() {
            self.turn.push_back(name.clone());
        }
        tenant.running += 1;
        tenant.pids += waiter.pids;
        self.queued -= 1;
        self.running += 1;
        self.pids += waiter.pids;
        let id = PermitId(waiter.id);
        let (pids, priority) = (waiter.pids, waiter.priority);
        self.holders.insert(id, Holder { tenant: name, pids, priority, place: Place::Taken, not_before: None });
        waiter.grant.send(Permit { admission: admission.clone(), id }).err()
    }

    /// Gives up a place.
    pub(super) fn release(&mut self, id: PermitId) {
        let Some(holder) = self.holders.remove(&id) else { return };
        if holder.place != Place::Lent {
            self.running -= 1;
        }
        self.pids -= holder.pids;
        if let Some(entry) = self.tenants.get_mut(&holder.tenant) {
            entry.running -= 1;
            entry.pids -= holder.pids;
        }
    }

    /// False if there is no room for so many pids.
    pub(super) fn resize(&mut self, id: PermitId, pids: u64, most: u64) -> bool {
        let Some(holder) = self.holders.get_mut(&id) else { return true };
        let more = pids.saturating_sub(holder.pids);
        if self.pids + more > most {
            return false;
        }
        holder.pids += more;
        self.pids += more;
        if let Some(tenant) = self.tenants.get_mut(&holder.tenant) {
            tenant.pids += more;
        }
        true
    }

    // places that are lent

    /// Asks jobs of lower priority for their places: as many as there are jobs of higher priority that could have them.
    fn ask_for_place(&mut self, admission: &Admission, most: usize) {
        if admission.0.loans.is_none() {
            return;
        }
        let mut ahead: Vec<u32> = Vec::new();
        for name in &self.turn {
            if let Some((waiter, count)) = self.eligible(name) {
                ahead.extend(std::iter::repeat_n(waiter.priority, count));
            }
        }
        ahead.sort_unstable_by(|a, b| b.cmp(a));
        let now = Instant::now();
        let is = |place: Place| move |holder: &&Holder| holder.place == place;
        let asked = self.holders.values().filter(is(Place::Lending)).count();
        let lent = self.holders.values().filter(is(Place::Lent)).count();
        // those that stand still keep their memory and pids: there are never more of them than places
        let more = most.saturating_sub(asked + lent);
        for priority in ahead.into_iter().skip(asked).take(more) {
            // the lowest priority, and the one that has run least
            let lendable = |holder: &&Holder| {
                holder.place == Place::Taken
                    && holder.priority < priority
                    && holder.not_before.is_none_or(|time| time <= now)
            };
            let lenders = self.holders.iter().filter(|(_, holder)| lendable(holder));
            let lender = lenders.min_by_key(|(id, holder)| (holder.priority, std::cmp::Reverse(**id)));
            let Some(id) = lender.map(|(id, _)| *id) else { break };
            self.set_place(id, Place::Lending);
            admission.lend(Loan::Freeze(id));
        }
    }

    /// Who has its place back before a job of this priority gets one: the highest priority, and of equals the first.
    fn to_return(&self, before: Option<u32>) -> Option<PermitId> {
        let lent = self.holders.iter().filter(|(_, holder)| holder.place == Place::Lent);
        let (id, holder) = lent.max_by_key(|(id, holder)| (holder.priority, std::cmp::Reverse(**id)))?;
        before.is_none_or(|priority| holder.priority >= priority).then_some(*id)
    }

    pub(super) fn lent(&mut self, id: PermitId, frozen: bool, now: Instant) {
        let Some(holder) = self.holders.get_mut(&id).filter(|holder| holder.place == Place::Lending) else { return };
        if frozen {
            holder.place = Place::Lent;
            self.running -= 1;
        } else {
            holder.place = Place::Taken;
            holder.not_before = Some(now + ASK_AGAIN);
        }
    }

    pub(super) fn returned(&mut self, id: PermitId) {
        if self.holders.get(&id).is_some_and(|holder| holder.place == Place::Returning) {
            self.set_place(id, Place::Taken);
        }
    }

    fn set_place(&mut self, id: PermitId, place: Place) {
        if let Some(holder) = self.holders.get_mut(&id) {
            holder.place = place;
        }
    }
}

/// The next job in line.
#[derive(Debug)]
struct Next {
    /// Its tenant's position in turn.
    turn: usize,
    pids: u64,
    priority: u32,
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
    use super::*;

    #[test]
    fn a_bucket_gives_a_second_s_worth_and_fills_up_again() {
        let (mut bucket, start) = (None, Instant::now());
        assert_eq!((0..20).filter(|_| take_token(&mut bucket, 5, start)).count(), 5);
        let later = start + Duration::from_millis(400);
        assert_eq!((0..20).filter(|_| take_token(&mut bucket, 5, later)).count(), 2);
    }
}
