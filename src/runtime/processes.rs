//! The processes of a container, as ps(1) shows them.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::cgroup::Cgroup;
use super::state::Store;
use super::timestamp::rfc3339;
use super::{Result, passwd};

/// The pids of container `id` on the host, in ascending order; none when it has stopped.
pub fn processes(store: &Store, id: &str) -> Result<Vec<i32>> {
    Cgroup::at(&store.load(id)?.cgroup).pids()
}

/// USER_HZ: what times in /proc/PID/stat are counted in.
const TICKS: u64 = 100;

/// The value of column `name` (one of ps's) for a process; None for a column that is not known, empty where the process is
/// gone.
pub fn column(pid: i32, name: &str) -> Option<String> {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    // proc_pid_stat(5); the name may hold anything, the fields behind it begin with the third.
    let stat = read("stat");
    let (_, behind) = stat.rsplit_once(") ").unwrap_or_default();
    let fields: Vec<&str> = behind.split_whitespace().collect();
    let field = |n: usize| fields.get(n - 3).copied().unwrap_or_default();
    let number = |n: usize| field(n).parse::<u64>().unwrap_or(0);
    let status = |name: &str| {
        let text = read("status");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned));
        line.unwrap_or_default().split_whitespace().nth(1).unwrap_or_default().to_owned()
    };
    let user = || {
        let uid = status("Uid");
        let known = uid.parse().ok().and_then(|uid| passwd::user(Path::new("/etc/passwd"), uid));
        known.map_or(uid, |user| user.name)
    };
    let cpu = || (number(14) + number(15)) / TICKS;
    let age = || since_boot().saturating_sub(number(22) / TICKS);
    Some(match name {
        "pid" => pid.to_string(),
        "ppid" => field(4).to_owned(),
        "pgid" | "pgrp" => field(5).to_owned(),
        "sid" | "sess" => field(6).to_owned(),
        "uid" => status("Uid"),
        "gid" => status("Gid"),
        "user" | "euser" | "uname" => user(),
        "c" => (cpu() * 100 / age().max(1)).min(99).to_string(),
        "pcpu" | "%cpu" => format!("{:.1}", cpu() as f64 * 100.0 / age().max(1) as f64),
        "s" | "state" | "stat" => field(3).to_owned(),
        "ni" | "nice" => field(19).to_owned(),
        "nlwp" | "thcount" => field(20).to_owned(),
        "vsz" | "vsize" => (number(23) / 1024).to_string(),
        "rss" | "rssize" => (number(24) * 4).to_string(),
        "tty" | "tname" | "tt" => terminal(number(7)),
        "time" | "cputime" => hours(cpu()),
        "etime" => hours(age()),
        "etimes" => age().to_string(),
        "stime" | "start" => started(age()),
        "comm" | "ucmd" | "ucomm" => read("comm").trim_end().to_owned(),
        "cmd" | "args" | "command" => {
            let line = read("cmdline").trim_end_matches('\0').replace('\0', " ");
            if line.is_empty() { format!("[{}]", column(pid, "comm")?) } else { line }
        }
        _ => return None,
    })
}

fn since_boot() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split('.').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0)
}

fn hours(seconds: u64) -> String {
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// The time of day, UTC, or the day when that is another one.
fn started(age: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let at = now.saturating_sub(age);
    let text = rfc3339(UNIX_EPOCH + Duration::from_secs(at));
    if at / 86_400 == now / 86_400 { text[11..16].to_owned() } else { text[..10].to_owned() }
}

/// Device numbers of Documentation/admin-guide/devices.txt, packed as in stat(2).
fn terminal(device: u64) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    match major {
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        4 if minor < 64 => format!("tty{minor}"),
        4 => format!("ttyS{}", minor - 64),
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_the_test_itself() {
        let own = std::process::id().cast_signed();
        assert_eq!(column(own, "pid").unwrap(), own.to_string());
        assert_eq!(column(own, "ppid").unwrap(), nix::unistd::getppid().to_string());
        assert!(column(own, "args").unwrap().contains("lmrun"));
        assert_eq!(column(own, "no_such"), None);
    }

    #[test]
    fn terminals_and_times() {
        assert_eq!(terminal(0x8803), "pts/3");
        assert_eq!(terminal(0), "?");
        assert_eq!(hours(3_725), "01:02:05");
    }
}
