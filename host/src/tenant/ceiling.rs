//! The `limits` of a tenant: the ceiling over all of its jobs together.

use std::collections::BTreeMap;

use holm_sandbox::ceiling::{Ceiling, DeviceNumber, DeviceRule, IoLimit, page_bytes};
use serde_json::{Map, Number, Value, json};

use super::SettingsError;

/// Settings that are one number, with their ranges and what they are. Cores are numbers with up to three decimals.
const NUMBERS: [(&str, f64, f64, &str); 7] = [
    ("memory_bytes", 4_194_304.0, 1_125_899_906_842_624.0, "memory of all jobs, swap included"),
    ("cpu_cores", 0.01, 1024.0, "CPU time per wall time of all jobs"),
    ("cpu_weight", 1.0, 10_000.0, "share of CPU against other tenants; 100 without"),
    ("pids", 2.0, 4_194_304.0, "processes and threads of all jobs, the host's inits included"),
    ("io_weight", 1.0, 10_000.0, "share of block devices against other tenants; 100 without"),
    ("net_class", 1.0, 4_294_967_295.0, "class of packets: of `net_cls` where that is mounted, else their mark"),
    ("net_priority", 0.0, 4_294_967_295.0, "priority of packets"),
];

/// Settings that are more than that, and what they are.
const OTHERS: [(&str, &str); 4] = [
    ("cpuset", "the CPUs that jobs run on, as in `0,2-5`"),
    (
        "io",
        "rates to whole block devices: `device` as `major:minor`, and any of `read_bps`, `write_bps`, `read_iops`, `write_iops`",
    ),
    (
        "devices",
        "devices besides the standard six: `type` `block` or `char`, `device` as `major:minor`, `access` `r`, `w` or `rw`. Jobs that are launched from then on find a node in `/dev`",
    ),
    (
        "hugetlb",
        "bytes of huge pages by the kernel's name of their size, as in `{\"2MB\": 4194304}`; none of other sizes",
    ),
];

/// Settings of the contract that no controller is behind yet.
const NOT_AVAILABLE: [&str; 1] = ["egress_bps"];

const RATES: [&str; 4] = ["read_bps", "write_bps", "read_iops", "write_iops"];

/// A tenant's checked `limits` object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CeilingSettings(Map<String, Value>);

impl CeilingSettings {
    /// The settings that are one number: name, least, greatest, meaning.
    pub const NUMBERS: &[(&'static str, f64, f64, &'static str)] = &NUMBERS;
    /// The others: name and meaning.
    pub const OTHERS: &[(&'static str, &'static str)] = &OTHERS;

    /// Checks what the operator gave, as far as that needs no look at the machine. What cannot be enforced is refused,
    /// never taken in silence.
    pub(super) fn check(json: &Map<String, Value>) -> Result<(), SettingsError> {
        for (key, value) in json {
            if NOT_AVAILABLE.contains(&key.as_str()) {
                return Err(SettingsError::NotAvailable { field: format!("limits.{key}"), given: value.clone() });
            }
            if let Some((_, minimum, maximum, _)) = NUMBERS.iter().find(|(name, ..)| name == key) {
                check_number(&format!("limits.{key}"), value, *minimum, *maximum, key == "cpu_cores")?;
                continue;
            }
            match key.as_str() {
                "cpuset" => drop(cpus(value)?),
                "io" => drop(each(value, "limits.io", io_limit)?),
                "devices" => drop(each(value, "limits.devices", device_rule)?),
                "hugetlb" => drop(huge_pages(value)?),
                _ => return Err(unknown(key)),
            }
        }
        let ceiling = Self::from_stored(json).ceiling();
        ceiling.check().map_err(|error| match error.0 {
            field @ ("io" | "devices") => SettingsError::Impossible {
                field: format!("limits.{field}"),
                given: json.get(field).cloned().unwrap_or_default(),
                possible: format!("each device once, at most {} of them", Ceiling::MOST_DEVICES),
            },
            field => SettingsError::Impossible {
                field: format!("limits.{field}"),
                given: json.get(field).cloned().unwrap_or_default(),
                possible: "a value within the documented range".into(),
            },
        })
    }

