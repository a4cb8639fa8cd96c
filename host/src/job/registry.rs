//! The jobs that this server knows of: all that wait or run, and the last finished ones of each tenant.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holm_sandbox::name::Name;
use uuid::Uuid;

use super::entry::Entry;
use super::record::{JobRecord, State};

/// Finished jobs kept for each tenant.
pub const FINISHED_KEPT: usize = 1000;

/// All jobs.
#[derive(Debug, Default)]
pub(super) struct Registry(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    by_id: HashMap<Uuid, Arc<Entry>>,
    tenants: HashMap<Name, TenantJobs>,
}

#[derive(Debug, Default)]
struct TenantJobs {
    /// Ids are in the order of time.
    all: BTreeMap<Uuid, Arc<Entry>>,
    /// In the order in which they ended.
    finished: VecDeque<Uuid>,
    /// Whether the tenant is paused. Every job of it has a share of this.
    paused: Arc<AtomicBool>,
}

/// Which jobs to list.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// In this state only.
    pub state: Option<State>,
    /// Of this plugin only.
    pub plugin: Option<String>,
    /// Older than this one only.
    pub before: Option<Uuid>,
    /// At most so many.
    pub limit: usize,
}

impl Registry {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a tenant is paused, for as long as it is not deleted.
    pub(super) fn paused(&self, tenant: &Name) -> Arc<AtomicBool> {
        self.books().tenants.entry(tenant.clone()).or_default().paused.clone()
    }

    pub(super) fn insert(&self, entry: Arc<Entry>) {
        let mut books = self.books();
        books.tenants.entry(entry.tenant.clone()).or_default().all.insert(entry.id, entry.clone());
        books.by_id.insert(entry.id, entry);
    }

    /// Takes out a job that was never admitted.
    pub(super) fn withdraw(&self, entry: &Entry) {
        let mut books = self.books();
        books.by_id.remove(&entry.id);
        if let Some(jobs) = books.tenants.get_mut(&entry.tenant) {
            jobs.all.remove(&entry.id);
        }
        drop(books);
        entry.over();
    }

    /// Writes a job's last state, wakes who waits for it, and forgets the tenant's oldest finished one if there are
    /// too many.
    pub(super) fn finish(&self, entry: &Entry, last: impl FnOnce(&mut JobRecord)) {
        entry.update(last);
        let mut books = self.books();
        let oldest = books.tenants.get_mut(&entry.tenant).and_then(|jobs| {
            jobs.finished.push_back(entry.id);
            let oldest = if jobs.finished.len() > FINISHED_KEPT { jobs.finished.pop_front() } else { None };
            oldest.inspect(|id| drop(jobs.all.remove(id)))
        });
        let forgotten = oldest.and_then(|oldest| books.by_id.remove(&oldest));
        drop(books);
        // what it is made of has not been touched for long: nobody waits for that
        drop(forgotten);
        entry.over();
    }

    pub(super) fn get(&self, id: &Uuid) -> Option<Arc<Entry>> {
        self.books().by_id.get(id).cloned()
    }

    /// The tenant's jobs, newest first.
    pub(super) fn list(&self, tenant: &Name, selection: &Selection) -> Vec<JobRecord> {
        let entries: Vec<Arc<Entry>> = {
            let books = self.books();
            let Some(jobs) = books.tenants.get(tenant) else {
                return Vec::new();
            };
            let upper = selection.before.map_or(Bound::Unbounded, Bound::Excluded);
            jobs.all.range((Bound::Unbounded, upper)).rev().map(|(_, entry)| entry.clone()).collect()
        };
        let wanted = |record: &JobRecord| {
            selection.state.is_none_or(|state| record.state == state)
                && selection.plugin.as_ref().is_none_or(|plugin| record.plugin == *plugin)
        };
        entries.iter().map(|entry| entry.record()).filter(wanted).take(selection.limit).collect()
    }

    /// The jobs of a tenant that are not over, of one plugin or of all.
    pub(super) fn live(&self, tenant: &Name, plugin: Option<&Name>) -> Vec<Arc<Entry>> {
        let books = self.books();
        let Some(jobs) = books.tenants.get(tenant) else {
            return Vec::new();
        };
        let of_plugin = |entry: &&Arc<Entry>| plugin.is_none_or(|plugin| entry.plugin == *plugin);
        let live = |entry: &&Arc<Entry>| entry.state() != State::Finished;
        jobs.all.values().filter(of_plugin).filter(live).cloned().collect()
    }

