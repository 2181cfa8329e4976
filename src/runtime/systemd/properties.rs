//! The limits of config.json as properties of a unit: systemd.resource-control(5).
//!
//! systemd writes them again whenever it likes; what it has no property for is in the files of the cgroup alone.

use std::fs;

use oci_spec::runtime::LinuxResources;

use super::super::devices::{self, Rule};
use super::super::update::weight_of_shares;
use super::wire::{Property, Value};

const INFINITY: u64 = u64::MAX;

/// Those of a container, version 1 or 2 of cgroups being what systemd has.
pub fn of(resources: &LinuxResources, version2: bool) -> Vec<Property> {
    let mut all = Vec::new();
    let mut add = |name: &str, value| all.push((name.to_owned(), value));
    let bytes = |value: i64| Value::Ulong(u64::try_from(value).unwrap_or(INFINITY));
    if let Some(memory) = resources.memory() {
        if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
            add(if version2 { "MemoryMax" } else { "MemoryLimit" }, bytes(limit));
        }
        if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0 && version2) {
            add("MemoryLow", bytes(reservation));
        }
        // Version 2 counts swap alone.
        match (memory.swap().unwrap_or(0), memory.limit().unwrap_or(0)) {
            (-1, _) if version2 => add("MemorySwapMax", Value::Ulong(INFINITY)),
            (swap, limit) if version2 && limit > 0 && swap >= limit => add("MemorySwapMax", bytes(swap - limit)),
            _ => {}
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            match version2 {
                true => add("CPUWeight", Value::Ulong(weight_of_shares(shares))),
                false => add("CPUShares", Value::Ulong(shares)),
            }
        }
        let period = cpu.period().filter(|period| *period != 0);
        if let Some(period) = period.filter(|_| version2) {
            add("CPUQuotaPeriodUSec", Value::Ulong(period));
        }
        if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
            add("CPUQuotaPerSecUSec", Value::Ulong(quota_per_second(quota, period.unwrap_or(100_000))));
        }
        for (name, list) in [("AllowedCPUs", cpu.cpus()), ("AllowedMemoryNodes", cpu.mems())] {
            if let Some(mask) = list.as_deref().filter(|_| version2).and_then(bits) {
                add(name, Value::Bytes(mask));
            }
        }
    }
    if let Some(limit) = resources.pids().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        add("TasksMax", bytes(limit));
    }
    let weight = resources.block_io().as_ref().and_then(|block_io| block_io.weight()).filter(|weight| *weight != 0);
    if let Some(weight) = weight {
        match version2 {
            true => add("IOWeight", Value::Ulong(1 + u64::from(weight.saturating_sub(10)) * 9999 / 990)),
            false => add("BlockIOWeight", Value::Ulong(weight.into())),
        }
    }
    if let Some(rules) = resources.devices() {
        all.extend(of_devices(&devices::rules(rules), &fs::read_to_string("/proc/devices").unwrap_or_default()));
    }
    all
}

/// Microseconds in a second, in whole hundredths of a processor: systemd keeps no more.
fn quota_per_second(quota: i64, period: u64) -> u64 {
    match u64::try_from(quota) {
        Ok(quota) => (quota.saturating_mul(1_000_000) / period).next_multiple_of(10_000),
        Err(_) => INFINITY,
    }
}

/// `0-3,7` as bits, the lowest byte first.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= 1 << 16 {
            return None;
        }
        for cpu in first..=last {
            mask.resize(mask.len().max(cpu / 8 + 1), 0);
            mask[cpu / 8] |= 1 << (cpu % 8);
        }
    }
    Some(mask).filter(|mask| !mask.is_empty())
}