    /// Whether there is a setting of this name.
    pub(super) fn knows(name: &str) -> bool {
        let names = NUMBERS.iter().map(|row| row.0).chain(OTHERS.iter().map(|row| row.0)).chain(NOT_AVAILABLE);
        names.into_iter().any(|known| known == name)
    }

    pub(super) fn from_stored(json: &Map<String, Value>) -> Self {
        Self(json.clone())
    }

    /// What the launcher is to enforce.
    #[must_use]
    pub fn ceiling(&self) -> Ceiling {
        let number = |key: &str| self.0.get(key).and_then(Value::as_f64);
        let small = |value: f64| u32::try_from(whole(value)).unwrap_or(u32::MAX);
        let list = |key: &str| self.0.get(key).filter(|value| !value.is_null());
        Ceiling {
            memory_bytes: number("memory_bytes").map(whole),
            cpu_millicores: number("cpu_cores").map(|cores| small((cores * 1000.0).round())),
            cpu_weight: number("cpu_weight").map(small),
            pids: number("pids").map(small),
            cpuset: list("cpuset").and_then(|value| cpus(value).ok()),
            io: list("io").and_then(|value| each(value, "limits.io", io_limit).ok()).unwrap_or_default(),
            io_weight: number("io_weight").map(small),
            devices: list("devices")
                .and_then(|value| each(value, "limits.devices", device_rule).ok())
                .unwrap_or_default(),
            hugetlb: list("hugetlb").and_then(|value| huge_pages(value).ok()).unwrap_or_default(),
            net_class: number("net_class").map(small),
            net_priority: number("net_priority").map(small),
        }
    }
}

fn unknown(key: &str) -> SettingsError {
    let names: Vec<&str> = NUMBERS.iter().map(|row| row.0).chain(OTHERS.iter().map(|row| row.0)).collect();
    SettingsError::Malformed(format!("a tenant has no limit `{key}`; tenants' limits are {}", names.join(", ")))
}

/// Checks a number against its range, and gives it.
fn check_number(field: &str, value: &Value, minimum: f64, maximum: f64, fractions: bool) -> Result<f64, SettingsError> {
    let Some(number) = value.as_number() else {
        return Err(SettingsError::Malformed(format!("`{field}` is no number")));
    };
    let float = number.as_f64().unwrap_or(f64::NAN);
    if float.fract() != 0.0 && !fractions {
        return Err(SettingsError::Malformed(format!("`{field}` is no whole number")));
    }
    if (minimum..=maximum).contains(&float) {
        return Ok(float);
    }
    let json = |bound: f64| match Number::from_f64(bound) {
        Some(fraction) if fractions => fraction,
        _ => whole(bound).into(),
    };
    let (minimum, maximum) = (json(minimum), json(maximum));
    Err(SettingsError::OutOfRange { field: field.to_owned(), given: number.clone(), minimum, maximum })
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str, SettingsError> {
    value.as_str().ok_or_else(|| SettingsError::Malformed(format!("`{field}` is no string")))
}

fn impossible(field: &str, given: impl Into<Value>, possible: &str) -> SettingsError {
    SettingsError::Impossible { field: field.to_owned(), given: given.into(), possible: possible.to_owned() }
}

fn cpus(value: &Value) -> Result<holm_sandbox::ceiling::CpuSet, SettingsError> {
    let list = text(value, "limits.cpuset")?;
    list.parse().map_err(|_| impossible("limits.cpuset", list, "a list of CPUs and ranges of them, as in `0,2-5`"))
}

/// Reads a list of objects.
fn each<T>(
    value: &Value,
    field: &str,
    read: impl Fn(&str, &Map<String, Value>) -> Result<T, SettingsError>,
) -> Result<Vec<T>, SettingsError> {
    let entries = value.as_array().ok_or_else(|| SettingsError::Malformed(format!("`{field}` is no array")))?;
    let entries = entries.iter().enumerate().map(|(i, entry)| {
        let field = format!("{field}[{i}]");
        let object = entry.as_object().ok_or_else(|| SettingsError::Malformed(format!("`{field}` is no object")))?;
        read(&field, object)
    });
    entries.collect()
}

/// Refuses members that are not among `known`.
fn only(field: &str, object: &Map<String, Value>, known: &[&str]) -> Result<(), SettingsError> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(SettingsError::Malformed(format!("`{field}` has no `{key}`; it has {}", known.join(", ")))),
    }
}

