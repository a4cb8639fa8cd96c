//! Orders for sandboxes that live and for whole tenants, and their answers.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use holm_sandbox::limits::Limits;
use holm_sandbox::name::Name;
use holm_sandbox::protocol::{Answer, Order, OrderError, ToLauncher};
use holm_sandbox::spec::SandboxId;
use holm_sandbox::usage::{ProcessInfo, Stats};
use tokio::sync::oneshot;

use super::{Inner, Launcher};

/// The longest that an answer may take: what the launcher gives the kernel, and as much again for a machine that is
/// swamped.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What is done the moment an order is answered, before anything else is heard of the sandbox: a job that is told to be
/// paused has not ended yet, one that is told to have ended is never told to be paused after.
pub type Then = Box<dyn FnOnce(&Result<Answer, OrderError>) + Send>;

/// The right to give orders to one sandbox. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Controls {
    launcher: Launcher,
    id: SandboxId,
}

/// An order that was not obeyed.
#[derive(Debug, thiserror::Error)]
pub enum OrderFailure {
    /// The launcher says why.
    #[error(transparent)]
    Refused(#[from] OrderError),
    /// The launcher has ended, or does not answer.
    #[error("the launcher does not answer")]
    NoAnswer,
}

/// An order that has not been answered, or not wholly.
pub(super) struct Asked {
    reply: oneshot::Sender<Result<Reply, OrderError>>,
    then: Option<Then>,
    processes: Vec<ProcessInfo>,
}

/// A whole answer.
enum Reply {
    Obeyed(Answer),
    Processes(Vec<ProcessInfo>),
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Asked")
    }
}

impl Controls {
    pub(super) fn new(launcher: Launcher, id: SandboxId) -> Self {
        Self { launcher, id }
    }

    /// Lets nothing of it run, or lets it go on; answered when that is so.
    ///
    /// # Errors
    /// See [`OrderFailure`].
    pub async fn freeze(&self, frozen: bool, then: Then) -> Result<(), OrderFailure> {
        let order = if frozen { Order::Freeze } else { Order::Thaw };
        self.give(order, Some(then)).await.map(drop)
    }

    /// Changes its limits; answered when they hold. True if it ends because it has passed one of them.
    ///
    /// # Errors
    /// See [`OrderFailure`].
    pub async fn limit(&self, limits: Limits, then: Then) -> Result<bool, OrderFailure> {
        let reply = self.give(Order::Limit(limits), Some(then)).await?;
        Ok(matches!(reply, Reply::Obeyed(Answer::Ending)))
    }

    /// What it uses.
    ///
    /// # Errors
    /// See [`OrderFailure`].
    pub async fn stats(&self) -> Result<Stats, OrderFailure> {
        match self.give(Order::Measure, None).await? {
            Reply::Obeyed(Answer::Stats(stats)) => Ok(*stats),
            _ => Err(OrderFailure::NoAnswer),
        }
    }

    /// Its processes.
    ///
    /// # Errors
    /// See [`OrderFailure`].
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, OrderFailure> {
        match self.give(Order::List, None).await? {
            Reply::Processes(processes) => Ok(processes),
            Reply::Obeyed(_) => Err(OrderFailure::NoAnswer),
        }
    }

    async fn give(&self, order: Order, then: Option<Then>) -> Result<Reply, OrderFailure> {
        let id = self.id;
        self.launcher.ask(then, |request| ToLauncher::Order { request, id, order }).await
    }
}

impl Launcher {
    /// Freezes everything of a tenant, what is still to come included, or thaws it; answered when that is so.
    ///
    /// # Errors
    /// See [`OrderFailure`].
    pub async fn freeze_tenant(&self, tenant: Name, frozen: bool) -> Result<(), OrderFailure> {
        self.ask(None, |request| ToLauncher::FreezeTenant { request, tenant, frozen }).await.map(drop)
    }

    async fn ask(&self, then: Option<Then>, message: impl FnOnce(u64) -> ToLauncher) -> Result<Reply, OrderFailure> {
        let request = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        {
            let mut sandboxes = self.0.sandboxes();
            if sandboxes.gone {
                return Err(OrderFailure::NoAnswer);
            }
            sandboxes.orders.insert(request, Asked { reply, then, processes: Vec::new() });
        }
        self.send(message(request), Vec::new());
        // one that nobody waits for any more is answered all the same, and has its effect
        let answered = tokio::time::timeout(ANSWER_WITHIN, answer).await;
        Ok(answered.ok().and_then(Result::ok).ok_or(OrderFailure::NoAnswer)??)
    }
}

impl Inner {
    pub(super) fn take_answer(&self, request: u64, result: Result<Answer, OrderError>) {
        let mut sandboxes = self.sandboxes();
        let Some(asked) = sandboxes.orders.get_mut(&request) else { return };
        if let Ok(Answer::Processes { some, last }) = result {
            asked.processes.extend(some);
            if last && let Some(Asked { reply, processes, .. }) = sandboxes.orders.remove(&request) {
                // closed if nobody waits any more
                let _ = reply.send(Ok(Reply::Processes(processes)));
            }
            return;
        }
        let Some(Asked { reply, then, .. }) = sandboxes.orders.remove(&request) else { return };
        drop(sandboxes);
        if let Some(then) = then {
            then(&result);
        }
        let _ = reply.send(result.map(Reply::Obeyed));
    }
}
