//! The cgroup over all sandboxes of one tenant, and the ceiling that it is under.
//!
//! A ceiling is changed as a whole: what the kernel refuses puts everything back as it was. Two changes may take the
//! kernel a moment, and are tried again until it is over; see [`Trouble`].

use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::extra::{Extra, Served};
use super::leaf::Leaf;
use super::machine::Machine;
use super::settings::{self, MOST_BFQ_WEIGHT, Programs, WEIGHTS};
use super::tree::Level;
use super::{Plan, Role, gauge, v2};
use crate::ceiling::{Ceiling, CeilingError};

/// How often and for how long a ceiling is tried again that the kernel refuses for the moment. Memory is tried less often:
/// each attempt makes the kernel look for pages to reclaim.
const CPU_AGAIN: Duration = Duration::from_millis(5);
const MEMORY_AGAIN: Duration = Duration::from_millis(20);
const WITHIN: Duration = Duration::from_secs(2);

// What a ceiling becomes when it is taken away again: beyond what any machine has, but written out, because "max" and
// -1 are spelled differently by every controller.
const NO_CEILING_BYTES: u64 = 1 << 50;
const NO_CEILING_MILLICORES: u32 = 1_024_000;
const NO_CEILING_PIDS: u32 = 1 << 22; // the kernel's PID_MAX_LIMIT
const DEFAULT_WEIGHT: u32 = 100;

/// A tenant that has sandboxes, or has had some a moment ago.
#[derive(Debug)]
pub(super) struct Tenant {
    pub(super) level: Rc<Level>,
    /// Leaves, of sandboxes and of the host's own.
    pub(super) leaves: usize,
    /// Leaves that no sandbox has, new or made as good as new.
    pub(super) stock: Vec<Leaf>,
    /// Leaves of the host's own, with a process each that is not the tenant's.
    own: u32,
    pub(super) idle_since: Instant,
    /// As it was written.
    written: Ceiling,
    /// As it should be.
    wanted: Ceiling,
    pending: Option<Pending>,
    programs: Programs,
    /// Bytes read from and written to block devices, as far as they have been told.
    io_told: (u64, u64),
}

/// A change that is being tried again.
#[derive(Debug)]
struct Pending {
    /// What holds again should it come to nothing.
    before: Ceiling,
    until: Instant,
    next: Instant,
    request: Option<u64>,
}

/// Why a ceiling could not be had.
enum Trouble {
    /// More memory is in use, and what could be reclaimed in a moment has been.
    Memory,
    /// v1 only: a CPU quota below that of a cgroup which is removed already, but not yet let go of, some RCU grace periods
    /// later.
    Cpu,
    /// It cannot be.
    Final(CeilingError),
}

/// What has become of a pending change.
pub(super) enum Attempt {
    /// To be tried again then; whether it is memory that stands in the way.
    NotYet { at: Instant, memory: bool },
    /// It holds, or will not.
    Over { request: Option<u64>, result: Result<(), CeilingError> },
}

/// What a setting is written to, and checked against.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) plan: Rc<Plan>,
    /// The instance's own cgroups, above all tenants'.
    pub(super) root: Rc<Level>,
    pub(super) machine: Machine,
}

impl Tenant {
    /// For new directories: closes what is open unless a ceiling opens it.
    pub(super) fn new(plan: &Plan, root: &Level, level: Level) -> Result<Self, CeilingError> {
        let refused = |extra: Extra| move |errno| refused(extra.settings(), errno);
        let mut programs = Programs::default();
        if let Ok(Served { index, v2: false }) = plan.served(Extra::Cpuset) {
            settings::inherit_cpus(root.dir(index), level.dir(index)).map_err(refused(Extra::Cpuset))?;
        }
        if let Ok(Served { index, v2 }) = plan.served(Extra::Devices) {
            let (dir, none) = (level.dir(index), &[]);
            let closed = if v2 { programs.allow_devices(dir, none) } else { settings::allow_devices_v1(dir, none) };
            closed.map_err(refused(Extra::Devices))?;
        }
        if let Ok(Served { index, v2 }) = plan.served(Extra::Hugetlb) {
            let none = settings::limit_huge_pages(level.dir(index), v2, &[].into());
            none.map_err(refused(Extra::Hugetlb))?;
        }
        let (written, wanted) = (Ceiling::default(), Ceiling::default());
        let (level, idle_since) = (Rc::new(level), Instant::now());
        let (leaves, stock, own, pending, io_told) = (0, Vec::new(), 0, None, (0, 0));
        Ok(Self { level, leaves, stock, own, idle_since, written, wanted, pending, programs, io_told })
    }