fn device(field: &str, object: &Map<String, Value>) -> Result<DeviceNumber, SettingsError> {
    let Some(value) = object.get("device") else {
        return Err(SettingsError::Malformed(format!("`{field}` has no `device`")));
    };
    let (field, number) = (format!("{field}.device"), value);
    let number = text(number, &field)?;
    number.parse().map_err(|_| impossible(&field, number, "a major and minor number, as in `7:0`"))
}

fn io_limit(field: &str, object: &Map<String, Value>) -> Result<IoLimit, SettingsError> {
    only(field, object, &["device", RATES[0], RATES[1], RATES[2], RATES[3]])?;
    let device = device(field, object)?;
    #[allow(clippy::cast_precision_loss)] // both are below 2^53
    let most =
        |key: &str| (if key.ends_with("_bps") { *Ceiling::IO_BPS.end() } else { *Ceiling::IO_IOPS.end() }) as f64;
    let rate = |key: &str| match object.get(key).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => {
            check_number(&format!("{field}.{key}"), value, 1.0, most(key), false).map(|rate| Some(whole(rate)))
        }
    };
    let [read_bps, write_bps, read_iops, write_iops] = RATES.map(rate);
    let limit =
        IoLimit { device, read_bps: read_bps?, write_bps: write_bps?, read_iops: read_iops?, write_iops: write_iops? };
    let set = [limit.read_bps, limit.write_bps, limit.read_iops, limit.write_iops];
    if set.iter().all(Option::is_none) {
        return Err(SettingsError::Malformed(format!("`{field}` has none of {}", RATES.join(", "))));
    }
    Ok(limit)
}

fn device_rule(field: &str, object: &Map<String, Value>) -> Result<DeviceRule, SettingsError> {
    only(field, object, &["type", "device", "access"])?;
    let word = |key: &str| match object.get(key) {
        None => Err(SettingsError::Malformed(format!("`{field}` has no `{key}`"))),
        Some(value) => text(value, &format!("{field}.{key}")),
    };
    let kind = word("type")?;
    let block = match kind {
        "block" => true,
        "char" => false,
        _ => return Err(impossible(&format!("{field}.type"), kind, "block, char")),
    };
    let access = word("access")?;
    let (read, write) = match access {
        "r" => (true, false),
        "w" => (false, true),
        "rw" => (true, true),
        _ => return Err(impossible(&format!("{field}.access"), access, "r, w, rw")),
    };
    Ok(DeviceRule { block, device: device(field, object)?, read, write })
}

