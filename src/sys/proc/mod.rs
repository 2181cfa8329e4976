//! /proc parsers (proc(5)): text in, plain values out.

mod maps;
mod task;

pub use maps::{Vma, maps, smaps};
pub use task::{FdInfo, Limit, Stat, Status, Timer, fd_info, limits, stat, status, timers};

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use libc::pid_t;

pub(super) fn malformed(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("cannot parse {what}"))
}

/// A file as a whole, in as few calls as it takes: each makes the kernel write it anew. Names in it are bytes; nothing else
/// is.
fn text(path: impl AsRef<Path>) -> io::Result<String> {
    let mut bytes = Vec::with_capacity(4096);
    // A limit keeps std from asking for a size, which /proc does not know.
    File::open(path)?.take(u64::MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

fn numbers<T: std::str::FromStr + Ord>(dir: String) -> io::Result<Vec<T>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        if let Some(n) = entry?.file_name().to_str().and_then(|s| s.parse().ok()) {
            all.push(n);
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// The threads of a process; its leader is among them.
pub fn threads(pid: pid_t) -> io::Result<Vec<pid_t>> {
    numbers(format!("/proc/{pid}/task"))
}

/// The children of a process, whichever thread made them.
pub fn children(pid: pid_t) -> io::Result<Vec<pid_t>> {
    let mut all = Vec::new();
    for tid in threads(pid)? {
        match text(format!("/proc/{pid}/task/{tid}/children")) {
            Ok(text) => all.extend(text.split_whitespace().filter_map(|s| s.parse::<pid_t>().ok())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// The open descriptors of a process, in ascending order.
pub fn descriptors(pid: pid_t) -> io::Result<Vec<i32>> {
    numbers(format!("/proc/{pid}/fd"))
}

/// What a link below `/proc/PID` points to, e.g. `fd/3`, `exe`, `ns/net`.
pub fn link(pid: pid_t, name: &str) -> io::Result<OsString> {
    fs::read_link(format!("/proc/{pid}/{name}")).map(PathBuf::into_os_string)
}

/// A line of `/proc/PID/mountinfo`, proc_pid_mountinfo(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub id: i32,
    /// `major:minor` of the file system.
    pub device: String,
    /// What of the file system is mounted; `/` is all of it.
    pub root: String,
    /// Where, seen from the task's root.
    pub point: String,
    /// The mount or its file system cannot be written to.
    pub read_only: bool,
    pub fs_type: String,
    /// The file system's own options, as the kernel writes them.
    pub of_fs: String,
}

impl Mount {
    /// The values of one of the file system's own options, which may be there more than once.
    pub fn values(&self, option: &str) -> Vec<String> {
        let all = self.of_fs.split(',').filter_map(|o| o.split_once('='));
        all.filter(|(name, _)| *name == option).map(|(_, value)| unescaped(value)).collect()
    }
}

/// The mounts that a task sees.
pub fn mounts(pid: pid_t) -> io::Result<Vec<Mount>> {
    let text = text(format!("/proc/{pid}/mountinfo"))?;
    text.lines().map(|l| mount(l).ok_or_else(|| malformed(format_args!("mountinfo line {l:?}")))).collect()
}

fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let fields: Vec<&str> = before.split(' ').collect();
    let [id, _, device, root, point, options, ..] = fields[..] else { return None };
    let mut after = after.split(' ');
    let (fs_type, of_fs) = (after.next()?, after.nth(1)?);
    let is_ro = |options: &str| options.split(',').any(|o| o == "ro");
    Some(Mount {
        id: id.parse().ok()?,
        device: device.to_owned(),
        root: unescaped(root),
        point: unescaped(point),
        read_only: is_ro(options) || is_ro(of_fs),
        fs_type: fs_type.to_owned(),
        of_fs: of_fs.to_owned(),
    })
}

/// Space, tab, newline and backslash stand as `\040` and so on.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(byte) => {
                out.push(byte.into());
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

/// The processes in the cgroup of `pid`, and in those below it; empty where that is a root cgroup or not mounted
/// under `/sys/fs/cgroup`. One hierarchy is enough: a container is in one cgroup in each.
pub fn cgroup_members(pid: pid_t) -> io::Result<Vec<pid_t>> {
    let text = text(format!("/proc/{pid}/cgroup"))?;
    for line in text.lines() {
        let mut f = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (f.next(), f.next(), f.next()) else { continue };
        let mounts: &[&str] =
            if controllers.is_empty() { &["", "unified"] } else { &[controllers.trim_start_matches("name=")] };
        for mount in mounts {
            let dir = PathBuf::from(format!("/sys/fs/cgroup/{mount}/{path}"));
            if path != "/" && dir.join("cgroup.procs").exists() {
                let mut all = Vec::new();
                members(&dir, &mut all)?;
                return Ok(all);
            }
        }
    }
    Ok(Vec::new())
}

fn members(dir: &std::path::Path, all: &mut Vec<pid_t>) -> io::Result<()> {
    let text = text(dir.join("cgroup.procs"))?;
    all.extend(text.lines().filter_map(|l| l.parse::<pid_t>().ok()).filter(|p| *p != 0));
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            members(&entry.path(), all)?;
        }
    }
    Ok(())
}
