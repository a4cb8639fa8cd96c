//! Changes of tenants' ceilings while their sandboxes run.

use std::time::Instant;

use super::Launcher;
use super::zygotes::ZygoteId;
use crate::ceiling::{Ceiling, CeilingError};
use crate::name::Name;
use crate::protocol::FromLauncher;
use crate::spec::SandboxId;
use crate::usage::KillCause;

impl Launcher<'_> {
    /// Puts a tenant under another ceiling. The server is told when it holds, or that it cannot.
    pub(super) fn change_ceiling(&mut self, request: u64, tenant: &Name, ceiling: &Ceiling) {
        let set = match ceiling.check() {
            Ok(()) => self.tree.set_ceiling(tenant, ceiling, request),
            Err(limit) => {
                let (field, given) = (format!("limits.{}", limit.0), "out of its range".to_owned());
                Err(CeilingError::Impossible { field, given, possible: "what the API documents".into() })
            }
        };
        match set {
            Ok(false) => {} // settled soon
            Ok(true) => self.tell_ceiling(request, tenant, Ok(())),
            Err(error) => self.tell_ceiling(request, tenant, Err(error)),
        }
    }

    /// Goes on with ceilings that could not be had at once. Returns when to look again.
    pub(super) fn settle_ceilings(&mut self, now: Instant) -> Option<Instant> {
        let settled = self.tree.settle(now);
        for tenant in &settled.short_of_memory {
            self.end_largest_of(tenant);
        }
        for (request, tenant, result) in settled.answers {
            self.tell_ceiling(request, &tenant, result);
        }
        settled.next
    }

    fn tell_ceiling(&mut self, request: u64, tenant: &Name, result: Result<(), CeilingError>) {
        self.adjust_cpu_of(tenant);
        self.outbox.send(FromLauncher::CeilingSet { request, result });
    }

    /// More is in use than is to be: one job of the tenant goes, the largest. One at a time, as it may be enough.
    fn end_largest_of(&mut self, tenant: &Name) {
        let own = || self.live.iter().filter(|(_, live)| live.leaf.tenant() == tenant);
        let zygotes = || self.zygotes.iter().filter(|(_, zygote)| zygote.leaf.tenant() == tenant);
        let dying = own().any(|(_, live)| live.killed.is_some() || live.failure.is_some());
        if dying || zygotes().any(|(_, zygote)| zygote.failure.is_some()) {
            return;
        }
        // what is kept for jobs to come goes before a job
        let unneeded: Vec<ZygoteId> = zygotes().filter(|(_, zygote)| !zygote.owes()).map(|(id, _)| *id).collect();
        if !unneeded.is_empty() {
            return unneeded.into_iter().for_each(|id| self.end_zygote(id));
        }
        let largest: Option<SandboxId> = own().max_by_key(|(_, live)| live.leaf.memory_used()).map(|(id, _)| *id);
        if let Some(id) = largest {
            self.kill(id, KillCause::Memory);
        }
    }

    /// On v1 no job's CPU quota may be above its tenant's: each has what it is to have, as far as the tenant has it, and
    /// what makes sandboxes has as much as the tenant.
    fn adjust_cpu_of(&mut self, tenant: &Name) {
        let Some(millicores) = self.tree.cpu_ceiling(tenant) else { return };
        for live in self.live.values_mut().filter(|live| live.leaf.tenant() == tenant) {
            if live.spec.ceiling.cpu_millicores != millicores {
                live.spec.ceiling.cpu_millicores = millicores;
                // refused only where the cgroup is about to go
                let _ = live.leaf.limit_cpu(&live.spec);
            }
        }
        let zygotes = self.zygotes.values().map(|zygote| &zygote.leaf);
        let own = zygotes.chain(self.families.values().map(|family| &family.leaf));
        for leaf in own.filter(|leaf| leaf.tenant() == tenant) {
            let _ = leaf.limit_own_cpu(millicores);
        }
    }
}