fn huge_pages(value: &Value) -> Result<BTreeMap<String, u64>, SettingsError> {
    let sizes = value.as_object().ok_or_else(|| SettingsError::Malformed("`limits.hugetlb` is no object".into()))?;
    #[allow(clippy::cast_precision_loss)] // below 2^53
    let most = *Ceiling::HUGETLB_BYTES.end() as f64;
    let read = |(size, bytes): (&String, &Value)| {
        let field = format!("limits.hugetlb.{size}");
        let Some(page) = page_bytes(size) else {
            return Err(impossible("limits.hugetlb", size.as_str(), "sizes as the kernel writes them, as in `2MB`"));
        };
        let number = whole(check_number(&field, bytes, 0.0, most, false)?);
        if !number.is_multiple_of(page) {
            return Err(impossible(&field, json!(number), &format!("a multiple of {page}")));
        }
        Ok((size.clone(), number))
    };
    sizes.iter().map(read).collect()
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates; the value has been checked
fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &Value) -> Result<(), SettingsError> {
        CeilingSettings::check(json.as_object().unwrap())
    }

    #[test]
    fn what_can_be_enforced_is_taken() {
        let json = json!({
            "memory_bytes": 8_388_608, "cpu_cores": 0.5, "cpu_weight": 50, "pids": 100, "cpuset": "1,0",
            "io": [{"device": "254:0", "read_bps": 1, "write_iops": 4_294_967_294_u32}], "io_weight": 7,
            "devices": [{"type": "block", "device": "7:1", "access": "r"}, {"type": "char", "device": "7:1", "access": "rw"}],
            "hugetlb": {"2MB": 4_194_304, "1GB": 0}, "net_class": 1_048_577, "net_priority": 0,
        });
        check(&json).unwrap();
        let device = |major, minor| DeviceNumber { major, minor };
        let expected = Ceiling {
            memory_bytes: Some(8 << 20),
            cpu_millicores: Some(500),
            cpu_weight: Some(50),
            pids: Some(100),
            cpuset: Some("0-1".parse().unwrap()),
            io: vec![IoLimit {
                device: device(254, 0),
                read_bps: Some(1),
                write_bps: None,
                read_iops: None,
                write_iops: Some(4_294_967_294),
            }],
            io_weight: Some(7),
            devices: vec![
                DeviceRule { block: true, device: device(7, 1), read: true, write: false },
                DeviceRule { block: false, device: device(7, 1), read: true, write: true },
            ],
            hugetlb: [("2MB".to_owned(), 4 << 20), ("1GB".to_owned(), 0)].into(),
            net_class: Some(1_048_577),
            net_priority: Some(0),
        };
        assert_eq!(CeilingSettings::from_stored(json.as_object().unwrap()).ceiling(), expected);
    }

    #[test]
    fn numbers_have_ranges_and_the_rest_has_words_for_what_is_possible() {
        let out = |json: Value| matches!(check(&json), Err(SettingsError::OutOfRange { .. }));
        for json in [
            json!({"cpu_cores": 0}),
            json!({"pids": -1}),
            json!({"io_weight": 0}),
            json!({"net_class": 4_294_967_296_u64}),
            json!({"io": [{"device": "7:0", "read_bps": 0}]}),
            json!({"io": [{"device": "7:0", "read_iops": 4_294_967_295_u64}]}),
            json!({"hugetlb": {"2MB": -1}}),
        ] {
            assert!(out(json.clone()), "{json}: {:?}", check(&json));
        }
        let rule = json!({"type": "block", "device": "7:0", "access": "r"});
        for json in [
            json!({"cpuset": "1-"}),
            json!({"cpuset": ""}),
            json!({"io": [{"device": "sda", "read_bps": 1}]}),
            json!({"io": [{"device": "7:0", "read_bps": 1}, {"device": "7:0", "read_bps": 2}]}),
            json!({"devices": [{"type": "pipe", "device": "7:0", "access": "r"}]}),
            json!({"devices": [{"type": "block", "device": "7:0", "access": "rwm"}]}),
            json!({"devices": [rule, rule]}),
            json!({"hugetlb": {"3": 1}}),
            json!({"hugetlb": {"2MB": 1}}),
        ] {
            assert!(matches!(check(&json), Err(SettingsError::Impossible { .. })), "{json}: {:?}", check(&json));
        }
    }

    #[test]
    fn what_is_of_the_wrong_form_is_malformed() {
        assert!(matches!(check(&json!({"egress_bps": 5})), Err(SettingsError::NotAvailable { .. })));
        for json in [
            json!({"pids": 2.5}),
            json!({"memory": 1}),
            json!({"cpuset": 1}),
            json!({"io": {}}),
            json!({"io": [5]}),
            json!({"io": [{"device": "7:0"}]}),
            json!({"io": [{"read_bps": 1}]}),
            json!({"io": [{"device": "7:0", "read": 1}]}),
            json!({"devices": [{"device": "7:0", "access": "r"}]}),
            json!({"devices": ["7:0"]}),
            json!({"hugetlb": []}),
            json!({"net_class": "1:1"}),
        ] {
            assert!(matches!(check(&json), Err(SettingsError::Malformed(_))), "{json}: {:?}", check(&json));
        }
    }
}