/// systemd knows lists of what is allowed only. Where not all is denied first, it is told nothing, and the rules are those
/// of the cgroup alone; so are the ones that deny some of what is allowed.
fn of_devices(rules: &[Rule], known: &str) -> Vec<Property> {
    let first = rules.iter().rposition(|rule| !rule.allow && rule.kind.is_none() && rule.major.is_none());
    let (policy, rules) = match first {
        Some(first) => ("strict", &rules[first + 1..]),
        None => ("auto", &[][..]),
    };
    let mut allowed = Vec::new();
    for rule in rules.iter().filter(|rule| rule.allow) {
        for (kind, word) in [(devices::CHARACTER, "char"), (devices::BLOCK, "block")] {
            if rule.kind.is_some_and(|wanted| wanted != kind) {
                continue;
            }
            let node = match (rule.major, rule.minor) {
                (None, _) => Some(format!("{word}-*")),
                (Some(major), Some(minor)) => Some(format!("/dev/{word}/{major}:{minor}")),
                (Some(major), None) => driver(known, kind, major).map(|name| format!("{word}-{name}")),
            };
            allowed.extend(node.map(|node| (node, rule.letters())));
        }
    }
    // An empty list clears the one there was.
    let clear = ("DeviceAllow".to_owned(), Value::Pairs(Vec::new()));
    let policy = ("DevicePolicy".to_owned(), Value::Text(policy.into()));
    let list = (!allowed.is_empty()).then(|| ("DeviceAllow".to_owned(), Value::Pairs(allowed)));
    [policy, clear].into_iter().chain(list).collect()
}

/// The name in /proc/devices: systemd takes no other word for all devices of one number.
fn driver(known: &str, kind: i32, major: i32) -> Option<&str> {
    let header = if kind == devices::CHARACTER { "Character devices:" } else { "Block devices:" };
    let section = known.split("\n\n").find_map(|section| section.trim_start().strip_prefix(header))?;
    section
        .lines()
        .find_map(|line| line.trim().split_once(' ').filter(|(number, _)| number.parse() == Ok(major)))
        .map(|(_, name)| name)
}

