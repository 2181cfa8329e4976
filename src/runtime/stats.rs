//! What a container has used, in the shape of runc's events.

use std::fs;

use serde_json::{Map, Value, json};

use super::cgroup_files::CgroupFiles;

/// The member `data` of an event of type `stats`.
pub(super) fn stats(files: &CgroupFiles) -> Value {
    let version2 = files.has("memory.current")
        || files.table("cpu.stat").contains_key("usage_usec") && !files.has("cpuacct.usage");
    json!({
        "cpu": if version2 { cpu2(files) } else { cpu1(files) },
        "cpuset": cpuset(files),
        "memory": if version2 { memory2(files) } else { memory1(files) },
        "pids": pids(files),
        "blkio": if version2 { io2(files) } else { io1(files) },
        "hugetlb": hugetlb(files, version2),
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

/// An object of what is not zero.
fn without_zeros<'a>(members: impl IntoIterator<Item = (&'a str, u64)>) -> Map<String, Value> {
    let members = members.into_iter().filter(|(_, value)| *value != 0);
    members.map(|(name, value)| (name.to_owned(), json!(value))).collect()
}

fn throttling(files: &CgroupFiles, time: &str, to_nanoseconds: u64) -> Value {
    let stat = files.table("cpu.stat");
    let of = |name: &str| stat.get(name).copied().unwrap_or(0);
    Value::from(without_zeros([
        ("periods", of("nr_periods")),
        ("throttledPeriods", of("nr_throttled")),
        ("throttledTime", of(time) * to_nanoseconds),
    ]))
}

fn cpu1(files: &CgroupFiles) -> Value {
    // Documentation/admin-guide/cgroup-v1/cpuacct.rst: USER_HZ, which is 100.
    const TICK: u64 = 10_000_000;
    let ticks = files.table("cpuacct.stat");
    let in_mode = |name: &str| ticks.get(name).copied().unwrap_or(0) * TICK;
    let numbers = |text: &str| text.split_whitespace().filter_map(|n| n.parse().ok()).collect::<Vec<u64>>();
    let per_cpu = numbers(&files.text("cpuacct.usage_percpu").unwrap_or_default());
    let all = files.text("cpuacct.usage_all").unwrap_or_default();
    let rows: Vec<_> = all.lines().skip(1).map(numbers).filter(|row| row.len() == 3).collect();
    let column = |n: usize| rows.iter().map(|row| row[n]).collect::<Vec<_>>();
    json!({
        "usage": {
            "total": files.number("cpuacct.usage").unwrap_or(0),
            "percpu": per_cpu,
            "percpu_kernel": column(2),
            "percpu_user": column(1),
            "kernel": in_mode("system"),
            "user": in_mode("user"),
        },
        "throttling": throttling(files, "throttled_time", 1),
    })
}

fn cpu2(files: &CgroupFiles) -> Value {
    let stat = files.table("cpu.stat");
    let of = |name: &str| stat.get(name).copied().unwrap_or(0) * 1000;
    let mut cpu = json!({
        "usage": { "total": of("usage_usec"), "kernel": of("system_usec"), "user": of("user_usec") },
        "throttling": throttling(files, "throttled_usec", 1000),
    });
    add_pressure(&mut cpu, files, "cpu.pressure");
    cpu
}

/// Documentation/accounting/psi.rst: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn add_pressure(to: &mut Value, files: &CgroupFiles, name: &str) {
    let Some(text) = files.text(name) else { return };
    let line = |line: &str| -> Option<(String, Value)> {
        let (kind, rest) = line.split_once(' ')?;
        let pairs = rest.split(' ').filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), value.parse::<Value>().ok()?))
        });
        Some((kind.to_owned(), Value::from(pairs.collect::<Map<_, _>>())))
    };
    to["psi"] = Value::from(text.lines().filter_map(line).collect::<Map<_, _>>());
}

