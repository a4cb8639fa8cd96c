//! What a tenant may have at once and in all.

use serde_json::{Map, Value};

use super::SettingsError;

/// One quota of a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuotaKey {
    /// Jobs that run at once.
    JobsRunning,
    /// Jobs that wait at once.
    JobsQueued,
    /// Plugins in all.
    Plugins,
    /// Size of one uploaded artifact.
    ArtifactBytes,
    /// Requests a second, with bursts of as many.
    RequestsPerSecond,
    /// Output kept of finished asynchronous jobs.
    StoredOutputBytes,
}

struct Row {
    word: &'static str,
    minimum: u64,
    default: u64,
    maximum: u64,
    about: &'static str,
}

const TABLE: [Row; 6] = [
    Row { word: "jobs_running", minimum: 1, default: 64, maximum: 4096, about: "jobs that run at once" },
    Row { word: "jobs_queued", minimum: 1, default: 256, maximum: 65_536, about: "jobs that wait at once" },
    Row { word: "plugins", minimum: 1, default: 100, maximum: 10_000, about: "plugins in all" },
    Row {
        word: "artifact_bytes",
        minimum: 1024,
        default: 64 << 20,
        maximum: 256 << 20,
        about: "size of one uploaded artifact",
    },
    Row {
        word: "requests_per_second",
        minimum: 1,
        default: 500,
        maximum: 100_000,
        about: "requests a second, with bursts of as many",
    },
    Row {
        word: "stored_output_bytes",
        minimum: 1,
        default: 1 << 30,
        maximum: 1 << 40,
        about: "output kept of finished asynchronous jobs",
    },
];

impl QuotaKey {
    /// Every quota, in the table's order.
    pub const ALL: [Self; 6] = [
        Self::JobsRunning,
        Self::JobsQueued,
        Self::Plugins,
        Self::ArtifactBytes,
        Self::RequestsPerSecond,
        Self::StoredOutputBytes,
    ];

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// Its name in the API.
    #[must_use]
    pub fn word(self) -> &'static str {
        self.row().word
    }

    /// What it limits, in words.
    #[must_use]
    pub fn about(self) -> &'static str {
        self.row().about
    }

    /// Least, default and greatest value.
    #[must_use]
    pub fn range(self) -> (u64, u64, u64) {
        let row = self.row();
        (row.minimum, row.default, row.maximum)
    }
}

/// All quotas of one tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota([u64; 6]);

impl Quota {
    /// The value of one.
    #[must_use]
    pub fn get(&self, key: QuotaKey) -> u64 {
        self.0[key as usize]
    }

    /// The same as an index or a count.
    #[must_use]
    pub fn count(&self, key: QuotaKey) -> usize {
        usize::try_from(self.get(key)).unwrap_or(usize::MAX)
    }

    /// Fills a checked object up with the defaults.
    pub(super) fn from_stored(json: &Map<String, Value>) -> Self {
        let value = |key: QuotaKey| json.get(key.word()).and_then(Value::as_u64).unwrap_or(key.row().default);
        Self(QuotaKey::ALL.map(value))
    }

    /// Checks an object as the operator gave it.
    pub(super) fn check(json: &Map<String, Value>) -> Result<(), SettingsError> {
        for (word, value) in json {
            let Some(row) = TABLE.iter().find(|row| row.word == word) else {
                let words: Vec<&str> = TABLE.iter().map(|row| row.word).collect();
                let detail = format!("there is no quota `{word}`; quotas are {}", words.join(", "));
                return Err(SettingsError::Malformed(detail));
            };
            let Value::Number(number) = value else {
                return Err(SettingsError::Malformed(format!("`quota.{word}` is no number")));
            };
            let in_range = number.as_u64().is_some_and(|n| (row.minimum..=row.maximum).contains(&n));
            if !in_range {
                return Err(SettingsError::OutOfRange {
                    field: format!("quota.{word}"),
                    given: number.clone(),
                    minimum: row.minimum.into(),
                    maximum: row.maximum.into(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(json: &Value) -> Result<(), SettingsError> {
        Quota::check(json.as_object().unwrap())
    }

    #[test]
    fn the_table_is_indexed_by_its_keys() {
        for (i, key) in QuotaKey::ALL.into_iter().enumerate() {
            assert_eq!(key as usize, i);
            let (minimum, default, maximum) = key.range();
            assert!(minimum > 0 && minimum <= default && default <= maximum, "{}", key.word());
        }
        assert_eq!(QuotaKey::StoredOutputBytes.word(), "stored_output_bytes");
    }

    #[test]
    fn quotas_are_checked_against_their_ranges() {
        assert!(check(&json!({"jobs_running": 1, "plugins": 10_000})).is_ok());
        for bad in [json!({"jobs_running": 0}), json!({"jobs_queued": -1}), json!({"plugins": 1e300})] {
            assert!(matches!(check(&bad), Err(SettingsError::OutOfRange { .. })), "{bad}");
        }
        for bad in [json!({"jobs": 1}), json!({"plugins": "1"}), json!({"plugins": null})] {
            assert!(matches!(check(&bad), Err(SettingsError::Malformed(_))), "{bad}");
        }
    }
}