    pub(super) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// The ceiling that holds, or will in a moment.
    pub(super) fn wanted(&self) -> &Ceiling {
        &self.wanted
    }

    /// Bytes that all of its sandboxes have read from and written to block devices since this was asked before. On v1
    /// alone, where the kernel does not count them for each; and only while the tenant has block devices.
    pub(super) fn io_since(&mut self, plan: &Plan) -> Option<(u64, u64)> {
        let Ok(Served { index, v2: false }) = plan.served(Extra::Io) else { return None };
        if !has_block_devices(&self.wanted) {
            return None;
        }
        let files = ["blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"];
        let text = files.iter().find_map(|file| self.level.dir(index).read(file).ok())?;
        let (read, written) = gauge::io_bytes_v1(&text);
        let (read_before, written_before) = std::mem::replace(&mut self.io_told, (read, written));
        Some((read.saturating_sub(read_before), written.saturating_sub(written_before)))
    }

    /// A leaf has gone, or has no sandbox any more.
    pub(super) fn has_one_less(&mut self) {
        self.leaves -= 1;
        self.idle_since = Instant::now();
    }

    /// So many of the processes below it are the host's own. The ceiling is for the others.
    pub(super) fn set_own(&mut self, plan: &Plan, own: u32) {
        self.own = own;
        if let Some(pids) = self.written.pids {
            // refused only where the cgroup is about to go
            let _ = plan.control(&self.level, Role::Pids).limit_pids(pids.saturating_add(own));
        }
    }

    pub(super) fn own(&self) -> u32 {
        self.own
    }

    /// Puts it under `ceiling`. False if that takes a moment; [`Tenant::try_again`] has to be called then. After an error
    /// everything is as it was before.
    pub(super) fn change(
        &mut self,
        ground: &Ground,
        ceiling: &Ceiling,
        request: Option<u64>,
    ) -> Result<bool, CeilingError> {
        if self.written == *ceiling {
            return Ok(true);
        }
        ground.check(ceiling)?;
        let before = self.written.clone();
        self.wanted = ceiling.clone();
        match self.apply(ground) {
            Ok(()) => Ok(true),
            Err(Trouble::Final(error)) => {
                self.take_back(ground, before);
                Err(error)
            }
            Err(Trouble::Memory | Trouble::Cpu) => {
                let now = Instant::now();
                self.pending = Some(Pending { before, until: now + WITHIN, next: now, request });
                Ok(false)
            }
        }
    }

    /// Tries a pending change once more, if it is time.
    pub(super) fn try_again(&mut self, ground: &Ground, now: Instant) -> Attempt {
        let Some(mut pending) = self.pending.take() else { return Attempt::Over { request: None, result: Ok(()) } };
        if now < pending.next {
            let at = pending.next;
            self.pending = Some(pending);
            return Attempt::NotYet { at, memory: false };
        }
        let (memory, error) = match self.apply(ground) {
            Ok(()) => return Attempt::Over { request: pending.request, result: Ok(()) },
            Err(Trouble::Memory) => {
                let used = ground.plan.control(&self.level, Role::Memory).memory_used().unwrap_or(0);
                (true, CeilingError::InUse { field: "limits.memory_bytes".into(), used })
            }
            Err(Trouble::Cpu) => (false, refused("cpu_cores", Errno::EINVAL)),
            Err(Trouble::Final(error)) => {
                pending.until = now;
                (false, error)
            }
        };
        if now >= pending.until {
            self.take_back(ground, pending.before);
            return Attempt::Over { request: pending.request, result: Err(error) };
        }
        let at = now + if memory { MEMORY_AGAIN } else { CPU_AGAIN };
        pending.next = at;
        self.pending = Some(pending);
        Attempt::NotYet { at, memory }
    }

    /// Goes back to a ceiling that has held before.
    fn take_back(&mut self, ground: &Ground, before: Ceiling) {
        self.wanted = before;
        // it was taken a moment ago; what is refused now stays as it was last written
        let _ = self.apply(ground);
    }

    /// Writes what has changed. What has been written before an error stands.
    fn apply(&mut self, ground: &Ground) -> Result<(), Trouble> {
        self.apply_shares(&ground.plan)?;
        self.apply_extras(ground).map_err(Trouble::Final)
    }

