//! Jobs: one run of a plugin each, from its submission to its record.

mod accounts;
mod control;
mod entry;
mod line;
mod outcome;
mod record;
mod registry;
mod run;
mod turns;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use holm_sandbox::name::Name;
use jiff::Timestamp;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use self::accounts::Accounts;
pub use self::control::ControlError;
use self::entry::Entry;
pub use self::line::{Line, Meter, OverLimit};
pub use self::outcome::{Outcome, Stop};
pub use self::record::{IsolationRecord, JobRecord, Start, State, StatsRecord, UsageRecord};
use self::registry::Registry;
pub use self::registry::{FINISHED_KEPT, Selection};
pub use self::run::{OWN_ENV, USUAL_ENV};
use self::turns::Turns;
use crate::admission::{Admission, AdmissionError, Permit};
use crate::launcher::{Content, Parking};
use crate::limit::{Limits, Runtime};
use crate::plugin::Plugin;
use crate::store::{Span, Store, StoreError, Totals, open_if_there};
use crate::tenant::Tenant;
use crate::upload::Compiler;

/// How long the jobs of a deleted tenant are waited for.
const FORGET_WITHIN: Duration = Duration::from_secs(5);

/// What a job is to do.
#[derive(Clone, Debug)]
pub struct JobRequest {
    /// On whose behalf.
    pub tenant: Tenant,
    /// What runs.
    pub plugin: Arc<Plugin>,
    /// Within which limits.
    pub limits: Limits,
    /// Within which it would be had the request given none.
    pub defaults: Limits,
    /// Arguments, the program's own name not counted.
    pub args: Vec<String>,
    /// Environment, on top of what every job has.
    pub env: BTreeMap<String, String>,
    /// The input's media type; empty if none was given.
    pub content_type: String,
}

/// What a job consumes: used up by its one run.
#[derive(Debug)]
pub struct Supply {
    /// The plugin's open artifact.
    pub artifact: Artifact,
    /// Where its input comes from and its output goes to.
    pub streams: Streams,
}

/// What a job's standard input and output are connected to.
pub enum Streams {
    /// A command's input as it arrives. Its output is kept.
    Command(Input),
    /// An HTTP guest's, handed over as they are once it can be called. Nothing is handed over if it cannot.
    Http(oneshot::Sender<Line>),
}

/// A plugin's artifact, opened when the job was submitted: a revision that is replaced while its job waits still runs.
#[derive(Debug)]
pub enum Artifact {
    /// It can be run as it is.
    Runnable(File),
    /// It was compiled on another engine or machine, and has to be again.
    Source(File),
}

/// A job's input, as it arrives.
pub type Input = Pin<Box<dyn Stream<Item = Result<Bytes, InputBroken>> + Send>>;

/// The client went away, or sent too slowly, before its input was complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the input broke off")]
pub struct InputBroken;

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Command(_) => "Command",
            Self::Http(_) => "Http",
        })
    }
}

/// A job that is over, with what it gave.
#[derive(Debug)]
pub struct Finished {
    /// Its record.
    pub record: JobRecord,
    /// Its standard output.
    pub output: Output,
    /// The end of its standard error.
    pub stderr_tail: Bytes,
}

/// What a job has written to its standard output.
#[derive(Debug)]
pub struct Output {
    /// The output itself.
    pub content: Content,
    /// The job's place, kept by an output that is on the disk: clients that take their time with theirs must not leave a
    /// tenant room for ever more of them.
    pub place: Option<Permit>,
}

impl Output {
    fn in_place(self, place: Permit) -> Self {
        let on_disk = matches!(self.content, Content::File(_));
        Self { place: on_disk.then_some(place), ..self }
    }
}

impl From<Content> for Output {
    fn from(content: Content) -> Self {
        Self { content, place: None }
    }
}

impl Default for Output {
    fn default() -> Self {
        Content::Memory(Bytes::new()).into()
    }
}

/// A submitted job. Dropping it means that nobody waits for the job any more, and ends it.
#[derive(Debug)]
pub struct Submitted {
    entry: Arc<Entry>,
    done: oneshot::Receiver<Result<Finished, AdmissionError>>,
    let_go: bool,
}

/// Runs jobs and knows of them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Jobs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    admission: Admission,
    parking: Parking,
    turns: Turns,
    compiler: Arc<Compiler>,
    store: Store,
    registry: Registry,
    accounts: Accounts,
    tasks: TaskTracker,
}

impl Jobs {
    /// With no job yet.
    #[must_use]
    pub fn new(admission: Admission, parking: Parking, compiler: Arc<Compiler>, store: Store) -> Self {
        let (turns, tasks) = (Turns::new(), TaskTracker::new());
        let (registry, accounts) = (Registry::default(), Accounts::new(store.clone()));
        Self(Arc::new(Inner { admission, parking, turns, compiler, store, registry, accounts, tasks }))
    }

    /// Starts a job in a task of its own: whoever submitted it may go away at any moment without leaving half a launch
    /// behind.
    #[must_use]
    pub fn submit(&self, request: JobRequest, supply: Supply) -> Submitted {
        let entry = Arc::new(self.new_entry(&request));
        self.0.registry.insert(entry.clone());
        // whoever deletes a tenant or plugin ends the jobs that it finds; this one may have come too late to be found
        if self.0.store.plugin(&entry.tenant, &entry.plugin).is_none() {
            entry.stop(Stop::Cancelled);
        }
        let (tell, done) = oneshot::channel();
        let task = run::run(self.clone(), entry.clone(), request, supply);
        self.0.tasks.spawn(async move {
            // nobody waits any more: what it gave goes with it, the record stays
            let _ = tell.send(task.await);
        });
        Submitted { entry, done, let_go: false }
    }