/// What the annotations `org.systemd.property.NAME` ask for, in the words of GVariant's text format: truth values, numbers,
/// texts and lists of texts. Times may be given in seconds (`...Sec`).
///
/// # Errors
/// The name of the first that is neither.
pub fn of_annotations<'a>(
    annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Vec<Property>, String> {
    let mut all = Vec::new();
    for (name, text) in annotations {
        let Some(name) = name.strip_prefix("org.systemd.property.") else {
            continue;
        };
        let value = parse(text.trim()).ok_or_else(|| name.to_owned())?;
        all.push(match (name.strip_suffix("Sec"), &value) {
            (Some(stem), Value::Int(_) | Value::Uint(_) | Value::Long(_) | Value::Ulong(_))
                if !name.ends_with("USec") =>
            {
                (format!("{stem}USec"), Value::Ulong(whole(&value).saturating_mul(1_000_000)))
            }
            _ => (name.to_owned(), value),
        });
    }
    // A map has no order, and messages are to be the same every time.
    all.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

fn whole(value: &Value) -> u64 {
    match value {
        Value::Int(n) => u64::try_from(*n).unwrap_or(0),
        Value::Uint(n) => u64::from(*n),
        Value::Long(n) => u64::try_from(*n).unwrap_or(0),
        Value::Ulong(n) => *n,
        _ => 0,
    }
}

fn parse(text: &str) -> Option<Value> {
    let quoted = |text: &str| {
        let inner = |quote| text.strip_prefix(quote)?.strip_suffix(quote);
        inner('\'').or_else(|| inner('"')).filter(|text| !text.contains(['\\', '\'', '"'])).map(str::to_owned)
    };
    if let Some(list) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        let parts = list.split(',').map(str::trim).filter(|part| !part.is_empty());
        return parts.map(quoted).collect::<Option<Vec<_>>>().map(Value::Texts);
    }
    Some(match text.split_once(' ').map_or(("", text), |(kind, number)| (kind, number.trim())) {
        ("", "true") => Value::Bool(true),
        ("", "false") => Value::Bool(false),
        ("int32", number) => Value::Int(number.parse().ok()?),
        ("uint32", number) => Value::Uint(number.parse().ok()?),
        ("int64", number) => Value::Long(number.parse().ok()?),
        ("uint64", number) => Value::Ulong(number.parse().ok()?),
        _ => match quoted(text) {
            Some(text) => Value::Text(text),
            None => Value::Int(text.parse().ok()?),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn properties(json: &str, version2: bool) -> BTreeMap<String, Value> {
        of(&serde_json::from_str(json).unwrap(), version2).into_iter().collect()
    }

    #[test]
    fn limits_in_systemds_words() {
        let json = r#"{"memory": {"limit": 1000, "swap": 3000, "reservation": 500},
            "cpu": {"shares": 1024, "quota": 25555, "period": 50000, "cpus": "0-1,9", "mems": "0"},
            "pids": {"limit": -1}, "blockIO": {"weight": 1000}}"#;
        let two = properties(json, true);
        let expected = [
            ("AllowedCPUs", Value::Bytes(vec![3, 2])),
            ("AllowedMemoryNodes", Value::Bytes(vec![1])),
            ("CPUQuotaPerSecUSec", Value::Ulong(520_000)),
            ("CPUQuotaPeriodUSec", Value::Ulong(50_000)),
            ("CPUWeight", Value::Ulong(100)),
            ("IOWeight", Value::Ulong(10_000)),
            ("MemoryLow", Value::Ulong(500)),
            ("MemoryMax", Value::Ulong(1000)),
            ("MemorySwapMax", Value::Ulong(2000)),
            ("TasksMax", Value::Ulong(u64::MAX)),
        ];
        assert_eq!(two, expected.map(|(name, value)| (name.to_owned(), value)).into());
        let one = properties(json, false);
        let names: Vec<&str> = one.keys().map(String::as_str).collect();
        assert_eq!(names, ["BlockIOWeight", "CPUQuotaPerSecUSec", "CPUShares", "MemoryLimit", "TasksMax"]);
    }

    #[test]
    fn zeros_say_nothing() {
        let json = r#"{"memory": {"limit": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0}, "pids": {"limit": 0}}"#;
        assert_eq!(properties(json, true), BTreeMap::new());
        assert_eq!(properties(r#"{"cpu": {"quota": -1}}"#, true)["CPUQuotaPerSecUSec"], Value::Ulong(u64::MAX));
    }

    #[test]
    fn devices_are_a_list_of_what_is_allowed() {
        let known = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n";
        let rules = r#"[{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 8, "access": "r"},
            {"allow": true, "type": "c", "access": "m"}, {"allow": true, "type": "c", "major": 10, "minor": 229}]"#;
        let rules = devices::rules(&serde_json::from_str::<Vec<_>>(rules).unwrap());
        let properties = of_devices(&rules, known);
        assert_eq!(properties[0], ("DevicePolicy".into(), Value::Text("strict".into())));
        assert_eq!(properties[1], ("DeviceAllow".into(), Value::Pairs(Vec::new())));
        let Value::Pairs(allowed) = &properties[2].1 else { panic!() };
        let allows = |node: &str, access: &str| allowed.contains(&(node.into(), access.into()));
        assert!(allows("block-sd", "r") && allows("char-*", "m") && allows("/dev/char/10:229", "rwm"), "{allowed:?}");
        assert!(allows("/dev/char/1:3", "rwm") && allows("char-pts", "rwm"), "{allowed:?}");
        let open = of_devices(&[], known);
        assert_eq!(open[0], ("DevicePolicy".into(), Value::Text("auto".into())));
        assert_eq!(open.len(), 2);
    }

    #[test]
    fn annotations_are_properties() {
        let annotations: BTreeMap<String, String> = [
            ("org.systemd.property.TimeoutStopSec", "uint32 7"),
            ("org.systemd.property.CollectMode", "'inactive-or-failed'"),
            ("org.systemd.property.After", "['a.service', \"b.service\"]"),
            ("org.systemd.property.DefaultDependencies", "true"),
            ("other", "x"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let expected = [
            ("After", Value::Texts(vec!["a.service".into(), "b.service".into()])),
            ("CollectMode", Value::Text("inactive-or-failed".into())),
            ("DefaultDependencies", Value::Bool(true)),
            ("TimeoutStopUSec", Value::Ulong(7_000_000)),
        ];
        assert_eq!(of_annotations(&annotations).unwrap(), expected.map(|(name, value)| (name.to_owned(), value)));
        let bad = BTreeMap::from([("org.systemd.property.X".to_owned(), "what?".to_owned())]);
        assert_eq!(of_annotations(&bad).unwrap_err(), "X");
    }
}
