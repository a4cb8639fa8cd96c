//! What tenants have used, in time: a row for each minute of the last two days in which a job ended, and one for each
//! hour before.

use std::collections::BTreeMap;

use holm_sandbox::name::Name;
use jiff::Timestamp;
use rusqlite::{Transaction, params};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::StoreError;
use super::db::{from_json, json};

/// The lengths of rows, in seconds.
const MINUTE: i64 = 60;
const HOUR: i64 = 3600;

/// For how long minutes are kept apart, and hours at all.
const MINUTES_KEPT: i64 = 48 * HOUR;
const HOURS_KEPT: i64 = 400 * 24 * HOUR;

/// Sums over jobs that have ended. A figure that the kernel offered for none of them is absent, never 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Totals {
    /// Jobs.
    pub jobs: u64,
    /// The same by how they ended.
    pub outcomes: BTreeMap<String, u64>,
    /// Time spent waiting for a place.
    pub queue_us: u64,
    /// Time in which the plugins' code could run.
    pub wall_us: u64,
    /// Time in which it was paused.
    pub paused_us: u64,
    /// CPU time in user mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_user_us: Option<u64>,
    /// CPU time in the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_system_us: Option<u64>,
    /// Time held back by `cpu_cores`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttled_us: Option<u64>,
    /// The most memory that one of them used at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_peak_bytes: Option<u64>,
    /// Bytes read from block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_read_bytes: Option<u64>,
    /// Bytes written to block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_write_bytes: Option<u64>,
    /// WebAssembly work done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fuel_used: Option<u64>,
    /// Bytes of input that they were sent.
    pub input_bytes: u64,
    /// Bytes of standard output that came.
    pub output_bytes: u64,
}

impl Totals {
    /// Adds another sum.
    pub fn add(&mut self, other: &Self) {
        for (mine, others) in [
            (&mut self.jobs, other.jobs),
            (&mut self.queue_us, other.queue_us),
            (&mut self.wall_us, other.wall_us),
            (&mut self.paused_us, other.paused_us),
            (&mut self.input_bytes, other.input_bytes),
            (&mut self.output_bytes, other.output_bytes),
        ] {
            *mine = mine.saturating_add(others);
        }
        for (mine, others) in [
            (&mut self.cpu_user_us, other.cpu_user_us),
            (&mut self.cpu_system_us, other.cpu_system_us),
            (&mut self.cpu_throttled_us, other.cpu_throttled_us),
            (&mut self.io_read_bytes, other.io_read_bytes),
            (&mut self.io_write_bytes, other.io_write_bytes),
            (&mut self.fuel_used, other.fuel_used),
        ] {
            *mine = mine.map_or(others, |mine| Some(mine.saturating_add(others.unwrap_or(0))));
        }
        self.memory_peak_bytes = self.memory_peak_bytes.max(other.memory_peak_bytes);
        for (kind, count) in &other.outcomes {
            *self.outcomes.entry(kind.clone()).or_default() += count;
        }
    }
}

/// The minute in which something that ends now is counted, in seconds since the epoch.
#[must_use]
pub fn minute_of(now: Timestamp) -> i64 {
    now.as_second().div_euclid(MINUTE) * MINUTE
}

/// A stretch of time in whole rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first second.
    pub from: i64,
    /// The first second after it.
    pub to: i64,
}

impl Span {
    /// The shortest in whole rows that holds everything from `from` to `to`.
    #[must_use]
    pub fn around(from: Timestamp, to: Timestamp, now: Timestamp) -> Self {
        let length = |second: i64| if second < minutes_begin(now) { HOUR } else { MINUTE };
        let (from, to) = (from.as_second(), to.as_second() + i64::from(to.subsec_nanosecond() > 0));
        let (first, last) = (length(from), length(to - 1));
        Self { from: from.div_euclid(first) * first, to: (to - 1).div_euclid(last) * last + last }
    }

    /// Whether a minute lies in it.
    #[must_use]
    pub fn holds(&self, minute: i64) -> bool {
        minute < self.to && minute + MINUTE > self.from
    }
}

/// Where hours end and minutes begin.
fn minutes_begin(now: Timestamp) -> i64 {
    (now.as_second() - MINUTES_KEPT).div_euclid(HOUR) * HOUR
}

/// Adds to the sums of minutes. Those of tenants that are gone are nobody's.
pub(super) fn add(db: &Transaction<'_>, minutes: &[(Name, i64, Totals)]) -> Result<(), StoreError> {
    for (tenant, start, totals) in minutes {
        let known = db.prepare_cached("SELECT 1 FROM tenants WHERE name = ?1")?.exists([tenant.as_str()])?;
        if known {
            add_row(db, tenant.as_str(), MINUTE, *start, totals)?;
        }
    }
    Ok(())
}

