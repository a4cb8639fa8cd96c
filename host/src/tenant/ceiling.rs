//! The `limits` of a tenant: the ceiling over all of its jobs together.

use holm_sandbox::limits::Ceiling;
use serde_json::{Map, Number, Value};

use super::SettingsError;

/// What can be set, with its range. Cores are numbers with up to three decimals.
const AVAILABLE: [(&str, f64, f64); 4] = [
    ("memory_bytes", 4_194_304.0, 1_125_899_906_842_624.0),
    ("cpu_cores", 0.01, 1024.0),
    ("cpu_weight", 1.0, 10_000.0),
    ("pids", 2.0, 4_194_304.0),
];

/// Settings of the contract that no controller is behind yet.
const NOT_AVAILABLE: [&str; 8] =
    ["cpuset", "io", "io_weight", "devices", "hugetlb", "net_class", "net_priority", "egress_bps"];

/// A tenant's checked `limits` object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CeilingSettings(Map<String, Value>);

impl CeilingSettings {
    /// Checks what the operator gave. What cannot be enforced here is refused, never taken in silence.
    pub(super) fn check(json: &Map<String, Value>) -> Result<(), SettingsError> {
        for (key, value) in json {
            if NOT_AVAILABLE.contains(&key.as_str()) {
                return Err(SettingsError::NotAvailable { field: format!("limits.{key}") });
            }
            let Some((_, minimum, maximum)) = AVAILABLE.iter().find(|(name, ..)| name == key) else {
                let names: Vec<&str> = AVAILABLE.iter().map(|(name, ..)| *name).collect();
                let detail = format!("a tenant has no limit `{key}`; tenants' limits are {}", names.join(", "));
                return Err(SettingsError::Malformed(detail));
            };
            let Some(number) = value.as_number() else {
                return Err(SettingsError::Malformed(format!("`limits.{key}` is no number")));
            };
            let float = number.as_f64().unwrap_or(f64::NAN);
            if float.fract() != 0.0 && key != "cpu_cores" {
                return Err(SettingsError::Malformed(format!("`limits.{key}` is no whole number")));
            }
            if !(*minimum..=*maximum).contains(&float) {
                let json = |bound: f64| match Number::from_f64(bound) {
                    Some(fraction) if key == "cpu_cores" => fraction,
                    _ => whole(bound).into(),
                };
                return Err(SettingsError::OutOfRange {
                    field: format!("limits.{key}"),
                    given: number.clone(),
                    minimum: json(*minimum),
                    maximum: json(*maximum),
                });
            }
        }
        Ok(())
    }

    pub(super) fn from_stored(json: &Map<String, Value>) -> Self {
        Self(json.clone())
    }

    /// What the launcher is to enforce.
    #[must_use]
    pub fn ceiling(&self) -> Ceiling {
        let number = |key: &str| self.0.get(key).and_then(Value::as_f64);
        let small = |value: f64| u32::try_from(whole(value)).unwrap_or(u32::MAX);
        Ceiling {
            memory_bytes: number("memory_bytes").map(whole),
            cpu_millicores: number("cpu_cores").map(|cores| small((cores * 1000.0).round())),
            cpu_weight: number("cpu_weight").map(small),
            pids: number("pids").map(small),
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates; the value has been checked
fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(json: &Value) -> Result<(), SettingsError> {
        CeilingSettings::check(json.as_object().unwrap())
    }

    #[test]
    fn what_can_be_enforced_is_taken() {
        let json = json!({"memory_bytes": 8_388_608, "cpu_cores": 0.5, "cpu_weight": 50, "pids": 100});
        check(&json).unwrap();
        let ceiling = CeilingSettings::from_stored(json.as_object().unwrap()).ceiling();
        let expected =
            Ceiling { memory_bytes: Some(8 << 20), cpu_millicores: Some(500), cpu_weight: Some(50), pids: Some(100) };
        assert_eq!(ceiling, expected);
    }

    #[test]
    fn what_cannot_be_enforced_is_refused() {
        assert!(matches!(check(&json!({"io_weight": 5})), Err(SettingsError::NotAvailable { .. })));
        assert!(matches!(check(&json!({"cpu_cores": 0})), Err(SettingsError::OutOfRange { .. })));
        assert!(matches!(check(&json!({"pids": -1})), Err(SettingsError::OutOfRange { .. })));
        assert!(matches!(check(&json!({"pids": 2.5})), Err(SettingsError::Malformed(_))));
        assert!(matches!(check(&json!({"memory": 1})), Err(SettingsError::Malformed(_))));
    }
}
