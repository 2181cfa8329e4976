//! `/proc/PID/status`, `stat`, `limits`, `timers` and `fdinfo`.

use std::fs;
use std::io;

use libc::pid_t;

use super::{malformed, text};

/// `/proc/PID/status`.
#[derive(Debug, Clone)]
pub struct Status(String);

/// Reads the status of a process or, with its tid, of a thread.
pub fn status(tid: pid_t) -> io::Result<Status> {
    text(format!("/proc/{tid}/status")).map(Status)
}

impl Status {
    pub fn field(&self, name: &str) -> io::Result<&str> {
        let value = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map(str::trim).ok_or_else(|| malformed(format_args!("status: no field {name}")))
    }

    pub fn number<T: std::str::FromStr>(&self, name: &str) -> io::Result<T> {
        self.field(name)?.parse().map_err(|_| malformed(format_args!("status: field {name}")))
    }

    /// A field of numbers in the given radix, e.g. `Uid`, `NSpid`, or a mask.
    pub fn numbers(&self, name: &str, radix: u32) -> io::Result<Vec<u64>> {
        let parsed: Result<_, _> =
            self.field(name)?.split_whitespace().map(|s| u64::from_str_radix(s, radix)).collect();
        parsed.map_err(|_| malformed(format_args!("status: field {name}")))
    }

    /// The single mask of a field such as `SigCgt` or `CapEff`.
    pub fn mask(&self, name: &str) -> io::Result<u64> {
        self.numbers(name, 16)?.first().copied().ok_or_else(|| malformed(format_args!("status: field {name}")))
    }

    /// The id in the innermost pid namespace: `NStgid`, `NSpid`, `NSpgid` or `NSsid`.
    pub fn innermost(&self, name: &str) -> io::Result<u32> {
        self.numbers(name, 10)?.last().map(|&n| n as u32).ok_or_else(|| malformed(format_args!("status: field {name}")))
    }
}

/// The fields of `/proc/PID/stat` that nothing else shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stat {
    pub state: char,
    pub ppid: pid_t,
    /// The controlling terminal: minor in bits 31 to 20 and 7 to 0, major in 15 to 8; 0 for none.
    pub terminal: u32,
    /// The terminal's foreground process group, -1 for none.
    pub foreground: pid_t,
    pub flags: u32,
    /// In clock ticks since boot.
    pub start_time: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// As waitpid(2) gives it.
    pub exit_code: u32,
}

pub fn stat(pid: pid_t) -> io::Result<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    let text = String::from_utf8_lossy(&text);
    // The name may hold anything, parentheses too; the rest cannot.
    let rest = text.rsplit_once(") ").ok_or_else(|| malformed("stat"))?.1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Field numbers are those of proc_pid_stat(5); the third is the first after the name.
    let field = |n: usize| fields.get(n - 3).copied().ok_or_else(|| malformed("stat: too few fields"));
    let number = |n: usize| field(n)?.parse::<u64>().map_err(|_| malformed(format_args!("stat: field {n}")));
    Ok(Stat {
        state: field(3)?.chars().next().unwrap_or('?'),
        ppid: number(4)? as pid_t,
        terminal: field(7)?.parse::<i32>().map_err(|_| malformed("stat: field 7"))?.cast_unsigned(),
        foreground: field(8)?.parse().map_err(|_| malformed("stat: field 8"))?,
        flags: number(9)? as u32,
        start_time: number(22)?,
        start_code: number(26)?,
        end_code: number(27)?,
        start_stack: number(28)?,
        start_data: number(45)?,
        end_data: number(46)?,
        start_brk: number(47)?,
        arg_start: number(48)?,
        arg_end: number(49)?,
        env_start: number(50)?,
        env_end: number(51)?,
        exit_code: number(52)? as u32,
    })
}

/// Soft and hard limit; `u64::MAX` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub soft: u64,
    pub hard: u64,
}

/// The limits in the order of RLIMIT_* (include/uapi/asm-generic/resource.h). Unlike prlimit(2),
/// reading them needs no privilege over the task.
pub fn limits(pid: pid_t) -> io::Result<Vec<Limit>> {
    const NAMES: [&str; 16] = [
        "Max cpu time",
        "Max file size",
        "Max data size",
        "Max stack size",
        "Max core file size",
        "Max resident set",
        "Max processes",
        "Max open files",
        "Max locked memory",
        "Max address space",
        "Max file locks",
        "Max pending signals",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
        "Max realtime timeout",
    ];
    let text = text(format!("/proc/{pid}/limits"))?;
    let value = |s: &str| {
        if s == "unlimited" { Some(u64::MAX) } else { s.parse().ok() }
    };
    NAMES
        .iter()
        .map(|name| {
            let line = text.lines().find_map(|l| l.strip_prefix(name));
            let mut f = line.unwrap_or("").split_whitespace();
            let soft = f.next().and_then(value);
            soft.zip(f.next().and_then(value))
                .map(|(soft, hard)| Limit { soft, hard })
                .ok_or_else(|| malformed(format_args!("limits: {name}")))
        })
        .collect()
}

