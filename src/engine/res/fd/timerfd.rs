//! timerfd_create(2).

use std::os::fd::OwnedFd;

use libc::c_int;

use super::{Collected, FdFacts, FdKind, Workshop, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry, TimerfdEntry};
use crate::sys::file::{self, TimerValue};
use crate::sys::proc;
use crate::tracee::batch::Batch;

pub struct TimerFd;

const NANOS: u64 = 1_000_000_000;

impl FdKind for TimerFd {
    const NAME: &'static str = "timerfd";
    const TYPE: FdTypes = FdTypes::Timerfd;

    fn claims(f: &FdFacts) -> bool {
        f.link == b"anon_inode:[timerfd]"
    }

    fn dump(f: &FdFacts, id: u32, _: &mut Collected) -> Result<FileEntry> {
        let ticks = f.number("ticks", 10)?;
        let now;
        let f = if ticks > 0 && pair(f, "it_interval")? != (0, 0) {
            file::count_missed(&f.dup, ticks).map_err(|e| Error::proc(f.pid, e))?;
            let dup = f.dup.try_clone().map_err(|e| Error::proc(f.pid, e))?;
            let info = proc::fd_info(f.pid, f.fd).map_err(|e| Error::proc(f.pid, e))?;
            now = FdFacts { info, dup, link: f.link.clone(), ..*f };
            &now
        } else {
            f
        };
        let (vsec, vnsec) = pair(f, "it_value")?;
        let (isec, insec) = pair(f, "it_interval")?;
        let record = TimerfdEntry {
            id,
            flags: f.flags(),
            fown: f.owner()?,
            clockid: f.number("clockid", 10)? as u32,
            ticks: f.number("ticks", 10)?,
            settime_flags: f.number("settime flags", 8)? as u32,
            vsec,
            vnsec,
            isec,
            insec,
        };
        Ok(FileEntry { r#type: Self::TYPE as i32, id, tfd: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.tfd.as_ref())?;
        let value = TimerValue { left: time_left(r, shop.elapsed), interval: (r.isec, r.insec) };
        let make = || {
            let fd = file::timerfd(r.clockid as c_int, value, r.settime_flags as c_int, r.ticks)?;
            file::set_flags(&fd, r.flags)?;
            Ok(fd)
        };
        make().map_err(Error::system(format_args!("make timerfd {:#x} of clock {}", e.id, r.clockid)))
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.tfd.as_ref().map(|r| &r.fown)
    }
}

/// The kernel shows the time left. Clocks of this machine stand still for the container in between; a time
/// of day does not.
fn time_left(r: &TimerfdEntry, elapsed: u64) -> (u64, u64) {
    let is_time_of_day = r.clockid == libc::CLOCK_REALTIME as u32 || r.clockid == libc::CLOCK_REALTIME_ALARM as u32;
    let absolute = r.settime_flags & libc::TFD_TIMER_ABSTIME as u32 != 0;
    let left = r.vsec.saturating_mul(NANOS).saturating_add(r.vnsec);
    if left == 0 || !is_time_of_day || !absolute {
        return (r.vsec, r.vnsec);
    }
    let left = left.saturating_sub(elapsed).max(1);
    (left / NANOS, left % NANOS)
}

/// `(seconds, nanoseconds)`
fn pair(f: &FdFacts, key: &str) -> Result<(u64, u64)> {
    let line = f.line(key)?;
    let inner = line.strip_prefix('(').and_then(|l| l.strip_suffix(')'));
    let parsed =
        inner.and_then(|l| l.split_once(',')).and_then(|(s, n)| Some((s.trim().parse().ok()?, n.trim().parse().ok()?)));
    parsed.ok_or_else(|| Error::BadFdInfo { pid: f.pid, fd: f.fd, line: line.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_times_of_day_go_on_meanwhile() {
        let r =
            TimerfdEntry { vsec: 5, clockid: libc::CLOCK_REALTIME as u32, settime_flags: 1, ..TimerfdEntry::default() };
        assert_eq!(time_left(&r, 2 * NANOS), (3, 0));
        assert_eq!(time_left(&r, 9 * NANOS), (0, 1));
        assert_eq!(time_left(&TimerfdEntry { settime_flags: 0, ..r.clone() }, NANOS), (5, 0));
        assert_eq!(time_left(&TimerfdEntry { clockid: libc::CLOCK_MONOTONIC as u32, ..r.clone() }, NANOS), (5, 0));
        assert_eq!(time_left(&TimerfdEntry { vsec: 0, ..r }, NANOS), (0, 0));
    }
}