    /// The settings that jobs have too.
    fn apply_shares(&mut self, plan: &Plan) -> Result<(), Trouble> {
        let (new, now) = (&self.wanted, &mut self.written);
        let control = |role| plan.control(&self.level, role);
        let fails = |field: &'static str| move |errno| Trouble::Final(refused(field, errno));
        if now.memory_bytes != new.memory_bytes {
            let bytes = new.memory_bytes.unwrap_or(NO_CEILING_BYTES);
            match control(Role::Memory).change_memory_limit_of_all(bytes) {
                Err(Errno::EBUSY) => return Err(Trouble::Memory),
                other => other.map_err(fails("memory_bytes"))?,
            }
            now.memory_bytes = new.memory_bytes;
        }
        if now.cpu_weight != new.cpu_weight {
            let weight = new.cpu_weight.unwrap_or(DEFAULT_WEIGHT);
            control(Role::Cpu).weigh_cpu(weight).map_err(fails("cpu_weight"))?;
            now.cpu_weight = new.cpu_weight;
        }
        if now.pids != new.pids {
            let pids = new.pids.map_or(NO_CEILING_PIDS, |pids| pids.saturating_add(self.own));
            control(Role::Pids).limit_pids(pids).map_err(fails("pids"))?;
            now.pids = new.pids;
        }
        if now.cpu_millicores != new.cpu_millicores {
            // theirs may be changed too, on v1, whatever comes of it
            self.stock.iter_mut().for_each(Leaf::distrust);
            match control(Role::Cpu).limit_cpu_of_all(new.cpu_millicores.unwrap_or(NO_CEILING_MILLICORES)) {
                Err(Errno::EINVAL) => return Err(Trouble::Cpu),
                other => other.map_err(fails("cpu_cores"))?,
            }
            now.cpu_millicores = new.cpu_millicores;
        }
        Ok(())
    }

    /// The settings that tenants alone have.
    fn apply_extras(&mut self, ground: &Ground) -> Result<(), CeilingError> {
        let (new, now, level) = (&self.wanted, &mut self.written, &self.level);
        if now.cpuset != new.cpuset {
            let Served { index, v2 } = ground.served(Extra::Cpuset, "cpuset")?;
            let set = |cpus| settings::set_cpus(ground.root.dir(index), level.dir(index), v2, cpus);
            let taken = set(new.cpuset.as_ref()).inspect_err(|_| _ = set(now.cpuset.as_ref()));
            taken.map_err(|errno| refused("cpuset", errno))?;
            now.cpuset.clone_from(&new.cpuset);
        }
        if now.io != new.io {
            let Served { index, v2 } = ground.served(Extra::Io, "io")?;
            let set = |old: &[_], new: &[_]| settings::set_io(level.dir(index), v2, old, new);
            let taken = set(&now.io, &new.io).inspect_err(|_| _ = set(&new.io, &now.io));
            taken.map_err(|errno| refused("io", errno))?;
            now.io.clone_from(&new.io);
        }
        if now.io_weight != new.io_weight {
            let Served { index, v2 } = ground.served(Extra::Io, "io_weight")?;
            let taken = settings::weigh_io(level.dir(index), v2, new.io_weight);
            taken.map_err(|errno| refused("io_weight", errno))?;
            now.io_weight = new.io_weight;
        }
        if now.devices != new.devices {
            let Served { index, v2 } = ground.served(Extra::Devices, "devices")?;
            let programs = &mut self.programs;
            let mut set = |rules: &[_]| match v2 {
                true => programs.allow_devices(level.dir(index), rules),
                false => settings::allow_devices_v1(level.dir(index), rules),
            };
            let taken = set(&new.devices).map_err(|errno| (errno, set(&now.devices)));
            taken.map_err(|(errno, _)| refused("devices", errno))?;
            now.devices.clone_from(&new.devices);
            if let (true, Ok(Served { index, v2: true })) = (has_block_devices(new), ground.plan.served(Extra::Io)) {
                // so that the kernel counts for each job what it reads and writes. It can do without
                let _ = v2::delegate(level.dir(index), &["io"]);
            }
        }
        if now.hugetlb != new.hugetlb {
            let Served { index, v2 } = ground.served(Extra::Hugetlb, "hugetlb")?;
            let set = |bytes| settings::limit_huge_pages(level.dir(index), v2, bytes);
            let taken = set(&new.hugetlb).inspect_err(|_| _ = set(&now.hugetlb));
            taken.map_err(|errno| refused("hugetlb", errno))?;
            now.hugetlb.clone_from(&new.hugetlb);
        }
        self.apply_network(ground)
    }

