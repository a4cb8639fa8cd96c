//! Changes of tenants' ceilings, and their answers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use holm_sandbox::ceiling::{Ceiling, CeilingError};
use holm_sandbox::name::Name;
use holm_sandbox::protocol::ToLauncher;
use tokio::sync::oneshot;

use super::{Inner, Launcher};

/// The longest that an answer may take: what the launcher gives the kernel, and as much again for a machine that is
/// swamped.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A ceiling that has not been set.
#[derive(Debug, thiserror::Error)]
pub enum SetCeilingError {
    /// It cannot be had on this machine. Everything is as it was before.
    #[error(transparent)]
    Refused(#[from] CeilingError),
    /// The launcher has ended, or does not answer.
    #[error("the launcher does not answer")]
    NoAnswer,
}

impl Launcher {
    /// Changes the ceiling over all of a tenant's jobs, running and to come, and waits until it holds.
    ///
    /// # Errors
    /// See [`SetCeilingError`].
    pub async fn set_ceiling(&self, tenant: Name, ceiling: Ceiling) -> Result<(), SetCeilingError> {
        let request = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        {
            let mut sandboxes = self.0.sandboxes();
            if sandboxes.gone {
                return Err(SetCeilingError::NoAnswer);
            }
            sandboxes.ceilings.insert(request, sender);
        }
        self.send(ToLauncher::SetCeiling { request, tenant, ceiling }, Vec::new());
        let answered = tokio::time::timeout(ANSWER_WITHIN, answer).await;
        self.0.sandboxes().ceilings.remove(&request);
        Ok(answered.ok().and_then(Result::ok).ok_or(SetCeilingError::NoAnswer)??)
    }

    /// Says that a tenant is deleted.
    pub fn forget_tenant(&self, tenant: Name) {
        self.send(ToLauncher::ForgetTenant(tenant), Vec::new());
    }

    /// Says that a plugin is deleted.
    pub fn forget_program(&self, tenant: Name, program: Name) {
        self.send(ToLauncher::ForgetProgram { tenant, program }, Vec::new());
    }
}

impl Inner {
    pub(super) fn answer_ceiling(&self, request: u64, result: Result<(), CeilingError>) {
        if let Some(sender) = self.sandboxes().ceilings.remove(&request) {
            // closed if nobody waits any more
            let _ = sender.send(result);
        }
    }
}