    /// Opens a plugin's artifact. `None` if this revision's files are gone: it has been replaced in the meantime.
    ///
    /// # Errors
    /// Those of opening a file.
    pub fn open(&self, plugin: &Plugin) -> io::Result<Option<Artifact>> {
        let dir = self.0.store.dir();
        let source = dir.artifact(&plugin.tenant, &plugin.revision);
        if plugin.runtime == Runtime::Native {
            return Ok(open_if_there(&source)?.map(Artifact::Runnable));
        }
        match open_if_there(&dir.compiled(self.0.compiler.engine(), &plugin.tenant, &plugin.revision))? {
            Some(compiled) => Ok(Some(Artifact::Runnable(compiled))),
            None => Ok(open_if_there(&source)?.map(Artifact::Source)),
        }
    }

    /// The record of a job, with its tenant.
    #[must_use]
    pub fn record(&self, id: &Uuid) -> Option<(Name, JobRecord)> {
        self.0.registry.get(id).map(|entry| (entry.tenant.clone(), entry.record()))
    }

    /// A tenant's jobs, newest first.
    #[must_use]
    pub fn list(&self, tenant: &Name, selection: &Selection) -> Vec<JobRecord> {
        self.0.registry.list(tenant, selection)
    }

    /// Ends a job and waits until it is over. `None` if it was over already.
    pub async fn cancel(&self, id: &Uuid) -> Option<JobRecord> {
        let entry = self.0.registry.get(id)?;
        if !entry.stop(Stop::Cancelled) {
            return None;
        }
        entry.finished().await;
        Some(entry.record())
    }

    /// Ends the jobs of a deleted plugin.
    pub fn end_all_of(&self, tenant: &Name, plugin: &Name) {
        for entry in self.0.registry.live(tenant, Some(plugin)) {
            entry.stop(Stop::Cancelled);
        }
        self.unpark(tenant, Some(plugin));
        self.0.parking.forget(tenant.clone(), plugin.clone());
    }

    /// Gives up the sandboxes that wait for jobs of a plugin, or of all of a tenant's, because what they were made of
    /// has changed.
    pub fn unpark(&self, tenant: &Name, plugin: Option<&Name>) {
        self.0.parking.clear(tenant, plugin);
    }

    /// Ends a deleted tenant's jobs and forgets them.
    pub async fn forget(&self, tenant: &Name) {
        let live = self.0.registry.live(tenant, None);
        for entry in &live {
            entry.stop(Stop::Cancelled);
        }
        let over = async {
            for entry in &live {
                entry.finished().await;
            }
        };
        // a process that the kernel does not let go of keeps nobody else's changes waiting
        let _ = tokio::time::timeout(FORGET_WITHIN, over).await;
        self.unpark(tenant, None);
        self.0.registry.forget(tenant);
        self.0.accounts.forget(tenant);
        self.hold_new_ones(tenant, false);
        self.0.admission.forget(tenant);
        self.0.turns.forget(tenant);
    }

    /// Parks nothing while the host is short of memory, for as long as the server runs.
    pub async fn keep_memory(self) {
        self.0.parking.keep_memory().await;
    }

    /// Writes down now and then what jobs have used, for as long as the server runs.
    pub async fn keep_accounts(self) {
        self.0.accounts.keep().await;
    }

    /// Writes down what jobs have used that are over.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn settle_accounts(&self) -> Result<(), StoreError> {
        self.0.accounts.write().await
    }

    /// What a tenant's jobs have used that ended in a span of time.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn usage(&self, tenant: &Name, span: Span) -> Result<Totals, StoreError> {
        self.0.accounts.usage(tenant, span).await
    }

    /// Waits until every job is over. New ones must be turned away before.
    pub async fn idle(&self) {
        self.0.parking.close();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    fn new_entry(&self, request: &JobRequest) -> Entry {
        let (tenant, plugin) = (request.tenant.name(), &request.plugin);
        let record = JobRecord {
            id: Uuid::now_v7(),
            tenant: tenant.to_string(),
            plugin: plugin.name.to_string(),
            revision: plugin.revision.to_string(),
            state: State::Queued,
            outcome: None,
            attempt: 1,
            created_at: Timestamp::now(),
            start: None,
            started_at: None,
            finished_at: None,
            limits: request.limits.clone(),
            usage: UsageRecord::default(),
            isolation: None,
        };
        let (names, paused) = ((tenant.clone(), plugin.name.clone()), self.0.registry.paused(tenant));
        Entry::new(names, record, request.defaults.clone(), paused)
    }

    /// Ends every job because the server stops.
    pub fn end_all(&self) {
        for entry in self.0.registry.all_live() {
            entry.stop(Stop::Draining);
        }
    }
}

impl Submitted {
    /// The job's id.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.entry.id
    }

    /// Lets the job come to its own end, which nobody waits for.
    pub fn let_go(mut self) {
        self.let_go = true;
    }

    /// Waits until the job is over.
    ///
    /// # Errors
    /// It was never admitted.
    pub async fn finished(mut self) -> Result<Finished, AdmissionError> {
        // the task answers before it ends, and nobody aborts it
        (&mut self.done).await.unwrap_or(Err(AdmissionError::Draining))
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        if !self.let_go {
            self.entry.stop(Stop::Cancelled);
        }
    }
}