fn add_row(db: &Transaction<'_>, tenant: &str, seconds: i64, start: i64, totals: &Totals) -> Result<(), StoreError> {
    let mut sum = totals.clone();
    let mut statement =
        db.prepare_cached("SELECT totals FROM usage WHERE tenant = ?1 AND seconds = ?2 AND start = ?3")?;
    let mut rows = statement.query(params![tenant, seconds, start])?;
    if let Some(row) = rows.next()? {
        sum.add(&from_json(row, 0)?);
    }
    let sql = "INSERT INTO usage (tenant, seconds, start, totals) VALUES (?1, ?2, ?3, ?4)
               ON CONFLICT (tenant, seconds, start) DO UPDATE SET totals = ?4";
    db.prepare_cached(sql)?.execute(params![tenant, seconds, start, json(&sum)?])?;
    Ok(())
}

/// Makes hours of old minutes, and forgets old hours.
pub(super) fn fold(db: &Transaction<'_>, now: Timestamp) -> Result<(), StoreError> {
    let mut old: Vec<(String, i64, Totals)> = Vec::new();
    {
        let mut statement =
            db.prepare_cached("SELECT tenant, start, totals FROM usage WHERE seconds = ?1 AND start < ?2")?;
        let mut rows = statement.query([MINUTE, minutes_begin(now)])?;
        while let Some(row) = rows.next()? {
            old.push((row.get(0)?, row.get(1)?, from_json(row, 2)?));
        }
    }
    for (tenant, start, totals) in &old {
        add_row(db, tenant, HOUR, start.div_euclid(HOUR) * HOUR, totals)?;
    }
    db.execute("DELETE FROM usage WHERE seconds = ?1 AND start < ?2", [MINUTE, minutes_begin(now)])?;
    db.execute("DELETE FROM usage WHERE seconds = ?1 AND start < ?2", [HOUR, now.as_second() - HOURS_KEPT])?;
    Ok(())
}

/// The sum over all rows of a tenant that lie in a span.
pub(super) fn sum(db: &Transaction<'_>, tenant: &Name, span: Span) -> Result<Totals, StoreError> {
    let sql = "SELECT totals FROM usage WHERE tenant = ?1 AND start < ?3 AND start + seconds > ?2";
    let mut statement = db.prepare_cached(sql)?;
    let mut rows = statement.query(params![tenant.as_str(), span.from, span.to])?;
    let mut sum = Totals::default();
    while let Some(row) = rows.next()? {
        sum.add(&from_json(row, 0)?);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn what_no_job_had_a_figure_for_stays_absent() {
        let one = Totals { jobs: 1, cpu_user_us: Some(5), memory_peak_bytes: Some(7), ..Totals::default() };
        let mut sum = Totals { jobs: 1, wall_us: 3, ..Totals::default() };
        sum.add(&one);
        sum.add(&Totals { memory_peak_bytes: Some(2), ..one.clone() });
        assert_eq!((sum.jobs, sum.cpu_user_us, sum.fuel_used), (3, Some(10), None));
        assert_eq!(sum.memory_peak_bytes, Some(7), "a peak is no sum");
        let json = serde_json::to_value(&sum).unwrap();
        assert!(json.get("io_read_bytes").is_none() && json["wall_us"] == 3);
        assert_eq!(serde_json::from_value::<Totals>(json).unwrap(), sum);
    }

    #[test]
    fn a_span_is_rounded_outwards_to_minutes_and_long_ago_to_hours() {
        let now = at(1_000_000_000);
        let recent = Span::around(at(999_999_961), at(999_999_962), now);
        assert_eq!((recent.from, recent.to), (999_999_960, 1_000_000_020));
        assert!(recent.holds(999_999_960) && !recent.holds(999_999_900) && !recent.holds(1_000_000_020));
        let old = Span::around(at(3601), at(3602), now);
        assert_eq!((old.from, old.to), (3600, 7200));
        let exact = Span::around(at(999_999_960), at(1_000_000_020), now);
        assert_eq!((exact.from, exact.to), (999_999_960, 1_000_000_020));
    }

    proptest! {
        #[test]
        fn a_span_holds_what_it_is_around(from in -10_000_000_i64..10_000_000, length in 1_i64..400_000) {
            let now = at(5_000_000);
            let span = Span::around(at(from), at(from + length), now);
            prop_assert!(span.from <= from && span.to >= from + length);
            prop_assert!(from - span.from < HOUR && span.to - (from + length) < HOUR);
        }
    }
}
