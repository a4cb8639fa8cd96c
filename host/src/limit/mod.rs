//! The limits of a job: one table of ranges and defaults, and the rules by which a job's values are found.
//!
//! A value is the first given of: the request, the plugin, the tenant's defaults, the server's default. What is out
//! of range is an error, never clamped and never ignored; only a stored value that lies above a maximum lowered since
//! is cut to it. Zero, negative and absent never mean unlimited.

mod change;
mod error;

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Number, Value};
use utoipa::ToSchema;

pub use self::error::LimitError;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// The greatest integer that every JSON implementation keeps exactly (RFC 8259, section 6).
const MAX_JSON_INTEGER: u64 = (1 << 53) - 1;

/// What runs a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// An ELF program.
    Native,
    /// A WebAssembly module.
    Wasm,
}

impl Runtime {
    /// Its name in the API.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Wasm => "wasm",
        }
    }
}

/// One limit of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Limit {
    /// Memory of the whole job.
    MemoryBytes,
    /// CPU time per wall time.
    CpuCores,
    /// Share of CPU under contention.
    CpuWeight,
    /// CPU time in all.
    CpuTimeMs,
    /// Wall-clock time from the start of tenant code.
    WallTimeMs,
    /// Processes and threads at once.
    Pids,
    /// Units of WebAssembly work.
    Fuel,
    /// Bytes of standard output and of standard error, each.
    OutputBytes,
    /// Bytes of input.
    InputBytes,
    /// Size of `/tmp`.
    ScratchBytes,
    /// Files and directories in `/tmp`.
    ScratchInodes,
    /// Open descriptors of one process.
    OpenFiles,
    /// Stack of the main thread.
    StackBytes,
}

/// A row of the table. `cpu_cores` is in thousandths.
struct Row {
    limit: Limit,
    key: &'static str,
    minimum: u64,
    default: u64,
    maximum: u64,
    about: &'static str,
}

const fn row(limit: Limit, key: &'static str, minimum: u64, default: u64, maximum: u64, about: &'static str) -> Row {
    Row { limit, key, minimum, default, maximum, about }
}

/// The published table. Minimum and default of some rows differ for WebAssembly, see [`Limit::minimum`] and
/// [`Limit::default`]; the maximum of `cpu_cores` is the number of CPUs.
const TABLE: [Row; 13] = [
    row(
        Limit::MemoryBytes,
        "memory_bytes",
        4 * MIB,
        128 * MIB,
        4 * GIB,
        "memory of the whole job, /tmp and swap included; at least 16 MiB for WebAssembly",
    ),
    row(Limit::CpuCores, "cpu_cores", 10, 1000, u64::MAX, "CPU time per wall time; at most the host's CPUs"),
    row(Limit::CpuWeight, "cpu_weight", 1, 100, 10_000, "share of CPU under contention"),
    row(Limit::CpuTimeMs, "cpu_time_ms", 10, 30_000, 3_600_000, "CPU time in all, user and system"),
    row(Limit::WallTimeMs, "wall_time_ms", 10, 30_000, 3_600_000, "time from the start of the plugin's code"),
    row(Limit::Pids, "pids", 1, 64, 4096, "processes and threads at once"),
    row(
        Limit::Fuel,
        "fuel",
        1,
        10_000_000_000,
        MAX_JSON_INTEGER,
        "WebAssembly only: units of work, about one an instruction",
    ),
    row(
        Limit::OutputBytes,
        "output_bytes",
        1,
        4 * MIB,
        256 * MIB,
        "bytes of standard output and of standard error, each",
    ),
    row(Limit::InputBytes, "input_bytes", 1, 16 * MIB, 256 * MIB, "bytes of input"),
    row(Limit::ScratchBytes, "scratch_bytes", 4 * KIB, 16 * MIB, GIB, "size of /tmp, charged to memory_bytes too"),
    row(Limit::ScratchInodes, "scratch_inodes", 16, 1024, 65_536, "files and directories in /tmp"),
    row(Limit::OpenFiles, "open_files", 16, 256, 16_384, "open descriptors of one process"),
    row(
        Limit::StackBytes,
        "stack_bytes",
        64 * KIB,
        8 * MIB,
        64 * MIB,
        "stack of the main thread; 1 MiB for WebAssembly if not given",
    ),
];