    fn apply_network(&mut self, ground: &Ground) -> Result<(), CeilingError> {
        let (new, now, level) = (&self.wanted, &mut self.written, &self.level);
        // one program does both on v2: each of the two is in it as far as v2 serves it
        let on_v2 = |extra, value: Option<u32>| value.filter(|_| ground.plan.served(extra).is_ok_and(|at| at.v2));
        for (extra, field) in [(Extra::NetClass, "net_class"), (Extra::NetPriority, "net_priority")] {
            let is_class = extra == Extra::NetClass;
            let (was, is) =
                if is_class { (now.net_class, new.net_class) } else { (now.net_priority, new.net_priority) };
            if was == is {
                continue;
            }
            let Served { index, v2 } = ground.served(extra, field)?;
            let dir = level.dir(index);
            let priority = if is_class { now.net_priority } else { is };
            let class = if is_class { is } else { now.net_class };
            let (class, priority) = (on_v2(Extra::NetClass, class), on_v2(Extra::NetPriority, priority));
            let taken = match (v2, is_class) {
                (true, _) => self.programs.mark_sockets(dir, class, priority),
                (false, true) => settings::set_class_v1(dir, is),
                (false, false) => settings::set_priority_v1(dir, is),
            };
            taken.map_err(|errno| refused(field, errno))?;
            if is_class { now.net_class = is } else { now.net_priority = is }
        }
        Ok(())
    }
}

impl Ground {
    fn served(&self, extra: Extra, field: &str) -> Result<Served, CeilingError> {
        self.plan.served(extra).map_err(|absence| CeilingError::NotAvailable {
            field: format!("limits.{field}"),
            why: format!("{}; to mend: {}", absence.found, absence.mend),
        })
    }

    /// Checks that the machine has what `ceiling` speaks of, before anything is written.
    fn check(&self, ceiling: &Ceiling) -> Result<(), CeilingError> {
        if let Some(cpus) = &ceiling.cpuset {
            let Served { index, v2 } = self.served(Extra::Cpuset, "cpuset")?;
            let there = settings::cpus_of(self.root.dir(index), v2).map_err(|errno| refused("cpuset", errno))?;
            if !cpus.is_within(&there) {
                let possible = format!("a set of the CPUs {there}");
                return Err(impossible("cpuset", cpus.to_string(), possible));
            }
        }
        for io in &ceiling.io {
            self.served(Extra::Io, "io")?;
            self.machine.require_disk("limits.io", io.device)?;
        }
        if let Some(weight) = ceiling.io_weight {
            self.check_io_weight(weight)?;
        }
        for rule in &ceiling.devices {
            self.served(Extra::Devices, "devices")?;
            self.machine.require_device("limits.devices", *rule)?;
        }
        if !ceiling.hugetlb.is_empty() {
            let Served { index, .. } = self.served(Extra::Hugetlb, "hugetlb")?;
            let sizes = settings::huge_page_sizes(self.root.dir(index)).map_err(|errno| refused("hugetlb", errno))?;
            if let Some(size) = ceiling.hugetlb.keys().find(|size| !sizes.contains(size)) {
                return Err(impossible("hugetlb", size.clone(), sizes.join(", ")));
            }
        }
        for (extra, field, is_set) in [
            (Extra::NetClass, "net_class", ceiling.net_class.is_some()),
            (Extra::NetPriority, "net_priority", ceiling.net_priority.is_some()),
        ] {
            if is_set {
                self.served(extra, field)?;
            }
        }
        Ok(())
    }

    /// A weight has an effect only where something schedules by it.
    fn check_io_weight(&self, weight: u32) -> Result<(), CeilingError> {
        let Served { index, v2 } = self.served(Extra::Io, "io_weight")?;
        let dir = self.root.dir(index);
        let has = |file: &str| dir.read(file).is_ok();
        let bfq = self.machine.has_bfq()
            && WEIGHTS.iter().any(|(file, of_v2)| *of_v2 == v2 && file.contains("bfq") && has(file));
        let cost = v2 && has("io.weight");
        match (bfq, cost) {
            (false, false) => Err(CeilingError::NotAvailable {
                field: "limits.io_weight".into(),
                why: "no block device is scheduled by weight; to mend: write bfq to /sys/block/DEVICE/queue/scheduler"
                    .into(),
            }),
            (true, false) if weight > MOST_BFQ_WEIGHT => Err(impossible(
                "io_weight",
                weight.to_string(),
                format!("1 to {MOST_BFQ_WEIGHT} with the scheduler BFQ"),
            )),
            _ => Ok(()),
        }
    }
}

fn has_block_devices(ceiling: &Ceiling) -> bool {
    ceiling.devices.iter().any(|rule| rule.block)
}

fn refused(field: &str, errno: Errno) -> CeilingError {
    CeilingError::Refused { field: format!("limits.{field}"), errno: errno as i32 }
}

fn impossible(field: &str, given: String, possible: String) -> CeilingError {
    CeilingError::Impossible { field: format!("limits.{field}"), given, possible }
}
