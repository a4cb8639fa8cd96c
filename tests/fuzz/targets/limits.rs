//! Limits of a job, from the JSON of a request to what the launcher is asked for. The input is a letter for the runtime,
//! then a line of JSON each: the request's, the plugin's, the tenant's defaults, the tenant's maximums, the server's. The
//! request's is a change of a running job's limits as well.
#![no_main]

#[allow(dead_code)]
#[path = "../../../host/src/limit/mod.rs"]
mod limit;

use libfuzzer_sys::fuzz_target;
use limit::{Given, Limit, Limits, Maximums, Runtime};
use serde_json::{Map, Value};

fuzz_target!(|text: &str| {
    let (runtime, text) = match text.as_bytes() {
        [b'n', ..] => (Runtime::Native, &text[1..]),
        [b'w', ..] => (Runtime::Wasm, &text[1..]),
        _ => return,
    };
    let given: Vec<Map<String, Value>> =
        text.lines().take(5).map(|line| serde_json::from_str(line).unwrap_or_default()).collect();
    let given = |index: usize| given.get(index).cloned().unwrap_or_default();
    let stored = |index, maximums: &Maximums| Given::read(&given(index), None, maximums).unwrap_or_default();

    let server = stored(4, &Maximums::default());
    let tenant = stored(3, &Maximums::least_of(vec![server.clone()]));
    let maximums = Maximums::least_of(vec![server, tenant]);
    // what was stored under other maximums may lie above today's
    let (defaults, plugin) =
        (stored(2, &Maximums::default()), Given::from_stored(&stored(1, &Maximums::default()).to_json()));
    changed(&Limits::resolve(runtime, &[&plugin, &defaults], &maximums), &given(0), &maximums);
    let request = match Given::read(&given(0), Some(runtime), &maximums) {
        Ok(request) => request,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };

    let in_range = |limit: Limit, value| (limit.minimum(Some(runtime))..=maximums.of(limit)).contains(&value);
    for limit in Limit::ALL {
        assert!(maximums.of(limit) <= limit.maximum());
        let value = request.get(limit);
        assert!(value.is_none_or(|value| limit.applies_to(runtime) && in_range(limit, value)), "{limit:?}: {value:?}");
    }
    assert_eq!(
        Given::read(&request.to_json(), Some(runtime), &maximums),
        Ok(request.clone()),
        "written and read again"
    );
    assert_eq!(Given::from_stored(&request.to_json()), request, "stored and read again");

    let limits = Limits::resolve(runtime, &[&request, &plugin, &defaults], &maximums);
    for limit in Limit::ALL {
        assert!(request.get(limit).is_none_or(|value| value == limits.get(limit)), "the request comes first");
    }
    if limits.check(&maximums).is_ok() {
        let applying = Limit::ALL.into_iter().filter(|limit| limit.applies_to(runtime));
        assert!(applying.clone().all(|limit| in_range(limit, limits.get(limit))), "{limits:?}");
        assert_eq!(serde_json::json!(limits).as_object().map(serde_json::Map::len), Some(applying.count()));
        assert_eq!(limits.for_sandbox().check(), Ok(()), "the launcher takes what the server has checked: {limits:?}");
    }
});

/// Lays `json` over the limits of a job that runs: all that is allowed is in range, and the launcher takes it.
fn changed(first: &Limits, json: &Map<String, Value>, maximums: &Maximums) {
    let changed = match first.changed(json, first, first, maximums) {
        Ok(changed) => changed,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    for limit in Limit::ALL {
        let value = changed.get(limit);
        assert!(value == first.get(limit) || limit.changes_while_running(), "{limit:?}: {value:?}");
        assert!(value <= maximums.of(limit).max(first.get(limit)), "{limit:?}: {value:?}");
    }
    if first.check(maximums).is_ok() && changed.check(maximums).is_ok() {
        assert_eq!(
            changed.for_sandbox().check(),
            Ok(()),
            "the launcher takes what the server has checked: {changed:?}"
        );
    }
}