/// The least memory in which the WebAssembly runtime itself has room.
const WASM_MEMORY_MINIMUM: u64 = 16 * MIB;

/// WebAssembly keeps its locals in registers and its arrays in linear memory, and needs little stack.
const WASM_STACK_DEFAULT: u64 = MIB;

impl Limit {
    /// Every limit, in the table's order.
    pub const ALL: [Self; 13] = {
        let mut all = [Self::MemoryBytes; 13];
        let mut i = 0;
        while i < all.len() {
            all[i] = TABLE[i].limit;
            i += 1;
        }
        all
    };

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// Its name in the API.
    #[must_use]
    pub fn key(self) -> &'static str {
        self.row().key
    }

    /// What it limits, in words.
    #[must_use]
    pub fn about(self) -> &'static str {
        self.row().about
    }

    /// The limit with this name.
    #[must_use]
    pub fn from_key(key: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.key == key).map(|row| row.limit)
    }

    /// The least value for a job of this runtime; `None` stands for any runtime.
    #[must_use]
    pub fn minimum(self, runtime: Option<Runtime>) -> u64 {
        match (self, runtime) {
            (Self::MemoryBytes, Some(Runtime::Wasm)) => WASM_MEMORY_MINIMUM,
            _ => self.row().minimum,
        }
    }

    /// The greatest value that this server can grant at all.
    #[must_use]
    pub fn maximum(self) -> u64 {
        match self {
            Self::CpuCores => host_cpus() * 1000,
            Self::OpenFiles => self.row().maximum.min(hard_open_files()),
            _ => self.row().maximum,
        }
    }

    /// The value used where nobody gives one.
    #[must_use]
    pub fn default(self, runtime: Runtime) -> u64 {
        match (self, runtime) {
            (Self::StackBytes, Runtime::Wasm) => WASM_STACK_DEFAULT,
            _ => self.row().default,
        }
    }

    /// Whether jobs of this runtime have it.
    #[must_use]
    pub fn applies_to(self, runtime: Runtime) -> bool {
        self != Self::Fuel || runtime == Runtime::Wasm
    }

    /// A value as it is written in JSON.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // thousandths of cores are far below 2^53
    pub fn to_json(self, value: u64) -> Value {
        match self {
            Self::CpuCores if value.is_multiple_of(1000) => Value::from(value / 1000),
            Self::CpuCores => Value::from(value as f64 / 1000.0),
            _ => Value::from(value),
        }
    }

    /// Reads a JSON number. A fraction where none is allowed is `None`; what does not fit becomes 0 or `u64::MAX`,
    /// which are out of every range.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // float casts saturate, as is wanted
    fn read_number(self, number: &Number) -> Option<u64> {
        if let (Some(whole), true) = (number.as_u64(), self != Self::CpuCores) {
            return Some(whole);
        }
        let float = number.as_f64()?;
        match self {
            Self::CpuCores => Some((float * 1000.0).round() as u64),
            _ if float.fract() == 0.0 => Some(float as u64),
            _ => None,
        }
    }
}

/// Looked up once, at the start: later the server may not read what the answer depends on.
fn host_cpus() -> u64 {
    static CPUS: LazyLock<u64> = LazyLock::new(|| std::thread::available_parallelism().map_or(1, |n| n.get() as u64));
    *CPUS
}

/// The server's own hard limit: no job can have more, as nobody here may raise it.
fn hard_open_files() -> u64 {
    static HARD: LazyLock<u64> =
        LazyLock::new(|| getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard));
    *HARD
}

/// Some limits, as a request, a plugin or a tenant gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given(BTreeMap<Limit, u64>);

