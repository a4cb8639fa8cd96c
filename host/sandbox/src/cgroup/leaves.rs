//! Leaves below the tenants: one for each sandbox, and for each process of the host's own beside them.

use nix::errno::Errno;

use super::leaf::Leaf;
use super::tree::Tree;
use crate::name::Name;
use crate::spec::SandboxSpec;

/// Leaves of a tenant that are made ahead at most: the next sandbox's, and one for a second that comes at once.
pub(super) const STOCK: usize = 2;

/// Leaves of a tenant's dead sandboxes that are kept for others at most: what a burst of jobs may find.
const KEPT: usize = 16;

impl Tree {
    /// A leaf for one sandbox under its tenant, which must have been made by [`Tree::tenant`]. It may have any limits.
    pub(crate) fn leaf(&mut self, tenant: &Name) -> nix::Result<Leaf> {
        let ahead = self.tenants.get_mut(tenant).and_then(|entry| {
            entry.leaves += usize::from(!entry.stock.is_empty());
            entry.stock.pop()
        });
        match ahead {
            Some(leaf) => Ok(leaf),
            None => self.make_sandbox_leaf(tenant),
        }
    }

    /// Whether a leaf is there for the next sandbox of a tenant.
    pub(crate) fn has_stock(&self, tenant: &Name) -> bool {
        self.tenants.get(tenant).is_some_and(|tenant| !tenant.stock.is_empty())
    }

    fn make_sandbox_leaf(&mut self, tenant: &Name) -> nix::Result<Leaf> {
        self.numbers += 1;
        self.make_leaf(tenant, &format!("sandbox-{}", self.numbers), false)
    }

    /// Makes leaves ahead for sandboxes like `spec`, one at each call. Whether there is more to do.
    pub(crate) fn stock_up(&mut self, spec: &SandboxSpec) -> bool {
        let missing = |tree: &Self| tree.tenants.get(&spec.tenant).is_some_and(|entry| entry.stock.len() < STOCK);
        if missing(self)
            && let Ok(mut leaf) = self.make_sandbox_leaf(&spec.tenant)
            && let Some(entry) = self.tenants.get_mut(&spec.tenant)
        {
            entry.leaves -= 1;
            // one that could not be made ready is made ready again, or refused, when it is needed
            let _ = leaf.make_ready(spec);
            entry.stock.push(leaf);
            return missing(self);
        }
        false
    }

    /// The same for a process of the host's own, which counts for nobody.
    pub(crate) fn own_leaf(&mut self, tenant: &Name, name: &str) -> nix::Result<Leaf> {
        self.make_leaf(tenant, name, true)
    }

    fn make_leaf(&mut self, tenant: &Name, name: &str, own: bool) -> nix::Result<Leaf> {
        let entry = self.tenants.get_mut(tenant).ok_or(Errno::ENOENT)?;
        let level = entry.level.make_below(name, self.plan.with_leaves)?;
        entry.leaves += 1;
        if own {
            entry.set_own(&self.plan, entry.own() + 1);
        }
        let path = format!("/{}/{tenant}/{name}", self.name);
        let leaf = Leaf::new(self.plan.clone(), entry.level.clone(), tenant.clone(), path, level, own);
        if self.frozen.contains(tenant)
            && self.plan.v2.is_none()
            && let Err(errno) = leaf.freeze(true)
        {
            // there is nothing in it, so it goes
            let _ = self.remove(leaf);
            return Err(errno);
        }
        Ok(leaf)
    }

    /// Keeps the leaf of a dead sandbox for another one of the tenant, if it can be made as good as new; else removes it, as
    /// [`Tree::remove`].
    pub(crate) fn keep(&mut self, mut leaf: Leaf) -> Option<Leaf> {
        // on v1 alone it would have to be frozen with the others
        let stands = self.plan.v2.is_none() && self.frozen.contains(leaf.tenant());
        let has_room = self.tenants.get(leaf.tenant()).is_some_and(|tenant| tenant.stock.len() < KEPT);
        if stands || !has_room || leaf.renew() != Ok(true) {
            return self.remove(leaf);
        }
        if let Some(tenant) = self.tenants.get_mut(leaf.tenant()) {
            tenant.has_one_less();
            tenant.stock.push(leaf);
        }
        None
    }

    /// Removes the leaf's directories. Gives it back, to be tried again, if the last task is still on its way out.
    pub(crate) fn remove(&mut self, mut leaf: Leaf) -> Option<Leaf> {
        if leaf.remove().is_err() {
            return Some(leaf);
        }
        if let Some(tenant) = self.tenants.get_mut(leaf.tenant()) {
            if leaf.is_own() {
                tenant.set_own(&self.plan, tenant.own() - 1);
            }
            tenant.has_one_less();
        }
        None
    }
}
