//! How many requests of each tenant are under way at once. A tenant's clients that send slowly, or do not take their
//! answers, must not have the connections of all others, nor fill the disk with uploads that never end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holm_sandbox::name::Name;

/// The part of all connections that one tenant may have, one in so many.
const CONNECTIONS_PART: usize = 4;

/// Requests besides those that wait for the jobs that a tenant may have.
const BESIDE_JOBS: usize = 64;

/// Uploads of one tenant: those that may wait for their compilation, and as many that are on their way. Each has a file
/// of up to `artifact_bytes`.
pub(super) const MOST_UPLOADS: usize = 32;

/// The requests of one tenant that may be under way on a server with so many connections. Never fewer than the jobs that
/// it may have running and queued.
pub(super) fn most_requests(connections: usize, jobs: usize) -> usize {
    (connections / CONNECTIONS_PART).max(jobs.saturating_add(BESIDE_JOBS))
}

/// Who is there, by tenant. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Crowd(Arc<Mutex<HashMap<Name, usize>>>);

/// One of a crowd. Leaves it when dropped.
#[derive(Debug)]
pub(super) struct Member {
    crowd: Crowd,
    tenant: Name,
}

/// Where a request that has been authenticated keeps its place until its answer is sent or given up.
#[derive(Clone, Debug, Default)]
pub(super) struct Slot(Arc<Mutex<Option<Member>>>);

impl Crowd {
    fn books(&self) -> MutexGuard<'_, HashMap<Name, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins it, unless `most` of the tenant are there.
    pub(super) fn join(&self, tenant: &Name, most: usize) -> Option<Member> {
        let mut books = self.books();
        let there = books.get(tenant).copied().unwrap_or(0);
        if there >= most {
            return None;
        }
        books.insert(tenant.clone(), there + 1);
        Some(Member { crowd: self.clone(), tenant: tenant.clone() })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut books = self.crowd.books();
        if let Some(there) = books.get_mut(&self.tenant) {
            *there -= 1;
            if *there == 0 {
                books.remove(&self.tenant);
            }
        }
    }
}

impl Slot {
    pub(super) fn keep(&self, member: Member) {
        let before = self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(member);
        drop(before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_has_so_many_places_and_others_have_theirs() {
        let (crowd, a, b) = (Crowd::default(), "a".parse().unwrap(), "b".parse().unwrap());
        let two = [crowd.join(&a, 2).unwrap(), crowd.join(&a, 2).unwrap()];
        assert!(crowd.join(&a, 2).is_none() && crowd.join(&b, 2).is_some());
        drop(two);
        assert!(crowd.join(&a, 2).is_some());
        assert!(crowd.books().is_empty(), "nobody is remembered");
    }

    #[test]
    fn jobs_that_a_tenant_may_have_can_all_be_waited_for() {
        assert_eq!(most_requests(4096, 64 + 256), 1024);
        assert_eq!(most_requests(512, 64 + 256), 384);
        assert_eq!(most_requests(4096, 4096 + 65_536), 69_696);
    }
}