impl Given {
    /// Reads limits and checks them against the table, for a plugin of `runtime` where that is known, and against
    /// `maximums`.
    ///
    /// # Errors
    /// The first value that is malformed, out of range, or does not apply.
    pub fn read(json: &Map<String, Value>, runtime: Option<Runtime>, maximums: &Maximums) -> Result<Self, LimitError> {
        let mut given = BTreeMap::new();
        for (key, value) in json {
            let limit = Limit::from_key(key).ok_or_else(|| LimitError::Malformed(unknown(key)))?;
            let malformed = |what| LimitError::Malformed(format!("`{key}` is {what}"));
            let Value::Number(number) = value else {
                return Err(malformed("no number"));
            };
            let value = limit.read_number(number).ok_or_else(|| malformed("no whole number"))?;
            if let Some(runtime) = runtime.filter(|runtime| !limit.applies_to(*runtime)) {
                return Err(LimitError::NotApplicable { limit, runtime });
            }
            let (minimum, maximum) = (limit.minimum(runtime), maximums.of(limit));
            if !(minimum..=maximum).contains(&value) {
                return Err(LimitError::OutOfRange { limit, given: number.clone(), minimum, maximum });
            }
            given.insert(limit, value);
        }
        Ok(Self(given))
    }

    /// Checks limits that are to be stored in the place of `kept`. A value that stays as it was may lie above a maximum
    /// that was lowered since: it is cut when a job starts.
    ///
    /// # Errors
    /// As for [`Given::read`].
    pub fn check_change(
        kept: &Map<String, Value>,
        json: &Map<String, Value>,
        runtime: Option<Runtime>,
        maximums: &Maximums,
    ) -> Result<(), LimitError> {
        let stays = |(key, value): &(String, Value)| kept.get(key) == Some(value);
        let (old, new): (Map<_, _>, Map<_, _>) = json.clone().into_iter().partition(stays);
        Self::read(&old, runtime, &Maximums::default())?;
        Self::read(&new, runtime, maximums).map(drop)
    }

    /// Reads limits that were checked when they were stored.
    #[must_use]
    pub fn from_stored(json: &Map<String, Value>) -> Self {
        let read = |(key, value): (&String, &Value)| {
            let limit = Limit::from_key(key)?;
            Some((limit, limit.read_number(value.as_number()?)?))
        };
        Self(json.iter().filter_map(read).collect())
    }

    /// The value of one limit, if it is given.
    #[must_use]
    pub fn get(&self, limit: Limit) -> Option<u64> {
        self.0.get(&limit).copied()
    }

    /// As a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Map<String, Value> {
        self.0.iter().map(|(limit, value)| (limit.key().to_owned(), limit.to_json(*value))).collect()
    }
}

fn unknown(key: &str) -> String {
    let keys: Vec<&str> = TABLE.iter().map(|row| row.key).collect();
    format!("there is no limit `{key}`; limits are {}", keys.join(", "))
}

/// The greatest values that a tenant's jobs may have: the tenant's own where it has some, else the server's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maximums(Vec<Given>);

impl Maximums {
    /// The least of several sets of maximums holds, and never more than the table's.
    #[must_use]
    pub fn least_of(sets: Vec<Given>) -> Self {
        Self(sets)
    }

    /// The maximum of one limit.
    #[must_use]
    pub fn of(&self, limit: Limit) -> u64 {
        self.0.iter().filter_map(|set| set.get(limit)).fold(limit.maximum(), u64::min)
    }
}

/// The limits of one job, all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    values: [u64; 13],
    runtime: Runtime,
}

/// As an object, without what does not apply.
impl Serialize for Limits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let applying = Limit::ALL.into_iter().filter(|limit| limit.applies_to(self.runtime));
        serializer.collect_map(applying.map(|limit| (limit.key(), limit.to_json(self.get(limit)))))
    }
}

