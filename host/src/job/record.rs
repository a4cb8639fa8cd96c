//! The record of one job: what the API shows of it.

use std::collections::BTreeMap;

use holm_sandbox::paths::CgroupPaths;
use holm_sandbox::usage::{Isolation, Stall, StallTime, Stats, Usage};
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use utoipa::ToSchema;
use uuid::Uuid;

use super::outcome::Outcome;
use crate::limit::Limits;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Waiting for a place.
    Queued,
    /// In a sandbox, or on its way into one.
    Running,
    /// The same, and nothing of it runs: by order, or while its tenant is paused or one of higher priority has its place.
    Paused,
    /// Over.
    Finished,
}

impl State {
    /// The state of this name.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "queued" => Some(Self::Queued),
            "running" => Some(Self::Running),
            "paused" => Some(Self::Paused),
            "finished" => Some(Self::Finished),
            _ => None,
        }
    }
}

/// A job's record.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobRecord {
    /// The job's id.
    pub id: Uuid,
    /// Whose it is.
    pub tenant: String,
    /// The plugin that runs.
    pub plugin: String,
    /// Its revision.
    pub revision: String,
    /// Where it is in its life.
    pub state: State,
    /// How it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Which run of it this is.
    pub attempt: u32,
    /// When the request came.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Whether its sandbox was made for it, or was waiting for a job like it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// When the plugin's code started.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// When it was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<Timestamp>,
    /// The limits that hold for it.
    #[schema(value_type = Object)]
    pub limits: Limits,
    /// What it used; complete once it is finished.
    pub usage: UsageRecord,
    /// The layers around it, read from the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolation: Option<IsolationRecord>,
}

/// How a job came to its sandbox, which it has to itself either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// It was made for the job.
    Cold,
    /// It was made a little earlier, and has waited.
    Parked,
}

/// What a job used. A figure that the kernel does not offer is absent, never 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct UsageRecord {
    /// Time spent waiting for a place.
    pub queue_us: u64,
    /// From having a place to the first instruction of the plugin.
    pub launch_us: u64,
    /// From there to the end, time in which it was paused left out.
    pub wall_us: u64,
    /// How long it was paused, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused_us: Option<u64>,
    /// CPU time in user mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_user_us: Option<u64>,
    /// CPU time in the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_system_us: Option<u64>,
    /// Time held back by `cpu_cores`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttled_us: Option<u64>,
    /// The most memory at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_peak_bytes: Option<u64>,
    /// The most processes and threads at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids_peak: Option<u64>,
    /// Bytes read from block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_read_bytes: Option<u64>,
    /// Bytes written to block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_write_bytes: Option<u64>,
    /// WebAssembly work done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fuel_used: Option<u64>,
    /// Bytes of input that the job was sent.
    pub input_bytes: u64,
    /// Bytes of standard output that came.
    pub output_bytes: u64,
}

impl UsageRecord {
    /// Fills in what the kernel counted.
    pub(super) fn measure(&mut self, usage: &Usage) {
        self.wall_us = usage.wall_us;
        self.paused_us = (usage.paused_us > 0).then_some(usage.paused_us);
        self.cpu_user_us = usage.cpu_user_us;
        self.cpu_system_us = usage.cpu_system_us;
        self.cpu_throttled_us = usage.cpu_throttled_us;
        self.memory_peak_bytes = usage.memory_peak_bytes;
        self.pids_peak = usage.pids_peak;
        self.io_read_bytes = usage.io_read_bytes;
        self.io_write_bytes = usage.io_write_bytes;
    }
}

/// What a job uses at this moment, and has used so far. A figure that is not to be had is absent, never 0.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatsRecord {
    /// The job's id.
    pub id: Uuid,
    /// Where it is in its life.
    pub state: State,
    /// So far; of a finished job in all.
    #[serde(flatten)]
    pub usage: UsageRecord,
    /// Memory in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// How much of the time its processes are held up for want of `cpu`, `memory` and `io` (Linux: PSI).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pressure: BTreeMap<&'static str, PressureRecord>,
}