    /// Every job that is not over.
    pub(super) fn all_live(&self) -> Vec<Arc<Entry>> {
        let books = self.books();
        books.by_id.values().filter(|entry| entry.state() != State::Finished).cloned().collect()
    }

    /// Forgets a deleted tenant's jobs.
    pub(super) fn forget(&self, tenant: &Name) {
        let mut books = self.books();
        for id in books.tenants.remove(tenant).into_iter().flat_map(|jobs| jobs.all.into_keys()) {
            books.by_id.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::job::outcome::{Outcome, Stop};
    use crate::job::record::UsageRecord;
    use crate::limit::{Limits, Maximums, Runtime};

    fn entry(tenant: &str, plugin: &str) -> Arc<Entry> {
        let limits = Limits::resolve(Runtime::Native, &[], &Maximums::default());
        let record = JobRecord {
            id: Uuid::now_v7(),
            tenant: tenant.into(),
            plugin: plugin.into(),
            revision: String::new(),
            state: State::Queued,
            outcome: None,
            attempt: 1,
            created_at: Timestamp::UNIX_EPOCH,
            start: None,
            started_at: None,
            finished_at: None,
            limits: limits.clone(),
            usage: UsageRecord::default(),
            isolation: None,
        };
        let names = (tenant.parse().unwrap(), plugin.parse().unwrap());
        Arc::new(Entry::new(names, record, limits, Arc::default()))
    }

    fn end(record: &mut JobRecord) {
        record.state = State::Finished;
        record.outcome = Some(Outcome::Cancelled);
    }

    fn ids(records: &[JobRecord]) -> Vec<Uuid> {
        records.iter().map(|record| record.id).collect()
    }

    #[test]
    fn lists_are_newest_first_and_go_on_from_a_cursor() {
        let registry = Registry::default();
        let tenant: Name = "a".parse().unwrap();
        let entries: Vec<Arc<Entry>> = (0..5).map(|i| entry("a", ["p", "q"][i % 2])).collect();
        entries.iter().for_each(|entry| registry.insert(entry.clone()));
        registry.insert(entry("b", "p"));
        registry.finish(&entries[0], end);
        let of = |selection: Selection| ids(&registry.list(&tenant, &selection));
        let all = Selection { limit: 9, ..Default::default() };
        assert_eq!(of(all.clone()), entries.iter().rev().map(|e| e.id).collect::<Vec<_>>());
        let page = of(Selection { limit: 2, ..all.clone() });
        assert_eq!(page, [entries[4].id, entries[3].id]);
        assert_eq!(of(Selection { before: Some(page[1]), limit: 1, ..all.clone() }), [entries[2].id]);
        assert_eq!(of(Selection { state: Some(State::Finished), ..all.clone() }), [entries[0].id]);
        assert_eq!(of(Selection { plugin: Some("q".into()), ..all }), [entries[3].id, entries[1].id]);
    }

    #[test]
    fn the_last_thousand_finished_are_kept_and_all_that_live() {
        let registry = Registry::default();
        let tenant: Name = "a".parse().unwrap();
        let living = entry("a", "p");
        registry.insert(living.clone());
        let first = entry("a", "p");
        for entry in std::iter::once(first.clone()).chain((0..FINISHED_KEPT).map(|_| entry("a", "p"))) {
            registry.insert(entry.clone());
            registry.finish(&entry, end);
        }
        assert!(registry.get(&first.id).is_none() && registry.get(&living.id).is_some());
        let all = registry.list(&tenant, &Selection { limit: usize::MAX, ..Default::default() });
        assert_eq!(all.len(), FINISHED_KEPT + 1);
        assert_eq!(registry.live(&tenant, None).len(), 1);
    }

    #[tokio::test]
    async fn a_job_is_stopped_once_and_not_after_its_end() {
        let registry = Registry::default();
        let job = entry("a", "p");
        registry.insert(job.clone());
        assert!(job.stop(Stop::Cancelled) && job.stop(Stop::Draining));
        assert_eq!(job.stop.get(), Some(&Stop::Cancelled), "the first reason stands");
        registry.finish(&job, end);
        job.finished().await;
        assert!(!job.stop(Stop::Cancelled));
    }
}
