//! Changes of a job's limits while it runs.

use serde_json::{Map, Value};

use super::{Given, Limit, LimitError, Limits, Maximums, Runtime};

impl Limit {
    /// Whether it can be changed for a job that runs: whatever is counted from outside. The rest is built into the
    /// process when it is made.
    #[must_use]
    pub fn changes_while_running(self) -> bool {
        match self {
            Self::MemoryBytes
            | Self::CpuCores
            | Self::CpuWeight
            | Self::CpuTimeMs
            | Self::WallTimeMs
            | Self::Pids
            | Self::OutputBytes
            | Self::InputBytes => true,
            Self::Fuel | Self::ScratchBytes | Self::ScratchInodes | Self::OpenFiles | Self::StackBytes => false,
        }
    }

    /// The keys of those that can.
    #[must_use]
    pub fn changing_while_running() -> Vec<&'static str> {
        Self::ALL.into_iter().filter(|limit| limit.changes_while_running()).map(Self::key).collect()
    }
}

impl Limits {
    /// Lays `json` over the limits of a job that runs: a number replaces a value, `null` puts back that of `defaults`.
    /// `first` are the limits with which it began.
    ///
    /// # Errors
    /// The first value that cannot be.
    pub fn changed(
        &self,
        json: &Map<String, Value>,
        defaults: &Self,
        first: &Self,
        maximums: &Maximums,
    ) -> Result<Self, LimitError> {
        let mut changed = self.clone();
        for (key, value) in json {
            let one: Map<String, Value> = match (value, Limit::from_key(key)) {
                (Value::Null, Some(limit)) => {
                    let value = defaults.get(limit).min(maximums.of(limit));
                    [(key.clone(), limit.to_json(value))].into_iter().collect()
                }
                _ => [(key.clone(), value.clone())].into_iter().collect(),
            };
            let given = Given::read(&one, Some(self.runtime), maximums)?;
            for (limit, value) in given.0 {
                if value == self.get(limit) {
                    continue; // nothing is asked for
                }
                if !limit.changes_while_running() {
                    let given = one.values().next().cloned().unwrap_or_default();
                    return Err(LimitError::Fixed { limit, given });
                }
                // the guest's own memory is bounded from within as well, by what held at the start
                if limit == Limit::MemoryBytes && self.runtime == Runtime::Wasm && value > first.get(limit) {
                    let (minimum, maximum) = (limit.minimum(Some(self.runtime)), first.get(limit));
                    return Err(LimitError::OutOfRange { limit, given: value.into(), minimum, maximum });
                }
                changed.values[limit as usize] = value;
            }
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn limits(runtime: Runtime, json: &Value) -> Limits {
        let given = Given::from_stored(json.as_object().unwrap());
        Limits::resolve(runtime, &[&given], &Maximums::default())
    }

    fn change(limits: &Limits, json: &Value) -> Result<Limits, LimitError> {
        let defaults = Limits::resolve(limits.runtime, &[], &Maximums::default());
        limits.changed(json.as_object().unwrap(), &defaults, limits, &Maximums::default())
    }

    #[test]
    fn what_is_counted_from_outside_changes_and_null_puts_the_default_back() {
        let before = limits(Runtime::Native, &json!({"pids": 7, "cpu_cores": 0.5}));
        let after = change(&before, &json!({"pids": null, "wall_time_ms": 60_000, "output_bytes": 1})).unwrap();
        assert_eq!((after.get(Limit::Pids), after.get(Limit::CpuCores)), (64, 500));
        assert_eq!((after.get(Limit::WallTimeMs), after.get(Limit::OutputBytes)), (60_000, 1));
        assert_eq!(change(&before, &json!({})), Ok(before));
    }

    #[test]
    fn what_is_fixed_at_the_start_may_be_said_again_and_not_changed() {
        let before = limits(Runtime::Wasm, &json!({}));
        assert_eq!(change(&before, &json!(before)), Ok(before.clone()));
        for limit in Limit::ALL.into_iter().filter(|limit| !limit.changes_while_running()) {
            let error = change(&before, &json!({ limit.key(): limit.minimum(None) })).unwrap_err();
            assert!(matches!(error, LimitError::Fixed { limit: found, .. } if found == limit), "{error:?}");
        }
        let LimitError::NotApplicable { .. } =
            change(&limits(Runtime::Native, &json!({})), &json!({"fuel": 1})).unwrap_err()
        else {
            panic!("fuel for a native job")
        };
    }

    #[test]
    fn ranges_and_words_are_those_of_the_start() {
        let before = limits(Runtime::Native, &json!({}));
        for bad in
            [json!({"pids": 0}), json!({"memory_bytes": 1}), json!({"cpu_cores": 1e9}), json!({"output_bytes": -1})]
        {
            assert!(matches!(change(&before, &bad), Err(LimitError::OutOfRange { .. })), "{bad}");
        }
        for bad in [json!({"pid": 1}), json!({"pids": "1"}), json!({"no": null}), json!({"pids": 1.5})] {
            assert!(matches!(change(&before, &bad), Err(LimitError::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn a_guest_s_memory_can_be_lowered_and_not_be_more_than_at_its_start() {
        let before = limits(Runtime::Wasm, &json!({"memory_bytes": 64 << 20}));
        assert!(change(&before, &json!({"memory_bytes": 32 << 20})).is_ok());
        let error = change(&before, &json!({"memory_bytes": 65 << 20})).unwrap_err();
        assert!(matches!(error, LimitError::OutOfRange { maximum, .. } if maximum == 64 << 20), "{error:?}");
        let native = limits(Runtime::Native, &json!({"memory_bytes": 64 << 20}));
        assert!(change(&native, &json!({"memory_bytes": 65 << 20})).is_ok());
    }
}