/// Parts of the time in which some, or all, processes of a job were held up for want of one resource.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
pub struct PressureRecord {
    /// At least one was.
    pub some: StallRecord,
    /// All were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<StallRecord>,
}

/// Percents of the last 10, 60 and 300 seconds, and a sum.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
pub struct StallRecord {
    /// Of the last 10 s.
    pub avg10: f64,
    /// Of the last 60 s.
    pub avg60: f64,
    /// Of the last 300 s.
    pub avg300: f64,
    /// In all.
    pub total_us: u64,
}

impl StatsRecord {
    /// Of a job with this record; `live` is what the kernel tells of one that is in its sandbox, and the bytes of its input
    /// and output.
    pub(super) fn new(record: &JobRecord, live: Option<&(Stats, (u64, u64))>) -> Self {
        let mut usage = record.usage;
        let live = live.filter(|_| record.state != State::Finished);
        if let Some((live, bytes)) = live {
            usage.measure(&live.usage);
            (usage.input_bytes, usage.output_bytes) = *bytes;
        }
        let live = live.map(|(live, _)| live);
        let pressure = live.map(|live| live.pressure).unwrap_or_default();
        let pressure = [("cpu", pressure.cpu), ("memory", pressure.memory), ("io", pressure.io)];
        Self {
            id: record.id,
            state: record.state,
            usage,
            memory_bytes: live.and_then(|live| live.memory_bytes),
            pids: live.and_then(|live| live.pids),
            pressure: pressure.into_iter().filter_map(|(name, stall)| Some((name, stall?.into()))).collect(),
        }
    }
}

impl From<Stall> for PressureRecord {
    fn from(stall: Stall) -> Self {
        Self { some: stall.some.into(), full: stall.full.map(StallRecord::from) }
    }
}

impl From<StallTime> for StallRecord {
    fn from(time: StallTime) -> Self {
        let percent = |hundredths: u32| f64::from(hundredths) / 100.0;
        let (avg10, avg60, avg300) = (percent(time.avg10), percent(time.avg60), percent(time.avg300));
        Self { avg10, avg60, avg300, total_us: time.total_us }
    }
}

/// The layers around a job.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct IsolationRecord {
    /// Inode numbers of its namespaces: `user`, `pid`, `mnt`, `uts`, `ipc`, `net`, `cgroup`.
    pub namespaces: BTreeMap<&'static str, u64>,
    /// `fresh`, or `recycled`: another job of the same tenant has had it before, and left nothing in it.
    pub network: &'static str,
    /// `filter` when system calls are filtered.
    pub seccomp: &'static str,
    /// Whether no exec can give privilege.
    pub no_new_privs: bool,
    /// All five capability sets or-ed together, in hexadecimal.
    pub capabilities: String,
    /// Whether an open that only Landlock forbids was refused.
    pub landlock: bool,
    /// Inside id, host id, count. For the operator only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid_map: Option<String>,
    /// The cgroup of each controller. For the operator only.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_map")]
    #[schema(value_type = Option<BTreeMap<String, String>>)]
    pub cgroups: Option<CgroupPaths>,
}

/// Of one text, as a record is kept, a map, as it is shown.
fn as_map<S: Serializer>(paths: &Option<CgroupPaths>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(paths.iter().flat_map(CgroupPaths::iter))
}

impl From<Isolation> for IsolationRecord {
    fn from(isolation: Isolation) -> Self {
        Self {
            namespaces: isolation.namespaces.named().into(),
            network: if isolation.recycled_network { "recycled" } else { "fresh" },
            seccomp: match isolation.seccomp {
                0 => "disabled",
                1 => "strict",
                _ => "filter",
            },
            no_new_privs: isolation.no_new_privs,
            capabilities: format!("{:x}", isolation.capabilities),
            landlock: isolation.landlock,
            uid_map: Some(isolation.uid_map),
            cgroups: Some(isolation.cgroups),
        }
    }
}

impl JobRecord {
    /// Without what only the operator may see.
    #[must_use]
    pub fn for_tenant(mut self) -> Self {
        if let Some(isolation) = &mut self.isolation {
            isolation.uid_map = None;
            isolation.cgroups = None;
        }
        self
    }
}