/// The members without which runc's consumers do not do are there even where the host has no such file.
fn cpuset(files: &CgroupFiles) -> Value {
    let list = |name: &str| files.text(name).and_then(|text| ids(&text));
    let mut set = json!({ "cpus": list("cpuset.cpus"), "mems": list("cpuset.mems") });
    for name in [
        "cpu_exclusive",
        "mem_hardwall",
        "mem_exclusive",
        "memory_migrate",
        "memory_spread_page",
        "memory_spread_slab",
        "memory_pressure",
        "sched_load_balance",
        "sched_relax_domain_level",
    ] {
        let text = files.text(&format!("cpuset.{name}"));
        set[name] = json!(text.and_then(|text| text.parse::<i64>().ok()).unwrap_or(0));
    }
    set
}

/// `0-2,5` one by one; None where it is empty.
fn ids(list: &str) -> Option<Vec<u16>> {
    let ranges = list.split(',').filter(|range| !range.is_empty()).map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<u16>().ok()?..=last.parse::<u16>().ok()?)
    });
    let all: Vec<u16> = ranges.collect::<Option<Vec<_>>>()?.into_iter().flatten().collect();
    if all.is_empty() { None } else { Some(all) }
}

fn memory1(files: &CgroupFiles) -> Value {
    let raw = files.table("memory.stat");
    let entry = |kind: &str| {
        let of = |what: &str| files.number(&format!("memory.{kind}{what}")).unwrap_or(0);
        usage(of("limit_in_bytes"), of("usage_in_bytes"), of("max_usage_in_bytes"), of("failcnt"))
    };
    json!({
        "cache": raw.get("cache").copied().unwrap_or(0),
        "usage": entry(""),
        "swap": entry("memsw."),
        "kernel": entry("kmem."),
        "kernelTCP": entry("kmem.tcp."),
        "raw": raw,
    })
}

fn memory2(files: &CgroupFiles) -> Value {
    let raw = files.table("memory.stat");
    let of = |name: &str| files.number(name).unwrap_or(0);
    let (limit, now) = (of("memory.max"), of("memory.current"));
    let mut memory = json!({
        "cache": raw.get("file").copied().unwrap_or(0),
        "usage": usage(limit, now, of("memory.peak"), 0),
        // Version 1 counted memory and swap together, and so does runc.
        "swap": usage(limit.saturating_add(of("memory.swap.max")), now + of("memory.swap.current"), 0, 0),
        "kernel": usage(0, 0, 0, 0),
        "kernelTCP": usage(0, 0, 0, 0),
        "raw": raw,
    });
    add_pressure(&mut memory, files, "memory.pressure");
    memory
}

fn usage(limit: u64, now: u64, max: u64, failcnt: u64) -> Value {
    let mut entry = without_zeros([("usage", now), ("max", max)]);
    entry.insert("limit".into(), json!(limit));
    entry.insert("failcnt".into(), json!(failcnt));
    Value::from(entry)
}

fn pids(files: &CgroupFiles) -> Value {
    let limit = files.number("pids.max").filter(|limit| *limit != u64::MAX).unwrap_or(0);
    Value::from(without_zeros([("current", files.number("pids.current").unwrap_or(0)), ("limit", limit)]))
}

fn io_entry(device: &str, op: &str, value: u64) -> Option<Value> {
    let (major, minor) = device.split_once(':')?;
    let (major, minor): (u64, u64) = (major.parse().ok()?, minor.parse().ok()?);
    Some(json!({ "major": major, "minor": minor, "op": op, "value": value }))
}

/// Lines of `8:0 Read 4096`.
fn io1(files: &CgroupFiles) -> Value {
    let mut blkio = Map::new();
    for (member, names) in [
        (
            "ioServiceBytesRecursive",
            ["blkio.bfq.io_service_bytes_recursive", "blkio.throttle.io_service_bytes_recursive"],
        ),
        ("ioServicedRecursive", ["blkio.bfq.io_serviced_recursive", "blkio.throttle.io_serviced_recursive"]),
    ] {
        let text = names.iter().filter_map(|name| files.text(name)).find(|text| text.contains(':')).unwrap_or_default();
        let entries: Vec<_> = text
            .lines()
            .filter_map(|line| {
                let words: Vec<_> = line.split(' ').collect();
                let [device, op, value] = words[..] else { return None };
                io_entry(device, op, value.parse().ok()?)
            })
            .collect();
        if !entries.is_empty() {
            blkio.insert(member.into(), Value::from(entries));
        }
    }
    Value::from(blkio)
}

