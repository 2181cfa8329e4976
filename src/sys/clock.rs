//! Clocks and their offsets in a time namespace (time_namespaces(7)). Times are in nanoseconds.

use std::io;

use libc::pid_t;
use nix::time::{ClockId, clock_gettime};

pub const NANOS: i128 = 1_000_000_000;

fn now(clock: ClockId) -> i128 {
    // The clocks asked for below exist on every kernel.
    let t = clock_gettime(clock).expect("clock_gettime of a clock that always exists");
    i128::from(t.tv_sec()) * NANOS + i128::from(t.tv_nsec())
}

/// CLOCK_MONOTONIC of the caller.
pub fn monotonic() -> i128 {
    now(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_BOOTTIME of the caller.
pub fn boottime() -> i128 {
    now(ClockId::CLOCK_BOOTTIME)
}

/// CLOCK_REALTIME, which no namespace shifts.
pub fn realtime() -> i128 {
    now(ClockId::CLOCK_REALTIME)
}

/// How far a task's clocks are ahead of another's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shift {
    pub monotonic: i128,
    pub boottime: i128,
}

/// How far the clocks of `pid`'s time namespace are ahead of the caller's. Kernels without time namespaces: not at all.
pub fn shift_of(pid: pid_t) -> io::Result<Shift> {
    let read = |who: &str| match std::fs::read_to_string(format!("/proc/{who}/timens_offsets")) {
        Ok(text) => Ok(parse(&text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Shift::default()),
        Err(e) => Err(e),
    };
    let (theirs, ours) = (read(&pid.to_string())?, read("self")?);
    Ok(Shift { monotonic: theirs.monotonic - ours.monotonic, boottime: theirs.boottime - ours.boottime })
}

/// Lines of `clock seconds nanoseconds`.
fn parse(text: &str) -> Shift {
    let value = |clock: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(clock));
        let mut numbers = line.unwrap_or("").split_whitespace().filter_map(|n| n.parse::<i128>().ok());
        numbers.next().unwrap_or(0) * NANOS + numbers.next().unwrap_or(0)
    };
    Shift { monotonic: value("monotonic"), boottime: value("boottime") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read() {
        let s = parse("monotonic        -1001 500000000\nboottime           7         0\n");
        assert_eq!(s, Shift { monotonic: -1001 * NANOS + NANOS / 2, boottime: 7 * NANOS });
    }
}