/// A POSIX timer as `/proc/PID/timers` shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timer {
    pub id: u32,
    pub signal: u32,
    /// `sigev_value`
    pub value: u64,
    /// SIGEV_*: 0 signal, 1 none, 4 thread id.
    pub notify: u32,
    /// The pid or, for SIGEV_THREAD_ID, the tid that is notified, in the reader's pid namespace.
    pub target: pid_t,
    pub clock: u32,
}

pub fn timers(pid: pid_t) -> io::Result<Vec<Timer>> {
    let text = text(format!("/proc/{pid}/timers"))?;
    parse_timers(&text).ok_or_else(|| malformed("timers"))
}

fn parse_timers(text: &str) -> Option<Vec<Timer>> {
    let mut all: Vec<Timer> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        if key == "ID" {
            all.push(Timer { id: value.parse().ok()?, ..Timer::default() });
            continue;
        }
        let timer = all.last_mut()?;
        match key {
            "signal" => {
                let (signal, address) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                timer.value = u64::from_str_radix(address.trim_start_matches("0x"), 16).ok()?;
            }
            "notify" => {
                let (how, target) = value.split_once('/')?;
                let (kind, target) = (how, target.split_once('.')?.1);
                timer.notify = match kind {
                    "signal" => 0,
                    "none" => 1,
                    "thread" => 2,
                    _ => return None,
                } | if value.contains("/tid.") { 4 } else { 0 };
                timer.target = target.parse().ok()?;
            }
            "ClockID" => timer.clock = value.parse::<i32>().ok()? as u32,
            _ => return None,
        }
    }
    Some(all)
}

/// `/proc/PID/fdinfo/FD`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FdInfo {
    pub pos: u64,
    /// O_* flags, O_CLOEXEC as that of the descriptor.
    pub flags: u32,
    pub mnt_id: i32,
    /// The lines that the kind of file adds.
    pub extra: Vec<(String, String)>,
}

impl FdInfo {
    /// The value of the kind's line `key`.
    pub fn get(&self, key: &str) -> io::Result<&str> {
        self.extra
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
            .ok_or_else(|| malformed(format_args!("fdinfo: no line {key}")))
    }

    /// The values of all lines `key`.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.extra.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

pub fn fd_info(pid: pid_t, fd: i32) -> io::Result<FdInfo> {
    let text = text(format!("/proc/{pid}/fdinfo/{fd}"))?;
    parse_fd_info(&text).ok_or_else(|| malformed(format_args!("fdinfo of descriptor {fd} of pid {pid}")))
}

fn parse_fd_info(text: &str) -> Option<FdInfo> {
    let mut info = FdInfo::default();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        match key {
            "pos" => info.pos = value.parse::<i64>().ok()? as u64,
            "flags" => info.flags = u32::from_str_radix(value, 8).ok()?,
            "mnt_id" => info.mnt_id = value.parse().ok()?,
            _ => info.extra.push((key.trim().into(), value.into())),
        }
    }
    Some(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read() {
        let text = "ID: 0\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 3\nsignal: 34/0000000000000000\nnotify: signal/tid.77\nClockID: -6\n";
        let t = parse_timers(text).unwrap();
        assert_eq!(t[0], Timer { id: 0, signal: 60, value: 0x7fff_86e4_52a8, notify: 0, target: 2634, clock: 0 });
        assert_eq!((t[1].id, t[1].notify, t[1].target, t[1].clock as i32), (3, 4, 77, -6));
    }

    #[test]
    fn fdinfo_keeps_the_kinds_lines() {
        let i = parse_fd_info("pos:\t0\nflags:\t02004002\nmnt_id:\t15\nino:\t7\neventfd-count:                5\n")
            .unwrap();
        assert_eq!((i.flags, i.mnt_id), (0o2004002, 15));
        assert_eq!(i.get("eventfd-count").unwrap(), "5");
        assert!(i.get("tfd").is_err());
    }

    #[test]
    fn our_own_task_reads() {
        let me = std::process::id() as pid_t;
        assert_eq!(status(me).unwrap().number::<pid_t>("Pid").unwrap(), me);
        assert!(stat(me).unwrap().start_time > 0);
        assert_eq!(limits(me).unwrap().len(), 16);
    }
}
