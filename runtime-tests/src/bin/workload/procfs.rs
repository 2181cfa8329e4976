//! What /proc says of a process.

use std::fs;

use crate::stage::Fallible;

pub fn text(path: &str) -> Fallible<String> {
    fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).map_err(|e| format!("{path}: {e}"))
}

pub fn bytes(path: &str) -> Fallible<Vec<u8>> {
    fs::read(path).map_err(|e| format!("{path}: {e}"))
}

pub fn link(path: &str) -> Fallible<String> {
    fs::read_link(path).map(|p| p.to_string_lossy().into_owned()).map_err(|e| format!("{path}: {e}"))
}

/// The named lines of `/proc/WHO/status`, `WHO` being a pid, `self` or `PID/task/TID`.
pub fn status(who: &str, fields: &[&str]) -> Fallible<Vec<String>> {
    let all = text(&format!("/proc/{who}/status"))?;
    let wanted = |line: &&str| fields.contains(&line.split(':').next().unwrap_or_default());
    Ok(all.lines().filter(wanted).map(str::to_owned).collect())
}

/// Fields of `/proc/WHO/stat`, numbered as in proc(5) from 1; those of `comm` and before cannot be asked for.
pub fn stat(who: &str, fields: &[usize]) -> Fallible<Vec<i64>> {
    let all = text(&format!("/proc/{who}/stat"))?;
    let (_, rest) = all.rsplit_once(") ").ok_or("stat without a name")?;
    let parts: Vec<&str> = rest.split_whitespace().collect();
    fields
        .iter()
        .map(|field| {
            let part = parts.get(field - 3).ok_or_else(|| format!("stat has no field {field}"))?;
            Ok(part.parse::<u64>().map(|n| n as i64).or_else(|_| part.parse()).unwrap_or(-1))
        })
        .collect()
}

/// The entry of `/proc/self/smaps` for the mapping that holds `addr`.
pub fn smaps_of(addr: usize) -> Fallible<String> {
    let all = text("/proc/self/smaps")?;
    let mut entry = String::new();
    let mut inside = false;
    for line in all.lines() {
        let head = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let range =
            head.and_then(|(a, b)| Some((usize::from_str_radix(a, 16).ok()?, usize::from_str_radix(b, 16).ok()?)));
        if let Some((start, end)) = range {
            inside = (start..end).contains(&addr);
        }
        if inside {
            entry.push_str(line);
            entry.push('\n');
        }
    }
    if entry.is_empty() { Err(format!("nothing is mapped at {addr:#x}")) } else { Ok(entry) }
}

/// A line of an smaps entry, without its name: `smaps_field(&entry, "VmFlags")`.
pub fn smaps_field(entry: &str, name: &str) -> Fallible<String> {
    let line = entry.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    line.map(|l| l.trim().to_owned()).ok_or_else(|| format!("smaps has no {name}"))
}

/// A size in an smaps entry, in bytes.
pub fn smaps_size(entry: &str, name: &str) -> Fallible<usize> {
    let field = smaps_field(entry, name)?;
    let kib = field.strip_suffix(" kB").and_then(|n| n.trim().parse::<usize>().ok());
    kib.map(|n| n * 1024).ok_or_else(|| format!("smaps {name}: {field}"))
}