/// Lines of `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
fn io2(files: &CgroupFiles) -> Value {
    let text = files.text("io.stat").unwrap_or_default();
    let mut blkio = Map::new();
    for (key, member, op) in [
        ("rbytes", "ioServiceBytesRecursive", "Read"),
        ("wbytes", "ioServiceBytesRecursive", "Write"),
        ("dbytes", "ioServiceBytesRecursive", "Discard"),
        ("rios", "ioServicedRecursive", "Read"),
        ("wios", "ioServicedRecursive", "Write"),
        ("dios", "ioServicedRecursive", "Discard"),
    ] {
        let entries = text.lines().filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let value = rest.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))?;
            io_entry(device, op, value.parse().ok()?)
        });
        let entries: Vec<_> = entries.collect();
        if !entries.is_empty()
            && let Some(list) = blkio.entry(member).or_insert_with(|| json!([])).as_array_mut()
        {
            list.extend(entries);
        }
    }
    let mut blkio = Value::from(blkio);
    add_pressure(&mut blkio, files, "io.pressure");
    blkio
}

/// By page size, as `2MB`.
fn hugetlb(files: &CgroupFiles, version2: bool) -> Value {
    let sizes = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let sizes = sizes.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let kilobytes: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        Some(match kilobytes {
            n if n % (1 << 20) == 0 => format!("{}GB", n >> 20),
            n if n % (1 << 10) == 0 => format!("{}MB", n >> 10),
            n => format!("{n}KB"),
        })
    });
    let (now, max, failures) =
        if version2 { ("current", "max_usage", "events") } else { ("usage_in_bytes", "max_usage_in_bytes", "failcnt") };
    let of = |size: &str, what: &str| files.number(&format!("hugetlb.{size}.{what}"));
    let entries = sizes.filter_map(|size| {
        let usage = of(&size, now)?;
        let failures = of(&size, failures)
            .or_else(|| files.table(&format!("hugetlb.{size}.events")).get("max").copied())
            .unwrap_or(0);
        let mut entry = without_zeros([("usage", usage), ("max", of(&size, max).unwrap_or(0))]);
        entry.insert("failcnt".into(), json!(failures));
        Some((size, Value::from(entry)))
    });
    Value::from(entries.collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(name: &str, files: &[(&str, &str)]) -> CgroupFiles {
        let dir = std::env::temp_dir().join(format!("lmrun-stats-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
        CgroupFiles { dirs: vec![dir] }
    }

    #[test]
    fn version_2_in_the_words_of_version_1() {
        let files = files(
            "v2",
            &[
                (
                    "cpu.stat",
                    "usage_usec 5\nuser_usec 2\nsystem_usec 3\nnr_periods 1\nnr_throttled 0\nthrottled_usec 0\n",
                ),
                ("cpu.pressure", "some avg10=0.50 avg60=0.00 avg300=0.00 total=7\n"),
                ("memory.current", "4096\n"),
                ("memory.max", "8192\n"),
                ("memory.swap.max", "max\n"),
                ("memory.stat", "anon 1\nfile 2\n"),
                ("pids.current", "3\n"),
                ("pids.max", "max\n"),
                ("io.stat", "8:0 rbytes=10 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n"),
            ],
        );
        let stats = stats(&files);
        assert_eq!(stats["cpu"]["usage"], json!({ "total": 5000, "kernel": 3000, "user": 2000 }));
        assert_eq!(stats["cpu"]["throttling"], json!({ "periods": 1 }));
        assert_eq!(stats["cpu"]["psi"]["some"]["total"], json!(7));
        assert_eq!(stats["memory"]["usage"], json!({ "limit": 8192, "usage": 4096, "failcnt": 0 }));
        assert_eq!(stats["memory"]["swap"]["limit"], json!(u64::MAX));
        assert_eq!(stats["memory"]["cache"], json!(2));
        assert_eq!(stats["pids"], json!({ "current": 3 }));
        assert_eq!(
            stats["blkio"]["ioServiceBytesRecursive"][0],
            json!({ "major": 8, "minor": 0, "op": "Read", "value": 10 })
        );
        fs::remove_dir_all(&files.dirs[0]).unwrap();
    }

    #[test]
    fn lists() {
        assert_eq!(ids("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(ids(""), None);
    }
}