impl Limits {
    /// Finds each value: the first that is given in `sources`, else the default; cut to the maximum. A stored value
    /// is never cut below the runtime's minimum: such a job is refused by [`Limits::check`].
    #[must_use]
    pub fn resolve(runtime: Runtime, sources: &[&Given], maximums: &Maximums) -> Self {
        let value = |limit: Limit| {
            let given = sources.iter().find_map(|source| source.get(limit));
            given.unwrap_or_else(|| limit.default(runtime)).min(maximums.of(limit))
        };
        Self { values: Limit::ALL.map(value), runtime }
    }

    /// Whether every value is possible: a tenant's default of 8 MiB of memory does for a native plugin, but not for
    /// WebAssembly.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self, maximums: &Maximums) -> Result<(), LimitError> {
        for limit in Limit::ALL.into_iter().filter(|limit| limit.applies_to(self.runtime)) {
            let (value, minimum) = (self.get(limit), limit.minimum(Some(self.runtime)));
            if value < minimum {
                let given = Number::from(value);
                return Err(LimitError::OutOfRange { limit, given, minimum, maximum: maximums.of(limit) });
            }
        }
        Ok(())
    }

    /// The value of one limit.
    #[must_use]
    pub fn get(&self, limit: Limit) -> u64 {
        self.values[limit as usize]
    }

    /// What runs within them.
    #[must_use]
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// What of it the kernel enforces.
    #[must_use]
    pub fn for_sandbox(&self) -> holm_sandbox::limits::Limits {
        let small = |limit| u32::try_from(self.get(limit)).unwrap_or(u32::MAX);
        let time = |limit| Duration::from_millis(self.get(limit));
        holm_sandbox::limits::Limits {
            memory_bytes: self.get(Limit::MemoryBytes),
            cpu_millicores: small(Limit::CpuCores),
            cpu_weight: small(Limit::CpuWeight),
            cpu_time: time(Limit::CpuTimeMs),
            wall_time: time(Limit::WallTimeMs),
            pids: small(Limit::Pids),
            scratch_bytes: self.get(Limit::ScratchBytes),
            scratch_inodes: self.get(Limit::ScratchInodes),
            open_files: small(Limit::OpenFiles),
            stack_bytes: self.get(Limit::StackBytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(json: Value) -> Map<String, Value> {
        let Value::Object(map) = json else { panic!("{json}") };
        map
    }

    fn read(json: Value) -> Result<Given, LimitError> {
        Given::read(&object(json), None, &Maximums::default())
    }

    #[test]
    fn the_table_is_indexed_by_its_limits() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.limit as usize, i);
            assert_eq!(Limit::from_key(row.key), Some(row.limit));
            assert!(row.minimum > 0 && row.minimum <= row.default && row.default <= row.maximum, "{}", row.key);
        }
    }

    #[test]
    fn ends_of_each_range_pass_and_what_lies_beyond_does_not() {
        for limit in Limit::ALL {
            let (low, high) = (limit.minimum(None), limit.maximum());
            for value in [low, high] {
                let given = read(json!({ limit.key(): limit.to_json(value) })).unwrap();
                assert_eq!(given.get(limit), Some(value), "{}", limit.key());
            }
            let step = if limit == Limit::CpuCores { 10 } else { 1 };
            for value in [low - step, high + step] {
                let error = read(json!({ limit.key(): limit.to_json(value) })).unwrap_err();
                assert!(matches!(error, LimitError::OutOfRange { .. }), "{} = {value}: {error:?}", limit.key());
            }
        }
    }

    #[test]
    fn zero_negative_and_huge_are_out_of_range() {
        for text in ["0", "-1", "1e308", "-1e308", "99999999999999999999999", "18446744073709551615"] {
            for limit in Limit::ALL {
                let json: Value = serde_json::from_str(&format!("{{\"{}\": {text}}}", limit.key())).unwrap();
                let error = read(json).unwrap_err();
                assert!(matches!(error, LimitError::OutOfRange { .. }), "{} = {text}: {error:?}", limit.key());
            }
        }
    }

    #[test]
    fn what_is_no_number_is_malformed() {
        for value in [json!("1"), json!(null), json!([1]), json!({}), json!(true), json!(1000.5)] {
            let error = read(json!({ "pids": value })).unwrap_err();
            assert!(matches!(error, LimitError::Malformed(_)), "{value}: {error:?}");
        }
        let LimitError::Malformed(text) = read(json!({"memory": 1})).unwrap_err() else { panic!() };
        assert!(text.contains("`memory`") && text.contains("memory_bytes"), "{text}");
    }

    #[test]
    fn cores_are_kept_to_the_thousandth() {
        let given = read(json!({"cpu_cores": 0.25})).unwrap();
        assert_eq!(given.get(Limit::CpuCores), Some(250));
        assert_eq!(Value::Object(given.to_json()), json!({"cpu_cores": 0.25}));
        assert_eq!(Value::Object(read(json!({"cpu_cores": 1})).unwrap().to_json()), json!({"cpu_cores": 1}));
    }

    #[test]
    fn fuel_is_for_wasm_and_wasm_needs_more_memory() {
        let none = Maximums::default();
        let fuel = object(json!({"fuel": 5}));
        assert!(Given::read(&fuel, Some(Runtime::Wasm), &none).is_ok());
        let error = Given::read(&fuel, Some(Runtime::Native), &none).unwrap_err();
        assert!(matches!(error, LimitError::NotApplicable { limit: Limit::Fuel, .. }));
        let memory = object(json!({"memory_bytes": 8 * MIB}));
        assert!(Given::read(&memory, Some(Runtime::Native), &none).is_ok());
        assert!(Given::read(&memory, Some(Runtime::Wasm), &none).is_err());
    }

    #[test]
    fn the_first_source_that_gives_a_value_wins() {
        let (a, b) = (read(json!({"pids": 3})).unwrap(), read(json!({"pids": 5, "open_files": 99})).unwrap());
        let limits = Limits::resolve(Runtime::Wasm, &[&a, &b], &Maximums::default());
        assert_eq!((limits.get(Limit::Pids), limits.get(Limit::OpenFiles)), (3, 99));
        assert_eq!(limits.get(Limit::StackBytes), MIB, "WebAssembly's own default");
        assert_eq!(json!(Limits::resolve(Runtime::Native, &[], &Maximums::default())).get("fuel"), None);
    }

    #[test]
    fn a_stored_value_is_cut_to_a_maximum_lowered_later_and_a_given_one_is_refused() {
        let stored = read(json!({"pids": 64})).unwrap();
        let lower = Maximums::least_of(vec![read(json!({"pids": 8})).unwrap()]);
        assert_eq!(Limits::resolve(Runtime::Native, &[&stored], &lower).get(Limit::Pids), 8);
        assert_eq!(Limits::resolve(Runtime::Native, &[], &lower).get(Limit::Pids), 8, "the default too");
        let error = Given::read(&object(json!({"pids": 9})), None, &lower).unwrap_err();
        let expected = LimitError::OutOfRange { limit: Limit::Pids, given: 9.into(), minimum: 1, maximum: 8 };
        assert_eq!(error, expected);
    }

    #[test]
    fn a_default_that_is_too_small_for_wasm_is_found_out() {
        let small = read(json!({"memory_bytes": 8 * MIB})).unwrap();
        let none = Maximums::default();
        assert!(Limits::resolve(Runtime::Native, &[&small], &none).check(&none).is_ok());
        assert!(Limits::resolve(Runtime::Wasm, &[&small], &none).check(&none).is_err());
    }

    #[test]
    fn the_launcher_accepts_every_value_that_the_table_allows() {
        for runtime in [Runtime::Native, Runtime::Wasm] {
            for pick in [|l: Limit, r| l.minimum(Some(r)), |l: Limit, _| l.maximum()] {
                let given = Given(Limit::ALL.map(|limit| (limit, pick(limit, runtime))).into());
                let limits = Limits::resolve(runtime, &[&given], &Maximums::default());
                assert_eq!(limits.for_sandbox().check(), Ok(()));
            }
        }
    }
}
